"""The losses against TRL 1.16's own code, on the same log-probs; skipped without TRL.

CPO's trainer (SimPO) and the reward trainer's compute_loss are called as they are. DPO's and KTO's
formulas stand inside `_compute_loss`, which is called with a stand-in for the trainer and a model
that answers with given log-probs: one pair at a time, since it returns the mean.
TRL has no D2O and no unpaired BCO (any more): bco_pair is the nearest.
"""
import os
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from conftest import need
from torch.testing import assert_close

from ulma import (d2o_loss, dpo_loss, ipo_loss, kto_loss, pointwise_dpo_loss, reward_model_loss,
                  simpo_loss)

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
need("trl")

TOKENS = 7                   # a row is one prompt token and up to TOKENS tokens of response


def random_rows(seed, pairs=6):
    """Per-token log-probs [R, T], completion mask [R, 1 + T], reference log-probs [R], lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, TOKENS + 1, (2 * pairs,), generator=generator)
    mask = torch.arange(TOKENS)[None] < lengths[:, None]                         # [R, T]
    logps = -6 * torch.rand(2 * pairs, TOKENS, generator=generator).double() * mask
    reference_logps = logps.sum(1) + 15 * torch.randn(2 * pairs, generator=generator).double()
    completion_mask = torch.cat([torch.zeros(len(mask), 1, dtype=torch.int64), mask.long()], 1)
    return logps, completion_mask, reference_logps, lengths


def stand_in(**attributes):
    """What the methods ask of `self`; a single process gathers what it has."""
    accelerator = SimpleNamespace(device="cpu", gather=lambda t: t, gather_for_metrics=lambda t: t)
    return SimpleNamespace(
        accelerator=accelerator, model=SimpleNamespace(training=True), aux_loss_enabled=False,
        precompute_ref_logps=True, _metrics={"train": defaultdict(list)}, _total_train_tokens=0,
        _tp_size=1, **attributes)


class TableModel:
    """A model whose log-probs are read from a table: the first token of a row is its number."""

    def __init__(self, logps):
        self.logps = logps

    def __call__(self, input_ids, **_):
        rows = self.logps[input_ids[:, 0]]
        zeros = torch.zeros_like(rows)
        return SimpleNamespace(log_probs=rows, entropy=zeros, mean_logits=zeros,
                               is_top1=zeros.bool())


def row_inputs(rows, mask, prefix=""):
    input_ids = torch.zeros(len(rows), 1 + TOKENS, dtype=torch.int64)
    input_ids[:, 0] = rows
    return {prefix + "input_ids": input_ids, prefix + "attention_mask": torch.ones_like(input_ids),
            prefix + "completion_mask": mask[rows]}


def trl_dpo(loss_type, logps, mask, reference_logps, beta):
    """DPOTrainer's loss of every pair (rows 2p, 2p + 1): [P]."""
    from trl import DPOTrainer
    losses = []
    for pair in torch.arange(len(logps)).view(-1, 2):
        trainer = stand_in(ld_alpha=None, f_divergence_type="reverse_kl", beta=beta,
                           loss_types=[loss_type], loss_weights=[1.0], label_smoothing=0.0,
                           use_weighting=False)
        inputs = row_inputs(pair, mask) | {"ref_chosen_logps": reference_logps[pair[:1]],
                                           "ref_rejected_logps": reference_logps[pair[1:]]}
        losses.append(DPOTrainer._compute_loss(trainer, TableModel(logps), inputs, False))
    return torch.stack(losses)


@pytest.mark.parametrize("name", ["sigmoid", "ipo", "bco_pair"])
def test_losses_of_pairs_are_those_of_trl(name):
    per_token_logps, mask, r, lengths = random_rows(seed=0)
    expected = trl_dpo(name, per_token_logps, mask, r, beta=0.1)
    p = per_token_logps.sum(1)
    if name == "sigmoid":
        assert_close(dpo_loss(p[0::2], p[1::2], r[0::2], r[1::2], 0.1), expected)
        assert_close(d2o_loss(p[0::2, None], p[1::2], r[0::2, None], r[1::2], 0.1, 0.1), expected)
    elif name == "ipo":                       # TRL's convention is ours with length averages
        p, r = p / lengths, r / lengths
        assert_close(ipo_loss(p[0::2], p[1::2], r[0::2], r[1::2], tau=0.1), expected)
    else:
        scores = torch.tensor([1.0, 0.0]).repeat(len(p) // 2)
        assert_close(pointwise_dpo_loss(p, r, scores, 0.1).view(-1, 2).sum(1), expected)


@pytest.mark.parametrize("seed, raised", [(1, 8.0), (2, -8.0)])
def test_kto_is_that_of_trl(seed, raised):
    # The mismatched responses are another 12 rows, once above their reference (z0 > 0) and once
    # below it (clamped to 0). One call for all rows: the means must agree, weights included.
    from trl import KTOTrainer
    per_token_logps, mask, r, _ = random_rows(seed, pairs=12)
    scores = torch.tensor([1, 1, 0] * 4).bool()
    rows, mismatched = torch.arange(12), torch.arange(12, 24)
    mismatched_reference = per_token_logps[12:].sum(1) - raised
    trainer = stand_in(calculate_KL=True, loss_type="kto", beta=0.1, desirable_weight=1.3,
                       undesirable_weight=0.8)
    trainer._compute_kl_logps = lambda model, batch: KTOTrainer._compute_kl_logps(
        trainer, model, batch)
    batch = row_inputs(rows, mask) | row_inputs(mismatched, mask, "KL_") | {
        "label": scores, "ref_logps": r[:12], "ref_KL_logps": mismatched_reference}
    expected = KTOTrainer._compute_loss(trainer, TableModel(per_token_logps), batch, False)
    point = max(0.0, (per_token_logps[12:].sum(1) - mismatched_reference).mean().item())
    assert point == pytest.approx(max(raised, 0.0))
    losses = kto_loss(per_token_logps[:12].sum(1), r[:12], scores.double(), 0.1, -0.1 * point)
    assert_close((torch.where(scores, 1.3, 0.8) * losses).mean(), expected)


def test_simpo_is_that_of_trl():
    from trl.experimental.cpo import CPOTrainer
    per_token_logps, _, _, lengths = random_rows(seed=3)
    m = per_token_logps.sum(1) / lengths
    trainer = stand_in(alpha=0.0, beta=0.3, label_smoothing=0.0, loss_type="simpo",
                       simpo_gamma=0.5)
    losses, *_ = CPOTrainer.cpo_loss(trainer, m[0::2], m[1::2])
    assert_close(simpo_loss(m[0::2], m[1::2], 0.3, 0.5), losses)


def test_reward_model_loss_is_that_of_trl():
    from trl import RewardTrainer
    rewards = 3 * torch.randn(12, generator=torch.Generator().manual_seed(4))
    trainer = stand_in(args=SimpleNamespace(center_rewards_coefficient=None))
    for pair in rewards.view(2, 6).T:
        outputs = SimpleNamespace(logits=pair[:, None])
        inputs = {"attention_mask": torch.ones(2, 3, dtype=torch.int64)}
        expected = RewardTrainer.compute_loss(trainer, lambda outputs=outputs, **_: outputs, inputs)
        assert_close(reward_model_loss(*pair), expected)
