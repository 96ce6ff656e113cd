"""The training data as token ids: tokenized once a machine, then mapped into memory by every rank.

Token ids lie flat in the files of a folder tokens-KEY beside the runs, where the next run on the
same data finds them; KEY is a hash of all they depend on. A tree's lists are made when a step asks
for them, so a rank holds about 1.1 KB for a pair of HH, most of it shared with the other ranks.
"""
import argparse
import hashlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain, islice

import numpy as np

from data import Record, count_lines, describe_data, is_held_out, read_files
from files.cli import show_progress
from files.fingerprint import MODEL_FILES
from files.lock import InUse, locked
from files.rows import dataset_sha256
from files.text import read_json, sha256, write_folder, write_json, writing
from packing import Points, Tree, add_point, each_tree, one_negative_per_tree, pair_points
from step import Method, check_fit
from tokenizer import Tokenizer
from training.ranks import Ranks

# The files, with their types: see TokenTable.
ARRAYS = {"ids": np.int32, "sizes": np.int32, "scores": np.float64, "pairs": np.int32,
          "shapes": np.int32}
TREES_AT_ONCE = 4096
# An edit of what makes token ids must not find those of before.
SOURCES = ("data.py", "packing.py", "tokenizer.py", "files/rows.py", "files/vocabulary.py",
           "files/chat_template.py", "training/token_cache.py")


# ---- flat arrays --------------------------------------------------------------------------------

@dataclass(frozen=True, eq=False)
class TokenTable:
    """Trees as flat arrays; table[number] is a `Tree`.

    ids        int32              of every tree: its prompt, then its responses
    sizes      int32              of these texts, in tokens
    scores     [R] float64        z of every response
    pairs      [P, 2] int32       (chosen, rejected) responses of their tree
    shapes     [trees, 3] int32   how many ids, responses and pairs a tree has
    notes      what the data hold and what was cut, for the screen
    reference_logps   [R] float64, nats, or None; see `Tree`
    """
    ids: np.ndarray
    sizes: np.ndarray
    scores: np.ndarray
    pairs: np.ndarray
    shapes: np.ndarray
    notes: str = ""
    reference_logps: np.ndarray | None = None

    @cached_property
    def starts(self) -> np.ndarray:
        """[trees + 1, 3] int64   where the ids, responses and pairs of each tree start"""
        return np.concatenate([np.zeros((1, 3), np.int64), self.shapes.cumsum(0, np.int64)])

    @property
    def num_tokens(self) -> list[int]:
        """Of every tree, as `Tree.num_tokens`."""
        return (self.shapes[:, 0] - self.shapes[:, 1]).tolist()

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, number: int) -> Tree:
        start, first, first_pair = self.starts[number].tolist()
        _, last, last_pair = self.starts[number + 1].tolist()
        texts = []
        for size in self.sizes[first + number:last + number + 1].tolist():
            texts.append(self.ids[start:start + size].tolist())
            start += size
        logps = self.reference_logps
        return Tree(texts[0], texts[1:], self.scores[first:last].tolist(),
                    [tuple(pair) for pair in self.pairs[first_pair:last_pair].tolist()],
                    None if logps is None else logps[first:last].tolist())


def flat_arrays(trees: list[Tree]) -> dict[str, np.ndarray]:
    """The arrays of a TokenTable."""
    texts = [ids for tree in trees for ids in (tree.prompt_ids, *tree.response_ids)]
    shapes = [(len(tree.prompt_ids) + sum(map(len, tree.response_ids)), len(tree.scores),
               len(tree.pairs)) for tree in trees]
    return {"ids": np.fromiter(chain.from_iterable(texts), np.int32),
            "sizes": np.array([len(ids) for ids in texts], np.int32),
            "scores": np.array([score for tree in trees for score in tree.scores], np.float64),
            "pairs": np.array([pair for tree in trees for pair in tree.pairs],
                              np.int32).reshape(-1, 2),
            "shapes": np.array(shapes, np.int32).reshape(-1, 3)}


# ---- the folder ---------------------------------------------------------------------------------

class Survey:
    """What a first reading of the data finds: it is read twice, so that memory holds one record."""

    def __init__(self, held_out: float, for_pairs: bool):
        self.share, self.for_pairs = held_out, for_pairs
        self.training, self.held_out = 0, 0              # records
        self.scores: set[float] = set()                  # these and all below: of training records
        self.has_pairs, self.a_score = False, {}         # the first score of a prompt, by its hash
        self.points: Points = {}                         # where a method trains on pairs

    def passing(self, records: Iterable[Record]) -> Iterator[Record]:
        """The records, looked at as they pass."""
        for record in records:
            yield record
            if is_held_out(record, self.share):
                self.held_out += 1
                continue
            self.training += 1
            self.scores.update(record.scores)
            first = self.a_score.setdefault(hash(record.prompt), record.scores[0])
            self.has_pairs |= any(score != first for score in record.scores)
            if self.for_pairs:
                add_point(self.points, record)


def write_tokens(folder: str, args: argparse.Namespace, methods: Mapping[str, Method],
                 tokenizer: Tokenizer, shown: bool) -> None:
    """Write the trees that a method trains on to a folder.

    shown    whether progress is printed
    raises   ValueError or OSError, one sentence, for data that do not fit
    """
    trains_on, counts, cuts = methods[args.method].trains_on, Counter(), Counter()
    survey = Survey(args.held_out, trains_on == "pairs")
    records = survey.passing(read_files(args.dataset, counts))
    records = show_progress(records, "records read", shown=shown)
    notes = [describe_data(args.dataset, records, counts), f"held out: {survey.held_out} records"]
    check_fit(args.method, survey.scores, survey.has_pairs, methods)
    records = show_progress(
        (record for record in read_files(args.dataset, Counter())
         if not is_held_out(record, args.held_out)), "records tokenized", survey.training, shown)
    if trains_on == "pairs":
        records = pair_points(records, cuts, survey.points)
    trees = each_tree(records, tokenizer, "negative" if trains_on == "anchors" else trains_on,
                      args.max_length, args.max_prompt_length, cuts)
    files, found = {name: os.path.join(folder, f"{name}.bin") for name in ARRAYS}, False
    while chunk := list(islice(trees, TREES_AT_ONCE)):
        found = True
        if trains_on == "anchors":
            chunk = one_negative_per_tree(chunk)
        for name, array in flat_arrays(chunk).items():
            with writing(files[name]), open(files[name], "ab") as file:
                file.write(array.tobytes())
    if not found:                            # texts that were scored both ways made the only pairs
        check_fit(args.method, survey.scores, False, methods)
    write_json(os.path.join(folder, "about.json"), {
        "notes": "\n".join([*notes, *count_lines(cuts)]),
        "sha256": {name: sha256(file) for name, file in files.items()}})


def read_tokens(folder: str) -> TokenTable:
    """The table in a folder; raises ValueError, naming the file, where it is damaged."""
    remedy = f"remove {folder}, and the same command makes it again"
    try:
        about = read_json(os.path.join(folder, "about.json"), {"notes": str, "sha256": dict})
    except (OSError, ValueError) as error:
        raise ValueError(f"{error}; {remedy}") from None
    arrays = {}
    for name, kind in ARRAYS.items():
        file = os.path.join(folder, f"{name}.bin")
        if not os.path.isfile(file) or sha256(file) != about["sha256"].get(name):
            raise ValueError(f"{file}: damaged: it is not as it was written; {remedy}")
        # an empty file cannot be mapped
        arrays[name] = np.asarray(np.memmap(file, kind, "r")) if os.path.getsize(file) else (
            np.zeros(0, kind))
    arrays["pairs"], arrays["shapes"] = (arrays[name].reshape(-1, width)
                                         for name, width in (("pairs", 2), ("shapes", 3)))
    return TokenTable(**arrays, notes=about["notes"])


def tokens_key(args: argparse.Namespace, trains_on: str, tokenizer: Tokenizer) -> str:
    """Names what the trees depend on: data, tokenizer, template, lengths, and the code."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    files = [os.path.join(root, name) for name in SOURCES]
    files += [os.path.join(tokenizer.folder, name) for name in MODEL_FILES]
    inputs = [dataset_sha256(args.dataset), tokenizer.template_text, tokenizer.legacy, trains_on,
              args.held_out, args.max_length, args.max_prompt_length,
              [sha256(file) if os.path.isfile(file) else None for file in files]]
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:16]


def token_table(args: argparse.Namespace, methods: Mapping[str, Method], tokenizer: Tokenizer,
                ranks: Ranks) -> TokenTable:
    """The trees that --method trains on: of the folder beside the runs, made first if need be.

    The first rank of a machine makes it, unless another run is doing so; the others wait. A killed
    one leaves no folder of this name.
    raises   as `write_tokens` and `read_tokens`
    """
    key = tokens_key(args, methods[args.method].trains_on, tokenizer)
    folder = os.path.join(os.path.dirname(args.output_dir), f"tokens-{key}")
    if ranks.is_first and os.path.isdir(folder):
        print(f"token ids: those of {folder}")
    waits = False
    while not os.path.isdir(folder):
        if ranks.is_first_here:
            try:
                with locked(f"{folder}.lock", folder):
                    write_folder(folder, partial(write_tokens, args=args, methods=methods,
                                                 tokenizer=tokenizer, shown=ranks.is_first))
                continue
            except InUse as error:
                if not waits:
                    print(f"waiting: {error}", file=sys.stderr)
                waits = True
        time.sleep(0.2)
    return read_tokens(folder)
