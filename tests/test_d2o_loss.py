"""D2O and the losses of reward models (ulma.py): by hand, finite differences, bounds."""
import inspect
import math

import torch
from torch import tensor
from torch.testing import assert_close

from ulma import (d2o_loss, dpo_loss, mse_reward_model_loss, negative_dpo_loss, pointwise_dpo_loss,
                  pointwise_reward_model_loss, response_logps, reward_model_loss)

LN3 = math.log(3)


def random_prompts(seed, prompts=6, anchors=4, dtype=torch.float64):
    """Log-probs of anchors [P, K] and negatives [P], of the policy and then of the references."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(prompts, anchors), (prompts,)]
    references = [-60 + 10 * torch.randn(shape, generator=generator) for shape in shapes]
    policies = [r + 8 * torch.randn(r.shape, generator=generator) for r in references]
    return [t.to(dtype) for t in (*policies, *references)]


# ---- D2O ----------------------------------------------------------------------------------------

def test_d2o_by_hand():
    # Anchors' log-ratios 8 ln 3 and 2 ln 3: beta / K times their sum is 0.1 · 5 ln 3 = ln 3 / 2;
    # the negative's is -5/2 ln 3, times alpha = 0.2 is -ln 3 / 2. σ(ln 3) = 3/4, loss ln(4/3).
    # Dividing by K twice gives σ(3/4 ln 3), loss 0.363 for 0.288.
    losses = d2o_loss(tensor([[8 * LN3 - 7, 2 * LN3 - 5]]), tensor([-2.5 * LN3 - 9]),
                      tensor([[-7.0, -5.0]]), tensor([-9.0]), beta=0.1, alpha=0.2)
    assert_close(losses, tensor([math.log(4 / 3)]))


def test_d2o_with_one_anchor_and_alpha_beta_is_dpo_to_the_bit():
    # K = 1, one reference, the anchor in the place of the chosen response; in float32 and with a
    # beta that is no power of two, where beta a - beta b and beta (a - b) differ in the last bit.
    anchor, negative, anchor_reference, reference = random_prompts(0, 2000, 1, torch.float32)
    losses = d2o_loss(anchor, negative, anchor_reference, reference, beta=0.1, alpha=0.1)
    expected = dpo_loss(anchor[:, 0], negative, anchor_reference[:, 0], reference, beta=0.1)
    assert torch.equal(losses, expected)


def test_d2o_equals_its_formula_written_with_exponentials():
    anchors, negative, anchor_reference, reference = random_prompts(1)
    losses = d2o_loss(anchors, negative, anchor_reference, reference, beta=0.1, alpha=0.25)
    for row in range(len(losses)):
        h = sum(0.1 / 4 * float(anchors[row, k] - anchor_reference[row, k]) for k in range(4))
        h -= 0.25 * float(negative[row] - reference[row])
        assert_close(losses[row].item(), -math.log(1 / (1 + math.exp(-h))), rtol=1e-9, atol=0)


def test_d2o_is_at_most_the_mean_of_dpo_over_its_anchors():
    # log σ is concave, so -log σ(mean) <= mean(-log σ): the paper's upper bound of instance-level
    # DPO, as a probability. A margin that is not the mean over anchors breaks it somewhere.
    anchors, negative, anchor_reference, reference = random_prompts(2, 1000, 5)
    losses = d2o_loss(anchors, negative, anchor_reference, reference, beta=0.1, alpha=0.1)
    single = torch.stack([dpo_loss(anchors[:, k], negative, anchor_reference[:, k], reference, 0.1)
                          for k in range(5)]).mean(0)
    assert (losses <= single + 1e-12).all() and (losses < single - 1e-3).any()
    same = [t[:, :1].expand(-1, 5) if t.ndim == 2 else t for t in random_prompts(2, 1000, 5)]
    assert_close(d2o_loss(*same, 0.1, 0.1), dpo_loss(same[0][:, 0], same[1], same[2][:, 0], same[3],
                                                     0.1))         # equal anchors: equality


def test_d2o_gradient_is_equation_4_and_central_differences():
    # dL/d(anchor k) = -σ(-h) beta / K, dL/d(negative) = σ(-h) alpha, h from the formula.
    anchors, negative, *references = random_prompts(3)
    anchors.requires_grad_(), negative.requires_grad_()
    d2o_loss(anchors, negative, *references, beta=0.1, alpha=0.25).sum().backward()
    with torch.no_grad():
        h = 0.1 * (anchors - references[0]).mean(1) - 0.25 * (negative - references[1])
        weight = 1 / (1 + h.exp())
        assert_close(anchors.grad, (-weight * 0.1 / 4)[:, None].expand(-1, 4), rtol=1e-12, atol=0)
        assert_close(negative.grad, weight * 0.25, rtol=1e-12, atol=0)
        for tensor_, index in ((anchors, (2, 1)), (anchors, (5, 3)), (negative, (4,))):
            values = []
            for sign in (1, -1):
                tensor_[index] += sign * 1e-5
                values.append(d2o_loss(anchors, negative, *references, 0.1, 0.25).sum())
                tensor_[index] -= sign * 1e-5
            assert_close(tensor_.grad[index], (values[0] - values[1]) / 2e-5, rtol=1e-7, atol=1e-10)


def test_d2o_sums_over_the_tokens_of_an_anchor():
    # A public re-implementation passes length averages: the weight of a token of anchor k is
    # beta / K · σ(-h) however long the anchor is. At the reference σ = 1/2: 0.2 / 2 / 2 = 0.05.
    per_token_logps = torch.full((6,), -2.0, requires_grad=True)
    logps = response_logps(per_token_logps, tensor([0, 1, 1, 1, 2, 2]), 3)       # lengths 1, 3, 2
    reference = logps.detach()
    d2o_loss(logps[None, :2], logps[2:], reference[None, :2], reference[2:], 0.2, 0.2).backward()
    assert_close(per_token_logps.grad, tensor([-0.05] * 4 + [0.1] * 2))


def test_d2o_has_no_default_for_its_references_and_each_counts_in_its_place():
    # References that default to the policy itself give log 2 for ever (another bug of that code).
    # π_r- stands under the anchors, π_r+ under the negative: swapped, h has another sign.
    parameters = inspect.signature(d2o_loss).parameters.values()
    assert all(parameter.default is inspect.Parameter.empty for parameter in parameters)
    zero, one = torch.zeros(1, 2), torch.ones(1)
    assert_close(d2o_loss(zero, one, zero, one, 0.5, 0.5), tensor([math.log(2)]))
    harmful = d2o_loss(zero, one, zero - 2 * LN3, one, 0.5, 0.5)     # h = 0.5 · 2 ln 3 = ln 3
    helpful = d2o_loss(zero, one, zero, one - 2 * LN3, 0.5, 0.5)     # h = -ln 3
    assert_close(torch.cat([harmful, helpful]), tensor([math.log(4 / 3), math.log(4)]))


def test_d2o_without_anchors_weight_is_negative_dpo():
    # beta = 0 leaves -log σ(-alpha ρ): the "without sampling" corner, negative DPO with its alpha.
    anchors, negative, anchor_reference, reference = random_prompts(4)
    assert_close(d2o_loss(anchors, negative, anchor_reference, reference, beta=0.0, alpha=0.3),
                 negative_dpo_loss(negative, reference, beta=0.3))


def test_d2o_is_finite_at_extreme_logps_and_empty_without_prompts():
    values = tensor([-1e4, 1e4, 0.0])
    grid = torch.cartesian_prod(values, values, values, values)                  # [81, 4]
    anchors = grid[:, :2].clone().requires_grad_()
    negative = grid[:, 2].clone().requires_grad_()
    losses = d2o_loss(anchors, negative, grid[:, 3:].expand(-1, 2), grid[:, 1], 0.1, 0.3)
    losses.sum().backward()
    assert losses.dtype == torch.float32 and losses.isfinite().all()
    assert anchors.grad.isfinite().all() and negative.grad.isfinite().all()
    empty = torch.empty(0)
    assert d2o_loss(empty.view(0, 3), empty, empty.view(0, 3), empty, 0.1, 0.1).shape == (0,)


# ---- reward models ------------------------------------------------------------------------------

def test_reward_model_losses_by_hand():
    # r = ln 3 apart: σ = 3/4, ln(4/3), and ln 4 the wrong way. σ(ln 3) = 3/4: good ln(4/3), bad
    # ln 4, z = 1/2 their mean. (1/4 - 3/4)² = 1/4.
    losses = reward_model_loss(tensor([LN3 + 7, 7.0]), tensor([7.0, LN3 + 7]))
    assert_close(losses, tensor([math.log(4 / 3), math.log(4)]))
    losses = pointwise_reward_model_loss(torch.full((3,), LN3), tensor([1.0, 0.0, 0.5]))
    assert_close(losses, tensor([math.log(4 / 3), math.log(4), math.log(16 / 3) / 2]))
    assert mse_reward_model_loss(tensor([0.75, 2.0]), tensor([0.25, 0.0])).tolist() == [0.25, 4.0]


def test_dpo_is_a_reward_model_whose_reward_is_the_log_ratio():
    # Eq. 5 is Eq. 2, and Eq. 8 is Eq. 7, with r = beta log π/π_ref: to the last bits.
    anchor, negative, anchor_reference, reference = random_prompts(5, anchors=1)
    chosen, rejected = 0.1 * (anchor - anchor_reference)[:, 0], 0.1 * (negative - reference)
    assert_close(reward_model_loss(chosen, rejected),
                 dpo_loss(anchor[:, 0], negative, anchor_reference[:, 0], reference, 0.1))
    scores = tensor([1.0, 0.0, 0.5, 1.0, 0.0, 0.25], dtype=torch.float64)
    assert torch.equal(pointwise_reward_model_loss(rejected, scores),
                       pointwise_dpo_loss(negative, reference, scores, 0.1))


def test_reward_model_gradients_and_extremes():
    # d/dr: σ(r) - z, 2 (r - z); d/d(chosen) = -σ(-(margin)), d/d(rejected) its negative.
    rewards = tensor([LN3, LN3, 1e4, -1e4], requires_grad=True)
    scores = tensor([1.0, 0.0, 0.0, 1.0])
    pointwise_reward_model_loss(rewards, scores).sum().backward()
    assert_close(rewards.grad, tensor([-0.25, 0.75, 1.0, -1.0]))
    rewards.grad = None
    mse_reward_model_loss(rewards, scores).sum().backward()
    assert_close(rewards.grad, 2 * (rewards.detach() - scores))
    chosen, rejected = (tensor(v, requires_grad=True) for v in ([LN3, -1e4], [0.0, 1e4]))
    losses = reward_model_loss(chosen, rejected)
    losses.sum().backward()
    assert losses.isfinite().all()
    assert_close(torch.stack([chosen.grad, rejected.grad]), tensor([[-0.25, -1.0], [0.25, 1.0]]))
