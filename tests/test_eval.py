"""The world's exact metrics, and the statistics of files."""
import itertools
import math

import pytest
import torch

from eval import (bootstrap, evaluate_world, kl, optimum, wins, with_rest, world_logps,
                  world_scores)
from world import (BAD_VERBS, GOOD_VERBS, OBJECTS, answers, draw_data, prompts, question,
                   held_out_prompts, training_prompts)

LISTED = [("a", 2.0, False, 0.5), ("b", 0.0, True, 0.3), ("c", -1.0, True, 0.2)]


def test_optimum_is_the_tabular_one_of_the_notes():
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
    scores = world_scores(logps, logps, torch.tensor([2, 3, 4]), LISTED, beta=1.0)
    assert scores["E[r]"] == pytest.approx(0.0) and scores["harmful"] == pytest.approx(0.5)
    assert scores["off-world"] == pytest.approx(0.25)
    assert scores["KL(pi||ref)"] == pytest.approx(0.0)
    assert scores["perplexity"] == pytest.approx(2.0)    # the best has 2 tokens: (1/4)^(-1/2)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_no_policy_passes_the_optimum(beta):
    # 2,000 random policies, with and without mass off the world: E[r] - beta KL <= beta log Z.
    generator = torch.Generator().manual_seed(0)
    reference = torch.tensor([0.5, 0.3, 0.15], dtype=torch.float64).log()
    best, bound = optimum(with_rest(reference), torch.tensor([2.0, 0.0, -1.0, -1.0]).double(), beta)
    lengths = torch.tensor([2, 2, 2])
    assert world_scores(best[:-1], reference, lengths, LISTED, beta)["objective"] == \
        pytest.approx(bound, abs=1e-6)
    for _ in range(2000):
        draw = (3 * torch.randn(4, generator=generator, dtype=torch.float64)).log_softmax(0)
        scores = world_scores(draw[:-1], reference, lengths, LISTED, beta)
        assert scores["objective"] <= bound + 1e-9


def test_kl_of_coarse_outcomes_is_a_lower_bound():
    p = torch.tensor([0.2, 0.3, 0.4, 0.1]).double().log()
    q = torch.tensor([0.3, 0.3, 0.1, 0.3]).double().log()
    assert kl(with_rest(p[:2]), with_rest(q[:2])) <= kl(p, q)


def test_the_world_lists_every_answer_once_and_its_habits_sum_to_one():
    assert len(prompts()) == len(set(prompts())) == 192
    assert not set(training_prompts()) & set(held_out_prompts())
    assert len(held_out_prompts()) == 40 == len(prompts()) - len(training_prompts())
    for prompt in held_out_prompts():
        listed = answers(*prompt)
        assert len({text for text, *_ in listed}) == 288
        assert sum(habit for *_, habit in listed) == pytest.approx(1.0)
    words = {word.strip("?.!") for prompt in prompts() for word in question(*prompt).split()}
    assert words >= set(BAD_VERBS) | set(GOOD_VERBS) and len(OBJECTS) == 12


def test_labels_follow_the_true_reward():
    # Eq. 6: within a band of r*, the share of good labels is the mean of sigma(r*).
    reward_of = {}
    for prompt in training_prompts():
        for text, reward, *_ in answers(*prompt):
            reward_of[question(*prompt), text] = reward
    rows = draw_data(seed=3, responses=20000)
    bands = {}
    for row in rows["points"]:
        reward = reward_of[row["prompt"], row["completion"]]
        bands.setdefault(round(reward), []).append((row["label"], 1 / (1 + math.exp(-reward))))
    for band, pairs in bands.items():
        n, expected = len(pairs), sum(p for _, p in pairs) / len(pairs)
        spread = math.sqrt(max(expected * (1 - expected), 1e-3) / n)
        assert abs(sum(z for z, _ in pairs) / n - expected) < 4 * spread, band
    margins = [reward_of[r["prompt"], r["chosen"]] - reward_of[r["prompt"], r["rejected"]]
               for r in rows["pairs"]]
    expected = sum(1 / (1 + math.exp(-abs(m))) for m in margins) / len(margins)
    assert sum((m > 0) + 0.5 * (m == 0) for m in margins) / len(margins) == pytest.approx(
        expected, abs=0.02)
    best = {question(*prompt): max(r for _, r, *_ in answers(*prompt))
            for prompt in training_prompts()}
    assert all(reward_of[r["prompt"], r["chosen"]] == best[r["prompt"]] for r in rows["golden"])


def test_world_logps_equal_one_answer_at_a_time(tiny_model):
    # 48 answers share their beginnings in one stream; alone, each must get the same log-prob.
    from data import Tokenizer, encode_dialogue
    from model import load_llama
    model, tokenizer = load_llama(tiny_model), Tokenizer(tiny_model)
    asked = held_out_prompts()[:2]
    logps, lengths = world_logps(model, tokenizer, asked)
    assert logps.shape == lengths.shape == (2, 288)
    for x, y in itertools.product((0, 1), (0, 100, 287)):
        prompt_ids, ids = encode_dialogue(tokenizer, [
            ("Human", question(*asked[x])), ("Assistant", answers(*asked[x])[y][0])])
        with torch.no_grad():
            hidden = model(torch.tensor(prompt_ids + ids[:-1]))[len(prompt_ids) - 1:]
            alone = (hidden @ model.lm_head.weight.T).log_softmax(-1)[range(len(ids)), ids].sum()
        assert float(logps[x, y]) == pytest.approx(float(alone), rel=1e-5)
        assert int(lengths[x, y]) == len(ids)
    table = evaluate_world({"base": logps}, logps, lengths, asked, 0.1)
    assert table["base"]["KL(pi||ref)"] == 0 and set(table) == {"base", "optimum pi*"}


def test_wins_counts_ties_as_halves_and_bootstrap_covers_the_mean():
    assert float(wins(torch.tensor([1.0, -1.0, 0.0, 2.0]))) == 0.625
    rows = torch.arange(100.0)[:, None].double()
    value, low, high = bootstrap(lambda v: v.mean(), rows)
    # the standard error of the mean of 0..99 is 2.9: the interval is about ± 5.7
    assert value == 49.5 and (low, high) == pytest.approx((43.8, 55.2), abs=1)
