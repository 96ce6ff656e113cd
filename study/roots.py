"""Zeros of increasing functions, many at once: what optima.py solves its equations with."""
from collections.abc import Callable

import torch
from torch import Tensor

Derivatives = Callable[[Tensor], tuple[Tensor, Tensor]]      # x -> f(x), f'(x), element by element


def increasing_root(function: Derivatives, low: Tensor, high: Tensor, start: Tensor) -> Tensor:
    """x [N] in [low, high] where increasing functions of one number each are 0; a bound where one
    has no zero between.

    Newton's steps, cut at the bracket; half of the bracket where a step is not half its last. A
    start at such a bound saves the steps to it.
    """
    point, last = start.clamp(low, high), high - low
    while last.abs().max() > 1e-12:
        value, slope = function(point)
        low, high = torch.where(value <= 0, point, low), torch.where(value > 0, point, high)
        newton = (point - value / slope).clamp(low, high)     # NaN where a function is 0: not near
        near = (newton - point).abs() <= (last.abs() / 2).clamp(min=1e-12)
        following = torch.where(near, newton, (low + high) / 2)
        point, last = following, following - point
    return point
