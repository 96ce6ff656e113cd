"""reproduce.py and report.py: data of every shape, exact scores by hand, verdicts, resuming."""
import json
import math
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import offsets
import ppo
import report
import reproduce
import shapes
import train
from offsets import EXTRA_METHODS, stream_log_z
from reproduce import TABLES, Cell, Run, chosen_distribution, command, execute, win_tie_lose
from shapes import DATA, RESPONSES, balanced, differing_pairs, dirty, neighbours
from step import METHODS
from trees import Tree, build_stream
from world import answers, draw_data, question, training_prompts


@pytest.fixture(autouse=True)
def put_back_methods(monkeypatch):
    for name, method in EXTRA_METHODS.items():
        monkeypatch.setitem(METHODS, name, method)       # removed again after each test


# ---- data ---------------------------------------------------------------------------------------

def test_neighbours_keeps_every_row_and_puts_a_prompts_rows_together():
    rows = [{"prompt": p, "n": n} for n, p in enumerate("abababab")]
    ordered = neighbours(rows, 2)
    assert sorted(row["n"] for row in ordered) == list(range(8))
    assert "".join(row["prompt"] for row in ordered) == "aabbaabb"


def test_dirty_replaces_the_share_of_chosen_answers_by_harmful_ones_and_nothing_else():
    rows, soiled = DATA["golden"](3), DATA["golden-30"](3)
    harmful = {(question(*p), text) for p in training_prompts() for text, _, bad, _ in answers(*p)
               if bad}
    changed = [new for old, new in zip(rows, soiled, strict=True) if new != old]
    assert len(changed) / len(rows) == pytest.approx(0.3, abs=4 * math.sqrt(0.21 / len(rows)))
    assert all((row["prompt"], row["chosen"]) in harmful for row in changed)
    assert [row["rejected"] for row in rows] == [row["rejected"] for row in soiled]
    assert dirty(rows, 0, 3) == rows


@pytest.mark.parametrize("share", [0.1, 0.9])
def test_balanced_points_have_the_share_of_good_answers(share):
    points = [{"label": n % 3 == 0} for n in range(12 * RESPONSES)]
    labels = [row["label"] for row in balanced(points, share)]
    assert len(labels) == RESPONSES
    assert sum(labels) / len(labels) == pytest.approx(share, abs=1e-3)


def test_pairs_of_points_pair_a_prompts_good_answer_with_its_bad_one():
    points = {(row["prompt"], row["completion"], row["label"]) for row in
              draw_data(2, 400)["points"]}
    pairs = differing_pairs(draw_data(2, 400)["points"])
    assert 40 < len(pairs) < 160
    for row in pairs:
        assert (row["prompt"], row["chosen"], True) in points
        assert (row["prompt"], row["rejected"], False) in points


# ---- scores -------------------------------------------------------------------------------------

def test_win_tie_lose_by_hand():
    # Rewards 2 1 1; p = (1/2, 1/4, 1/4), q = (1/4, 1/4, 1/2): win 1/2 · 3/4, tie 1/2 · 1/4 on the
    # first and 1/2 · 3/4 on the others, lose 1/2 · 1/4.
    p, q = torch.tensor([0.5, 0.25, 0.25]).log(), torch.tensor([0.25, 0.25, 0.5]).log()
    scores = win_tie_lose(p, q, torch.tensor([2.0, 1.0, 1.0]), "x")
    assert scores == pytest.approx({"win/x": 0.375, "tie/x": 0.5, "lose/x": 0.125})


def test_the_chosen_answer_is_distributed_as_draws_say():
    # Of two draws a, b the first is chosen with sigma(r_a - r_b): summed over both orders.
    prompt = training_prompts()[0]
    rewards = torch.tensor([r for _, r, *_ in answers(*prompt)], dtype=torch.float64)
    habits = torch.tensor([w for *_, w in answers(*prompt)], dtype=torch.float64)
    expected = torch.zeros(288, dtype=torch.float64)
    for a in range(288):
        first = torch.sigmoid(rewards[a] - rewards)
        expected[a] += (habits[a] * habits * first).sum()          # a drawn first, and chosen
        expected += habits[a] * habits * (1 - first)               # a drawn first, b chosen
    probs = chosen_distribution(prompt, golden=False).exp()
    assert_close(probs[:-1], expected)
    assert float(probs.sum()) == pytest.approx(1) and float(probs[-1]) == 0
    best = chosen_distribution(prompt, golden=True).exp()
    assert int(best.argmax()) == int(rewards.argmax()) and float(best.max()) == 1


def test_prompt_scores_of_the_base_itself():
    # No log-ratio: slope 0, half of all pairs right, sigma(0) = 1/2 everywhere.
    prompt = training_prompts()[3]
    habits = torch.tensor([0.9 * w for *_, w in answers(*prompt)], dtype=torch.float64)
    scores = reproduce.prompt_scores(prompt, habits.log(), habits.log(), torch.full((288,), 20),
                                     golden=False)
    assert scores["reward slope"] == 0 and scores["reward accuracy"] == 0.5
    assert scores["win/base"] == pytest.approx(scores["lose/base"])
    rewards = torch.tensor([r for _, r, *_ in answers(*prompt)], dtype=torch.float64)
    assert scores["calibration error"] == pytest.approx(
        float((habits / 0.9 * (torch.sigmoid(rewards) - 0.5).abs()).sum()))
    assert scores["length"] == pytest.approx(20) and scores["KL(ref||pi)"] == 0


def test_a_stream_finds_the_exact_log_z_of_every_responses_prompt(monkeypatch):
    trees = [Tree([1, 5], [[7, 2], [8, 2]], [1.0, 0.0], []),
             Tree([1, 6, 9], [[4, 3, 2]], [0.0], [])]
    monkeypatch.setattr(offsets, "exact_log_z", lambda: {(1, 5): 0.25, (1, 6, 9): -3.0})
    stream = build_stream(trees)
    assert stream_log_z(stream).tolist() == [0.25, 0.25, -3.0]
    # at log-ratio 0 the argument of sigma is log Z alone
    zero = torch.zeros(3)
    losses = EXTRA_METHODS["pointwise_dpo_exact_z"].loss(zero, zero, stream, 0.5, 0.0)
    assert_close(losses, torch.tensor([math.log(1 + math.exp(-0.25)), math.log(1 + math.exp(0.25)),
                                       math.log(1 + math.exp(-3.0))]))


# ---- runs ---------------------------------------------------------------------------------------

def test_every_cell_is_a_command_that_parses(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "data_path", lambda name, seed: "pairs.jsonl")
    run_json = {"method": "reward_model", "beta": 0.5, "dataset": "x", "held_out": 0, "lora_r": 8,
                "max_prompt_length": 512, "bf16": False, "model_name_or_path": "m"}
    monkeypatch.setattr(ppo, "read_run", lambda path: run_json)
    for cell in {cell for group in TABLES.values() for cell in group}:
        assert cell.data in DATA
        main, argv = command(Run(cell, 1e-3, 2))
        args = (train if main is train.main else ppo).parse_args(argv)
        assert args.learning_rate == 1e-3 and args.seed == 2
        assert all(getattr(args, name) == value for name, value in cell.flags)
        assert cell.tuned_as is None or not cell.tuned_as.tuned_as


def test_the_best_tuning_run_decides_the_rate_of_every_seed_and_of_variants():
    # Best at 1e-3; NaN never wins. A variant is not tuned again. RLHF needs reward models first.
    asked = []

    class Progress:
        total = 0

        def scores(self, runs):
            asked.append(list(runs))
            return {run: {"E[r]": {1e-4: math.nan, 1e-3: 2.0}.get(run.learning_rate, 1.0)}
                    for run in runs}

    cell, rlhf = Cell("hh", "ulma"), Cell("golden", "rlhf", seeds=3)
    rows = reproduce.all_runs([cell, Cell("hh", "ulma", (("beta", 2),), cell, 2), rlhf], Progress())
    assert [run.cell.method for run in asked[0]] == ["reward_model"] * 4
    assert {run.seed for run in asked[0]} == {0, 1, 2, 3}
    assert {run.seed for run in asked[1]} == {0} and len(asked[1]) == 2 * len(
        reproduce.LEARNING_RATES)
    tested = [(row["method"], row["seed"], row["learning_rate"]) for row in rows if row["seed"]]
    assert sorted(tested) == sorted(
        [("ulma", seed, 1e-3) for seed in range(1, 6)] + [("rlhf", n, 1e-3) for n in (1, 2, 3)]
        + [("ulma beta=2", seed, 1e-3) for seed in (1, 2)])


def test_tuning_asks_training_prompts_and_a_test_asks_none_of_them(monkeypatch):
    logps = torch.zeros(0, 288)
    monkeypatch.setattr(reproduce, "load_llama", lambda path: None)
    monkeypatch.setattr(reproduce, "Tokenizer", lambda path: None)
    monkeypatch.setattr(reproduce, "world_logps", lambda *_: (logps, logps))
    asked = []
    monkeypatch.setattr(reproduce, "load_run", lambda path: [None])
    monkeypatch.setattr(reproduce, "mean_scores", lambda rows: {})
    real = reproduce.base_logps.__wrapped__
    monkeypatch.setattr(reproduce, "base_logps", lambda tuning: asked.append(real(tuning)[0])
                        or real(tuning))
    for seed in (reproduce.TUNING_SEED, 1, 5):
        reproduce.measure(Run(Cell("hh", "ulma"), 1e-3, seed))
    assert set(asked[0]) <= set(training_prompts()) and len(asked[0]) == 12
    assert asked[1] == asked[2] and not set(asked[1]) & set(training_prompts())


def test_every_claim_is_about_cells_of_the_tables():
    cells = {(cell.data, cell.name) for group in TABLES.values() for cell in group}
    missing = {cell for claim in report.claims() for cell in (claim.better, claim.worse)} - cells
    assert not missing
    assert set(TABLES) == set(report.TITLE) == set(report.CAVEAT) == set(report.TABLE_SCORES)


@pytest.fixture
def small_world(tmp_path, tiny_model, monkeypatch):
    """The tiny model in place of the base, two test prompts, 32 answers to learn from."""
    monkeypatch.setattr(reproduce, "base_model", lambda: tiny_model)
    monkeypatch.setattr(reproduce, "world_folder", lambda: str(tmp_path))
    monkeypatch.setattr(shapes, "RESPONSES", 32)
    monkeypatch.setattr(reproduce, "held_out_prompts", lambda: training_prompts()[40:41])
    reproduce.base_logps.cache_clear()
    threads = torch.get_num_threads()
    yield tmp_path
    reproduce.base_logps.cache_clear()
    torch.set_num_threads(threads)


def test_a_run_gives_the_same_numbers_twice_and_is_not_done_again(small_world, monkeypatch):
    run = Run(Cell("hh", "ulma"), 1e-2, 1)
    first = execute(run)
    with monkeypatch.context() as patched:
        patched.setattr(reproduce, "command", None)                # a second training would raise
        assert execute(run) == first
    assert first["KL(pi||ref)"] > 0 and "step" in open(run.folder + ".log").read()


def test_a_run_without_scores_is_trained_anew_to_the_same_numbers(small_world):
    run = Run(Cell("hh", "ulma"), 1e-2, 1)
    first = execute(run)
    (Path(run.folder) / "scores.json").unlink()    # as a kill would
    assert execute(run) == first


# ---- report -------------------------------------------------------------------------------------

def rows_of(cells: dict) -> list[dict]:
    """Rows from {(data, method): [E[r] of seeds 1, 2, ...]}; other scores are the same number."""
    scores = {score for group in report.SCORES.values() for score in group} | {
        claim.score for claim in report.claims()}
    return [{"data": data, "method": method, "seed": seed, "learning_rate": 1e-3, "runs": "w"}
            | dict.fromkeys(sorted(scores), value) for (data, method), values in cells.items()
            for seed, value in enumerate(values, 1)]


def test_verdicts_by_hand():
    # Differences 1 2 3: mean 2, s = 1, t_2 = 4.303, so 2 ± 2.484: undecided. 2 2 2.1: holds.
    # Paired: the seeds differ by far more than the methods.
    cells = report.by_cell(rows_of({("hh", "a"): [11, 102, 1003], ("hh", "b"): [10, 100, 1000],
                                    ("hh", "c"): [9, 100, 1000.9]}))
    claim = lambda better, worse, score: report.Claim("", "", ("hh", better), ("hh", worse),     # noqa: E731
                                                      score)
    mean, half, verdict = report.judged(cells, claim("a", "b", "E[r]"))
    assert (mean, half) == (pytest.approx(2), pytest.approx(2.484, abs=1e-3))
    assert verdict == "undecided"
    assert report.judged(cells, claim("a", "c", "E[r]"))[2] == "holds"
    assert report.judged(cells, claim("c", "a", "E[r]"))[2] == "fails"
    assert report.judged(cells, claim("a", "c", "harmful"))[2] == "fails"      # smaller is better


def test_the_report_is_written_from_rows_alone_and_leaves_out_what_is_not_done(tmp_path, capsys):
    wanted = {name: [(cell.data, cell.name) for cell in group] for name, group in TABLES.items()}
    rows = rows_of({cell: [0.5, 0.6, 0.4] for name in ("qa", "z") for cell in wanted[name]})
    bounds = {name: rows[0] for name in ("base", "pi* beta=0.5")}
    stale = rows_of({("qa", "ulma"): [9.0, 9.0, 9.0]})[:1] + [rows[0] | {"data": "hh", "runs": "v"}]
    report.save_rows(str(tmp_path), stale, bounds)
    report.save_rows(str(tmp_path), rows, bounds)                  # in place of those
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == len(rows)
    report.write(str(tmp_path), wanted)
    assert "2 of 11 tables complete" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.glob("*.md")) == [
        "README.md", "ablation.md", "qa.md", "z.md"]
    readme, table = (tmp_path / "README.md").read_text(), (tmp_path / "qa.md").read_text()
    assert "| ULMA 5.2 | ULMA beats SFT | QA-like points | E[r] | 0.000 ± 0.000 | **undecided** |" \
        in readme
    assert "| QA-like points | ULMA | 0.50 ± 0.25 |" in table      # t_2 s / sqrt(3) = 0.248
    assert "| HH-like pairs | SFT | not run |" in (tmp_path / "ablation.md").read_text()
    assert json.loads((tmp_path / "bounds.json").read_text())["torch"] == torch.__version__


def test_a_cell_that_is_only_tuned_keeps_its_test_runs(tmp_path):
    # Bug this catches: a table that asks for no more than another cell's learning rate (balance, of
    # the cells of qa) took that cell's five seeds out of the file, and qa was "not complete".
    cell = ("qa", "ulma")
    tested = rows_of({cell: [0.5, 0.6, 0.4]})
    tuning = [row | {"seed": 0, "E[r]": value} for row in tested[:1] for value in (0.1, 0.2)]
    report.save_rows(str(tmp_path), tested + tuning[:1], {})
    report.save_rows(str(tmp_path), tuning, {})
    rows = report.read_rows(str(tmp_path))
    assert sorted(row["E[r]"] for row in rows) == [0.1, 0.2, 0.4, 0.5, 0.6]
    assert len(report.by_cell(rows)[cell]) == 3
