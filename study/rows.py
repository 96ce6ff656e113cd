"""The two files that every table and figure is made of.

    OUT/runs.jsonl   one row per run: data, method (with its flags), seed, learning_rate, runs (the
                     folder it was trained under), every score
    OUT/bounds.json  scores of the base model and of the optimum pi*; the machine
"""
import json
import os
import platform

import torch

from files.text import read_json, whole_lines, write_text
from intervals import seed_interval

Key = tuple[str, str]                       # (data, method with its flags) of a row
Results = dict[Key, dict[int, dict]]        # {key: {seed: row}}


def save_rows(out: str, rows: list[dict], bounds: dict[str, dict]) -> None:
    """Write rows to OUT/runs.jsonl; old rows of the same cells go.

    bounds   {"base" or "pi* …": scores}
    A cell's tuning runs (seed 0) may come without its test runs, where another cell takes its
    learning rate: the test runs of the file then stay.
    """
    def part(row: dict) -> tuple[str, str, bool]:
        return row["data"], row["method"], row["seed"] > 0

    replaced = {part(row) for row in rows}
    old = [row for row in read_rows(out) if part(row) not in replaced]
    os.makedirs(out, exist_ok=True)
    write_text(os.path.join(out, "runs.jsonl"),
               "".join(sorted(json.dumps(row) + "\n" for row in rows + old)))
    machine = {"machine": platform.machine(), "torch": torch.__version__,
               "python": platform.python_version()}
    write_text(os.path.join(out, "bounds.json"), json.dumps(machine | bounds, indent=1))


def read_rows(out: str) -> list[dict]:
    return [json.loads(line) for line in whole_lines(os.path.join(out, "runs.jsonl"))]


def read_bounds(out: str) -> dict:
    return read_json(os.path.join(out, "bounds.json"))


def by_cell(rows: list[dict]) -> Results:
    """The rows of test runs, by cell and seed; seed 0 is tuning's."""
    results = {}
    for row in rows:
        if row["seed"]:
            results.setdefault((row["data"], row["method"]), {})[row["seed"]] = row
    return results


def seed_mean(results: Results, key: Key, score: str) -> tuple[float, float]:
    """(mean, half-width of the 95 % t interval) of a cell's score over its seeds."""
    return seed_interval([row[score] for row in results[key].values()])
