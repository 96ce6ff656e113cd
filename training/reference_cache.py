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

from files.cli import time_left
from files.text import sha256, whole_lines, write_text
from packing import Tree, pack
from step import Compute, Objective, Reference, needs_reference, reference_logps
from training.ranks import Ranks, gather


# ---- rows in batches ----------------------------------------------------------------------------

def whole_batches(file: str, batches: list[list[int]]) -> int:
    """How many batches a file of rows holds; what a kill left of the next one is cut off.

    A batch cut short is made again as a whole: its rows depend on it in the last bits.
    """
    lines = whole_lines(file)
    ends = [0, *accumulate(map(len, batches))]
    done = bisect_right(ends, len(lines)) - 1
    if os.path.isfile(file):
        write_text(file, "".join(lines[:ends[done]]))
    return done


def write_rows(file: str, batches: list[list[int]], make_rows: Callable[[list[int]], list[dict]],
               count_tokens: Callable[[dict], int], title: str, ranks: Ranks) -> None:
    """Append a row per number to a file, batch by batch, from where a killed run left it.

    batches       numbers; batches go to ranks in turn, so that their content does not depend on
                  the number of ranks
    make_rows     a batch -> its rows, in order
    count_tokens  of a row, for the progress line
    title         of the progress line
    Leaves after the batch at hand once ranks.stop has a signal.
    """
    first = gather(whole_batches(file, batches) if ranks.is_first else 0)[0]
    start, tokens = time.perf_counter(), 0
    for number in range(first, len(batches), ranks.world_size):
        mine = number + ranks.rank
        rows = make_rows(batches[mine]) if mine < len(batches) else make_rows([])
        shares = gather((rows, ranks.stop.signal))
        done = min(number + ranks.world_size, len(batches))
        if ranks.is_first:
            new_rows = [row for share, _ in shares for row in share]
            with open(file, "a", encoding="utf-8") as out:
                out.writelines(json.dumps(row) + "\n" for row in new_rows)
            tokens += sum(map(count_tokens, new_rows))
            seconds = time.perf_counter() - start
            print(f"{title}: batch {done}/{len(batches)}  {tokens / seconds:.0f} tok/s  "
                  f"{time_left(seconds, done - first, len(batches) - first)}", flush=True)
        if any(stop_signal for _, stop_signal in shares):
            if ranks.is_first:
                print(f"stopped among {title}, saved; the same command continues")
            raise SystemExit(128 + max(stop_signal for _, stop_signal in shares))
    gather(None)                                # rank 0 has written before another reads


# ---- the reference ------------------------------------------------------------------------------

def reference_key(trees: list[Tree], base: str, sft_adapter: str | None,
                  *settings: str | int | bool) -> str:
    """Names what the reference's log-probs depend on: every token id (so the data, the template and
    the lengths), the weights, and `settings` that change how they are computed.

    Of weight files it reads names, sizes and times, not 13 GB of bytes.
    """
    weights = sorted((entry.name, entry.stat().st_size, entry.stat().st_mtime_ns)
                     for entry in os.scandir(base) if entry.is_file())
    adapter = [sha256(os.path.join(sft_adapter, name)) for name in (
        "adapter_config.json", "adapter_model.safetensors")] if sft_adapter else None
    digest = hashlib.sha256(json.dumps([weights, adapter, *settings]).encode())
    for tree in trees:
        digest.update(json.dumps([tree.prompt_ids, tree.response_ids, tree.scores]).encode())
    # Use rank 0's key: modification times differ between machines.
    return gather(digest.hexdigest()[:16])[0]


def cache_reference(output_dir: str, key: str, reference: Reference, trees: list[Tree],
                    objective: Objective, compute: Compute, ranks: Ranks) -> list[Tree]:
    """The trees with reference_logps: from the file beside the runs, else computed, and left there.

    key     see `reference_key`
    """
    name = f"reference-{key}.jsonl"
    cached = os.path.join(os.path.dirname(output_dir), name)
    unfinished = os.path.join(output_dir, name)
    wanted = partial(needs_reference, objective.method)

    def make_rows(batch: list[int]) -> list[dict]:
        logps = reference_logps(reference, [trees[number] for number in batch], wanted,
                                objective.mean_logps, compute)
        return [{"tree": number, "reference_logps": row} for number, row in zip(batch, logps)]

    if not gather(os.path.isfile(cached))[0]:
        batches, start = [], 0
        for group in pack(trees, 8 * compute.micro_tokens):
            batches.append(list(range(start, start + len(group))))
            start += len(group)
        write_rows(unfinished, batches, make_rows, lambda row: trees[row["tree"]].num_tokens,
                   "reference log-probs", ranks)
        if ranks.is_first:
            os.replace(unfinished, cached)
        gather(None)
    elif ranks.is_first:
        print(f"reference log-probs: those of {cached}")
    rows = [json.loads(line)["reference_logps"] for line in whole_lines(cached)]
    return [replace(tree, reference_logps=row) for tree, row in zip(trees, rows, strict=True)]
