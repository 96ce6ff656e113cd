"""Responses that a run was not trained on, measured: by eval.py after it, by train.py during it.

Both read their numbers off the same HeldOut, so the last that --eval_steps gives are eval.py's.
"""
import math
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from files.cli import show_progress
from intervals import wins
from model import Llama, linear
from packing import Tree, build_stream, deal, idle_stream, mismatched_trees, pack
from step import (Compute, Objective, Reference, feed_last_tokens, scored_hidden, stream_rewards)
from training.ranks import Ranks, gather

HEAD_ROWS = 512              # of both models' logits in memory at a time


class HeldOut(NamedTuple):
    """R responses and P pairs of them; float64, on the CPU."""
    scores: Tensor               # [R]      z
    pairs: Tensor                # [P, 2]   int64: better, worse
    policy_logps: Tensor         # [R]      Σ_t log π(y_t | x, y_<t), nats; reward model: r(x, y)
    reference_logps: Tensor      # [R]      the same under π_ref, NaN without one; reward model: 0
    kls: Tensor                  # [R]      Σ_t KL(π(· | x, y_<t) || π_ref(· | x, y_<t)), nats
    lengths: Tensor              # [R]      tokens, EOS included


# ---- forward passes -----------------------------------------------------------------------------

def compare_tokens(hidden: Tensor, head: Tensor, reference_hidden: Tensor, reference_head: Tensor,
                   labels: Tensor) -> Tensor:
    """log π, log π_ref of every label, and KL(π || π_ref) where it stands: [3, N] float32, nats."""
    columns = []
    for rows, reference_rows, ids in zip(*(t.split(HEAD_ROWS) for t in (
            hidden, reference_hidden, labels)), strict=True):
        policy = linear(rows, head).float().log_softmax(-1)                      # [n, V]
        reference = linear(reference_rows, reference_head).float().log_softmax(-1)
        columns.append(torch.stack([
            policy.gather(1, ids[:, None])[:, 0], reference.gather(1, ids[:, None])[:, 0],
            (policy.exp() * (policy - reference)).sum(-1)]))
    return torch.cat(columns, 1)


def measure_group(model: Llama, reference: Reference | None, group: list[Tree],
                  compute: Compute) -> HeldOut:
    """The numbers of one micro-batch; of no tree, a pass that keeps ranks with --fsdp in step."""
    stream = (build_stream(group, compute.device, None, compute.attention) if group else
              idle_stream(compute.device))
    num_responses, ids = len(stream.scores), stream.response_ids
    sums = torch.full((3, num_responses), math.nan, dtype=torch.float64, device=ids.device)
    if not hasattr(model, "score"):
        hidden = scored_hidden(model, stream)                                    # [N, D]
        with (reference or partial(nullcontext, model))() as other:
            columns = compare_tokens(hidden, model.lm_head.weight, scored_hidden(other, stream),
                                     other.lm_head.weight, stream.labels)        # [3, N]
        sums = torch.zeros_like(sums).index_add(1, ids, columns.double())
        if reference is None:
            sums[1:] = math.nan
    else:
        sums[0], sums[1] = stream_rewards(model, stream), 0.0
    lengths = ids.bincount(minlength=num_responses)                              # [R]
    if hasattr(model, "score"):
        lengths = lengths - 1                                # the dummy label
    return HeldOut(stream.scores.double().cpu(), stream.pairs.cpu(), *sums.cpu(),
                   lengths.double().cpu())


def joined(parts: list[HeldOut]) -> HeldOut:
    """One after the other, with pairs renumbered."""
    renumbered, start = [], 0
    for part in parts:
        renumbered.append(part._replace(pairs=part.pairs + start))
        start += len(part.scores)
    return HeldOut(*map(torch.cat, zip(*renumbered, strict=True)))


@torch.no_grad()
def measure(model: Llama, reference: Reference | None, trees: list[Tree], compute: Compute,
            ranks: Ranks = Ranks(), in_step: bool = False) -> HeldOut:
    """Every response of the trees, by all ranks together. Dropout is off, nothing random is drawn.

    reference   None where there is none
    in_step     all ranks run equally many passes, as --fsdp needs
    """
    if hasattr(model, "score"):
        trees = feed_last_tokens(trees)
    shares = [pack(share, compute.micro_tokens) for share in deal(trees, ranks.world_size)]
    groups, was_training = shares[ranks.rank], model.training
    if in_step:
        groups += [[]] * (max(map(len, shares)) - len(groups))
    model.eval()
    try:
        parts = [measure_group(model, reference, group, compute) for group in show_progress(
            groups, "held out, micro-batch", len(groups), ranks.is_first)]
    finally:
        model.train(was_training)
    return joined([part for parts in gather(parts) for part in parts])


def mean_logratio(held: HeldOut, objective: Objective) -> float:
    """The mean of log(π / π_ref) over responses, of sums or length averages as in training."""
    logratios = held.policy_logps - held.reference_logps                         # [R]
    return float((logratios / held.lengths if objective.mean_logps else logratios).mean())


def measure_objective(model: Llama, reference: Reference | None, trees: list[Tree],
                      max_length: int, objective: Objective, compute: Compute,
                      ranks: Ranks = Ranks(), in_step: bool = False) -> tuple[HeldOut, Objective]:
    """`measure`, and the objective with log_z of bco and kto, which a step estimates from training
    data, estimated from these."""
    held, estimate = measure(model, reference, trees, compute, ranks, in_step), 0.0
    if objective.method.log_z == "running":
        estimate = -objective.beta * mean_logratio(held, objective)
    elif objective.method.log_z == "mismatched" and (
            others := mismatched_trees(trees, max_length)):  # none of a single prompt
        unrelated = measure(model, reference, others, compute, ranks, in_step)
        estimate = -objective.beta * max(0.0, mean_logratio(unrelated, objective))
    return held, replace(objective, log_z=objective.log_z + estimate)


# ---- numbers ------------------------------------------------------------------------------------

def held_out_losses(held: HeldOut, objective: Objective) -> Tensor:
    """The loss of every pair or response that the method trains on, and its class: [n, 2] float64,
    for `mean_loss`. No row of d2o, whose anchors are sampled."""
    method, lengths = objective.method, torch.ones_like(held.lengths)
    if method.trains_on == "anchors":
        return torch.zeros(0, 2, dtype=torch.float64)
    if (objective.mean_logps or method.mean_logps) and not method.reward_model:
        lengths = held.lengths
    losses = method.loss(held.policy_logps / lengths, held.reference_logps / lengths, held,
                         objective)                                              # [R] or [P]
    by_class = torch.zeros_like(losses)
    if method.trains_on == "pairs":
        return torch.stack([losses, by_class], 1)
    if objective.reduction == "class":
        by_class = (held.scores == 1).double()
    used = {"positive": held.scores == 1, "negative": held.scores == 0}.get(
        method.trains_on, torch.ones_like(held.scores, dtype=torch.bool))
    return torch.stack([losses, by_class], 1)[used]


def mean_loss(losses: Tensor) -> Tensor:
    """Losses (column 0) averaged over each class (column 1), and the averages added; NaN of no row.
    """
    return torch.stack([losses[losses[:, 1] == one, 0].mean()
                        for one in losses[:, 1].unique()] or [losses.sum() * math.nan]).sum()


def reward_margins(held: HeldOut, beta: float) -> Tensor:
    """Reward of the better response less that of the worse, of every pair: [P] float64.

    beta   the reward is beta log(π / π_ref); 1 for a reward model
    """
    better, worse = (held.policy_logps - held.reference_logps)[held.pairs].T
    return beta * (better - worse)


def held_out_metrics(held: HeldOut, objective: Objective) -> dict[str, float]:
    """Means over all responses, or pairs; what a method does not have is left out.

    loss                 of the method
    rewards/accuracies   share of pairs whose better response has the larger reward; ties are halves
    rewards/margins      see `reward_margins`
    kl                   KL(π || π_ref) at a token of these responses, nats
    """
    margins = reward_margins(held, 1.0 if objective.method.reward_model else objective.beta)
    losses = held_out_losses(held, objective)
    right = wins(margins) if len(margins) and not margins.isnan().any() else math.nan
    numbers = {"loss": mean_loss(losses), "rewards/accuracies": right,
               "rewards/margins": margins.mean(), "kl": held.kls.sum() / held.lengths.sum()}
    return {f"eval/{name}": float(number) for name, number in numbers.items()
            if not math.isnan(number)}
