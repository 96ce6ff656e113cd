"""Where the time of one training step goes, on a CPU, by kind of operation.

    python bench/breakdown.py --dataset test.jsonl.gz --tokenizer tokenizer.model

The step of bench/step.py (Llama D 512, L 8, V 32000, LoRA r 8 on q and v, HH pairs, fp32), on one
thread, under torch's profiler: each operator's own time, summed over kinds. Beside it what the
step cannot do without: the floating-point operations of its matrix products and attention, at the
rate this machine multiplies large matrices in the same process, between the steps.
"""
import argparse
import json
import os
import platform
import statistics
import sys
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from data import Tokenizer, read_hh                                      # noqa: E402
from lora import add_lora                                                # noqa: E402
from model import Llama, LlamaConfig                                     # noqa: E402
from step import METHODS, NEEDS_REFERENCE, adapters_off, backward_batch, batch_counts  # noqa: E402
from task import LORA_ALPHA, LORA_R, LORA_TARGETS, SIZES, random_weights_  # noqa: E402
from trees import Tree, build_stream, make_trees                         # noqa: E402

KINDS = {      # kind: parts of operator names
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm"),
    "attention": ("scaled_dot_product",),
    "softmax, logs": ("softmax", "logsumexp", "aten::exp_", "aten::log", "aten::gather",
                      "aten::scatter", "aten::max", "aten::amax"),
    "norms, rotary, SwiGLU, sums": ("aten::mul", "aten::add", "aten::silu", "aten::pow",
                                    "aten::mean", "aten::rsqrt", "aten::sub", "aten::neg",
                                    "aten::sum", "aten::div"),
    "copies": ("aten::copy_", "aten::cat", "aten::index", "aten::fill_", "aten::zero_",
               "aten::clone")}


def make_model(size: str = "small", dtype=torch.float32, device: str = "cpu") -> Llama:
    """bench/step.py's model, of random weights, with an adapter whose update is zero."""
    with torch.device("meta"):                      # its first weights would be float32, on a CPU
        model = Llama(LlamaConfig(**SIZES[size]))
    model = add_lora(model.to(dtype).to_empty(device=device), r=LORA_R, alpha=LORA_ALPHA,
                     dropout=0.0, target_modules=LORA_TARGETS)
    random_weights_(model)
    return model


def hh_trees(dataset: str, tokenizer: str, pairs: int) -> list[Tree]:
    records = [record for record in read_hh(dataset) if sorted(record.scores) == [0, 1]]
    if len(records) < pairs:
        raise ValueError(f"{dataset}: {len(records)} records with two responses, not {pairs}")
    return make_trees(records[:pairs], Tokenizer(tokenizer), "all", 4096, 2048)


def training_step(model: Llama, method: str, trees: list[Tree]):
    """Callable: forward and backward of one batch."""
    return partial(backward_batch, model, partial(adapters_off, model), METHODS[method], trees,
                   batch_counts(trees), beta=0.1, log_z=0.0, mean_logps=False, reduction="mean",
                   micro_tokens=1024)


def synchronize(device: str) -> None:
    """Wait until the device has done what it was told."""
    if device == "cuda":
        torch.cuda.synchronize()


def where_and_how() -> dict:
    """Machine, versions and command of a result; of files in the command only the names."""
    return {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count(),
            "torch": torch.__version__, "command": " ".join(map(os.path.basename, sys.argv))}


def kind_of(operator: str) -> str:
    return next((kind for kind, parts in KINDS.items()
                 if any(part in operator for part in parts)), "everything else")


def matrix_rate(device: str = "cpu", seconds: float = 2.0) -> tuple[float, float]:
    """FLOP/s of large square products, one after another for some seconds: of all, of the fastest.

    On a CPU 1024³ in float32 with this process's threads, on a GPU 8192³ in bfloat16 (ten at a
    time, so that launches are hidden). A step lasts as long as many of them, so it is compared
    with what the machine keeps up: on a shared machine, or a hot one, less than its best moment.
    """
    size, dtype, products = ((8192, torch.bfloat16, 10) if device == "cuda"
                             else (1024, torch.float32, 1))
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    a @ b                                                                        # warm up
    spent = []
    while sum(spent) < seconds:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(products):
            a @ b
        synchronize(device)
        spent.append(time.perf_counter() - start)
    flops = 2 * size ** 3 * products
    return flops * len(spent) / sum(spent), flops / min(spent)


def necessary_flops(model: Llama, method: str, trees) -> float:
    """Forward 2, backward 2, reference forward 2 per weight and token (frozen weights have no
    gradient); the same for the head's rows; attention over the pairs a token sees. Behind the last
    attention only rows that predict something count."""
    config, wanted = model.config, NEEDS_REFERENCE[METHODS[method].reference]
    weights = {name: layer.weight.numel() for name, layer in model.named_modules()
               if name.endswith("_proj")}
    behind = sum(n for name, n in weights.items() if f".{config.num_hidden_layers - 1}." in name
                 and not name.endswith(("q_proj", "k_proj", "v_proj")))
    weights = sum(weights.values())
    head, width, total = model.lm_head.weight.numel(), config.hidden_size, 0.0
    for stream, passes in ((build_stream(trees), 2), (build_stream(trees, wanted=wanted), 1)):
        if stream is None:
            continue
        seen = sum(int(mask.sum()) for masks in stream.segments.blocks for mask in masks)
        attention = 4 * seen * width * config.num_hidden_layers
        tokens, rows = len(stream.input_ids), len(stream.rows)
        total += passes * 2 * ((weights - behind) * tokens + behind * rows
                               + head * len(stream.labels))
        total += attention * (3.5 if passes == 2 else 1)       # its backward is 2.5 forwards
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="HH file")
    parser.add_argument("--tokenizer", required=True, help="Llama's tokenizer.model")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--method", choices=("dpo", "ulma", "pointwise_dpo"), default="dpo")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", help="JSON, default bench/results/breakdown-METHOD.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, trees = make_model(), hh_trees(args.dataset, args.tokenizer, args.pairs)
    step = training_step(model, args.method, trees)
    step()
    necessary = necessary_flops(model, args.method, trees) / 1e9
    seconds, kept_up, fastest = [], [], []         # rates before, between and after the steps
    for number in range(args.repeats + 1):
        for rates, rate in zip((kept_up, fastest), matrix_rate()):
            rates.append(rate / 1e9)
        if number < args.repeats:
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
    shares = [necessary / s / ((before + after) / 2)
              for s, (before, after) in zip(seconds, pairwise(kept_up))]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    spent = {}
    for event in profile.key_averages():
        spent[kind_of(event.key)] = (spent.get(kind_of(event.key), 0.0)
                                     + event.self_cpu_time_total / 1e6)
    tokens = sum(tree.num_tokens for tree in trees)
    print(f"{args.method}, {args.pairs} HH pairs, {tokens} tokens; a step: "
          f"{statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})\n"
          f"necessary: {necessary:.0f} GFLOP, at the {statistics.median(kept_up):.0f} GFLOP/s that "
          f"large products keep up (the fastest: {max(fastest):.0f}) "
          f"{statistics.median(shares):.0%} of the step ({min(shares):.0%} to {max(shares):.0%})\n")
    for kind, value in sorted(spent.items(), key=lambda item: -item[1]):
        print(f"  {kind:30} {value:6.2f} s  {value / sum(spent.values()):5.1%}")
    result = {"method": args.method, "pairs": args.pairs, "tokens": tokens, "seconds": seconds,
              "necessary_gflop": necessary, "shares_of_matrix_rate": shares,
              "matrix_gflops_kept_up": kept_up, "matrix_gflops_fastest": fastest,
              "self_s_by_kind": spent, "threads": 1} | where_and_how()
    out = Path(args.out or ROOT / f"bench/results/breakdown-{args.method}.json")
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
