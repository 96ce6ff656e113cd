"""What a run is made of: its data in batches, the model under training, its references."""
import argparse
import copy
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch

from files.config import read_config
from lora import add_lora, add_score_head, lora_disabled, start_from_adapter
from model import Llama, load_llama
from packing import plan_batches
from step import Method, Objective, Reference
from tokenizer import Tokenizer
from training.checkpoint import RunFolder, base_name, trainable
from training.log import unrewarded
from training.ranks import Ranks, shard_layers
from training.token_cache import TokenTable, token_table

LORA_DROPOUT = 0.1       # the paper's; of methods without a reference, from which it would differ


@dataclass(frozen=True)
class Setup:
    """A run, ready to start."""
    model: Llama
    reference: Reference
    tokenizer: Tokenizer
    trees: TokenTable
    batches: list[list[int]]                     # tree numbers of every step
    folder: RunFolder


def prepare_data(args: argparse.Namespace, methods: Mapping[str, Method], tokenizer: Tokenizer,
                 ranks: Ranks) -> tuple[TokenTable, list[list[int]]]:
    """(trees, tree numbers of every step); prints what the data holds.

    raises  ValueError or OSError, one sentence, for data that do not fit
    """
    trees = token_table(args, methods, tokenizer, ranks)
    counted = 2 if methods[args.method].trains_on == "pairs" else 1      # else responses
    batches = plan_batches(trees.shapes[:, counted].tolist(), args.batch_size,
                           args.num_train_epochs, args.max_steps, args.seed)
    if not batches:
        raise ValueError(f"--num_train_epochs {args.num_train_epochs} gives no step")
    if ranks.is_first:
        print(f"{trees.notes}\ntraining on {len(trees)} prompts, {len(trees.scores)} responses "
              f"({int((trees.scores == 1).sum())} with z = 1), {len(trees.pairs)} pairs")
    return trees, batches


def check_model(args: argparse.Namespace, tokenizer: Tokenizer) -> None:
    """Raise ValueError for a model that is not supported, or a tokenizer or lengths that do not fit
    it: by its config, before the data are tokenized."""
    config = read_config(args.model_name_or_path)
    tokenizer.unused_ids(config.vocab_size)              # raises for more pieces than rows
    if args.max_length > config.max_positions:
        raise ValueError(f"--max_length {args.max_length} exceeds the model's "
                         f"{config.max_positions} positions")


def load_base(args: argparse.Namespace, device: torch.device) -> Llama:
    """The model that training starts from."""
    model = load_llama(args.model_name_or_path, torch.bfloat16 if args.bf16 else torch.float32,
                       "cpu" if args.fsdp else device)
    model.gradient_checkpointing = args.gradient_checkpointing
    if args.sft_adapter:
        start_from_adapter(model, args.sft_adapter, merge=args.lora_r == 0)
    return model


def make_reference(args: argparse.Namespace, method: Method, model: Llama) -> Reference:
    """The reference of a model that has no adapter yet.

    Under an adapter the reference is the same weights with the adapter off; where all weights are
    trained, a frozen copy; for methods without a reference, the model as an unused placeholder.
    """
    if method.reference == "none":
        return partial(nullcontext, model)
    if args.lora_r:
        return partial(lora_disabled, model)
    return partial(nullcontext, copy.deepcopy(model).requires_grad_(False))


def make_objective(flags: Mapping, method: Method) -> Objective:
    """A method with the settings among a run's flags."""
    reduction = flags.get("reduction", "mean")
    sums = reduction == "authors" and method.trains_on == "pairs"    # their DPO is of sums
    return Objective(method, flags["beta"], flags.get("log_z", 0.0), flags.get("alpha"),
                     mean_logps=reduction in ("tokens", "authors") and not sums,
                     reduction="class" if reduction in ("class", "authors") else "mean")


def describe_reference(args: argparse.Namespace, method: Method) -> str:
    """The reference in words, for the screen and args.json."""
    if method.reference == "none":
        return f"none, --method {args.method} uses none"
    return base_name(args) + (" (the adapter that is trained is off)" if args.lora_r else
                              " (a copy that is not trained)")


def set_up(args: argparse.Namespace, methods: Mapping[str, Method], ranks: Ranks,
           device: torch.device) -> Setup:
    """Read and check everything before anything is written.

    raises  ValueError or OSError, one sentence, for whatever does not fit
    """
    method = methods[args.method]
    tokenizer = Tokenizer(args.model_name_or_path, chat_template=args.chat_template)
    if ranks.is_first:
        tokenizer.print_notes()
    check_model(args, tokenizer)
    trees, batches = prepare_data(args, methods, tokenizer, ranks)
    if ranks.is_first:
        print(f"loading {args.model_name_or_path}", flush=True)
    model = load_base(args, device)
    reference = make_reference(args, method, model)
    torch.manual_seed(args.seed)
    if args.lora_r:
        dropout = LORA_DROPOUT if method.reference == "none" else 0.0
        add_lora(model, args.lora_r, args.lora_alpha, dropout, args.lora_target_modules)
        if method.reward_model:
            add_score_head(model)
    if args.fsdp:
        shard_layers(model, device)
    if ranks.is_first:
        print(f"{sum(p.numel() for p in trainable(model).values()):,} weights are trained, from "
              f"{base_name(args)}; reference: {describe_reference(args, method)}")
        if note := unrewarded(args.method, method):
            print(note)
    folder = RunFolder(args.output_dir, base_name(args), args.save_steps)
    return Setup(model, reference, tokenizer, trees, batches, folder)
