"""The real study's runs: which, in which order, and which of them can start. The stages are those of
study/real.py."""
import os
from collections.abc import Collection, Sequence

from step import METHODS
from study.real_rows import label, newest
from study.runs import Cell, Training

RATES = (1e-4, 3e-4, 1e-3)
MIDDLE, TUNING_SEED, SEEDS = RATES[1], 0, (1, 2, 3)
FIRST = [Cell("hh", method) for method in (
    "dpo", "ulma", "sft", "pointwise_dpo", "unlikelihood", "unlearning", "kto")]
ANCHORS = (("num_anchors", 3),)
INSTRUCTIONS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "moral_instructions.txt")
TUNED = [*FIRST, Cell("hh", "ulma", (("sft_adapter", "SFT"),)), Cell("hh", "d2o", ANCHORS)]
STAGES = {"first": FIRST,
          "more": [*TUNED[len(FIRST):],
                   Cell("hh", "d2o", (*ANCHORS, ("anchor_instructions", "ours"))),
                   Cell("hh", "d2o", (*ANCHORS, ("refresh_anchors", 16)))],
          "rates": TUNED, "seeds": TUNED, "qa": [Cell("qa", cell.method) for cell in FIRST]}


def base_run(data: str) -> Training:
    """The base model, which is only measured."""
    return Training(Cell(data, "base"), 0, 1)


def judge_run(data: str) -> Training:
    return Training(Cell(data, "reward_model"), MIDDLE, 1)


def best_rate(cell: Cell, rows: list[dict]) -> float:
    """The rate with the best accuracy on the tuning pairs; the middle one until all are run."""
    accuracy = {row["learning_rate"]: row.get("accuracy", 0) for row in rows if row["seed"] ==
                TUNING_SEED and (row["data"], row["method"]) == (cell.data, cell.name)}
    return max(RATES, key=accuracy.get) if set(RATES) <= set(accuracy) else MIDDLE


def plan(stage: str, rows: list[dict]) -> list[Training]:
    """The runs of a stage, in order; those of `seeds` take the rate that `rates` found."""
    cells = STAGES[stage]
    before = [judge_run(cells[0].data), base_run(cells[0].data)]
    if stage == "rates":
        return before + [Training(cell, rate, TUNING_SEED) for cell in cells for rate in RATES]
    if stage == "seeds":
        return before + [Training(cell, best_rate(cell, rows), seed)
                         for seed in SEEDS for cell in cells]
    return before + [Training(cell, MIDDLE, 1) for cell in cells]


def sft_of(run: Training) -> Training:
    return Training(Cell(run.cell.data, "sft"), run.learning_rate, run.seed)


def runs_before(run: Training) -> list[Training]:
    """The runs that have to be over, where they are planned, before this one can start."""
    if METHODS.get(run.cell.method, METHODS["sft"]).reward_model:
        return []
    if not run.learning_rate:
        return [judge_run(run.cell.data)]
    before = [base_run(run.cell.data)]
    if run.seed != TUNING_SEED:
        before += [Training(run.cell, rate, TUNING_SEED) for rate in RATES]
    if "sft_adapter" in dict(run.cell.flags):
        before.append(sft_of(run))
    return before


def not_run(rows: list[dict]) -> list[str]:
    """Sentences: which runs of every stage have no line yet, with the newest settings."""
    rows, sentences = newest(rows), []
    for stage in STAGES:
        runs = waiting_runs([stage], rows, [])
        if runs:
            names = dict.fromkeys(label(run.cell.name) for run in runs)
            sentences.append(f"- `{stage}`: {len(runs)} run{'s' * (len(runs) > 1)} "
                             f"({'; '.join(names)})")
    return sentences


def waiting_runs(stages: Sequence[str], rows: list[dict], running: Collection[Training]) -> list[
        Training]:
    """The runs of the stages that have no row and do not run, in order, each once."""
    runs = dict.fromkeys(run for stage in stages for run in plan(stage, rows))
    return [run for run in runs if run not in running
            and not any(run.key.items() <= row.items() for row in rows)]


def next_run(waiting: list[Training], running: Collection[Training]) -> Training | None:
    """The first run whose `runs_before`, and whose SFT adapter, no run makes that runs or waits
    before it."""
    for place, run in enumerate(waiting):
        taken = {*running, *waiting[:place]}
        taken |= {sft_of(one) for one in taken if "sft_adapter" in dict(one.cell.flags)}
        if not {run, *runs_before(run)} & taken:
            return run
    return None
