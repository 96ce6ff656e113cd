"""Does the cost of a pair stay what it is: in larger batches, and on more ranks?

    python bench/scale.py --dataset test.jsonl.gz --tokenizer tokenizer.model

1. Forward and backward of the same 512 HH pairs in batches of 8, 64 and 512, on one thread: time
   per pair. Nothing is quadratic in the number of trees, so it should be flat.
2. 1, 2 and 4 gloo ranks, one thread each, the same 8 pairs on each (weak scaling): a whole step
   with its all-reduce; how many bytes it reduces, beside the size of the adapter.

The model is bench/step.py's; all of it takes somewhat over an hour on two cores. Ranks beyond
the machine's cores share them: efficiency is then at most cores / ranks, and the table says so.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from breakdown import ROOT, environment, hh_trees, make_model, training_step
from task import LEARNING_RATE, MAX_GRAD_NORM, SIZES
from torch.utils._python_dispatch import TorchDispatchMode

from training.checkpoint import trainable
from training.ranks import all_reduce_gradients_, clip_gradients_, set_up_processes

BATCHES, RANKS, PAIRS_PER_RANK, REPEATS = (8, 64, 512), (1, 2, 4), 8, 3


def batch_sizes(args: argparse.Namespace) -> list[dict]:
    """Seconds for the same pairs, as many as the largest batch, in batches of several sizes.

    The sizes take turns, each turn over all pairs; its time is printed.
    """
    pairs = max(args.sizes)
    model, trees = make_model(args.model_size), hh_trees(args.dataset, args.tokenizer, pairs)
    if len(trees) != pairs:
        raise ValueError(f"{args.dataset}: {pairs} records have {len(trees)} prompts; expected a "
                         "prompt a pair")
    steps = {size: [training_step(model, args.method, trees[i:i + size])
                    for i in range(0, pairs, size)] for size in args.sizes}
    steps[min(args.sizes)][0]()                                             # warm up
    seconds = {size: [] for size in args.sizes}
    for turn in range(args.repeats):
        for size, batches in steps.items():
            start = time.perf_counter()
            for step in batches:
                step()
            seconds[size].append(time.perf_counter() - start)
            print(f"  turn {turn + 1} of {args.repeats}: {pairs} pairs in batches of {size:4}: "
                  f"{1e3 * seconds[size][-1] / pairs:5.0f} ms a pair", flush=True)
    tokens = sum(tree.num_tokens for tree in trees)
    return [{"batch": size, "pairs": pairs, "tokens": tokens, "seconds": seconds[size],
             "ms_per_pair": 1e3 * statistics.median(seconds[size]) / pairs} for size in args.sizes]


class ReducedBytes(TorchDispatchMode):
    """In a `with`, counts the bytes of every all-reduce that this process takes part in."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: tuple = (),
                           kwargs: dict | None = None) -> Any:
        if operator is torch.ops.c10d.allreduce_.default:
            self.count += sum(tensor.nbytes for tensor in args[0])
        return operator(*args, **(kwargs or {}))


def one_rank(args: argparse.Namespace) -> None:
    """What every process of `torchrun` does: whole steps on its share; rank 0 prints the result."""
    torch.set_num_threads(1)
    rank, world_size, _ = set_up_processes()
    model = make_model(args.model_size)
    trees = hh_trees(args.dataset, args.tokenizer, PAIRS_PER_RANK)     # the same on every rank
    parameters = list(trainable(model).values())
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)
    accumulate = training_step(model, args.method, trees)

    def step() -> None:
        totals = all_reduce_gradients_(parameters, accumulate())
        clip_gradients_(parameters, MAX_GRAD_NORM, totals[0], "bench/scale.py")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    with ReducedBytes() as reduced:
        step()                                                                   # warm up
    seconds = []
    for _ in range(args.repeats):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    if rank == 0:
        print(json.dumps({"seconds": seconds, "reduced_bytes_per_step": reduced.count,
                          "adapter_bytes": sum(p.nbytes for p in parameters)}))
    if world_size > 1:
        dist.barrier()
        dist.destroy_process_group()


def weak_scaling(args: argparse.Namespace) -> list[dict]:
    """Seconds of a step on several numbers of ranks, the same pairs on each."""
    rows, variables = [], os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for count in args.ranks:
        launcher = [sys.executable] if count == 1 else [
            sys.executable, "-m", "torch.distributed.run", "--standalone",
            f"--nproc_per_node={count}"]
        run = subprocess.run([*launcher, __file__, "--worker", "--dataset", args.dataset,
                              "--tokenizer", args.tokenizer, "--method", args.method, "--repeats",
                              str(args.repeats), "--model_size", args.model_size],
                             env=variables, capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(run.stderr)
        row = {"ranks": count} | json.loads(run.stdout.splitlines()[-1])
        median = statistics.median(row["seconds"])
        rows.append(row | {"efficiency": statistics.median(rows[0]["seconds"]) / median if rows
                           else 1.0})
        print(f"  {count} ranks  {median:6.2f} s a step  efficiency {rows[-1]['efficiency']:.2f} "
              f"(cores / ranks {min(1.0, os.cpu_count() / count):.2f})  reduces "
              f"{row['reduced_bytes_per_step']:,} bytes; the adapter has {row['adapter_bytes']:,}",
              flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="HH file")
    parser.add_argument("--tokenizer", required=True, help="Llama's tokenizer.model")
    parser.add_argument("--model_size", choices=tuple(SIZES), default="small")
    parser.add_argument("--method", choices=("dpo", "ulma", "pointwise_dpo"), default="dpo")
    parser.add_argument("--sizes", type=int, nargs="+", default=BATCHES, help="pairs in a batch")
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--out", default=str(ROOT / "bench/results/scale.json"))
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if any(size < 1 or max(args.sizes) % size for size in args.sizes):
        parser.error(f"--sizes {args.sizes}: each must divide the largest")
    if args.worker:
        return one_rank(args)
    torch.set_num_threads(1)
    result = {"method": args.method} | environment()
    for key, measure in (("batch_sizes", batch_sizes), ("ranks", weak_scaling)):
        result[key] = measure(args)
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
