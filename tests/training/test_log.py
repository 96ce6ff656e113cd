"""The log: lines that fit a screen, what a method lacks in words, TensorBoard's files."""
import argparse
import json

import pytest
from conftest import finish

from step import METHODS, METRICS
from training.log import COLUMNS, Log, header, unrewarded


def totals(loss=0.5, values=None, tokens=1000.0):
    """What a step hands over: loss, tokens, sum and count of each of METRICS; a count of 0 where
    `values` has no number."""
    found = [loss, tokens]
    for name in METRICS:
        value = (values or {}).get(name)
        found += [0.0, 0.0] if value is None else [2 * value, 2.0]
    return found


def make_log(folder, total_steps=12345, logging_steps=1, report_to="none"):
    return Log(argparse.Namespace(output_dir=str(folder), logging_steps=logging_steps,
                                  report_to=report_to), 0, total_steps)


def test_a_line_has_fixed_columns_and_less_than_100_of_them(tmp_path, capsys):
    # The widest: all metrics, numbers that are small, large, negative, not finite.
    log = make_log(tmp_path)
    for step, value in enumerate((0.0, -0.00001, -0.5, 7.25, -123.456, 12345.678, -1e9, 1e-30,
                                  float("nan"), float("inf")), 1):
        log.add(step, totals(value, dict.fromkeys(METRICS, value) | {
            "rewards/accuracies": 0.5}), abs(value), 1.234e-5)
    above, names, *lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10 and {len(line) for line in (names, *lines)} == {len(names)}
    assert len(names) < 100 and len(above) < 100
    assert names.split() == ["step", "loss", "good", "bad", "margin", "right", "good", "bad",
                             "grad", "lr", "tok/s", "left"]
    assert above.split() == ["reward", "log-prob"]
    for line in lines:                                       # no two numbers grow together
        assert len(line.split()) == 1 + len(names.split())
    assert lines[2].split()[:5] == ["step", "3/12345", "-0.500", "-0.500", "-0.500"]
    assert " 1.2e-05 " in lines[0]
    kept = [json.loads(line) for line in open(tmp_path / "metrics.jsonl").readlines()[:8]]
    assert kept[4]["rewards/margins"] == pytest.approx(-123.456)           # the file has all digits


def test_names_stand_above_now_and_then_and_where_a_metric_is_new(tmp_path, capsys):
    # A batch without bad responses leaves a hole, no shift.
    log = make_log(tmp_path, total_steps=99)
    for step in range(1, 31):
        values = {"logps/positive": -5.0} | ({"logps/negative": -6.0} if step > 2 else {})
        log.add(step, totals(values=values if step != 9 else {"logps/negative": -6.0}), 1.0, 1e-3)
    lines = capsys.readouterr().out.splitlines()
    heads = [number for number, line in enumerate(lines) if line.startswith("step    ")]
    assert len(heads) == 3 and len(lines) == 30 + 2 * 3
    assert lines[heads[0]].split() == ["step", "loss", "good", "grad", "lr", "tok/s", "left"]
    ninth = next(line for line in lines if line.startswith("step 9/"))
    column = lines[heads[1]].index("bad") + len("bad")
    assert ninth[:column].endswith("-6.0000") and len(ninth) == len(lines[-1])


def test_metrics_file_is_json_lines_of_known_keys(tmp_path):
    # metrics come from sums and counts, so a key is absent (not NaN) where its count is 0
    log = make_log(tmp_path, total_steps=2)
    sums = [3.0, 2.0, 0.0, 0.0, -8.0, 4.0, 0.0, 0.0, 1.0, 2.0, 6.0, 2.0]
    log.add(1, [0.5, 100.0, *sums], 0.1, 1e-3)
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line["loss"] == 0.5 and line["tokens"] == 100
    assert [line.get(key) for key in METRICS] == [1.5, None, -2.0, None, 0.5, 3.0]


def test_every_metric_has_a_column():
    assert set(METRICS) <= COLUMNS.keys()
    assert len(header(list(COLUMNS), 16).splitlines()) == 2


def test_a_step_that_is_not_due_is_shown_after_a_silence(tmp_path, capsys, monkeypatch):
    # A step of a large model takes a minute, and a line is due every ten.
    log = make_log(tmp_path, total_steps=20, logging_steps=10)
    log.add(1, totals(), 1.0, 1e-3)
    assert capsys.readouterr().out == ""
    log.last_shown -= 11
    log.add(2, totals(0.25), 1.0, 1e-3)
    log.add(3, totals(0.25), 1.0, 1e-3)
    assert capsys.readouterr().out.startswith("step 2/20  loss 0.2500  0:0")
    assert not (tmp_path / "metrics.jsonl").exists()


def test_the_time_of_an_evaluation_is_not_in_the_speed_of_training(tmp_path, capsys, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("training.log.time.perf_counter", lambda: clock[0])
    log = make_log(tmp_path, total_steps=4, logging_steps=2)
    for step, seconds in ((1, 5.0), (2, 5.0)):
        clock[0] += seconds
        log.add(step, totals(), 1.0, 1e-3)
        clock[0] += 1000.0
        log.add_held_out(step, {"eval/loss": 0.5}, [{"prompt": "a\n\x1b[2J?", "policy": "b" * 300}])
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line["tokens_per_s"] == 200.0
    shown = capsys.readouterr().out
    assert "after step 2, held out:  loss 0.5" in shown and r"a\n\x1b[2J?" in shown
    assert "b" * 240 + " …" in shown and "b" * 241 not in shown
    rows = [json.loads(line) for line in open(tmp_path / "eval.jsonl")]
    assert rows[1]["step"] == 2 and rows[1]["answers"][0]["policy"] == "b" * 300


def test_what_a_method_has_no_reward_for_is_said():
    assert {name for name, method in METHODS.items() if not unrewarded(name, method)} == {
        "ulma_mse", "pointwise_dpo", "pointwise_mse", "bco", "kto", "dpo", "ipo", "simpo",
        "positive_dpo", "negative_dpo", "d2o", "reward_model", "pointwise_reward_model",
        "mse_reward_model"}
    assert "no rewards of good responses" in unrewarded("ulma", METHODS["ulma"])
    assert "no rewards: --method sft runs no reference" in unrewarded("sft", METHODS["sft"])


def test_tensorboard_reads_every_number(tmp_path):
    # Also after a resume: what was written past the step that it goes on from is hidden.
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    log = make_log(tmp_path, total_steps=9, report_to="tensorboard")
    for step in (1, 2, 3):
        log.add(step, totals(step, {"rewards/margins": 0.25}), 1.0, 1e-3)
    log.add_held_out(3, {"eval/kl": 0.125}, [])
    again = Log(argparse.Namespace(output_dir=str(tmp_path), logging_steps=1,
                                   report_to="tensorboard"), 2, 9)
    again.add(3, totals(7.0), 1.0, 1e-3)
    for made in (log, again):
        made.board.writer.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 7.0)]
    assert [e.value for e in events.Scalars("rewards/margins")] == [0.25, 0.25]
    assert {"lr", "grad_norm", "tokens_per_s"} <= set(events.Tags()["scalars"])


def test_without_its_package_tensorboard_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("training.flags.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--report_to tensorboard .*pip install tensorboard"):
        finish("train.py", "--report_to", "tensorboard")
