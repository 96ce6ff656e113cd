"""IPO, SimPO and KTO (ulma.py): by hand, finite differences, formulas, extremes.

BCO is point-wise DPO with an estimated log_z: here with one, so that its formula is tested.
"""
import math

import pytest
import torch
from conftest import assert_gradient_is_central_differences
from torch import tensor
from torch.testing import assert_close

from ulma import ipo_loss, kto_loss, pointwise_dpo_loss, simpo_loss

LN2, LN3 = math.log(2), math.log(3)

# Every loss as a function of (policy_logps, reference_logps, scores). Pairs are rows 2p, 2p + 1;
# length averages are log-probs over 100.
LOSSES = {
    "ipo": lambda p, r, z: ipo_loss(p[0::2], p[1::2], r[0::2], r[1::2], 0.1),
    "simpo": lambda p, r, z: simpo_loss(p[0::2] / 100, p[1::2] / 100, 2.0, 0.5),
    "kto": lambda p, r, z: kto_loss(p, r, z, 0.1, log_z=-0.1 * 2.0),
    "bco": lambda p, r, z: pointwise_dpo_loss(p, r, z, 0.1, log_z=-0.4),
}
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def random_batch(seed, size=8):
    generator = torch.Generator().manual_seed(seed)
    reference = -60 + 10 * torch.randn(size, generator=generator, dtype=torch.float64)
    policy = reference + 8 * torch.randn(size, generator=generator, dtype=torch.float64)
    return policy.clamp(max=-1), reference, tensor([1.0, 0.0] * (size // 2), dtype=torch.float64)


# ---- by hand ------------------------------------------------------------------------------------

def test_ipo_by_hand():
    # tau = 1/4 asks for a margin of 2: ρ = 3 and 1/2 miss it by 1/2, ρ = 0 and 0 by all of it.
    losses = ipo_loss(tensor([-5.0, -5.0]), tensor([-7.5, -8.0]), tensor([-8.0, -5.0]),
                      tensor([-8.0, -8.0]), tau=0.25)
    assert losses.tolist() == [0.25, 4.0]


def test_simpo_by_hand():
    # 2 (m_w - m_l) = ln 9 less gamma = ln 3 is ln 3: ln(4/3). Margin gamma is not scaled by beta.
    losses = simpo_loss(tensor([-1.0]), tensor([-1 - LN3]), beta=2.0, gamma=LN3)
    assert_close(losses, tensor([math.log(4 / 3)]))


def test_kto_by_hand():
    # beta (ρ - z0) = 0.1 (10 ln 3 + 5 - 5) = ln 3, σ = 3/4: good 1/4, bad 3/4, between 1/2.
    policy_logps, reference_logps = torch.full((3,), 10 * LN3 + 5 - 40), torch.full((3,), -40.0)
    losses = kto_loss(policy_logps, reference_logps, tensor([1.0, 0.0, 0.5]), beta=0.1,
                      log_z=-0.1 * 5.0)
    assert_close(losses, tensor([0.25, 0.75, 0.5]))


# ---- finite differences, formulas, extremes -----------------------------------------------------

@each_loss
def test_gradient_equals_central_differences(loss):
    policy_logps, reference_logps, scores = random_batch(seed=0)
    assert_gradient_is_central_differences(lambda p: loss(p, reference_logps, scores),
                                           policy_logps, rtol=1e-6)


@each_loss
def test_losses_equal_their_formula_written_with_exponentials(loss):
    # σ and log spelled out with math, one pair at a time.
    policy, reference, scores = random_batch(seed=1)
    name = next(key for key, value in LOSSES.items() if value is loss)
    log, exp = math.log, math.exp

    def sigma(a):
        return 1 / (1 + exp(-a))

    expected, p, r = [], policy.tolist(), reference.tolist()
    for i in range(0, 8, 2):
        chosen, rejected = p[i] - r[i], p[i + 1] - r[i + 1]
        expected += {
            "ipo": [(chosen - rejected - 5) ** 2],
            "simpo": [-log(sigma(2 * (p[i] / 100 - p[i + 1] / 100) - 0.5))],
            "kto": [1 - sigma(0.1 * (chosen - 2)), 1 - sigma(0.1 * (2 - rejected))],
            "bco": [-log(sigma(0.1 * chosen - 0.4)), -log(sigma(0.4 - 0.1 * rejected))]}[name]
    assert_close(loss(policy, reference, scores), tensor(expected, dtype=torch.float64),
                 rtol=1e-9, atol=0)


@each_loss
def test_loss_and_gradient_are_finite_at_extreme_logps(loss):
    policy_logps = tensor([-1e4, 1e4, 0.0, -1e4, 1e4, 0.0, -1e4, -1e4], requires_grad=True)
    reference_logps = tensor([1e4, -1e4, 0.0, -1e4, 1e4, -1e4, 0.0, 1e4])
    losses = loss(policy_logps, reference_logps, tensor([1.0, 0.0] * 4))
    losses.sum().backward()
    assert losses.dtype == torch.float32 and losses.isfinite().all()
    assert policy_logps.grad.isfinite().all()


@each_loss
def test_losses_are_per_row_and_an_empty_batch_gives_none(loss):
    whole = loss(*random_batch(seed=2))
    halves = [loss(*(t[s] for t in random_batch(seed=2))) for s in (slice(0, 4), slice(4, 8))]
    assert_close(whole, torch.cat(halves), rtol=1e-12, atol=0)
    empty = torch.empty(0)
    assert loss(empty, empty, empty).shape == (0,)


def test_losses_at_the_reference():
    # ρ = 0: BCO log 2, KTO 1/2, IPO 1 / (4 tau²).
    logps, other = tensor([-3.0, -50.0]), tensor([-4.0, -20.0])
    scores = tensor([1.0, 0.0])
    assert_close(pointwise_dpo_loss(logps, logps, scores, 0.1), tensor([LN2] * 2))
    assert_close(kto_loss(logps, logps, scores, 0.1), tensor([0.5] * 2))
    assert_close(ipo_loss(logps, other, logps, other, 0.5), tensor([1.0] * 2))
