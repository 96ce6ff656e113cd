"""Win rates and their 95 % intervals: bootstrap over prompts, Student's t over training seeds.

    outcome        +1, 0, -1: the first response of a comparison wins, ties, loses
    over prompts   how a result varies with the prompts of the test set: bootstrap, one run
    over seeds     how it varies from training to training: mean ± t s / sqrt(n), several runs
"""
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy import ndarray


def bootstrap(statistic: Callable[[Any], Any], rows: Any, draws: int = 1000,
              prompts: ndarray | None = None) -> tuple[float, float, float]:
    """(value, low, high): statistic(rows) and its 95 % percentile interval over prompts.

    statistic  rows [n, …] -> number
    rows       [n, …] array, or tensor on the CPU: whatever an array of int64 indexes
    draws      number of resamples, with replacement
    prompts    [n] int64   number of each row's prompt (default: every row has its own); the rows of
               a prompt are resampled together, since they are not independent
    """
    generator = np.random.default_rng(0)
    prompts = np.arange(len(rows)) if prompts is None else np.asarray(prompts)
    order = prompts.argsort(kind="stable")                                       # [n]
    groups = np.split(order, np.flatnonzero(np.diff(prompts[order])) + 1)
    one_row_each = len(groups) == len(rows)

    def resample():
        chosen = generator.integers(len(groups), size=len(groups))
        return rows[order[chosen] if one_row_each else np.concatenate([groups[i] for i in chosen])]

    values = sorted(float(statistic(resample())) for _ in range(draws))
    return float(statistic(rows)), values[int(0.025 * draws)], values[int(0.975 * draws)]


def wins(margins: ndarray) -> float:
    """Share of positive margins, of [n] > 0; a margin of zero counts one half."""
    margins = np.asarray(margins)
    return float((margins > 0).mean() + 0.5 * (margins == 0).mean())


def sigmoid(x: ndarray) -> ndarray:
    return (1 + np.tanh(x / 2)) / 2                      # 1 / (1 + exp(-x)) overflows


def length_controlled_wins(outcomes: ndarray, lengths: ndarray, other_lengths: ndarray) -> float:
    """The win rate a logistic regression predicts at equal length: σ(θ), from

        P(win) = σ(θ + φ tanh(d / s)),   d = length - other length,   s = sample s.d. of d.

    outcomes               [n]   +1, 0, -1; a tie is half a win and half a loss
    lengths, other_lengths [n]   of the two responses, in the same unit
    returns                in [0, 1]; the raw win rate if all d are equal (nothing to control for)
    Source: AlpacaEval 2, length_controlled_v1 (arXiv:2404.04475, section 3; tatsu-lab/alpaca_eval
    metrics/glm_winrate.py).
    Differs: one pair of models, so no instruction difficulty and no shared baseline rows; a ridge
    of 1e-4 n on φ (1e-6 n on θ), for data that length separates; they cross-validate an L1 penalty.
    """
    gaps = np.asarray(lengths, float) - np.asarray(other_lengths, float)         # [n]
    targets = (np.asarray(outcomes, float) + 1) / 2                              # [n]
    if not (gaps != gaps[0]).any():
        return float(targets.mean())
    features = np.stack([np.ones_like(gaps), np.tanh(gaps / gaps.std(ddof=1))], 1)       # [n, 2]
    ridge, weights = np.array([1e-6, 1e-4]), np.zeros(2)                         # θ, φ
    for _ in range(100):      # Newton; far from the maximum it overshoots: steps of length <= 2
        probs = sigmoid(features @ weights)                                      # [n]
        gradient = features.T @ (targets - probs) / len(gaps) - ridge * weights
        curvature = (features.T * (probs * (1 - probs))) @ features / len(gaps) + np.diag(ridge)
        step = np.linalg.solve(curvature, gradient)
        weights = weights + step * min(1.0, 2.0 / max(float(np.linalg.norm(step)), 1e-12))
        if np.abs(step).max() < 1e-9:
            break
    return float(sigmoid(weights[0]))


def t_probability(t: float, degrees: int) -> float:
    """P(|T| < t) of Student's T; t >= 0, degrees >= 1.

    With t = sqrt(degrees) tan θ, P is I_m(θ) / I_m(π/2), where m = degrees - 1 and
    I_m(θ) = ∫_0^θ cos^m = cos^(m-1) θ sin θ / m + (m - 1)/m I_(m-2)(θ).
    Source: Abramowitz and Stegun 26.7.3, 26.7.4.
    """
    def integral(theta):
        total = theta if degrees % 2 else math.sin(theta)                        # I_0 or I_1
        for m in range(3 - degrees % 2, degrees, 2):
            total = (math.cos(theta)**(m - 1) * math.sin(theta) + (m - 1) * total) / m
        return total

    return integral(math.atan(t / math.sqrt(degrees))) / integral(math.pi / 2)


@cache
def t_quantile(degrees: int) -> float:
    """t with P(|T| < t) = 0.95: 12.706 at 1 degree of freedom, 1.960 in the limit."""
    low, high = 0.0, math.pi / 2                                                 # bisection
    for _ in range(60):
        middle = (low + high) / 2
        inside = t_probability(math.sqrt(degrees) * math.tan(middle), degrees) < 0.95
        low, high = (middle, high) if inside else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def seed_interval(values: list[float]) -> tuple[float, float]:
    """(mean, half-width) of mean ± t_{0.975, n-1} s / sqrt(n), s the sample s.d.; a value per run.

    raises  ValueError on fewer than two values
    """
    if len(values) < 2:
        raise ValueError(f"an interval over seeds needs at least two runs; got {len(values)}")
    number, mean = len(values), sum(values) / len(values)
    spread = math.sqrt(sum((value - mean)**2 for value in values) / (number - 1))
    return mean, t_quantile(number - 1) * spread / math.sqrt(number)
