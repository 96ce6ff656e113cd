"""Curves from metrics.jsonl; what draws them needs matplotlib and is skipped without it."""
import json
import sys

import pytest

from tools import plot


def write_run(folder, lines, rest=""):
    folder.mkdir(parents=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + rest)
    return str(folder)


def lines(slope, *keys, count=10):
    return [{"step": n + 1, **{key: slope * n for key in keys}} for n in range(count)]


def test_the_average_starts_at_the_first_value_and_weighs_new_ones_most():
    # span 2: weights 1, 1/2, 1/4, … backwards. (0 + 3) / 1.5 = 2; (0 + 1.5 + 6) / 1.75
    assert plot.smooth([5.0], 2) == [5.0]
    assert plot.smooth([0.0, 3.0, 6.0], 2) == pytest.approx([0.0, 2.0, 7.5 / 1.75])
    assert plot.smooth([0.0, 3.0, 6.0], 0) == [0.0, 3.0, 6.0]


def test_runs_are_named_by_what_tells_them_apart():
    assert plot.short_names(["runs/a"]) == ["a"]
    assert plot.short_names(["runs/a", "runs/b/"]) == ["a", "b"]
    assert plot.short_names(["x/a", "y/a"]) == ["x/a", "y/a"]
    assert plot.short_names(["runs", "runs/a"]) == ["runs", "runs/a"]


def test_known_metrics_come_first_and_steps_get_no_panel():
    runs = {"a": lines(1, "tokens", "lr", "new", "grad_norm"), "b": lines(1, "loss")}
    assert plot.metrics_of(runs) == ["loss", "grad_norm", "new"]


def test_what_was_measured_on_held_out_data_is_drawn_beside_what_was_logged(tmp_path):
    # of ULMA the log has neither margins nor KL: eval.jsonl does
    run = write_run(tmp_path / "run", lines(1, "loss", "grad_norm"))
    rows = [line | {"answers": [{"prompt": "x"}]} for line in lines(2, "eval/kl", "eval/loss")]
    (tmp_path / "run/eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs = {"run": plot.read_metrics(run)}
    assert plot.metrics_of(runs) == ["loss", "eval/loss", "eval/kl", "grad_norm"]
    assert [line["eval/kl"] for line in runs["run"] if "eval/kl" in line] == [
        2 * n for n in range(10)]


def test_an_unfinished_line_is_left_out_and_a_bad_one_is_named(tmp_path):
    run = write_run(tmp_path / "run", lines(1, "loss"), '{"step": 11, "lo')
    assert len(plot.read_metrics(run)) == 10
    bad = write_run(tmp_path / "bad", lines(1, "loss"), '{"step": \n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:11: not JSON"):
        plot.read_metrics(bad)
    with pytest.raises(ValueError, match=r"metrics.jsonl:1: not a line of metrics"):
        plot.read_metrics(write_run(tmp_path / "other", [{"loss": 1}]))
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        plot.read_metrics(str(tmp_path / "nowhere"))


def test_without_matplotlib_one_sentence_tells_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run = write_run(tmp_path / "run", lines(1, "loss"))
    with pytest.raises(ValueError, match="curves need matplotlib: pip install matplotlib"):
        plot.main([run, "--out", str(tmp_path / "curves")])


def test_each_metric_has_a_panel_and_each_run_a_thin_and_a_bold_line_of_its_own(tmp_path):
    pytest.importorskip("matplotlib")
    runs = {"a": lines(1, "loss", "rewards/margins"), "b": lines(2, "loss")}
    figure = plot.draw(runs, share=0.3)
    drawn = {panel.get_title(loc="left"): panel.get_lines() for panel in figure.axes}
    assert {title: len(found) for title, found in drawn.items()} == {
        "loss": 4, "reward margin of pairs": 2}
    thin_a, bold_a, thin_b, bold_b = drawn["loss"]
    assert list(thin_b.get_ydata()) == [2 * n for n in range(10)]
    assert list(bold_b.get_ydata()) == plot.smooth([2 * n for n in range(10)], 3)
    assert thin_a.get_linewidth() < bold_a.get_linewidth()
    assert bold_a.get_color() == thin_a.get_color() != bold_b.get_color()
    assert bold_a.get_linestyle() != bold_b.get_linestyle()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]


def test_the_command_writes_a_png_and_an_svg_the_same_ones_every_time(tmp_path):
    pytest.importorskip("matplotlib")
    folders = [write_run(tmp_path / name, lines(1, "loss")) for name in ("a", "b")]
    written = []
    for name in ("one", "two"):
        plot.main([*folders, "--out", str(tmp_path / name)])
        written.append([(tmp_path / f"{name}.{kind}").read_bytes() for kind in ("png", "svg")])
    assert written[0] == written[1]
    assert written[0][0].startswith(b"\x89PNG") and b"<svg" in written[0][1]
