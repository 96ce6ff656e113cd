"""What the loops of train.py and rlhf/ppo.py share: ranks, sums over them, the schedule, the stop.

Why not DistributedDataParallel: it averages over ranks, and an uneven batch wants exact sums; here
gradients, metrics and the stop flag travel in the same reduction.
"""
import math
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from files.cli import exit_code, leave, sentence_of, tell_torchrun
from model import Llama

BUCKET_BYTES = 64 * 2 ** 20      # gradients copied together for one all-reduce
CONNECT = timedelta(minutes=2)   # to find torchrun, which is there before its ranks are
MAX_GRAD_NORM = 1.0              # gradients are clipped to this norm


class Stop:
    """In a `with`, set by SIGTERM or Ctrl-C: finish the step, save, leave. A second Ctrl-C leaves
    at once.

    signal   0, or the number of the signal that came
    """

    def __init__(self):
        self.signal, self.handlers = 0, {}

    def __enter__(self) -> "Stop":
        for number in (signal.SIGTERM, signal.SIGINT):
            self.handlers[number] = signal.signal(number, self.handle)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame: Any) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number


@dataclass(frozen=True)
class Ranks:
    """This process among its peers, as torchrun numbers them."""
    rank: int = 0
    world_size: int = 1
    stop: Stop = Stop()              # no signal sets it before its `with`

    @property
    def is_first(self) -> bool:
        """Whether this rank writes files and prints."""
        return self.rank == 0

    @property
    def is_first_here(self) -> bool:
        """Whether this rank is the first of its machine."""
        return self.rank == 0 or os.environ.get("LOCAL_RANK", "0") == "0"

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()


# ---- a process and its settings -----------------------------------------------------------------

def flushes_denormals() -> bool:
    """Whether this process rounds numbers below 1e-38 to 0 (torch has no getter)."""
    return bool((torch.tensor([1e-40]) * torch.ones(1) == 0).all())


def own_device() -> torch.device:
    """This rank's GPU, the current one from here on; the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    found = torch.cuda.device_count()
    if device.index >= found:
        raise ValueError(f"local rank {device.index} has no GPU: there are {found}, so "
                         f"--nproc_per_node={found}")
    torch.cuda.set_device(device)
    return device


def set_up_processes() -> tuple[int, int, torch.device]:
    """(rank, world_size, device) from torchrun's environment; (0, 1, …) without it."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = own_device()
    if world_size > 1:
        try:
            store, *_ = next(dist.rendezvous("env://", timeout=CONNECT))
        except dist.DistNetworkError:
            raise ValueError(
                f"nothing answers at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}, where "
                "torchrun of the first machine should be: it has ended, or is out of reach") from None
        store.set_timeout(dist.constants.default_pg_timeout)       # for peers that start slowly
        # torchrun's store outlives a restart: without a prefix the addresses of dead ranks are read
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store,
                                rank=rank, world_size=world_size)
    return rank, world_size, device


class Peers:
    """What ends one rank ends all, wherever they wait: the first to fail tells why, in the store.

    A thread of every rank waits for that. If the store itself goes, torchrun was killed: the rank
    gets a SIGTERM, so it saves its step and leaves.
    """
    KEY = "why a rank left"

    def __init__(self):
        self.store, self.over = dist.distributed_c10d._get_default_store(), False
        self.watcher = threading.Thread(target=self.watch, args=(self.store.clone(),), daemon=True)
        self.watcher.start()

    def watch(self, store: dist.Store) -> None:
        try:
            store.wait([self.KEY], timedelta(days=3650))
            rank, code, sentence = store.get(self.KEY).decode().split(" ", 2)
        except RuntimeError:
            if not self.over:
                os.kill(os.getpid(), signal.SIGTERM)
            return
        if rank != os.environ["RANK"]:
            tell_torchrun(sentence)
            sys.stdout.flush()
            os._exit(int(code))              # the main thread may wait for the rank that failed

    def end_all(self, error: BaseException) -> None:
        """Make the other ranks leave. If another one failed before, this does not return."""
        self.store.compare_set(
            self.KEY, "", f"{os.environ['RANK']} {exit_code(error)} {sentence_of(error)}")
        self.watcher.join(60)


@contextmanager
def running() -> Iterator[tuple[Ranks, torch.device]]:
    """Inside, this process is a rank of a run; afterwards it is as it was before.

    Among several ranks an error of any one, and Ctrl-C, end all of them, and one prints it.
    """
    flushed, peers = flushes_denormals(), None
    # Squared gradients of never-seen tokens sink below 1e-38; a CPU is then 20 times slower.
    torch.set_flush_denormal(True)
    try:
        device = own_device()
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            rank, world_size, device = set_up_processes()
            peers = Peers() if world_size > 1 else None
            yield Ranks(rank, world_size, Stop()), device
        if peers:                    # after a failure the others are not there to wait for
            peers.over = True
            dist.barrier()           # gloo aborts a rank that waits while another one leaves
            dist.destroy_process_group()
    except (Exception, KeyboardInterrupt) as error:
        if not peers:
            raise
        if isinstance(error, dist.DistError) or "gloo/transport" in str(error):
            error = ConnectionError("another process of this run ended, and this one cannot go on "
                                    "without it; the same command continues")
        peers.end_all(error)
        if exit_code(error) == 1:
            raise                                                # a bug: its traceback
        leave(error, at_once=True)
    finally:
        if peers:
            peers.over = True
        torch.set_flush_denormal(flushed)


def shard_layers(model: Llama, device: torch.device) -> Llama:
    """FSDP2: a rank holds its part of every layer's frozen weights, and gathers a layer to run it.

    Adapters are small and stay whole on every rank, as do embedding, last norm and head; so
    optimizer, all-reduce and checkpoints are those of one process. Call it on a CPU's model: layer
    after layer goes to `device`, never all of them at once.
    """
    from torch.distributed.fsdp import fully_shard  # a second of importing

    whole = {p for p in model.parameters() if p.requires_grad}
    for layer in model.model.layers:
        fully_shard(layer, ignored_params=whole & set(layer.parameters()))
    fully_shard(model, ignored_params=whole | {
        p for name, p in model.named_parameters() if ".layers." not in name})
    return model.to(device)


# ---- sums over ranks ----------------------------------------------------------------------------

def gather(value: Any) -> list:
    """What every rank passed, on every rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def reduce_bucket_(tensors: list[Tensor]) -> None:
    """Sum tensors of one dtype over ranks, in place, in one all-reduce."""
    if len(tensors) == 1:                                # as it is, without a copy
        dist.all_reduce(tensors[0])
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, summed in zip(tensors, flat.split([tensor.numel() for tensor in tensors]),
                              strict=True):
        tensor.copy_(summed.view_as(tensor))


def all_reduce_gradients_(parameters: list[Tensor], extras: Tensor) -> list[float]:
    """Sum gradients over ranks, in place, and return the summed extras.

    An adapter's gradients and the extras fit one bucket, so it is one all-reduce; with --lora_r 0
    buckets keep the copy small. A rank that had no tree in this batch takes part with zeros.
    """
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    if not dist.is_initialized():
        return extras.tolist()
    extras = extras.to(parameters[0].dtype)          # one bucket: a float64 one would be another
    bucket, size = [], 0
    for tensor in [*(p.grad for p in parameters), extras]:
        if bucket and size + tensor.nbytes > BUCKET_BYTES:
            reduce_bucket_(bucket)
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    reduce_bucket_(bucket)
    return extras.tolist()


def clip_gradients_(parameters: list[Tensor], max_grad_norm: float, loss: float,
                    where: str) -> float:
    """Clip the gradient to this norm; returns the norm it had.

    where    what the error names
    raises   FloatingPointError, before any update, for a loss or gradient that is not finite
    """
    grad_norm = float(torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm))
    if not math.isfinite(loss) or not math.isfinite(grad_norm):
        raise FloatingPointError(f"{where}: loss {loss}, gradient norm {grad_norm}; this update "
                                 "was not made, and nothing was saved")
    return grad_norm


# ---- the schedule -------------------------------------------------------------------------------

def learning_rate(step: int, peak: float, warmup_steps: int, total_steps: int) -> float:
    """Linear from peak / warmup_steps to `peak` in warmup_steps steps, then a cosine to 0 at
    total_steps; steps count from 0."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps)
                                      / max(1, total_steps - warmup_steps)))
