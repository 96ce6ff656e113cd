"""The vocabulary head of a preference step: `linear_logps` against the libraries people use.

    python bench/kernel.py                    # what this machine has: a GPU at 7B's size, or a CPU
    make bench-kernel                         # the same with the peers installed beside

One run of a contestant: log-probs of policy and reference rows against a frozen head, the loss, and
its gradient in the policy's hidden states. Responses have 64 tokens, half are good and half bad.

    dpo     DPO; as many reference rows as policy rows
    ulma    ULMA; the good half needs no reference

Every contestant's loss and gradient are compared with float64 before any time is taken; one that is
off is not timed. Then they run in turn, A B C A B C ..., on a GPU four times in a row each, so that a
slow minute hits all. Memory is the peak of the forward beyond inputs and one [N, D] (ours saves u, see
kernels/linear_logps.py, others the hidden states), or that of the backward beyond one more, the gradient
that all have to return; whichever is larger. A contestant whose package is missing, or that cannot run
on this device, is named and left out.
"""
import argparse
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch
import torch.nn.functional as F
from machine import cpu_name
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from kernels import linear_logps_torch, linear_logps_triton
from ulma import dpo_loss, ulma_loss

Run = Callable[[str, dict], tuple[Tensor | None, Tensor]]    # (task, data) -> loss, hidden states
TOKENS, BETA = 64, 0.1          # per response; KL strength
GEMM_CHUNK = 4096               # rows of the bare products, as ours on a GPU


# ---- the task -----------------------------------------------------------------------------------

def make_rows(rows: int, width: int, vocab: int, dtype: torch.dtype, device: str) -> dict:
    """Hidden states of policy and (nearby) reference, a head, labels; logits of spread about 3."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32)

    hidden = normal(rows, width)
    return {"policy": hidden.to(dtype), "reference": (hidden + 0.1 * normal(rows, width)).to(dtype),
            "weight": (3 * normal(vocab, width) / width ** 0.5).to(dtype),
            "labels": torch.randint(vocab, (rows,), generator=generator, device=device)}


def reference_rows(task: str, rows: int) -> slice:
    """Which rows have a reference: for ULMA the bad responses, the second half."""
    return slice(rows // 2 if task == "ulma" else 0, rows)


def loss_of(task: str, policy_logps: Tensor, reference_logps: Tensor) -> Tensor:
    """Scalar loss of per-token log-probs [N] and [M]; responses 0..R/2 are good, the rest bad."""
    policy, reference = (t.view(-1, TOKENS).sum(1) for t in (policy_logps, reference_logps))  # [R]
    if task == "dpo":
        return dpo_loss(*policy.chunk(2), *reference.chunk(2), BETA).mean()
    half = policy.new_ones(len(policy) // 2)         # on the device: no wait for a copy to it
    scores = torch.cat([half, 0 * half])
    reference = torch.cat([torch.zeros_like(reference), reference])
    return ulma_loss(policy, reference, scores, BETA).mean()


def float64_truth(task: str, data: dict) -> tuple[float, Tensor]:
    """(loss, gradient) in float64, from the rounded inputs, 256 rows at a time."""
    weight, rows = data["weight"].double(), len(data["labels"])
    which = reference_rows(task, rows)

    def logps(hidden, labels):
        return torch.cat([F.cross_entropy(h.double() @ weight.T, y, reduction="none").neg()
                          for h, y in zip(hidden.split(256), labels.split(256), strict=True)])

    with torch.no_grad():
        policy = logps(data["policy"], data["labels"])
        reference = logps(data["reference"][which], data["labels"][which])
    policy.requires_grad_()
    loss = loss_of(task, policy, reference)
    upstream, = torch.autograd.grad(loss, policy)                                # [N]
    gradient = []
    for h, y, g in zip(data["policy"].split(256), data["labels"].split(256), upstream.split(256),
                       strict=True):
        error = -(h.double() @ weight.T).softmax(-1)
        error[torch.arange(len(y)), y] += 1
        gradient.append((g[:, None] * (error @ weight)).to(torch.float32))
    return loss.item(), torch.cat(gradient)


# ---- contestants: (policy, reference, weight, their labels) -> log-probs -------------------------

def one_after_the_other(logps: Callable) -> Callable:
    """A function of one model's rows, called for the policy's and then for the reference's."""
    def both(policy, reference, weight, policy_labels, reference_labels):
        policy_logps = logps(policy, weight, policy_labels)
        with torch.no_grad():
            return policy_logps, logps(reference, weight, reference_labels)
    return both


def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The whole [N, V], float32 log-softmax: what one writes first."""
    return (hidden @ weight.T).float().log_softmax(-1).gather(1, labels[:, None])[:, 0]


def trl(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """TRL 1.16's head: tiles of 4096 rows, folded by Triton; recomputed in the backward."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    # as trl/trainer/utils.py calls it: 32768 columns a tile, no optional outputs
    return ChunkedLogProbFunction.apply(hidden, weight, None, labels, 1.0, 32768, None, 1.0, ())[0]


def cut_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Apple's, with its default gradient filter."""
    from cut_cross_entropy import linear_cross_entropy
    return -linear_cross_entropy(hidden, weight, labels, reduction="none")


def torch_linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """torch 2.13's own, chunked."""
    return -F.linear_cross_entropy(hidden, weight, labels, reduction="none",
                                   options=torch.nn.LinearCrossEntropyOptions())


def liger(task: str, data: dict) -> tuple[Tensor, Tensor]:
    """Liger's fused DPO loss, given response rows only; in place of ULMA its KTO loss, all rows."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss, LigerFusedLinearKTOLoss
    policy = data["policy"].detach().requires_grad_()
    width, reference = policy.shape[1], data["reference"]
    shaped = (policy.view(-1, TOKENS, width), data["labels"].view(-1, TOKENS))
    if task == "dpo":
        loss = LigerFusedLinearDPOLoss(beta=BETA, compute_nll_loss=False, average_log_prob=False)(
            data["weight"], *shaped, ref_input=reference.view(-1, TOKENS, width),
            ref_weight=data["weight"])
    else:
        good = torch.arange(len(shaped[1]), device=policy.device) < len(shaped[1]) // 2
        loss = LigerFusedLinearKTOLoss(beta=BETA, average_log_prob=False)(
            shaped[0], data["weight"], shaped[1], preference_labels=good,
            ref_input=reference.view(-1, TOKENS, width), ref_weight=data["weight"])
    return loss[0] if isinstance(loss, tuple) else loss, policy


def bare_products(task: str, data: dict) -> tuple[None, Tensor]:
    """The three matrix products that none can avoid, chunk by chunk, in reused buffers."""
    weight, rows = data["weight"], len(data["labels"])
    logits = weight.new_empty(min(GEMM_CHUNK, rows), len(weight))
    gradient = torch.empty_like(data["policy"])
    for h, out in zip(data["policy"].split(GEMM_CHUNK), gradient.split(GEMM_CHUNK), strict=True):
        torch.mm(h, weight.T, out=logits[:len(h)])
        torch.mm(logits[:len(h)], weight, out=out)
    for h in data["reference"][reference_rows(task, rows)].split(GEMM_CHUNK):
        torch.mm(h, weight.T, out=logits[:len(h)])
    return None, gradient


def from_logps(both: Callable) -> Run:
    def run(task: str, data: dict) -> tuple[Tensor, Tensor]:
        policy = data["policy"].detach().requires_grad_()
        which = reference_rows(task, len(data["labels"]))
        policy_logps, reference_logps, *_ = both(
            policy, data["reference"][which], data["weight"], data["labels"],
            data["labels"][which])
        return loss_of(task, policy_logps, reference_logps), policy
    return run


def backward(loss: Tensor | None, policy: Tensor) -> Tensor:
    """The gradient; the bare products have made theirs already."""
    return policy if loss is None else torch.autograd.grad(loss, policy)[0]


def contestants(device: str) -> dict[str, tuple[str | None, Run]]:
    """name -> (package or None, run)."""
    found = {
        "bare products": (None, bare_products),
        "ours, Triton": (None, from_logps(linear_logps_triton)),
        "ours, torch": (None, from_logps(linear_logps_torch)),
        "eager": (None, from_logps(one_after_the_other(eager))),
        "torch.compile": (None, from_logps(one_after_the_other(torch.compile(eager)))),
        "TRL": ("trl", from_logps(one_after_the_other(trl))),
        "Liger": ("liger-kernel", liger),
        "cut-cross-entropy": (
            "cut-cross-entropy", from_logps(one_after_the_other(cut_cross_entropy))),
        "F.linear_cross_entropy": (
            None, from_logps(one_after_the_other(torch_linear_cross_entropy)))}
    if device == "cpu":
        del found["ours, Triton"]
    return found


# ---- measuring ----------------------------------------------------------------------------------

def seconds(run: Run, task: str, data: dict) -> float:
    """Of one run. On a GPU a mean of four in a row, so that the host runs ahead as it does within a
    step; its queue is empty before and after them."""
    on_gpu = data["weight"].is_cuda
    runs = 4 if on_gpu else 1
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(runs):
        backward(*run(task, data))
    if on_gpu:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / runs


def extra_bytes(run: Run, task: str, data: dict) -> int | None:
    """Peak of forward beyond one [N, D], or of backward beyond two; None on a CPU."""
    if not data["weight"].is_cuda:
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before, size = torch.cuda.memory_allocated(), data["policy"].nbytes
    graph = run(task, data)
    forward = torch.cuda.max_memory_allocated() - before - size
    torch.cuda.reset_peak_memory_stats()
    gradient = backward(*graph)
    del graph, gradient
    return max(forward, torch.cuda.max_memory_allocated() - before - 2 * size)


def check(name: str, task: str, data: dict, run: Run, truth: tuple[float, Tensor]) -> dict:
    """Errors of loss and gradient against float64; "left out" says why there are none."""
    try:
        loss, policy = run(task, data)
        gradient = backward(loss, policy)
    except Exception as error:              # not installed, not for this device, out of memory, ...
        first = (str(error).strip().splitlines() or [""])[0][:90]
        return {"left out": f"{type(error).__name__}: {first}"}
    if name == "bare products" or (name == "Liger" and task == "ulma"):
        return {}                           # no loss; another loss on the same rows
    errors = {"loss error": abs(loss.item() - truth[0]) / abs(truth[0]),
              "gradient error": float((gradient.float() - truth[1]).norm() / truth[1].norm())}
    limit = 3e-2 if data["weight"].dtype == torch.bfloat16 else 1e-4
    if not all(error <= limit for error in errors.values()):                     # or is NaN
        errors["left out"] = f"off by more than {limit:g}"
    return errors


def compare(task: str, data: dict, repeats: int) -> list[dict]:
    """One row per contestant, its times interleaved with the others'."""
    truth, rows, timed = float64_truth(task, data), [], []
    for name, (package, run) in contestants(data["weight"].device.type).items():
        row = {"task": task, "contestant": name} | check(name, task, data, run, truth)
        if package and "left out" not in row:
            row["version"] = metadata.version(package)
        rows.append(row)
        if "left out" not in row:
            row["extra GB"] = extra_bytes(run, task, data)
            row["extra GB"] = row["extra GB"] and row["extra GB"] / 1e9
            timed.append((row, run, []))
        print(f"  {task} {name}: {row.get('left out', 'ready')}", file=sys.stderr, flush=True)
    for _ in range(repeats + 1):                         # the first round only warms up
        for _, run, times in timed:
            times.append(seconds(run, task, data))
    for row, _, times in timed:
        row |= {"median ms": 1e3 * statistics.median(times[1:]), "min ms": 1e3 * min(times[1:]),
                "max ms": 1e3 * max(times[1:])}
    return rows


def memory_at_scale(data: dict) -> list[dict]:
    """Ours at up to 65,536 policy rows and as many reference rows: the peak must not grow."""
    found = []
    for rows in (8192, 16384, 65536):
        bigger = data | {key: data[key].repeat(-(-rows // len(data[key])), 1)[:rows]
                         for key in ("policy", "reference")}
        bigger["labels"] = data["labels"].repeat(-(-rows // len(data["labels"])))[:rows]
        found.append({"rows": rows, "extra GB":
                      extra_bytes(from_logps(linear_logps_triton), "dpo", bigger) / 1e9})
    return found


def table(rows: list[dict]) -> str:
    lines = ["| task | contestant | ms (range) | times ours | extra GB | gradient error |",
             "|---|---|---|---|---|---|"]
    for row in rows:
        ours = next((r["median ms"] for r in rows if r["task"] == row["task"] and "median ms" in r
                     and r["contestant"].startswith("ours")), None)
        if "median ms" not in row:
            lines.append(f"| {row['task']} | {row['contestant']} | left out: {row['left out']} "
                         "| | | |")
            continue
        memory = "" if row["extra GB"] is None else f"{row['extra GB']:.2f}"
        error = f"{row['gradient error']:.1e}" if "gradient error" in row else ""
        lines.append(f"| {row['task']} | {row['contestant']} | {row['median ms']:.2f} "
                     f"({row['min ms']:.2f}-{row['max ms']:.2f}) "
                     f"| {row['median ms'] / ours if ours else math.nan:.2f} "
                     f"| {memory} | {error} |")
    return "\n".join(lines)


def hardware(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    on_gpu = device == "cuda"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--rows", type=int, default=8192 if on_gpu else 1024, help="policy rows")
    parser.add_argument("--width", type=int, default=4096 if on_gpu else 512, help="D")
    parser.add_argument("--vocab", type=int, default=32000, help="V")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"),
                        default="bfloat16" if on_gpu else "float32")
    parser.add_argument("--repeats", type=int, default=20 if on_gpu else 5)
    parser.add_argument("--out", default=f"bench/results/kernel-{device}.json")
    args = parser.parse_args()
    if args.rows % (2 * TOKENS):
        parser.error(f"--rows {args.rows} is not a multiple of {2 * TOKENS}: pairs of responses")
    data = make_rows(args.rows, args.width, args.vocab, getattr(torch, args.dtype), device)
    rows = [row for task in ("dpo", "ulma") for row in compare(task, data, args.repeats)]
    report = {"command": "python bench/kernel.py " + " ".join(
        f"--{key} {getattr(args, key)}" for key in ("rows", "width", "vocab", "dtype", "repeats")),
        "hardware": hardware(device), "python": platform.python_version(),
        "torch": torch.__version__, "rows": rows}
    Path(args.out).write_text(json.dumps(report, indent=2) + "\n")
    print(table(rows))
    if on_gpu:
        import triton
        report |= {"triton": triton.__version__, "memory at scale": memory_at_scale(data)}
        Path(args.out).write_text(json.dumps(report, indent=2) + "\n")
    for entry in report.get("memory at scale", []):
        print(f"{entry['rows']} + {entry['rows']} rows: {entry['extra GB']:.3f} GB extra")


if __name__ == "__main__":
    main()
