"""Labelled data of every shape the papers use, drawn from the embedded world.

    DATASETS[name](seed) -> rows of a JSONL file, as train.py reads it
"""
import os
import random
from collections import Counter
from functools import partial

from world import answers, draw_data, question, training_prompts, write_jsonl

RESPONSES = 16 * len(training_prompts())         # labelled answers: 16 for each training prompt
NEAR_BEST = 16                                   # of 288 answers
UNSEEN_VERBS = ("rob", "wreck", "draw", "store")  # not in the data "unseen"


def group_prompts(rows: list[dict], size: int) -> list[dict]:
    """Rows in rounds over the prompts, `size` rows of a prompt in a row: these share a tree."""
    seen, keys = Counter(), []
    for row in rows:
        keys.append((seen[row["prompt"]] // size, row["prompt"]))
        seen[row["prompt"]] += 1
    return [row for _, row in sorted(zip(keys, rows, strict=True), key=lambda pair: pair[0])]


def dirty(rows: list[dict], share: float, seed: int) -> list[dict]:
    """Pairs whose chosen answer is, with probability `share`, replaced by a harmful one.

    The harmful answer is drawn as often as the base model is trained to give it.
    """
    rng = random.Random(f"dirty-{seed}")
    harmful = {question(*prompt): [(text, weight) for text, _, is_harmful, weight
                                   in answers(*prompt) if is_harmful]
               for prompt in training_prompts()}
    result = []
    for row in rows:
        if rng.random() < share:
            texts, weights = zip(*harmful[row["prompt"]], strict=True)
            row = row | {"chosen": rng.choices(texts, weights)[0]}
        result.append(row)
    return result


def differing_pairs(points: list[dict]) -> list[dict]:
    """The pairs DPO can learn from points: two consecutive draws for a prompt, labels differing."""
    pairs = []
    for first, second in zip(points[::2], points[1::2], strict=True):
        if first["label"] != second["label"]:
            good, bad = (first, second) if first["label"] else (second, first)
            pairs.append({"prompt": first["prompt"], "chosen": good["completion"],
                          "rejected": bad["completion"]})
    return pairs


def balanced(points: list[dict], share: float) -> list[dict]:
    """The first RESPONSES points of which the given share is good."""
    good = round(share * RESPONSES)
    left = {True: good, False: RESPONSES - good}
    chosen = []
    for row in points:
        if left[row["label"]]:
            left[row["label"]] -= 1
            chosen.append(row)
    return chosen


def grouped_pairs(kind: str, seed: int) -> list[dict]:
    """Pairs of kind "pairs" or "golden", two of a prompt in a row."""
    return group_prompts(draw_data(seed, RESPONSES)[kind], 2)


def unbalanced_points(share: float, seed: int) -> list[dict]:
    return group_prompts(balanced(draw_data(seed, 8 * RESPONSES)["points"], share), 4)


def demonstrated(how: str, seed: int) -> list[dict]:
    """HH-like pairs whose chosen answer is replaced by a demonstration of a certain quality.

    how   "4", "16": the best of so many draws of the habits; "near-best": one of the NEAR_BEST
          best answers, drawn uniformly
    Rows whose chosen answer would be the rejected one are dropped.
    """
    rows, rng = grouped_pairs("pairs", seed), random.Random(f"{how}-{seed}")
    listed = {question(*prompt): answers(*prompt) for prompt in training_prompts()}
    for row in rows:
        given = listed[row["prompt"]]
        if how == "near-best":
            chosen = rng.choice(sorted(given, key=lambda answer: -answer[1])[:NEAR_BEST])
        else:
            drawn = rng.choices(given, [weight for *_, weight in given], k=int(how))
            chosen = max(drawn, key=lambda answer: answer[1])
        row["chosen"] = chosen[0]
    return [row for row in rows if row["chosen"] != row["rejected"]]


def flipped(rows: list[dict], share: float, seed: int) -> list[dict]:
    """Pairs of which a share have chosen and rejected exchanged: label noise."""
    rng = random.Random(f"flipped-{seed}")
    return [row | {"chosen": row["rejected"], "rejected": row["chosen"]}
            if rng.random() < share else row for row in rows]


def more_pairs(times: int, seed: int) -> list[dict]:
    """HH-like pairs, so many times as many; the first are those of "hh"."""
    return group_prompts(draw_data(seed, times * RESPONSES)["pairs"], 2)


def of_length(longer: bool, seed: int) -> list[dict]:
    """HH-like pairs whose chosen answer has at least a quarter more characters than the rejected
    one, or the other way round."""
    rows = [row for row in more_pairs(8, seed) if
            len(row["chosen" if longer else "rejected"])
            >= 1.25 * len(row["rejected" if longer else "chosen"])]
    return group_prompts(rows[:RESPONSES // 2], 2)


def unseen_verbs(seed: int) -> list[dict]:
    """HH-like pairs of prompts without UNSEEN_VERBS, as many as of all prompts."""
    asked = {question(*prompt) for prompt in training_prompts() if prompt[0] not in UNSEEN_VERBS}
    rows = [row for row in draw_data(seed, 2 * RESPONSES)["pairs"] if row["prompt"] in asked]
    return group_prompts(rows[:RESPONSES // 2], 2)


def mixture(seed: int) -> list[dict]:
    """Half demonstrations (near the best, labelled good), half QA-like points: ULMA's own case."""
    half = RESPONSES // 2
    shown = [{"prompt": row["prompt"], "completion": row["chosen"], "label": True}
             for row in demonstrated("near-best", seed)]
    return group_prompts(shown[:half] + draw_data(seed, RESPONSES)["points"][:half], 4)


DATASETS = {      # name: seed -> rows
    **{f"shown-{how}": partial(demonstrated, how) for how in ("4", "16", "near-best")},
    **{f"noise-{percent}": lambda seed, share=percent / 100: flipped(
        grouped_pairs("pairs", seed), share, seed) for percent in (10, 20, 30)},
    "mixture": mixture,
    "size-quarter": lambda seed: grouped_pairs("pairs", seed)[:RESPONSES // 8],   # two a prompt
    "size-four": partial(more_pairs, 4),
    "longer": partial(of_length, True),
    "shorter": partial(of_length, False),
    "unseen": unseen_verbs,
    "large": partial(more_pairs, 8),     # long training, to meet the optimum of infinite data
    "hh":        lambda seed: grouped_pairs("pairs", seed),
    "golden":    lambda seed: grouped_pairs("golden", seed),
    "golden-10": lambda seed: dirty(grouped_pairs("golden", seed), 0.10, seed),
    "golden-30": lambda seed: dirty(grouped_pairs("golden", seed), 0.30, seed),
    "qa":        lambda seed: group_prompts(draw_data(seed, RESPONSES)["points"], 4),
    "qa-pairs":  lambda seed: group_prompts(differing_pairs(draw_data(seed, RESPONSES)["points"]),
                                            2),
    "qa-10":     lambda seed: unbalanced_points(0.1, seed),
    "qa-90":     lambda seed: unbalanced_points(0.9, seed),
    "red-team":  lambda seed: group_prompts(draw_data(seed, RESPONSES)["ratings"], 4),
    "negatives": lambda seed: [
        {"prompt": row["prompt"], "completion": row["rejected"], "label": False}
        for row in grouped_pairs("golden", seed)[:RESPONSES // 4]],
}


def dataset_file(folder: str, name: str, seed: int) -> str:
    """Path of the rows of DATASETS[name](seed) in a folder, written if it is missing."""
    path = os.path.join(folder, f"{name}-{seed}.jsonl")
    if not os.path.isfile(path):
        os.makedirs(folder, exist_ok=True)
        write_jsonl(path, DATASETS[name](seed))
    return path
