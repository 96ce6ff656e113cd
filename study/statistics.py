"""Comparisons of two cells, paired by seed: differences, intervals, p-values, verdicts.

Same seed, same data: the differences are a paired sample. The test is Student's t, two-sided, or
one-sided where a claim is that something is not lost. Beside it stands the sign-flip p, which
assumes nothing but symmetry; with n seeds it cannot be below 2 / 2^n (one-sided: 1 / 2^n). These
say nothing of other prompts; where scores of every prompt are kept, an interval over seeds and
verbs does.
"""
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from intervals import seed_interval, t_probability, t_quantile
from study.rows import Key, Study
from world import answers, held_out_prompts

MARGIN = 0.1                 # nats of E[r]; where a paper says "comparable"
ALPHA = 0.05
SMALLER_IS_BETTER = ("harmful", "off-world", "KL(pi||pi*)", "KL(ref||pi)", "perplexity",
                     "calibration error", "lose/chosen", "instability")
DRAWS = 2000                                     # of the bootstrap
SHARES = ("harmful", "off-world", "good", "refusal", "win/", "tie/", "lose/", "reward accuracy",
          "calibration error")                   # between 0 and 1
UNBOUNDED = ("objective", "reward slope")        # all other scores are 0 or more


@dataclass(frozen=True)
class Claim:
    """That the cell `better` has more of a score than `worse`; less for SMALLER_IS_BETTER.

    better, worse   keys of cells; worse None: the base model
    how             "more"; "at equal KL": more, on the paths from the base to the runs' ends, at
                    the smaller of the two KLs; "not below": not MARGIN less; "comparable": less
                    than MARGIN apart
    before          two cells subtracted from the two: compares gains
    """
    source: str
    words: str
    better: Key
    worse: Key | None
    score: str = "E[r]"
    how: str = "more"
    before: tuple[Key, Key] | None = None

    @property
    def keys(self) -> list[Key]:
        return [key for key in (self.better, self.worse, *(self.before or ())) if key]


@dataclass(frozen=True)
class Comparison:
    """What came out: differences better - worse, a value per seed, and their statistics."""
    differences: tuple[float, ...]
    mean: float
    low: float                       # 95 % t interval
    high: float
    p: float                         # of the claim's test, see Claim.how
    flip_p: float
    over_verbs: tuple[float, float] | None       # over_seeds_and_verbs


def on_path(path: Sequence[Sequence[float]], divergence: float) -> float:
    """E[r] where a run's path (runs.kl_path) has this KL: linear between points in sqrt(KL)."""
    for (kl, reward, _), (next_kl, next_reward, _) in itertools.pairwise(path):
        if divergence <= next_kl:
            roots = [math.sqrt(max(value, 0)) for value in (kl, divergence, next_kl)]
            share = (roots[1] - roots[0]) / (roots[2] - roots[0]) if roots[2] > roots[0] else 0
            return reward + share * (next_reward - reward)
    return path[-1][1]


def differences(study: Study, claim: Claim) -> tuple[float, ...]:
    """better - worse of every seed that both have.

    raises  ValueError where the cells' runs started from different bases
    """
    folders = {row["runs"] for key in claim.keys for row in study.results[key].values()}
    if len(folders) > 1:
        raise ValueError(f"{claim.words}: runs of {' and '.join(sorted(folders))} are not paired")
    if claim.how == "at equal KL":
        values = []
        rows = [study.results[key] for key in claim.keys]
        for seed in sorted(set(rows[0]) & set(rows[1])):
            paths = [row[seed]["path"] for row in rows]
            divergence = min(path[-1][0] for path in paths)
            values.append(on_path(paths[0], divergence) - on_path(paths[1], divergence))
        return tuple(values)
    columns = [study.values(key, claim.score) for key in claim.keys]
    if claim.worse is None:
        columns.append(dict.fromkeys(columns[0], study.base(claim.better)[claim.score]))
    seeds = sorted(set.intersection(*map(set, columns)))
    signs = (1, -1, -1, 1)[:len(columns)]
    return tuple(sum(sign * column[seed] for sign, column in zip(signs, columns, strict=True))
                 for seed in seeds)


def over_seeds_and_verbs(study: Study, claim: Claim) -> tuple[float, float] | None:
    """95 % interval of a claim's difference d, whose seeds and verbs could have been others.

    mean ± t sqrt(s² / n + v): s is the standard deviation of the n seeds' means, v the variance of
    the mean when the verbs of the test prompts are drawn again with replacement (bootstrap; a
    verb's prompts stay together, since they are alike), t Student's with n - 1 degrees.
    None where a row has no scores of every prompt, or a claim compares paths.
    """
    score, rows = claim.score, [study.results[key] for key in claim.keys]
    if claim.worse is None:
        rows.append(dict.fromkeys(rows[0], study.base(claim.better)))
    seeds = sorted(set.intersection(*map(set, rows)))
    if claim.how == "at equal KL" or not all(
            score in row[seed].get("prompts", ()) for row in rows for seed in seeds):
        return None
    d = sum(sign * np.array([row[seed]["prompts"][score] for seed in seeds])
            for sign, row in zip((1, -1, -1, 1), rows, strict=False))                # [n, X]
    verbs = np.unique([verb for verb, _ in held_out_prompts()], return_inverse=True)[1]   # [X]
    sums = np.bincount(verbs, d.mean(0))                                             # [V]
    often = np.random.default_rng(0).multinomial(len(sums), np.full(len(sums), 1 / len(sums)),
                                                 DRAWS)                              # [DRAWS, V]
    v = (often @ sums / (often @ np.bincount(verbs))).var()
    _, half = seed_interval(d.mean(1).tolist())                                      # t s / sqrt(n)
    half = math.hypot(half, t_quantile(len(seeds) - 1) * math.sqrt(v))
    return float(d.mean()) - half, float(d.mean()) + half


def t_above(values: Sequence[float], bound: float) -> float:
    """One-sided p of "the mean is at most bound", by Student's t."""
    mean, half = seed_interval(list(values))
    gap = mean - bound
    if half == 0:
        return 0.0 if gap > 0 else 1.0
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    t = gap / (spread / math.sqrt(len(values)))
    tail = (1 - t_probability(abs(t), len(values) - 1)) / 2
    return tail if t > 0 else 1 - tail


def flips_above(values: Sequence[float], bound: float) -> float:
    """One-sided sign-flip p of "symmetric around at most bound": exact over all signs."""
    gaps = [value - bound for value in values]
    sums = [sum(sign * gap for sign, gap in zip(signs, gaps, strict=True))
            for signs in itertools.product((1, -1), repeat=len(gaps))]
    return sum(total >= sum(gaps) - 1e-12 for total in sums) / len(sums)


def compare(study: Study, claim: Claim) -> Comparison:
    values = differences(study, claim)
    mean, half = seed_interval(list(values))
    mirrored = [-value for value in values]
    tests = []
    for above in (t_above, flips_above):
        if claim.how == "comparable":        # two one-sided tests, of either side of the margin
            tests.append(max(above(values, -MARGIN), above(mirrored, -MARGIN)))
        elif claim.how == "not below":
            tests.append(above(values, -MARGIN))
        else:
            tests.append(min(1.0, 2 * min(above(values, 0), above(mirrored, 0))))
    return Comparison(values, mean, mean - half, mean + half, *tests,
                      over_seeds_and_verbs(study, claim))


def verdict(claim: Claim, found: Comparison, adjusted: float) -> str:
    """holds, fails or undecided, by the adjusted p.

    A claim that nothing is lost fails where the 95 % interval lies beyond the margin.
    """
    if claim.how in ("comparable", "not below"):
        if adjusted < ALPHA:
            return "holds"
        beyond = found.high < -MARGIN or (claim.how == "comparable" and found.low > MARGIN)
        return "fails" if beyond else "undecided"
    gain = -found.mean if claim.score in SMALLER_IS_BETTER else found.mean
    return "undecided" if adjusted >= ALPHA else "holds" if gain > 0 else "fails"


def holm(ps: Sequence[float]) -> list[float]:
    """Adjusted p-values: below alpha, they keep the chance of any false positive below alpha."""
    adjusted, largest = [0.0] * len(ps), 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[index]))
        adjusted[index] = largest
    return adjusted


def benjamini_hochberg(ps: Sequence[float]) -> list[float]:
    """Adjusted p-values: below alpha, they keep the share of false positives below alpha."""
    adjusted, smallest = [0.0] * len(ps), 1.0
    order = sorted(range(len(ps)), key=lambda i: ps[i])
    for rank in range(len(ps), 0, -1):
        smallest = min(smallest, ps[order[rank - 1]] * len(ps) / rank)
        adjusted[order[rank - 1]] = smallest
    return adjusted


@cache
def reward_range() -> tuple[float, float]:
    """The smallest and the largest mean r* that any policy has on the test prompts."""
    rewards = [[reward for _, reward, *_ in answers(*prompt)] for prompt in held_out_prompts()]
    return tuple(sum(map(edge, rewards)) / len(rewards) for edge in (min, max))


def clipped(values: Sequence[float], score: str) -> tuple[float, float, float]:
    """(mean, low, high): the 95 % t interval over seeds, without what the score cannot be.

    A single value is given three times.
    """
    if len(values) == 1:
        return values[0], values[0], values[0]
    mean, half = seed_interval(list(values))
    if score in ("E[r]", "E[r] inside"):
        smallest, largest = reward_range()
    else:
        unbounded = score in UNBOUNDED or score.startswith("E[r]")   # of some prompts: not asked
        smallest = 1.0 if score == "perplexity" else -math.inf if unbounded else 0.0
        largest = 1.0 if score.startswith(SHARES) else math.inf
    return mean, max(mean - half, smallest), min(mean + half, largest)
