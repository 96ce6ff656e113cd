"""study/real.py: formulas by value, the split, and a whole study of a tiny random model."""
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import pytest
import torch
from conftest import ONE_THREAD, ROOT, finish

from data import Record
from study import real, real_plan, real_report, real_rows, real_scores
from study.real_data import fitting_pairs, split
from study.real_plan import best_rate, next_run, plan, waiting_runs
from study.real_scores import (NEUTRAL_TEXT, calibration, distinct, length_balanced, length_matched,
                               longer_digits, outcome_shares, refuses, standard_error)
from study.runs import Cell, Training
from tokenizer import Tokenizer

# ---- formulas -----------------------------------------------------------------------------------


def test_calibration_by_hand():
    # σ(ln 3) = 3/4 of two, half of them good: 1/4 too much; σ(-ln 3) = 1/4 of two, as good: 1/4
    # too little.
    h = torch.tensor([math.log(3), -math.log(3), math.log(3), -math.log(3)])
    error, bins = calibration(h, torch.tensor([1.0, 1.0, 0.0, 0.0]), bins=2)
    assert error == pytest.approx(0.25)
    assert bins == [pytest.approx((0.25, 0.5)), pytest.approx((0.75, 0.5))]
    assert calibration(torch.zeros(20), torch.tensor([1.0, 0.0]).repeat(10))[0] == 0


def test_length_matched_pairs_differ_by_at_most_a_fifth_of_the_shorter():
    lengths = torch.tensor([[10, 12], [12, 10], [10, 13], [1, 1], [4, 5]])
    assert length_matched(lengths).tolist() == [True, True, False, True, False]


def test_a_rule_that_looks_at_length_alone_is_right_half_the_time_when_balanced():
    lengths = torch.tensor([[3, 5]] * 6 + [[5, 3]] * 2 + [[4, 4]])
    shorter = torch.tensor([1.0] * 6 + [0.0] * 2 + [1.0])
    assert length_balanced(shorter, lengths)[0] == 0.5
    # 2/3 of three and 1/2 of two: (2/3 + 1/2) / 2; errors sqrt(1/3 / 3) and sqrt(1/2 / 2)
    value, error = length_balanced(torch.tensor([1.0, 1, 0, 1, 0]),
                                   torch.tensor([[1, 2]] * 3 + [[2, 1]] * 2))
    assert value == pytest.approx(7 / 12)
    assert error == pytest.approx(math.sqrt(1 / 9 + 1 / 4) / 2)


def test_distinct_counts_word_sequences_over_all_texts():
    # a b a b | A! c : of six words a, b, c differ; of four pairs ab, ba, ac.
    assert distinct(["a b a b", "A! c"], 1) == 3 / 6
    assert distinct(["a b a b", "A! c"], 2) == 3 / 4
    assert distinct(["one"], 2) == 0


@pytest.mark.parametrize("text, is_one", [
    ("I'm sorry, but I can't help with that.", True), ("I\u2019m really sorry.", True),
    ("No. I would rather not say.", True), ("I cannot do this", True),
    ("That is against the law!", True), ("Sure, first take a pen.", False), ("", False),
    ("You can't miss it.", False), ("Yes. " * 60 + "I'm sorry.", False)])
def test_refusals_are_phrases_near_the_start(text, is_one):
    assert refuses(text) == is_one


def test_shares_of_outcomes_and_their_error():
    shares = outcome_shares(torch.tensor([1.0, 1.0, 0.0, -1.0]), "base")
    assert [shares[f"{word}/base"] for word in ("win", "tie", "lose")] == [0.5, 0.25, 0.25]
    assert shares["win rate/base"] == 0.625
    # of 1, 1, 1/2, 0: mean 5/8, squares 2 · 9/64 + 1/64 + 25/64 = 44/64, over 3, over 4
    assert shares["win rate/base se"] == pytest.approx(math.sqrt(44 / 64 / 3 / 4))
    assert standard_error(torch.tensor([0.0, 2.0])) == 1


# ---- data and plan ------------------------------------------------------------------------------

def test_no_prompt_is_in_two_parts_and_each_holds_about_a_third(tiny_model):
    records = [Record((("Human", f"What is {n % 300}?"),), ("a", "b"), (1.0, 0.0), "")
               for n in range(600)]
    parts = split(records, 50)
    assert len(parts["train"]) == 50 and sum(map(len, parts.values())) == 600
    for name in ("held-out", "judge"):
        assert 140 < len(parts[name]) < 260
    prompts = {name: {record.prompt for record in found} for name, found in parts.items()}
    first = prompts["train"] | prompts["tune"]
    assert not (first & prompts["held-out"] or first & prompts["judge"]
                or prompts["held-out"] & prompts["judge"])


def test_pairs_that_would_be_cut_are_left_out(tmp_path, tiny_model):
    rows = [{"prompt": "Hi", "chosen": "a" * n, "rejected": "b"} for n in (5, 300)]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fitting, left_out = fitting_pairs(str(file), Tokenizer(tiny_model), 256)
    assert [record.responses[0] for record in fitting] == ["a" * 5] and left_out == 1


def test_seeds_take_the_rate_with_the_best_accuracy_once_all_are_run():
    cell = Cell("hh", "dpo")
    rows = [Training(cell, rate, 0).key | {"accuracy": accuracy} for rate, accuracy in
            zip(real_plan.RATES, (0.5, 0.6, 0.7), strict=True)]
    assert best_rate(cell, rows[:2]) == real_plan.MIDDLE and best_rate(cell, rows) == real_plan.RATES[2]
    rows[2] = Training(cell, real_plan.RATES[2], 0).key | {"failed": "loss nan"}
    assert best_rate(cell, rows) == real_plan.RATES[1]
    runs = plan("seeds", rows)
    assert [run.cell.method for run in runs[:2]] == ["reward_model", "base"]
    assert {run.seed for run in runs[2:]} == set(real_plan.SEEDS)


def test_a_run_starts_when_the_runs_it_reads_are_over():
    # Eight workers that are asked for a run again and again, and end in the order they began.
    stages, rows, running, began = ("first", "more", "rates", "seeds"), [], [], []
    while True:
        run = next_run(waiting_runs(stages, rows, running), running)
        if run and len(running) < 8:
            running.append(run)
            began.append((run, [row["method"] + str(row["seed"]) for row in rows]))
        elif running:
            done = running.pop(0)
            rows.append(done.key | {"accuracy": done.learning_rate})     # the largest rate is best
        else:
            break
    assert len(rows) == len({tuple(row.items()) for row in rows}) == 2 + 7 + 4 + 27 + 27
    over = {run: before for run, before in began}
    judge, base, *others = over
    assert over[base] == ["reward_model1"] and all("base1" in over[run] for run in others)
    after_sft = [run for run in others if run.cell.name == "ulma sft_adapter=SFT"]
    assert len(after_sft) == 1 + 3 + 3
    assert all(f"sft{run.seed}" in over[run] for run in after_sft)
    tuned = [run for run in others if run.learning_rate == 1e-3 and run.seed]
    assert len(tuned) == 27 and all(over[run].count(run.cell.name + "0") == 3 for run in tuned)


def test_an_sft_adapter_is_trained_by_one_run_at_a_time():
    # ULMA's run trains its SFT adapter where no SFT run is planned before it.
    ulma = Training(Cell("hh", "ulma", (("sft_adapter", "SFT"),)), 3e-4, 1)
    sft, dpo = real_plan.sft_of(ulma), Training(Cell("hh", "dpo"), 3e-4, 1)
    assert next_run([sft, dpo], [ulma]) == dpo and next_run([sft], []) == sft
    assert next_run([ulma, sft], []) == ulma and next_run([ulma], [sft]) is None


def test_two_rates_are_compared_pair_by_pair():
    # 16 pairs: the second rate is right on all where the first is right on half, 8 of 16: 0.5 with
    # a standard error of 0.129. The third is right on one more than the first; b has one rate.
    rows = [{"method": method, "seed": 0, "right": right} for method, right in (
        ("a", "01" * 8), ("a", "1" * 16), ("a", "11" + "01" * 7), ("b", "0" * 16))]
    assert "in 2 of 3 cases; in 0.1 they would" in " ".join(
        real_report.rates_compared(rows).split())


def test_intervals_add_prompts_and_seeds():
    # Over prompts 1.96 · 0.03; over seeds t(2) = 4.303 times s / sqrt(3), s = 0.02 here.
    rows = [{"accuracy": value, "accuracy se": 0.03, "KL": value} for value in (0.58, 0.6, 0.62)]
    over_seeds = 4.303 * 0.02 / 3 ** 0.5
    assert real_rows.estimate(rows, "accuracy") == pytest.approx(
        (0.6, ((1.96 * 0.03) ** 2 + over_seeds ** 2) ** 0.5), abs=1e-5)
    assert real_rows.estimate(rows, "KL") == pytest.approx((0.6, over_seeds), abs=1e-5)
    assert real_rows.estimate(rows[:1], "accuracy") == pytest.approx((0.58, 1.96 * 0.03))
    assert real_rows.estimate(rows[:1], "KL") == (0.58, None)


def test_two_methods_are_compared_seed_by_seed_on_the_same_pairs():
    # Seed 1: better on 2 of 4 pairs, seed 2: on 1 of 4; seed 3 has no partner. Of every pair the
    # mean over seeds is 1, 1/2, 0, 0.
    better = [{"seed": 1, "right": "1100"}, {"seed": 2, "right": "1000"},
              {"seed": 3, "right": "1111"}]
    worse = [{"seed": 2, "right": "0000"}, {"seed": 1, "right": "0000"}]
    mean, half = real_rows.gap(better, worse)
    over_pairs = 1.96 * float(torch.tensor([1, 0.5, 0, 0]).std()) / 2
    over_seeds = 12.706 * float(torch.tensor([0.5, 0.25]).std()) / 2 ** 0.5
    assert mean == 0.375 and half == pytest.approx(math.hypot(over_pairs, over_seeds), abs=1e-4)
    assert real_rows.gap(better[:1], worse)[1] == pytest.approx(
        1.96 * float(torch.tensor([1, 1, 0, 0.]).std()) / 2)


def test_where_length_says_nothing_methods_are_compared_half_by_half():
    # The second answer, the rejected one, is longer in the first two pairs, the chosen one in three;
    # one pair is as long. Differences 1, 0 | 0, 0, 1 | 1: means 1/2 and 1/3.
    lengths = torch.tensor([[1, 2], [3, 9], [5, 4], [7, 1], [2, 1], [6, 6]])
    assert longer_digits(lengths) == "110002"
    found = real_rows.lengths_of({"longer": "110002"})
    mean, half = real_rows.gap([{"seed": 1, "right": "100011"}], [{"seed": 1, "right": "0" * 6}],
                                 found)
    assert mean == pytest.approx(5 / 12)
    assert half == pytest.approx(1.96 * math.sqrt(0.5 / 2 + (1 / 3) / 3) / 2)


def test_methods_are_compared_with_the_shorter_answer_on_the_same_pairs():
    # The shorter answer is right on the first pair, wrong on the second, undecided on the third: the
    # method is better by 0, 1, 1/2.
    mean, half = real_rows.gap([{"seed": 1, "right": "111"}], [{"seed": 1, "right": "102"}])
    assert mean == 0.5 and half == pytest.approx(1.96 * 0.5 / math.sqrt(3))


def test_methods_without_a_seed_in_common_are_not_compared():
    assert math.isnan(real_rows.gap([{"seed": 2, "right": "10"}],
                                      [{"seed": 1, "right": "11"}])[0])


def test_only_rows_with_the_settings_of_the_last_one_are_one_study():
    rows = [{"data": data, "settings": settings} for data, settings in (
        ("hh", 1), ("qa", 2), ("hh", 3), ("qa", 2))]
    assert real_rows.newest(rows) == [rows[1], rows[2], rows[3]]


def test_neighbours_with_one_prompt_share_a_tree_and_its_first_pair_is_meant(tiny_model):
    records = [Record((("Human", prompt),), (f"{n} good", f"{n} bad"), (1.0, 0.0), f"f:{n}")
               for n, prompt in enumerate("ppq")]
    pairs = real_scores.make_pairs(records, Tokenizer(tiny_model), 128)
    assert len(pairs.trees) == 2 and len(pairs.numbers) == 3 and pairs.first_of_trees == [0, 2]


def test_a_prompt_that_ends_on_an_assistants_turn_is_left_out(tmp_path, tiny_model):
    # JSON lines, which the study writes, cannot hold it.
    rows = [{"chosen": f"{start}\n\nAssistant: c", "rejected": f"{start}\n\nAssistant: d"}
            for start in ("\n\nHuman: a", "\n\nHuman: a\n\nAssistant: b")]
    file = tmp_path / "hh.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fitting, left_out = fitting_pairs(str(file), Tokenizer(tiny_model), 256)
    assert [record.prompt for record in fitting] == [(("Human", "a"),)] and left_out == 1


def test_the_rate_with_the_most_seeds_stands_for_a_method():
    one, three = [{"seed": 1}], [{"seed": 1}, {"seed": 2}, {"seed": 3}]
    methods = {("base", 0): one, ("dpo", 3e-4): one, ("dpo", 1e-3): three, ("ulma", 1e-4): one,
               ("ulma", 3e-4): one}
    assert real_rows.most_seeds(methods) == {
        ("base", 0): one, ("dpo", 1e-3): three, ("ulma", 1e-4): one}


# ---- the whole of it ----------------------------------------------------------------------------

@pytest.fixture
def tiny_study(tmp_path, tiny_model, pairs_file, monkeypatch):
    """tiny_study(*more): a study of two methods of each stage on a tiny model; its rows."""
    kept = {"first": slice(2), "rates": slice(-2, -1)}       # of `rates` ULMA from an SFT adapter
    for stage, cells in real_plan.STAGES.items():
        monkeypatch.setitem(real_plan.STAGES, stage, cells[kept.get(stage, slice(1))])
    monkeypatch.setattr(real_plan, "RATES", (1e-3, 3e-3))
    monkeypatch.setattr(real_plan, "MIDDLE", 1e-3)
    monkeypatch.setattr(real_plan, "SEEDS", (1, 2))
    monkeypatch.setattr(real_scores, "NEUTRAL_TEXT", real_scores.NEUTRAL_TEXT[:1])
    monkeypatch.setattr(real_report, "pyplot", lambda: None)

    def run(*more):
        shown = finish("study.real", *more, "--model", tiny_model, "--hh", pairs_file, "--pairs", 16,
                       "--held_out", 32, "--answers", 4, "--new_tokens", 4, "--max_length", 160,
                       "--out", tmp_path / "out", "--work", tmp_path / "work")
        lines = (tmp_path / "out/real.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines], shown
    return run


def test_a_whole_study_goes_on_where_it_was_stopped(tiny_study, tmp_path):
    rows, _ = tiny_study("first")
    assert [row["method"] for row in rows] == ["reward_model", "base", "dpo", "ulma"]
    base, dpo = rows[1], rows[2]
    assert base["KL"] == 0 and base["win rate/base"] == 0.5 and base["accuracy"] == 0.5
    assert dpo["KL"] != 0 and len(dpo["right"]) == dpo["pairs"] == 32 and len(dpo["mild"]) == 6
    page = (tmp_path / "out/real.md").read_text()
    assert "| DPO | 0.001, 1 |" in page and "## Not run with" in page and "`seeds`: " in page
    assert "**ULMA** (0.001): " in (tmp_path / "out/real-samples.md").read_text()

    # A line that is lost is measured again, from the same adapter; the others are not touched.
    lines = [line for line in (tmp_path / "out/real.jsonl").read_text().splitlines()]
    (tmp_path / "out/real.jsonl").write_text("\n".join(lines[:3]) + "\n")
    again, shown = tiny_study("first", "rates", "seeds")
    assert shown.count("====") == 1 + 2 + 1       # ULMA; two rates from SFT; DPO's second seed
    assert again[4]["pairs"] == again[4]["sizes"]["tune"] < 32   # not the held-out pairs' number
    assert again[:3] == rows[:3]
    times = {"train s", "measure s"}
    assert {k: v for k, v in again[3].items() if k not in times} == {
        k: v for k, v in rows[3].items() if k not in times}
    page = (tmp_path / "out/real.md").read_text()
    assert "all runs of first, rates are in" in tiny_study("first", "rates")[1]
    assert tiny_study("--report")[1].count("====") == 0
    assert (tmp_path / "out/real.md").read_text() == page


def test_runs_side_by_side_have_the_rows_of_one_after_the_other(tiny_study, tmp_path, monkeypatch):
    for name in ("RATES", "MIDDLE", "SEEDS"):            # a worker process has the real ones
        monkeypatch.setattr(real_plan, name, {"RATES": (1e-4, 3e-4, 1e-3), "MIDDLE": 3e-4,
                                              "SEEDS": (1, 2, 3)}[name])
    monkeypatch.setattr(real_scores, "NEUTRAL_TEXT", NEUTRAL_TEXT)

    def scores(rows):
        return sorted(({key: value for key, value in row.items() if key not in
                        ("train s", "measure s", "device")} for row in rows), key=str)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")           # as this process has
    rows, _ = tiny_study("first", "--workers", 2)
    assert [row["device"].endswith("2 runs side by side") for row in rows] == [True] * 4
    (log,) = (tmp_path / "work").rglob("dpo-lr0.0003-seed1.log")
    assert "loss" in log.read_text()
    shutil.rmtree(tmp_path / "out")
    shutil.rmtree(tmp_path / "work")
    again, _ = tiny_study("first")
    assert scores(again) == scores(rows)


def test_a_run_that_fails_ends_the_study_when_those_beside_it_have_their_rows(
        tiny_study, tmp_path, monkeypatch):
    beside = threading.Event()

    def execute(argv, run):
        if run.cell.method == "dpo":
            raise ValueError("dpo cannot be trained")
        if run.cell.method == "ulma":
            assert beside.wait(30)
        return run.key | {"settings": settings}

    def print_page(out, rows, missing):
        print(rows[-1]["method"], "has its row")
    rows, _ = tiny_study("first")
    settings = rows[0]["settings"]
    lines = (tmp_path / "out/real.jsonl").read_text().splitlines()
    (tmp_path / "out/real.jsonl").write_text("\n".join(lines[:2]) + "\n")
    monkeypatch.setattr(real, "execute", execute)
    monkeypatch.setattr(real, "write_page", print_page)
    monkeypatch.setattr(real, "ProcessPoolExecutor", lambda workers, *_: ThreadPoolExecutor(workers))
    threading.Timer(0.5, beside.set).start()
    with pytest.raises(ValueError, match="dpo cannot be trained"):
        tiny_study("first", "more", "--workers", 2)
    kept = [json.loads(line)["method"] for line in
            (tmp_path / "out/real.jsonl").read_text().splitlines()]
    assert kept == ["reward_model", "base", "ulma"]           # and nothing of `more` was started


def test_a_worker_that_is_killed_is_a_sentence(tiny_study, monkeypatch):
    def execute(argv, run):
        raise BrokenProcessPool("A process in the process pool was terminated abruptly")
    monkeypatch.setattr(real, "execute", execute)
    monkeypatch.setattr(real, "ProcessPoolExecutor", lambda workers, *_: ThreadPoolExecutor(workers))
    with pytest.raises(ValueError, match="a worker process was killed, .* fewer --workers: what is finished stays"):
        tiny_study("first", "--workers", 2)


def test_too_many_workers_for_the_memory_are_said(tmp_path, tiny_model, pairs_file, monkeypatch):
    def execute(study, run):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    monkeypatch.setattr(real.Study, "execute", execute)
    argv = ("--workers", "9", "--model", tiny_model, "--hh", str(pairs_file), "--pairs", "16",
            "--max_length", "160", "--out", str(tmp_path), "--work", str(tmp_path))
    with pytest.raises(ValueError, match="9 runs side by side need more memory .* fewer --workers"):
        real.execute(argv, real_plan.base_run("hh"))


def test_ctrl_c_ends_the_workers_too(tmp_path, tiny_model, pairs_file):
    process = subprocess.Popen(
        [sys.executable, "-m", "study.real", "first", "--workers", "2", "--model", tiny_model, "--hh",
         pairs_file, "--pairs", "16", "--held_out", "32", "--answers", "4", "--new_tokens", "4",
         "--max_length", "160", "--out", tmp_path / "out", "--work", tmp_path / "work"],
        cwd=ROOT, env=ONE_THREAD, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        start_new_session=True)
    while not list(tmp_path.rglob("reward_model*.log")):  # of a worker's first run
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)                  # the workers get none: they are ended
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and errors.split() == ["interrupted"]
    assert not list(tmp_path.rglob("final"))             # nor did they end their runs first
    with pytest.raises(ProcessLookupError):              # soon nobody is left of its group
        for _ in range(300):
            os.killpg(process.pid, 0)
            time.sleep(0.1)


def test_rows_whose_folders_are_gone_do_not_stop_the_study(tiny_study, tmp_path):
    # As in a fresh clone: the judge is trained again, and the base's answers are the base's.
    rows, _ = tiny_study("first")
    shutil.rmtree(tmp_path / "work")
    again, _ = tiny_study("more")
    assert again[:4] == rows and len(again) == 5 and 0 <= again[4]["win rate/base"] <= 1
    (judged,) = (tmp_path / "work").rglob("judged-base.json")
    lines = (tmp_path / "out/real.jsonl").read_text().splitlines()
    (tmp_path / "out/real.jsonl").write_text("\n".join([lines[0], *lines[2:]]) + "\n")
    values = json.loads(judged.read_text())["values"]
    judged.unlink()
    tiny_study("first")                          # the base's row again, and its judged answers
    assert json.loads(next((tmp_path / "work").rglob("judged-base.json")).read_text())[
        "values"] == pytest.approx(values, rel=1e-5)


def test_qa_feedback_has_sizes_of_its_own(tiny_study, tmp_path, pairs_file):
    qa = ("--qa", pairs_file, "--qa_max_length", 150, "--qa_pairs")
    with pytest.raises(ValueError, match="too few pairs that fit into 150 tokens: .*--qa_pairs"):
        tiny_study("qa", *qa, 1000)
    rows, _ = tiny_study("qa", *qa, 8)
    assert [(row["data"], row["method"]) for row in rows] == [
        ("qa", "reward_model"), ("qa", "base"), ("qa", "dpo")]
    page = (tmp_path / "out/real.md").read_text()
    assert "## QA-feedback, 8 pairs a run" in page and page.count("accuracy: share of") == 1
    assert "--qa_pairs 8 --held_out 32 --answers 4 --new_tokens 4 --qa_max_length 150" in page


@pytest.mark.parametrize("argv, words", [
    (["firs"], "no stage is called firs"), (["qa"], "the stage qa needs --qa FILE"), (["--report"], "no run is finished yet"),
    (["--hh", "nothing.jsonl"], "nothing.jsonl: no such data file"),
    (["--pairs", "100000"], "too few pairs that fit into 192 tokens: .*lower --pairs")])
def test_what_cannot_be_run_is_said_and_nothing_is_left(tmp_path, tiny_model, pairs_file, argv,
                                                        words, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, OSError), match=words):
        real.main(["--model", tiny_model, "--hh", str(pairs_file), *argv])
    assert not (tmp_path / "results").exists()


# ---- what is committed --------------------------------------------------------------------------

def test_the_page_and_the_samples_are_written_again_from_the_rows_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(real_report, "draw", lambda out, rows, file:
                        file if rows[0]["data"] == "hh" else None)
    rows = real.read_rows(str(ROOT / "results"))
    real_report.write_page(str(tmp_path), rows, real_plan.not_run(rows))
    for name in ("real.md", "real-samples.md"):
        assert (tmp_path / name).read_text() == (ROOT / "results" / name).read_text(), name


def test_rows_that_know_no_lengths_are_shown_without_them(tmp_path, monkeypatch):
    monkeypatch.setattr(real_report, "pyplot", lambda: None)
    rows = [{key: value for key, value in row.items() if key != "longer"}
            for row in real.read_rows(str(ROOT / "results"))]
    real_report.write_page(str(tmp_path), rows, [])
    page = (tmp_path / "real.md").read_text()
    assert "differences in accuracy" in page and "in length-balanced accuracy," not in page


def test_the_projects_readme_shows_the_rows_of_the_real_model():
    readme = (ROOT / "README.md").read_text()
    newest = real_rows.newest(real.read_rows(str(ROOT / "results")))
    columns = ("base", "sft", "unlearning", "unlikelihood", "dpo", "pointwise_dpo", "ulma", "kto",
               "d2o num_anchors=3")
    for words, data, score, digits in (
            ("HH: held-out accuracy", "hh", "accuracy", 2),
            ("QA-feedback: held-out accuracy", "qa", "accuracy", 2),
            ("HH: perplexity of chosen", "hh", "perplexity/chosen", 1)):
        found = {method: rows for (method, _), rows in real_rows.most_seeds(
            real_rows.by_method(newest, data)).items()}
        cells = ["–" if method not in found or method == "base" and score != "perplexity/chosen"
                 else real_report.number(real_rows.estimate(found[method], score)[0], None, digits)
                 for method in columns]
        assert f"| {words} | {' | '.join(cells)} |" in readme
