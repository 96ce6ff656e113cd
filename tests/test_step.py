"""Packing, prompt sharing, micro-batches and ranks leave loss and gradient as they are."""
from functools import partial

import pytest
import torch
from helpers import anchored, backward, flat_gradient, make_model, make_trees, run_ranks, usable
from plain import plain_hidden, plain_logps
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import linear_logps
from lora import lora_disabled, lora_layers
from model import Llama
from packing import Tree, build_stream, deal
from step import (METHODS, METRICS, Compute, Objective, batch_counts, micro_batches,
                  scored_hidden, sequence_logps, token_logps, tree_logps, tree_rewards)
from train import accumulate_gradient
from training.checkpoint import trainable
from training.setup import make_objective
from ulma import response_logps

SETTINGS = dict(beta=0.3, log_z=0.2, alpha=0.7)


def gradient(trees, name, shares=None, dtype=torch.float64, **settings):
    """(loss, flat gradient) of one batch, its trees dealt to `shares` ranks played in turn."""
    model, loss = make_model(dtype, score_head=METHODS[name].reward_model), 0.0
    for share in shares or [trees]:
        totals = backward(model, share, name, batch=trees, **(SETTINGS | settings))
        loss += float(totals[0])
    return loss, flat_gradient(model)


# ---- the same in the plain way ------------------------------------------------------------------

def plain_pair_losses(name, trees, policy, reference):
    """Of the methods that train on pairs: [P]."""
    pairs, first = [], 0
    for tree in trees:
        pairs += [(first + i, first + j) for i, j in tree.pairs]
        first += len(tree.scores)
    i, j = torch.tensor(pairs).T
    margins = policy[i] - policy[j]
    if name == "ipo":
        return (margins - reference[i] + reference[j] - 1 / 0.6) ** 2
    if name == "dpo":
        margins = 0.3 * (margins - reference[i] + reference[j])
    if name == "simpo":                                      # of length averages; gamma 0.15
        margins = 0.3 * margins - 0.15
    return -torch.log(torch.sigmoid(margins))


def plain_losses(name, trees, policy, reference):
    """The losses written out again, with σ and log: [R], or one per pair or tree."""
    if METHODS[name].trains_on == "pairs":
        return plain_pair_losses(name, trees, policy, reference)
    sigmoid = torch.sigmoid
    if name == "d2o":
        rho = policy - torch.tensor(sum((tree.reference_logps for tree in trees), []))
        return -torch.log(sigmoid(0.3 / 2 * (rho[1::3] + rho[2::3]) - 0.7 * rho[::3]))
    z = torch.tensor(sum((tree.scores for tree in trees), []), dtype=torch.float64)
    h = 0.3 * (policy - reference) + 0.2
    return {
        "sft": -policy, "unlearning": policy, "unlikelihood": (1 - 2 * z) * policy,
        "pointwise_dpo": -z * torch.log(sigmoid(h)) - (1 - z) * torch.log(1 - sigmoid(h)),
        "bco": -z * torch.log(sigmoid(h)) - (1 - z) * torch.log(1 - sigmoid(h)),
        "kto": z * (1 - sigmoid(h)) + (1 - z) * sigmoid(h),
        "pointwise_mse": (z - h) ** 2,
        "ulma": -z * policy - (1 - z) * torch.log(1 - sigmoid(h)),
        "ulma_mse": (z - h) ** 2 - (z == 1) * policy,
        "positive_dpo": -torch.log(sigmoid(h)), "negative_dpo": -torch.log(1 - sigmoid(h)),
        "pointwise_reward_model": (-z * torch.log(sigmoid(policy))
                                   - (1 - z) * torch.log(1 - sigmoid(policy))),
        "mse_reward_model": (z - policy) ** 2,
    }[name]


def plain_gradient(trees, name, reduction, mean_logps):
    """(loss, flat gradient) by tests/plain.py: padded rows, one per response, and autograd."""
    model = make_model(score_head=METHODS[name].reward_model)
    config = model.config
    weights = {key: value.detach().clone() for key, value in model.state_dict().items()}
    trained = {key: weights[key].requires_grad_() for key in trainable(model)}
    base = {key: value for key, value in weights.items() if key not in trained}
    examples = [(tree.prompt_ids, ids) for tree in trees for ids in tree.response_ids]
    policy = plain_logps(base | trained, config, examples, scaling=2.0)
    reference = plain_logps(base, config, examples).detach()
    if METHODS[name].reward_model:                    # at the last token, wherever a row ends
        hidden = plain_hidden(base | trained, config, [p + y for p, y in examples], scaling=2.0)
        last = torch.stack([row[len(p + y) - 1] for row, (p, y) in zip(hidden, examples)])
        policy = last @ trained["score.weight"][0]
    if mean_logps or name == "simpo":
        lengths = torch.tensor([len(ids) for _, ids in examples], dtype=torch.float64)
        policy, reference = policy / lengths, reference / lengths
    losses = plain_losses(name, trees, policy, reference)
    if reduction == "mean":
        loss = losses.mean()
    else:
        good = torch.tensor(sum((tree.scores for tree in trees), [])) == 1
        loss = sum(losses[mask].mean() for mask in (good, ~good) if mask.any())
    loss.backward()
    return float(loss.detach()), torch.cat([p.grad.flatten() for p in trained.values()])


# ---- loss and gradient --------------------------------------------------------------------------

@pytest.mark.parametrize("name", METHODS)
def test_every_method_equals_the_plain_padded_implementation(name):
    # No padding, shared prompts, response-only head, gradient formed in the forward: all at once
    # against one padded row per response, full logits and autograd.
    trees = usable(make_trees(), METHODS[name].trains_on)
    loss, grad = gradient(trees, name)
    plain_loss, plain_grad = plain_gradient(trees, name, "mean", False)
    assert loss == pytest.approx(plain_loss, rel=1e-9)
    torch.testing.assert_close(grad, plain_grad, rtol=1e-9, atol=1e-9)


def test_the_authors_average_log_probs_but_not_those_of_pairs():
    # average_log_prob is False in their DPO; both means of positives and others everywhere else.
    for name, mean in (("ulma", True), ("unlikelihood", True), ("dpo", False), ("ipo", False)):
        objective = make_objective({"reduction": "authors", "beta": 0.1}, METHODS[name])
        assert (objective.mean_logps, objective.reduction) == (mean, "class"), name
        assert make_objective({"reduction": "tokens", "beta": 0.1}, METHODS[name]).mean_logps


@pytest.mark.parametrize("name", ["ulma", "pointwise_dpo", "unlikelihood", "kto"])
def test_the_authors_reductions_equal_the_plain_implementation(name):
    # --reduction authors, with class counts of the whole batch
    trees = make_trees()
    loss, grad = gradient(trees, name, reduction="class", mean_logps=True,
                          compute=Compute(micro_tokens=30))
    plain_loss, plain_grad = plain_gradient(trees, name, "class", True)
    assert loss == pytest.approx(plain_loss, rel=1e-9)
    torch.testing.assert_close(grad, plain_grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["ulma", "dpo", "ipo", "simpo", "kto", "ulma_mse", "d2o",
                                  "reward_model", "mse_reward_model"])
@pytest.mark.parametrize("reduction", ["mean", "class"])
def test_packing_micro_batches_and_sharing_change_nothing(name, reduction):
    trees = usable(make_trees(), METHODS[name].trains_on)
    loss, grad = gradient(trees, name, reduction=reduction)
    split = trees if METHODS[name].trains_on in ("pairs", "anchors") else [
        Tree(tree.prompt_ids, [ids], [z], [])
        for tree in trees for ids, z in zip(tree.response_ids, tree.scores)]
    for other, micro_tokens in ((trees, 1), (trees, 40), (trees[::-1], 8192), (split, 50)):
        other_loss, other_grad = gradient(other, name, reduction=reduction,
                                          compute=Compute(micro_tokens=micro_tokens))
        assert other_loss == pytest.approx(loss, rel=1e-9)
        torch.testing.assert_close(other_grad, grad, rtol=1e-9, atol=1e-9)


def test_float32_agrees_to_1e5_relative():
    trees = make_trees()
    loss, grad = gradient(trees, "ulma")
    loss32, grad32 = gradient(trees, "ulma", compute=Compute(micro_tokens=40), dtype=torch.float32)
    assert loss32 == pytest.approx(loss, rel=1e-5)
    assert (grad32.double() - grad).norm() < 1e-5 * grad.norm()


@pytest.mark.parametrize("world_size", [2, 3, 20])
def test_shares_of_ranks_sum_to_the_whole_batch(world_size):
    # 20 ranks, 11 trees: some ranks have nothing to do
    trees = make_trees()
    loss, grad = gradient(trees, "ulma", reduction="class")
    shares = deal(trees, world_size)
    other_loss, other_grad = gradient(trees, "ulma", shares, reduction="class")
    assert other_loss == pytest.approx(loss, rel=1e-9)
    torch.testing.assert_close(other_grad, grad, rtol=1e-9, atol=1e-9)


def test_gloo_ranks_with_skewed_classes_give_the_gradient_of_one_process(tmp_path):
    # Per-rank class means would be off by tens of percent here; rank 2 of 3 has no tree at all.
    names = ("ulma", "simpo", "kto", "reward_model", "pointwise_reward_model")
    run_ranks(tmp_path, f"""
from training.ranks import all_reduce_gradients_
found = []
for name in {names!r}:
    method = METHODS[name]
    model = make_model(score_head=method.reward_model)
    trees = usable(make_trees(), method.trains_on)
    # skewed on purpose: rank 0 gets every tree that has a negative first
    shares = [[t for t in trees if t.scores[0] == 0], [t for t in trees if t.scores[0] != 0], []]
    totals = backward(model, shares[rank], name, batch=trees, beta=0.3, log_z=0.2,
                      reduction="class", compute=Compute(micro_tokens=40))
    totals = all_reduce_gradients_(list(trainable(model).values()), totals)
    found.append((totals, flat_gradient(model)))
if rank == 0:
    torch.save(found, {str(tmp_path / "out.pt")!r})
""", ranks=3)
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    for name, (totals, grad) in zip(names, found, strict=True):
        loss, expected = gradient(usable(make_trees(), METHODS[name].trains_on), name,
                                  reduction="class")
        assert float(totals[0]) == pytest.approx(loss, rel=1e-9)
        torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-9)


# ---- the reference ------------------------------------------------------------------------------

def test_no_gradient_reaches_the_reference_and_ulma_runs_it_on_negatives_only():
    # Count the rows the head sees: policy rows of all responses, reference rows of z < 1 only.
    seen = []

    def spy(policy_hidden, reference_hidden, *rest):
        seen.append((len(policy_hidden), len(reference_hidden), reference_hidden.requires_grad))
        return linear_logps(policy_hidden, reference_hidden, *rest)

    trees = make_trees()
    gradient(trees, "ulma", compute=Compute(linear_logps=spy))
    count = [(len(ids), z) for tree in trees for ids, z in zip(tree.response_ids, tree.scores)]
    assert seen == [(sum(n for n, _ in count), sum(n for n, z in count if z < 1), False)]


def test_log_probs_of_one_model_are_those_of_the_plain_implementation():
    # Policy and reference apart, as eval.py and the reference cache ask for them; 0 where a
    # response is not wanted.
    model, trees = make_model(), make_trees()
    examples = [(tree.prompt_ids, ids) for tree in trees for ids in tree.response_ids]
    expected = plain_logps(model.state_dict(), model.config, examples).detach()
    scores, stream = sum((tree.scores for tree in trees), []), build_stream(trees)
    with torch.no_grad(), lora_disabled(model) as reference:
        per_token = token_logps(reference, stream)
        assert per_token.shape == stream.labels.shape
        torch.testing.assert_close(response_logps(per_token, stream.response_ids, len(scores)),
                                   expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(sequence_logps(reference, stream), expected, rtol=1e-9,
                                   atol=1e-9)
    logps = tree_logps(partial(lora_disabled, model), trees, lambda score: score < 1, True,
                            Compute(micro_tokens=40))
    assert [len(row) for row in logps] == [len(tree.scores) for tree in trees]
    lengths = torch.tensor([len(ids) for _, ids in examples], dtype=torch.float64)
    expected = torch.where(torch.tensor(scores) < 1, expected / lengths, 0.0)
    torch.testing.assert_close(torch.tensor(sum(logps, []), dtype=torch.float64), expected,
                               rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["ulma", "dpo", "sft"])
def test_every_rank_of_a_sharded_model_runs_as_many_passes(name):
    # Policy passes and reference passes both, whatever a rank's share is: none, or good responses
    # alone. What is only there to keep step has no label and no loss.
    trees = usable(make_trees(), METHODS[name].trains_on)
    good = [tree for tree in trees if min(tree.scores) == 1]
    for share in ([], good, trees):
        streams = list(micro_batches(share, METHODS[name], Compute(micro_tokens=60), passes=9))
        assert len(streams) == 9
        assert all(len(stream.input_ids) for stream, _ in streams)
        assert [len(reference.input_ids) > 0 for _, reference in streams] == [name != "sft"] * 9
        assert sum(len(stream.scores) for stream, _ in streams) == sum(
            len(tree.scores) for tree in share)


# ---- memory and waiting -------------------------------------------------------------------------

def test_gradient_checkpointing_changes_no_bit_and_saves_memory():
    # Each layer runs again in the backward, with the dropout masks it drew first. Frozen embeddings
    # must not cut the graph: the reentrant form would give no adapter of the first layers a
    # gradient. Saved for the backward: a layer's input, not its some twenty intermediate tensors.
    grads, saved = [], []
    for checkpointing in (False, True):
        model = make_model()
        model.gradient_checkpointing = checkpointing
        for layer in lora_layers(model).values():
            layer.dropout = 0.3
        torch.manual_seed(5)
        stream, sizes = build_stream(make_trees()), {}
        weights = {p.untyped_storage()._cdata for p in model.parameters()}

        def save(t, sizes=sizes, weights=weights):
            storage = t.untyped_storage()
            if storage._cdata not in weights:
                sizes[storage._cdata] = storage.nbytes()
            return t
        with torch.autograd.graph.saved_tensors_hooks(save, lambda t: t):
            hidden = model(stream.input_ids, stream.position_ids, stream.segments)
        hidden.square().sum().backward()
        grads.append([p.grad for p in trainable(model).values()])
        saved.append(sum(sizes.values()))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert all(grad.abs().sum() > 0 for grad in grads[1])
    assert saved[1] < saved[0] / 4


@pytest.mark.parametrize("trained, all_rows", [
    ("0.self_attn.q_proj", False), ("1.self_attn.v_proj", False), ("0.mlp.down_proj", False),
    ("1.self_attn.o_proj", True), ("1.mlp.gate_proj", True), ("1.mlp.down_proj", True),
    ("lm_head", True)])
def test_behind_its_attention_the_last_layer_runs_on_scored_rows_unless_it_is_trained(
        monkeypatch, trained, all_rows):
    # Dropout there draws for every row, and a gradient sums over all of them: fewer rows would
    # change the bits. The reference, adapters off, makes the same choice.
    model = make_model().requires_grad_(False)
    model.get_submodule(trained if trained == "lm_head" else f"model.layers.{trained}"
                        ).requires_grad_(True)
    stream, found, forward = build_stream(make_trees()), [], Llama.forward

    def recording(*args, rows=None):
        found.append(rows)
        return forward(*args, rows=rows)

    monkeypatch.setattr(Llama, "forward", recording)
    assert scored_hidden(model, stream).shape == (len(stream.labels), 32)
    with lora_disabled(model) as reference, torch.no_grad():
        assert scored_hidden(reference, stream).shape == (len(stream.labels), 32)
    expected = None if all_rows else stream.rows
    assert len(found) == 2 and all(rows is expected for rows in found)


def test_at_the_start_policy_equals_reference_to_the_bit():
    # lora_B = 0: every reward is exactly 0, so DPO and point-wise DPO are log 2.
    model = make_model(torch.float32)
    for name, p in trainable(model).items():
        if name.endswith("lora_B"):
            torch.nn.init.zeros_(p)
    for name in ("dpo", "pointwise_dpo"):
        trees = usable(make_trees(), METHODS[name].trains_on)
        totals = backward(model, trees, name, compute=Compute(micro_tokens=64))
        assert float(totals[0]) == pytest.approx(torch.log(torch.tensor(2.0)).item(), abs=1e-6)
        assert float(totals[2]) == 0.0 and float(totals[4]) == 0.0


@pytest.mark.parametrize("name", ["dpo", "simpo", "reward_model", "pointwise_dpo", "sft"])
def test_accuracies_and_margins_are_those_of_the_pairs_rewards(name):
    # beta times the log-ratio; SimPO's reward is beta times the mean log-prob; a policy trained
    # without either has no reward at all.
    trees, model = make_trees(), make_model(score_head=METHODS[name].reward_model)
    totals = backward(model, trees, name, beta=0.3, compute=Compute(micro_tokens=40)).tolist()
    found = {key: totals[2 + 2 * n:4 + 2 * n] for n, key in enumerate(METRICS)}
    if name == "sft":
        assert found["rewards/accuracies"] == found["rewards/margins"] == [0.0, 0.0]
        return
    if name == "reward_model":
        rewards = tree_rewards(model, trees)
    else:
        with torch.no_grad(), lora_disabled(model) as reference:
            zero = sequence_logps(reference, build_stream(trees))
        mean = name == "simpo"
        rewards = 0.3 * (sequence_logps(model, build_stream(trees), mean) - (0 if mean else zero))
    chosen, rejected = rewards[build_stream(trees).pairs].detach().T
    expected = [(chosen > rejected).sum(), (chosen - rejected).sum()]
    for key, value in zip(("rewards/accuracies", "rewards/margins"), expected, strict=True):
        assert found[key] == pytest.approx([float(value), len(chosen)], rel=1e-9)


@pytest.mark.parametrize("reduction", ["mean", "class"])
@pytest.mark.parametrize("name", METHODS)
def test_a_micro_batch_reads_nothing_back_from_the_device(name, reduction):
    # A GPU that is asked for a number in the middle of a step is waited for, and then waits itself
    # while the host prepares the next micro-batch. A meta tensor has no values: what asks for one
    # (.item(), .tolist(), boolean masks, bincount) raises. Bugs this caught: scores.tolist() in the
    # weights of losses and in the metrics, and a bincount in the rewards.
    method = METHODS[name]
    model = make_model(torch.float32, score_head=method.reward_model).to("meta")
    trees = anchored(make_trees()) if name == "d2o" else make_trees()
    totals = backward(model, trees, name, reduction=reduction, alpha=0.1,
                      compute=Compute(device="meta", micro_tokens=60))
    assert totals.device.type == "meta"
    assert all(p.grad.device.type == "meta" for p in trainable(model).values())


@pytest.mark.parametrize("name", METHODS)
def test_a_micro_batch_copies_no_number_from_the_host(name):
    # loss.new_tensor(5) on a GPU copies from memory that is not pinned, which waits for the device
    # too; here it shows as lift_fresh. Streams are prepared before: they are copied from pinned
    # memory.
    class Refuse(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert function != torch.ops.aten.lift_fresh.default, "a number of the host"
            return function(*args, **kwargs or {})
    method = METHODS[name]
    model = make_model(torch.float32, score_head=method.reward_model)
    trees = usable(make_trees(), method.trains_on)
    streams = list(micro_batches(trees, method, Compute(micro_tokens=60)))
    with Refuse():
        accumulate_gradient(model, partial(lora_disabled, model), streams, batch_counts(trees),
                            Objective(method, alpha=0.1), Compute())
