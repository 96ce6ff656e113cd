"""What each --method means, and the parts of one micro-batch; train.py puts them in order.

    trees -> stream -> hidden -> log-probs of policy and reference -> losses -> backward

METHODS is the index of the project. To add an objective: a pure function in ulma.py (imported
here), a function here that gives it what it takes, a row in METHODS; a setting of its own is a
field of Objective and a flag of train.py. Nothing is masked in a loss: prompt tokens are never
labels, so only response tokens are scored.
"""
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from files.cli import show_progress
from kernels import LinearLogps, linear_logps
from kernels.attention import choose_attention, to_device
from model import Llama
from packing import Stream, Tree, build_stream, idle_stream, pack
from ulma import (d2o_loss, dpo_loss, ipo_loss, kto_loss, mse_reward_model_loss, negative_dpo_loss,
                  pointwise_dpo_loss, pointwise_mse_loss, pointwise_reward_model_loss,
                  positive_dpo_loss, response_logps, reward_model_loss, sft_loss, simpo_loss,
                  ulma_loss, ulma_mse_loss, unlearning_loss, unlikelihood_loss)

# Gives, as a context manager, the model to use as reference: partial(lora_disabled, model), the
# same weights with adapters off; or partial(contextlib.nullcontext, other model).
Reference = Callable[[], AbstractContextManager[Llama]]


# ---- what travels together ----------------------------------------------------------------------

@dataclass(frozen=True)
class Method:
    """What a --method stands for."""
    loss: Callable       # (policy_logps [R], reference_logps [R], stream, objective) -> losses,
                         # per response or per pair; a reward model's (rewards [R], None, …)
    trains_on: str       # responses: "all", "positive", "negative", "pairs", or "anchors":
                         # negatives, each beside samples of the model itself
    reference: str       # responses that need the reference: "all", "z < 1" or "none"
    reward_model: bool = False       # trains an adapter and a score head, not a policy
    mean_logps: bool = False         # takes length averages, whatever --reduction is
    log_z: str = "fixed"             # "running" or "mismatched": estimated, see training/log_z.py


@dataclass(frozen=True)
class Objective:
    """A method and its settings."""
    method: Method
    beta: float = 0.1                # KL strength
    log_z: float = 0.0               # stand-in for beta log Z(x)
    alpha: float | None = None       # D2O's weight of the negative's log-ratio
    mean_logps: bool = False         # length averages instead of sums, as in the authors' code
    reduction: str = "mean"          # "mean" or "class", see `loss_weights`
    gamma_beta_ratio: float = 0.5    # SimPO's margin is this times beta


@dataclass(frozen=True)
class Compute:
    """Where and how a micro-batch is computed."""
    device: torch.device | str = "cpu"
    micro_tokens: int = 8192                                         # in one forward pass
    linear_logps: Callable[..., LinearLogps] = linear_logps          # which of kernels/
    attention: str = "dense"                                         # see kernels/attention.py


# ---- methods: what the functions of ulma.py are given -------------------------------------------

def sft(policy_logps: Tensor, reference_logps: Tensor, stream: Stream,
        objective: Objective) -> Tensor:
    return sft_loss(policy_logps)


def unlearning(policy_logps: Tensor, reference_logps: Tensor, stream: Stream,
               objective: Objective) -> Tensor:
    return unlearning_loss(policy_logps)


def unlikelihood(policy_logps: Tensor, reference_logps: Tensor, stream: Stream,
                 objective: Objective) -> Tensor:
    return unlikelihood_loss(policy_logps, stream.scores)


def pointwise(policy_logps: Tensor, reference_logps: Tensor, stream: Stream,
              objective: Objective, loss: Callable[..., Tensor]) -> Tensor:
    """Objectives of single responses with a score: ULMA, pointwise DPO, BCO, KTO."""
    return loss(policy_logps, reference_logps, stream.scores,
                beta=objective.beta, log_z=objective.log_z)


def one_sided(policy_logps: Tensor, reference_logps: Tensor, stream: Stream,
              objective: Objective, loss: Callable[..., Tensor]) -> Tensor:
    """The positive or the negative half of pointwise DPO."""
    return loss(policy_logps, reference_logps, beta=objective.beta, log_z=objective.log_z)


def pairwise(policy_logps: Tensor, reference_logps: Tensor, stream: Stream,
             objective: Objective, loss: Callable[..., Tensor]) -> Tensor:
    """DPO, whose last argument is beta, and IPO, which calls it tau."""
    policy_chosen_logps, policy_rejected_logps = policy_logps[stream.pairs].T            # [P] each
    reference_chosen_logps, reference_rejected_logps = reference_logps[stream.pairs].T
    return loss(policy_chosen_logps, policy_rejected_logps,
                reference_chosen_logps, reference_rejected_logps, objective.beta)


def simpo(mean_logps: Tensor, reference_logps: Tensor, stream: Stream,
          objective: Objective) -> Tensor:
    chosen_mean_logps, rejected_mean_logps = mean_logps[stream.pairs].T          # [P] each
    return simpo_loss(chosen_mean_logps, rejected_mean_logps, beta=objective.beta,
                      gamma=objective.gamma_beta_ratio * objective.beta)


def anchored(policy_logps: Tensor, reference_logps: Tensor, stream: Stream,
             objective: Objective) -> Tensor:
    """Each tree is [negative, anchor 1 .. K], with K pairs."""
    num_trees = len(policy_logps) - len(stream.pairs)
    policy = policy_logps.view(num_trees, -1)                                    # [P, 1 + K]
    reference = reference_logps.view(num_trees, -1)
    return d2o_loss(policy_anchor_logps=policy[:, 1:], policy_negative_logps=policy[:, 0],
                    reference_minus_anchor_logps=reference[:, 1:],
                    reference_plus_negative_logps=reference[:, 0],
                    beta=objective.beta, alpha=objective.alpha)


def paired_rewards(rewards: Tensor, _: None, stream: Stream, objective: Objective) -> Tensor:
    chosen_rewards, rejected_rewards = rewards[stream.pairs].T                   # [P] each
    return reward_model_loss(chosen_rewards, rejected_rewards)


def scored_rewards(rewards: Tensor, _: None, stream: Stream, objective: Objective,
                   loss: Callable[..., Tensor]) -> Tensor:
    return loss(rewards, stream.scores)


METHODS = {
    # name             loss                                         trains on    reference
    "ulma":          Method(partial(pointwise, loss=ulma_loss),          "all", "z < 1"),
    "ulma_mse":      Method(partial(pointwise, loss=ulma_mse_loss),      "all", "all"),
    "pointwise_dpo": Method(partial(pointwise, loss=pointwise_dpo_loss), "all", "all"),
    "pointwise_mse": Method(partial(pointwise, loss=pointwise_mse_loss), "all", "all"),
    "bco":           Method(partial(pointwise, loss=pointwise_dpo_loss), "all", "all",
                            log_z="running"),
    "kto":           Method(partial(pointwise, loss=kto_loss),           "all", "all",
                            log_z="mismatched"),
    "dpo":           Method(partial(pairwise, loss=dpo_loss),            "pairs", "all"),
    "ipo":           Method(partial(pairwise, loss=ipo_loss),            "pairs", "all"),
    "simpo":         Method(simpo,                                     "pairs", "none",
                            mean_logps=True),
    "sft":           Method(sft,                                       "positive", "none"),
    "positive_dpo":  Method(partial(one_sided, loss=positive_dpo_loss), "positive", "all"),
    "unlearning":    Method(unlearning,                                "negative", "none"),
    "negative_dpo":  Method(partial(one_sided, loss=negative_dpo_loss), "negative", "all"),
    "d2o":           Method(anchored,                                  "anchors", "all"),
    "unlikelihood":  Method(unlikelihood,                              "all", "none"),
    "reward_model":  Method(paired_rewards, "pairs", "none", reward_model=True),
    "pointwise_reward_model": Method(
        partial(scored_rewards, loss=pointwise_reward_model_loss), "all", "none",
        reward_model=True),
    "mse_reward_model": Method(
        partial(scored_rewards, loss=mse_reward_model_loss), "all", "none",
        reward_model=True),
}


def needs_reference(method: Method, score: float) -> bool:
    """Whether the loss of a response with this score asks for the reference's log-prob."""
    return method.reference == "all" or (method.reference == "z < 1" and score < 1)


def check_fit(name: str, scores: Collection[float], has_pairs: bool,
              methods: Mapping[str, Method] = METHODS) -> None:
    """Raise ValueError, naming the methods that fit, if `name` cannot train on the data.

    scores      that occur in it
    has_pairs   whether a prompt has a better and a worse response
    """
    has = {"all": any(score < 1 for score in scores),        # else they reduce to SFT
           "positive": 1 in scores, "negative": 0 in scores, "anchors": 0 in scores,
           "pairs": has_pairs}
    fit = [other for other, method in methods.items() if has[method.trains_on]]
    if name not in fit:
        lack = {"pairs": "no prompt has a better and a worse response",
                "positive": "no response has z = 1", "negative": "no response has z = 0",
                "anchors": "no response has z = 0",
                "all": "no response has z < 1"}[methods[name].trains_on]
        raise ValueError(f"--method {name} does not fit the data: {lack}; methods that fit: "
                         f"{', '.join(fit) or 'none'}")


# ---- a model over a stream ----------------------------------------------------------------------

def scored_hidden(model: Llama, stream: Stream) -> Tensor:
    """The hidden state that predicts each label of a stream: [N, D].

    After its attention the last layer runs on the scored positions only; on all positions if the
    weights behind it are trained, so that dropout masks and the order of sums do not change.
    """
    if not len(stream.input_ids):
        return model.lm_head.weight.new_empty(0, model.config.hidden_size)
    last = model.model.layers[-1]
    behind = [*last.self_attn.o_proj.parameters(), *last.mlp.parameters(), model.lm_head.weight]
    if any(p.requires_grad for p in behind):
        hidden = model(stream.input_ids, stream.position_ids, stream.segments)   # [T, D]
        return hidden.index_select(0, stream.predict_from)
    hidden = model(stream.input_ids, stream.position_ids, stream.segments, rows=stream.rows)
    return hidden.index_select(0, stream.row_ids)


def attention_for(model: Llama) -> str:
    """Which way of kernels/attention.py suits the model's device and heads."""
    return choose_attention("auto", model.lm_head.weight.device.type, model.config.head_dim)


def token_logps(model: Llama, stream: Stream,
                linear_logps: Callable[..., LinearLogps] = linear_logps) -> Tensor:
    """log π(y_t | x, y_<t) of every scored token of a stream, by one model: [N] float32, nats."""
    hidden = scored_hidden(model, stream)                                        # [N, D]
    return linear_logps(hidden, hidden[:0].detach(), model.lm_head.weight, stream.labels,
                        stream.labels[:0]).policy_logps


def sequence_logps(model: Llama, stream: Stream, mean: bool = False,
                   linear_logps: Callable[..., LinearLogps] = linear_logps) -> Tensor:
    """log π(y | x) of every response of a stream, by one model: [R] float32, nats.

    mean    length averages, as in the authors' code
    """
    return response_logps(token_logps(model, stream, linear_logps), stream.response_ids,
                          len(stream.scores), mean)


@torch.no_grad()
def tree_logps(reference: Reference, trees: list[Tree], wanted: Callable[[float], bool],
               mean: bool, compute: Compute) -> list[list[float]]:
    """log π_ref(y | x) of every response of every tree, nats, to be cached; 0 where not wanted.

    wanted   score -> bool: which responses
    """
    logps = []
    with reference() as model:
        for group in pack(trees, compute.micro_tokens):
            stream = build_stream(group, compute.device, wanted, compute.attention)
            logps.append(sequence_logps(model, stream, mean, compute.linear_logps))      # [R]
    logps = torch.cat(logps).tolist() if logps else []       # at the end: one wait for the device
    ends = torch.tensor([len(tree.scores) for tree in trees]).cumsum(0).tolist()
    return [logps[end - len(tree.scores):end] for end, tree in zip(ends, trees)]


# ---- reward models ------------------------------------------------------------------------------
# r(x, y) = w · h, h the last layer's state at the last token of the response, EOS included. A
# policy's stream leaves that token out: it predicts nothing. A reward model has to read it: after
# "a b c" the state is the same whether the answer ended there or was cut one token later, and only
# the first of the two deserves a finished answer's reward.

def feed_last_tokens(trees: list[Tree]) -> list[Tree]:
    """Append a dummy label to every response, so that its last token is fed too."""
    return [replace(tree, response_ids=[[*ids, 0] for ids in tree.response_ids]) for tree in trees]


def stream_rewards(model: Llama, stream: Stream) -> Tensor:
    """r(x, y) of every response: [R] float32.

    model    with a score head
    stream   of trees from `feed_last_tokens`: a response's last position is its last token's
    """
    hidden = model(stream.input_ids, stream.position_ids, stream.segments)       # [T, D]
    numbers = torch.arange(len(stream.scores), device=stream.scores.device)      # [R]
    last = torch.searchsorted(stream.response_ids, numbers, right=True) - 1      # [R]
    hidden = hidden.index_select(0, stream.predict_from[last])                   # [R, D]
    return hidden.to(model.score.weight.dtype) @ model.score.weight[0]           # [R]


@torch.no_grad()
def tree_rewards(model: Llama, trees: list[Tree], micro_tokens: int = 8192) -> Tensor:
    """r(x, y) of every response of trees as `packing.make_trees` gives them, in order: [R] float32,
    on the CPU."""
    device = model.score.weight.device
    groups, attention = pack(feed_last_tokens(trees), micro_tokens), attention_for(model)
    return torch.cat([stream_rewards(model, build_stream(group, device, None, attention))
                      for group in show_progress(groups, "rewards: micro-batch", len(groups))]).cpu()


# ---- a rank's share of a batch ------------------------------------------------------------------

def group_trees(trees: list[Tree], method: Method, micro_tokens: int) -> list[list[Tree]]:
    """The trees of every micro-batch."""
    return pack(feed_last_tokens(trees) if method.reward_model else trees, micro_tokens)


def micro_batches(trees: list[Tree], method: Method, compute: Compute,
                  passes: int = 0) -> Iterator[tuple[Stream, Stream]]:
    """(stream, reference stream) of every micro-batch of a rank's share.

    passes    with FSDP: the largest number of micro-batches on any rank. A forward gathers weights
              on all ranks, so all ranks run equally many
    yields    the reference stream holds the responses that need the reference, of the same trees;
              no token where none does, or where the trees have its log-probs cached
    """
    groups = group_trees(trees, method, compute.micro_tokens)
    idle = idle_stream(compute.device) if passes else None
    for group in groups:
        stream = build_stream(group, compute.device, None, compute.attention)
        if method.reference == "none" or stream.reference_logps is not None:
            reference_stream = build_stream([], compute.device)
        elif method.reference == "all":
            reference_stream = stream
        else:
            reference_stream = build_stream(group, compute.device, partial(
                needs_reference, method), compute.attention)
            if passes and not len(reference_stream.input_ids):
                reference_stream = idle       # output unused: it keeps FSDP ranks in step
        yield stream, reference_stream
    for _ in range(passes - len(groups)):
        yield idle, (idle if method.reference != "none" else build_stream([], compute.device))


def batch_counts(trees: list[Tree]) -> dict[str, int]:
    """How many responses, positives (z = 1) and pairs a global batch has."""
    return {"responses": sum(len(tree.scores) for tree in trees),
            "positive": sum(tree.scores.count(1.0) for tree in trees),
            "pairs": sum(len(tree.pairs) for tree in trees)}


def loss_weights(stream: Stream, counts: dict[str, int], objective: Objective) -> Tensor:
    """1 / (what the loss is averaged over, in the whole global batch), per loss: float64.

    counts   of the global batch, see `batch_counts`; so packing, micro-batches and ranks leave the
             gradient as it is
    Reduction "mean": over all responses (or pairs). "class": the mean over positives plus the mean
    over the others, as the authors' code forms per micro-batch; here over the batch.
    """
    trains_on, scores = objective.method.trains_on, stream.scores
    if trains_on == "pairs":
        return scores.new_full((len(stream.pairs),), 1 / counts["pairs"], dtype=torch.float64)
    if trains_on == "anchors":           # a tree of 1 + K responses and K pairs has one loss
        return scores.new_full((len(scores) - len(stream.pairs),),
                               1 / (counts["responses"] - counts["pairs"]), dtype=torch.float64)
    if objective.reduction == "mean":
        return scores.new_full((len(scores),), 1 / counts["responses"], dtype=torch.float64)
    others = counts["responses"] - counts["positive"]
    weights = torch.tensor([1 / max(1, others), 1 / max(1, counts["positive"])],
                           dtype=torch.float64)
    return to_device(weights, scores.device)[(scores == 1).long()]


METRICS = ("rewards/positive", "rewards/negative", "logps/positive", "logps/negative",
           "rewards/accuracies", "rewards/margins")


@torch.no_grad()
def metric_sums(policy: Tensor, reference_logps: Tensor | None, stream: Stream,
                objective: Objective) -> Tensor:
    """(sum, count) of each of METRICS over a stream: [2 · 6] float64.

    policy           [R] float   log-probs, or a reward model's rewards
    reference_logps  [R] float   None from a reward model
    Positive is z = 1, negative z < 1. A policy's implicit reward is beta times its log-ratio, of
    responses for which the reference was run, and SimPO's beta times the mean log-prob; accuracies
    count pairs whose chosen response has the larger reward, where all responses have one, margins
    are by how much.
    """
    method, positive = objective.method, stream.scores == 1
    everywhere = torch.ones_like(positive)
    if method.reward_model:
        rewards, logps, has_reward, has_logps = policy, policy, everywhere, ~everywhere
    else:
        rewards, logps, has_logps = objective.beta * (policy - reference_logps), policy, everywhere
        has_reward = everywhere if method.trains_on == "pairs" else {
            "all": everywhere, "z < 1": stream.scores < 1,
            "none": ~everywhere}[method.reference]
    sums = []
    for values, mask in ((rewards, positive & has_reward), (rewards, ~positive & has_reward),
                         (logps, positive & has_logps), (logps, ~positive & has_logps)):
        sums += [(values * mask).sum(), mask.sum()]
    chosen, rejected = rewards[stream.pairs].T
    of_all = method.reward_model or method.reference == "all" or method.trains_on == "pairs"
    num_pairs = rewards.new_full((), len(chosen) if of_all else 0)
    sums += [of_all * (chosen > rejected).sum(), num_pairs,
             of_all * (chosen - rejected).sum(), num_pairs]
    return torch.stack([part.double() for part in sums])
