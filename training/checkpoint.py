"""What a run leaves on disk: whole or absent, and enough to continue to the same bits.

    OUT/args.json          every flag, and the SHA-256 of the data; written first
    OUT/metrics.jsonl      one JSON object per logged step
    OUT/checkpoint-N/      adapter (or model), optimizer.safetensors, trainer_state.json; of PPO,
                           which trains two adapters: trained.safetensors instead
    OUT/final/             the result: a PEFT adapter, or a Hugging Face model

Nothing random is stored: data order and dropout are functions of (seed, step, rank).
"""
import argparse
import json
import os
import re
import shutil
import signal
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn as nn
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from data import Record, read_dataset, split_by_prompt
from files.text import read_json, sha256, whole_lines, write_folder, write_json, write_text
from lora import (adapter_tensors, add_score_head, load_adapter, lora_disabled, save_adapter,
                  start_from_adapter)
from model import Llama, load_llama, save_llama
from step import Reference
from tokenizer import Tokenizer, copy_tokenizer
from training.ranks import Ranks


# ---- the output folder --------------------------------------------------------------------------

# Flags that may change between a run and its continuation: they change no number.
FREE_FLAGS = {"output_dir", "overwrite_output_dir", "logging_steps", "save_steps",
              "save_total_limit"}


def changed_flags(file: str, flags: dict) -> str:
    """What differs from the flags stored in a file, in words; "" if nothing does."""
    before = read_json(file)
    return "; ".join(f"{key} was {before.get(key)!r}, now {flags[key]!r}" for key in flags
                     if key not in FREE_FLAGS and before.get(key) != flags[key])


def claim_output_dir(path: str, flags: dict, overwrite: bool) -> None:
    """Create the run folder, or check that it belongs to this run: a killed run with the same flags
    is continued.

    raises  ValueError if it holds a finished run, a run with other flags (each named), or
            anything that is no run at all
    """
    file = os.path.join(path, "args.json")
    if overwrite and os.path.isfile(file):
        shutil.rmtree(path)                              # only ever a folder that was a run
    if os.path.isfile(file):
        if changed := changed_flags(file, flags):
            raise ValueError(f"{path} holds a run with other flags ({changed}); choose another "
                             "--output_dir, or pass --overwrite_output_dir")
        if os.path.isdir(os.path.join(path, "final")):
            raise ValueError(f"{path} holds a finished run; choose another --output_dir, or pass "
                             "--overwrite_output_dir")
        return
    if os.path.lexists(path) and not os.path.isdir(path):
        raise ValueError(f"{path} is a file; choose another --output_dir")
    if os.path.isdir(path) and os.listdir(path):
        raise ValueError(f"{path} is not empty and holds no run of train.py; choose another "
                         "--output_dir")
    os.makedirs(path, exist_ok=True)
    write_json(file, flags)


def claim_file(out: str, flags: dict, batch_size: int, total: int, overwrite: bool) -> int:
    """Create the file of a generate.py command, or check that it belongs to the command.

    OUT.args.json stores the flags. Whole batches stay; what a kill left of the last one goes.
    returns  the number of rows it has
    raises   ValueError if the file is another command's
    """
    flags_file = out + ".args.json"
    if os.path.exists(out) and not overwrite:
        if not os.path.isfile(flags_file):
            raise ValueError(f"{out} exists and was not written by this command; choose another "
                             "--out, or pass --overwrite")
        if changed := changed_flags(flags_file, flags):
            raise ValueError(f"{out} was written with other flags ({changed}); choose another "
                             "--out, or pass --overwrite")
        rows = whole_lines(out)
        done = len(rows) if len(rows) >= total else len(rows) - len(rows) % batch_size
        write_text(out, "".join(rows[:done]))
        return done
    open(out, "wb").close()               # first: a kill in between must not leave old rows
    write_json(flags_file, flags)
    return 0


def write_metrics(path: str, line: dict) -> None:
    """Append a line to metrics.jsonl."""
    with open(os.path.join(path, "metrics.jsonl"), "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def rewind_metrics(path: str, step: int) -> None:
    """Drop the lines of metrics.jsonl past `step`: they will be written again."""
    file = os.path.join(path, "metrics.jsonl")
    if os.path.isfile(file):
        write_text(file, "".join(line for line in whole_lines(file)
                                 if json.loads(line)["step"] <= step))


# ---- which model a run starts from --------------------------------------------------------------

def base_name(args: argparse.Namespace) -> str:
    """What training starts from. With an SFT adapter this is 'BASE + ADAPTER', deliberately not a
    valid path."""
    return args.model_name_or_path + (f" + {args.sft_adapter}" if args.sft_adapter else "")


def starts_from(adapter: str) -> str | None:
    """The SFT adapter that the run which wrote the folder `adapter` started from, if it did."""
    file = os.path.join(os.path.dirname(os.path.abspath(adapter)), "args.json")
    return read_json(file).get("sft_adapter") if os.path.isfile(file) else None


def check_order(adapters: list[str]) -> None:
    """Raise ValueError if one was trained on top of an adapter that does not stand before it."""
    for before, adapter in zip([None, *adapters], adapters):
        first = starts_from(adapter)
        if first and os.path.abspath(first) != os.path.abspath(before or ""):
            raise ValueError(f"{adapter} was trained on top of {first}; pass --adapter {first} "
                             f"{adapter}")


# ---- checkpoints --------------------------------------------------------------------------------

@dataclass(frozen=True)
class RunFolder:
    """Where a run saves, and when."""
    path: str
    base_model: str          # see `base_name`
    save_steps: int          # between checkpoints
    save_total_limit: int    # checkpoints that stay, the newest


def checkpoints(path: str) -> list[tuple[int, str]]:
    """(step, folder) of every checkpoint, oldest first; the renamed ones are the whole ones."""
    names = [re.fullmatch(r"checkpoint-(\d+)", name) for name in os.listdir(path)]
    return sorted((int(m[1]), os.path.join(path, m[0])) for m in names if m)


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that are trained, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def save_weights(model: nn.Module, path: str, base_model: str) -> None:
    """A PEFT adapter if the model has one, else the whole model; a ModuleDict's trained weights."""
    if isinstance(model, nn.ModuleDict):
        save_file(trainable(model), os.path.join(path, "trained.safetensors"))
    elif adapter_tensors(model):
        save_adapter(model, path, base_model)
    else:
        save_llama(model, path)


def save_final(folder: RunFolder, model: nn.Module, tokenizer: Tokenizer) -> None:
    """Write OUT/final: the weights and the tokenizer."""
    def write(temporary: str) -> None:
        save_weights(model, temporary, folder.base_model)
        copy_tokenizer(tokenizer, temporary)
    path = os.path.join(folder.path, "final")
    write_folder(path, write)
    print(f"done: {path}")


def save_checkpoint(folder: RunFolder, step: int, model: nn.Module, optimizer: Optimizer) -> str:
    """Write OUT/checkpoint-{step} and remove all but the newest; returns its path."""
    def write(temporary: str) -> None:
        save_weights(model, temporary, folder.base_model)
        moments = {f"{key}.{name}": optimizer.state[p][key] for name, p in trainable(model).items()
                   for key in ("step", "exp_avg", "exp_avg_sq") if p in optimizer.state}
        save_file(moments, os.path.join(temporary, "optimizer.safetensors"))
        hashes = {file: sha256(os.path.join(temporary, file))
                  for file in sorted(os.listdir(temporary))}
        write_json(os.path.join(temporary, "trainer_state.json"),
                   {"step": step, "sha256": hashes, "torch": torch.__version__})

    path = os.path.join(folder.path, f"checkpoint-{step}")
    write_folder(path, write)
    for _, old in checkpoints(folder.path)[:-folder.save_total_limit]:
        shutil.rmtree(old)
    return path


@torch.no_grad()
def load_checkpoint(path: str, model: nn.Module, optimizer: Optimizer) -> int:
    """Restore weights and optimizer in place; returns the number of steps done.

    raises  ValueError naming the file whose bytes are not those that were saved
    """
    state = read_json(os.path.join(path, "trainer_state.json"))
    for file, digest in state["sha256"].items():
        if sha256(os.path.join(path, file)) != digest:
            raise ValueError(f"{os.path.join(path, file)} is damaged (its SHA-256 is not the one "
                             f"saved); remove {path} to continue from an older checkpoint")
    if isinstance(model, nn.ModuleDict):
        tensors = load_file(os.path.join(path, "trained.safetensors"))
        for name, p in trainable(model).items():
            p.copy_(tensors[name])
    elif adapter_tensors(model):
        load_adapter(model, path)
    else:
        loaded = load_llama(path, dtype=model.lm_head.weight.dtype)
        model.load_state_dict(loaded.state_dict())
    moments = load_file(os.path.join(path, "optimizer.safetensors"))
    for name, p in trainable(model).items():
        if f"step.{name}" in moments:
            optimizer.state[p] = {
                "step": moments[f"step.{name}"],                         # AdamW has it on the CPU
                "exp_avg": moments[f"exp_avg.{name}"].to(p.device),
                "exp_avg_sq": moments[f"exp_avg_sq.{name}"].to(p.device)}
    return state["step"]


def resume(folder: RunFolder, model: nn.Module, optimizer: Optimizer, ranks: Ranks,
           total_steps: int) -> int:
    """Go on from the newest checkpoint, if there is one; returns the number of steps done."""
    done, found = 0, checkpoints(folder.path)
    if found:
        done = load_checkpoint(found[-1][1], model, optimizer)
    if ranks.is_first:
        rewind_metrics(folder.path, done)
        print(f"{total_steps} steps" + (f", continuing after step {done}" if done else ""))
    return done


def save_or_stop(folder: RunFolder, step: int, total_steps: int, model: nn.Module,
                 optimizer: Optimizer, ranks: Ranks, stop_signal: float) -> None:
    """After `step` steps: write a checkpoint if one is due; leave if any rank was told to.

    stop_signal   sum over ranks of ranks.stop.signal: 0, or some rank got one
    """
    if step == total_steps:
        return                                           # the result is saved, not a checkpoint
    if ranks.is_first and (stop_signal or step % folder.save_steps == 0):
        save_checkpoint(folder, step, model, optimizer)
    if stop_signal:
        if ranks.is_first:
            print(f"stopped after step {step}, saved; the same command continues")
        sys.exit(128 + (ranks.stop.signal or signal.SIGTERM))


# ---- a finished run -----------------------------------------------------------------------------

class FinishedRun(NamedTuple):
    """See `load_run`."""
    model: Llama
    reference: Reference | None          # None for a reward model
    flags: dict                          # of args.json


def read_run(path: str) -> dict:
    """The flags of a finished run of train.py or rlhf.ppo; raises ValueError or OSError else."""
    file = os.path.join(path, "args.json")
    if not os.path.isfile(file) or not os.path.isdir(os.path.join(path, "final")):
        raise FileNotFoundError(f"{path} is not a finished run of train.py (it has no args.json "
                                "and final/)")
    flags = read_json(file)
    if missing := {"method", "model_name_or_path", "bf16", "lora_r", "dataset",
                   "beta"} - set(flags):
        raise ValueError(f"{file} holds no flags of train.py: {', '.join(sorted(missing))} missing")
    return flags


def load_run(path: str) -> FinishedRun:
    """The model of a finished run of train.py or rlhf.ppo, and its reference."""
    flags, final = read_run(path), os.path.join(path, "final")
    dtype = torch.bfloat16 if flags["bf16"] else torch.float32
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = load_llama(flags["model_name_or_path"], dtype, device)
    if flags.get("sft_adapter"):
        start_from_adapter(base, flags["sft_adapter"], merge=flags["lora_r"] == 0)
    if flags["method"].endswith("reward_model"):
        return FinishedRun(load_adapter(add_score_head(base), final).eval(), None, flags)
    if flags["lora_r"]:
        model = load_adapter(base, final).eval()
        return FinishedRun(model, partial(lora_disabled, model), flags)
    model = load_llama(final, dtype, device).eval()
    return FinishedRun(model, partial(nullcontext, base), flags)


def held_out_records(path: str, flags: dict, dataset: str | None) -> tuple[str, list[Record]]:
    """(file, records) to measure a run on: `dataset`, else what the run held out of its own data."""
    file = dataset or flags["dataset"]
    records = read_dataset(file)
    if dataset is None:
        records = split_by_prompt(records, flags["held_out"])[1]
    if not records:
        raise ValueError(f"{path} held out nothing of {file}: train it with --held_out, or "
                         "pass --dataset")
    return file, records
