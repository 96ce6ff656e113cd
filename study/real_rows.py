"""Lines of OUT/real.jsonl: which are compared, and their intervals.

A ± is the half-width of a 95 % interval. Over prompts it is 1.96 standard errors of a run; where a
method was run with several seeds, all on the same prompts, the half-width of the t interval over
seeds (intervals.seed_interval) comes on top, as the square root of the sum of the two squares.
"""
import math

import torch
from torch import Tensor

from intervals import seed_interval
from study.real_scores import length_balanced, standard_error
from study.tables import method_label

ORDER = ("base", "sft", "unlearning", "unlikelihood", "dpo", "pointwise_dpo", "ulma", "kto", "d2o")


# ---- which rows ---------------------------------------------------------------------------------

def label(method: str) -> str:
    """A method with its flags, as a line of real.jsonl names it, in words."""
    words = {"base": "base", "kto": "KTO", "reward_model": "judge"}.get(method)
    return words or (method_label(method).replace("sft_adapter SFT", "from SFT")
                     .replace("anchor_instructions ours", "anchors under instructions"))


def place_of(method: str) -> tuple[int, str]:
    """What methods are sorted by: ORDER, then their flags."""
    return ORDER.index(method.split()[0]), method


def by_method(rows: list[dict], data: str) -> dict[tuple[str, float], list[dict]]:
    """{(method, rate): its rows} in ORDER, of those that were measured on held-out pairs."""
    found = {}
    for row in rows:
        if row["data"] == data and row["seed"] and "right" in row:
            found.setdefault((row["method"], row["learning_rate"]), []).append(row)
    return dict(sorted(found.items(), key=lambda item: place_of(item[0][0])))


def newest(rows: list[dict]) -> list[dict]:
    """Of every data set the rows with the settings of its last one: they are compared."""
    last = {row["data"]: row["settings"] for row in rows}
    return [row for row in rows if row["settings"] == last[row["data"]]]


def most_seeds(methods: dict[tuple[str, float], list[dict]]) -> dict[tuple[str, float], list[dict]]:
    """Of every method the rate that was run with the most seeds; the first of several."""
    best = {}
    for (method, rate), rows in methods.items():
        if method not in best or len(rows) > len(best[method][1]):
            best[method] = rate, rows
    return {(method, rate): rows for method, (rate, rows) in best.items()}


# ---- intervals ----------------------------------------------------------------------------------

def estimate(rows: list[dict], score: str) -> tuple[float, float | None]:
    """(mean, half-width of its 95 % interval): over prompts where the rows have a standard error,
    over seeds where there are several; None where neither is known."""
    values = [row[score] for row in rows]
    errors = [row[f"{score} se"] for row in rows if f"{score} se" in row]
    halves = [1.96 * sum(errors) / len(errors)] if errors else []
    if len(values) > 1:
        halves.append(seed_interval(values)[1])
    return sum(values) / len(values), math.hypot(*halves) if halves else None


def right_of(row: dict) -> Tensor:
    """1 or 0 for every measured pair, 1/2 for the digit 2: [P] float64."""
    return torch.tensor([{"0": 0.0, "1": 1.0, "2": 0.5}[digit] for digit in row["right"]],
                        dtype=torch.float64)


def lengths_of(row: dict) -> Tensor:
    """Of every measured pair which response is the longer one, as lengths: [P, 2] float64."""
    return torch.tensor([[digit == "0", digit == "1"] for digit in row["longer"]]).double()


def gap(rows: list[dict], others: list[dict], lengths: Tensor | None = None) -> tuple[float, float]:
    """(difference in accuracy of two methods or rates, half-width of its 95 % interval), on the
    same pairs and with the same seeds.

    lengths   [P, 2], tokens of chosen and rejected: where length says nothing (`length_balanced`)
    """
    def mean(values: Tensor) -> tuple[float, float]:
        return (float(values.mean()), standard_error(values)) if lengths is None else \
            length_balanced(values, lengths)
    of_seed = {row["seed"]: right_of(row) for row in others}
    gaps = [right_of(row) - of_seed[row["seed"]] for row in rows if row["seed"] in of_seed]
    if not gaps:
        return math.nan, math.nan                            # no seed in common
    difference, error = mean(sum(gaps) / len(gaps))
    over_seeds = seed_interval([mean(one)[0] for one in gaps])[1] if len(gaps) > 1 else 0.0
    return difference, math.hypot(1.96 * error, over_seeds)
