"""Every objective of ulma.py: by hand, by finite differences, by its relations to the others."""
import math

import pytest
import torch
from conftest import assert_gradient_is_central_differences
from torch import tensor
from torch.testing import assert_close

from ulma import (
    dpo_loss,
    negative_dpo_loss,
    pointwise_dpo_loss,
    pointwise_mse_loss,
    positive_dpo_loss,
    response_logps,
    sft_loss,
    ulma_loss,
    ulma_mse_loss,
    unlearning_loss,
    unlikelihood_loss,
)

LN3, LN8 = math.log(3), math.log(8)

# Every loss as a function of (policy_logps, reference_logps, scores), with beta = 0.1 and an
# offset that is not zero wherever there is one. DPO reads rows 2p and 2p + 1 as its pair p.
LOSSES = {
    "sft": lambda p, r, z: sft_loss(p),
    "unlearning": lambda p, r, z: unlearning_loss(p),
    "unlikelihood": lambda p, r, z: unlikelihood_loss(p, z, 0.3),
    "dpo": lambda p, r, z: dpo_loss(p[0::2], p[1::2], r[0::2], r[1::2], 0.1),
    "pointwise_dpo": lambda p, r, z: pointwise_dpo_loss(p, r, z, 0.1, 0.2),
    "pointwise_mse": lambda p, r, z: pointwise_mse_loss(p, r, z, 0.1, 0.2),
    "ulma": lambda p, r, z: ulma_loss(p, r, z, 0.1, 0.2),
    "ulma_mse": lambda p, r, z: ulma_mse_loss(p, r, z, 0.1, 0.2),
    "ulma_mse, authors": lambda p, r, z: ulma_mse_loss(p, r, z, 0.1, 0.2, mse_on_best=False),
    "positive_dpo": lambda p, r, z: positive_dpo_loss(p, r, 0.1, 0.2),
    "negative_dpo": lambda p, r, z: negative_dpo_loss(p, r, 0.1, 0.2),
}
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def random_batch(seed, size=8):
    """Log-probs of a policy that has moved up to some 30 nats from its reference; mixed scores."""
    generator = torch.Generator().manual_seed(seed)
    reference = -60 + 10 * torch.randn(size, generator=generator, dtype=torch.float64)
    policy = reference + 15 * torch.randn(size, generator=generator, dtype=torch.float64)
    scores = tensor([1.0, 0.0, 0.25, 1.0, 0.0, 0.75, 1.0, 0.5], dtype=torch.float64)
    return policy, reference, scores


# ---- by hand ------------------------------------------------------------------------------------

def test_sft_unlearning_and_unlikelihood_by_hand():
    # π(y | x) = 1/8, so the surprise is ln 8; unlearning is minus that. Unlikelihood with
    # alpha = 1/2: a good response costs ln 8, a bad one -ln 8 / 2, z = 1/3 has
    # (1/2 · 2/3 - 1/3) = 0 weight.
    policy_logps = torch.full((3,), -LN8)
    assert_close(sft_loss(policy_logps), tensor([LN8] * 3))
    assert_close(unlearning_loss(policy_logps), tensor([-LN8] * 3))
    losses = unlikelihood_loss(policy_logps, tensor([1.0, 0.0, 1 / 3]), alpha=0.5)
    assert_close(losses, tensor([LN8, -LN8 / 2, 0.0]))
    losses = unlikelihood_loss(policy_logps, tensor([1.0, 0.0, 0.5]))        # alpha = 1
    assert_close(losses, tensor([LN8, -LN8, 0.0]))


def test_dpo_by_hand():
    # Log-ratios 6 ln 3 (chosen) and -4 ln 3 (rejected): beta times their difference is
    # 0.1 · 10 ln 3 = ln 3, σ = 3/4, loss ln(4/3). The other way round σ = 1/4, loss ln 4.
    chosen, rejected = tensor([6 * LN3 - 7, -4 * LN3 - 5]), tensor([-4 * LN3 - 5, 6 * LN3 - 7])
    reference_chosen, reference_rejected = tensor([-7.0, -5.0]), tensor([-5.0, -7.0])
    losses = dpo_loss(chosen, rejected, reference_chosen, reference_rejected, beta=0.1)
    assert_close(losses, tensor([math.log(4 / 3), math.log(4)]))


def test_pointwise_dpo_by_hand():
    # h = 0.1 · 10 ln 3 = ln 3, so σ(h) = 3/4: good costs ln(4/3), bad costs ln 4, and z = 1/2
    # the mean of the two, ln(16/3) / 2.
    policy_logps, reference_logps = torch.full((3,), 10 * LN3 - 40), torch.full((3,), -40.0)
    scores = tensor([1.0, 0.0, 0.5])
    expected = tensor([math.log(4 / 3), math.log(4), math.log(16 / 3) / 2])
    assert_close(pointwise_dpo_loss(policy_logps, reference_logps, scores, beta=0.1), expected)
    # The same h from the offset alone, π = π_ref: log_z is added outside beta.
    at_reference = pointwise_dpo_loss(reference_logps, reference_logps, scores, 0.1, log_z=LN3)
    assert_close(at_reference, expected)


def test_positive_and_negative_dpo_by_hand():
    # h = 0.1 · 10 ln 3 + ln 3 = ln 9, so σ(h) = 9/10: good costs ln(10/9), bad costs ln 10.
    policy_logps, reference_logps = tensor([10 * LN3 - 40]), tensor([-40.0])
    positive = positive_dpo_loss(policy_logps, reference_logps, beta=0.1, log_z=LN3)
    negative = negative_dpo_loss(policy_logps, reference_logps, beta=0.1, log_z=LN3)
    assert_close(positive, tensor([math.log(10 / 9)]))
    assert_close(negative, tensor([math.log(10)]))


def test_pointwise_mse_by_hand():
    # h = 0.5 · 2 + 0.25 = 1.25 (exact in binary): z = 1 costs 1/16, z = 0 costs 25/16, and
    # z = 1/4 costs 1.
    policy_logps, reference_logps = torch.full((3,), -8.0), torch.full((3,), -10.0)
    losses = pointwise_mse_loss(policy_logps, reference_logps, tensor([1.0, 0.0, 0.25]), 0.5, 0.25)
    assert losses.tolist() == [1 / 16, 25 / 16, 1.0]


def test_ulma_by_hand():
    # π = 1/8 everywhere and h = 0.1 · (-10 ln 3) + 2 ln 3 = ln 3: good costs ln 8 (no beta, no
    # reference), bad costs -log σ(-ln 3) = ln 4, z = 1/4 costs ln 8 / 4 + 3/4 · ln 4.
    policy_logps = torch.full((3,), -LN8)
    losses = ulma_loss(policy_logps, policy_logps + 10 * LN3, tensor([1.0, 0.0, 0.25]), beta=0.1,
                       log_z=2 * LN3)
    assert_close(losses, tensor([LN8, math.log(4), LN8 / 4 + 0.75 * math.log(4)]))


def test_ulma_mse_by_hand():
    # π = 1/8, h = 0.5 · 2 + 0.25 = 1.25: best costs ln 8 + 1/16 (the paper) or ln 8 (the authors'
    # code); the others cost their squared error either way.
    policy_logps = torch.full((3,), -LN8)
    reference_logps, scores = policy_logps - 2, tensor([1.0, 0.0, 0.25])
    paper = ulma_mse_loss(policy_logps, reference_logps, scores, 0.5, 0.25)
    authors = ulma_mse_loss(policy_logps, reference_logps, scores, 0.5, 0.25, mse_on_best=False)
    assert_close(paper, tensor([LN8 + 1 / 16, 25 / 16, 1.0]))
    assert_close(authors, tensor([LN8, 25 / 16, 1.0]))
    # On a scale where 4 is best, 1 is not: (4 - 5/4)² = 121/16 and (1 - 5/4)² = 1/16.
    losses = ulma_mse_loss(policy_logps[:2], reference_logps[:2], tensor([4.0, 1.0]), 0.5, 0.25,
                           best_score=4.0)
    assert_close(losses, tensor([LN8 + 121 / 16, 1 / 16]))


# ---- finite differences -------------------------------------------------------------------------

@each_loss
def test_gradient_equals_central_differences(loss):
    # A detached term, a wrong sign in the formula's gradient or a clamp would differ.
    policy_logps, reference_logps, scores = random_batch(seed=0)
    assert_gradient_is_central_differences(lambda p: loss(p, reference_logps, scores),
                                           policy_logps, rtol=1e-7)


@each_loss
def test_losses_equal_their_formula_written_with_exponentials(loss):
    # The same objectives with σ and log spelled out by math.exp and math.log, one row at a time.
    policy_logps, reference_logps, scores = random_batch(seed=1)
    name = next(key for key, value in LOSSES.items() if value is loss)

    def log_sigmoid(a):
        return math.log(1 / (1 + math.exp(-a)))

    expected = []
    for p, r, z in zip(policy_logps.tolist(), reference_logps.tolist(), scores.tolist(),
                       strict=True):
        h = 0.1 * (p - r) + 0.2
        expected.append({
            "sft": -p,
            "unlearning": p,
            "unlikelihood": -z * p + 0.3 * (1 - z) * p,
            "dpo": 0.1 * (p - r),
            "pointwise_dpo": -z * log_sigmoid(h) - (1 - z) * log_sigmoid(-h),
            "pointwise_mse": (z - h) ** 2,
            "ulma": -z * p - (1 - z) * log_sigmoid(-h),
            "ulma_mse": (-p if z == 1 else 0) + (z - h) ** 2,
            "ulma_mse, authors": -p if z == 1 else (z - h) ** 2,
            "positive_dpo": -log_sigmoid(h),
            "negative_dpo": -log_sigmoid(-h),
        }[name])
    if name == "dpo":
        expected = [-log_sigmoid(a - b) for a, b in zip(expected[0::2], expected[1::2],
                                                        strict=True)]
    assert_close(loss(policy_logps, reference_logps, scores),
                 tensor(expected, dtype=torch.float64), rtol=1e-7, atol=0)


def test_pointwise_dpo_gradient_in_h_is_sigma_minus_z():
    # With beta = 1, dL/d(log π) = dL/dh = σ(h) - z (METHODS 1.3.2: section 4.3 of the paper swaps
    # the two weights). By hand: σ(ln 3) = 3/4, so -1/4 for z = 1, 3/4 for z = 0, 1/4 for z = 1/2.
    logratios = torch.full((3,), LN3, dtype=torch.float64, requires_grad=True)
    scores = tensor([1.0, 0.0, 0.5])
    pointwise_dpo_loss(logratios, torch.zeros(3), scores, beta=1.0).sum().backward()
    assert_close(logratios.grad, tensor([-0.25, 0.75, 0.25], dtype=torch.float64))


def test_equation_7_as_printed_is_another_loss():
    # The paper prints -(1 - z) log σ(1 - r) for -(1 - z) log(1 - σ(r)). At z = 0, r = 0 the printed
    # form falls with slope σ(-1) = 0.269, the right one with σ(0) = 0.5.
    reward_logits = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    scores, zero = torch.zeros(1), torch.zeros(1)
    ours, = torch.autograd.grad(pointwise_dpo_loss(reward_logits, zero, scores, 1.0), reward_logits)
    printed, = torch.autograd.grad(-torch.log(torch.sigmoid(1 - reward_logits)), reward_logits)
    assert_close(ours.item(), 0.5)
    assert_close(printed.item(), 1 / (1 + math.e))
    assert round(printed.item(), 3) == 0.269


def test_ulma_gradient_weighs_positives_by_one_and_negatives_by_beta_sigma():
    # d/d(log π) = -z + (1 - z) beta σ(h): -1 on a demonstration however far the policy has moved,
    # beta · 3/4 on a bad response with h = ln 3; the last is what keeps it from running away.
    policy_logps = tensor([10 * LN3, 10 * LN3, -1e4], requires_grad=True)
    ulma_loss(policy_logps, torch.zeros(3), tensor([1.0, 0.0, 0.0]), beta=0.1).sum().backward()
    assert_close(policy_logps.grad, tensor([-1.0, 0.075, 0.0]))


def test_ulma_does_not_look_at_the_reference_of_positives():
    # step.py gives 0 for references it does not compute: 0 or -1e4 must not change a bit.
    policy_logps = tensor([-30.0, -50.0], requires_grad=True)
    values = []
    for reference in (torch.zeros(2), torch.full((2,), -1e4), torch.full((2,), 1e4)):
        losses = ulma_loss(policy_logps, reference, torch.ones(2), beta=0.1, log_z=0.7)
        values.append(torch.cat([losses, torch.autograd.grad(losses.sum(), policy_logps)[0]]))
    assert torch.equal(values[0], values[1]) and torch.equal(values[0], values[2])


# ---- relations between objectives (METHODS section 4) -------------------------------------------

def test_ulma_on_positives_is_sft_and_on_negatives_is_negative_dpo():
    # z = 1 leaves only -log π; z = 0 leaves only -log σ(-h).
    policy_logps, reference_logps, _ = random_batch(seed=2)
    ones, zeros = torch.ones_like(policy_logps), torch.zeros_like(policy_logps)
    assert_close(ulma_loss(policy_logps, reference_logps, ones, 0.1, 0.2), sft_loss(policy_logps))
    assert_close(ulma_loss(policy_logps, reference_logps, zeros, 0.1, 0.2),
                 negative_dpo_loss(policy_logps, reference_logps, 0.1, 0.2))


def test_unlikelihood_is_sft_on_positives_and_unlearning_on_negatives():
    # alpha = 1: -log π where z = 1, +log π where z = 0.
    policy_logps, _, _ = random_batch(seed=3)
    ones, zeros = torch.ones_like(policy_logps), torch.zeros_like(policy_logps)
    assert_close(unlikelihood_loss(policy_logps, ones), sft_loss(policy_logps))
    assert_close(unlikelihood_loss(policy_logps, zeros), unlearning_loss(policy_logps))


def test_pointwise_dpo_is_its_positive_and_negative_halves():
    # Linear in z: z times the positive half plus 1 - z times the negative half.
    policy_logps, reference_logps, scores = random_batch(seed=4)
    positive = positive_dpo_loss(policy_logps, reference_logps, 0.1, 0.2)
    negative = negative_dpo_loss(policy_logps, reference_logps, 0.1, 0.2)
    assert_close(pointwise_dpo_loss(policy_logps, reference_logps, scores, 0.1, 0.2),
                 scores * positive + (1 - scores) * negative)


def test_pointwise_dpo_on_a_pair_is_bco_pair():
    # TRL's bco_pair: softplus(-beta rho_w) + softplus(beta rho_l), with log_z = 0.
    policy_logps, reference_logps, _ = random_batch(seed=5, size=2)
    losses = pointwise_dpo_loss(policy_logps, reference_logps, tensor([1.0, 0.0]), beta=0.1)
    rho_w, rho_l = (policy_logps - reference_logps).tolist()
    expected = math.log1p(math.exp(-0.1 * rho_w)) + math.log1p(math.exp(0.1 * rho_l))
    assert_close(losses.sum().item(), expected, rtol=1e-12, atol=0)


def test_losses_at_the_reference():
    # rho = 0: every argument of σ is 0 and σ = 1/2, so log 2; the regression's error is z itself.
    logps = tensor([-3.0, -50.0, -700.0, -2.0])
    scores = tensor([1.0, 0.0, 0.5, 0.25])
    log_2 = torch.full((4,), math.log(2))
    assert_close(dpo_loss(logps, logps.flip(0), logps, logps.flip(0), beta=0.1), log_2)
    assert_close(pointwise_dpo_loss(logps, logps, scores, beta=0.1), log_2)
    assert_close(positive_dpo_loss(logps, logps, beta=0.1), log_2)
    assert_close(negative_dpo_loss(logps, logps, beta=0.1), log_2)
    assert_close(pointwise_mse_loss(logps, logps, scores, beta=0.1), scores ** 2)


def test_npo_is_two_over_beta_times_negative_dpo():
    # NPO (arXiv:2404.05868, Eq. 3): (2 / beta) log(1 + (π / π_ref)^beta), here without log and exp
    # tricks: π / π_ref = 4 and 1/9, beta = 1/2 gives 4 ln(1 + 2) and 4 ln(1 + 1/3).
    policy_logps, reference_logps = tensor([math.log(4) - 9, -math.log(9) - 2]), tensor([-9., -2.])
    npo = 2 / 0.5 * negative_dpo_loss(policy_logps, reference_logps, beta=0.5)
    assert_close(npo, tensor([4 * math.log(3), 4 * math.log(4 / 3)]))


def test_npo_tends_to_unlearning_as_beta_vanishes():
    # (2 / b) softplus(b rho) = (2 / b) log 2 + rho + b rho² / 4 + O(b³): up to a constant the
    # limit is +log π, and its gradient 2σ(b rho) tends to 1, unlearning's.
    beta = 1e-6
    policy_logps, reference_logps, _ = random_batch(seed=6)
    policy_logps.requires_grad_()
    npo = 2 / beta * negative_dpo_loss(policy_logps, reference_logps, beta)
    moved = (npo - 2 / beta * math.log(2)).detach()
    expected = unlearning_loss(policy_logps) - reference_logps
    assert_close(moved, expected.detach(), rtol=0, atol=1e-3)        # b rho² / 4 <= 1e-6 · 45² / 4
    gradient, = torch.autograd.grad(npo.sum(), policy_logps)
    limit, = torch.autograd.grad(unlearning_loss(policy_logps).sum(), policy_logps)
    assert_close(gradient, limit, rtol=0, atol=1e-4)


# ---- robustness ---------------------------------------------------------------------------------

@each_loss
@pytest.mark.parametrize("scores", [[1.0, 0.0] * 4, [1.0] * 8, [0.0] * 8, [0.25, 0.5] * 4],
                         ids=["mixed", "only good", "only bad", "only between"])
def test_loss_and_gradient_are_finite_at_extreme_logps(loss, scores):
    # log σ as log(sigmoid(h)) is -inf from h = -104 on in float32, and its gradient 0/0. Batches of
    # a single class: the authors' code takes the mean of an empty class, NaN.
    policy_logps = tensor([-1e4, 1e4, 0.0, -1e4, 1e4, 0.0, -1e4, -1e4], requires_grad=True)
    reference_logps = tensor([1e4, -1e4, 0.0, -1e4, 1e4, -1e4, 0.0, 1e4])
    losses = loss(policy_logps, reference_logps, tensor(scores))
    losses.sum().backward()
    assert losses.dtype == torch.float32 and losses.isfinite().all()
    assert policy_logps.grad.isfinite().all()


@each_loss
def test_an_empty_batch_gives_no_losses(loss):
    # A micro-batch without pairs reaches DPO as [0]; the caller's sum must then be 0, not NaN.
    empty = torch.empty(0, requires_grad=True)
    losses = loss(empty, torch.empty(0), torch.empty(0))
    assert losses.shape == (0,)
    assert torch.autograd.grad(losses.sum(), empty)[0].shape == (0,)


@each_loss
def test_losses_are_per_response_and_leave_their_arguments_alone(loss):
    # Each loss depends on its own row only: halves computed apart are the whole, and nothing is
    # reduced or written to in place. (Rows 4..7 are DPO's pairs 2 and 3.)
    policy_logps, reference_logps, scores = random_batch(seed=7)
    before = [t.clone() for t in (policy_logps, reference_logps, scores)]
    whole = loss(policy_logps, reference_logps, scores)
    halves = [loss(policy_logps[s], reference_logps[s], scores[s])
              for s in (slice(0, 4), slice(4, 8))]
    assert_close(whole, torch.cat(halves), rtol=1e-12, atol=0)
    for tensor_before, tensor_after in zip(before, (policy_logps, reference_logps, scores),
                                           strict=True):
        assert torch.equal(tensor_before, tensor_after)


# ---- what Z = 1 costs (METHODS 1.4) -------------------------------------------------------------

REFERENCE = tensor([0.5, 0.3, 0.2], dtype=torch.float64)      # π_ref of the three responses
REWARDS = tensor([2.0, 0.0, -1.0], dtype=torch.float64)       # the true reward; beta = 1
LOG_Z = (REFERENCE * REWARDS.exp()).sum().log().item()        # ln(.5 e² + .3 + .2 / e) = 1.403


def population_loss(theta, loss, log_z):
    """E over y ~ π_ref of the loss of π = softmax(theta), with z = E[label | y] = σ(reward)."""
    losses = loss(theta.log_softmax(-1), REFERENCE.log(), log_z)
    return (REFERENCE * losses).sum()


def labelled_pointwise_dpo(policy_logps, reference_logps, log_z):
    return pointwise_dpo_loss(policy_logps, reference_logps, REWARDS.sigmoid(), 1.0, log_z)


def minimiser(loss, log_z):
    """π after gradient descent on the logits theta, from π_ref, until the gradient is 1e-9."""
    theta = REFERENCE.log().clone().requires_grad_()
    for _ in range(5000):
        gradient, = torch.autograd.grad(population_loss(theta, loss, log_z), theta)
        if gradient.norm() < 1e-9:
            return theta.softmax(-1).detach()
        theta.data -= 4 * gradient
    raise AssertionError(f"not converged, gradient {gradient.tolist()}")


def test_pointwise_dpo_finds_the_optimum_iff_log_z_is_right():
    # The KL-regularised optimum is π* = π_ref e^r / Z: .5 e² : .3 : .2 / e, over Z = 4.0681. Under
    # log_z = log Z its h is r, so σ(h) = z at every response: the minimum. Under log_z = 0 no
    # policy has h = r (Σ π_ref e^r = Z, not 1) and the best compromise is another one.
    optimum = REFERENCE * REWARDS.exp() / math.exp(LOG_Z)
    assert_close(optimum, tensor([0.908, 0.074, 0.018], dtype=torch.float64), rtol=0, atol=5e-4)
    assert_close(minimiser(labelled_pointwise_dpo, LOG_Z), optimum, rtol=0, atol=1e-7)
    assert_close(minimiser(labelled_pointwise_dpo, 0.0),
                 tensor([0.757, 0.188, 0.056], dtype=torch.float64), rtol=0, atol=6e-4)


def test_pointwise_dpo_at_the_optimum_is_stationary_only_with_the_right_log_z():
    # d/dtheta_k of Σ_y π_ref(y) L(y) = Σ_y π_ref(y) (σ(h_y) - z_y) (1[y = k] - π_k): 0 where
    # σ(h) = z for all y.
    theta = (REFERENCE.log() + REWARDS).requires_grad_()
    right, = torch.autograd.grad(population_loss(theta, labelled_pointwise_dpo, LOG_Z), theta)
    wrong, = torch.autograd.grad(population_loss(theta, labelled_pointwise_dpo, 0.0), theta)
    assert right.abs().max() < 1e-12
    assert wrong.abs().max() > 0.05


def test_continuous_objective_finds_the_optimum_with_the_right_log_z():
    # (z - h)² with z = r is 0 exactly where h = r, which is π* under log_z = log Z.
    def loss(policy_logps, reference_logps, log_z):
        return pointwise_mse_loss(policy_logps, reference_logps, REWARDS, 1.0, log_z)

    theta = (REFERENCE.log() + REWARDS).requires_grad_()
    risk = population_loss(theta, loss, LOG_Z)
    gradient, = torch.autograd.grad(risk, theta)
    assert risk < 1e-24 and gradient.abs().max() < 1e-12
    assert population_loss(theta, loss, 0.0) > 1               # off by log Z = 1.403 everywhere


# ---- response_logps -----------------------------------------------------------------------------

def test_response_logps_by_hand():
    # Tokens of probability 1/2, 1/4, 1/8 belong to responses 2, 0, 2: sums -ln 4 and -ln 16, means
    # -ln 4 and -ln 4; response 1 has no token and stays 0 (a mean over nothing would be NaN).
    per_token_logps = tensor([0.5, 0.25, 0.125]).log()
    response_ids = tensor([2, 0, 2])
    sums = response_logps(per_token_logps, response_ids, 4)
    assert_close(sums, tensor([-math.log(4), 0.0, -math.log(16), 0.0]))
    means = response_logps(per_token_logps, response_ids, 4, mean=True)
    assert_close(means, tensor([-math.log(4), 0.0, -math.log(4), 0.0]))


def test_response_logps_without_any_position():
    # A rank whose micro-batch needs no reference passes [0]: every response keeps 0.
    nothing = torch.empty(0), torch.empty(0, dtype=torch.int64)
    assert response_logps(*nothing, 3).tolist() == [0.0, 0.0, 0.0]
    assert response_logps(*nothing, 3, mean=True).tolist() == [0.0, 0.0, 0.0]
    assert response_logps(*nothing, 0).shape == (0,)


@pytest.mark.parametrize("mean", [False, True])
def test_response_logps_gradient(mean):
    # d(sum)/d(token) = 1 and d(mean)/d(token) = 1 / length, times the response's own upstream
    # gradient: lengths 3 and 1, upstream 6 and -2.
    per_token_logps = torch.full((4,), -1.5, requires_grad=True)
    logps = response_logps(per_token_logps, tensor([1, 0, 0, 0]), 3, mean)
    (logps * tensor([6.0, -2.0, 100.0])).sum().backward()
    expected = [-2.0, 2.0, 2.0, 2.0] if mean else [-2.0, 6.0, 6.0, 6.0]
    assert_close(per_token_logps.grad, tensor(expected))
