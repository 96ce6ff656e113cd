"""study/datasets.py: order, shares and labels of the data sets."""
import itertools
import math
from collections import Counter

import pytest

from study.datasets import (
    DATASETS,
    RESPONSES,
    UNSEEN_VERBS,
    balanced,
    differing_pairs,
    dirty,
    group_prompts,
)
from world import BAD_VERBS, answers, draw_data, held_out_prompts, question, training_prompts


def test_grouping_keeps_every_row_and_puts_a_prompts_rows_together():
    rows = [{"prompt": p, "n": n} for n, p in enumerate("abababab")]
    ordered = group_prompts(rows, 2)
    assert sorted(row["n"] for row in ordered) == list(range(8))
    assert "".join(row["prompt"] for row in ordered) == "aabbaabb"


def test_dirty_replaces_the_share_of_chosen_answers_by_harmful_ones_and_nothing_else():
    rows, soiled = DATASETS["golden"](3), DATASETS["golden-30"](3)
    harmful = {(question(*p), text) for p in training_prompts() for text, _, bad, _ in answers(*p)
               if bad}
    changed = [new for old, new in zip(rows, soiled, strict=True) if new != old]
    assert len(changed) / len(rows) == pytest.approx(0.3, abs=4 * math.sqrt(0.21 / len(rows)))
    assert all((row["prompt"], row["chosen"]) in harmful for row in changed)
    assert [row["rejected"] for row in rows] == [row["rejected"] for row in soiled]
    assert dirty(rows, 0, 3) == rows


@pytest.mark.parametrize("share", [0.1, 0.9])
def test_balanced_points_have_the_share_of_good_answers(share):
    points = [{"label": n % 3 == 0} for n in range(12 * RESPONSES)]
    labels = [row["label"] for row in balanced(points, share)]
    assert len(labels) == RESPONSES
    assert sum(labels) / len(labels) == pytest.approx(share, abs=1e-3)


def test_pairs_of_points_pair_a_prompts_good_answer_with_its_bad_one():
    points = {(row["prompt"], row["completion"], row["label"]) for row in
              draw_data(2, 400)["points"]}
    pairs = differing_pairs(draw_data(2, 400)["points"])
    assert 40 < len(pairs) < 160
    for row in pairs:
        assert (row["prompt"], row["chosen"], True) in points
        assert (row["prompt"], row["rejected"], False) in points


def test_demonstrations_replace_the_chosen_answer_alone():
    pairs, best = DATASETS["hh"](3), {}
    for prompt in training_prompts():
        ordered = sorted(answers(*prompt), key=lambda answer: -answer[1])
        best[question(*prompt)] = [text for text, *_ in ordered[:16]]
    rejected = [(row["prompt"], row["rejected"]) for row in pairs]
    for how in ("4", "16", "near-best"):
        rows = DATASETS[f"shown-{how}"](3)
        assert 0 <= len(pairs) - len(rows) < 20          # where it would be the rejected one
        assert {(row["prompt"], row["rejected"]) for row in rows} <= set(rejected)
    assert all(row["chosen"] in best[row["prompt"]] for row in rows)
    assert len({row["chosen"] for row in rows}) > 100 and rows == DATASETS["shown-near-best"](3)


def test_flips_and_mixtures():
    rows, noisy = DATASETS["hh"](3), DATASETS["noise-30"](3)
    changed = [old for old, new in zip(rows, noisy, strict=True) if old != new]
    assert len(changed) / len(rows) == pytest.approx(0.3, abs=0.06)
    assert all({old["chosen"], old["rejected"]} == {new["chosen"], new["rejected"]}
               for old, new in zip(rows, noisy, strict=True))
    mixed = DATASETS["mixture"](3)
    shown = {(row["prompt"], row["chosen"]) for row in DATASETS["shown-near-best"](3)}
    assert sum((row["prompt"], row["completion"]) in shown for row in mixed) >= RESPONSES // 2 - 20
    assert RESPONSES - 20 < len(mixed) <= RESPONSES


def test_pairs_chosen_by_length_and_pairs_without_some_verbs():
    for name, sign in (("longer", 1), ("shorter", -1)):
        rows = DATASETS[name](3)
        assert len(rows) == RESPONSES // 2 and rows == DATASETS[name](3)
        for row in rows:
            sizes = sorted([len(row["chosen"]), len(row["rejected"])], key=lambda n: sign * n)
            assert sizes == [len(row["rejected"]), len(row["chosen"])]
            assert max(sizes) >= 1.25 * min(sizes)
    rows = DATASETS["unseen"](3)
    assert len(rows) == RESPONSES // 2
    asked = {row["prompt"] for row in rows}
    for prompt in training_prompts():
        assert (question(*prompt) in asked) == (prompt[0] not in UNSEEN_VERBS)
    tested = [verb in UNSEEN_VERBS for verb, _ in held_out_prompts()]
    assert sum(tested) >= 5                      # enough of the 40 test prompts to measure on
    assert {verb in BAD_VERBS for verb in UNSEEN_VERBS} == {True, False}


def test_sets_of_pairs_of_different_size_hold_the_smaller_ones():
    sets = [[tuple(row.values()) for row in DATASETS[name](3)]
            for name in ("size-quarter", "hh", "size-four")]
    assert [2 * len(rows) for rows in sets] == [RESPONSES // 4, RESPONSES, 4 * RESPONSES]
    assert all(set(few) < set(many) for few, many in itertools.pairwise(sets))
    prompts = Counter(prompt for prompt, *_ in sets[0])
    assert len(prompts) == len(training_prompts()) and set(prompts.values()) == {2}
