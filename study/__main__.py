"""Every method of both papers on the embedded world: the papers' claims as hypotheses.

    python -m study                  all tables (make reproduce); some three hours on two idle cores
    python -m study dial d2o         some of them, each under 40 minutes
    python -m study --report         train nothing, write results/ from results/runs.jsonl
    python -m study --check 20       make 20 runs of results/runs.jsonl again and compare them
    python -m study.exact            what each objective wants, without any run

1. Data of every shape is drawn from the world, anew for every seed (datasets.py).
2. A *cell* is a method on data (tables.py). Where it has several learning rates it is tuned, in
   factors of 2: two runs for each rate, E[r] on 24 training prompts, half of them harmful requests;
   more rates while the best is the smallest or the largest tried, and then the middle of the
   plateau (`plateau`). Test prompts are not used.
3. With that rate it is trained with seeds 1, 2, …, and measured on 40 prompts that no objective
   trained on (the base did): exactly, over all valid answers (runs.py).
4. report.py compares cells seed by seed (claims.py, statistics.py), and writes tables, figures and
   verdicts; exact.py the optima.

A finished run is not trained again: stop this and start it as often as you like.
"""
if __name__ == "__main__":
    from files.interrupt import catch_interrupts
    catch_interrupts()

import argparse
import os

from files.cli import Parser, parse_first, run_cli, time_left

MOST_SEEDS = 8

def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m study", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", metavar="TABLE", default=[],
                        help="of study/tables.py (default: all)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(),
                        help="runs side by side, one thread each (default: the cores)")
    parser.add_argument("--seeds", type=int, default=MOST_SEEDS,
                        help="no cell gets more than so many (default: all it asks for)")
    parser.add_argument("--out", default="results", help="folder of tables and figures (results)")
    parser.add_argument("--report", action="store_true",
                        help="train nothing; write tables and figures from OUT/runs.jsonl")
    parser.add_argument("--check", type=int, metavar="N", help="make N runs of OUT/runs.jsonl, "
                        "drawn at random, again and compare every number; writes no results")
    return parser


if __name__ == "__main__":
    parse_first(build_parser().parse_args)          # before torch, which takes seconds to import

import random
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context

import torch

from study import exact
from study.report import write_report
from study.rows import TUNING_SEEDS, read_rows, save_rows
from study.runs import Cell, Run, bounds, end_with_parent, execute, work_folder
from study.tables import TABLES
from study.tuning import next_rates, plateau
from world import ensure_world


# ---- the schedule -------------------------------------------------------------------------------

class Schedule:
    """Executes lists of runs on worker processes and prints the progress.

    total   int   how many runs there will be in all; set before the first list
    """

    def __init__(self, workers: int):
        os.environ["OMP_NUM_THREADS"] = "1"             # read by torch in the workers
        self.pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"),
                                        initializer=end_with_parent)
        self.total = self.done = self.executed = 0
        self.start = time.perf_counter()

    def scores(self, runs: list[Run]) -> dict[Run, dict[str, float]]:
        """The scores of these runs; those on disk are not executed again."""
        finished = [run for run in runs if os.path.isfile(run.scores_file)]
        scores = {run: execute(run) for run in finished}
        self.done += len(finished)
        futures = {self.pool.submit(execute, run): run for run in runs if run not in scores}
        try:
            for future in as_completed(futures):
                run = futures[future]
                scores[run] = future.result()
                self.done, self.executed = self.done + 1, self.executed + 1
                self.print_progress(run, scores[run])
        except BaseException:                           # also Ctrl-C: start nothing more
            self.pool.shutdown(cancel_futures=True)
            raise
        return scores

    def print_progress(self, run: Run, scores: dict[str, float]) -> None:
        reward = f"E[r] {scores['E[r]']:+.2f}" if scores else ""     # reward models have none
        left = time_left(time.perf_counter() - self.start, self.executed,
                         self.executed + self.total - self.done)
        print(f"{self.done}/{self.total}  {run.cell.data:10} {run.cell.name:44} "
              f"lr {run.learning_rate:<6g} seed {run.seed}  {reward:12}  {left}", flush=True)


def tune(cells: list[Cell], schedule: Schedule) -> tuple[dict[Cell, dict[float, float]],
                                                         dict[Run, dict]]:
    """({cell: {rate: E[r], the mean of TUNING_SEEDS}}, scores of all these runs)."""
    rewards, scores = {cell: {} for cell in cells}, {}
    wanted = {cell: sorted({*cell.rates, cell.rate or cell.rates[0]}) for cell in cells}
    while any(wanted.values()):
        runs = {(cell, rate): [Run(cell, rate, seed) for seed in TUNING_SEEDS]
                for cell, rates in wanted.items() for rate in rates}
        schedule.total += len(TUNING_SEEDS) * len(runs)
        scores |= schedule.scores([run for pair in runs.values() for run in pair])
        for (cell, rate), pair in runs.items():
            rewards[cell][rate] = sum(scores[run]["E[r]"] for run in pair) / len(pair)
        wanted = {cell: next_rates(rewards[cell]) for cell, rates in wanted.items() if rates}
    return rewards, scores


def execute_cells(cells: list[Cell], schedule: Schedule, seeds: int = MOST_SEEDS) -> list[dict]:
    """Tune every cell that has rates to try, then run its seeds; a row of runs.jsonl per run.

    seeds   no cell gets more
    """
    leaders = {cell: cell.tuned_as or cell for cell in cells}
    tuned = [leader for leader in dict.fromkeys(leaders.values()) if leader.rates]
    tests = [(cell, seed) for seed in range(1, seeds + 1) for cell in cells if seed <= cell.seeds]
    before = list(dict.fromkeys(run.before for run in [
        *(Run(cell, 0, seed) for cell in tuned for seed in TUNING_SEEDS),
        *(Run(cell, 0, seed) for cell, seed in tests)] if run.before))
    schedule.total += len(before) + len(tests)
    schedule.scores(before)
    rewards, tuning = tune(tuned, schedule)
    rates = {cell: cell.rate or plateau(rewards[cell]) for cell in dict.fromkeys(leaders.values())}
    tested = schedule.scores([Run(cell, rates[leaders[cell]], seed) for cell, seed in tests])
    return [run.row() | scores for run, scores in (tuning | tested).items()]


# ---- are they the same again? -------------------------------------------------------------------

def check(rows: list[dict], number: int, schedule: Schedule) -> None:
    """Make `number` of the rows again, always the same ones for a file, and print what differs.

    Runs whose folder is there already are compared as they are: start from a fresh clone.
    raises  ValueError if there is no row, or a number of one is another one now
    """
    cells = {cell.key: cell for table in TABLES.values() for row in table.cells
             for cell in (row, row.tuned_as) if cell}
    rows = [row for row in rows if row["data"] != "bounds"]
    if not rows:
        raise ValueError("runs.jsonl has no run to check")
    random.Random(0).shuffle(rows)
    drawn = {Run(cells[row["data"], row["method"]], row["learning_rate"], row["seed"]): row
             for row in rows[:number]}
    before = list(dict.fromkeys(run.before for run in drawn if run.before))
    there = sum(os.path.isfile(run.scores_file) for run in drawn)
    schedule.total = len(before) + len(drawn)
    schedule.scores(before)
    differ = 0
    for run, scores in schedule.scores(list(drawn)).items():
        row = drawn[run]
        if names := [name for name, score in scores.items() if score != row.get(name)]:
            differ += 1
            print(f"differs: {run.key}: E[r] {row['E[r]']}, now {scores['E[r]']}; {len(names)} of "
                  f"{len(scores)} scores: {', '.join(names)}")
    if differ:
        other = any(row["runs"] != work_folder() for row in drawn.values())
        raise ValueError(f"{differ} of {len(drawn)} runs have other numbers now"
                         + "; the base model here has other weights than theirs" * other)
    print(f"all {len(drawn)} runs have the same numbers again ({there} were in {work_folder()} "
          "already)")


# ---- the command line ---------------------------------------------------------------------------

def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    if unknown := sorted(set(args.tables) - set(TABLES)):
        raise ValueError(f"no table is called {', '.join(unknown)}; there are {', '.join(TABLES)}")
    for name in ("workers", "seeds", "check"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)} must be at least 1")
    if args.check:
        rows = read_rows(args.out)
        ensure_world()
        return check(rows, args.check, Schedule(args.workers))
    if not args.report:
        ensure_world()
        cells = [cell for name in args.tables or TABLES for cell in TABLES[name].cells]
        rows = execute_cells(list(dict.fromkeys(cells)), Schedule(args.workers), args.seeds)
        save_rows(args.out, rows + bounds())
    torch.set_num_threads(1)         # small solves: two threads beside another job took minutes
    write_report(args.out)
    exact.write(args.out)


if __name__ == "__main__":
    run_cli(main)
