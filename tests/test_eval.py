"""eval.py: the world's exact metrics, agreement with a known reward, statistics, several runs."""
import itertools
import json
import math
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from conftest import write_jsonl
from helpers import reward_model_in

import eval as evaluate
import files.cli
from eval import (agreement, evaluate_world, evaluate_world_rewards, held_out_trees, kl, optimum,
                  short_names, with_rest, world_logps, world_scores, world_trees)
from intervals import bootstrap, wins
from model import load_llama
from step import tree_rewards
from tokenizer import Tokenizer, encode_dialogue
from training.checkpoint import FinishedRun, held_out_records
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


# ---- several runs -------------------------------------------------------------------------------

def test_runs_of_one_name_are_told_apart_by_the_shortest_end_of_their_paths():
    assert short_names(["runs/dpo", "runs/ulma/"]) == ["dpo", "ulma"]
    assert short_names(["seeds/1/dpo", "seeds/2/dpo", "ulma"]) == ["1/dpo", "2/dpo", "ulma"]
    assert short_names(["a/1/dpo", "b/1/dpo", "b/2/dpo"]) == ["a/1/dpo", "b/1/dpo", "2/dpo"]
    assert short_names(["runs/base", "runs/optimum pi*"]) == ["runs/base", "runs/optimum pi*"]


def test_two_runs_of_one_name_are_two_rows_of_the_worlds_table(tmp_path, monkeypatch, capsys):
    # seeds/1/dpo and seeds/2/dpo were one row: the second's, under the name of both.
    prompts = held_out_prompts()
    runs = {path: torch.log_softmax(torch.full((40, 288), -6.0, dtype=torch.float64), -1) - shift
            for path, shift in (("seeds/1/dpo", 0.01), ("seeds/2/dpo", 1.0), (None, 0.1))}
    flags = {"method": "dpo", "beta": 0.5, "dataset": None, "model_name_or_path": "base"}
    monkeypatch.setattr(evaluate, "read_run", lambda path: flags)
    monkeypatch.setattr(evaluate, "load_run", lambda path: FinishedRun(
        path, partial(nullcontext, None), flags | {"beta": 0.5 if "1" in path else 0.1}))
    monkeypatch.setattr(evaluate, "on_world", lambda flags, dataset: True)
    monkeypatch.setattr(evaluate, "run_tokenizer", lambda path, flags: None)
    monkeypatch.setattr(evaluate, "world_logps", lambda model, *_: (
        runs[model], torch.full((len(prompts), 288), 9)))
    evaluate.main(["seeds/1/dpo", "seeds/2/dpo", "seeds/2/../1/dpo",
                   "--json", str(tmp_path / "table.json")])
    table = json.loads((tmp_path / "table.json").read_text())
    assert list(table) == ["base", "1/dpo", "2/dpo", "optimum pi*"]
    assert table["1/dpo"]["off-world"] == pytest.approx(1 - math.exp(-0.01))
    assert table["2/dpo"]["off-world"] == pytest.approx(1 - math.exp(-1.0))
    assert "beta 0.1 for all (the runs differ in theirs)" in capsys.readouterr().out
    monkeypatch.setattr(evaluate, "load_run", lambda path: FinishedRun(
        path, partial(nullcontext, None), flags | {"beta": 0.0}))
    with pytest.raises(ValueError, match="--beta 0, for which there is no pi"):
        evaluate.main(["seeds/1/dpo"])


def test_runs_are_measured_on_the_same_rows_with_the_same_cuts(tmp_path, tiny_model, monkeypatch,
                                                               capsys):
    # A PPO run's max_length is that of its samples: held-out answers were cut at 40 + 8 tokens for
    # it and at 120 for its base. Its reward model's counts. Both get what both held out.
    path = write_jsonl(tmp_path / "pairs.jsonl", [
        {"prompt": f"What is {n}?", "chosen": "It is " + "a long number, " * 9, "rejected": "No."}
        for n in range(60)])
    flags = {"method": "dpo", "dataset": path, "held_out": 0.5, "max_length": 120,
             "max_prompt_length": 60, "model_name_or_path": tiny_model, "reward_model": None}
    ppo = flags | {"method": "rlhf", "held_out": 0.3, "max_length": 48, "max_prompt_length": 40,
                   "reward_model": str(tmp_path)}
    monkeypatch.setattr(evaluate, "read_run", lambda path: flags)
    both = held_out_trees({"dpo": flags, "ppo": ppo}, None)
    assert both["dpo"] == both["ppo"] and 5 < len(both["dpo"]) < 30
    assert held_out_trees({"ppo": ppo}, None) == {"ppo": both["ppo"]}
    assert max(len(t.prompt_ids) + len(t.response_ids[0]) for t in both["dpo"]) == 120
    assert "cut at 120 tokens, prompts at 60" in capsys.readouterr().out
    longer = flags | {"max_length": 4096, "max_prompt_length": 2048}     # the model has 2048
    found = held_out_trees({"dpo": longer, "ppo": ppo}, path)
    assert [len(trees) for trees in found.values()] == [60, 60]
    assert "cut at 2048 tokens, prompts at 2047" in capsys.readouterr().out
    with pytest.raises(ValueError, match="sft held out nothing of"):
        held_out_trees({"dpo": flags, "sft": flags | {"held_out": 0.0}}, None)


def test_reading_what_was_held_out_is_not_silent_and_one_rank_says_so(tmp_path, monkeypatch,
                                                                      capsys):
    # a million pairs take a minute and a half to read
    path = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "a?", "completion": "b"}] * 3)
    monkeypatch.setattr(files.cli, "SHOWN_EVERY", -1.0)
    for rank, lines in (("0", 3), ("1", 0)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert len(held_out_records("run", {}, path)[1]) == 3
        assert capsys.readouterr().out.count("records read: ") == lines


def test_labelled_rows_of_a_prompt_have_a_reward_accuracy(tmp_path, tiny_model, monkeypatch):
    # Points of one prompt, scattered over the file: one tree, whose pairs are those that differ.
    path = write_jsonl(tmp_path / "points.jsonl", [
        {"prompt": f"What is {n}?", "completion": text, "label": z} for text, z in
        (("Two.", 1), ("No.", 0), ("Three.", 1)) for n in range(3)])
    flags = {"method": "ulma", "dataset": path, "held_out": 0.5, "max_length": 120,
             "max_prompt_length": 60, "model_name_or_path": tiny_model}
    trees = held_out_trees({"ulma": flags}, path)["ulma"]
    assert [tree.pairs for tree in trees] == [[(0, 1), (2, 1)]] * 3
