"""Align a Llama with any objective of ulma.py: one process or many, CPU or GPU.

    python train.py                                     ULMA on the embedded world, nothing to fetch
    torchrun --standalone --nproc_per_node=2 train.py --method dpo
    torchrun --standalone --nproc_per_node=8 train.py --method ulma --bf16 \\
        --model_name_or_path vicuna-7b-v1.5 --dataset harmless-base/train.jsonl.gz \\
        --held_out 0.05 --output_dir runs/vicuna-ulma

The whole step is `accumulate_gradient` and the loop of `train`, on the first screen. Losses are
divided by the counts of the global batch, so neither packing nor the number of ranks changes the
gradient.

The same command continues a run that was killed, on a CPU to the same bits (same number of
ranks).
"""
if __name__ == "__main__":
    from files.interrupt import catch_interrupts
    catch_interrupts()
    from files.cli import parse_first
    from training.flags import parse_args
    parse_first(lambda: parse_args(description=__doc__))

import argparse
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

import d2o
from files.cli import run_cli, time_left
from generate import Sampling
from kernels import choose_linear_logps
from kernels.attention import choose_attention
from model import Llama
from packing import Stream, shard
from step import (METHODS, METRICS, Compute, Method, Objective, Reference, batch_counts,
                  group_trees, loss_weights, metric_sums, micro_batches, scored_hidden,
                  stream_rewards)
from training.checkpoint import check_sft_adapter, resume, save_final, save_or_stop, trainable
from training.flags import parse_args
from training.log_z import LogZ
from training.output import claim_output_dir, own_output_dir, run_flags, write_metrics
from training.ranks import (MAX_GRAD_NORM, Ranks, all_reduce_gradients_, clip_gradients_,
                            learning_rate, running)
from training.reference_cache import cache_reference, reference_key
from training.setup import Setup, describe_reference, set_up
from training.start_check import checked
from ulma import response_logps
from world import base_model, data_file, ensure_world

KERNELS = {              # --kernels: what computes log-probs, and attention
    "auto": ("auto", "auto"), "torch": ("torch", "dense"), "flex": ("triton", "flex"),
    "triton": ("triton", "tree")}


# ---- the step -----------------------------------------------------------------------------------

def accumulate_gradient(model: Llama, reference: Reference,
                        streams: Iterable[tuple[Stream, Stream]], counts: dict[str, int],
                        objective: Objective, compute: Compute) -> Tensor:
    """Forward and backward of this rank's share of a batch.

    reference  must share lm_head with the model; with --lora_r 0 its log-probs are cached in the
               trees, and it does not run
    streams    see step.micro_batches
    counts     of the whole batch, see step.batch_counts
    returns    [loss, tokens, sums and counts of METRICS]: [2 + 2 · 6] float64, which stay
               on the device: no synchronisation within a step
    """
    method, mean = objective.method, objective.mean_logps or objective.method.mean_logps
    totals = torch.zeros(2 + 2 * len(METRICS), dtype=torch.float64, device=compute.device)
    for stream, reference_stream in streams:
        num_responses, reference_logps = len(stream.scores), None
        if method.reward_model:
            policy = stream_rewards(model, stream)                                       # [R]
        else:
            hidden = scored_hidden(model, stream)                                        # [N, D]
            with torch.no_grad(), reference() as reference_model:        # adapters off
                reference_hidden = scored_hidden(reference_model, reference_stream)      # [M, D]
            logps = compute.linear_logps(        # one pass over the vocabulary: [N], [M]
                hidden, reference_hidden, model.lm_head.weight,
                stream.labels, reference_stream.labels)
            policy = response_logps(                                                     # [R]
                logps.policy_logps, stream.response_ids, num_responses, mean)
            reference_logps = response_logps(                                            # [R]
                logps.reference_logps, reference_stream.response_ids, num_responses, mean)
            if stream.reference_logps is not None:
                reference_logps = stream.reference_logps.to(policy.dtype)        # cached
        losses = method.loss(policy, reference_logps, stream, objective)         # [R] or [P]
        loss = (losses * loss_weights(stream, counts, objective)).sum()
        loss.backward()
        num_tokens = len(stream.input_ids) if num_responses else 0       # not of an idle pass
        tokens = loss.new_full((), num_tokens, dtype=torch.float64)
        totals += torch.cat([
            torch.stack([loss.detach().double(), tokens]),
            metric_sums(policy.detach(), reference_logps, stream, objective)])
    return totals


def train(args: argparse.Namespace, setup: Setup, objective: Objective, compute: Compute,
          ranks: Ranks, anchors: d2o.AnchorSource | None) -> None:
    """The loop: from the newest checkpoint (or the start) to the last step of the plan."""
    model, batches, trees = setup.model, setup.batches, setup.trees
    parameters = list(trainable(model).values())
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=0.0, fused=True)
    warmup_steps = args.warmup_steps * (len(batches) if args.warmup_steps < 1 else 1)
    first, state = resume(setup.folder, model, optimizer, ranks, len(batches))
    since_line, reward_sums = state or (None, None)
    log = Log(args.output_dir, args.logging_steps, first, len(batches), since_line)
    log_z = LogZ(args, setup, objective, compute, ranks, reward_sums)
    for step in range(first, len(batches)):
        if anchors and (step == first or (args.refresh_anchors and
                                          step % args.refresh_anchors == 0)):
            trees = d2o.anchored_trees(anchors, step)
        batch = [trees[number] for number in batches[step]]
        shares = shard(batch, ranks.world_size)
        passes = max(len(group_trees(share, objective.method, args.micro_tokens))
                     for share in shares) if args.fsdp else 0
        torch.manual_seed(((args.seed * 1_000_003) + step) * 4099 + ranks.rank)      # dropout
        totals = accumulate_gradient(
            model, setup.reference,
            micro_batches(shares[ranks.rank], objective.method, compute, passes),
            batch_counts(batch), log_z.objective_for(batch), compute)
        *totals, stop_signal = all_reduce_gradients_(
            parameters, torch.cat([totals, totals.new_tensor([ranks.stop.signal])]))
        grad_norm = clip_gradients_(parameters, MAX_GRAD_NORM, totals[0],
                                    f"step {step + 1}, trees {batches[step]}")
        lr = learning_rate(step, args.learning_rate, warmup_steps, len(batches))
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        log_z.add(totals)
        if ranks.is_first:
            log.add(step + 1, totals, grad_norm, lr)
        save_or_stop(setup.folder, step + 1, len(batches), model, optimizer, ranks, stop_signal,
                     [log.since_line(), log_z.sums])


class Log:
    """One line per logged step on the screen and in metrics.jsonl: means since the last line."""

    def __init__(self, output_dir: str, logging_steps: int, first: int, total_steps: int,
                 since_line: Sequence[float] | None = None):
        self.output_dir, self.logging_steps = output_dir, logging_steps
        self.first, self.total_steps = first, total_steps
        self.steps, seconds, *sums = since_line or [0.0] * (4 + 2 * len(METRICS))
        self.sums = torch.tensor(sums, dtype=torch.float64)
        self.start = time.perf_counter()
        self.last_time = self.start - seconds

    def since_line(self) -> list[float]:
        """Steps, seconds and sums since the last line, for a run that goes on from here."""
        return [self.steps, time.perf_counter() - self.last_time, *self.sums.tolist()]

    def add(self, step: int, totals: Sequence[float], grad_norm: float, lr: float) -> None:
        """Add one step's totals, over all ranks; write a line if one is due."""
        self.steps += 1
        self.sums += torch.tensor(totals, dtype=torch.float64)
        if step % self.logging_steps and step != self.total_steps:
            return
        now = time.perf_counter()
        loss, tokens, *sums = self.sums.tolist()
        line = {"step": step, "loss": loss / self.steps}
        for name, total, count in zip(METRICS, sums[::2], sums[1::2]):
            if count:
                line[name] = total / count
        line |= {"grad_norm": grad_norm, "lr": lr, "tokens": int(tokens),
                 "tokens_per_s": round(tokens / (now - self.last_time), 1)}
        write_metrics(self.output_dir, line)
        shown = "  ".join(f"{name} {line[name]:.4g}" for name in
                          ("loss", *METRICS, "grad_norm", "lr") if name in line)
        left = time_left(now - self.start, step - self.first, self.total_steps - self.first)
        print(f"step {step}/{self.total_steps}  {shown}  {line['tokens_per_s']:.0f} tok/s  {left}",
              flush=True)
        self.last_time, self.steps = now, 0
        self.sums.zero_()


# ---- the run ------------------------------------------------------------------------------------

def use_world(args: argparse.Namespace, method: Method, ranks: Ranks) -> None:
    """Without --dataset: the embedded world's base model and data, made by rank 0 if need be."""
    if ranks.is_first:
        ensure_world()
    ranks.barrier()
    args.model_name_or_path = base_model()
    args.dataset = data_file("pairs" if method.trains_on == "pairs" else
                             "ratings" if args.method == "mse_reward_model" else "points")


def make_anchor_source(args: argparse.Namespace, setup: Setup, objective: Objective,
                       compute: Compute, ranks: Ranks) -> d2o.AnchorSource:
    """Where D2O's anchors come from, by its flags."""
    return d2o.AnchorSource(
        output_dir=args.output_dir, model=setup.model, reference=setup.reference,
        trees=setup.trees, batches=setup.batches, refresh=args.refresh_anchors,
        num_anchors=args.num_anchors,
        sampling=Sampling(args.anchor_tokens, d2o.TEMPERATURE, d2o.TOP_P, setup.tokenizer.eos_ids,
                          setup.tokenizer.unused_ids(setup.model.config.vocab_size)),
        seed=args.seed, mean_logps=objective.mean_logps, compute=compute, ranks=ranks,
        given=partial(d2o.read_given_anchors, args, setup.trees, setup.tokenizer)
        if args.anchors else None,
        instruct=d2o.Instructions(args, setup.tokenizer).prompt
        if args.anchor_instructions else None)


def with_cached_reference(args: argparse.Namespace, setup: Setup, objective: Objective,
                          compute: Compute, ranks: Ranks) -> Setup:
    """Cache the reference's log-probs in the trees if the run has several epochs, or trains all
    weights (the reference copy is then freed).

    Not with --fsdp: ranks that share a sharded model would have to run it in step. Nor for KTO,
    whose mismatched responses need the reference in every step.
    """
    method, epochs = objective.method, sum(map(len, setup.batches)) / len(setup.trees)
    if (method.reference == "none" or method.log_z == "mismatched" or args.fsdp
            or (args.lora_r and epochs <= 1)):
        return setup
    key = reference_key(
        setup.trees, args.model_name_or_path, args.sft_adapter, method.reference,
        objective.mean_logps, args.bf16, args.micro_tokens, compute.attention)
    trees = cache_reference(args.output_dir, key, setup.reference, setup.trees, objective, compute,
                            ranks)
    return replace(setup, trees=trees, reference=partial(nullcontext, setup.model))


def main(argv: Sequence[str] | None = None, methods: Mapping[str, Method] = METHODS) -> None:
    """Run train.py; `methods` are what --method may name (study/ has some of its own)."""
    args = parse_args(argv, methods, __doc__)
    method = methods[args.method]
    check_sft_adapter(args.sft_adapter)
    with running() as (ranks, device):
        log_probs, attention = KERNELS[args.kernels]
        compute = Compute(device, args.micro_tokens, choose_linear_logps(log_probs, device.type),
                          choose_attention(attention, device.type))
        if args.dataset is None:
            use_world(args, method, ranks)
        objective = Objective(method, args.beta, args.log_z, args.alpha,
                              args.reduction in ("tokens", "authors"),
                              "class" if args.reduction in ("class", "authors") else "mean")
        inputs = (args.sft_adapter, args.anchor_instructions,
                  args.anchors and args.anchors.replace("STEP", "0"))
        flags = run_flags(args, inputs, ranks, device) | {
            "reference": describe_reference(args, method)}
        with own_output_dir(args.output_dir, flags, args.overwrite_output_dir, ranks):
            setup = set_up(args, methods, ranks, device)
            flags |= checked(setup.model, [setup.trees[n] for n in setup.batches[0]], compute,
                             ranks)
            if ranks.is_first:
                claim_output_dir(args.output_dir, flags, args.overwrite_output_dir)
            ranks.barrier()
            with ranks.stop:
                anchors = None
                if method.trains_on == "anchors":
                    anchors = make_anchor_source(args, setup, objective, compute, ranks)
                else:
                    setup = with_cached_reference(args, setup, objective, compute, ranks)
                train(args, setup, objective, compute, ranks, anchors)
                if ranks.is_first:
                    save_final(setup.folder, setup.model, setup.tokenizer)


if __name__ == "__main__":
    run_cli(main)
