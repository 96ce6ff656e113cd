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
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

import d2o
from files.cli import run_cli, show_progress
from generate import Sampling, generate, prompt_ids_of
from kernels import choose_linear_logps
from kernels.attention import choose_attention
from lora import lora_disabled
from model import Llama
from packing import Stream, deal, derived_seed, make_trees, pair_points
from step import (METHODS, METRICS, Compute, Method, Objective, Reference, batch_counts,
                  group_trees, loss_weights, metric_sums, micro_batches, scored_hidden,
                  stream_rewards)
from training.checkpoint import (check_sft_adapter, held_out_records, resume, save_final,
                                 save_or_stop, trainable)
from training.flags import parse_args
from training.held_out import held_out_metrics, measure_objective
from training.log import Log
from training.log_z import LogZ
from training.output import claim_output_dir, own_output_dir, run_flags
from training.ranks import (MAX_GRAD_NORM, Ranks, all_reduce_gradients_, clip_gradients_,
                            learning_rate, running)
from training.reference_cache import cache_reference, reference_key
from training.setup import Setup, describe_reference, make_objective, set_up
from training.start_check import checked
from ulma import response_logps
from world import base_model, data_file, ensure_world

ANSWER_TOKENS = 64       # of the answers that --eval_steps shows
KERNELS = {              # --kernels: what computes log-probs, and attention
    "auto": ("auto", "auto"), "torch": ("torch", "dense"), "triton": ("triton", "tree")}


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
          ranks: Ranks, anchors: d2o.AnchorSource | None, evaluation: "Evaluation | None") -> None:
    """The loop: from the newest checkpoint (or the start) to the last step of the plan."""
    model, batches, trees = setup.model, setup.batches, setup.trees
    parameters = list(trainable(model).values())
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=0.0, fused=True)
    warmup_steps = math.ceil(args.warmup_steps * (len(batches) if args.warmup_steps < 1 else 1))
    first, state = resume(setup.folder, model, optimizer, ranks, len(batches))
    since_line, reward_sums = state or (None, None)
    log = Log(args, first, len(batches), since_line) if ranks.is_first else None
    log_z = LogZ(args, setup, objective, compute, ranks, reward_sums)
    for step in range(first, len(batches)):
        if anchors and (step == first or (args.refresh_anchors and
                                          step % args.refresh_anchors == 0)):
            trees = d2o.anchored_trees(anchors, step)
        batch = [trees[number] for number in batches[step]]
        shares = deal(batch, ranks.world_size)
        passes = max(len(group_trees(share, objective.method, args.micro_tokens))
                     for share in shares) if args.fsdp else 0
        torch.manual_seed(derived_seed(args.seed, step) * 4099 + ranks.rank)      # dropout
        totals = accumulate_gradient(
            model, setup.reference,
            show_progress(micro_batches(shares[ranks.rank], objective.method, compute, passes),
                          f"step {step + 1}, micro-batch", shown=ranks.is_first),
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
        if log:
            log.add(step + 1, totals, grad_norm, lr)
        if evaluation and ((step + 1) % args.eval_steps == 0 or step + 1 == len(batches)):
            metrics, answers = evaluation.run()
            if log:
                log.add_held_out(step + 1, metrics, answers)
        save_or_stop(setup.folder, step + 1, len(batches), model, optimizer, ranks, stop_signal,
                     [log and log.since_line(), log_z.sums])


# ---- held-out responses, during a run ------------------------------------------------------------

class Evaluation:
    """--eval_steps: what eval.py measures after a run, and two held-out prompts answered.

    Nothing of it reaches the training: no gradient, no random number.
    """

    def __init__(self, args: argparse.Namespace, setup: Setup, objective: Objective,
                 compute: Compute, ranks: Ranks):
        self.args, self.model, self.tokenizer = args, setup.model, setup.tokenizer
        self.objective, self.compute, self.ranks = objective, compute, ranks
        if objective.method.reference != "none":
            self.reference = setup.reference
        else:                                    # of weights that are all trained no copy is kept
            self.reference = partial(lora_disabled, self.model) if args.lora_r else None
        _, records = held_out_records(args.output_dir, vars(args), None)
        self.trees = make_trees(pair_points(records, Counter()), self.tokenizer, "all",
                                args.max_length, args.max_prompt_length)
        self.prompts = list(dict.fromkeys(record.prompt for record in records))[:2]
        self.reference_answers = None            # they stay the same

    def run(self) -> tuple[dict[str, float], list[dict[str, str]]]:
        """(metrics, a row for each prompt), of the model as it is; answers on the first rank."""
        held, objective = measure_objective(
            self.model, self.reference, self.trees, self.args.max_length, self.objective,
            self.compute, self.ranks, in_step=self.args.fsdp)
        answers = not objective.method.reward_model and (self.ranks.is_first or self.args.fsdp)
        return held_out_metrics(held, objective), self.answer_both() if answers else []

    def answer_both(self) -> list[dict[str, str]]:
        """Greedy answers of policy and reference to the two prompts."""
        def answer(reference: Reference) -> list[str]:
            with reference() as model:
                return [self.tokenizer.decode(ids) for ids in generate(
                    model, prompt_ids, ANSWER_TOKENS, temperature=0.0, generator=0,
                    eos_id=self.tokenizer.eos_ids,
                    unused_ids=self.tokenizer.unused_ids(model.config.vocab_size))]

        prompt_ids = [prompt_ids_of(self.model, self.tokenizer, turns, ANSWER_TOKENS)
                      for turns in self.prompts]
        policy = answer(partial(nullcontext, self.model))
        if self.reference and self.reference_answers is None:
            self.reference_answers = answer(self.reference)
        return [{"prompt": turns[-1][1], "policy": mine} | (
                    {} if other is None else {"reference": other})
                for turns, mine, other in zip(self.prompts, policy,
                                              self.reference_answers or [None, None])]


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
    weights, of which the reference is a copy: it is then freed, unless KTO's mismatched responses
    or --eval_steps go on needing it.

    Not with --fsdp: ranks that share a sharded model would have to run it in step.
    """
    method, epochs = objective.method, sum(map(len, setup.batches)) / len(setup.trees)
    if method.reference == "none" or args.fsdp or (args.lora_r and epochs <= 1):
        return setup
    key = reference_key(
        setup.trees, args.model_name_or_path, args.sft_adapter, method.reference,
        objective.mean_logps, args.bf16, args.micro_tokens, compute.attention)
    trees = cache_reference(args.output_dir, key, setup.reference, setup.trees, objective, compute,
                            ranks)
    needed = method.log_z == "mismatched"
    return replace(setup, trees=trees,
                   reference=setup.reference if needed else partial(nullcontext, setup.model))


def main(argv: Sequence[str] | None = None, methods: Mapping[str, Method] = METHODS) -> None:
    """Run train.py; `methods` are what --method may name (study/ has some of its own)."""
    args = parse_args(argv, methods, __doc__)
    method = methods[args.method]
    check_sft_adapter(args.sft_adapter)
    with running() as (ranks, device):
        log_probs, attention = KERNELS[args.kernels]
        log_probs = choose_linear_logps(log_probs, device.type)      # refused before anything else
        if args.dataset is None:
            use_world(args, method, ranks)
        objective = make_objective(vars(args), method)
        inputs = (args.sft_adapter, args.anchor_instructions,
                  args.anchors and args.anchors.replace("STEP", "0"))
        flags = run_flags(args, inputs, ranks, device) | {
            "reference": describe_reference(args, method)}
        with own_output_dir(args.output_dir, flags, ranks):
            setup = set_up(args, methods, ranks, device)
            compute = Compute(device, args.micro_tokens, log_probs, choose_attention(
                attention, device.type, setup.model.config.head_dim))
            flags |= checked(setup.model, [setup.trees[n] for n in setup.batches[0]], compute,
                             ranks.is_first)
            if ranks.is_first:
                claim_output_dir(args.output_dir, flags)
            ranks.barrier()
            with ranks.stop:
                anchors = None
                evaluation = (Evaluation(args, setup, objective, compute, ranks)
                              if args.eval_steps else None)
                if method.trains_on == "anchors":
                    anchors = make_anchor_source(args, setup, objective, compute, ranks)
                else:
                    setup = with_cached_reference(args, setup, objective, compute, ranks)
                train(args, setup, objective, compute, ranks, anchors, evaluation)
                if ranks.is_first:
                    save_final(setup.folder, setup.model, setup.tokenizer)


if __name__ == "__main__":
    run_cli(main)
