"""What train.py's loop and ppo.py's share: ranks, a step, a stop, a schedule, a log."""
import argparse
import json
import math
import os
import signal

import torch
import torch.distributed as dist
from torch import Tensor

from model import Llama
from trees import Tree, epoch_batches


# ---- several processes --------------------------------------------------------------------------

def all_reduce_sum_(parameters: list[Tensor], extras: Tensor) -> Tensor:
    """Sum gradients over ranks, in place, and return the summed extras: one all-reduce.

    A rank that had no tree in this batch takes part with zeros.
    """
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    if not dist.is_initialized():
        return extras
    flat = torch.cat([p.grad.flatten() for p in parameters] + [extras.to(parameters[0].dtype)])
    dist.all_reduce(flat)
    *grads, extras = flat.split([p.numel() for p in parameters] + [len(extras)])
    for p, grad in zip(parameters, grads):
        p.grad.copy_(grad.view_as(p))
    return extras.double()


def optimizer_step(optimizer, parameters: list[Tensor], extras: Tensor, max_grad_norm: float,
                   where: str) -> tuple[list[float], float]:
    """Sum gradients and extras over ranks, clip, step; returns (extras, gradient norm).

    extras   [loss, …]; where, what the error names
    raises   FloatingPointError, before the update, for a loss or gradient that is not finite
    """
    extras = all_reduce_sum_(parameters, extras).tolist()
    grad_norm = float(torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm))
    if not math.isfinite(extras[0]) or not math.isfinite(grad_norm):
        raise FloatingPointError(f"{where}: loss {extras[0]}, gradient norm {grad_norm}; this "
                                 "update was not made, and nothing was saved")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return extras, grad_norm


def set_up_processes() -> tuple[int, int, torch.device]:
    """(rank, world_size, device) from torchrun's environment; (0, 1, …) without it."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world_size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return rank, world_size, device


def shard_layers(model: Llama, device) -> Llama:
    """FSDP2: a rank keeps its part of every layer's frozen weights, and gathers a layer to run it.

    Adapters are small and stay whole on every rank, as do embedding, last norm and head; so
    optimizer, all-reduce and checkpoints are those of one process. Call it on a CPU's model: layer
    after layer goes to `device`, never all of them at once.
    """
    from torch.distributed.fsdp import fully_shard               # a second of importing

    whole = {p for p in model.parameters() if p.requires_grad}
    for layer in model.model.layers:
        fully_shard(layer, ignored_params=whole & set(layer.parameters()))
    fully_shard(model, ignored_params=whole | {
        p for name, p in model.named_parameters() if ".layers." not in name})
    return model.to(device)


class Stop:
    """Set by SIGTERM or Ctrl-C: finish the step, save, leave. A second Ctrl-C leaves at once."""

    def __init__(self):
        self.signal = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.handle)

    def handle(self, number, frame):
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number


# ---- the plan -----------------------------------------------------------------------------------

def learning_rate(step: int, peak: float, warmup_steps: int, total_steps: int) -> float:
    """Linear from 0 to `peak` over warmup_steps, then a cosine to 0 at total_steps."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps)
                                      / max(1, total_steps - warmup_steps)))


def plan_batches(trees: list[Tree], uses: str, batch_size: int, epochs: float, max_steps: int,
                 seed: int) -> list[list[int]]:
    """Tree indices of every step of the run."""
    sizes = [len(tree.pairs) if uses == "pairs" else len(tree.scores) for tree in trees]
    batches, epoch = [], 0
    while epoch < math.ceil(epochs) or len(batches) < max_steps:
        batches += epoch_batches(sizes, batch_size, seed, epoch)
        epoch += 1
    if max_steps > 0:
        return batches[:max_steps]
    return batches[:round(len(batches) * epochs / max(1, math.ceil(epochs)))]


# ---- flags and log ------------------------------------------------------------------------------

class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults behind every flag, and the file's header as it is written."""


def check_ranges(args, counts, ranges: dict) -> None:
    """Raise ValueError, naming the flag, for a count below 1 or a value outside its range."""
    for name in counts:
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)} must be at least 1")
    for name, (low, high) in ranges.items():
        value = getattr(args, name)
        if not (math.isfinite(value) and low <= value <= high):
            raise ValueError(f"--{name} {value} must be a number in [{low}, {high}]")


def write_line(output_dir: str, line: dict, shown, total: int, left: float) -> None:
    """Append a line to metrics.jsonl, and print what is `shown` of it and the seconds left."""
    text = "  ".join(f"{name} {line[name]:.4g}" for name in shown if name in line)
    print(f"step {line['step']}/{total}  {text}  {line['tokens_per_s']:.0f} tok/s  "
          f"{int(left) // 60}:{int(left) % 60:02} left", flush=True)
    with open(os.path.join(output_dir, "metrics.jsonl"), "a", encoding="utf-8") as stream:
        stream.write(json.dumps(line) + "\n")
