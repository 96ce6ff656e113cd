"""study/__main__.py: which runs, in which order, at which learning rate."""
import math

from study.__main__ import LEARNING_RATES, execute_cells
from study.runs import Cell


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
