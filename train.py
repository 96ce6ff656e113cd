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

import argparse
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

import d2o
from files.cli import SEEDS, Help, Parser, check_ranges, run_cli, time_left
from generate import Sampling
from kernels import choose_linear_logps
from kernels.attention import ATTENTIONS, choose_attention
from lora import read_adapter_config
from model import Llama
from packing import Stream, shard
from step import (METHODS, METRICS, Compute, Method, Objective, Reference, batch_counts,
                  group_trees, loss_weights, metric_sums, micro_batches, scored_hidden,
                  stream_rewards)
from training.checkpoint import resume, save_final, save_or_stop, starts_from, trainable
from training.log_z import LogZ
from training.output import claim_output_dir, own_output_dir, run_flags, write_metrics
from training.ranks import (Ranks, all_reduce_gradients_, clip_gradients_, learning_rate, running)
from training.reference_cache import cache_reference, reference_key
from training.setup import Setup, describe_reference, set_up
from training.start_check import CHECKED_DEVICES, check_start
from ulma import response_logps
from world import WORLD_FLAGS, base_model, data_file, ensure_world


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
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate,
                                  weight_decay=args.weight_decay, fused=True)
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
        grad_norm = clip_gradients_(parameters, args.max_grad_norm, totals[0],
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


# ---- flags --------------------------------------------------------------------------------------

def check_flags(args: argparse.Namespace, method: Method) -> None:
    """Raise ValueError, naming the flag, for invalid values or combinations."""
    zero_or_more = (0, math.inf)
    check_ranges(args, ("batch_size", "micro_tokens", "logging_steps", "save_steps",
                        "save_total_limit"), {
        "held_out": (0, 1), "lora_dropout": (0, 1), "log_z": (-math.inf, math.inf), "seed": SEEDS,
        **dict.fromkeys(("learning_rate", "weight_decay", "warmup_steps", "num_train_epochs",
                         "beta", "lora_alpha", "max_grad_norm"), zero_or_more)})
    for path in filter(None, (args.sft_adapter, args.reference_plus, args.reference_minus)):
        read_adapter_config(path, has_head=False)
    before = args.sft_adapter and starts_from(args.sft_adapter)
    output_dir = os.path.abspath(args.output_dir)
    for refused, message in (
        (bool(args.dataset) != bool(args.model_name_or_path),
         "--dataset and --model_name_or_path go together (leave out both for the embedded world)"),
        (method.reward_model and args.lora_r == 0,
         f"--method {args.method} trains an adapter and a head; --lora_r must be at least 1"),
        (before,
         f"--sft_adapter {args.sft_adapter} is itself on top of {before}; merge both with "
         "python -m tools.export, and pass the result as --model_name_or_path"),
        (args.sft_adapter and output_dir == os.path.commonpath(
            [os.path.abspath(args.sft_adapter), output_dir]),
         f"--sft_adapter {args.sft_adapter} lies in --output_dir {args.output_dir}; choose another "
         "--output_dir"),
        (args.fsdp and (args.lora_r == 0 or args.sft_adapter or args.method == "d2o"),
         "--fsdp shards the frozen weights under one adapter; it does not go with --lora_r 0, "
         "--sft_adapter (merge it with python -m tools.export) or --method d2o"),
        (args.fsdp and int(os.environ.get("WORLD_SIZE", 1)) < 2,
         "--fsdp needs two or more processes: torchrun --nproc_per_node=2 train.py"),
        (args.bf16 and args.lora_r == 0,
         "--bf16 with --lora_r 0 would round AdamW's updates away; train all weights in float32"),
    ):
        if refused:
            raise ValueError(message)


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    flag = parser.add_argument_group("adapter").add_argument
    flag("--lora_r", type=int, default=8, help="rank; 0 trains all weights")
    flag("--lora_alpha", type=float, default=32, help="scaling is alpha / r")
    flag("--lora_dropout", type=float, default=0.1,
         help="used only by methods without a reference")
    flag("--lora_target_modules", nargs="+", default=["q_proj", "v_proj"], help="linear layers")
    flag = parser.add_argument_group("size").add_argument
    flag("--max_length", type=int, default=1024, help="tokens of prompt + response")
    flag("--max_prompt_length", type=int, default=512, help="longer prompts lose their left end")
    flag("--micro_tokens", type=int, default=8192, help="tokens per forward pass and rank")
    flag("--bf16", action="store_true", help="bfloat16 weights; adapters stay float32")
    flag("--fsdp", action="store_true", help="shard the frozen layers over all ranks, for a model "
         "that one device cannot hold")
    flag("--gradient_checkpointing", action="store_true",
         help="run each layer again in the backward: less memory, a third more time")
    flag("--attention", choices=("auto", *ATTENTIONS), default="auto",
         help="see kernels/attention.py; auto: flex on a GPU, dense elsewhere")
    flag("--kernels", choices=("auto", "triton", "torch"), default="auto",
         help="log-probs by the Triton kernel or plain torch; auto: Triton on a GPU")


def parse_args(argv: Sequence[str] | None = None,
               methods: Mapping[str, Method] = METHODS) -> argparse.Namespace:
    """The flags, checked; `methods` are what --method may name."""
    parser = Parser(description=__doc__, formatter_class=Help, epilog=(
        "defaults on the embedded world: " + ", ".join(f"{k} {v}" for k, v in WORLD_FLAGS.items())))
    flag = parser.add_argument_group("what").add_argument
    flag("--method", choices=methods, default="ulma",
         help="objective: ulma.py has the formulas, docs/usage.md what each trains on")
    flag("--model_name_or_path", help="Hugging Face Llama folder (default: the embedded world's)")
    flag("--chat_template", help="vicuna; model: the folder's own; or a jinja file (default: the "
                                 "folder's chat_template.jinja, else vicuna; docs/usage.md)")
    flag("--sft_adapter", help="PEFT folder, from train.py or not: policy and reference start from "
                               "the model with this adapter")
    flag("--dataset", help="HH, Golden HH, QA-feedback, red-team or JSONL file, .gz or not; a folder "
                           "of them, or several with commas between "
                           "(default: the embedded world's)")
    flag("--held_out", type=float, default=0.0,
         help="fraction of prompts never trained on (eval.py reads it from the run)")
    flag("--output_dir", default="runs/METHOD", help="METHOD stands for --method")
    flag("--overwrite_output_dir", action="store_true", help="delete the run in output_dir first")
    flag = parser.add_argument_group("objective").add_argument
    flag("--beta", type=float, default=0.1, help="multiplies log pi/pi_ref: KL strength; "
         "ipo's tau; simpo wants about 2, and its margin is half of it")
    flag("--log_z", type=float, default=0.0, help="stand-in for beta log Z(x); 0 is the papers'; "
         "added to what bco and kto estimate")
    flag("--logp_reduction", choices=("sum", "mean"), default="sum",
         help="log-prob of a response: sum (papers) or mean per token (authors' code)")
    flag("--reduction", choices=("mean", "class"), default="mean",
         help="mean over responses, or mean over positives + mean over the rest (authors' code)")
    d2o.add_flags(parser)
    flag = parser.add_argument_group("optimization").add_argument
    flag("--learning_rate", type=float, default=1e-5, help="peak learning rate")
    flag("--batch_size", type=int, default=64,
         help="responses per step over all ranks; pairs for methods of pairs; prompts for d2o. "
              "A prompt with more of them is a step of its own")
    flag("--num_train_epochs", type=float, default=1.0, help="passes over the data")
    flag("--max_steps", type=int, default=-1, help="overrides epochs if > 0")
    flag("--warmup_steps", type=float, default=0, help="linear warm-up; < 1 is a fraction")
    flag("--weight_decay", type=float, default=0.0, help="AdamW weight decay")
    flag("--max_grad_norm", type=float, default=1.0, help="clip the gradient to this norm")
    flag("--seed", type=int, default=42, help="seeds data order, initialisation and dropout")
    add_model_flags(parser)
    flag = parser.add_argument_group("logging and saving").add_argument
    flag("--logging_steps", type=int, default=10, help="steps per logged line")
    flag("--save_steps", type=int, default=100, help="steps per checkpoint")
    flag("--save_total_limit", type=int, default=2, help="checkpoints kept, the newest")
    args = parser.parse_args(argv)
    if args.dataset is None:
        parser.set_defaults(**WORLD_FLAGS)               # the flags that were given still win
        args = parser.parse_args(argv)
    args.output_dir = os.path.normpath(args.output_dir.replace("METHOD", args.method))
    check_flags(args, methods[args.method])
    d2o.check_flags(args)
    if args.method == "d2o" and args.alpha is None:
        args.alpha = args.beta
    return args


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
        output_dir=args.output_dir, model=setup.model, references=setup.references,
        trees=setup.trees, batches=setup.batches, refresh=args.refresh_anchors,
        num_anchors=args.num_anchors,
        sampling=Sampling(args.anchor_tokens, args.anchor_temperature, args.anchor_top_p,
                          setup.tokenizer.eos_ids,
                          setup.tokenizer.unused_ids(setup.model.config.vocab_size)),
        seed=args.seed, mean_logps=objective.mean_logps, compute=compute, ranks=ranks,
        given=partial(d2o.read_given_anchors, args, setup.trees, setup.tokenizer)
        if args.anchors else None)


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
        args.logp_reduction, args.bf16, args.micro_tokens, args.kernels, compute.attention)
    trees = cache_reference(args.output_dir, key, setup.reference, setup.trees, objective, compute,
                            ranks)
    return replace(setup, trees=trees, reference=partial(nullcontext, setup.model), references=())


def main(argv: Sequence[str] | None = None, methods: Mapping[str, Method] = METHODS) -> None:
    """Run train.py; `methods` are what --method may name (study/ has some of its own)."""
    args = parse_args(argv, methods)
    method = methods[args.method]
    with running() as (ranks, device):
        compute = Compute(device, args.micro_tokens,
                          choose_linear_logps(args.kernels, device.type),
                          choose_attention(args.attention, device.type))
        if args.dataset is None:
            use_world(args, method, ranks)
        objective = Objective(method, args.beta, args.log_z, args.alpha,
                              args.logp_reduction == "mean", args.reduction)
        inputs = (args.sft_adapter, args.reference_plus, args.reference_minus,
                  args.anchors and args.anchors.replace("STEP", "0"))
        flags = run_flags(args, inputs, ranks, device) | {
            "reference": describe_reference(args, method)}
        with own_output_dir(args.output_dir, flags, args.overwrite_output_dir, ranks):
            setup = set_up(args, methods, ranks, device)
            if device.type in CHECKED_DEVICES:
                flags["start_check"] = errors = check_start(
                    setup.model, [setup.trees[n] for n in setup.batches[0]], method, compute)
                if ranks.is_first:
                    print("checked against plain torch, relative errors:", ", ".join(
                        f"{name} {error:.1e}" for name, error in errors.items()))
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
