"""Align a Llama with any objective of ulma.py: one process or many, CPU or GPU.

    python train.py                                     ULMA on the embedded world, nothing to fetch
    torchrun --standalone --nproc_per_node=2 train.py --method dpo
    torchrun --standalone --nproc_per_node=8 train.py --method ulma --bf16 \\
        --model_name_or_path vicuna-7b-v1.5 --dataset harmless-base/train.jsonl.gz \\
        --held_out 0.05 --output_dir runs/vicuna-ulma

A step: trees are dealt to ranks and packed into streams; each stream goes through the policy, and
through the reference (adapters off) only for the responses whose loss asks for it; losses are
divided by the count of the whole global batch, so neither packing nor the number of ranks changes
the gradient; gradients and metrics are summed over ranks in one all-reduce; AdamW steps.

The same command continues a run that was killed, on a CPU to the same bits (same number of
ranks).
"""
import argparse
import copy
import math
import os
import signal
import sys
import time
from collections import Counter
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist

import anchors
from attention import ATTENTIONS, choose_attention
from checkpoint import (claim_output_dir, resume, save_checkpoint, save_final, sha256, starts_from,
                        trainable)
from data import print_counts, read_dataset, run_cli, split_by_prompt
from kernels import choose_linear_logps
from kept import keep_reference, reference_key
from loop import (Help, Stop, check_ranges, learning_rate, optimizer_step, plan_batches,
                  set_up_processes, shard_layers, write_line)
from lora import add_lora, load_adapter, share_base, start_from_adapter
from model import Llama, compile_layers, load_llama
from reward import add_score_head
from step import (METHODS, METRICS, adapters_off, backward_batch, batch_counts, check_fit,
                  frozen_copy, micro_batches)
from tokenizer import Tokenizer
from trees import Tree, make_trees, shard
from world import WORLD_FLAGS, base_model, data_file, ensure_world


# ---- the run ------------------------------------------------------------------------------------

def base_name(args) -> str:
    """What training starts from. Not a path if it is two: no tool may take the one for both."""
    return args.model_name_or_path + (f" + {args.sft_adapter}" if args.sft_adapter else "")


def reference_name(args) -> str:
    if METHODS[args.method].reference == "none":
        return f"none, --method {args.method} has no use for one"
    base = base_name(args) + (" (the adapter that is trained is off)" if args.lora_r else
                              " (a copy that is not trained)")
    if args.reference_plus or args.reference_minus:
        return (f"{args.reference_plus or base} under negatives, {args.reference_minus or base} "
                "under anchors")
    return base


def train(args, method, model: Llama, reference, trees: list[Tree], batches: list[list[int]],
          rank: int, world_size: int, device, stop: Stop, anchored=None) -> None:
    """The loop: from the newest checkpoint (or the start) to the last step of the plan.

    anchored   step -> trees by number, each with anchors, until the next refresh (d2o)
    """
    parameters = list(trainable(model).values())
    warmup = args.warmup_steps * (len(batches) if args.warmup_steps < 1 else 1)
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate,
                                  weight_decay=args.weight_decay, fused=True)
    first = resume(args.output_dir, model, optimizer, rank, len(batches))
    trees = anchored(first) if anchored else trees
    log = Log(args, rank, first, len(batches))
    for step in range(first, len(batches)):
        if anchored and args.refresh_anchors and step > first and step % args.refresh_anchors == 0:
            trees = anchored(step)
        batch = [trees[index] for index in batches[step]]
        lr = learning_rate(step, args.learning_rate, warmup, len(batches))
        for group in optimizer.param_groups:
            group["lr"] = lr
        torch.manual_seed(((args.seed * 1_000_003) + step) * 4099 + rank)        # dropout
        shards = shard(batch, world_size)
        most = max(len(micro_batches(part, method, args.micro_tokens))
                   for part in shards) if args.fsdp else 0
        totals = backward_batch(
            model, reference, method, shards[rank], batch_counts(batch),
            beta=args.beta, log_z=args.log_z, mean_logps=args.logp_reduction == "mean",
            reduction=args.reduction, micro_tokens=args.micro_tokens, device=device,
            linear_logps=choose_linear_logps(args.kernels, device.type), attention=args.attention,
            lockstep=most)
        extras = torch.cat([totals, totals.new_tensor([stop.signal])])
        (*totals, stop_signal), grad_norm = optimizer_step(
            optimizer, parameters, extras, args.max_grad_norm,
            f"step {step + 1}, trees {batches[step]}")
        log.add(step + 1, totals, grad_norm, lr)
        done = step + 1 == len(batches)
        if rank == 0 and not done and (stop_signal or (step + 1) % args.save_steps == 0):
            save_checkpoint(args.output_dir, step + 1, model, optimizer, base_name(args),
                            args.save_total_limit)
        if stop_signal and not done:
            if rank == 0:
                print(f"stopped after step {step + 1}, saved; the same command continues")
            sys.exit(128 + (stop.signal or signal.SIGTERM))


class Log:
    """One line per logged step on the screen and in metrics.jsonl: means since the last line."""

    def __init__(self, args, rank: int, first: int, total: int):
        self.args, self.rank, self.first, self.total = args, rank, first, total
        self.start = self.since = time.perf_counter()
        self.steps, self.sums = 0, torch.zeros(2 + 2 * len(METRICS), dtype=torch.float64)

    def add(self, step: int, totals: list[float], grad_norm: float, lr: float) -> None:
        self.steps += 1
        self.sums += torch.tensor(totals, dtype=torch.float64)
        if self.rank or (step % self.args.logging_steps and step != self.total):
            return
        now = time.perf_counter()
        loss, tokens, *sums = self.sums.tolist()
        line = {"step": step, "loss": loss / self.steps}
        line |= {name: total / count for name, total, count in
                 zip(METRICS, sums[::2], sums[1::2]) if count}
        line |= {"grad_norm": grad_norm, "lr": lr, "tokens": int(tokens),
                 "tokens_per_s": round(tokens / (now - self.since), 1)}
        write_line(self.args.output_dir, line, ("loss", *METRICS, "grad_norm", "lr"), self.total,
                   (now - self.start) / (step - self.first) * (self.total - step))
        self.since, self.steps = now, 0
        self.sums.zero_()


def check_flags(args) -> None:
    """Raise ValueError, naming the flag, for values that no run can mean."""
    ranges = {"held_out": (0, 1), "lora_dropout": (0, 1), "learning_rate": (0, math.inf),
              "weight_decay": (0, math.inf), "warmup_steps": (0, math.inf),
              "num_train_epochs": (0, math.inf), "beta": (0, math.inf), "lora_alpha": (0, math.inf),
              "max_grad_norm": (0, math.inf), "log_z": (-math.inf, math.inf)}
    check_ranges(args, ("batch_size", "micro_tokens", "logging_steps", "save_steps",
                        "save_total_limit"), ranges)
    if bool(args.dataset) != bool(args.model_name_or_path):
        raise ValueError("--dataset and --model_name_or_path go together (leave out both for the "
                         "embedded world)")
    if METHODS[args.method].p == "rewards" and args.lora_r == 0:
        raise ValueError(f"--method {args.method} trains an adapter and a head; --lora_r must be "
                         "at least 1")
    if args.sft_adapter:
        if before := starts_from(args.sft_adapter):
            raise ValueError(f"--sft_adapter {args.sft_adapter} is itself on top of {before}; "
                             "merge both with export.py, and pass the result as "
                             "--model_name_or_path")
        inside = os.path.commonpath([os.path.abspath(path) for path in
                                     (args.sft_adapter, args.output_dir)])
        if inside == os.path.abspath(args.output_dir):
            raise ValueError(f"--sft_adapter {args.sft_adapter} lies in --output_dir "
                             f"{args.output_dir}; choose another --output_dir")
    if args.fsdp and (args.lora_r == 0 or args.sft_adapter or args.method == "d2o"):
        raise ValueError("--fsdp shards the frozen weights under one adapter; it does not go with "
                         "--lora_r 0, --sft_adapter (merge it with export.py) or --method d2o")
    if args.fsdp and int(os.environ.get("WORLD_SIZE", 1)) < 2:
        raise ValueError("--fsdp needs two or more processes: torchrun --nproc_per_node=2 train.py")
    if args.method == "d2o" and (args.compile or args.attention != "dense"):
        raise ValueError("--compile and --attention are for training alone; --method d2o also "
                         "generates its anchors")
    if args.bf16 and args.lora_r == 0:
        raise ValueError("--bf16 with --lora_r 0 would round AdamW's updates away; train all "
                         "weights in float32")


def add_model_flags(parser) -> None:
    flag = parser.add_argument_group("adapter").add_argument
    flag("--lora_r", type=int, default=8, help="rank; 0 trains all weights")
    flag("--lora_alpha", type=float, default=32, help="scaling is alpha / r")
    flag("--lora_dropout", type=float, default=0.1,
         help="used only by methods that never see the reference")
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
    flag("--attention", choices=ATTENTIONS, default="dense", help="see attention.py; what is not "
         "dense needs a GPU")
    flag("--compile", action="store_true", help="torch.compile every layer: a minute at the start")
    flag("--kernels", choices=("auto", "triton", "torch"), default="auto",
         help="log-probs by the Triton kernel or plain torch; auto: Triton on a GPU")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help, epilog=(
        "defaults on the embedded world: " + ", ".join(f"{k} {v}" for k, v in WORLD_FLAGS.items())))
    flag = parser.add_argument_group("what").add_argument
    flag("--method", choices=METHODS, default="ulma", help="objective, see ulma.py")
    flag("--model_name_or_path", help="Hugging Face Llama folder (default: the embedded world's)")
    flag("--sft_adapter", help="PEFT folder, from train.py or not: policy and reference start from "
                               "the model with this adapter")
    flag("--dataset", help="HH, Golden HH, QA-feedback, red-team or JSONL file, .gz or not "
                           "(default: the embedded world's)")
    flag("--held_out", type=float, default=0.0,
         help="fraction of prompts never trained on (eval.py reads it from the run)")
    flag("--output_dir", default="runs/METHOD", help="METHOD stands for --method")
    flag("--overwrite_output_dir", action="store_true", help="delete the run in output_dir first")
    flag = parser.add_argument_group("objective").add_argument
    flag("--beta", type=float, default=0.1, help="KL strength")
    flag("--log_z", type=float, default=0.0, help="stand-in for beta log Z(x); 0 is the papers'")
    flag("--logp_reduction", choices=("sum", "mean"), default="sum",
         help="log-prob of a response: sum (papers) or mean per token (authors' code)")
    flag("--reduction", choices=("mean", "class"), default="mean",
         help="mean over responses, or mean over positives + mean over the rest (authors' code)")
    anchors.add_flags(parser)
    flag = parser.add_argument_group("optimization").add_argument
    flag("--learning_rate", type=float, default=1e-5, help="peak")
    flag("--batch_size", type=int, default=64,
         help="responses per step over all ranks; pairs for dpo and reward_model; prompts for d2o")
    flag("--num_train_epochs", type=float, default=1.0, help="passes over the data")
    flag("--max_steps", type=int, default=-1, help="overrides epochs if > 0")
    flag("--warmup_steps", type=float, default=0, help="linear warm-up; < 1 is a fraction")
    flag("--weight_decay", type=float, default=0.0, help="AdamW's")
    flag("--max_grad_norm", type=float, default=1.0, help="clip the gradient to this norm")
    flag("--seed", type=int, default=42, help="of order, initialisation and dropout")
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
    check_flags(args)
    anchors.check_flags(args)
    if args.method == "d2o" and args.alpha is None:
        args.alpha = args.beta
    return args


def prepare(args, rank: int, device):
    """Read and check everything before anything is written.

    returns (model, reference, (π_r+, π_r-) of d2o, trees, batches, tokenizer)
    raises  ValueError or OSError, one sentence, for whatever does not fit
    """
    method, counts = METHODS[args.method], Counter()
    tokenizer = Tokenizer(args.model_name_or_path)
    records = read_dataset(args.dataset, counts)
    if rank == 0:
        print_counts(args.dataset, records, counts)
    records, held_out = split_by_prompt(records, args.held_out)
    check_fit(args.method, records)
    counts = Counter()
    uses = "negative" if method.uses == "anchors" else method.uses
    trees = make_trees(records, tokenizer, uses, args.max_length, args.max_prompt_length, counts)
    if method.uses == "anchors":
        trees = anchors.one_negative_per_tree(trees)
    batches = plan_batches(trees, method.uses, args.batch_size, args.num_train_epochs,
                           args.max_steps, args.seed)
    if not batches:
        raise ValueError(f"--num_train_epochs {args.num_train_epochs} gives no step")
    model = load_llama(args.model_name_or_path, torch.bfloat16 if args.bf16 else torch.float32,
                       "cpu" if args.fsdp else device)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(f"{tokenizer.file} has {tokenizer.vocab_size} pieces, the embedding of "
                         f"{args.model_name_or_path} only {model.config.vocab_size} rows")
    if args.max_length > model.config.max_positions:
        raise ValueError(f"--max_length {args.max_length} exceeds the model's "
                         f"{model.config.max_positions} positions")
    model.gradient_checkpointing = args.gradient_checkpointing
    if args.sft_adapter:
        start_from_adapter(model, args.sft_adapter, merge=args.lora_r == 0)
    base, reference = model, None
    if not args.lora_r and method.reference != "none":
        base = copy.deepcopy(model).requires_grad_(False)
    adapted = [path and load_adapter(share_base(base), path).requires_grad_(False)
               for path in (args.reference_plus, args.reference_minus)]
    torch.manual_seed(args.seed)
    if args.lora_r:
        dropout = args.lora_dropout if method.reference == "none" else 0.0
        add_lora(model, args.lora_r, args.lora_alpha, dropout, args.lora_target_modules)
        reference = partial(adapters_off, model)
        if method.p == "rewards":
            add_score_head(model)
    elif method.reference != "none":
        reference = partial(frozen_copy, base)
    if args.fsdp:
        shard_layers(model, device)
    if args.compile:
        compile_layers(model)
    references = [partial(frozen_copy, other) if other else reference for other in adapted]
    if rank == 0:
        print(f"training on {len(trees)} prompts, {batch_counts(trees)}; held out: "
              f"{len(held_out)} records")
        for what, number in sorted(counts.items()):
            print(f"  {what:58} {number:7}")
        print(f"{sum(p.numel() for p in trainable(model).values()):,} weights are trained, from "
              f"{base_name(args)}; reference: {reference_name(args)}")
    return model, reference, references, trees, batches, tokenizer


def main(argv=None) -> None:
    args = parse_args(argv)
    # Squared gradients of never-seen tokens sink below 1e-38; a CPU is then 20 times slower.
    torch.set_flush_denormal(True)
    rank, world_size, device = set_up_processes()
    choose_linear_logps(args.kernels, device.type)           # refuses, or says so, before the start
    choose_attention(args.attention, device.type, args.bf16)
    if args.dataset is None:
        if rank == 0:
            ensure_world()
        if world_size > 1:
            dist.barrier()
        args.model_name_or_path = base_model()
        args.dataset = data_file("pairs" if METHODS[args.method].uses == "pairs" else
                                 "ratings" if args.method == "mse_reward_model" else "points")
    model, reference, references, trees, batches, tokenizer = prepare(args, rank, device)
    flags = vars(args) | {"dataset_sha256": sha256(args.dataset),
                          "reference": reference_name(args)}
    if rank == 0:
        claim_output_dir(args.output_dir, flags, args.overwrite_output_dir)
    if world_size > 1:
        dist.barrier()
    method, anchored, stop = METHODS[args.method], None, Stop()
    if args.method == "d2o":
        method = replace(method, loss=partial(method.loss, alpha=args.alpha))
        anchored = partial(
            anchors.anchored_trees, output_dir=args.output_dir, model=model, references=references,
            trees=trees, batches=batches, every=args.refresh_anchors, seed=args.seed,
            num_anchors=args.num_anchors,
            sampling=(args.anchor_tokens, args.anchor_temperature, args.anchor_top_p,
                      tokenizer.eos_id),
            mean_logps=args.logp_reduction == "mean", micro_tokens=args.micro_tokens,
            linear_logps=choose_linear_logps(args.kernels, device.type), rank=rank,
            world_size=world_size, stop=stop)
    elif method.reference != "none" and sum(map(len, batches)) > len(trees) and not args.fsdp:
        # several epochs; ranks that share a sharded model would have to ask it in step
        key = reference_key(trees, args.model_name_or_path, args.sft_adapter, method.reference,
                            args.logp_reduction, args.bf16, args.micro_tokens, args.kernels,
                            args.attention, args.compile)
        trees = keep_reference(
            args.output_dir, key, reference, trees, method.reference,
            args.logp_reduction == "mean", args.micro_tokens,
            choose_linear_logps(args.kernels, device.type), rank, world_size, stop, args.attention)
        reference = references = None    # with --lora_r 0 it was a copy of the whole model
    train(args, method, model, reference, trees, batches, rank, world_size, device, stop, anchored)
    if rank == 0:
        save_final(args.output_dir, model, base_name(args), tokenizer)
    if world_size > 1:
        dist.barrier()               # gloo aborts a rank that waits while another one leaves
        dist.destroy_process_group()


if __name__ == "__main__":
    run_cli(main)
