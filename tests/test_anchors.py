"""Anchors of D2O: who says them, what is kept of them, and whole runs of train.py --method d2o.

Numbers (iii) to (vi) are bugs of a public re-implementation: (iii) references that are the policy
itself, (iv) references copied from it on the way, (v) a canned sentence as anchor, (vi) the start
of a response found by tokenizing the prompt again.
"""
import json
import signal
import subprocess
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from anchors import anchor_seeds, anchored_trees, one_negative_per_tree, sampling_batches
from data import Tokenizer
from generate import generate
from kernels import linear_logps
from lora import load_adapter, save_adapter, share_base
from model import load_llama
from step import (METHODS, adapters_off, backward_batch, batch_counts, frozen_copy,
                  reference_logps, sequence_logps)
from test_step import make_model, make_trees, usable
from conftest import QUIET, ROOT
from test_train import adapter_hash, command, finish, logged, pairs_file  # noqa: F401
from train import trainable
from trees import Tree, build_stream

EOS = 2


def negatives(count=11):
    """Trees of one negative each; the last two share a prompt."""
    trees = one_negative_per_tree(usable(make_trees(count), "negative"))
    return [*trees, replace(trees[-1], response_ids=[[7, 8, EOS]])]


def make(folder, model, trees, step=0, references=None, batches=None, **changes):
    """anchored_trees with two anchors of up to 12 tokens, from batches of about three trees."""
    how = dict(every=0, seed=5, num_anchors=2, sampling=(12, 0.8, 0.9, EOS), mean_logps=False,
               micro_tokens=15, linear_logps=linear_logps, rank=0, world_size=1,
               stop=SimpleNamespace(signal=0)) | changes
    references = references or [partial(adapters_off, model)] * 2
    return anchored_trees(step, str(folder), model, references, trees,
                          batches or [list(range(len(trees)))], **how)


def backward(model, trees, beta=0.3, alpha=0.2, method=METHODS["d2o"], **changes):
    method = replace(method, loss=partial(method.loss, alpha=alpha))
    how = dict(beta=beta, log_z=0.0, mean_logps=False, reduction="mean",
               micro_tokens=8192) | changes
    return backward_batch(model, None, method, trees, batch_counts(trees), **how)


# ---- who says them ------------------------------------------------------------------------------

def test_every_anchor_is_a_sample_of_the_policy_with_a_seed_of_its_own(tmp_path):
    # (v) Each is what generate() says alone, with nothing beside it in the batch: of this policy,
    # adapters on, of (seed, step, tree, k) and of nothing else. No sentence is shared.
    model, trees = make_model(), negatives()
    made = make(tmp_path, model, trees)
    assert sorted(made) == list(range(len(trees)))
    for number, tree in made.items():
        for ids, seed in zip(tree.response_ids[1:], anchor_seeds(5, 0, number, 2), strict=True):
            assert generate(model, [tree.prompt_ids], 12, 0.8, 0.9, EOS, [seed]) == [ids]
    said = [tuple(ids) for tree in made.values() for ids in tree.response_ids[1:]]
    assert len(set(said)) == len(said)
    (tmp_path / "base").mkdir()
    with adapters_off(model):                                  # the base would have said others
        base = make(tmp_path / "base", model, trees)
    assert sum(base[n].response_ids != made[n].response_ids for n in made) > len(made) // 2
    assert make(tmp_path, model, trees, 1, every=1, batches=[[], [0]])[0] != made[0]


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
    # Lagged: steps 2 and 3 of every = 2 read what the policy of step 2 said, and say nothing anew.
    trees, batches = negatives(), [[0, 1], [2], [3, 4], [5, 0], [1]]
    old, new = make_model(seed=0), make_model(seed=1)
    first = make(tmp_path, old, trees, 0, batches=batches, every=2)
    assert sorted(first) == [0, 1, 2]
    refreshed = make(tmp_path, new, trees, 2, batches=batches, every=2)
    assert sorted(refreshed) == [0, 3, 4, 5]
    (seed, _), prompt_ids = anchor_seeds(5, 2, 0, 2), trees[0].prompt_ids
    assert refreshed[0].response_ids[1] == generate(new, [prompt_ids], 12, 0.8, 0.9, EOS, [seed])[0]
    assert make(tmp_path, old, trees, 3, batches=batches, every=2) == refreshed


# ---- what is kept of them -----------------------------------------------------------------------

def test_the_ids_that_were_sampled_are_trained_on_even_where_the_tokenizer_would_differ(
        tmp_path, tiny_model):
    # (vi) A random model says pieces no tokenizer would choose. Labels are those very ids; an
    # anchor that ended keeps its EOS, one that ran out of room has none.
    model, tokenizer = load_llama(tiny_model), Tokenizer(tiny_model)
    trees = [Tree([1, 300, 301 + n], [[400, EOS]], [0.0], []) for n in range(40)]
    model.lm_head.weight.data[EOS] += 0.05                     # some end
    made = make(tmp_path, model, trees, references=[partial(frozen_copy, model)] * 2,
                sampling=(12, 1.0, 1.0, EOS), micro_tokens=500)
    stream = build_stream(list(made.values()))
    kept = [ids for tree in made.values() for ids in tree.response_ids]
    assert stream.labels.tolist() == sum(kept, [])
    rows = [json.loads(line) for line in open(tmp_path / "anchors-0.jsonl")]
    assert {row["tree"]: row["anchor_ids"] for row in rows} == {
        n: tree.response_ids[1:] for n, tree in made.items()}
    said = [ids for tree in made.values() for ids in tree.response_ids[1:]]
    assert any(tokenizer.encode(tokenizer.decode(ids)) != ids for ids in said)
    ended = [ids for ids in said if ids[-1] == EOS]
    assert ended and len(ended) < len(said)
    assert all(EOS not in ids[:-1] for ids in said)
    assert all(len(ids) == 12 for ids in said if ids[-1] != EOS)


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
    # (iii), (iv) Kept beside the ids: log-probs with adapters off, equal before and after training
    # and in a refresh by the moved policy. The policy's own differ from them, so h is not 0.
    model, trees = make_model(), negatives()
    made = make(tmp_path, model, trees)

    def check(made, model):
        for tree in made.values():
            stream = build_stream([tree])
            policy, frozen = (logps.detach() for logps in sequence_logps(
                model, partial(adapters_off, model), stream, stream))
            assert tree.reference_logps == pytest.approx(frozen.tolist(), rel=1e-12)
            assert (policy - frozen).abs().max() > 0.01

    check(made, model)
    optimizer = torch.optim.SGD(trainable(model).values(), lr=1.0)
    before = backward(model, list(made.values()))[0]
    assert abs(before - torch.tensor(2.0).log()) > 0.001
    for _ in range(3):
        optimizer.step()
        optimizer.zero_grad()
        after = backward(model, list(made.values()))[0]
    assert after < before - 0.01
    check(made, model)
    check(make(tmp_path, model, trees, 1, every=1, batches=[[0], list(range(6))]), model)


def test_each_reference_is_its_own_adapter_in_its_own_place(tmp_path, tiny_model):
    # π_r+ under the negative, π_r- under the anchors; both share the policy's base weights, and
    # training the policy moves neither. A swap, or one for both, changes every number.
    from lora import add_lora
    folders, alone = [], []
    for seed in (1, 2):
        model = add_lora(load_llama(tiny_model), r=3 + seed, alpha=8, dropout=0.0)
        generator = torch.Generator().manual_seed(seed)
        for p in trainable(model).values():
            p.data = 0.2 * torch.randn(p.shape, generator=generator)
        folders.append(str(tmp_path / f"adapter-{seed}"))
        save_adapter(model, folders[-1], tiny_model)
        alone.append(load_adapter(load_llama(tiny_model), folders[-1]))
    policy = load_llama(tiny_model)
    references = [load_adapter(share_base(policy), folder).requires_grad_(False)
                  for folder in folders]
    add_lora(policy, r=4, alpha=8, dropout=0.0)
    assert all(r.model.embed_tokens.weight.data_ptr() == policy.model.embed_tokens.weight.data_ptr()
               for r in references)                          # one copy of the weights for all
    trees = [Tree([1, 300, 301 + n], [[400, 17 + n, EOS]], [0.0], []) for n in range(6)]
    made = make(tmp_path, policy, trees, micro_tokens=500,
                references=[partial(frozen_copy, r) for r in references])

    def expected():
        plus, minus = (reference_logps(partial(frozen_copy, m), list(made.values()),
                                       lambda z: True, False, 8192) for m in alone)
        return [[p[0], *m[1:]] for p, m in zip(plus, minus)]

    kept = [tree.reference_logps for tree in made.values()]
    assert_close(torch.tensor(kept), torch.tensor(expected()), rtol=1e-5, atol=1e-4)
    assert len({round(x, 2) for row in kept for x in row}) > 12
    backward(policy, list(made.values()))
    torch.optim.SGD(trainable(policy).values(), lr=1.0).step()
    assert not any(p.requires_grad for r in references for p in r.parameters())
    again = reference_logps(partial(frozen_copy, references[0]), list(made.values()),
                            lambda z: z == 0, False, 8192)
    assert_close([row[0] for row in again], [row[0] for row in kept], rtol=1e-5, atol=1e-4)


# ---- the step -----------------------------------------------------------------------------------

def test_one_anchor_that_is_the_chosen_response_is_a_step_of_dpo_to_the_bit():
    # K = 1, one reference, alpha = beta: the loss to the bit in float32, through two micro-batches
    # of the same streams; gradients too, since everything before them is the same.
    pairs, results = [Tree(tree.prompt_ids, tree.response_ids[1::-1], [0.0, 1.0], [(1, 0)])
                      for tree in make_trees() if len(tree.scores) > 1], []
    for name in ("d2o", "dpo"):
        model = make_model(torch.float32)
        reference = partial(adapters_off, model)
        if name == "d2o":                  # packed as the step packs: the same matrix products
            kept = reference_logps(reference, pairs, lambda z: True, False, 60)
            trees = [replace(tree, reference_logps=r) for tree, r in zip(pairs, kept)]
            total = backward(model, trees, 0.3, 0.3, micro_tokens=60)
        else:
            total = backward_batch(model, reference, METHODS["dpo"], pairs, batch_counts(pairs),
                                   beta=0.3, log_z=0.0, mean_logps=False, reduction="mean",
                                   micro_tokens=60)
        results.append((total, torch.cat([p.grad.flatten() for p in trainable(model).values()])))
    (d2o, d2o_grad), (dpo, dpo_grad) = results
    assert torch.equal(d2o, dpo) and torch.equal(d2o_grad, dpo_grad)
    assert float(d2o[0]) != pytest.approx(0.6931, abs=1e-3)


def test_a_step_runs_no_reference(tmp_path):
    # A reference that is called would raise: backward() passes None for it.
    model = make_model()
    seen = []

    def spy(policy_hidden, reference_hidden, *rest):
        seen.append((len(policy_hidden), len(reference_hidden)))
        return linear_logps(policy_hidden, reference_hidden, *rest)

    made = make(tmp_path, model, negatives())
    backward(model, list(made.values()), linear_logps=spy)
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
    file.write_text("".join([*lines[:2], '{"tree": 1}\n', *lines[3:]]))
    with pytest.raises(ValueError, match=r"anchors-0.jsonl:3: not anchors: "):
        make(tmp_path, model, trees, step=3)
    file.unlink()
    with pytest.raises(ValueError, match="the policy that said them is gone"):
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
        process = subprocess.Popen(command(tiny_model, pairs_file, broken, *D2O), cwd=ROOT,
                                   env=QUIET, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                   text=True)
        file, deadline = broken / name, time.time() + 120
        while time.time() < deadline and process.poll() is None:
            if file.exists() and file.read_text().count("\n") >= lines:
                break
            time.sleep(0.002)
        process.send_signal(kind)
        shown = process.communicate(timeout=60)[0]
        assert not (broken / "final").exists(), "the run was over before the signal came"
        if kind == signal.SIGTERM:
            assert process.returncode == 128 + kind
            assert shown.endswith("stopped among anchors of step 0, saved; the same "
                                  "command continues\n")
            assert 0 < file.stat().st_size < (whole / name).stat().st_size
    finish(tiny_model, pairs_file, broken, *D2O)
    assert adapter_hash(whole) == adapter_hash(broken) and logged(whole) == logged(broken)
    for name in names:
        assert (whole / name).read_bytes() == (broken / name).read_bytes()


def test_two_ranks_say_the_same_anchors_and_log_the_same_numbers(tmp_path, tiny_model, pairs_file):
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
    # chosen responses replaced by others: not one number changes. --lora_r 0 keeps a frozen copy.
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(json.loads(line) | {"chosen": "never read"}) + "\n"
                             for line in open(pairs_file)))
    flags = (*D2O, "--max_steps", "6")
    shown = finish(tiny_model, pairs_file, tmp_path / "a", *flags)
    assert "training on 120 prompts, {'responses': 120, 'positive': 0, 'pairs': 0}" in shown
    finish(tiny_model, other, tmp_path / "b", *flags)
    assert adapter_hash(tmp_path / "a") == adapter_hash(tmp_path / "b")
    shown = finish(tiny_model, pairs_file, tmp_path / "full", *flags, "--lora_r", "0",
                   "--reference_minus", str(tmp_path / "a/final"))
    assert "a copy that is not" in shown and (tmp_path / "full/final/model.safetensors").exists()
    first, last = logged(tmp_path / "full")[0], logged(tmp_path / "full")[-1]
    assert first["rewards/negative"] == pytest.approx(0, abs=1e-4) and last["loss"] < first["loss"]
    assert abs(first["rewards/positive"]) > 1e-3               # π_r- is not the base
