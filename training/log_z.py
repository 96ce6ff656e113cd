"""BCO's and KTO's stand-in for beta log Z(x), estimated anew for every step from all ranks' data.

BCO: minus the mean reward so far. It costs nothing: every step sums rewards for the log anyway.
KTO: minus beta z0, z0 from the batch's responses under prompts they do not belong to. These have to
be known before the first loss of the batch, so policy and reference run over them in a pass of
their own, without gradient: a step takes about half as long again.
"""
import argparse
from collections.abc import Sequence
from dataclasses import replace

import torch

from packing import Tree, deal, mismatched_trees
from step import Compute, Objective, group_trees, micro_batches, sequence_logps
from training.ranks import Ranks, gather
from training.setup import Setup


class LogZ:
    """What `Objective.log_z` is at each step; the same on every rank.

    sums   of the rewards of all responses so far, and their number; a checkpoint holds them
    """

    def __init__(self, args: argparse.Namespace, setup: Setup, objective: Objective,
                 compute: Compute, ranks: Ranks, sums: Sequence[float] | None = None):
        self.max_length, self.fsdp, self.setup = args.max_length, args.fsdp, setup
        self.objective, self.compute, self.ranks = objective, compute, ranks
        self.sums = list(sums or (0.0, 0.0))

    def add(self, totals: Sequence[float]) -> None:
        """Take in what train.accumulate_gradient returned, summed over ranks."""
        positive, num_positive, negative, num_negative = totals[2:6]
        self.sums[0] += positive + negative
        self.sums[1] += num_positive + num_negative

    def objective_for(self, batch: list[Tree]) -> Objective:
        """The objective of a step on this global batch; --log_z is added to the estimate."""
        kind, estimate = self.objective.method.log_z, 0.0
        if kind == "running" and self.sums[1]:
            estimate = -self.sums[0] / self.sums[1]
        elif kind == "mismatched":
            estimate = -self.objective.beta * self.reference_point(batch)
        return replace(self.objective, log_z=self.objective.log_z + estimate)

    @torch.no_grad()
    def reference_point(self, batch: list[Tree]) -> float:
        """KTO's z0 = max(0, mean log-ratio of `mismatched_trees`), nats; 0 for a single prompt.

        Source: KTO, arXiv:2402.01306.
        """
        trees = mismatched_trees(batch, self.max_length)
        shares = deal(trees, self.ranks.world_size)
        method, compute = self.objective.method, self.compute
        passes = max(len(group_trees(share, method, compute.micro_tokens))
                     for share in shares) if self.fsdp else 0
        total = torch.zeros((), dtype=torch.float64, device=compute.device)
        for stream, _ in micro_batches(shares[self.ranks.rank], method, compute, passes):
            settings = stream, self.objective.mean_logps, compute.linear_logps
            policy = sequence_logps(self.setup.model, *settings)                 # [R]
            with self.setup.reference() as reference:
                logratios = policy - sequence_logps(reference, *settings)        # [R]
            total += logratios.double().sum()
        count = sum(len(tree.scores) for tree in trees)
        return max(0.0, sum(gather(total.item())) / max(1, count))
