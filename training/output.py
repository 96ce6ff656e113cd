"""Who writes to an output, and with which flags and inputs: a run's folder, a file of answers.

The same command continues what it finds there; any other is refused, by the name of what differs.
"""
import argparse
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from files.fingerprint import fingerprints
from files.lock import locked
from files.rows import dataset_sha256
from files.text import (append_text, json_value, read_json, remove_leftovers,
                        whole_lines, write_json, write_text)
from tokenizer import recorded_template
from training.ranks import Ranks

# Flags that may change between a run and its continuation: they change no number, or only the
# order of sums, and with it the last bits.
FREE_FLAGS = {"output_dir", "logging_steps", "save_steps", "eval_steps", "report_to",
              "start_check"}
ROUNDING_FLAGS = {"kernels", "micro_tokens", "gradient_checkpointing", "fsdp",
                  "world_size", "torch", "device"}
LOCK = ".lock"


def run_flags(args: argparse.Namespace, inputs: tuple[str | None, ...], ranks: Ranks,
              device: torch.device) -> dict:
    """What args.json stores: the flags, fingerprints of all inputs, what the last bits depend on.

    inputs   what the run reads beside its data and its model, see `fingerprints`
    """
    return vars(args) | {
        "dataset_sha256": dataset_sha256(args.dataset),
        "inputs": fingerprints(args.model_name_or_path, *inputs),
        **recorded_template(args.model_name_or_path, args.chat_template),
        "world_size": ranks.world_size, "torch": torch.__version__,
        "device": (torch.cuda.get_device_name(device) if device.type == "cuda" else
                   f"cpu, {torch.get_num_threads()} threads")}


def changed_flags(file: str, flags: dict) -> tuple[str, str]:
    """What differs from the flags stored in a file, in words: what changes the result, and what
    changes its rounding alone; "" for nothing."""
    before, changed, rounding = read_json(file), [], []
    for key in flags.keys() - FREE_FLAGS:
        stored, now = before.get(key), flags[key]
        if key == "inputs":
            stored = stored if isinstance(stored, dict) else {}
            changed += [f"{name} has changed" for name in stored | now
                        if stored.get(name) != now.get(name)]
        elif stored != now:
            (rounding if key in ROUNDING_FLAGS else changed).append(
                f"{key} was {stored!r}, now {now!r}")
    return "; ".join(sorted(changed)), "; ".join(sorted(rounding))


def check_output_dir(path: str, flags: dict) -> None:
    """Check that a folder is new, or belongs to this run: a killed run with the same flags is
    continued.

    raises  ValueError if it holds a finished run, a run with other flags or inputs (each named), or
            anything that is no run at all
    """
    file = os.path.join(path, "args.json")
    if os.path.isfile(file):
        if changed := changed_flags(file, flags)[0]:
            raise ValueError(f"{path} holds a run with other flags ({changed}); to continue "
                             "it give them as they were, else choose another --output_dir")
        if os.path.isdir(os.path.join(path, "final")):
            raise ValueError(f"{path} holds a finished run; choose another --output_dir, or "
                             "remove the folder")
    elif os.path.isdir(path):              # a run that was killed at once leaves its first write
        if not all(re.fullmatch(r"\.lock|args\.json\.\d+\.tmp", name) for name in os.listdir(path)):
            raise ValueError(f"{path} is not empty and holds no run of train.py; choose another "
                             "--output_dir")
    elif os.path.lexists(path):
        raise ValueError(f"{path} is a file; choose another --output_dir")


@contextmanager
def own_output_dir(path: str, flags: dict, ranks: Ranks) -> Iterator[None]:
    """Inside, no other process writes to the run folder.

    raises  ValueError if one does, and as `check_output_dir`
    """
    if not ranks.is_first:
        yield
        return
    check_output_dir(path, flags)
    with locked(os.path.join(path, LOCK), path):
        yield


def claim_output_dir(path: str, flags: dict) -> None:
    """Create the run folder, or find it to be this run's; see `check_output_dir`."""
    check_output_dir(path, flags)
    file = os.path.join(path, "args.json")
    os.makedirs(path, exist_ok=True)
    remove_leftovers(path)
    if os.path.isfile(file):
        if rounding := changed_flags(file, flags)[1]:
            print(f"continuing with other rounding ({rounding})")
        return
    write_json(file, flags)


def rows_done(args: argparse.Namespace, flags: dict) -> list[str]:
    """The lines that a generate.py command with these flags finds in its file --out.

    raises   ValueError if the file is another command's
    """
    out, flags_file = args.out, args.out + ".args.json"
    if os.path.lexists(out) and not os.path.isfile(out):
        raise ValueError(f"{out} is not a file; choose another --out")
    if args.overwrite or not os.path.isfile(out) or not os.path.getsize(out):
        return []
    if not os.path.isfile(flags_file):
        raise ValueError(f"{out} exists and was not written by this command; choose another "
                         "--out, or pass --overwrite")
    if changed := changed_flags(flags_file, flags)[0]:
        raise ValueError(f"{out} was written with other flags ({changed}); choose another --out, "
                         "or pass --overwrite")
    return whole_lines(out)


def file_flags(args: argparse.Namespace) -> dict:
    """What OUT.args.json stores of a generate.py command."""
    flags = vars(args) | {"dataset_sha256": dataset_sha256(args.dataset),
                          "inputs": fingerprints(args.model, args.chat_template, *(args.adapter or ()))}
    del flags["out"], flags["overwrite"]
    return flags


@contextmanager
def own_file(args: argparse.Namespace, total: int) -> Iterator[int]:
    """Inside, the file --out of generate.py belongs to this command and process; gives the number
    of rows that are done.

    OUT.args.json stores the flags. Whole batches stay; what a kill left of the last one goes.
    total    rows of a whole file
    raises   ValueError if the file is another command's
    """
    out, flags_file, flags = args.out, args.out + ".args.json", file_flags(args)
    with locked(out + ".lock", out):
        folder, names = os.path.dirname(out) or ".", map(os.path.basename, (out, flags_file))
        remove_leftovers(folder, [*names])
        rows = rows_done(args, flags)
        done = len(rows) if len(rows) >= total else len(rows) - len(rows) % args.batch_size
        write_text(out, "".join(rows[:done]))      # first: a kill must leave no rows of other flags
        write_json(flags_file, flags)
        yield done


def write_metrics(path: str, line: dict, name: str = "metrics.jsonl") -> None:
    """Append a line to metrics.jsonl, or to eval.jsonl."""
    append_text(os.path.join(path, name), json.dumps(line) + "\n")


def rewind_metrics(path: str, step: int, name: str = "metrics.jsonl") -> None:
    """Drop the lines of metrics.jsonl, or of eval.jsonl, past `step`: they will be written again.

    raises   ValueError naming a line that does not hold a step after that of the line before it
    """
    file, kept, last = os.path.join(path, name), [], 0
    for number, line in enumerate(whole_lines(file), 1):
        try:
            found = json_value(line.encode())["step"]
        except (ValueError, LookupError, TypeError):
            found = None
        if type(found) is not int or found <= last:
            raise ValueError(f"{file}:{number}: damaged: no step after {last} in {line[:60]!r}; "
                             "mend or remove the line, and the same command continues")
        kept += [line] if found <= step else []
        last = found
    if os.path.isfile(file):
        write_text(file, "".join(kept))
