"""Where the time of one training step goes, by kind of operation.

    python bench/breakdown.py --dataset test.jsonl.gz --tokenizer tokenizer.model
    python bench/breakdown.py --dataset test.jsonl.gz --tokenizer tokenizer.model --device cuda \\
        --size 7b --pairs 64 --micro_tokens 8192

The step of bench/step.py (LoRA r 8 on q and v, HH pairs; on a CPU Llama D 512, L 8, V 32000, fp32 on
one thread, on a GPU bf16) under torch's profiler: each operator's own time, on a GPU each kernel's,
summed over kinds. Beside it the work that the step cannot avoid: the floating-point operations of
its matrix products and attention, at the rate of large matrix products, measured in the same
process between the steps.
"""
import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from task import BETA, LORA_ALPHA, LORA_R, LORA_TARGETS, SIZES, random_weights_

from data import read_dataset
from kernels import choose_linear_logps
from kernels.attention import choose_attention
from lora import add_lora, lora_disabled
from model import Llama, LlamaConfig
from packing import Tree, build_stream, make_trees
from step import METHODS, Compute, Objective, batch_counts, micro_batches, needs_reference
from tokenizer import Tokenizer
from train import accumulate_gradient

ROOT = Path(__file__).resolve().parents[1]
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
GPU_KINDS = {  # kind: parts of kernel names, the first that fits
    "norms, rotary, SwiGLU": ("_rms_norm", "_rotary", "_swiglu"),
    "softmax, logs": ("_logp_rows", "softmax", "reduce"),
    "attention": ("_forward", "_backward_q", "_backward_kv", "fmha"),
    "matrix products": ("nvjet", "gemm", "gemv", "splitK", "cutlass"),
    "copies, casts": ("Memcpy", "Memset", "copy", "index", "Cat", "fill"),
    "sums of gradients": ("elementwise",)}


# ---- shared with the other scripts --------------------------------------------------------------

def make_model(size: str = "small", dtype: torch.dtype = torch.float32,
               device: str = "cpu") -> Llama:
    """bench/step.py's model, of random weights, with a random adapter."""
    with torch.device("meta"):          # else it would first be allocated in float32, on the CPU
        model = Llama(LlamaConfig(**SIZES[size]))
    model = add_lora(model.to(dtype).to_empty(device=device), r=LORA_R, alpha=LORA_ALPHA,
                     dropout=0.0, target_modules=LORA_TARGETS)
    random_weights_(model)
    return model


def hh_trees(dataset: str, tokenizer: str, pairs: int) -> list[Tree]:
    """The first records of an HH file that have two responses, `pairs` of them.

    raises  ValueError if the file has fewer
    """
    records = [record for record in read_dataset(dataset) if sorted(record.scores) == [0, 1]]
    if len(records) < pairs:
        raise ValueError(f"{dataset}: {len(records)} records with two responses, not {pairs}")
    return make_trees(records[:pairs], Tokenizer(tokenizer), "all", 4096, 2048)


def training_step(model: Llama, method: str, trees: list[Tree],
                  compute: Compute = Compute(micro_tokens=1024)) -> Callable[[], Tensor]:
    """A function that runs forward and backward of one batch; see train.accumulate_gradient."""
    objective = Objective(METHODS[method], beta=BETA)
    reference, counts = partial(lora_disabled, model), batch_counts(trees)

    def step() -> Tensor:
        streams = micro_batches(trees, objective.method, compute)
        return accumulate_gradient(model, reference, streams, counts, objective, compute)
    return step


def synchronize(device: str) -> None:
    """Wait until a GPU has finished what was queued; nothing to do on a CPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def environment() -> dict:
    """Machine, versions and command of a result; of files in the command only the names."""
    return {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count(),
            "torch": torch.__version__, "command": " ".join(map(os.path.basename, sys.argv))}


def matrix_rate(device: str = "cpu", seconds: float = 2.0) -> tuple[float, float]:
    """FLOP/s of large square products, one after another for some seconds: (mean, fastest).

    On a CPU 1024³ in float32 with this process's threads, on a GPU 8192³ in bfloat16 (ten at a
    time, which hides launches). A step lasts as long as many products, so it is compared with the
    mean: a shared or hot machine does not sustain the rate of its fastest product.
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


def necessary_flops(model: Llama, method: str, trees: list[Tree]) -> float:
    """Floating-point operations that one step cannot avoid.

    Forward 2, backward 2, reference forward 2 per weight and token (frozen weights need no
    gradient); the same for the head's rows; attention over the pairs of positions that see each
    other. Behind the last attention only rows that predict something count.
    """
    config = model.config
    weights = {name: layer.weight.numel() for name, layer in model.named_modules()
               if name.endswith("_proj")}
    behind = sum(n for name, n in weights.items() if f".{config.num_hidden_layers - 1}." in name
                 and not name.endswith(("q_proj", "k_proj", "v_proj")))
    before = sum(weights.values()) - behind
    head, width, total = model.lm_head.weight.numel(), config.hidden_size, 0.0
    wanted = partial(needs_reference, METHODS[method])
    for stream, passes in ((build_stream(trees), 2), (build_stream(trees, wanted=wanted), 1)):
        seen = sum(int(mask.sum()) for masks in stream.segments.blocks for mask in masks)
        attention = 4 * seen * width * config.num_hidden_layers
        tokens, rows = len(stream.input_ids), len(stream.rows)
        total += passes * 2 * (before * tokens + behind * rows + head * len(stream.labels))
        total += attention * (3.5 if passes == 2 else 1)       # its backward is 2.5 forwards
    return total


# ---- the breakdown ------------------------------------------------------------------------------

def kind_of(operator: str, kinds: dict[str, tuple[str, ...]] = KINDS) -> str:
    return next((kind for kind, parts in kinds.items()
                 if any(part in operator for part in parts)), "everything else")


def seconds_by_kind(step: Callable[[], Tensor], device: str) -> dict[str, float]:
    """One step under the profiler: each operator's own time, or each kernel's, summed over kinds."""
    Activity, on_gpu = torch.profiler.ProfilerActivity, device == "cuda"
    with torch.profiler.profile(activities=[Activity.CUDA if on_gpu else Activity.CPU]) as profile:
        step()
        synchronize(device)
    spent = {}
    for event in profile.key_averages():
        if on_gpu and event.device_type != torch.autograd.DeviceType.CUDA:
            continue                                   # launches, which take the host's time
        kind = kind_of(event.key, GPU_KINDS if on_gpu else KINDS)
        own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        spent[kind] = spent.get(kind, 0.0) + own / 1e6
    return spent


def measure(step: Callable[[], Tensor], necessary: float, repeats: int,
            device: str = "cpu") -> dict:
    """Seconds of every step, rates of matrix products around them (GFLOP/s), and the share of the
    rate that each step reaches.

    necessary   of one step, 1e9 floating-point operations
    """
    step()                                                                       # warm up
    seconds, rates = [], [matrix_rate(device)]                   # before and after each step
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        step()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
        rates.append(matrix_rate(device))
    sustained = [mean / 1e9 for mean, _ in rates]
    fastest = [best / 1e9 for _, best in rates]
    shares = [necessary / s / ((before + after) / 2)
              for s, (before, after) in zip(seconds, pairwise(sustained), strict=True)]
    return {"seconds": seconds, "necessary_gflop": necessary, "shares_of_matrix_rate": shares,
            "matrix_gflops_kept_up": sustained, "matrix_gflops_fastest": fastest}


def show(result: dict) -> None:
    seconds, shares = result["seconds"], result["shares_of_matrix_rate"]
    rate = statistics.median(result["matrix_gflops_kept_up"])
    print(f"{result['method']}, {result['pairs']} HH pairs, {result['tokens']} tokens; a step: "
          f"{statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})\n"
          f"necessary: {result['necessary_gflop']:.0f} GFLOP; at the {rate:.0f} GFLOP/s that large "
          f"products sustain (the fastest one: {max(result['matrix_gflops_fastest']):.0f}) this is "
          f"{statistics.median(shares):.0%} of the step ({min(shares):.0%} to {max(shares):.0%})\n")
    spent = result["self_s_by_kind"]
    for kind, value in sorted(spent.items(), key=lambda item: -item[1]):
        print(f"  {kind:30} {value:6.3f} s  {value / sum(spent.values()):5.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="HH file")
    parser.add_argument("--tokenizer", required=True, help="Llama's tokenizer.model")
    parser.add_argument("--size", choices=tuple(SIZES), default="small", help="the Llama's shape")
    parser.add_argument("--pairs", type=int, default=8, help="in the step")
    parser.add_argument("--method", choices=("dpo", "ulma", "pointwise_dpo"), default="dpo")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--micro_tokens", type=int, default=1024, help="train.py --micro_tokens")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps, after one untimed")
    parser.add_argument("--out", help="JSON, default bench/results/breakdown-METHOD.json, on a GPU "
                                      "breakdown-METHOD-cuda.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    on_gpu = args.device == "cuda"
    model = make_model(args.size, torch.bfloat16 if on_gpu else torch.float32, args.device)
    trees = hh_trees(args.dataset, args.tokenizer, args.pairs)
    step = training_step(model, args.method, trees, Compute(
        args.device, args.micro_tokens, choose_linear_logps("auto", args.device),
        choose_attention("auto", args.device)))
    necessary = necessary_flops(model, args.method, trees) / 1e9
    result = {"method": args.method, "pairs": args.pairs,
              "tokens": sum(tree.num_tokens for tree in trees),
              "device": torch.cuda.get_device_name() if on_gpu else "cpu",
              **measure(step, necessary, args.repeats, args.device),
              "self_s_by_kind": seconds_by_kind(step, args.device), "threads": 1} | environment()
    show(result)
    name = f"breakdown-{args.method}{'-cuda' if on_gpu else ''}.json"
    out = Path(args.out or ROOT / "bench/results" / name)
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
