"""Win rates and how sure they are: bootstrap over prompts, t intervals over training seeds.

    outcome        +1, 0, -1: the first answer of a comparison wins, ties, loses
    over prompts   which prompts were asked is chance: bootstrap, one run is enough
    over seeds     which model training ended in is chance: mean ± t s / sqrt(n), several runs
"""
import math

import torch
from torch import Tensor


def bootstrap(statistic, rows: Tensor, draws: int = 1000,
              prompts: Tensor | None = None) -> tuple[float, float, float]:
    """(value, low, high): statistic(rows) and its 95 % percentile interval over prompts.

    statistic  rows [n, …] -> number
    rows       [n, …]
    draws      how often the prompts are drawn anew, with replacement
    prompts    [n] int64   whose prompt a row is (default: every row has its own); the rows of a
               prompt are drawn together, since they are not independent
    """
    generator = torch.Generator().manual_seed(0)
    if prompts is None:
        prompts = torch.arange(len(rows))
    order = prompts.argsort(stable=True)                                         # [n]
    groups = order.split(prompts.unique(return_counts=True)[1].tolist())
    alone = len(groups) == len(rows)

    def draw():
        chosen = torch.randint(len(groups), (len(groups),), generator=generator)
        return rows[order[chosen] if alone else torch.cat([groups[i] for i in chosen])]

    values = sorted(float(statistic(draw())) for _ in range(draws))
    return float(statistic(rows)), values[int(0.025 * draws)], values[int(0.975 * draws)]


def wins(margins: Tensor) -> Tensor:
    """Share of positive margins, a zero margin counting one half."""
    return (margins > 0).double().mean() + 0.5 * (margins == 0).double().mean()


def length_controlled_wins(outcomes: Tensor, lengths: Tensor, other_lengths: Tensor) -> float:
    """The win rate a logistic regression predicts at equal length: σ(θ), from

        P(win) = σ(θ + φ tanh(d / s)),   d = length - other length,   s = sample s.d. of d.

    outcomes               [n]   +1, 0, -1; a tie is half a win and half a loss
    lengths, other_lengths [n]   of the two answers, any one unit
    returns                in [0, 1]; the raw win rate if all d are equal (nothing to control for)
    Source: AlpacaEval 2, length_controlled_v1 (arXiv:2404.04475, section 3; tatsu-lab/alpaca_eval
    metrics/glm_winrate.py).
    Differs: one pair of models, so no instruction difficulty and no shared baseline rows; a ridge
    of 1e-4 n on φ (1e-6 n on θ), for data that length separates, where they cross-validate L1.
    """
    gaps = (lengths - other_lengths).double()                                    # [n]
    targets = (outcomes.double() + 1) / 2                                        # [n]
    if not (gaps != gaps[0]).any():
        return float(targets.mean())
    features = torch.stack([torch.ones_like(gaps), torch.tanh(gaps / gaps.std())], 1)    # [n, 2]
    ridge = torch.tensor([1e-6, 1e-4], dtype=torch.float64)
    weights = torch.zeros(2, dtype=torch.float64)                                # θ, φ
    for _ in range(100):      # Newton, each step cut to length 2: far from the top it overshoots
        probs = torch.sigmoid(features @ weights)                                # [n]
        gradient = features.T @ (targets - probs) / len(gaps) - ridge * weights
        curvature = (features.T * (probs * (1 - probs))) @ features / len(gaps) + ridge.diag()
        step = torch.linalg.solve(curvature, gradient)
        weights = weights + step * min(1.0, 2.0 / float(step.norm().clamp(min=1e-12)))
        if step.abs().max() < 1e-9:
            break
    return float(torch.sigmoid(weights[0]))


def t_quantile(degrees: int) -> float:
    """t with P(|T| < t) = 0.95 for Student's T: 12.706 at 1 degree of freedom, 1.960 in the limit.

    degrees  >= 1
    Source: with t = sqrt(degrees) tan θ, P is ∫_0^θ cos^(degrees - 1) over the same to π/2;
    I_m = cos^(m-1) θ sin θ / m + (m - 1)/m I_(m-2) (Abramowitz and Stegun 26.7.3, 26.7.4).
    """
    def integral(theta):
        total = theta if degrees % 2 else math.sin(theta)                        # I_0 or I_1
        for m in range(3 - degrees % 2, degrees, 2):
            total = (math.cos(theta)**(m - 1) * math.sin(theta) + (m - 1) * total) / m
        return total

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if integral(middle) < 0.95 * integral(math.pi / 2) else (
            low, middle)
    return math.sqrt(degrees) * math.tan(low)


def seed_interval(values: list[float]) -> tuple[float, float]:
    """(mean, half-width): mean ± t_{0.975, n-1} s / sqrt(n), s with n - 1; one value per run.

    raises  ValueError on fewer than two values
    """
    if len(values) < 2:
        raise ValueError(f"an interval over seeds needs at least two runs; got {len(values)}")
    number, mean = len(values), sum(values) / len(values)
    spread = math.sqrt(sum((value - mean)**2 for value in values) / (number - 1))
    return mean, t_quantile(number - 1) * spread / math.sqrt(number)
