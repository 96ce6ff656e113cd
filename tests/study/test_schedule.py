"""study/__main__.py: which runs, in which order, at which learning rate."""
import math

from study.__main__ import execute_cells, plateau
from study.runs import LEARNING_RATES, Cell, Run
from study.tables import shown


def test_the_best_tuning_run_decides_the_rate_of_every_seed_and_of_variants():
    # Best at 1e-3; NaN never wins. A variant is not tuned again. RLHF needs reward models first.
    executed = []

    class FakeSchedule:
        total = 0

        def scores(self, runs):
            executed.append(list(runs))
            return {run: {"E[r]": {1e-4: math.nan, 1e-3: 2.0}.get(run.learning_rate, 1.0)}
                    for run in runs}

    cell, rlhf = Cell("hh", "ulma"), Cell("golden", "rlhf", seeds=3)
    rows = execute_cells([cell, Cell("hh", "ulma", (("beta", 2),), cell, 2), rlhf],
                         FakeSchedule())
    assert [run.cell.method for run in executed[0]] == ["reward_model"] * 4
    assert {run.seed for run in executed[0]} == {0, 1, 2, 3}
    assert {run.seed for run in executed[1]} == {0} and len(executed[1]) == 2 * len(
        LEARNING_RATES)
    tested = [(row["method"], row["seed"], row["learning_rate"]) for row in rows if row["seed"]]
    assert sorted(tested) == sorted(
        [("ulma", seed, 1e-3) for seed in range(1, 6)] + [("rlhf", n, 1e-3) for n in (1, 2, 3)]
        + [("ulma beta=2", seed, 1e-3) for seed in (1, 2)])


def test_the_rate_is_in_the_middle_of_a_plateau_not_at_its_edge():
    assert plateau({1e-4: 0.0, 3e-4: 1.9, 1e-3: 2.0, 3e-3: 2.1, 1e-2: -5.0}) == 1e-3
    assert plateau({1e-4: 0.0, 1e-3: 2.0, 3e-3: 2.1}) == 1e-3        # of two the smaller
    assert plateau({1e-4: math.nan, 1e-3: -math.inf, 3e-3: -5.0}) == 3e-3


def test_two_steps_start_from_the_first_ones_run_of_the_same_seed_and_data():
    run = Run(shown("16", "dpo", "sft"), 5e-4, 3)
    first = Run(shown("16", "sft"), 3e-3, 3)
    assert run.before == first and run.cell.tuned_as == shown("16", "dpo")
    assert Run(shown("16", "dpo"), 5e-4, 3).before is None


def test_no_cell_gets_more_seeds_than_asked_for_and_a_single_rate_is_not_tuned():
    class FakeSchedule:
        total = 0

        def scores(self, runs):
            return {run: {"E[r]": 1.0} for run in runs}

    rows = execute_cells([shown("bt", "ulma"), shown("bt", "kto")], FakeSchedule(), 6)
    seeds = [(row["method"], row["seed"]) for row in rows]
    assert sorted(seeds) == [("kto", n) for n in range(1, 6)] + [("ulma", n) for n in range(1, 7)]
