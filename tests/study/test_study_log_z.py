"""study/log_z.py: beta log Z(x) reaches the responses of its prompt, and the loss."""
import math

import pytest
import torch
from torch.testing import assert_close

import study.log_z as log_z
from packing import Tree, build_stream
from step import Objective
from study.log_z import EXTRA_METHODS, stream_log_z


@pytest.fixture
def stream(monkeypatch):
    """Three responses to two prompts whose beta log Z(x) is 0.25 and -3."""
    monkeypatch.setattr(log_z, "exact_log_z", lambda: {(1, 5): 0.25, (1, 6, 9): -3.0})
    return build_stream([Tree([1, 5], [[7, 2], [8, 2]], [1.0, 0.0], []),
                         Tree([1, 6, 9], [[4, 3, 2]], [0.0], [])])


def losses(name, policy_logps, reference_logps, stream):
    method = EXTRA_METHODS[name]
    return method.loss(policy_logps, reference_logps, stream, Objective(method, beta=0.5))


def test_a_stream_finds_the_exact_log_z_of_every_responses_prompt(stream):
    assert stream_log_z(stream).tolist() == [0.25, 0.25, -3.0]
    # at log-ratio 0 the argument of sigma is log Z alone
    zero = torch.zeros(3)
    assert_close(losses("pointwise_dpo_exact_z", zero, zero, stream),
                 torch.tensor([math.log(1 + math.exp(-0.25)), math.log(1 + math.exp(0.25)),
                               math.log(1 + math.exp(-3.0))]))


def test_the_constant_is_the_mean_over_prompts(stream):
    zero, mean = torch.zeros(3), (0.25 - 3.0) / 2
    assert_close(losses("pointwise_dpo_constant_z", zero, zero, stream),
                 torch.tensor([math.log(1 + math.exp(-mean)), math.log(1 + math.exp(mean)),
                               math.log(1 + math.exp(mean))]))


def test_the_batchs_estimate_is_minus_its_mean_reward_and_passes_no_gradient(stream):
    # Rewards 0.5 (2 0 4) = 1 0 2, mean 1: the arguments of sigma are 0 -1 1.
    policy_logps = torch.tensor([2.0, 0.0, 4.0], requires_grad=True)
    found = losses("pointwise_dpo_batch_z", policy_logps, torch.zeros(3), stream)
    assert_close(found, torch.tensor([math.log(2), math.log(1 + math.exp(-1)),
                                      math.log(1 + math.exp(1))]))
    gradient, = torch.autograd.grad(found[0], policy_logps)
    assert_close(gradient, torch.tensor([-0.25, 0, 0]))      # -beta sigma(-0)
