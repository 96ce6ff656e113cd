"""Anchors of D2O: what they are samples of, what is stored, and whole runs of --method d2o.

Numbers (iii) to (vi) are bugs of a public re-implementation: (iii) references that are the policy
itself, (iv) references copied from it on the way, (v) a canned sentence as anchor, (vi) the start
of a response found by tokenizing the prompt again.
"""
import json
import math
import signal
import subprocess
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import ONE_THREAD, ROOT
from helpers import (adapter_hash, backward, command, finish, flat_gradient, logged, make_model,
                     make_trees, no_reference, usable, wait_for_lines)

from d2o import AnchorSource, anchor_seeds, anchored_trees, sampling_batches
from generate import Sampling, generate
from kernels import linear_logps
from lora import lora_disabled
from model import load_llama
from packing import Tree, build_stream, one_negative_per_tree
from step import Compute, sequence_logps, tree_logps
from tokenizer import Tokenizer
from training.checkpoint import trainable
from training.ranks import Ranks
from training.reference_cache import seal

EOS = 2


def negatives(count=11):
    """Trees of one negative each; the last two share a prompt."""
    trees = one_negative_per_tree(usable(make_trees(count), "negative"))
    return [*trees, replace(trees[-1], response_ids=[[7, 8, EOS]])]


def make(folder, model, trees, step=0, **changes):
    """anchored_trees with two anchors of up to 12 tokens, from batches of about three trees."""
    settings = dict(
        output_dir=str(folder), model=model, reference=partial(lora_disabled, model),
        trees=trees, batches=[list(range(len(trees)))], refresh=0, num_anchors=2,
        sampling=Sampling(12, 0.8, 0.9, EOS), seed=5, mean_logps=False,
        compute=Compute(micro_tokens=15), ranks=Ranks())
    return anchored_trees(AnchorSource(**(settings | changes)), step)


def step_loss(model, trees):
    """The loss of a step, which runs no reference; its gradient is added up in the model."""
    return float(backward(model, trees, "d2o", reference=no_reference(model), beta=0.3,
                          alpha=0.2)[0])


# ---- what they are samples of -------------------------------------------------------------------

def test_every_anchor_is_a_sample_of_the_policy_with_a_seed_of_its_own(tmp_path):
    # (v) Each is what generate() samples alone, with nothing beside it in the batch: from this
    # policy, adapters on, by (seed, step, tree, k) and nothing else. No sentence is shared.
    model, trees = make_model(), negatives()
    made = make(tmp_path, model, trees)
    assert sorted(made) == list(range(len(trees)))
    for number, tree in made.items():
        for ids, seed in zip(tree.response_ids[1:], anchor_seeds(5, 0, number, 2), strict=True):
            assert generate(model, [tree.prompt_ids], 12, 0.8, 0.9, EOS, [seed]) == [ids]
    anchors = [tuple(ids) for tree in made.values() for ids in tree.response_ids[1:]]
    assert len(set(anchors)) == len(anchors)
    (tmp_path / "base").mkdir()
    with lora_disabled(model):                                 # the base's samples are others
        base = make(tmp_path / "base", model, trees)
    assert sum(base[n].response_ids != made[n].response_ids for n in made) > len(made) // 2
    assert make(tmp_path, model, trees, 1, refresh=1, batches=[[], [0]])[0] != made[0]


def test_batches_of_sampling_hold_every_tree_once_within_the_cache(tmp_path):
    trees = negatives()
    for cache_tokens in (1, 100, 150, 200, 10_000):
        batches = sampling_batches(trees, range(len(trees)), 2, 12, cache_tokens)
        assert sorted(sum(batches, [])) == list(range(len(trees)))
        for batch in batches:
            longest = max(len(trees[n].prompt_ids) for n in batch)
            assert len(batch) == 1 or len(batch) * 2 * (longest + 12) <= cache_tokens
    assert len(batches) == 1 and len(sampling_batches(trees, range(len(trees)), 2, 12, 100)) > 2


def test_a_refresh_samples_the_policy_of_its_step_for_the_steps_that_follow(tmp_path):
    # Lagged, refresh = 2: step 3 reads the samples of step 2's policy and makes no new ones.
    trees, batches = negatives(), [[0, 1], [2], [3, 4], [5, 0], [1]]
    old, new = make_model(seed=0), make_model(seed=1)
    first = make(tmp_path, old, trees, 0, batches=batches, refresh=2)
    assert sorted(first) == [0, 1, 2]
    refreshed = make(tmp_path, new, trees, 2, batches=batches, refresh=2)
    assert sorted(refreshed) == [0, 3, 4, 5]
    (seed, _), prompt_ids = anchor_seeds(5, 2, 0, 2), trees[0].prompt_ids
    assert refreshed[0].response_ids[1] == generate(new, [prompt_ids], 12, 0.8, 0.9, EOS, [seed])[0]
    assert make(tmp_path, old, trees, 3, batches=batches, refresh=2) == refreshed


# ---- what is stored of them ---------------------------------------------------------------------

def test_the_ids_that_were_sampled_are_trained_on_even_where_the_tokenizer_would_differ(
        tmp_path, tiny_model):
    # (vi) A random model samples pieces that no tokenizer would choose. Labels are those very ids;
    # an anchor that ended has its EOS, one that ran out of room has none.
    model, tokenizer = load_llama(tiny_model), Tokenizer(tiny_model)
    trees = [Tree([1, 300, 301 + n], [[400, EOS]], [0.0], []) for n in range(40)]
    model.lm_head.weight.data[EOS] += 0.05                     # some end
    made = make(tmp_path, model, trees, reference=partial(nullcontext, model),
                sampling=Sampling(12, 1.0, 1.0, EOS), compute=Compute(micro_tokens=500))
    stream = build_stream(list(made.values()))
    responses = [ids for tree in made.values() for ids in tree.response_ids]
    assert stream.labels.tolist() == sum(responses, [])
    rows = [json.loads(line) for line in open(tmp_path / "anchors-0.jsonl")]
    assert {row["tree"]: row["anchor_ids"] for row in rows} == {
        n: tree.response_ids[1:] for n, tree in made.items()}
    anchors = [ids for tree in made.values() for ids in tree.response_ids[1:]]
    assert any(tokenizer.encode(tokenizer.decode(ids)) != ids for ids in anchors)
    ended = [ids for ids in anchors if ids[-1] == EOS]
    assert ended and len(ended) < len(anchors)
    assert all(EOS not in ids[:-1] for ids in anchors)
    assert all(len(ids) == 12 for ids in anchors if ids[-1] != EOS)


def test_a_tree_reads_its_prompt_once_and_holds_one_negative_with_its_anchors(tmp_path):
    trees = make_trees()
    one = one_negative_per_tree(usable(trees, "negative"))
    assert [tree.response_ids for tree in one] == [
        [ids] for tree in trees for ids, z in zip(tree.response_ids, tree.scores) if z == 0]
    made = make(tmp_path, make_model(), one, num_anchors=3)
    for number, tree in made.items():
        assert tree.response_ids[0] == one[number].response_ids[0] and len(tree.response_ids) == 4
        assert tree.scores == [0, 1, 1, 1] and tree.pairs == [(1, 0), (2, 0), (3, 0)]
        tokens = len(tree.prompt_ids) + sum(len(ids) - 1 for ids in tree.response_ids)
        assert len(build_stream([tree]).input_ids) == tokens


def test_references_are_those_of_the_base_and_do_not_move_while_the_policy_does(tmp_path):
    # (iii), (iv) Stored beside the ids: log-probs with adapters off, equal before and after
    # training and in a refresh by the moved policy. The policy's own differ, so h is not 0.
    model, trees = make_model(), negatives()
    made = make(tmp_path, model, trees)

    def check(made, model):
        for tree in made.values():
            stream = build_stream([tree])
            with torch.no_grad():
                policy_logps = sequence_logps(model, stream)
                with lora_disabled(model) as reference:
                    logps = sequence_logps(reference, stream)
            assert tree.reference_logps == pytest.approx(logps.tolist(), rel=1e-12)
            assert (policy_logps - logps).abs().max() > 0.01

    check(made, model)
    optimizer = torch.optim.SGD(trainable(model).values(), lr=1.0)
    before = step_loss(model, list(made.values()))
    assert abs(before - math.log(2)) > 0.001
    for _ in range(3):
        optimizer.step()
        optimizer.zero_grad()
        after = step_loss(model, list(made.values()))
    assert after < before - 0.01
    check(made, model)
    check(make(tmp_path, model, trees, 1, refresh=1, batches=[[0], list(range(6))]), model)


# ---- the step -----------------------------------------------------------------------------------

def test_one_anchor_that_is_the_chosen_response_is_a_step_of_dpo_to_the_bit():
    # K = 1, one reference, alpha = beta: the loss to the bit in float32, through two micro-batches
    # of the same streams; gradients too, since everything before them is the same.
    trees, results = [Tree(tree.prompt_ids, tree.response_ids[1::-1], [0.0, 1.0], [(1, 0)])
                      for tree in make_trees() if len(tree.scores) > 1], []
    compute = Compute(micro_tokens=60)
    for name in ("d2o", "dpo"):
        model = make_model(torch.float32)
        reference = partial(lora_disabled, model)
        if name == "d2o":                  # packed as the step packs: the same matrix products
            logps = tree_logps(reference, trees, lambda z: True, False, compute)
            trees_of = [replace(tree, reference_logps=row) for tree, row in zip(trees, logps)]
            reference = no_reference(model)
        else:
            trees_of = trees
        totals = backward(model, trees_of, name, reference=reference, beta=0.3, alpha=0.3,
                          compute=compute)
        results.append((totals, flat_gradient(model)))
    (d2o, d2o_grad), (dpo, dpo_grad) = results
    assert torch.equal(d2o, dpo) and torch.equal(d2o_grad, dpo_grad)
    assert float(d2o[0]) != pytest.approx(0.6931, abs=1e-3)


def test_a_step_runs_no_reference(tmp_path):
    # A reference that is run would raise, and the head sees the policy's rows alone.
    model = make_model()
    seen = []

    def spy(policy_hidden, reference_hidden, *rest):
        seen.append((len(policy_hidden), len(reference_hidden)))
        return linear_logps(policy_hidden, reference_hidden, *rest)

    made = make(tmp_path, model, negatives())
    backward(model, list(made.values()), "d2o", reference=no_reference(model), beta=0.3, alpha=0.2,
             compute=Compute(linear_logps=spy))
    assert seen == [(sum(len(ids) for tree in made.values() for ids in tree.response_ids), 0)]


# ---- files --------------------------------------------------------------------------------------

def test_a_file_cut_anywhere_is_completed_to_the_same_bytes(tmp_path):
    # A kill may leave any prefix. Whole batches stay, so the rest is sampled in the same batches.
    model, trees = make_model(torch.float32), negatives()
    made, file = make(tmp_path, model, trees), tmp_path / "anchors-0.jsonl"
    whole = file.read_bytes()
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 1, len(whole)):
        file.write_bytes(whole[:size])
        assert make(tmp_path, model, trees) == made
        assert file.read_bytes() == whole


def test_anchors_that_are_gone_or_damaged_are_named_and_never_made_by_a_later_policy(tmp_path):
    model, trees = make_model(), negatives()
    make(tmp_path, model, trees)
    file = tmp_path / "anchors-0.jsonl"
    lines = file.read_text().splitlines(True)
    file.write_text("".join(lines[:-1]))
    with pytest.raises(ValueError, match=r"anchors-0.jsonl has anchors for 9 trees, not for the"):
        make(tmp_path, model, trees, step=3)
    remedy = "remove it and all checkpoints after step 0, and the same command samples them again"
    for changed in ([lines[0].replace('": [[', '": [[1'), *lines[1:]],
                    [lines[1], lines[0], *lines[2:]], [*lines[:2], '{"tree": 1}\n', *lines[3:]]):
        file.write_text("".join(changed))
        with pytest.raises(ValueError, match=rf"anchors-0.jsonl:[13]: damaged: .*{remedy}"):
            make(tmp_path, model, trees, step=3)
        with pytest.raises(ValueError, match=r"anchors-0.jsonl:[13]: damaged: .*computes it again"):
            make(tmp_path, model, trees)                     # the policy is there: the file alone
    file.write_text(seal('{"tree": 1', file.name)[0])
    with pytest.raises(ValueError, match=rf"anchors-0.jsonl:1: not anchors of this data; {remedy}"):
        make(tmp_path, model, trees, step=3)
    file.unlink()
    with pytest.raises(ValueError, match=f"the policy they were sampled from is gone; {remedy}"):
        make(tmp_path, model, trees, step=3)
    assert not file.exists()


# ---- whole runs ---------------------------------------------------------------------------------

D2O = ("--method", "d2o", "--num_anchors", "2", "--anchor_tokens", "10", "--refresh_anchors", "5",
       "--num_train_epochs", "1")


def test_a_run_killed_among_anchors_and_among_steps_ends_with_the_same_bytes(tmp_path, tiny_model,
                                                                             pairs_file):
    # 15 steps, checkpoints at 3, 6, 9, 12, refreshes at 5 and 10. SIGTERM while the first anchors
    # are made, a kill among those of step 5 (the newest checkpoint is older), one among steps.
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(tiny_model, pairs_file, whole, *D2O)
    names = [f"anchors-{step}.jsonl" for step in (0, 5, 10)]
    assert sorted(path.name for path in whole.glob("anchors-*")) == sorted(names)
    for name, lines, kind in ((names[0], 1, signal.SIGTERM), (names[1], 1, signal.SIGKILL),
                              ("metrics.jsonl", 8, signal.SIGKILL)):
        file, process = broken / name, subprocess.Popen(
            command(tiny_model, pairs_file, broken, *D2O), cwd=ROOT, env=ONE_THREAD,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        wait_for_lines(process, file, lines)
        process.send_signal(kind)
        shown = process.communicate(timeout=60)[0]
        assert not (broken / "final").exists(), "the run was over before the signal came"
        if kind == signal.SIGTERM:
            assert process.returncode == 128 + kind
            assert shown.endswith("stopped during anchors of step 0, saved; the same "
                                  "command continues\n")
            assert 0 < file.stat().st_size < (whole / name).stat().st_size
    finish(tiny_model, pairs_file, broken, *D2O)
    assert adapter_hash(whole) == adapter_hash(broken) and logged(whole) == logged(broken)
    for name in names:
        assert (whole / name).read_bytes() == (broken / name).read_bytes()


def test_two_ranks_sample_the_same_anchors_and_log_the_same_numbers(tmp_path, tiny_model,
                                                                    pairs_file):
    # The same batches, dealt to two ranks: the ids are equal; after steps the policies differ by
    # rounding, and with them the log-probs.
    for ranks in (1, 2):
        finish(tiny_model, pairs_file, tmp_path / str(ranks), *D2O, "--max_steps", "6", ranks=ranks)
    one, two = (tmp_path / str(ranks) for ranks in (1, 2))
    assert (one / "anchors-0.jsonl").read_bytes() == (two / "anchors-0.jsonl").read_bytes()
    rows = [[json.loads(line) for line in open(out / "anchors-5.jsonl")] for out in (one, two)]
    assert [row["anchor_ids"] for row in rows[0]] == [row["anchor_ids"] for row in rows[1]]
    for line, expected in zip(logged(two, "tokens"), logged(one, "tokens"), strict=True):
        assert line == pytest.approx(expected, rel=2e-4, abs=2e-6)


def test_positives_are_ignored_and_all_weights_can_be_trained(tmp_path, tiny_model, pairs_file):
    # Chosen responses replaced by others: not one number changes. With --lora_r 0 the reference is
    # a copy that is not trained.
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(json.loads(line) | {"chosen": "never read"}) + "\n"
                             for line in open(pairs_file)))
    flags = (*D2O, "--max_steps", "6")
    shown = finish(tiny_model, pairs_file, tmp_path / "a", *flags)
    assert "training on 120 prompts, 120 responses (0 with z = 1), 0 pairs" in shown
    finish(tiny_model, other, tmp_path / "b", *flags)
    assert adapter_hash(tmp_path / "a") == adapter_hash(tmp_path / "b")
    shown = finish(tiny_model, pairs_file, tmp_path / "full", *flags, "--lora_r", "0")
    assert "a copy that is not" in shown and (tmp_path / "full/final/model.safetensors").exists()
    first, last = logged(tmp_path / "full")[0], logged(tmp_path / "full")[-1]
    assert first["rewards/negative"] == pytest.approx(0, abs=1e-4) and last["loss"] < first["loss"]
