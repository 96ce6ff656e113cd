"""OUT/runs.jsonl: all that every table and figure is made of.

One row per run: data, method (with its flags), seed, learning_rate, runs (the folder it was trained
under, named after the base's weights and the settings), every score. Runs with one of TUNING_SEEDS
tuned a rate.
Rows with data "bounds" are no runs: the base model and the optimum pi* of it.
"""
import json
import os
from dataclasses import dataclass
from itertools import compress
from statistics import mean, median

from files.text import whole_lines, write_text
from study.datasets import UNSEEN_VERBS
from world import BAD_VERBS, held_out_prompts

Key = tuple[str, str]                       # (data, method with its flags) of a row
TUNING_SEEDS = (0, 100)
DIVERGED = 0.5                              # off-world mass of a run that has left the world


@dataclass
class Study:
    """The rows of a file, sorted out.

    results   {key: {seed: row}} of test runs
    tuning    {key: {learning rate: [row of each tuning seed]}}
    bounds    {folder of runs: {"base", "pi* beta=0.5", "golden base", …: row}}
    """
    results: dict[Key, dict[int, dict]]
    tuning: dict[Key, dict[float, list[dict]]]
    bounds: dict[str, dict[str, dict]]

    def has(self, *keys: Key) -> bool:
        return all(key in self.results for key in keys)

    def base(self, key: Key) -> dict:
        """Scores of the base model that a cell's runs started from."""
        return self.bounds[next(iter(self.results[key].values()))["runs"]]["base"]

    def values(self, key: Key, score: str) -> dict[int, float]:
        """{seed: score}; "instability" is the distance of E[r] from its median over the seeds."""
        rows = self.results[key]
        if score == "instability":
            middle = median(row["E[r]"] for row in rows.values())
            return {seed: abs(row["E[r]"] - middle) for seed, row in rows.items()}
        return {seed: row[score] for seed, row in sorted(rows.items())}

    def middle(self, key: Key, score: str) -> float:
        """The mean over a cell's seeds; the median where a run left the world."""
        values = self.values(key, score).values()
        return median(values) if self.diverged(key) else mean(values)

    def diverged(self, key: Key) -> bool:
        """Whether some run of a cell left the world, so that a mean says little."""
        return max(row["off-world"] for row in self.results[key].values()) > DIVERGED


TEST_VERBS = [verb for verb, _ in held_out_prompts()]
PARTS = {      # which of the test prompts
    "unseen": [verb in UNSEEN_VERBS for verb in TEST_VERBS],
    "seen": [verb not in UNSEEN_VERBS for verb in TEST_VERBS],
    "harmless": [verb not in BAD_VERBS for verb in TEST_VERBS]}


def scores_of_parts(row: dict) -> dict[str, float]:
    """"E[r] unseen", …: the mean of every score that is kept per prompt over the PARTS."""
    scores = {}
    for name, chosen in PARTS.items():
        for score, values in row.get("prompts", {}).items():
            part = list(compress(values, chosen))
            scores[f"{score} {name}"] = sum(part) / len(part)
    return scores


def sort_rows(rows: list[dict]) -> Study:
    study = Study({}, {}, {})
    for row in rows:
        key = row["data"], row["method"]
        if row["data"] == "bounds":
            study.bounds.setdefault(row["runs"], {})[row["method"]] = row | scores_of_parts(row)
        elif row["seed"] in TUNING_SEEDS:
            study.tuning.setdefault(key, {}).setdefault(row["learning_rate"], []).append(row)
        else:
            study.results.setdefault(key, {})[row["seed"]] = row | scores_of_parts(row)
    return study


def mean_rewards(study: Study, key: Key) -> dict[float, float]:
    """{learning rate: E[r], the mean of its tuning runs} of a cell."""
    return {rate: sum(row["E[r]"] for row in rows) / len(rows)
            for rate, rows in sorted(study.tuning.get(key, {}).items())}


def read_rows(out: str) -> list[dict]:
    return [json.loads(line) for line in whole_lines(os.path.join(out, "runs.jsonl"))]


def save_rows(out: str, rows: list[dict]) -> None:
    """Write rows to OUT/runs.jsonl. Old rows of the same cells go, but for other seeds of a cell at
    the same rate on the same base; so do bounds of unused bases.

    A cell's tuning runs may come without its test runs, where another cell takes its
    learning rate: the test runs of the file then stay.
    """
    def part(row: dict) -> tuple[str, str, bool, str]:
        folder = row["runs"] if row["data"] == "bounds" else ""
        return row["data"], row["method"], row["seed"] in TUNING_SEEDS, folder

    def run(row: dict) -> tuple:
        return part(row), row.get("learning_rate"), row["runs"]

    parts, runs = {part(row) for row in rows}, {run(row) for row in rows}
    seeds = {(run(row), row["seed"]) for row in rows}
    rows = rows + [row for row in read_rows(out) if part(row) not in parts or (
        row["seed"] not in TUNING_SEEDS and run(row) in runs
        and (run(row), row["seed"]) not in seeds)]
    bases = {row["runs"] for row in rows if row["data"] != "bounds"}
    os.makedirs(out, exist_ok=True)
    write_text(os.path.join(out, "runs.jsonl"),
               "".join(sorted(json.dumps(row) + "\n" for row in rows if row["runs"] in bases)))
