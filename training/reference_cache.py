"""The reference's log-probs, computed once and cached as JSON lines.

The reference is frozen: its log-probs of a response are the same in every epoch, and for every run
on the same responses. A run of more than one epoch computes them before its first step and leaves
them beside the runs, in reference-KEY.jsonl, where the next run finds them.
"""
import hashlib
import json
import os
import time
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import accumulate

import numpy as np

from files.cli import time_left
from files.fingerprint import fingerprints
from files.text import append_text, flush_to_disk, whole_lines, write_text
from packing import group_by_size
from step import Compute, Objective, Reference, needs_reference, tree_logps
from training.ranks import Ranks, gather
from training.token_cache import TokenTable


# ---- rows with checksums ------------------------------------------------------------------------

COMPUTE_AGAIN = "remove it, and the same command computes it again"


def seal(body: str, checksum: str) -> tuple[str, str]:
    """(line, its checksum) for the JSON of a row without its last brace.

    checksum   of the line before; for the first the file's name. So each covers all up to its line
    """
    checksum = hashlib.sha256((checksum + body).encode()).hexdigest()[:16]
    return f'{body}, "checksum": "{checksum}"}}\n', checksum


def sealed_lines(file: str, remedy: str) -> list[str]:
    """The whole lines of a file of rows, [] where there is no file.

    remedy   what to do about a damaged file, the end of the error's sentence
    raises   ValueError with file and line where a line, or one before it, is not as it was written
    """
    lines, checksum = whole_lines(file), os.path.basename(file)
    for number, line in enumerate(lines, 1):
        sealed, checksum = seal(line.rpartition(', "checksum": "')[0], checksum)
        if line != sealed:
            raise ValueError(f"{file}:{number}: damaged: the checksum does not fit this line and "
                             f"those before it; {remedy}")
    return lines


def read_rows(file: str, remedy: str = COMPUTE_AGAIN) -> list[dict]:
    """The rows of a file, see `sealed_lines`."""
    return [json.loads(line) for line in sealed_lines(file, remedy)]


# ---- rows in batches ----------------------------------------------------------------------------

def whole_batches(file: str, batches: list[list[int]]) -> tuple[int, str]:
    """(number of batches that a file of rows holds, checksum of its last line); what a kill left of
    the next one is cut off.

    A batch cut short is computed again as a whole: rounding depends on the batch.
    """
    lines, ends = sealed_lines(file, COMPUTE_AGAIN), [0, *accumulate(map(len, batches))]
    done = bisect_right(ends, len(lines)) - 1
    lines = lines[:ends[done]]
    if os.path.isfile(file):
        write_text(file, "".join(lines))
    return done, json.loads(lines[-1])["checksum"] if lines else os.path.basename(file)


def write_rows(file: str, batches: list[list[int]], make_rows: Callable[[list[int]], list[dict]],
               count_tokens: Callable[[dict], int], title: str, ranks: Ranks) -> None:
    """Append a row per number to a file, batch by batch, from where a killed run left it.

    batches       numbers; batches go to ranks in turn, so that their content does not depend on
                  the number of ranks
    make_rows     a batch -> its rows, in order
    count_tokens  of a row, for the progress line
    title         of the progress line
    Exits after the current batch once ranks.stop has a signal.
    """
    first, checksum = gather(whole_batches(file, batches) if ranks.is_first else None)[0]
    start, tokens = time.perf_counter(), 0
    for number in range(first, len(batches), ranks.world_size):
        mine = number + ranks.rank
        rows = make_rows(batches[mine]) if mine < len(batches) else make_rows([])
        shares = gather((rows, ranks.stop.signal))
        done = min(number + ranks.world_size, len(batches))
        if ranks.is_first:
            new_rows = [row for share, _ in shares for row in share]
            lines = []
            for row in new_rows:
                line, checksum = seal(json.dumps(row)[:-1], checksum)
                lines.append(line)
            append_text(file, "".join(lines))
            tokens += sum(map(count_tokens, new_rows))
            seconds = time.perf_counter() - start
            print(f"{title}: batch {done}/{len(batches)}  {tokens / seconds:.0f} tok/s  "
                  f"{time_left(seconds, done - first, len(batches) - first)}", flush=True)
        if any(stop_signal for _, stop_signal in shares):
            if ranks.is_first:
                print(f"stopped during {title}, saved; the same command continues")
            raise SystemExit(128 + max(stop_signal for _, stop_signal in shares))
    gather(None)                                # rank 0 has written before another reads


# ---- the reference ------------------------------------------------------------------------------

def reference_key(trees: TokenTable, base: str, sft_adapter: str | None,
                  *settings: str | int | bool) -> str:
    """Names what the reference's log-probs depend on: every token id (so the data, the template and
    the lengths), the weights, and `settings` that change how they are computed.

    Where the model lies is no part of it.
    """
    files = fingerprints(base, sft_adapter)
    inputs = [[os.path.basename(file), content] for file, content in files.items()]
    digest = hashlib.sha256(json.dumps([inputs, *settings]).encode())
    for array in (trees.ids, trees.sizes, trees.shapes, trees.scores):
        digest.update(array)
    # Rank 0's on all ranks: the files of another machine could be others.
    return gather(digest.hexdigest()[:16])[0]


def cache_reference(output_dir: str, key: str, reference: Reference, trees: TokenTable,
                    objective: Objective, compute: Compute, ranks: Ranks) -> TokenTable:
    """The trees with reference_logps: from the file beside the runs, else computed, and left there.

    key     see `reference_key`
    """
    name = f"reference-{key}.jsonl"
    cached = os.path.join(os.path.dirname(output_dir), name)
    unfinished = os.path.join(output_dir, name)
    wanted = partial(needs_reference, objective.method)

    def make_rows(batch: list[int]) -> list[dict]:
        logps = tree_logps(reference, [trees[number] for number in batch], wanted,
                                objective.mean_logps, compute)
        return [{"tree": number, "reference_logps": row} for number, row in zip(batch, logps)]

    if not gather(os.path.isfile(cached))[0]:
        sizes = trees.num_tokens
        batches = group_by_size(range(len(trees)), sizes.__getitem__, 8 * compute.micro_tokens)
        write_rows(unfinished, batches, make_rows, lambda row: sizes[row["tree"]],
                   "reference log-probs", ranks)
        if ranks.is_first:
            flush_to_disk(unfinished)
            os.replace(unfinished, cached)
        gather(None)
    elif ranks.is_first:
        print(f"reference log-probs: those of {cached}")
    rows = sealed_lines(cached, COMPUTE_AGAIN)
    if len(rows) != len(trees):
        raise ValueError(f"{cached} has {len(rows)} rows, not {len(trees)}; {COMPUTE_AGAIN}")
    logps = [logp for row in rows for logp in json.loads(row)["reference_logps"]]
    return replace(trees, reference_logps=np.array(logps, np.float64))
