"""Does a 7B model fit: load it in bfloat16, run it, take one LoRA step; seconds and peak memory.

    python bench/load.py                       # 7B shape on the CPU: 14 GB of disk, 16 GB of memory
    python bench/load.py --source bin          # float16 .bin shards, as lmsys/vicuna-7b-v1.5 ships
    python bench/load.py --device cuda          # and a step of 8192 tokens with --gradient_checkpointing

A folder of random weights is written shard by shard, then read in a new process whose memory is
watched from outside. Two peaks are reported: `anonymous` is memory the process must have; `file` is
pages of mapped weight files, which the system may drop and read again. In a bfloat16 safetensors
folder on the CPU the weights are such pages: loading maps them, and reads them once, since it
refuses values that are not finite. With another source dtype the weights are anonymous memory.
"""
import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from machine import bf16_instructions, cpu_name
from task import SIZES

if TYPE_CHECKING:
    from model import LlamaConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
MIN_AVAILABLE = 1.5 * 2 ** 30     # bytes; a run is stopped before the system runs out of memory
FORWARD_TOKENS = 64
LAST_STAGE = "step"


# ---- the model on disk --------------------------------------------------------------------------

def build(folder: Path, config: "LlamaConfig", source: str, shard_bytes: int) -> None:
    """Write a model of random values (std 0.02), one shard in memory at a time, and flush it to disk.

    source   "safetensors": bfloat16; "bin": float16 state dicts with an index, of torch.save
    """
    import torch
    from safetensors.torch import load_file

    from files.config import write_config
    from files.weights import NAMES, weight_files, write_weights
    from model import Llama

    with torch.device("meta"):
        shapes = {name: t.shape for name, t in Llama(config).state_dict().items()}
    torch.manual_seed(0)
    values = torch.empty(2 ** 20, dtype=torch.bfloat16).normal_(std=0.02)

    def tensor_of(name: str) -> torch.Tensor:
        if name.endswith("norm.weight"):
            return torch.ones(shapes[name], dtype=torch.bfloat16)
        # the same values again and again, from another start: 7B anew would take half a minute
        size, start = shapes[name].numel(), int(torch.randint(len(values), ()))
        return values.roll(start).repeat(-(-size // len(values)))[:size].view(shapes[name])

    write_config(config, "bfloat16", str(folder))
    write_weights(str(folder), {name: 2 * shape.numel() for name, shape in shapes.items()},
                  tensor_of, shard_bytes)
    if source == "bin":
        for file in map(Path, weight_files(str(folder))):
            tensors = {name: t.half() for name, t in load_file(file).items()}
            torch.save(tensors, file.with_name("pytorch_" + file.stem + ".bin"))
            file.unlink()
        if (index := folder / NAMES[1]).exists():
            text = index.read_text().replace("model-", "pytorch_model-")
            (folder / NAMES[3]).write_text(text.replace(".safetensors", ".bin"))
            index.unlink()
    for path in folder.iterdir():             # on disk and out of the page cache: a cold start
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# ---- the process that is measured ---------------------------------------------------------------

def work(folder: str, device: str) -> None:
    """Load, forward, one ULMA step of LoRA r 8 on pairs; a JSON line after each stage.

    The step has two pairs on a CPU. On a GPU it fills train.py's default --micro_tokens, 8192, and
    runs each layer again in the backward: what a card of 24 GB has to hold. Before it comes the
    check at the start of every run, twice: compiling the kernels is in the first one's time.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    start = time.perf_counter()

    def done(stage: str, **values: Any) -> None:
        nonlocal start
        if device == "cuda":
            torch.cuda.synchronize()
            values["device_peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        values = {"stage": stage, "seconds": time.perf_counter() - start, **values}
        print(json.dumps(values), file=answers)
        sys.stdin.readline()                  # the watcher has noted the peak of this stage
        start = time.perf_counter()

    from functools import partial

    import torch

    from kernels.attention import choose_attention
    from lora import add_lora, lora_disabled
    from model import linear, load_llama
    from packing import Tree
    from step import METHODS, Compute, Objective, batch_counts, micro_batches
    from train import accumulate_gradient
    from training.start_check import check_start

    done("import", threads=torch.get_num_threads())
    model = load_llama(folder, torch.bfloat16, device)
    done("load", parameters=sum(p.numel() for p in model.parameters()))
    generator = torch.manual_seed(0)                   # of the tokens, and of the adapter
    ids = torch.randint(3, model.config.vocab_size, (FORWARD_TOKENS,), generator=generator)
    with torch.no_grad():
        hidden = model(ids.to(device))                                           # [T, D]
        logits = linear(hidden[-1:], model.lm_head.weight)                       # [1, V]
    done("forward", tokens=len(ids), finite=bool(logits.isfinite().all()))
    add_lora(model, r=8, dropout=0.0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    model.gradient_checkpointing = device == "cuda"
    pairs, size = (2, 16) if device == "cpu" else (20, 200)       # 2 · 32 or 20 · 400 tokens
    ids = torch.randint(3, model.config.vocab_size, (pairs, 2 * size), generator=generator)
    trees = [Tree([1] + row[:size], [row[size:-size // 2] + [2], row[-size // 2:] + [2]],
                  [1.0, 0.0], [(0, 1)]) for row in ids.tolist()]
    objective = Objective(METHODS["ulma"])
    compute = Compute(device, attention=choose_attention("auto", device))
    if device == "cuda":
        for stage in ("check", "check again"):
            done(stage, errors=check_start(model, trees, compute))
    totals = accumulate_gradient(model, partial(lora_disabled, model),
                                 micro_batches(trees, objective.method, compute),
                                 batch_counts(trees), objective, compute)
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
    torch.optim.AdamW(parameters, lr=1e-4).step()
    done("step", tokens=int(totals[1]), loss=totals[0].item(), grad_norm=grad_norm.item())


# ---- the watcher --------------------------------------------------------------------------------

def memory(pid: int) -> dict[str, int]:
    """RssAnon, RssFile and VmHWM of a process from /proc, in bytes."""
    text = Path(f"/proc/{pid}/status").read_text()
    return {key: 1024 * int(value)
            for key, value in re.findall(r"(RssAnon|RssFile|VmHWM):\s+(\d+) kB", text)}


def available() -> int:
    """Bytes of memory the machine can still allocate, droppable page cache included."""
    return 1024 * int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1])


def watch(folder: Path, device: str) -> list[dict]:
    """Run `work` in a new process; returns its stages, each with its peak memory.

    raises  RuntimeError if it failed, or was stopped because the machine ran out of memory
    """
    command = [sys.executable, __file__, "--worker", str(folder), "--device", device]
    no_kernels_yet = os.environ | {"TRITON_CACHE_DIR": str(folder / "triton")}
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                              bufsize=1, env=no_kernels_yet)
    peaks, over = {"RssAnon": 0, "RssFile": 0}, threading.Event()
    low = available()

    def watch_memory() -> None:
        nonlocal low
        while not over.wait(0.05):
            try:
                now = memory(worker.pid)
            except OSError:
                return
            for key in peaks:
                peaks[key] = max(peaks[key], now.get(key, 0))
            if (low := min(low, available())) < MIN_AVAILABLE:
                worker.kill()

    watcher, stages = threading.Thread(target=watch_memory), []
    watcher.start()
    try:
        for line in worker.stdout:
            now = memory(worker.pid)
            stage = json.loads(line) | {
                "peak_anonymous_gb": max(peaks["RssAnon"], now["RssAnon"]) / 1e9,
                "peak_file_gb": max(peaks["RssFile"], now["RssFile"]) / 1e9,
                "peak_resident_so_far_gb": now["VmHWM"] / 1e9}
            stages.append(stage)
            print(f"{stage['stage']:11} {stage['seconds']:7.1f} s", file=sys.stderr)
            peaks.update(RssAnon=0, RssFile=0)
            worker.stdin.write("\n")
    finally:
        over.set()
        watcher.join()
        worker.stdin.close()
        if not stages or stages[-1]["stage"] != LAST_STAGE:
            worker.kill()
        code = worker.wait()
    if code:
        raise RuntimeError(f"the measured process ended with code {code} after "
                           f"{[stage['stage'] for stage in stages]}; {low / 1e9:.1f} GB of memory "
                           f"were available at the least (it is stopped below "
                           f"{MIN_AVAILABLE / 1e9:.1f})")
    return stages


def table(stages: list[dict]) -> str:
    """Markdown, GB of 1e9 bytes."""
    lines = ["| stage | s | peak anonymous GB | peak of mapped files GB |", "|---|---|---|---|"]
    return "\n".join(lines + [
        f"| {stage['stage']} | {stage['seconds']:.1f} | {stage['peak_anonymous_gb']:.2f} "
        f"| {stage['peak_file_gb']:.2f} |" for stage in stages])


def measure(config: "LlamaConfig", source: str, device: str, directory: str | None, keep: bool,
            shard_bytes: int = 5_000_000_000) -> dict:
    """Build, run, remove; returns the report.

    raises  RuntimeError if the disk has no room for the model or the run fails
    """
    import safetensors
    import torch

    from model import Llama

    with torch.device("meta"):
        size = 2 * sum(t.numel() for t in Llama(config).state_dict().values())
    folder, load = Path(tempfile.mkdtemp(prefix="load-", dir=directory)), os.getloadavg()[0]
    try:
        room = shutil.disk_usage(folder).free
        if room < size + shard_bytes + 2 ** 30:
            raise RuntimeError(f"{folder}: {room / 1e9:.1f} GB free, the model takes "
                               f"{size / 1e9:.1f} and a shard more")
        start = time.perf_counter()
        build(folder, config, source, shard_bytes)
        print(f"build    {time.perf_counter() - start:7.1f} s", file=sys.stderr)
        files = [file.name for file in sorted(folder.iterdir())]
        stages = watch(folder, device)
    finally:
        if keep:
            print(f"the model stays in {folder}", file=sys.stderr)
        else:
            shutil.rmtree(folder)
    return {
        "hardware": {"cpu": cpu_name(), "cores": os.cpu_count(),
                     "threads": stages[0]["threads"], "load_before": load,
                     "memory_gb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9,
                     "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
                     "bf16_instructions": bf16_instructions()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "safetensors": safetensors.__version__},
        "seconds_to_end_of_first_step_beside_loading": sum(
            stage["seconds"] for stage in stages if stage["stage"] not in ("load", "check again")),
        "source": source, "files": files, "weights_gb": size / 1e9, "stages": stages,
        "peak_anonymous_gb": max(stage["peak_anonymous_gb"] for stage in stages),
        "peak_resident_gb": stages[-1]["peak_resident_so_far_gb"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", choices=("safetensors", "bin"), default="safetensors",
                        help="bfloat16 safetensors (default), or float16 .bin")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where it runs")
    parser.add_argument("--size", choices=tuple(SIZES), default="7b", help="the model's shape")
    parser.add_argument("--tmp", help="folder for the 13.5 GB model (default: the system's)")
    parser.add_argument("--keep", action="store_true", help="leave the model there")
    parser.add_argument("--out", type=Path, help="default: bench/results/load-SIZE.json, "
                        "with -bin, -cuda")
    parser.add_argument("--worker", help=argparse.SUPPRESS)           # what `watch` starts
    args = parser.parse_args()
    if args.worker:
        return work(args.worker, args.device)
    from model import LlamaConfig

    words = [f"--{key} {getattr(args, key)}" for key in ("source", "device", "size")]    # no path
    try:
        report = {"command": " ".join(["python bench/load.py", *words]),
                  **measure(LlamaConfig(**SIZES[args.size]), args.source, args.device, args.tmp,
                            args.keep)}
    except RuntimeError as error:
        raise SystemExit(f"bench/load.py: {error}") from None
    name = "-".join(["load", args.size, *["bin"] * (args.source == "bin"),
                     *["cuda"] * (args.device == "cuda")])
    out = args.out or Path(f"bench/results/{name}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report["stages"]))
    print(f"first step done {report['seconds_to_end_of_first_step_beside_loading']:.1f} s after the "
          "start, beside loading")
    if args.device == "cuda":
        print(f"GPU: {max(stage['device_peak_gb'] for stage in report['stages']):.1f} GB at most")
    print(f"peak: {report['peak_anonymous_gb']:.2f} GB anonymous, "
          f"{report['peak_resident_gb']:.2f} GB resident, mapped files included")


if __name__ == "__main__":
    main()
