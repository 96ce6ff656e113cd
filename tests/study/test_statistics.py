"""study/statistics.py: p-values, corrections, verdicts and intervals by hand."""
import math

import pytest

from intervals import t_probability, t_quantile
from study.rows import sort_rows
from study.statistics import (
    Claim,
    benjamini_hochberg,
    clipped,
    compare,
    differences,
    flips_above,
    holm,
    on_path,
    over_seeds_and_verbs,
    reward_range,
    t_above,
    verdict,
)
from world import answers, held_out_prompts


def rows_of(cells: dict, runs: str = "w") -> list[dict]:
    """Rows from {(data, method): [E[r] of seeds 1, 2, …]}; other scores are the same number."""
    names = ("E[r]", "harmful", "off-world")
    return [{"data": data, "method": method, "seed": seed, "learning_rate": 1e-3, "runs": runs}
            | dict.fromkeys(names, value) for (data, method), values in cells.items()
            for seed, value in enumerate(values, 1)]


A, B, C = ("x", "a"), ("x", "b"), ("x", "c")


def test_students_t_of_tables():
    assert t_probability(t_quantile(4), 4) == pytest.approx(0.95)
    assert t_quantile(4) == pytest.approx(2.776, abs=1e-3)
    assert t_probability(4.604, 4) == pytest.approx(0.99, abs=1e-4)
    # 1 2 3: mean 2, s 1: t = 2 sqrt(3) = 3.464 at 2 degrees, P(T > t) = 0.0371
    assert t_above([1, 2, 3], 0) == pytest.approx(0.0371, abs=1e-4)
    assert t_above([-1, -2, -3], 0) == pytest.approx(1 - 0.0371, abs=1e-4)
    assert t_above([1, 2, 3], 2) == pytest.approx(0.5)
    assert t_above([2, 2], 0) == 0 and t_above([2, 2], 2) == 1


def test_sign_flips_by_hand():
    assert flips_above([1, 2, 3], 0) == 1 / 8                # no other signs give a sum of 6
    assert flips_above([1, 2, -3], 0) == 5 / 8               # sums 0: two; 2, 4 and 6: one each
    assert flips_above([1, 2, 3], 2) == 6 / 8                # gaps -1 0 1: sums 2 0 0 -2, twice


def test_corrections_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert benjamini_hochberg([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.04, 0.04])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == benjamini_hochberg([]) == []


def test_differences_are_paired_and_verdicts_follow_the_adjusted_p():
    # The seeds differ by far more than the methods.
    study = sort_rows(rows_of({A: [11, 102, 1003], B: [10, 100, 1000], C: [9, 100, 1001]}))
    claim = Claim("", "", A, B)
    found = compare(study, claim)
    assert found.differences == (1, 2, 3) and found.mean == 2
    assert found.high - found.mean == pytest.approx(4.303 / math.sqrt(3), abs=1e-3)
    assert found.p == pytest.approx(0.0742, abs=1e-4) and found.flip_p == 2 / 8
    assert [verdict(claim, found, p) for p in (0.04, 0.06)] == ["holds", "undecided"]
    harm = Claim("", "", A, B, "harmful")                    # smaller is better
    assert verdict(harm, compare(study, harm), 0.01) == "fails"
    gain = Claim("", "", A, C, before=(B, B))
    assert differences(study, gain) == differences(study, Claim("", "", A, C)) == (2, 2, 2)


def test_nothing_is_lost_within_the_margin():
    near, far = [0.01, -0.01, 0.02, 0.0], [-0.30, -0.31, -0.32, -0.3]
    for values, word in ((near, "holds"), (far, "fails"), ([0.3, -0.3, 0.2, -0.2], "undecided")):
        study = sort_rows(rows_of({A: values, B: [0.0] * 4}))
        for how in ("comparable", "not below"):
            claim = Claim("", "", A, B, how=how)
            found = compare(study, claim)
            assert verdict(claim, found, found.p) == word
    study = sort_rows(rows_of({A: [0.3, 0.31, 0.32, 0.3], B: [0.0] * 4}))    # far better
    for how, word in (("comparable", "fails"), ("not below", "holds")):
        claim = Claim("", "", A, B, how=how)
        assert verdict(claim, compare(study, claim), compare(study, claim).p) == word


def test_equal_kl_is_the_smaller_of_two_ends():
    # E[r] is linear in sqrt(KL): 0.5 at KL 1 on the long path, 1.0 on the short one's end.
    long = [[0, 0, 0], [1, 0.5, 0], [4, 1.0, 0]]
    short = [[0, 0, 0], [1, 1.0, 0]]
    assert on_path(long, 2.25) == pytest.approx(0.75) and on_path(long, 9) == 1.0
    rows = rows_of({A: [1.0, 1.0], B: [1.0, 1.0]})
    for row in rows:
        row["path"] = long if row["method"] == "a" else short
    assert differences(sort_rows(rows), Claim("", "", A, B, how="at equal KL")) == (-0.5, -0.5)


def test_runs_of_different_bases_are_not_paired_and_the_base_is_their_own():
    rows = rows_of({A: [1.0, 2.0]}) + rows_of({B: [0.0, 0.0]}, runs="v")
    with pytest.raises(ValueError, match="v and w are not paired"):
        differences(sort_rows(rows), Claim("", "", A, B))
    base = {"data": "bounds", "method": "base", "seed": 0, "E[r]": 0.5}
    rows += [base | {"runs": "w"}, base | {"runs": "v", "E[r]": 9.0}]
    assert differences(sort_rows(rows), Claim("", "", A, None)) == (0.5, 1.5)


def test_no_interval_leaves_the_possible_range():
    assert clipped([0.0, 0.02], "harmful")[1:] == (0, pytest.approx(0.01 + 0.127, abs=1e-3))
    assert clipped([0.9, 1.0], "win/base")[2] == 1 and clipped([1.0, 1.2], "perplexity")[1] == 1
    assert clipped([0.1, 0.5], "KL(pi||ref)")[1] == 0
    best = sum(max(r for _, r, *_ in answers(*p)) for p in held_out_prompts()) / 40
    assert reward_range()[1] == pytest.approx(best) and clipped([-3.0, 3.0], "E[r]")[2] == best
    assert clipped([-3.0, 3.0], "objective")[1] < -30


def test_the_interval_over_seeds_and_verbs():
    verbs = [verb for verb, _ in held_out_prompts()]
    listed = sorted(set(verbs))

    def study_of(difference, seeds):
        """B has its seed's number everywhere, A the difference(verb, seed) on top."""
        rows = rows_of({A: [0.0] * seeds, B: [0.0] * seeds, C: [0.0] * seeds})
        for row in rows:
            extra = {"a": difference, "b": lambda *_: 0.0, "c": lambda *_: 1.0}[row["method"]]
            row["prompts"] = {"E[r]": [extra(verb, row["seed"]) + row["seed"] for verb in verbs]}
        base = {"data": "bounds", "method": "base", "seed": 0, "runs": "w",
                "prompts": {"E[r]": [0.5] * len(verbs)}}
        return sort_rows([*rows, base])

    def found(difference, seeds, *more):
        return over_seeds_and_verbs(study_of(difference, seeds), Claim("", "", A, *more))

    assert found(lambda verb, seed: 2.0, 3, B) == pytest.approx((2.0, 2.0))
    # Seeds alone differ, by 1 2 3: Student's interval 2 ± 4.303 / sqrt(3).
    assert found(lambda verb, seed: seed, 3, B) == pytest.approx((2 - 2.484, 2 + 2.484), abs=1e-3)
    # Verbs alone differ, by 0 or 1: about t / 2 / sqrt(V), at 19 degrees t is 2.093.
    low, high = found(lambda verb, seed: listed.index(verb) % 2, 20, B)
    share = sum(listed.index(verb) % 2 for verb in verbs) / len(verbs)
    assert (low + high) / 2 == pytest.approx(share)
    assert high - low == pytest.approx(2 * 2.093 * 0.5 / len(listed) ** 0.5, rel=0.25)
    # Against the base, 0.5 on every prompt: seeds 1 and 2, differences 0.5 and 1.5.
    assert sum(found(lambda verb, seed: 0.0, 2, None)) / 2 == pytest.approx(1.0)
    # Gains: (A - B) - (C - B) is 2 - 1 on every prompt.
    assert over_seeds_and_verbs(study_of(lambda verb, seed: 2.0, 2), Claim(
        "", "", A, C, before=(B, B))) == pytest.approx((1.0, 1.0))
    for claim in (Claim("", "", A, B, how="at equal KL"), Claim("", "", A, B, score="harmful")):
        assert over_seeds_and_verbs(study_of(lambda verb, seed: 1.0, 2), claim) is None
