"""What a run computes once and keeps as JSON lines: the reference's log-probs, D2O's anchors.

The reference is frozen: what it says of a response is the same in every epoch, and for every run on
the same responses. A run of more than one epoch asks it once, before the first step, and leaves the
answers beside the runs, in reference-KEY.jsonl, where the next run finds them.
"""
import hashlib
import json
import os
import time
from bisect import bisect_right
from dataclasses import replace
from itertools import accumulate

import torch.distributed as dist

from checkpoint import sha256, write_text
from step import NEEDS_REFERENCE, reference_logps
from trees import Tree, pack


# ---- rows in batches ----------------------------------------------------------------------------

def gather(value) -> list:
    """What every rank passed, on every rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def whole_batches(file: str, batches: list[list[int]]) -> int:
    """How many batches a file of rows holds; what a kill left of the next one is cut off."""
    if not os.path.isfile(file):
        return 0
    with open(file, encoding="utf-8") as stream:
        lines = [line for line in stream if line.endswith("\n")]
    ends = [0, *accumulate(map(len, batches))]
    done = bisect_right(ends, len(lines)) - 1
    write_text(file, "".join(lines[:ends[done]]))
    return done


def write_rows(file: str, batches: list[list[int]], rows_of, tokens_of, what: str, rank: int,
               world_size: int, stop) -> None:
    """Append a row per number to a file, batch by batch, from where a killed run left it.

    batches    [[int]] numbers; they go to ranks in turn, so that what is in them does not depend
               on the number of ranks
    rows_of    a batch -> its rows, in order
    tokens_of  a row -> how many tokens it stands for, of which the progress line tells
    stop       leave after the batch at hand once stop.signal is not 0
    """
    # a batch cut by a kill is made again as a whole: its rows depend on it in the last bits
    first = gather(whole_batches(file, batches) if rank == 0 else 0)[0]
    start, tokens = time.perf_counter(), 0
    for number in range(first, len(batches), world_size):
        rows, signals = zip(*gather((rows_of((batches[number + rank:] or [[]])[0]), stop.signal)))
        done = min(number + world_size, len(batches))
        if rank == 0:
            with open(file, "a", encoding="utf-8") as stream:
                stream.writelines(json.dumps(row) + "\n" for row in sum(rows, []))
            tokens += sum(tokens_of(row) for row in sum(rows, []))
            seconds = time.perf_counter() - start
            left = int(seconds / (done - first) * (len(batches) - done))
            print(f"{what}: batch {done}/{len(batches)}  {tokens / seconds:.0f} tok/s  "
                  f"{left // 60}:{left % 60:02} left", flush=True)
        if any(signals):
            if rank == 0:
                print(f"stopped among {what}, saved; the same command continues")
            raise SystemExit(128 + max(signals))
    gather(None)                                # rank 0 has written before another reads


# ---- the reference ------------------------------------------------------------------------------

def reference_key(trees: list[Tree], base: str, sft_adapter: str | None, *numbers) -> str:
    """Names what the reference's log-probs depend on: every token id (so the data, the template and
    the lengths), the weights, and `numbers` that change how it is computed.

    Of weight files it reads names, sizes and times, not 13 GB of bytes.
    """
    weights = sorted((entry.name, entry.stat().st_size, entry.stat().st_mtime_ns)
                     for entry in os.scandir(base) if entry.is_file())
    adapter = [sha256(os.path.join(sft_adapter, name)) for name in (
        "adapter_config.json", "adapter_model.safetensors")] if sft_adapter else None
    digest = hashlib.sha256(json.dumps([weights, adapter, *numbers]).encode())
    for tree in trees:
        digest.update(json.dumps([tree.prompt_ids, tree.response_ids, tree.scores]).encode())
    return gather(digest.hexdigest()[:16])[0]       # rank 0's: another machine's files are younger


def keep_reference(output_dir: str, key: str, reference, trees: list[Tree], which: str,
                   mean: bool, micro_tokens: int, linear_logps, rank: int, world_size: int,
                   stop, attention: str = "dense") -> list[Tree]:
    """The trees with reference_logps: from the file beside the runs, else computed, and left there.

    key     see `reference_key`
    which   responses that need a reference, see step.NEEDS_REFERENCE; the others get 0
    others  see step.backward_batch, `write_rows`
    """
    name = f"reference-{key}.jsonl"
    kept = os.path.join(os.path.dirname(output_dir), name)
    unfinished = os.path.join(output_dir, name)
    if not gather(os.path.isfile(kept))[0]:
        numbers = iter(range(len(trees)))
        batches = [[next(numbers) for _ in group] for group in pack(trees, 8 * micro_tokens)]

        def rows_of(batch):
            logps = reference_logps(reference, [trees[n] for n in batch],
                                    NEEDS_REFERENCE[which], mean, micro_tokens, linear_logps,
                                    attention)
            return [{"tree": n, "reference_logps": r} for n, r in zip(batch, logps)]

        write_rows(unfinished, batches, rows_of, lambda row: trees[row["tree"]].num_tokens,
                   "reference log-probs", rank, world_size, stop)
        if rank == 0:
            os.replace(unfinished, kept)
        gather(None)
    elif rank == 0:
        print(f"reference log-probs: those of {kept}")
    with open(kept, encoding="utf-8") as stream:
        rows = [json.loads(line)["reference_logps"] for line in stream]
    return [replace(tree, reference_logps=row) for tree, row in zip(trees, rows, strict=True)]
