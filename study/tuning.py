"""Which learning rates are tried for a cell, and which of them is taken."""
import math

PLATEAU = 0.25                                   # nats below the best rate
SMALLEST_RATE, LARGEST_RATE = 3e-5, 1.6e-2


def plateau(rewards: dict[float, float]) -> float:
    """The rate in the middle of those within PLATEAU nats of the best one; of two, the smaller.

    rewards   {rate: E[r]}; -inf or NaN where training broke
    """
    rewards = {rate: -math.inf if math.isnan(value) else value for rate, value in rewards.items()}
    best = max(rewards.values())
    near = sorted(rate for rate, value in rewards.items() if value >= best - PLATEAU)
    return near[(len(near) - 1) // 2]


def next_rates(rewards: dict[float, float]) -> list[float]:
    """The rate to try next: beyond the end of the tried ones where the best lies, else none."""
    best = max(rewards, key=lambda rate: -math.inf if math.isnan(rewards[rate]) else rewards[rate])
    beyond = [best * 2] * (best == max(rewards)) + [best / 2] * (best == min(rewards))
    return [rate for rate in beyond if SMALLEST_RATE <= rate <= LARGEST_RATE]
