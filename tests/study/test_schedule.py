"""study/__main__.py: which runs, in which order, at which learning rate."""
import math

import pytest

from study import __main__ as study
from study.__main__ import execute_cells
from study.rows import TUNING_SEEDS
from study.runs import Cell, Run
from study.tables import LOW, shown
from study.tuning import next_rates, plateau


def test_tuning_decides_the_rate_of_every_seed_and_of_variants():
    # Best at 2e-3, beyond the rates it starts from; NaN never wins, nor what one of two seeds
    # reaches. A variant is not tuned again. RLHF needs reward models first.
    executed = []
    rewards = {2.5e-4: math.nan, 2e-3: 2.0, 4e-3: 1.0}

    class FakeSchedule:
        total = 0

        def scores(self, runs):
            executed.append(list(runs))
            return {run: {"E[r]": 8.0 if (run.learning_rate, run.seed) == (5e-4, 0) else
                          -8.0 if (run.learning_rate, run.seed) == (5e-4, 100) else
                          rewards.get(run.learning_rate, run.learning_rate)} for run in runs}

    cell, rlhf = Cell("hh", "ulma", rates=LOW), Cell("golden", "rlhf", seeds=3, rate=1e-3)
    schedule = FakeSchedule()
    rows = execute_cells([cell, Cell("hh", "ulma", (("beta", 2),), cell, 2), rlhf], schedule)
    assert [run.cell.method for run in executed[0]] == ["reward_model"] * 3
    assert {run.seed for run in executed[0]} == {1, 2, 3}
    assert [(run.learning_rate, run.seed) for run in executed[1]] == [
        (rate, seed) for rate in LOW for seed in TUNING_SEEDS]
    assert [run.learning_rate for part in executed[2:4] for run in part] == [2e-3] * 2 + [4e-3] * 2
    assert schedule.total == sum(map(len, executed))
    tested = [(row["method"], row["seed"], row["learning_rate"]) for row in rows
              if row["seed"] not in TUNING_SEEDS]
    assert sorted(tested) == sorted(
        [("ulma", seed, 2e-3) for seed in range(1, 6)] + [("rlhf", n, 1e-3) for n in (1, 2, 3)]
        + [("ulma beta=2", seed, 2e-3) for seed in (1, 2)])


def test_the_rate_is_in_the_middle_of_a_plateau_not_at_its_edge():
    assert plateau({1e-4: 0.0, 3e-4: 1.9, 1e-3: 2.0, 3e-3: 2.1, 1e-2: -5.0}) == 1e-3
    assert plateau({1e-4: 0.0, 1e-3: 2.0, 3e-3: 2.1}) == 1e-3        # of two the smaller
    assert plateau({1e-4: math.nan, 1e-3: -math.inf, 3e-3: -5.0}) == 3e-3


def test_more_rates_are_tried_while_the_best_is_at_an_end():
    assert next_rates({1e-3: 1.0, 2e-3: 2.0}) == [4e-3]
    assert next_rates({1e-3: 1.0, 2e-3: 0.0}) == [5e-4]
    assert next_rates({1e-3: 1.0, 2e-3: 2.0, 4e-3: 1.0}) == []
    assert next_rates({5e-4: math.nan, 1e-3: -math.inf, 2e-3: 0.0, 4e-3: math.nan}) == []
    assert next_rates({8e-3: 0.0, 1.6e-2: 1.0}) == []                # no larger one is tried


def test_two_steps_start_from_the_first_ones_run_of_the_same_seed_and_data():
    run = Run(shown("shown-16", "dpo", "sft"), 5e-4, 3)
    first = Run(shown("shown-16", "sft"), 3e-3, 3)
    assert run.before == first and run.cell.rate == shown("shown-16", "dpo").rate
    assert Run(shown("shown-16", "dpo"), 5e-4, 3).before is None


def test_no_cell_gets_more_seeds_than_asked_for_and_a_rate_written_down_stays():
    class FakeSchedule:
        total = 0

        def scores(self, runs):
            return {run: {"E[r]": -run.learning_rate} for run in runs}

    rows = execute_cells([shown("hh", "ulma"), shown("shown-16", "kto")], FakeSchedule(), 6)
    tested = [(row["method"], row["seed"], row["learning_rate"]) for row in rows
              if row["seed"] not in TUNING_SEEDS]
    assert sorted(tested) == [("kto", n, 1e-3) for n in range(1, 6)] + [
        ("ulma", n, 2e-3) for n in range(1, 7)]
    assert {row["method"] for row in rows if row["seed"] in TUNING_SEEDS} == {"ulma"}


def test_check_draws_the_same_rows_again_and_names_what_differs(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(study, "work_folder", lambda: "runs/other")
    monkeypatch.setattr("study.runs.work_folder", lambda: str(tmp_path))
    cells = [shown("hh", "ulma"), shown("shown-16", "dpo", "sft")]
    rows = [Run(cell, 1e-3, seed).row() | {"E[r]": float(seed), "path": [[0.0, 0.5]]}
            for cell in cells for seed in (1, 2, 3)] + [{"data": "bounds", "method": "base"}]

    class FakeSchedule:
        total, executed, wrong = 0, [], False

        def scores(self, runs):
            self.executed.append(runs)
            return {run: {"E[r]": run.seed + self.wrong * (run.seed == 2), "path": [[0.0, 0.5]]}
                    for run in runs}

    schedule = FakeSchedule()
    study.check(rows, 4, schedule)
    before, drawn = schedule.executed
    assert len(drawn) == 4 and {run.cell for run in drawn} == set(cells)
    assert before == [run.before for run in drawn if run.before]     # SFT, once for every seed
    assert "all 4 runs have the same numbers again (0 were in" in capsys.readouterr().out
    study.check(rows, 6, schedule)
    assert schedule.executed[3][:4] == drawn
    schedule.wrong = True
    with pytest.raises(ValueError, match="2 of 6 runs have other numbers now; the base model here"):
        study.check(rows, 6, schedule)
    with pytest.raises(ValueError, match="no run to check"):
        study.check(rows[-1:], 6, schedule)
    assert capsys.readouterr().out.count("E[r] 2.0, now 3; 1 of 2 scores: E[r]") == 2
