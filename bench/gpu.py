"""Everything that only a GPU can show, in one command of at most eight minutes: `make gpu`.

    python bench/gpu.py                          one GPU of 80 GB, with the torch that is installed
    python bench/gpu.py --only attention step    some of the stages
    python bench/gpu.py --dry-run                every stage on a CPU, at its smallest size

Stages run one after another, each in a process of its own with a limit of its own:

    tests          tests/kernels: kernels, attention and layers against float64 on the device;
                   tests/test_gpu.py: train.py itself
    step           bench/step.py at 7B's size: DPO against TRL as it comes and tuned
    step-others    ULMA, and D2O with and without shared prompts
    head           bench/kernel.py: the vocabulary head against its bare products, TRL, Liger, ...
    attention      bench/attention.py: one layer over HH's pairs
    attention-d2o  the same over prompts with 12 responses
    layers         bench/layers.py: norms, rotary embedding, SwiGLU, an adapter; share of bandwidth
    breakdown      bench/breakdown.py: where the time of the DPO step goes
    generation     bench/generate.py at 7B's width, 8 layers, against transformers
    load           bench/load.py: a 7B model, the check at a run's start, and a step with
                   checkpointed layers: does 24 GB do?

After every stage --out is written: the card, versions, and of each stage its command, seconds, exit
code, the end of its output and its numbers; so a run that is cut leaves what it has. A stage
without its packages (bench/requirements.txt) is left out by name. Without --dataset and --tokenizer
a stand-in with HH's lengths is made up.
"""
import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib import util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 480        # for all stages
TAIL = 4000          # characters of a stage's output that are stored
PROBE = """
import json, torch
on_gpu = torch.cuda.is_available()
try:
    import triton
    version = triton.__version__
except ImportError:
    version = None
print(json.dumps({"gpu": torch.cuda.get_device_name() if on_gpu else None,
    "gpu_gb": torch.cuda.get_device_properties(0).total_memory / 1e9 if on_gpu else None,
    "cuda": torch.version.cuda, "torch": torch.__version__, "triton": version}))
"""


@dataclass(frozen=True)
class Stage:
    """One command."""
    name: str
    limit: float                     # seconds
    words: list[str]                 # behind the Python that runs it
    needs: tuple[str, ...] = ()      # packages
    out: str | None = None           # the file of its numbers


# ---- what runs ----------------------------------------------------------------------------------

def pytest(*words: str) -> list[str]:
    """The command of pytest, in several processes where pytest-xdist is installed."""
    spread = ["-n", str(max(1, min(12, 3 * os.cpu_count() // 4)))] if util.find_spec("xdist") else []
    return ["-m", "pytest", "-o", "addopts=", "-v", "-p", "no:cacheprovider", *spread, *words]


def stages(data: list[str], folder: Path, dry: bool) -> list[Stage]:
    """All stages, in the order of what a cut run should have.

    data     the flags of an HH file and a tokenizer
    folder   for the numbers of each
    dry      at the smallest size, on a CPU
    """
    def script(name: str, stage: str, real: str, small: str = "") -> tuple[list[str], str]:
        out = str(folder / f"{stage}.json")
        given = data if name in ("attention", "step", "breakdown") else []
        return [f"bench/{name}.py", *given, *(small if dry else real).split(), "--out", out], out

    def bench(stage: str, limit: float, name: str, real: str, small: str,
              needs: tuple[str, ...] = ()) -> Stage:
        words, out = script(name, stage, real, small)
        return Stage(stage, limit, words, needs, out)

    step = ("--device cuda --size 7b --precision bf16 --pairs 64 --micro_tokens 8192 --together 1 "
            "--repeats 3 --only ")
    small_step = "--size tiny --pairs 2 --repeats 1 --threads 1 --precision fp32 --only "
    tests = (["tests/kernels/test_lora_linear.py"] if dry else
             ["tests/kernels", "tests/test_gpu.py", "-k", "cuda or test_gpu"])
    return [
        Stage("tests", 130, pytest(*tests)),
        bench("step", 160, "step", step + "ours-dpo trl-tuned trl",
              small_step + "ours-dpo"),
        bench("step-others", 90, "step", step + "ours-ulma ours-d2o ours-d2o-unshared",
              small_step + "ours-ulma ours-d2o ours-d2o-unshared"),
        bench("head", 60, "kernel", "--repeats 3",
              "--rows 128 --width 16 --vocab 100 --repeats 1"),
        bench("attention", 40, "attention", "", "--tokens 256 --repeats 1"),
        bench("attention-d2o", 40, "attention", "--responses 12",
              "--tokens 384 --responses 3 --repeats 1"),
        bench("layers", 30, "layers", "", "--tokens 8 --repeats 1"),
        bench("breakdown", 40, "breakdown",
              "--device cuda --size 7b --pairs 64 --micro_tokens 8192 --repeats 1",
              "--size tiny --pairs 2 --repeats 1"),
        bench("load", 150, "load", "--device cuda", "--size tiny"),
        bench("generation", 50, "generate",
              "--device cuda --precision bf16 --hidden_size 4096 --intermediate_size 11008 "
              "--layers 8 --heads 32 --batch_size 32 --new_tokens 128 --repeats 2",
              "--hidden_size 32 --intermediate_size 48 --layers 2 --heads 4 --vocab_size 64 "
              "--batch_size 2 --longest 30 --new_tokens 4 --repeats 1", ("transformers",))]


def write_stand_in(folder: Path) -> list[str]:
    """Flags of made-up pairs with the lengths of HH's (about 145 tokens of prompt, 45 and 45 of
    responses), and of a tokenizer that is trained on them."""
    sys.path.insert(0, str(ROOT))
    from data import VICUNA_SYSTEM
    from world import train_tokenizer

    draw = random.Random(0)
    words = [a + b + c for a in "bdfgklmnprstv" for b in "aeiou" for c in "lmnrst"]

    def text(mean: float) -> str:
        size = min(600, max(1, round(draw.lognormvariate(0, 0.8) * mean / 1.38)))
        return " ".join(draw.choices(words, k=size))

    prompts = [f"\n\nHuman: {text(75)}\n\nAssistant: " for _ in range(400)]
    rows = [{key: prompt + text(44) for key in ("chosen", "rejected")} for prompt in prompts]
    (folder / "hh.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [row["chosen"].replace("\n", " ") for row in rows]
    train_tokenizer(str(folder), texts + [f"{VICUNA_SYSTEM} USER: ASSISTANT:"] * 50)
    return ["--dataset", str(folder / "hh.jsonl"), "--tokenizer", str(folder / "tokenizer.model")]


# ---- running ------------------------------------------------------------------------------------

def without_paths(text: str, folder: Path) -> str:
    """Text without the folders of this machine."""
    for path, name in ((folder, "TMP"), (ROOT, "."), (sys.prefix, "PYTHON"),
                       (sys.base_prefix, "PYTHON"), (Path.home(), "HOME")):
        if len(str(path)) > 1:
            text = text.replace(str(path), name)
    return re.sub(r"/tmp/\S+", "TMP", text)


def run(stage: Stage, limit: float, folder: Path, dry: bool) -> dict:
    """A stage's command, seconds, exit code (None: it was ended at its limit), output, numbers."""
    start, log = time.monotonic(), folder / "output"
    settings = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} if dry else (
        {"OMP_NUM_THREADS": "2"} if "pytest" in stage.words else {})
    command = "python " + " ".join(os.path.basename(word) if os.path.isabs(word) else word
                                   for word in stage.words)
    row = {"stage": stage.name, "command": command, "limit_s": round(limit), "rc": None}
    with open(log, "wb") as output:
        process = subprocess.Popen([sys.executable, *stage.words], cwd=ROOT, stdout=output,
                                   stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                                   start_new_session=True, env=os.environ | settings)
        try:
            row["rc"] = process.wait(limit)
        except subprocess.TimeoutExpired:
            row["ended"] = "at its limit"
        finally:                                      # with what it has started
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
    row["seconds"] = round(time.monotonic() - start, 1)
    row["output"] = without_paths(log.read_text(errors="replace"), folder)[-TAIL:]
    if stage.out and os.path.exists(stage.out):
        row["result"] = json.loads(Path(stage.out).read_text())
    return row


def versions() -> dict:
    """The card and what runs on it; what differs from requirements.txt is named."""
    found = json.loads(subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True,
                                      check=True).stdout)
    pins = dict(re.findall(r"^(torch|triton)==([\w.]+)", (ROOT / "requirements.txt").read_text(),
                           re.M))
    other = [f"{name} {found[name]}, requirements.txt has {pin}" for name, pin in pins.items()
             if (found[name] or "").partition("+")[0] != pin]
    return found | {"python": sys.version.split()[0], "cores": os.cpu_count(),
                    "not_as_pinned": other}


def line_of(row: dict) -> str:
    """A stage in one line of the screen."""
    outcome = row.get("left_out") or row.get("ended") or f"exit code {row['rc']}"
    return f"{row['stage']:14} {row.get('seconds', 0):6.1f} s   {outcome}"


def run_all(chosen: list[Stage], report: dict, args: argparse.Namespace, folder: Path) -> bool:
    """Run the stages and write the report after each; returns whether all that ran ended well."""
    end = time.monotonic() + args.seconds
    for stage in chosen:
        left = end - time.monotonic()
        absent = [name for name in stage.needs if not util.find_spec(name)]
        if absent:
            row = {"stage": stage.name, "rc": 0, "left_out": f"needs {', '.join(absent)}"}
        elif left < 5:
            row = {"stage": stage.name, "rc": None, "left_out": f"no time left of {args.seconds} s"}
        else:
            row = run(stage, min(stage.limit, left), folder, args.dry_run)
        report["stages"].append(row)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        unfinished = args.out.with_suffix(".tmp")
        unfinished.write_text(json.dumps(report, indent=1) + "\n")
        os.replace(unfinished, args.out)
        print(line_of(row), flush=True)
        if row["rc"]:
            print("\n".join(row["output"].splitlines()[-15:]), flush=True)
    return all(row["rc"] == 0 for row in report["stages"])


def main() -> int:
    names = [stage.name for stage in stages([], Path(), True)]
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", help="HH file")
    parser.add_argument("--tokenizer", help="Llama's tokenizer.model")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="stages to run")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, at the smallest size")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all stages")
    parser.add_argument("--out", type=Path, help="default: bench/results/gpu.json; of a dry run "
                                                 "none that stays")
    args = parser.parse_args()
    try:
        found = versions()
    except subprocess.CalledProcessError as error:
        reason = error.stderr.strip().splitlines()[-1]
        print(f"error: {sys.executable} cannot import torch ({reason}); name one that can: "
              "make gpu PYTHON=...", file=sys.stderr)
        return 2
    if not args.dry_run and not found["gpu"]:
        print(f"error: there is no GPU that torch {found['torch']} can use; bench/gpu.py --dry-run "
              "runs every stage on the CPU at its smallest size", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        args.out = args.out or (folder if args.dry_run else ROOT / "bench/results") / "gpu.json"
        given = [path for path in (args.dataset, args.tokenizer) if path and os.path.exists(path)]
        if len(given) == 2:
            data = ["--dataset", os.path.abspath(given[0]),
                    "--tokenizer", os.path.abspath(given[1])]
        else:
            data = write_stand_in(folder)
        command = ["python bench/gpu.py", *["--dry-run"] * args.dry_run,
                   *(["--only", *args.only] if args.only != names else []),
                   *(["--seconds", f"{args.seconds:g}"] if args.seconds != SECONDS else [])]
        report = {"command": " ".join(command), **found,
                  "data": os.path.basename(data[1]) if len(given) == 2 else "a stand-in for HH",
                  "started": time.strftime("%Y-%m-%d %H:%M"), "stages": []}
        print(f"{found['gpu'] if not args.dry_run else 'CPU, a dry run'}, torch {found['torch']}, "
              f"triton {found['triton']}", *found["not_as_pinned"], sep="\n")
        chosen = [stage for stage in stages(data, folder, args.dry_run) if stage.name in args.only]
        well = run_all(chosen, report, args, folder)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
