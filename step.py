"""One micro-batch, from trees to gradients: what each --method means, and how it is computed.

    trees -> stream -> hidden -> log-probs of policy and reference -> losses -> backward

The reference is the same weights with adapters off, in its own pass without gradients, and only
over the responses whose loss asks for it. Losses are divided by the counts of the whole global
batch, so packing, micro-batches and ranks leave the gradient as it is.
"""
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from attention import to_device
from kernels import linear_logps
from lora import lora_disabled
from model import Llama
from reward import feed_last_tokens, stream_rewards
from trees import Stream, Tree, build_stream, pack
from ulma import (d2o_loss, dpo_loss, mse_reward_model_loss, negative_dpo_loss, pointwise_dpo_loss,
                  pointwise_mse_loss, pointwise_reward_model_loss, positive_dpo_loss,
                  response_logps, reward_model_loss, sft_loss, ulma_loss, ulma_mse_loss,
                  unlearning_loss, unlikelihood_loss)


# ---- methods ------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Method:
    """What --method stands for: `loss` of log-probs of policy p and reference r, [R] each.

    A reward model has no reference, and p are its rewards.
    """
    uses: str            # responses it trains on: "all", "positive", "negative", "pairs", or
                         # "anchors": negatives, each beside what the model itself said
    reference: str       # responses that need the reference: "all", "negative" (z < 1) or "none"
    loss: object         # (p, r, stream, beta, log_z) -> losses, per response or per pair
    p: str = "logps"     # what p is: "logps", or "rewards" of a score head


def anchored_loss(p: Tensor, r: Tensor, stream: Stream, beta: float, log_z: float,
                  alpha: float) -> Tensor:
    """`d2o_loss` of a stream of trees [negative, anchor 1 .. K] with K pairs each: [P]."""
    p, r = (logps.view(len(p) - len(stream.pairs), -1) for logps in (p, r))      # [P, 1 + K]
    return d2o_loss(p[:, 1:], p[:, 0], r[:, 1:], r[:, 0], beta, alpha)           # [P]


METHODS = {
    "ulma":          Method("all", "negative",
                            lambda p, r, s, b, c: ulma_loss(p, r, s.scores, b, c)),
    "ulma_mse":      Method("all", "all",
                            lambda p, r, s, b, c: ulma_mse_loss(p, r, s.scores, b, c)),
    "pointwise_dpo": Method("all", "all",
                            lambda p, r, s, b, c: pointwise_dpo_loss(p, r, s.scores, b, c)),
    "pointwise_mse": Method("all", "all",
                            lambda p, r, s, b, c: pointwise_mse_loss(p, r, s.scores, b, c)),
    "dpo":           Method("pairs", "all",
                            lambda p, r, s, b, c: dpo_loss(*p[s.pairs].T, *r[s.pairs].T, b)),
    "sft":           Method("positive", "none", lambda p, r, s, b, c: sft_loss(p)),
    "positive_dpo":  Method("positive", "all", lambda p, r, s, b, c: positive_dpo_loss(p, r, b, c)),
    "unlearning":    Method("negative", "none", lambda p, r, s, b, c: unlearning_loss(p)),
    "negative_dpo":  Method("negative", "all", lambda p, r, s, b, c: negative_dpo_loss(p, r, b, c)),
    "d2o":           Method("anchors", "all", anchored_loss),     # alpha is bound by the caller
    "unlikelihood":  Method("all", "none", lambda p, r, s, b, c: unlikelihood_loss(p, s.scores)),
    "reward_model":  Method("pairs", "none",
                            lambda p, r, s, b, c: reward_model_loss(*p[s.pairs].T), p="rewards"),
    "pointwise_reward_model": Method(
        "all", "none", lambda p, r, s, b, c: pointwise_reward_model_loss(p, s.scores), p="rewards"),
    "mse_reward_model": Method(
        "all", "none", lambda p, r, s, b, c: mse_reward_model_loss(p, s.scores), p="rewards"),
}
NEEDS_REFERENCE = {"all": lambda score: True, "negative": lambda score: score < 1,
                   "none": lambda score: False}


def check_fit(name: str, records) -> None:
    """Raise ValueError, naming the methods that fit, if `name` cannot train on these records."""
    scores = {score for record in records for score in record.scores}
    has = {"all": bool(scores), "positive": 1 in scores, "negative": 0 in scores,
           "anchors": 0 in scores,
           "pairs": any(len(set(record.scores)) > 1 for record in records)}
    # these are more than SFT only through their bad responses
    needs_bad = {"ulma", "ulma_mse", "pointwise_dpo", "pointwise_mse", "unlikelihood",
                 "pointwise_reward_model", "mse_reward_model"}
    fit = [method for method in METHODS if has[METHODS[method].uses]
           and (method not in needs_bad or min(scores) < 1)]
    if name not in fit:
        lack = {"pairs": "no prompt has a better and a worse response",
                "positive": "no response has z = 1", "negative": "no response has z = 0",
                "anchors": "no response has z = 0",
                "all": "no response has z < 1"}[METHODS[name].uses]
        raise ValueError(f"--method {name} does not fit the data: {lack}; methods that fit: "
                         f"{', '.join(fit) or 'none'}")


# ---- the reference ------------------------------------------------------------------------------

@contextmanager
def adapters_off(model):
    """Reference under LoRA: the same weights with adapters off."""
    with lora_disabled(model):
        yield model


@contextmanager
def frozen_copy(model):
    """Reference when all weights are trained: a copy that is not."""
    yield model


# ---- one micro-batch ----------------------------------------------------------------------------

def scored_hidden(model: Llama, stream: Stream) -> Tensor:
    """The hidden state that predicts each label of a stream: [N, D].

    Behind its attention the last layer is computed for these only; for all where something there is
    trained, so that its dropout and the order of its gradient's sums do not hang on this saving.
    """
    last = model.model.layers[-1]
    behind = [*last.self_attn.o_proj.parameters(), *last.mlp.parameters(), model.lm_head.weight]
    rows = None if any(p.requires_grad for p in behind) else stream.rows
    hidden = model(stream.input_ids, stream.position_ids, stream.segments, rows=rows)
    return hidden.index_select(0, stream.predict_from if rows is None else stream.row_ids)


def token_logps(model: Llama, reference, stream: Stream, reference_stream: Stream | None,
                linear_logps=linear_logps) -> tuple[Tensor, Tensor]:
    """log π and log π_ref of every scored token of a stream: [N], [M] float32, nats.

    model             the policy
    reference         context manager inside which it gives the model to use as reference
    reference_stream  the same trees with only the responses that need a reference; None for none
    linear_logps      which of kernels/ computes them
    """
    hidden, head = scored_hidden(model, stream), model.lm_head.weight            # [N, D]
    reference_hidden, reference_labels = hidden.new_empty(0, hidden.shape[1]), stream.labels[:0]
    reference_head = head
    if reference_stream is not None:
        with torch.no_grad(), reference() as frozen:
            reference_hidden = scored_hidden(frozen, reference_stream)           # [M, D]
            reference_head = frozen.lm_head.weight
        reference_labels = reference_stream.labels
    if reference_head is head:
        return linear_logps(hidden, reference_hidden, head, stream.labels,
                            reference_labels)                                    # [N], [M]
    # all weights are trained, the head among them
    policy, _ = linear_logps(hidden, hidden[:0], head, stream.labels, stream.labels[:0])
    _, frozen = linear_logps(hidden[:0].detach(), reference_hidden, reference_head,
                             reference_labels[:0], reference_labels)
    return policy, frozen


def sequence_logps(model: Llama, reference, stream: Stream, reference_stream: Stream | None,
                   mean: bool = False, linear_logps=linear_logps) -> tuple[Tensor, Tensor]:
    """log π(y | x) and log π_ref(y | x) of every response of a stream: [R] each, float32, nats.

    mean    length averages, as in the authors' code
    others  see `token_logps`; a response left out of reference_stream gets 0
    """
    policy, frozen = token_logps(model, reference, stream, reference_stream,
                                 linear_logps)                                   # [N], [M]
    owners = stream.response_ids[:0] if reference_stream is None else reference_stream.response_ids
    return (response_logps(policy, stream.response_ids, len(stream.scores), mean),
            response_logps(frozen, owners, len(stream.scores), mean))


@torch.no_grad()
def reference_logps(reference, trees: list[Tree], wanted, mean: bool, micro_tokens: int,
                    linear_logps=linear_logps, attention: str = "dense") -> list[list[float]]:
    """log π_ref(y | x) of every response of every tree, nats, to be kept; 0 for those not wanted.

    wanted   score -> bool: which responses
    others   see `sequence_logps`, `backward_batch`
    """
    logps = []
    with reference() as frozen:
        head = frozen.lm_head.weight
        for group in pack(trees, micro_tokens):
            stream = build_stream(group, head.device, wanted, attention)
            if stream is None:
                logps += [0.0] * sum(len(tree.scores) for tree in group)
                continue
            hidden = scored_hidden(frozen, stream)                               # [N, D]
            _, per_token_logps = linear_logps(hidden[:0], hidden, head, stream.labels[:0],
                                              stream.labels)                     # [N]
            logps += response_logps(per_token_logps, stream.response_ids, len(stream.scores),
                                    mean).tolist()
    ends = torch.tensor([len(tree.scores) for tree in trees]).cumsum(0).tolist()
    return [logps[end - len(tree.scores):end] for end, tree in zip(ends, trees)]


def loss_weights(scores: Tensor, pairs: Tensor, counts: dict, reduction: str, uses: str) -> Tensor:
    """1 / (what the loss is averaged over, in the whole global batch), per loss.

    "mean": over all responses (or pairs). "class": the mean over positives plus the mean over
    the others, as the authors' code forms per micro-batch; here the counts are the batch's.
    """
    if uses == "pairs":
        count, number = counts["pairs"], len(pairs)
    elif uses == "anchors":              # a tree of 1 + K responses and K pairs has one loss
        count, number = counts["responses"] - counts["pairs"], len(scores) - len(pairs)
    else:
        count, number = counts["responses"], len(scores)
    if reduction == "mean" or uses in ("pairs", "anchors"):
        return scores.new_full((number,), 1 / count, dtype=torch.float64)
    others = counts["responses"] - counts["positive"]
    weights = torch.tensor([1 / max(1, others), 1 / max(1, counts["positive"])],
                           dtype=torch.float64)
    return to_device(weights, scores.device)[(scores == 1).long()]


def batch_counts(trees: list[Tree]) -> dict:
    """How many responses, positives (z = 1) and pairs a global batch has."""
    return {"responses": sum(len(tree.scores) for tree in trees),
            "positive": sum(tree.scores.count(1.0) for tree in trees),
            "pairs": sum(len(tree.pairs) for tree in trees)}


METRICS = ("rewards/positive", "rewards/negative", "logps/positive", "logps/negative",
           "rewards/accuracies")


def metric_sums(logps: Tensor | None, rewards: Tensor, has_reward, stream: Stream) -> Tensor:
    """(sum, count) of each of METRICS over a stream: [2 · 5].

    logps       [R] float, detached; None from a reward model
    rewards     [R] float, detached: of a score head, or beta · log-ratios
    has_reward  True, False or [R] bool: a policy's responses have one where they met the reference
    Positive is z = 1, negative z < 1; accuracies count pairs whose chosen response has the larger
    reward, where all responses have one.
    """
    positive = stream.scores == 1                                                # [R]
    masks = [positive & has_reward, ~positive & has_reward, positive, ~positive]
    if logps is None:
        logps, masks[2:] = rewards, [torch.zeros_like(positive)] * 2
    sums = [part for value, mask in zip((rewards, rewards, logps, logps), masks)
            for part in ((value * mask).sum(), mask.sum())]
    chosen, rejected = rewards[stream.pairs].T if has_reward is True else rewards.new_empty(2, 0)
    sums += [(chosen > rejected).sum(), rewards.new_full((), len(chosen))]
    return torch.stack([part.double() for part in sums])


def micro_batches(trees: list[Tree], method: Method, micro_tokens: int) -> list[list[Tree]]:
    """The trees of each forward pass; see trees.pack."""
    return pack(feed_last_tokens(trees) if method.p == "rewards" else trees, micro_tokens)


def idle(model: Llama, reference, device) -> None:
    """The passes of a micro-batch with nothing in it: one token, and a gradient of zero."""
    token = torch.zeros(1, dtype=torch.int64, device=device)
    hidden = model(token)                                                        # [1, D]
    if reference is not None:
        with torch.no_grad(), reference() as frozen:
            frozen(token)
    (0 * hidden.sum()).backward()


def backward_batch(model: Llama, reference, method: Method, trees: list[Tree], counts: dict, *,
                   beta: float, log_z: float, mean_logps: bool, reduction: str, micro_tokens: int,
                   device="cpu", linear_logps=linear_logps, attention: str = "dense",
                   lockstep: int = 0) -> Tensor:
    """Accumulate the gradient of this rank's share of a batch; returns [loss, tokens, *METRICS].

    reference  None where the trees keep their reference_logps
    trees      this rank's; counts, of the whole batch (see `loss_weights`)
    attention  see trees.build_stream
    lockstep   micro-batches of the rank that has most, where layers are sharded: their weights are
               gathered on all ranks at a time, so every rank runs as many passes
    Reads nothing back from the device: what a step found is in its result.
    """
    needs_reference, is_reward_model = NEEDS_REFERENCE[method.reference], method.p == "rewards"
    totals = torch.zeros(2 + 2 * len(METRICS), dtype=torch.float64, device=device)
    groups = micro_batches(trees, method, micro_tokens)
    for group in groups:
        stream = build_stream(group, device, None, attention)
        if is_reward_model:
            policy, frozen = stream_rewards(model, stream), None                  # [R]
            metrics = metric_sums(None, policy.detach(), True, stream)
        else:
            kept = group[0].reference_logps is not None
            reference_stream = (None if kept else stream if method.reference == "all"
                                else build_stream(group, device, needs_reference, attention))
            if lockstep and method.reference == "negative":
                reference_stream = reference_stream or stream    # nobody looks at what it says
            policy, frozen = sequence_logps(                                      # [R], [R]
                model, reference, stream, reference_stream, mean_logps, linear_logps)
            if kept:
                frozen = to_device(torch.tensor([r for tree in group for r in tree.reference_logps],
                                                dtype=policy.dtype), device)
            metrics = metric_sums(policy.detach(), beta * (policy.detach() - frozen),
                                  needs_reference(stream.scores), stream)
        losses = method.loss(policy, frozen, stream, beta, log_z)                 # [R] or [P]
        loss = (losses * loss_weights(stream.scores, stream.pairs, counts, reduction,
                                      method.uses)).sum()
        loss.backward()
        totals[0] += loss.detach()
        totals[1] += len(stream.input_ids)
        totals[2:] += metrics
    for _ in range(lockstep - len(groups)):
        idle(model, reference if method.reference != "none" else None, device)
    return totals
