"""The data of the real study: pairs that fit, split by prompt; what is computed of them once."""
import argparse
import hashlib
import json
import os
from collections.abc import Callable

import torch
from torch import Tensor

from data import ROLES, Record, read_dataset, split_by_prompt
from files.rows import dataset_sha256
from files.text import read_json, write_json, write_text
from study.real_scores import make_pairs
from tokenizer import Tokenizer, encode_dialogue

BETA, BATCH = 0.1, 8            # pairs per step


def fitting_pairs(dataset: str, tokenizer: Tokenizer, max_length: int) -> tuple[list[Record], int]:
    """(records of a good and a bad answer to a user that fit into max_length whole, how many pairs
    are left out)."""
    records = [record for record in read_dataset(dataset) if set(record.scores) == {0, 1}]

    def size(record: Record) -> int:
        return max(sum(map(len, encode_dialogue(tokenizer, [*record.prompt, ("Assistant", text)])))
                   for text in record.responses)
    fitting = [record for record in records
               if record.prompt[-1][0] == "Human" and size(record) <= max_length]
    return fitting, len(records) - len(fitting)


def split(records: list[Record], pairs: int) -> dict[str, list[Record]]:
    """{"train", "tune", "held-out", "judge"}: thirds by prompt; `pairs` of the first to train on,
    the rest of it to tune on."""
    rest, judge = split_by_prompt(records, 1 / 3)
    first, held_out = split_by_prompt(rest, 2 / 3)       # of the same hash: those in [1/3, 2/3)
    return {"train": first[:pairs], "tune": first[pairs:], "held-out": held_out, "judge": judge}


def write_pairs(file: str, records: list[Record]) -> None:
    names = {name: role for role, name in ROLES.items()}
    rows = []
    for record in records:
        answers = {score: [{"role": "assistant", "content": text}]
                   for score, text in zip(record.scores, record.responses, strict=True)}
        rows.append({"prompt": [{"role": names[role], "content": text}
                                for role, text in record.prompt],
                     "chosen": answers[1], "rejected": answers[0]})
    write_text(file, "".join(json.dumps(row) + "\n" for row in rows))


class Data:
    """A data set, split, and what is computed once of it: the base's log-probs, the judge's r."""

    def __init__(self, args: argparse.Namespace, name: str, tokenizer: Tokenizer):
        file = getattr(args, name)
        prefix = "qa_" if name == "qa" else ""
        pairs = getattr(args, prefix + "pairs")
        self.max_length = getattr(args, prefix + "max_length")
        settings = {"model": os.path.basename(os.path.abspath(args.model)), "pairs": pairs,
                    "max_length": self.max_length, "held_out": args.held_out,
                    "answers": args.answers, "new_tokens": args.new_tokens,
                    "precision": "bf16" if args.bf16 else "fp32", "batch": BATCH, "beta": BETA}
        settings["id"] = hashlib.sha256(
            json.dumps([settings, [dataset_sha256(file)]]).encode()).hexdigest()[:8]
        self.settings, self.folder = settings, os.path.join(args.work, settings["id"], name)
        os.makedirs(self.folder, exist_ok=True)
        records, left_out = fitting_pairs(file, tokenizer, self.max_length)
        parts = split(records, pairs)
        parts["held-out"] = parts["held-out"][:args.held_out]
        parts["tune"] = parts["tune"][:args.held_out]
        sizes = {part: len(found) for part, found in parts.items()}
        print(f"{file}: {len(records)} pairs fit into {self.max_length} tokens, {left_out} do not; "
              + ", ".join(f"{part} {size}" for part, size in sizes.items()))
        if min(sizes.values()) < 2:
            raise ValueError(f"{file} has too few pairs that fit into {self.max_length} tokens: raise "
                             f"--{prefix}max_length or --held_out, or lower --{prefix}pairs")
        for part, found in parts.items():
            if not os.path.isfile(self.file(part)):
                write_pairs(self.file(part), found)
        self.pairs = {part: make_pairs(parts[part], tokenizer, self.max_length)
                      for part in ("held-out", "tune")}
        self.prompts = self.pairs["held-out"].trees[:args.answers]
        self.sizes = sizes | {"fit": len(records), "left out": left_out}

    def file(self, part: str) -> str:
        return os.path.join(self.folder, f"{part}.jsonl")

    def cached(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        """A tensor that is the same for all runs: computed once, then read from its file."""
        file = os.path.join(self.folder, f"{name}.json")
        if not os.path.isfile(file):
            write_json(file, {"values": compute().tolist()})
        return torch.tensor(read_json(file)["values"], dtype=torch.float64)
