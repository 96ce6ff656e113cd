"""log_z of BCO and KTO: the exact value of the global batch, however it is packed and dealt out."""
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import adapter_hash, finish, logged, make_model, make_trees, run_ranks
from plain import plain_logps

from data import Tokenizer, read_dataset
from lora import lora_disabled
from model import load_llama
from packing import Tree, mismatched_trees
from packing import make_trees as build_trees
from step import METHODS, Compute, Objective
from training import held_out
from training.log_z import LogZ
from training.ranks import Ranks

ARGS = SimpleNamespace(max_length=64, fsdp=False)


def make_log_z(name, *, compute=None, ranks=None, sums=None, lower=0.0):
    """LogZ of a small model; `lower` weakens its adapters, so that z0 may be negative."""
    model = make_model()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if key.endswith("lora_B"):
                p -= lower * p
    setup = SimpleNamespace(model=model, reference=partial(lora_disabled, model))
    objective = Objective(METHODS[name], beta=0.3, log_z=0.2)
    return LogZ(ARGS, setup, objective, compute or Compute(), ranks or Ranks(), sums)


def plain_mean_logratio(log_z, trees):
    """By tests/plain.py: every prompt with each response of the tree before it."""
    examples = [(tree.prompt_ids, ids) for number, tree in enumerate(trees)
                for ids in trees[number - 1].response_ids]
    model = log_z.setup.model
    weights = model.state_dict()
    base = {key: value for key, value in weights.items() if "lora" not in key}
    policy = plain_logps(weights, model.config, examples, scaling=2.0)
    return float((policy - plain_logps(base, model.config, examples)).mean())


# ---- KTO ----------------------------------------------------------------------------------------

def test_mismatched_trees_have_the_responses_of_the_tree_before():
    # The second and third have one prompt: the third takes those of the first. Cut at 4 tokens.
    trees = [Tree([1, 5], [[6, 2], [7, 8, 9, 2]], [1.0, 0.0], [(0, 1)]),
             Tree([1, 9], [[3, 2]], [1.0], []), Tree([1, 9], [[4, 2]], [1.0], [])]
    assert [(tree.prompt_ids, tree.response_ids) for tree in mismatched_trees(trees, 5)] == [
        ([1, 5], [[4, 2]]), ([1, 9], [[6, 2], [7, 8, 9]]), ([1, 9], [[6, 2], [7, 8, 9]])]
    assert mismatched_trees(trees[1:], 5) == []


def test_ktos_reference_point_is_that_of_the_plain_implementation():
    # Adapters of either sign: once the mean is above 0, once it is below and becomes 0.
    trees, signs = make_trees(), set()
    for lower in (0.0, 2.0):
        log_z = make_log_z("kto", lower=lower)
        mean = plain_mean_logratio(log_z, trees)
        signs.add(mean > 0)
        assert log_z.reference_point(trees) == pytest.approx(max(0.0, mean), rel=1e-9)
        for micro_tokens in (1, 40):
            other = make_log_z("kto", lower=lower, compute=Compute(micro_tokens=micro_tokens))
            assert other.reference_point(trees) == pytest.approx(max(0.0, mean), rel=1e-9)
        assert log_z.objective_for(trees).log_z == pytest.approx(0.2 - 0.3 * max(0.0, mean))
    assert signs == {True, False}


def test_a_batch_of_one_prompt_has_reference_point_0():
    assert make_log_z("kto").reference_point(make_trees()[:1]) == 0.0


def test_every_rank_gets_the_reference_point_of_the_global_batch(tmp_path):
    # 3 ranks and 2 trees: one of them has nothing to run.
    run_ranks(tmp_path, f"""
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_log_z import make_log_z
from training.ranks import Ranks, gather
points = [make_log_z("kto", ranks=Ranks(rank, world_size)).reference_point(make_trees(count))
          for count in (2, 11)]
points = gather(points)
if rank == 0:
    torch.save(points, {str(tmp_path / "out.pt")!r})
""", ranks=3)
    expected = [make_log_z("kto").reference_point(make_trees(count)) for count in (2, 11)]
    for points in torch.load(tmp_path / "out.pt"):
        assert points == pytest.approx(expected, rel=1e-9)


# ---- BCO ----------------------------------------------------------------------------------------

def test_bcos_delta_is_the_mean_reward_of_the_steps_before():
    # Sums and counts of positives and negatives: (3 - 8 + 1 + 2) / (2 + 4 + 1 + 3) = -0.2
    log_z = make_log_z("bco")
    assert log_z.objective_for(make_trees()).log_z == 0.2
    log_z.add([0.5, 100.0, 3.0, 2.0, -8.0, 4.0, -9.0, 2.0])
    log_z.add([0.5, 100.0, 1.0, 1.0, 2.0, 3.0, -9.0, 2.0])
    assert log_z.objective_for(make_trees()).log_z == pytest.approx(0.2 + 0.2)
    assert make_log_z("bco", sums=log_z.sums).objective_for([]).log_z == pytest.approx(0.4)
    dpo = make_log_z("pointwise_dpo", sums=log_z.sums)
    assert dpo.objective_for([]) == replace(dpo.objective, log_z=0.2)


# ---- whole runs ---------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["bco", "kto"])
def test_a_run_that_goes_on_from_a_checkpoint_ends_with_the_same_bits(tmp_path, tiny_model,
                                                                      pairs_file, name):
    flags = "--method", name, "--max_steps", "5", "--learning_rate", "1e-2"
    finish(tiny_model, pairs_file, tmp_path / "whole", *flags)
    finish(tiny_model, pairs_file, tmp_path / "cut", *flags)
    (tmp_path / "cut/final").rename(tmp_path / "gone")           # checkpoint-3 is left
    finish(tiny_model, pairs_file, tmp_path / "cut", *flags)
    assert adapter_hash(tmp_path / "cut") == adapter_hash(tmp_path / "whole")
    lines = logged(tmp_path / "whole")
    assert logged(tmp_path / "cut") == lines and len(lines) == 5


def test_kto_of_all_weights_compares_with_the_base_as_it_was(tiny_model, pairs_file, tmp_path):
    # All weights are trained, the head too: the reference must not see it move. Every step is the
    # whole file, so that the second one's rewards are those of the first one's weights.
    finish(tiny_model, pairs_file, tmp_path / "run", "--method", "kto", "--lora_r", "0",
           "--batch_size", "1000", "--max_steps", "2", "--save_steps", "1", "--max_length", "128",
           "--learning_rate", "3e-3")
    tokenizer = Tokenizer(tiny_model)
    trees = build_trees(read_dataset(str(pairs_file)), tokenizer, "all", 128, 64)
    policy, base = (held_out.measure(load_llama(str(folder)), None, trees, Compute())
                    for folder in (tmp_path / "run/checkpoint-1", tiny_model))
    rewards = 0.1 * (policy.policy_logps - base.policy_logps)                    # [R]
    line = logged(tmp_path / "run")[1]
    for name, score in (("positive", 1), ("negative", 0)):
        expected = float(rewards[policy.scores == score].mean())
        assert abs(expected) > 0.01
        assert line[f"rewards/{name}"] == pytest.approx(expected, rel=1e-3)
