"""Time and peak memory of one LoRA training step: this project against TRL + PEFT.

On a CPU, a small Llama in fp32 and bf16 weights (`make bench`); on one GPU of 80 GB, 7B's shape in
bf16 (`make gpu`):

    python bench/step.py --dataset test.jsonl.gz --tokenizer tokenizer.model
    python bench/step.py --dataset test.jsonl.gz --tokenizer tokenizer.model --device cuda \\
        --size 7b --precision bf16 --pairs 64 --micro_tokens 8192 --together 1

One step is: policy forward, reference forward with the adapters off, loss, backward, clipping,
AdamW. All implementations take it on the same HH pairs, token for token, from the same random Llama
and adapter, with the same learning rate, so the losses of one method must agree step by step
(TOLERANCE); where they do not, the script ends in an error and no time is compared.

    ours-dpo, -ulma, -d2o, -d2o-unshared   this project, see ours_step.py
    trl, trl-compact, trl-tuned            TRL's DPOTrainer, see trl_step.py

D2O takes a quarter of the prompts; its 11 anchors are answers to other prompts of the file: only
their lengths matter here. Every implementation runs in a process of its own, so that its peak
memory is its own. These processes are alive at the same time and take steps in turn, one at a time,
A B C D A B C D ..., so that a slow minute of the machine hits all of them. Where they do not all
fit into a GPU's memory, --together n has n of one method alive, and one such group after another.

Beside the times: on a GPU the peak of torch.cuda.max_memory_allocated, on a CPU of the resident
set; and what share of the rate of large matrix products, measured for a second after every step,
our step reaches on the floating-point operations it cannot avoid (breakdown.matrix_rate,
breakdown.necessary_flops).

TRL's rows need trl==1.16.0, peft, transformers; where they are missing ours are measured alone.
`make bench` installs them in .venv-bench; nothing is downloaded while it runs. About 14 GB of
memory for the default 8 pairs. Mind the field `bf16_instructions`: on a CPU without them torch
multiplies bf16 matrices 10 to 200 times slower than fp32 ones, a bf16 step of TRL takes many
minutes, and the bf16 ratios show little else.
"""
import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata, util
from pathlib import Path

from machine import bf16_instructions, cpu_name, peak_gb
from task import OURS, SIZES, hh_pairs, token_counts, with_anchors
from trl_step import NEEDS, TRL, trl_step

# The process that compares imports neither torch nor the project: on Linux a child's ru_maxrss
# starts at its parent's, so a large parent would hide what a small worker needs.

DEFAULT = {"cpu": ("ours-dpo", "ours-ulma", "trl", "trl-compact", "ours-d2o", "ours-d2o-unshared"),
           # on a GPU trl is compact itself; with --together 2 ours-dpo takes turns with trl-tuned
           "cuda": ("ours-dpo", "trl-tuned", "trl", "ours-ulma", "ours-d2o", "ours-d2o-unshared")}
PRECISIONS = ("fp32", "bf16")
TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}   # relative, of losses; bf16 rounds at different places
TRL_PAIRS = 8                              # Trainer's default micro-batch
GOALS = (("ours-dpo", "trl", 6.5), ("ours-dpo", "trl-tuned", 2.3),      # times as fast, for 7B
         ("ours-d2o", "ours-d2o-unshared", 2.5))
SHARE_GOAL, MS_GOAL = 0.75, 16.0                         # of ours-dpo, of ours-ulma, for 7B


def method_of(name: str) -> str:
    return name.split("-")[1] if name in OURS else "dpo"


# ---- a worker -----------------------------------------------------------------------------------

def work(name: str, args: argparse.Namespace) -> None:
    """Take one step per line on stdin; answer with one JSON line each, and the peak at the end."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)                                    # what libraries print must not look like one
    import torch

    torch.set_num_threads(args.threads)
    device, precision = args.device, args.precision[0]
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    if name in OURS:                                 # only here: these import the project
        from breakdown import matrix_rate
        from ours_step import ours_step

        step, notes = ours_step(args.folder, name, args.size, precision, device, args.micro_tokens)
    else:
        micro_pairs = min(args.pairs, args.tuned_pairs if name == "trl-tuned" else TRL_PAIRS)
        step, notes = trl_step(args.folder, name, args.size, precision, device, micro_pairs)
    notes["loaded_gb"] = peak_gb(device)
    if device == "cuda":
        notes["gpu"] = torch.cuda.get_device_name()
        torch.cuda.reset_peak_memory_stats()
    print(json.dumps(notes), file=answers)
    for _ in sys.stdin:
        wait()
        start = time.perf_counter()
        loss = step()
        wait()
        seconds = time.perf_counter() - start
        if not math.isfinite(loss):
            raise FloatingPointError(f"{name} {precision}: loss {loss}")
        answer = {"loss": loss, "seconds": seconds}
        if name in OURS:
            mean, fastest = matrix_rate(device, 1.0)
            answer |= {"matrix_flops_per_s": mean, "fastest_matrix_flops_per_s": fastest}
        print(json.dumps(answer), file=answers)
    print(json.dumps({"peak_gb": peak_gb(device)}), file=answers)


def write_inputs(args: argparse.Namespace) -> None:
    """pairs.json and prompts.json, which every worker reads; anchors come from 64 pairs or more."""
    pairs = hh_pairs(args.dataset, args.tokenizer, max(64, args.pairs))
    prompts = with_anchors(pairs, max(1, args.pairs // 4))
    (args.folder / "pairs.json").write_text(json.dumps(pairs[:args.pairs]))
    (args.folder / "prompts.json").write_text(json.dumps(prompts))


# ---- all workers --------------------------------------------------------------------------------

def spawn(name: str, precision: str, folder: Path) -> subprocess.Popen:
    """This script again, as one worker; of a flag given twice the last one counts."""
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", name,
               "--precision", precision, "--folder", str(folder)]
    # offline also keeps DPOTrainer from reporting its use; the warnings are TRL's and transformers'
    settings = {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore::FutureWarning"}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                            bufsize=1, env=os.environ | settings)


def ask(row: dict, worker: subprocess.Popen, line: str) -> dict:
    """The worker's JSON answer to a line; to "", which is not sent, its first; to "end" its last.

    Of a worker that died the answer is {}, and its row gets `failed`; the error is on stderr.
    """
    try:
        if line == "end":
            worker.stdin.close()
        elif line:
            worker.stdin.write(line + "\n")
        return json.loads(worker.stdout.readline())
    except (json.JSONDecodeError, BrokenPipeError):
        row["failed"] = f"ended without an answer, exit code {worker.wait()}"
        print(f"{row['implementation']}: {row['failed']}", file=sys.stderr)
        return {}


def medians(row: dict, tokens: dict) -> dict:
    """What follows from a row's times."""
    seconds = statistics.median(row["seconds"][1:])
    count = tokens["d2o_prompts" if method_of(row["implementation"]) == "d2o" else "pairs"]
    found = {"median_seconds": seconds, "ms_per_pair": 1e3 * seconds / count}
    if rates := row.get("matrix_flops_per_s"):
        shares = [row["necessary_flops"] / s / rate
                  for s, rate in zip(row["seconds"], rates, strict=True)]
        found["share_of_matrix_rate"] = statistics.median(shares[1:])
    return found


def measure(names: list[str], precision: str, folder: Path, repeats: int,
            tokens: dict) -> list[dict]:
    """One row per implementation, all alive at the same time; the first round warms up: its loss
    counts, its time does not."""
    rows = [{"implementation": name, "precision": precision, "losses": [], "seconds": []}
            for name in names]
    workers = {}

    def working() -> list[tuple[dict, subprocess.Popen]]:
        return [(row, workers[row["implementation"]]) for row in rows if "failed" not in row]

    try:
        for row in rows:
            worker = workers[row["implementation"]] = spawn(
                row["implementation"], precision, folder)
            row |= ask(row, worker, "")
        for _ in range(1 + repeats):
            for row, worker in working():
                if step := ask(row, worker, "step"):
                    for key, value in step.items():
                        row.setdefault("losses" if key == "loss" else key, []).append(value)
                    print(f"{precision} {row['implementation']:17} {step['seconds']:8.3f} s   "
                          f"loss {step['loss']:.6f}", file=sys.stderr)
        for row, worker in working():
            row |= ask(row, worker, "end") | medians(row, tokens)
    finally:
        for worker in workers.values():
            worker.kill()                                             # no effect on one that ended
            worker.wait()
    return rows


def side_by_side(names: list[str], together: int) -> list[list[str]]:
    """Who is alive at the same time: all, or at most so many of one method, in this order."""
    if not together:
        return [list(names)]
    methods = {method: [name for name in names if method_of(name) == method]
               for method in map(method_of, names)}
    return [same[i:i + together] for same in methods.values()
            for i in range(0, len(same), together)]


# ---- the report ---------------------------------------------------------------------------------

def table(rows: list[dict]) -> str:
    """Markdown; ratios are to our DPO or D2O step in the same precision, a pair of D2O a prompt."""
    medians = {(row["implementation"], row["precision"]): row["median_seconds"] for row in rows}
    lines = ["| implementation | precision | s/step | min-max | ms/pair | x ours | peak GB "
             "| matrix rate | losses |", "|---|---|---|---|---|---|---|---|---|"]
    for row in rows:
        seconds, method = row["seconds"][1:], method_of(row["implementation"])
        base = medians.get(("ours-d2o" if method == "d2o" else "ours-dpo", row["precision"]))
        ratio = f"{row['median_seconds'] / base:.2f}" if base else "-"
        share = row.get("share_of_matrix_rate")
        losses = " ".join(f"{loss:.5f}" for loss in row["losses"])
        lines.append(f"| {row['implementation']} | {row['precision']} "
                     f"| {row['median_seconds']:.3f} | {min(seconds):.3f}-{max(seconds):.3f} "
                     f"| {row['ms_per_pair']:.1f} | {ratio} | {row['peak_gb']:.2f} "
                     f"| {f'{share:.0%}' if share else '-'} | {losses} |")
    return "\n".join(lines)


def goals(rows: list[dict], size: str) -> list[dict]:
    """The goals at this size beside what was measured.

    low, high   the fastest step of one over the slowest of the other, and the reverse
    """
    found = []
    for precision in PRECISIONS:
        by_name = {row["implementation"]: row for row in rows if row["precision"] == precision}
        for ours, other, goal in GOALS if size == "7b" else GOALS[-1:]:
            if not {ours, other} <= by_name.keys():
                continue
            a, b = by_name[ours], by_name[other]
            found.append({"what": f"{ours} {precision}: times as fast as {other}",
                          "goal": f">= {goal}", "came": b["median_seconds"] / a["median_seconds"],
                          "low": min(b["seconds"][1:]) / max(a["seconds"][1:]),
                          "high": max(b["seconds"][1:]) / min(a["seconds"][1:])})
        if size != "7b":
            continue
        for ours, key, goal in (("ours-dpo", "share_of_matrix_rate", f">= {SHARE_GOAL}"),
                                ("ours-ulma", "ms_per_pair", f"<= {MS_GOAL}")):
            if ours in by_name:
                found.append({"what": f"{ours} {precision}: {key}", "goal": goal,
                              "came": by_name[ours][key]})
    return found


def environment() -> dict:
    """What the numbers depend on beside the code."""
    return {"cpu": cpu_name(), "cores": os.cpu_count(), "bf16_instructions": bf16_instructions(),
            "load_before": os.getloadavg()[0], "python": platform.python_version(),
            **{package: metadata.version(package) if util.find_spec(package) else None
               for package in ("torch", *NEEDS)}}


def loss_differences(rows: list[dict]) -> dict:
    """The largest relative difference of losses between implementations: "dpo fp32" -> float."""
    first, differences = {}, {}
    for row in rows:
        key = f"{method_of(row['implementation'])} {row['precision']}"
        if key in first:
            differences[key] = max([differences.get(key, 0.0), *(
                abs(loss / other - 1)
                for loss, other in zip(row["losses"], first[key], strict=True))])
        first.setdefault(key, row["losses"])
    return differences


def show(report: dict, rows: list[dict]) -> None:
    """Print the report; raises SystemExit, before any time is compared, where losses disagree."""
    print("\n".join(f"{key}: {value}" for key, value in report.items()
                    if key not in ("results", "goals")))
    for row in report["results"]:
        for key in ("failed", "gpu", "kernels", "liger"):
            if key in row:
                print(f"{row['implementation']} {row['precision']}: {key}: {row[key]}")
    for key, difference in report["largest_relative_difference_of_losses"].items():
        if difference > TOLERANCE[key.split()[1]]:
            raise SystemExit(f"bench/step.py: the losses of {key} differ by {difference:.1e}, "
                             "relative; the times mean nothing")
    print(table(rows))
    for goal in report["goals"]:
        spread = f" ({goal['low']:.2f}-{goal['high']:.2f})" if "low" in goal else ""
        print(f"{goal['what']}: {goal['came']:.2f}{spread}, goal {goal['goal']}")
    if len(rows) < len(report["results"]):
        raise SystemExit("bench/step.py: not every implementation could be measured, see above")


def compare(args: argparse.Namespace) -> None:
    """Measure what was asked for, write the JSON, check that losses agree, print the table."""
    words = [Path(word).name for word in sys.argv]                  # of files only their names
    names, absent = args.only, [name for name in NEEDS if not util.find_spec(name)]
    if absent and set(names) & set(TRL):
        print(f"only this project's steps are measured: {', '.join(absent)} not installed")
        names = [name for name in names if name in OURS]
    report = {"command": " ".join(["python bench/step.py", *words[1:]]),
              "threads": args.threads, "device": args.device, "size": args.size, **environment()}
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if spawn("inputs", args.precision[0], folder).wait() != 0:
            raise SystemExit("bench/step.py: the inputs could not be made, see above")
        pairs, prompts = (json.loads((folder / f"{name}.json").read_text())
                          for name in ("pairs", "prompts"))
        report["tokens"] = token_counts(pairs, prompts, args.tuned_pairs)
        for precision in args.precision:         # not side by side: TRL alone takes several GB
            for group in side_by_side(names, args.together):
                results += measure(group, precision, folder, args.repeats, report["tokens"])
                rows = [row for row in results if "failed" not in row]
                report |= {"largest_relative_difference_of_losses": loss_differences(rows),
                           "goals": goals(rows, args.size), "results": results}
                args.out.parent.mkdir(parents=True, exist_ok=True)      # the results so far
                args.out.write_text(json.dumps(report, indent=1) + "\n")
    show(report, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--dataset", required=True, help="HH file, .jsonl.gz")
    parser.add_argument("--tokenizer", required=True, help="Llama's SentencePiece model")
    parser.add_argument("--device", choices=tuple(DEFAULT), default="cpu")
    parser.add_argument("--size", choices=tuple(SIZES), default="small", help="the Llama's shape")
    parser.add_argument("--pairs", type=int, default=8, help="preference pairs in a step")
    parser.add_argument("--micro_tokens", type=int, default=1024, help="ours: see train.py")
    parser.add_argument("--tuned_pairs", type=int, default=8, help="trl-tuned: per micro-batch")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps, after one untimed")
    parser.add_argument("--threads", type=int, default=2, help="torch threads of a worker")
    parser.add_argument("--only", nargs="+", choices=(*OURS, *TRL),
                        help="implementations to run (default: what makes sense on the device)")
    parser.add_argument("--together", type=int, default=0,
                        help="processes of one method alive at a time; 0: all of all methods")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS,
                        help="dtypes of the frozen weights (default: both; on a GPU bf16)")
    parser.add_argument("--out", type=Path, default=Path("bench/results/step.json"),
                        help="every timing and loss, JSON")
    parser.add_argument("--worker", help=argparse.SUPPRESS)           # what `spawn` starts
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.only = args.only or DEFAULT[args.device]
    args.precision = args.precision or (PRECISIONS[1:] if args.device == "cuda" else PRECISIONS)
    for micro in (TRL_PAIRS, args.tuned_pairs):      # else the mean over micro-batches differs
        if args.pairs > micro and args.pairs % micro:
            parser.error(f"--pairs {args.pairs} must be a multiple of TRL's {micro}, or less")
    if args.worker and args.worker not in TRL:
        # not for TRL: transformers imports another package called kernels where it finds one
        sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    if missing := [file for file in (args.dataset, args.tokenizer) if not Path(file).exists()]:
        parser.error(f"{missing[0]}: no such file; --dataset is HH's as on the Hugging Face Hub "
                     "(Anthropic/hh-rlhf), --tokenizer a Llama's tokenizer.model")
    if args.worker == "inputs":
        write_inputs(args)
    elif args.worker:
        work(args.worker, args)
    else:
        compare(args)


if __name__ == "__main__":
    main()
