"""eval.py: the world's exact metrics, agreement with a known reward, statistics."""
import itertools
import math

import pytest
import torch
from helpers import reward_model_in

from eval import (agreement, evaluate_world, evaluate_world_rewards, kl, optimum, with_rest,
                  world_logps, world_scores, world_trees)
from intervals import bootstrap, wins
from model import load_llama
from step import tree_rewards
from tokenizer import Tokenizer, encode_dialogue
from world import answers, held_out_prompts, question

# three answers: text, r*, harmful, probability under the base
ANSWERS = [("a", 2.0, False, 0.5), ("b", 0.0, True, 0.3), ("c", -1.0, True, 0.2)]


def test_optimum_of_three_outcomes_by_hand():
    # pi_ref (.5, .3, .2), r (2, 0, -1), beta 1: pi* = pi_ref e^r / Z = (.908, .074, .018)
    reference = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    best, bound = optimum(reference, torch.tensor([2.0, 0.0, -1.0], dtype=torch.float64), 1.0)
    torch.testing.assert_close(best.exp(), torch.tensor([0.908, 0.074, 0.018]).double(),
                               atol=5e-4, rtol=0)
    assert bound == pytest.approx(math.log(0.5 * math.e**2 + 0.3 + 0.2 / math.e))


def test_world_scores_by_hand():
    # p = (.25, .25, .25), a quarter off-world, which earns the worst reward -1:
    # E[r] = .25 (2 + 0 - 1) - .25 = 0; harmful .5; KL against p itself is 0.
    logps = torch.full((3,), 0.25, dtype=torch.float64).log()
    scores = world_scores(logps, logps, torch.tensor([2, 3, 4]), ANSWERS, beta=1.0)
    assert scores["E[r]"] == pytest.approx(0.0) and scores["harmful"] == pytest.approx(0.5)
    assert scores["off-world"] == pytest.approx(0.25)
    assert scores["KL(pi||ref)"] == pytest.approx(0.0)
    assert scores["perplexity"] == pytest.approx(2.0)    # the best has 2 tokens: (1/4)^(-1/2)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_no_policy_passes_the_optimum(beta):
    # 2,000 random policies, with more or less mass off the world: E[r] - beta KL <= beta log Z.
    generator = torch.Generator().manual_seed(0)
    reference = torch.tensor([0.5, 0.3, 0.15], dtype=torch.float64).log()
    best, bound = optimum(with_rest(reference), torch.tensor([2.0, 0.0, -1.0, -1.0]).double(), beta)
    lengths = torch.tensor([2, 2, 2])
    assert world_scores(best[:-1], reference, lengths, ANSWERS, beta)["objective"] == \
        pytest.approx(bound, abs=1e-6)
    for _ in range(2000):
        draw = (3 * torch.randn(4, generator=generator, dtype=torch.float64)).log_softmax(0)
        scores = world_scores(draw[:-1], reference, lengths, ANSWERS, beta)
        assert scores["objective"] <= bound + 1e-9


def test_kl_of_coarse_outcomes_is_a_lower_bound():
    p = torch.tensor([0.2, 0.3, 0.4, 0.1]).double().log()
    q = torch.tensor([0.3, 0.3, 0.1, 0.3]).double().log()
    assert kl(with_rest(p[:2]), with_rest(q[:2])) <= kl(p, q)


def test_world_logps_equal_one_answer_at_a_time(tiny_model):
    # All answers share their beginnings in one stream; each alone must have the same log-prob.
    model, tokenizer = load_llama(tiny_model), Tokenizer(tiny_model)
    prompts = held_out_prompts()[:2]
    logps, lengths = world_logps(model, tokenizer, prompts)
    assert logps.shape == lengths.shape == (2, 288)
    for x, y in itertools.product((0, 1), (0, 100, 287)):
        prompt_ids, ids = encode_dialogue(tokenizer, [
            ("Human", question(*prompts[x])), ("Assistant", answers(*prompts[x])[y][0])])
        with torch.no_grad():
            hidden = model(torch.tensor(prompt_ids + ids[:-1]))[len(prompt_ids) - 1:]
            alone = (hidden @ model.lm_head.weight.T).log_softmax(-1)[range(len(ids)), ids].sum()
        assert float(logps[x, y]) == pytest.approx(float(alone), rel=1e-5)
        assert int(lengths[x, y]) == len(ids)
    table = evaluate_world({"base": logps}, logps, lengths, prompts, 0.1)
    assert table["base"]["KL(pi||ref)"] == 0 and set(table) == {"base", "optimum pi*"}


# ---- agreement with a known reward --------------------------------------------------------------

def test_agreement_by_hand():
    # Truth 3 2 2 1, values 9 5 7 7. Five pairs differ in truth: 3>2, 3>2, 3>1 right; 2(5) > 1(7)
    # wrong; 2(7) > 1(7) half: 3.5 / 5. Ranks of truth (from 0.5) 3.5 2 2 .5, of values 3.5 .5 2 2:
    # deviations 1.5 0 0 -1.5 and 1.5 -1.5 0 0, so 2.25 / 4.5.
    truth, values = torch.tensor([3.0, 2.0, 2.0, 1.0]), torch.tensor([9.0, 5.0, 7.0, 7.0])
    assert agreement(values, truth) == pytest.approx((0.7, 0.5))
    assert agreement(truth * 2 + 1, truth) == pytest.approx((1.0, 1.0))
    assert agreement(-truth, truth) == pytest.approx((0.0, -1.0))


def test_sums_of_rewards_that_differ_in_the_last_bit_are_ties():
    # 0.1 + 0.2 > 0.3 in floating point; the world's rewards are such sums.
    truth = torch.tensor([0.1 + 0.2, 0.3, 1.0], dtype=torch.float64)
    accuracy, _ = agreement(torch.tensor([0.0, 5.0, 9.0]), truth)
    assert accuracy == 1.0                                       # the first two are no pair


def test_a_constant_reward_model_is_right_half_of_the_time(tiny_model, tmp_path, capsys):
    model, tokenizer = reward_model_in(tmp_path / "out", tiny_model), Tokenizer(tiny_model)
    prompts = held_out_prompts()[:2]
    rewards = tree_rewards(model, world_trees(tokenizer, prompts))
    assert rewards.shape == (2 * 288,) and rewards.unique().numel() > 500
    torch.nn.init.zeros_(model.score.weight)
    evaluate_world_rewards(model, tokenizer, prompts)
    assert "accuracy of the reward model  0.500 [0.500, 0.500]" in capsys.readouterr().out


# ---- statistics ---------------------------------------------------------------------------------

def test_wins_counts_ties_as_halves_and_bootstrap_covers_the_mean():
    assert float(wins(torch.tensor([1.0, -1.0, 0.0, 2.0]))) == 0.625
    rows = torch.arange(100.0)[:, None].double()
    value, low, high = bootstrap(lambda v: v.mean(), rows)
    # the standard error of the mean of 0..99 is 2.9: the interval is about ± 5.7
    assert value == 49.5 and (low, high) == pytest.approx((43.8, 55.2), abs=1)
