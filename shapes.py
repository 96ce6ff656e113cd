"""Labelled data of every shape the papers use, drawn from the embedded world.

    DATA[name](seed) -> rows of a JSONL file, as train.py reads it
"""
import random
from collections import Counter

from world import answers, draw_data, question, training_prompts

RESPONSES = 16 * len(training_prompts())         # labelled answers: 16 to each training prompt


def neighbours(rows: list[dict], together: int) -> list[dict]:
    """Rows in an order where `together` rows of a prompt follow each other: they share a tree."""
    seen, keys = Counter(), []
    for row in rows:
        keys.append((seen[row["prompt"]] // together, row["prompt"]))
        seen[row["prompt"]] += 1
    return [row for _, row in sorted(zip(keys, rows), key=lambda pair: pair[0])]


def dirty(rows: list[dict], share: float, seed: int) -> list[dict]:
    """Pairs; with probability `share` the chosen answer is a harmful one of the base's instead."""
    rng = random.Random(f"dirty-{seed}")
    harmful = {question(*prompt): [(text, weight) for text, _, bad, weight in answers(*prompt)
                                   if bad] for prompt in training_prompts()}
    return [row | {"chosen": rng.choices(*zip(*harmful[row["prompt"]]))[0]}
            if rng.random() < share else row for row in rows]


def differing_pairs(points: list[dict]) -> list[dict]:
    """What DPO can learn from points: neighbours (two draws for one prompt) with other labels."""
    return [{"prompt": a["prompt"], "chosen": (a if a["label"] else b)["completion"],
             "rejected": (b if a["label"] else a)["completion"]}
            for a, b in zip(points[::2], points[1::2]) if a["label"] != b["label"]]


def many_points(seed: int) -> list[dict]:
    return draw_data(seed, 8 * RESPONSES)["points"]


def balanced(points: list[dict], share: float) -> list[dict]:
    """The first RESPONSES points of which a given share is good."""
    good = round(share * RESPONSES)
    left = {True: good, False: RESPONSES - good}
    kept = []
    for row in points:
        if left[row["label"]]:
            left[row["label"]] -= 1
            kept.append(row)
    return kept


DATA = {      # name: seed -> rows
    "hh":        lambda seed: neighbours(draw_data(seed, RESPONSES)["pairs"], 2),
    "golden":    lambda seed: neighbours(draw_data(seed, RESPONSES)["golden"], 2),
    "golden-10": lambda seed: dirty(DATA["golden"](seed), 0.10, seed),
    "golden-30": lambda seed: dirty(DATA["golden"](seed), 0.30, seed),
    "qa":        lambda seed: neighbours(draw_data(seed, RESPONSES)["points"], 4),
    "qa-pairs":  lambda seed: neighbours(differing_pairs(draw_data(seed, RESPONSES)["points"]), 2),
    "qa-10":     lambda seed: neighbours(balanced(many_points(seed), 0.1), 4),
    "qa-90":     lambda seed: neighbours(balanced(many_points(seed), 0.9), 4),
    "red-team":  lambda seed: neighbours(draw_data(seed, RESPONSES)["ratings"], 4),
    "negatives": lambda seed: [
        {"prompt": row["prompt"], "completion": row["rejected"], "label": False}
        for row in DATA["golden"](seed)[:RESPONSES // 4]],
}
