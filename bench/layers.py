"""What runs between a layer's matrix products, at 7B's shape: bytes, time, share of the bandwidth.

    python bench/layers.py                      one GPU; on a CPU a dry run at a small size

RMSNorm with the sum before it, rotary embedding, SwiGLU and LoRA's update of a linear layer, forward
and backward each: ours, and the specification in plain torch. Bytes are those that a kernel cannot
avoid: every input read once, every output written once; of LoRA's update those that its products
move. The share is of the rate of a large copy, measured in the same run. A LoRA layer's time is what
it takes beyond the same layer without.

Before every run a buffer larger than the L2 cache is cleared, which also keeps the GPU busy while
the host launches the next kernels; times are CUDA events, medians of runs in turn. An error against
float32 above that of plain torch in bf16, by more than half, ends the script.
"""
import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from breakdown import ROOT, environment
from torch import Tensor

from kernels.layers import rms_norm, rms_norm_torch, rotary, rotary_torch, swiglu, swiglu_torch
from kernels.lora_linear import linear, lora_linear, lora_linear_torch

CLEARED = 2 ** 32         # bytes: 1.4 ms of an H100
LORA_R = 8


@dataclass(frozen=True)
class Case:
    """One function of a layer.

    inputs           of both; what requires no gradient is frozen
    forward_bytes    of one call; likewise backward_bytes
    bare             the layer that the function is an addition to
    """
    name: str
    ours: Callable
    plain: Callable
    inputs: tuple[Tensor, ...]
    forward_bytes: int
    backward_bytes: int
    bare: Callable | None = None


def make_cases(tokens: int, width: int, hidden: int, heads: int, dtype: torch.dtype,
               device: str) -> list[Case]:
    """Llama's sizes: width D, hidden F of the MLP."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, trained: bool = True) -> Tensor:
        values = torch.randn(shape, generator=generator, device=device)
        return values.to(dtype).requires_grad_(trained)

    element = dtype.itemsize
    row, wide, head_dim = tokens * width * element, tokens * hidden * element, width // heads
    weight, frozen = normal(width, trained=False), normal(width, width, trained=False)
    cos, sin = (normal(tokens, 1, head_dim // 2, trained=False) for _ in range(2))
    x, added, q, k = normal(tokens, width), normal(tokens, width), *(
        normal(tokens, heads, head_dim) for _ in range(2))
    factors = (normal(LORA_R, width).detach().float().requires_grad_(),
               normal(width, LORA_R).detach().float().requires_grad_())

    def update(function: Callable, x: Tensor, weight: Tensor, lora_A: Tensor,
               lora_B: Tensor) -> Tensor:
        return function(x, weight, ((lora_A, lora_B, 1 / width),))
    return [
        Case("RMSNorm with the sum before it",
             lambda x, added, weight: rms_norm(x, weight, 1e-5, added),
             lambda x, added, weight: rms_norm_torch(x, weight, 1e-5, added), (x, added, weight),
             4 * row, 4 * row),
        Case("rotary embedding", rotary, rotary_torch, (q, k, cos, sin), 4 * row, 4 * row),
        Case("SwiGLU", swiglu, swiglu_torch, (normal(tokens, hidden), normal(tokens, hidden)),
             3 * wide, 5 * wide),
        # forward: x read for x A^T, the sum read and written; backward: g read for g B and for dB,
        # x for dA, the sum of dx written and read
        Case("LoRA's update", partial(update, lora_linear), partial(update, lora_linear_torch),
             (x, frozen, *factors), 3 * row, 5 * row, lambda x, weight, *_: linear(x, weight))]


def outputs_of(function: Callable, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    outputs = function(*inputs)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def backward_of(outputs: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> Callable:
    """Gives the gradients of the inputs that are trained, again and again."""
    generator = torch.Generator(inputs[0].device).manual_seed(1)
    upstream = [torch.randn(out.shape, generator=generator, device=out.device)
                .to(torch.bfloat16).to(out.dtype) for out in outputs]
    return partial(torch.autograd.grad, outputs, [t for t in inputs if t.requires_grad], upstream,
                   retain_graph=True, allow_unused=True)


def check(case: Case) -> dict[str, float]:
    """Errors against float32; raises SystemExit if ours is more than half above plain torch's."""
    def results(function: Callable, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        outputs = outputs_of(function, inputs)
        return [t.detach().float() for t in (*outputs, *backward_of(outputs, inputs)())]

    wide = tuple(t.detach().float().requires_grad_(t.requires_grad) for t in case.inputs)
    truth, found = results(case.plain, wide), {}
    for name, function in (("ours", case.ours), ("plain", case.plain)):
        found[name] = max(float((mine - t).norm() / t.norm()) for mine, t in zip(
            results(function, case.inputs), truth, strict=True))
    if not found["ours"] <= 1.5 * found["plain"] + 1e-6:
        raise SystemExit(f"bench/layers.py: {case.name} is wrong ({found}); its times mean nothing")
    return found


def milliseconds(runs: dict[str, Callable], repeats: int, device: str) -> dict[str, float]:
    """Medians of runs in turn, after one untimed round."""
    spent = {name: [] for name in runs}
    cleared = torch.empty(CLEARED if device == "cuda" else 0, dtype=torch.int8, device=device)
    for _ in range(1 + repeats):
        for name, run in runs.items():
            cleared.zero_()
            if device == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                run()
                end.record()
                end.synchronize()
                spent[name].append(start.elapsed_time(end))
            else:
                begin = time.perf_counter()
                run()
                spent[name].append(1e3 * (time.perf_counter() - begin))
    return {name: statistics.median(found[1:]) for name, found in spent.items()}


def measure(case: Case, copy_rate: float, repeats: int, device: str) -> dict:
    """ms forward and backward of ours and plain torch; ours' share of the rate of a copy."""
    row, functions = {"name": case.name, "errors": check(case)}, {
        "ours": case.ours, "plain": case.plain}
    if case.bare:
        functions["bare"] = case.bare
    runs = {}
    for name, function in functions.items():
        runs[f"{name} forward"] = partial(function, *case.inputs)
        runs[f"{name} backward"] = backward_of(outputs_of(function, case.inputs), case.inputs)
    times = milliseconds(runs, repeats, device)
    for way, size in (("forward", case.forward_bytes), ("backward", case.backward_bytes)):
        bare = times.get(f"bare {way}", 0.0)
        ours, plain = (times[f"{name} {way}"] - bare for name in ("ours", "plain"))
        row[way] = {"bytes": size, "ms": ours, "plain_ms": plain,
                    "share_of_copy": 1e-9 * size / ours / copy_rate}
    return row


def copy_terabytes(device: str, repeats: int) -> float:
    """TB/s of a large copy, bytes read and written."""
    source = torch.ones(2 ** 29 if device == "cuda" else 2 ** 20, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    ms = milliseconds({"copy": partial(target.copy_, source)}, repeats, device)["copy"]
    return 1e-9 * 2 * len(source) / ms


def main() -> None:
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192 if on_gpu else 64)
    parser.add_argument("--repeats", type=int, default=30, help="timed runs, after one untimed")
    parser.add_argument("--out", default=str(ROOT / "bench/results/layers.json"))
    args = parser.parse_args()
    sizes = (4096, 11008, 32, torch.bfloat16) if on_gpu else (64, 176, 4, torch.float32)
    rate = copy_terabytes(device, args.repeats)
    rows = [measure(case, rate, args.repeats, device)
            for case in make_cases(args.tokens, *sizes, device)]
    print(f"{args.tokens} tokens, D {sizes[0]}, F {sizes[1]}, {sizes[3]}, {device}; "
          f"a large copy: {rate:.2f} TB/s\n\n| | bytes | ms | share of the copy | plain torch, ms |\n"
          "|---|---|---|---|---|")
    for row in rows:
        for way in ("forward", "backward"):
            found = row[way]
            print(f"| {row['name']}, {way} | {found['bytes'] / 1e6:.0f} MB | {found['ms']:.3f} "
                  f"| {found['share_of_copy']:.0%} | {found['plain_ms']:.3f} |")
    result = {"tokens": args.tokens, "width": sizes[0], "hidden": sizes[1], "dtype": str(sizes[3]),
              "device": torch.cuda.get_device_name() if on_gpu else "cpu",
              "copy_tb_per_s": rate, "rows": rows} | environment()
    Path(args.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
