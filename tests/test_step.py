"""Packing, prompt sharing, micro-batches and ranks leave loss and gradient as they are."""
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from kernels import linear_logps
from lora import add_lora, lora_disabled, lora_layers
from model import Llama, LlamaConfig
from reward import add_score_head
from step import METHODS, adapters_off, backward_batch, batch_counts, scored_hidden
from train import trainable
from trees import Tree, build_stream, shard

ROOT = Path(__file__).parents[1]


def make_model(dtype=torch.float64, seed=0, score_head=False):
    torch.manual_seed(seed)
    model = Llama(LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=48,
                              num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2))
    add_lora(model, r=4, alpha=8, dropout=0.0)
    if score_head:
        add_score_head(model)
    for name, p in trainable(model).items():          # 0 would hide the log-ratio and the reward
        if name.endswith("lora_B") or name == "score.weight":
            torch.nn.init.normal_(p, std=0.05)
    return model.to(dtype)


def make_trees(count=11, seed=1):
    """Uneven trees: 1 to 3 responses, some of a single token, scores of every kind."""
    generator = torch.Generator().manual_seed(seed)

    def ids(low, high):
        size = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(3, 97, (size,), generator=generator).tolist()

    trees = []
    for number in range(count):
        responses = [ids(0, 9) + [2] for _ in range(1 + number % 3)]
        scores = ([1.0, 0.0, 1.0] if number % 2 else [0.0, 1.0, 0.25])[:len(responses)]
        pairs = [(i, j) for i in range(len(scores)) for j in range(len(scores))
                 if scores[i] > scores[j]]
        trees.append(Tree([1] + ids(1, 12), responses, scores, pairs))
    return trees


def anchored(trees):
    """Trees [negative, two anchors] for every response, with reference_logps from anywhere."""
    generator = torch.Generator().manual_seed(3)
    trees = [Tree(tree.prompt_ids, [ids, ids[::-1], [5, 7] + ids], [0.0, 1.0, 1.0],
                  [(1, 0), (2, 0)]) for tree in trees for ids in tree.response_ids]
    return [replace(tree, reference_logps=(-9 * torch.rand(3, generator=generator)).tolist())
            for tree in trees]


def usable(trees, uses):
    """The trees reduced to the responses a method trains on (as make_trees does for records)."""
    if uses == "anchors":
        return anchored(trees)
    out = []
    for tree in trees:
        keep = [i for i, z in enumerate(tree.scores)
                if uses == "all" or {"positive": 1, "negative": 0}.get(uses) == z
                or (uses == "pairs" and any(i in pair for pair in tree.pairs))]
        if keep:
            new = {old: n for n, old in enumerate(keep)}
            out.append(Tree(tree.prompt_ids, [tree.response_ids[i] for i in keep],
                            [tree.scores[i] for i in keep],
                            [(new[i], new[j]) for i, j in tree.pairs if i in new and j in new]))
    return out


def gradient(trees, name, shares=None, micro_tokens=8192, reduction="mean", mean_logps=False,
             dtype=torch.float64, linear_logps=linear_logps):
    """(loss, flat gradient) of one batch, its trees dealt to `shares` ranks played in turn."""
    model, method = make_model(dtype, score_head=METHODS[name].p == "rewards"), METHODS[name]
    if name == "d2o":
        method = replace(method, loss=partial(method.loss, alpha=0.7))
    loss = 0.0
    for share in shares or [trees]:
        total = backward_batch(model, partial(adapters_off, model), method, share,
                               batch_counts(trees), beta=0.3, log_z=0.2, mean_logps=mean_logps,
                               reduction=reduction, micro_tokens=micro_tokens,
                               linear_logps=linear_logps)
        loss += float(total[0])
    return loss, torch.cat([p.grad.flatten() for p in trainable(model).values()])


def plain_gradient(trees, name, reduction, mean_logps):
    """The same by tests/plain.py: padded rows, one per response, losses written out again here."""
    from plain import plain_hidden, plain_logps
    model = make_model(score_head=METHODS[name].p == "rewards")
    config = model.config
    weights = {key: value.detach().clone() for key, value in model.state_dict().items()}
    adapters = {key: value.requires_grad_() for key, value in weights.items()
                if key in trainable(model)}
    base = {key: value for key, value in weights.items() if key not in adapters}
    rows = [(tree.prompt_ids, ids, z) for tree in trees
            for ids, z in zip(tree.response_ids, tree.scores)]
    examples = [(prompt_ids, ids) for prompt_ids, ids, _ in rows]
    policy = plain_logps(base | adapters, config, examples, scaling=2.0)
    frozen = plain_logps(base, config, examples).detach()
    if METHODS[name].p == "rewards":                  # at the last token, wherever a row ends
        hidden = plain_hidden(base | adapters, config, [p + y for p, y in examples], scaling=2.0)
        last = torch.stack([row[len(p + y) - 1] for row, (p, y) in zip(hidden, examples)])
        policy = last @ adapters["score.weight"][0]
    if mean_logps:
        lengths = torch.tensor([len(ids) for _, ids in examples], dtype=torch.float64)
        policy, frozen = policy / lengths, frozen / lengths
    z = torch.tensor([row[2] for row in rows], dtype=torch.float64)
    sigmoid = torch.sigmoid
    if METHODS[name].uses == "pairs":
        pairs, first = [], 0
        for tree in trees:
            pairs += [(first + i, first + j) for i, j in tree.pairs]
            first += len(tree.scores)
        i, j = torch.tensor(pairs).T
        margins = policy[i] - policy[j]
        if name == "dpo":
            margins = 0.3 * (margins - frozen[i] + frozen[j])
        loss = -torch.log(sigmoid(margins)).mean()
    elif name == "d2o":
        rho = policy - torch.tensor(sum((tree.reference_logps for tree in trees), []))
        loss = -torch.log(sigmoid(0.3 / 2 * (rho[1::3] + rho[2::3]) - 0.7 * rho[::3])).mean()
    else:
        h = 0.3 * (policy - frozen) + 0.2
        losses = {
            "sft": -policy, "unlearning": policy, "unlikelihood": (1 - 2 * z) * policy,
            "pointwise_dpo": -z * torch.log(sigmoid(h)) - (1 - z) * torch.log(1 - sigmoid(h)),
            "pointwise_mse": (z - h) ** 2,
            "ulma": -z * policy - (1 - z) * torch.log(1 - sigmoid(h)),
            "ulma_mse": (z - h) ** 2 - (z == 1) * policy,
            "positive_dpo": -torch.log(sigmoid(h)), "negative_dpo": -torch.log(1 - sigmoid(h)),
            "pointwise_reward_model": (-z * torch.log(sigmoid(policy))
                                       - (1 - z) * torch.log(1 - sigmoid(policy))),
            "mse_reward_model": (z - policy) ** 2,
        }[name]
        if reduction == "mean":
            loss = losses.mean()
        else:
            loss = sum(losses[mask].mean() for mask in (z == 1, z != 1) if mask.any())
    loss.backward()
    order = [key for key in trainable(model)]
    return float(loss.detach()), torch.cat([adapters[key].grad.flatten() for key in order])


@pytest.mark.parametrize("name", METHODS)
def test_every_method_equals_the_plain_padded_implementation(name):
    # No padding, shared prompts, response-only head, gradient formed in the forward: all at once
    # against one padded row per response, full logits and autograd.
    trees = usable(make_trees(), METHODS[name].uses)
    loss, grad = gradient(trees, name)
    plain_loss, plain_grad = plain_gradient(trees, name, "mean", False)
    assert loss == pytest.approx(plain_loss, rel=1e-9)
    torch.testing.assert_close(grad, plain_grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["ulma", "pointwise_dpo", "unlikelihood"])
def test_the_authors_reductions_equal_the_plain_implementation(name):
    # --logp_reduction mean --reduction class, with class counts of the whole batch
    trees = make_trees()
    loss, grad = gradient(trees, name, reduction="class", mean_logps=True, micro_tokens=30)
    plain_loss, plain_grad = plain_gradient(trees, name, "class", True)
    assert loss == pytest.approx(plain_loss, rel=1e-9)
    torch.testing.assert_close(grad, plain_grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["ulma", "dpo", "ulma_mse", "d2o", "reward_model",
                                  "mse_reward_model"])
@pytest.mark.parametrize("reduction", ["mean", "class"])
def test_packing_micro_batches_and_sharing_change_nothing(name, reduction):
    trees = usable(make_trees(), METHODS[name].uses)
    loss, grad = gradient(trees, name, reduction=reduction)
    split = trees if METHODS[name].uses in ("pairs", "anchors") else [
        Tree(tree.prompt_ids, [ids], [z], [])
        for tree in trees for ids, z in zip(tree.response_ids, tree.scores)]
    for other, micro_tokens in ((trees, 1), (trees, 40), (trees[::-1], 8192), (split, 50)):
        other_loss, other_grad = gradient(other, name, None, micro_tokens, reduction)
        assert other_loss == pytest.approx(loss, rel=1e-9)
        torch.testing.assert_close(other_grad, grad, rtol=1e-9, atol=1e-9)


def test_float32_agrees_to_1e5_relative():
    trees = make_trees()
    loss, grad = gradient(trees, "ulma")
    loss32, grad32 = gradient(trees, "ulma", micro_tokens=40, dtype=torch.float32)
    assert loss32 == pytest.approx(loss, rel=1e-5)
    assert (grad32.double() - grad).norm() < 1e-5 * grad.norm()


@pytest.mark.parametrize("world_size", [2, 3, 20])
def test_shares_of_ranks_sum_to_the_whole_batch(world_size):
    # 20 ranks, 11 trees: some ranks have nothing to do
    trees = make_trees()
    loss, grad = gradient(trees, "ulma", reduction="class")
    shares = shard(trees, world_size)
    other_loss, other_grad = gradient(trees, "ulma", shares, reduction="class")
    assert other_loss == pytest.approx(loss, rel=1e-9)
    torch.testing.assert_close(other_grad, grad, rtol=1e-9, atol=1e-9)


RANK_SCRIPT = """
import sys, torch
sys.path[:0] = [{root!r}, {tests!r}]
from functools import partial
from test_step import *
from loop import all_reduce_sum_, set_up_processes
import torch.distributed as dist
rank, world_size, _ = set_up_processes()
found = []
for name in {names!r}:
    method = METHODS[name]
    trees, model = usable(make_trees(), method.uses), make_model(score_head=method.p == "rewards")
    # skewed on purpose: rank 0 gets every tree that has a negative first
    shares = [[t for t in trees if t.scores[0] == 0], [t for t in trees if t.scores[0] != 0], []]
    total = backward_batch(model, partial(adapters_off, model), method, shares[rank],
                           batch_counts(trees), beta=0.3, log_z=0.2,
                           mean_logps=False, reduction="class", micro_tokens=40)
    parameters = list(trainable(model).values())
    total = all_reduce_sum_(parameters, total)
    found.append((total, torch.cat([p.grad.flatten() for p in parameters])))
if rank == 0:
    torch.save(found, {out!r})
dist.barrier()
dist.destroy_process_group()
"""


def test_gloo_ranks_with_skewed_classes_give_the_gradient_of_one_process(tmp_path):
    # Per-rank class means would be off by tens of percent here; rank 2 of 3 has no tree at all.
    script, out = tmp_path / "ranks.py", str(tmp_path / "out.pt")
    names = ("ulma", "reward_model", "pointwise_reward_model")
    script.write_text(RANK_SCRIPT.format(root=str(ROOT), tests=str(ROOT / "tests"), out=out,
                                         names=names))
    run = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                          "--nproc_per_node=3", str(script)], cwd=tmp_path,
                         env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True,
                         text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    for name, (total, grad) in zip(names, torch.load(out, weights_only=True), strict=True):
        loss, expected = gradient(usable(make_trees(), METHODS[name].uses), name, reduction="class")
        assert float(total[0]) == pytest.approx(loss, rel=1e-9)
        torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-9)


def test_no_gradient_reaches_the_reference_and_ulma_runs_it_on_negatives_only():
    # Count the rows the head sees: policy rows of all responses, reference rows of z < 1 only.
    seen = []

    def spy(policy_hidden, reference_hidden, *rest):
        seen.append((len(policy_hidden), len(reference_hidden), reference_hidden.requires_grad))
        return linear_logps(policy_hidden, reference_hidden, *rest)

    trees = make_trees()
    gradient(trees, "ulma", linear_logps=spy)
    count = [(len(ids), z) for tree in trees for ids, z in zip(tree.response_ids, tree.scores)]
    assert seen == [(sum(n for n, _ in count), sum(n for n, z in count if z < 1), False)]


def test_gradient_checkpointing_keeps_every_bit_and_little_memory():
    # Each layer runs again in the backward, with the dropout masks it drew first. Frozen embeddings
    # must not cut the graph: the reentrant form would give no adapter of the first layers a
    # gradient. Kept between the passes: a layer's input, not its some twenty intermediate tensors.
    grads, kept = [], []
    for checkpointing in (False, True):
        model = make_model()
        model.gradient_checkpointing = checkpointing
        for layer in lora_layers(model).values():
            layer.dropout = 0.3
        torch.manual_seed(5)
        stream, sizes = build_stream(make_trees()), {}
        frozen = {p.untyped_storage()._cdata for p in model.parameters()}

        def keep(t):
            storage = t.untyped_storage()
            if storage._cdata not in frozen:
                sizes[storage._cdata] = storage.nbytes()
            return t
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            hidden = model(stream.input_ids, stream.position_ids, stream.segments)
        hidden.square().sum().backward()
        grads.append([p.grad for p in trainable(model).values()])
        kept.append(sum(sizes.values()))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert all(grad.abs().sum() > 0 for grad in grads[1])
    assert kept[1] < kept[0] / 4


@pytest.mark.parametrize("trained, all_rows", [
    ("0.self_attn.q_proj", False), ("1.self_attn.v_proj", False), ("0.mlp.down_proj", False),
    ("1.self_attn.o_proj", True), ("1.mlp.gate_proj", True), ("1.mlp.down_proj", True),
    ("lm_head", True)])
def test_behind_its_attention_the_last_layer_runs_on_scored_rows_unless_it_is_trained(
        monkeypatch, trained, all_rows):
    # Dropout there draws for every row, and a gradient sums over them: bits of runs made before
    # this saving. The reference, adapters off, makes the same choice.
    model = make_model().requires_grad_(False)
    model.get_submodule(trained if trained == "lm_head" else f"model.layers.{trained}"
                        ).requires_grad_(True)
    stream, asked, forward = build_stream(make_trees()), [], Llama.forward
    monkeypatch.setattr(Llama, "forward", lambda *args, rows=None: asked.append(rows) or forward(
        *args, rows=rows))
    sees = scored_hidden(model, stream)
    with lora_disabled(model), torch.no_grad():
        assert scored_hidden(model, stream).shape == sees.shape == (len(stream.labels), 32)
    assert asked == [None] * 2 if all_rows else asked[0] is asked[1] is stream.rows


def test_at_the_start_policy_equals_reference_to_the_bit():
    # lora_B = 0: every reward is exactly 0, so DPO and point-wise DPO are log 2.
    model = make_model(torch.float32)
    for name, p in trainable(model).items():
        if name.endswith("lora_B"):
            torch.nn.init.zeros_(p)
    for name in ("dpo", "pointwise_dpo"):
        trees = usable(make_trees(), METHODS[name].uses)
        total = backward_batch(model, partial(adapters_off, model), METHODS[name], trees,
                               batch_counts(trees), beta=0.1, log_z=0.0, mean_logps=False,
                               reduction="mean", micro_tokens=64)
        assert float(total[0]) == pytest.approx(torch.log(torch.tensor(2.0)).item(), abs=1e-6)
        assert float(total[2]) == 0.0 and float(total[4]) == 0.0


def test_metrics_file_is_json_lines_of_known_keys(tmp_path):
    # metrics come from sums and counts, so a key is absent (not NaN) where its count is 0
    from types import SimpleNamespace
    from step import METRICS
    from train import Log
    log = Log(SimpleNamespace(logging_steps=1, output_dir=str(tmp_path)), 0, 0, 2)
    sums = [3.0, 2.0, 0.0, 0.0, -8.0, 4.0, 0.0, 0.0, 1.0, 2.0]
    log.add(1, [0.5, 100.0, *sums], 0.1, 1e-3)
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line["loss"] == 0.5 and line["tokens"] == 100
    assert [line.get(key) for key in METRICS] == [1.5, None, -2.0, None, 0.5]


@pytest.mark.parametrize("reduction", ["mean", "class"])
@pytest.mark.parametrize("name", METHODS)
def test_a_micro_batch_reads_nothing_back_from_the_device(name, reduction):
    # A GPU that is asked for a number in the middle of a step is waited for, and then waits itself
    # while the host prepares the next micro-batch. A meta tensor has no values: what asks for one
    # (.item(), .tolist(), boolean masks, bincount) raises. Bugs this caught: scores.tolist() in the
    # weights of losses and in the metrics, and a bincount in the rewards.
    method = METHODS[name]
    model = make_model(torch.float32, score_head=method.p == "rewards").to("meta")
    trees = make_trees()
    if name == "d2o":
        method, trees = replace(method, loss=partial(method.loss, alpha=0.1)), anchored(trees)
    totals = backward_batch(model, partial(adapters_off, model), method, trees, batch_counts(trees),
                            beta=0.1, log_z=0.0, mean_logps=False, reduction=reduction,
                            micro_tokens=60, device="meta")
    assert totals.device.type == "meta"
    assert all(p.grad.device.type == "meta" for p in trainable(model).values())
