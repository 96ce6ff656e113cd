"""Tokens per second and peak memory of greedy generation: this project against transformers.

    python bench/generate.py --out bench/results/generate.json
    python bench/generate.py --device cuda --precision bf16 --hidden_size 4096 --layers 32 \\
        --heads 32 --intermediate_size 11008 --new_tokens 256             7B, random weights

Both read the same folder (random Llama, written by `model.save_llama`) and continue the same
prompts, of lengths drawn uniformly between --shortest and --longest, by exactly --new_tokens
tokens each: EOS ends no sample. Ours takes the prompts as lists; transformers' `generate` takes
them padded on the left, with its default cache and attention. Tokens must be equal, else the
script ends in an error (float32; in bf16 the share of equal tokens is reported). Every
implementation runs in a process of its own, so that its peak memory is its own; they take turns
A B A B, one at a time, after one untimed round. `prefill` is a run with one new token.

Needs transformers beside this project's packages (bench/requirements.txt).
"""
import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from machine import cpu_name, peak_gb
from task import DTYPES

ROOT = Path(__file__).resolve().parents[1]
IMPLEMENTATIONS = ("ours", "transformers")


def write_inputs(folder: Path, args: argparse.Namespace) -> None:
    """The model's folder and prompts.json."""
    import torch

    from model import Llama, LlamaConfig, save_llama

    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, DTYPES[args.precision]))      # 7B: no float32 copy
    with torch.device(args.device):
        model = Llama(LlamaConfig(
            vocab_size=args.vocab_size, hidden_size=args.hidden_size,
            intermediate_size=args.intermediate_size, num_hidden_layers=args.layers,
            num_attention_heads=args.heads, num_key_value_heads=args.kv_heads))
    save_llama(model, str(folder))
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(args.shortest, args.longest + 1, (args.batch_size,),
                            generator=generator).tolist()
    prompts = [[1, *torch.randint(3, args.vocab_size, (n - 1,), generator=generator).tolist()]
               for n in lengths]
    (folder / "prompts.json").write_text(json.dumps(prompts))


def ours(folder: Path, prompts: list[list[int]], precision: str, device: str) -> Callable:
    """A function: number of new tokens -> lists of new token ids."""
    import torch

    from generate import generate
    from model import load_llama

    model = load_llama(str(folder), getattr(torch, DTYPES[precision]), device)
    return lambda new: generate(model, prompts, new, temperature=0, eos_id=None)


def transformers(folder: Path, prompts: list[list[int]], precision: str, device: str) -> Callable:
    """The same by transformers."""
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=getattr(torch, DTYPES[precision]))
    model = model.to(device).eval()
    size = max(map(len, prompts))
    input_ids = torch.tensor([[0] * (size - len(ids)) + ids for ids in prompts], device=device)
    mask = torch.tensor([[0] * (size - len(ids)) + [1] * len(ids) for ids in prompts],
                        device=device)

    def run(new: int) -> list[list[int]]:
        rows = model.generate(input_ids=input_ids, attention_mask=mask, do_sample=False,
                              max_new_tokens=new, pad_token_id=0, eos_token_id=None)
        return rows[:, size:].tolist()
    return run


def work(name: str, folder: Path, args: argparse.Namespace) -> None:
    """For every line on stdin, a number of new tokens: generate, answer with one JSON line."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)                                    # what libraries print must not look like one
    import torch

    torch.set_num_threads(args.threads)
    prompts = json.loads((folder / "prompts.json").read_text())
    build = {"ours": ours, "transformers": transformers}[name]
    run = build(folder, prompts, args.precision, args.device)
    for line in sys.stdin:
        start = time.perf_counter()
        rows = run(int(line))                            # lists, so the device has finished
        seconds = time.perf_counter() - start
        print(json.dumps({"rows": rows, "seconds": seconds, "peak_gb": peak_gb(args.device)}),
              file=answers)


def measure(folder: Path, args: argparse.Namespace) -> tuple[list[dict], float]:
    """One row per implementation, and the share of tokens that are equal."""
    workers = {name: subprocess.Popen(
        [sys.executable, __file__, *sys.argv[1:], "--worker", name, "--folder", str(folder)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        env=os.environ | {"HF_HUB_OFFLINE": "1"}) for name in IMPLEMENTATIONS}

    def ask(name: str, new: int) -> dict:
        workers[name].stdin.write(f"{new}\n")
        line = workers[name].stdout.readline()
        if not line:
            raise RuntimeError(f"worker {name} ended, exit code {workers[name].wait()}")
        return json.loads(line)
    results = {name: {"implementation": name, "prefill_seconds": [], "seconds": []}
               for name in IMPLEMENTATIONS}
    try:
        first = {name: ask(name, args.new_tokens)["rows"] for name in IMPLEMENTATIONS}
        assert all(len(ids) == args.new_tokens for rows in first.values() for ids in rows)
        mine, theirs = ([token for ids in first[name] for token in ids] for name in IMPLEMENTATIONS)
        equal = sum(a == b for a, b in zip(mine, theirs, strict=True)) / len(mine)
        for _ in range(args.repeats):
            for name, result in results.items():
                result["prefill_seconds"].append(ask(name, 1)["seconds"])
                answer = ask(name, args.new_tokens)
                result["seconds"].append(answer["seconds"])
                result["peak_gb"] = answer["peak_gb"]
                print(f"{name:12} {answer['seconds']:.2f} s", file=sys.stderr)
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()
    new = args.batch_size * args.new_tokens
    for result in results.values():
        # within a round, because a busy minute hits both
        result["times_transformers"] = [other / own for other, own in zip(
            results["transformers"]["seconds"], result["seconds"], strict=True)]
        result["tokens_per_s"] = new / statistics.median(result["seconds"])
        result["decode_tokens_per_s"] = (new - args.batch_size) / (
            statistics.median(result["seconds"]) - statistics.median(result["prefill_seconds"]))
    return list(results.values()), equal


def environment(device: str) -> dict:
    """What the numbers depend on beside the code."""
    place = {"cpu": cpu_name(), "cores": os.cpu_count()}
    if device == "cuda":
        import torch
        place["gpu"] = torch.cuda.get_device_name()
    return place | {"load_before": os.getloadavg()[0], "python": platform.python_version(),
                    "torch": metadata.version("torch"),
                    "transformers": metadata.version("transformers")}


def table(results: list[dict]) -> str:
    lines = ["| implementation | s, median (range) | prefill s | tokens/s | decode tokens/s "
             "| times transformers, median of rounds | peak GB |", "|---|---|---|---|---|---|---|"]
    for row in results:
        seconds, ratios = row["seconds"], row["times_transformers"]
        lines.append(f"| {row['implementation']} | {statistics.median(seconds):.2f} "
                     f"({min(seconds):.2f}-{max(seconds):.2f}) "
                     f"| {statistics.median(row['prefill_seconds']):.2f} "
                     f"| {row['tokens_per_s']:.0f} | {row['decode_tokens_per_s']:.0f} "
                     f"| {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}) "
                     f"| {row['peak_gb']:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument
    flag("--device", choices=("cpu", "cuda"), default="cpu", help="where")
    flag("--precision", choices=("fp32", "bf16"), default="fp32", help="dtype of the weights")
    flag("--vocab_size", type=int, default=32000, help="V")
    flag("--hidden_size", type=int, default=512, help="D")
    flag("--intermediate_size", type=int, default=1408, help="width of the MLP")
    flag("--layers", type=int, default=8, help="L")
    flag("--heads", type=int, default=8, help="H")
    flag("--kv_heads", type=int, help="key and value heads; H if left out")
    flag("--batch_size", type=int, default=16, help="prompts")
    flag("--shortest", type=int, default=20, help="prompt, tokens")
    flag("--longest", type=int, default=200, help="prompt, tokens")
    flag("--new_tokens", type=int, default=64, help="per prompt")
    flag("--repeats", type=int, default=5, help="timed rounds, after one untimed")
    flag("--threads", type=int, default=1, help="torch threads of a worker")
    flag("--out", type=Path, help="every number, JSON")
    flag("--worker", help=argparse.SUPPRESS)             # what `measure` starts
    flag("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker != "transformers":       # it imports another package called kernels, if found
        sys.path.insert(0, str(ROOT))
    if args.worker == "inputs":
        write_inputs(args.folder, args)
    elif args.worker:
        work(args.worker, args.folder, args)
    else:
        with tempfile.TemporaryDirectory() as temporary:
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--worker", "inputs",
                            "--folder", temporary], check=True)
            place = environment(args.device)
            results, equal = measure(Path(temporary), args)
            prompts = json.loads((Path(temporary) / "prompts.json").read_text())
        settings = {key: value for key, value in vars(args).items()
                    if key not in ("out", "worker", "folder")}
        report = {"settings": settings, **place,
                  "prompt_tokens": sum(map(len, prompts)),
                  "padded_prompt_tokens": len(prompts) * max(map(len, prompts)),
                  "share_of_equal_tokens": equal, "results": results}
        print("\n".join(f"{key}: {value}" for key, value in report.items() if key != "results"))
        print(table(results))
        if args.out:
            args.out.write_text(json.dumps(report, indent=1) + "\n")
        if equal < 1 and args.precision == "fp32":
            raise SystemExit("bench/generate.py: tokens differ; the times mean nothing")


if __name__ == "__main__":
    main()
