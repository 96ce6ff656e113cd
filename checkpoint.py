"""What a run leaves on disk: whole or absent, and enough to continue to the same bits.

    OUT/args.json          every flag, and the SHA-256 of the data; written first
    OUT/metrics.jsonl      one JSON object per logged step
    OUT/checkpoint-N/      adapter (or model), optimizer.safetensors, trainer_state.json; ppo.py,
                           which trains two adapters: trained.safetensors instead
    OUT/final/             the result: a PEFT adapter, or a Hugging Face model

A folder is written as `.tmp-NAME`, flushed to disk and renamed: the rename is the commit. Nothing
random is stored: data order and dropout are functions of (seed, step, rank).
"""
import hashlib
import json
import os
import re
import shutil
from functools import partial

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora import adapter_tensors, load_adapter, save_adapter, start_from_adapter
from model import load_llama, save_llama
from reward import add_score_head
from step import adapters_off, frozen_copy
from tokenizer import copy_tokenizer
from weights import read_json


def sha256(path: str) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _flush(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def write_folder(path: str, write) -> None:
    """Call write(temporary folder), then move it to `path` in one step; an existing one stays."""
    if os.path.isdir(path):
        return
    parent, name = os.path.split(path)
    temporary = os.path.join(parent, f".tmp-{name}")
    shutil.rmtree(temporary, ignore_errors=True)        # left by a killed run
    os.makedirs(temporary)
    write(temporary)
    for file in os.listdir(temporary):
        _flush(os.path.join(temporary, file))
    _flush(temporary)
    os.rename(temporary, path)
    _flush(parent)


def write_text(path: str, text: str) -> None:
    temporary = f"{path}.{os.getpid()}.tmp"             # two processes may write the same file
    with open(temporary, "w", encoding="utf-8") as stream:
        stream.write(text)
    _flush(temporary)
    os.replace(temporary, path)


# ---- the output folder --------------------------------------------------------------------------

# Flags that may change between a run and its continuation: they change no number.
FREE_FLAGS = {"output_dir", "overwrite_output_dir", "logging_steps", "save_steps",
              "save_total_limit"}


def changed_flags(file: str, flags: dict) -> str:
    """What differs from the flags kept in a file, in words; "" if nothing does."""
    before = read_json(file)
    return "; ".join(f"{key} was {before.get(key)!r}, now {flags[key]!r}" for key in flags
                     if key not in FREE_FLAGS and before.get(key) != flags[key])


def claim_output_dir(path: str, flags: dict, overwrite: bool) -> None:
    """Make `path` this run's, or find it to be: a killed run with the same flags is continued.

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
    write_text(file, json.dumps(flags, indent=2) + "\n")


def claim_file(out: str, flags: dict, batch_size: int, total: int, overwrite: bool) -> int:
    """Make `out` this run's of generate.py, or find it to be; returns the number of rows it has.

    OUT.args.json keeps the flags. Whole batches stay; what a kill left of the last one goes.
    raises   ValueError if the file is not this command's
    """
    flags_file = out + ".args.json"
    if os.path.exists(out) and not overwrite:
        if not os.path.isfile(flags_file):
            raise ValueError(f"{out} exists and was not written by this command; choose another "
                             "--out, or pass --overwrite")
        if changed := changed_flags(flags_file, flags):
            raise ValueError(f"{out} was written with other flags ({changed}); choose another "
                             "--out, or pass --overwrite")
        with open(out, "r+b") as file:
            ends = [0]
            for line in file:
                ends += [ends[-1] + len(line)] if line.endswith(b"\n") else []
            done = len(ends) - 1
            done -= done % batch_size if done < total else 0
            file.truncate(ends[done])
        return done
    open(out, "wb").close()               # first: a kill in between must not leave old rows
    write_text(flags_file, json.dumps(flags, indent=2) + "\n")
    return 0


def checkpoints(path: str) -> list[tuple[int, str]]:
    """(step, folder) of every checkpoint, oldest first; the renamed ones are the whole ones."""
    names = [re.fullmatch(r"checkpoint-(\d+)", name) for name in os.listdir(path)]
    return sorted((int(m[1]), os.path.join(path, m[0])) for m in names if m)


def rewind_metrics(path: str, step: int) -> None:
    """Drop the lines of metrics.jsonl past `step`: they will be written again."""
    file = os.path.join(path, "metrics.jsonl")
    if not os.path.isfile(file):
        return
    kept = []
    with open(file, encoding="utf-8") as stream:
        for line in stream:
            # a kill may have cut the last line short: without its newline it is not a line
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
    write_text(file, "".join(kept))


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

def trainable(model) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def save_weights(model, path: str, base_model: str) -> None:
    """A PEFT adapter if the model has one, else the whole model; a ModuleDict's trained weights."""
    if isinstance(model, torch.nn.ModuleDict):
        save_file(trainable(model), os.path.join(path, "trained.safetensors"))
    elif adapter_tensors(model):
        save_adapter(model, path, base_model)
    else:
        save_llama(model, path)


def save_final(output_dir: str, model, base_model: str, tokenizer) -> None:
    """Write OUT/final: the weights and the tokenizer."""
    def write(folder):
        save_weights(model, folder, base_model)
        copy_tokenizer(tokenizer, folder)
    path = os.path.join(output_dir, "final")
    write_folder(path, write)
    print(f"done: {path}")


def save_checkpoint(output_dir: str, step: int, model, optimizer, base_model: str,
                    keep: int) -> str:
    """Write OUT/checkpoint-{step} and remove all but the newest `keep`; returns its path."""
    def write(folder):
        save_weights(model, folder, base_model)
        state = {f"{key}.{name}": optimizer.state[p][key] for name, p in trainable(model).items()
                 for key in ("step", "exp_avg", "exp_avg_sq") if p in optimizer.state}
        save_file(state, os.path.join(folder, "optimizer.safetensors"))
        hashes = {file: sha256(os.path.join(folder, file)) for file in sorted(os.listdir(folder))}
        state = {"step": step, "sha256": hashes, "torch": torch.__version__}
        with open(os.path.join(folder, "trainer_state.json"), "w", encoding="utf-8") as stream:
            json.dump(state, stream, indent=2)

    path = os.path.join(output_dir, f"checkpoint-{step}")
    write_folder(path, write)
    for _, old in checkpoints(output_dir)[:-keep]:
        shutil.rmtree(old)
    return path


@torch.no_grad()
def load_checkpoint(path: str, model, optimizer) -> int:
    """Restore weights and optimizer in place; returns the number of steps done.

    raises  ValueError naming the file whose bytes are not those that were saved
    """
    state = read_json(os.path.join(path, "trainer_state.json"))
    for file, digest in state["sha256"].items():
        if sha256(os.path.join(path, file)) != digest:
            raise ValueError(f"{os.path.join(path, file)} is damaged (its SHA-256 is not the one "
                             f"saved); remove {path} to continue from an older checkpoint")
    if isinstance(model, torch.nn.ModuleDict):
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
            optimizer.state[p] = {key: moments[f"{key}.{name}"].to(p.device if key != "step" else
                                                                   "cpu")
                                  for key in ("step", "exp_avg", "exp_avg_sq")}
    return state["step"]


def resume(output_dir: str, model, optimizer, rank: int, total_steps: int) -> int:
    """Go on from the newest checkpoint, if there is one; returns the number of steps done."""
    first, found = 0, checkpoints(output_dir)
    if found:
        first = load_checkpoint(found[-1][1], model, optimizer)
    if rank == 0:
        rewind_metrics(output_dir, first)
        print(f"{total_steps} steps" + (f", continuing after step {first}" if first else ""))
    return first


# ---- a finished run -----------------------------------------------------------------------------

def read_run(path: str) -> dict:
    """The flags of a finished run of train.py or ppo.py; raises ValueError or OSError else."""
    file = os.path.join(path, "args.json")
    if not os.path.isfile(file) or not os.path.isdir(os.path.join(path, "final")):
        raise FileNotFoundError(f"{path} is not a finished run of train.py (it has no args.json "
                                "and final/)")
    flags = read_json(file)
    if missing := {"method", "model_name_or_path", "bf16", "lora_r", "dataset",
                   "beta"} - set(flags):
        raise ValueError(f"{file} holds no flags of train.py: {', '.join(sorted(missing))} missing")
    return flags


def load_run(path: str):
    """(model, callable giving its reference, flags) of a finished run of train.py or ppo.py.

    A reward model has no reference: None.
    """
    flags, final = read_run(path), os.path.join(path, "final")
    dtype = torch.bfloat16 if flags["bf16"] else torch.float32
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = load_llama(flags["model_name_or_path"], dtype, device)
    if flags.get("sft_adapter"):
        start_from_adapter(base, flags["sft_adapter"], merge=flags["lora_r"] == 0)
    if flags["method"].endswith("reward_model"):
        return load_adapter(add_score_head(base), final).eval(), None, flags
    if flags["lora_r"]:
        model = load_adapter(base, final).eval()
        return model, partial(adapters_off, model), flags
    return load_llama(final, dtype, device).eval(), partial(frozen_copy, base), flags
