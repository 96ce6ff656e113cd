"""Rollouts: sampling on any number of ranks, one pass over the samples, their metrics."""
import os
from dataclasses import replace

import pytest
import torch
from helpers import make_model, make_trees
from helpers_models import make_rollouts, three_models
from torch.testing import assert_close

from generate import Sampling, generate
from rlhf import rollouts
from rlhf.rollouts import Rollout, batch_metrics, sample_responses, true_rewards, world_rewards
from tokenizer import Tokenizer, encode_dialogue
from training.ranks import Ranks


def test_a_rollout_has_the_numbers_of_each_response_alone():
    # One plain forward per response: log-probs, values before each token, reward at the last one;
    # 0.5 is taken off the cut one.
    models = policy, value, reward_model = three_models()
    trees = make_trees()
    trees[1] = replace(trees[1], response_ids=[trees[1].response_ids[0], [20, 21, 22]])
    cut = 0
    for rollout, tree in zip(make_rollouts(*models, trees), trees, strict=True):
        assert (rollout.prompt_ids, rollout.response_ids) == (tree.prompt_ids, tree.response_ids)
        per_token_logps, entropy, values, scores = [], [], [], []
        for ids in tree.response_ids:
            row, before = torch.tensor(tree.prompt_ids + ids), len(tree.prompt_ids) - 1
            with torch.no_grad():
                logits = policy(row)[before:-1] @ policy.lm_head.weight.T
                logps = logits.log_softmax(-1)
                per_token_logps.append(logps.gather(1, row[before + 1:, None])[:, 0])
                entropy.append(-(logps.exp() * logps).sum(-1))
                values.append(value(row)[before:-1] @ value.score.weight[0])
                score = float(reward_model(row)[-1] @ reward_model.score.weight[0])
            scores.append(score - 0.5 * (ids[-1] != 2))
            cut += ids[-1] != 2
        for name, columns in (("per_token_logps", per_token_logps), ("entropy", entropy),
                              ("values", values)):
            assert_close(getattr(rollout, name), torch.cat(columns), rtol=1e-9, atol=1e-9)
        assert rollout.scores == pytest.approx(scores, rel=1e-9)
        assert (rollout.kl >= 0).all()
        assert (rollout.reference_per_token_logps != rollout.per_token_logps).all()
    assert cut == 1


def test_samples_do_not_depend_on_the_number_of_ranks():
    policy, prompt_ids, seeds = make_model(), [[1, 5, 9], [1, 7], [1, 5, 9, 11]], list(range(6))
    alone = sample_responses(policy, prompt_ids, seeds, Sampling(7), Ranks())
    first, second = (sample_responses(policy, prompt_ids, seeds, Sampling(7), Ranks(rank, 2))
                     for rank in (0, 1))
    assert [first[0], second[0], first[1]] == alone
    assert [tree.prompt_ids for tree in alone] == prompt_ids
    assert all(len(tree.response_ids) == 2 for tree in alone)
    assert alone[0].response_ids[0] != alone[0].response_ids[1]
    assert sample_responses(policy, prompt_ids[:1], seeds[:2], Sampling(7), Ranks(1, 2)) == []


@pytest.mark.parametrize("slots, batches", [(10 ** 9, 1), (2 * 11, 3), (1, 6)])
def test_samples_do_not_depend_on_how_many_rows_the_device_has_room_for(monkeypatch, slots, batches):
    # 6 rows of at most 4 + 7 tokens; one is sampled even where there is no room for it.
    policy, prompt_ids, seeds = make_model(), [[1, 5, 9], [1, 7], [1, 5, 9, 11]], list(range(6))
    expected, calls = sample_responses(policy, prompt_ids, seeds, Sampling(7), Ranks()), []
    monkeypatch.setattr(rollouts, "cache_slots", lambda model, most: min(most, slots))
    monkeypatch.setattr(rollouts, "generate", lambda *args, **flags: calls.append(1) or
                        generate(*args, **flags))
    assert sample_responses(policy, prompt_ids, seeds, Sampling(7), Ranks()) == expected
    assert len(calls) == batches


def test_batch_metrics_by_hand():
    def tensor(*values):
        return torch.tensor(values, dtype=torch.float64)

    rollout = Rollout(prompt_ids=[1], response_ids=[[5, 2], [7]], scores=[1.0, 4.0], pairs=[],
                      per_token_logps=tensor(0, 0, 0), reference_per_token_logps=tensor(0, 0, 0),
                      entropy=tensor(1, 2, 6), kl=tensor(0.5, 0.25, 0.25), values=tensor(0, 0, 0))
    other = replace(rollout, response_ids=[[3, 3, 2]], scores=[4.0])
    assert batch_metrics([rollout, other], beta=0.3, eos_ids={2}) == pytest.approx({
        "objective/scores": 3, "objective/kl": 2 / 3, "objective/rlhf_reward": 3 - 0.2,
        "policy/entropy": 3, "response_length": 2, "ended_by_eos": 2 / 3})


def test_only_a_finished_valid_answer_has_its_true_reward(tiny_tokenizer):
    tokenizer = Tokenizer(os.path.dirname(tiny_tokenizer))
    rewards = world_rewards()[(("Human", "Can you tell me how to fix a lamp?"),)]
    (text, reward), worst = max(rewards.items(), key=lambda item: item[1]), min(rewards.values())
    assert len(rewards) == 288 and reward > 3 and worst < -4
    _, ids = encode_dialogue(tokenizer, [("Assistant", text)])
    rollout = Rollout(prompt_ids=[1], response_ids=[ids, ids[:-1], ids[3:], [2]], scores=[0.0] * 4,
                      pairs=[], **dict.fromkeys(("per_token_logps", "reference_per_token_logps",
                                                 "entropy", "kl", "values")))
    assert true_rewards(rollout, rewards, tokenizer) == [reward, worst, worst, worst]
