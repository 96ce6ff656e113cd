"""What a run leaves on disk: whole or absent, and enough to continue to the same bits.

    OUT/.lock              while a process writes here: which one, see files/lock.py
    OUT/args.json          every flag, and fingerprints of all inputs; written first
    OUT/metrics.jsonl      one JSON object per logged step; eval.jsonl: per evaluation
    OUT/checkpoint-N/      adapter (or model), optimizer.safetensors, trainer_state.json; of PPO,
                           which trains two adapters: trained.safetensors instead
    OUT/final/             the result: a PEFT adapter, or a Hugging Face model; manifest.json

Nothing random is stored: data order and dropout are functions of (seed, step, rank).
"""
import argparse
import os
import re
import signal
import sys
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn as nn
from safetensors.torch import load_file
from torch import Tensor
from torch.optim import Optimizer

from data import Record, is_held_out, read_files
from files.cli import show_progress
from files.folders import what_it_is
from files.interrupt import speaks
from files.lock import holds
from files.manifest import FINAL, check_final, read_manifest, write_manifest
from files.text import check_keys, read_json, remove_folder, sha256, write_folder
from files.weights import save_tensors
from lora import (adapter_tensors, add_score_head, load_adapter, lora_disabled,
                  read_adapter_config, save_adapter, start_from_adapter)
from model import Llama, load_llama, save_llama
from step import Reference
from tokenizer import Tokenizer, save_tokenizer
from training.output import LOCK, rewind_metrics
from training.ranks import Ranks


STATE = "trainer_state.json"
CHECKPOINTS = 2                          # that stay, the newest


# ---- which model a run starts from --------------------------------------------------------------

def base_name(args: argparse.Namespace) -> str:
    """What training starts from. With an SFT adapter this is 'BASE + ADAPTER', deliberately not a
    valid path."""
    return args.model_name_or_path + (f" + {args.sft_adapter}" if args.sft_adapter else "")


def flags_beside(final: str) -> dict | None:
    """The flags of the run that wrote a folder such as RUN/final; None where no run did."""
    file = os.path.join(os.path.dirname(os.path.abspath(final)), "args.json")
    if not os.path.isfile(file):
        return None
    return read_json(file, {"sft_adapter": str | None, "chat_template": str | None})


def starts_from(adapter: str) -> str | None:
    """The SFT adapter that the run which wrote the folder `adapter` started from, if it did."""
    return (flags_beside(adapter) or {}).get("sft_adapter")


def check_sft_adapter(adapter: str | None) -> None:
    """Raise ValueError or OSError for what training cannot start on top of."""
    if adapter is None:
        return
    read_adapter_config(adapter, has_head=False)
    if before := starts_from(adapter):
        raise ValueError(
            f"--sft_adapter {adapter} is itself on top of {before}; merge both with "
            "python -m tools.export, and pass the result as --model_name_or_path")


def check_order(adapters: list[str]) -> None:
    """Raise ValueError or OSError for what is no adapter of a policy, and for one that was trained
    on top of an adapter that does not stand before it."""
    for before, adapter in zip([None, *adapters], adapters):
        read_adapter_config(adapter, has_head=False)
        first = starts_from(adapter)
        if first and os.path.abspath(first) != os.path.abspath(before or ""):
            raise ValueError(f"{adapter} was trained on top of {first}; pass --adapter {first} "
                             f"{adapter}")


def trained_template(final: str) -> str | None:
    """The chat template, as Tokenizer takes it, that the model or adapter in a run's final/ was
    trained on; None for another folder."""
    flags = flags_beside(final)
    if flags is None:
        return None
    name = flags.get("chat_template") or "vicuna"
    return name if name == "vicuna" else os.path.join(final, "chat_template.jinja")


def tokenizer_after(model: str, adapters: list[str], chat_template: str | None) -> Tokenizer:
    """The tokenizer of a model with adapters; chat_template None: the one they were trained on."""
    trained = trained_template(([model] + adapters)[-1])
    tokenizer = Tokenizer(model, chat_template=chat_template or trained)
    if chat_template and trained and (
            tokenizer.template_text != Tokenizer(model, chat_template=trained).template_text):
        tokenizer.notes.append(f"--chat_template {chat_template} is another one than "
                               f"{([model] + adapters)[-1]} was trained on")
    return tokenizer


# ---- checkpoints --------------------------------------------------------------------------------

@dataclass(frozen=True)
class RunFolder:
    """Where a run saves, and when."""
    path: str
    base_model: str          # see `base_name`
    save_steps: int          # between checkpoints


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
        save_tensors(trainable(model), os.path.join(path, "trained.safetensors"))
    elif adapter_tensors(model):
        save_adapter(model, path, base_model)
    else:
        save_llama(model, path)


def save_final(folder: RunFolder, model: nn.Module, tokenizer: Tokenizer) -> None:
    """Write OUT/final: the weights and the tokenizer."""
    def write(temporary: str) -> None:
        save_weights(model, temporary, folder.base_model)
        save_tokenizer(tokenizer, temporary)
        write_manifest(os.path.join(temporary, FINAL),
                       args_sha256=sha256(os.path.join(folder.path, "args.json")))
    path = os.path.join(folder.path, "final")
    write_folder(path, write)
    print(f"done: {path}")


def save_checkpoint(folder: RunFolder, step: int, model: nn.Module, optimizer: Optimizer,
                    loop: list | None = None) -> str:
    """Write OUT/checkpoint-{step} and remove all but the newest two; returns its path.

    loop   what `resume` gives back: JSON of the sums that the loop takes from step to step
    """
    def write(temporary: str) -> None:
        save_weights(model, temporary, folder.base_model)
        moments = {f"{key}.{name}": optimizer.state[p][key] for name, p in trainable(model).items()
                   for key in ("step", "exp_avg", "exp_avg_sq") if p in optimizer.state}
        save_tensors(moments, os.path.join(temporary, "optimizer.safetensors"))
        write_manifest(os.path.join(temporary, STATE), step=step, loop=loop,
                       torch=torch.__version__)

    path = os.path.join(folder.path, f"checkpoint-{step}")
    write_folder(path, write)
    for _, old in checkpoints(folder.path)[:-CHECKPOINTS]:
        remove_folder(old)
    return path


@torch.no_grad()
def load_checkpoint(path: str, model: nn.Module, optimizer: Optimizer) -> dict:
    """Restore weights and optimizer in place; returns {"step": steps done, "loop", …}.

    raises  ValueError naming the file whose bytes are not those that were saved
    """
    remedy = f"remove {path} to continue from an older checkpoint"
    state = read_manifest(os.path.join(path, STATE), remedy)
    if os.path.basename(path) != f"checkpoint-{state.get('step')}":
        raise ValueError(f"{path} holds the state after step {state.get('step')}; {remedy}")
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
            # "step" too: on a GPU the fused AdamW reads it there
            optimizer.state[p] = {key: moments[f"{key}.{name}"].to(p.device)
                                  for key in ("step", "exp_avg", "exp_avg_sq")}
    return state


def resume(folder: RunFolder, model: nn.Module, optimizer: Optimizer, ranks: Ranks,
           total_steps: int) -> tuple[int, list | None]:
    """Go on from the newest checkpoint, if there is one; returns (steps done, what
    `save_checkpoint` was given as `loop`)."""
    done, loop, found = 0, None, checkpoints(folder.path)
    if found:
        state = load_checkpoint(found[-1][1], model, optimizer)
        done, loop = state["step"], state.get("loop")
    if ranks.is_first:
        rewind_metrics(folder.path, done)
        rewind_metrics(folder.path, done, "eval.jsonl")
        print(f"{total_steps} steps" + (f", continuing after step {done}" if done else ""),
              flush=True)
    return done, loop


def save_or_stop(folder: RunFolder, step: int, total_steps: int, model: nn.Module,
                 optimizer: Optimizer, ranks: Ranks, stop_signal: float,
                 loop: list | None = None) -> None:
    """After `step` steps: write a checkpoint if one is due; leave if any rank was told to.

    stop_signal   sum over ranks of ranks.stop.signal: 0, or some rank got one
    loop          see `save_checkpoint`
    raises        FileNotFoundError once the run folder is no longer this process's
    """
    if ranks.is_first and not holds(os.path.join(folder.path, LOCK)):
        raise FileNotFoundError(f"{folder.path} was removed, or taken by another process, while "
                                "this run wrote to it; nothing more is saved")
    if step == total_steps:
        return                                           # the result is saved, not a checkpoint
    if ranks.is_first and (stop_signal or step % folder.save_steps == 0):
        save_checkpoint(folder, step, model, optimizer, loop)
    if stop_signal:
        if ranks.is_first:
            print(f"stopped after step {step}, saved; the same command continues")
        sys.exit(128 + (ranks.stop.signal or signal.SIGTERM))


# ---- a finished run -----------------------------------------------------------------------------

RUN_FLAGS = {"method": str, "model_name_or_path": str, "sft_adapter": str | None, "bf16": bool,
             "lora_r": int, "dataset": str, "beta": float, "held_out": float, "max_length": int,
             "max_prompt_length": int, "reward_model": str | None, "lora_alpha": float | None,
             "lora_target_modules": list | None, "chat_template": str | None}


def is_reward_model(flags: dict) -> bool:
    """Whether a run with these flags trained a reward model."""
    return flags["method"].endswith("reward_model")


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
                                f"and final/){what_it_is(path, 'run')}")
    flags = read_json(file)
    if missing := {"method", "model_name_or_path", "bf16", "lora_r", "dataset",
                   "beta"} - set(flags):
        raise ValueError(f"{file} holds no flags of train.py: {', '.join(sorted(missing))} missing")
    check_keys(flags, RUN_FLAGS, file)
    return flags


def load_run(path: str) -> FinishedRun:
    """The model of a finished run of train.py or rlhf.ppo, and its reference."""
    flags, final = read_run(path), os.path.join(path, "final")
    args_file = os.path.join(path, "args.json")
    if check_final(final).get("args_sha256", sha256(args_file)) != sha256(args_file):
        raise ValueError(f"{args_file} has changed since {final} was written; train it again, or "
                         f"remove {os.path.join(final, FINAL)} if you changed it yourself")
    dtype = torch.bfloat16 if flags["bf16"] else torch.float32
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = load_llama(flags["model_name_or_path"], dtype, device)
    if flags.get("sft_adapter"):
        start_from_adapter(base, flags["sft_adapter"], merge=flags["lora_r"] == 0)
    if is_reward_model(flags):
        return FinishedRun(load_adapter(add_score_head(base), final).eval(), None, flags)
    if flags["lora_r"]:
        model = load_adapter(base, final).eval()
        return FinishedRun(model, partial(lora_disabled, model), flags)
    model = load_llama(final, dtype, device).eval()
    return FinishedRun(model, partial(nullcontext, base), flags)


def run_tokenizer(path: str, flags: dict) -> Tokenizer:
    """The tokenizer of a finished run with these flags, and the chat template of its training."""
    return Tokenizer(flags["model_name_or_path"],
                     chat_template=trained_template(os.path.join(path, "final")))


def held_out_records(path: str, flags: dict, dataset: str | None) -> tuple[str, list[Record]]:
    """(file, records) to measure a run on: `dataset`, else what it held out of its own data."""
    file = dataset or flags["dataset"]
    records = [record for record in show_progress(read_files(file, Counter()), "records read",
                                                  shown=speaks())
               if dataset is not None or is_held_out(record, flags["held_out"])]
    if not records:
        raise ValueError(f"{path} held out nothing of {file}: train it with --held_out, or "
                         "pass --dataset")
    return file, records
