"""The papers' comparison on a real language model with real human labels: `make real`.

    python -m study.real                    every stage, cheapest and most telling first
    python -m study.real first more         some of them
    python -m study.real --report           train nothing, write OUT/real.md from OUT/real.jsonl

1. Pairs that fit into --max_length whole are split by prompt: a third to train and tune on, a third
   held out, a third that only the judge, a reward model, is trained on.
2. Every run trains one method on the same --pairs pairs with train.py, is measured
   (real_scores.py), and adds one line to OUT/real.jsonl; then the page is written anew.
3. Stages: `first`, seven methods at one rate, one seed; `more`, ULMA from an SFT adapter and D2O;
   `rates`, every rate of RATES (real_plan.py) with seed 0, measured on the tuning pairs alone;
   `seeds`, seeds 1 to 3 at the rate with the best accuracy there; `qa`, the first methods on
   QA-feedback.

A finished run is not trained again: stop this and start it as often as you like. With --workers N
so many runs go side by side, each as soon as what it reads is there.
"""
if __name__ == "__main__":
    from files.interrupt import catch_interrupts
    catch_interrupts()

import argparse

from files.cli import Help, Parser, check_ranges, parse_first, run_cli, time_left


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m study.real", description=__doc__, formatter_class=Help)
    flag = parser.add_argument
    flag("stages", nargs="*", metavar="STAGE", help="first, more, rates, seeds, qa; default: all")
    flag("--model", default="models/smollm2", help="Hugging Face folder of a chat model")
    flag("--hh", default="../shared/data/hh_harmless_base_test/test.jsonl.gz",
         help="HH file or folder of pairs")
    flag("--qa", help="QA-feedback file; without one the stage qa is left out")
    flag("--pairs", type=int, default=192, help="pairs that a run trains on")
    flag("--held_out", type=int, default=320, help="at most so many held-out pairs are measured")
    flag("--answers", type=int, default=64, help="held-out prompts that every run answers")
    flag("--new_tokens", type=int, default=48, help="longest answer")
    flag("--max_length", type=int, default=192, help="pairs of more tokens are left out")
    flag("--qa_pairs", type=int, default=96, help="--pairs for QA-feedback")
    flag("--qa_max_length", type=int, default=1024, help="--max_length for QA-feedback")
    flag("--bf16", action="store_true", help="train in bfloat16")
    flag("--workers", type=int, default=1, help="runs side by side, on one GPU or on a CPU's cores")
    flag("--out", default="runs/real", help="folder of real.jsonl, real.md and figures")
    flag("--work", default="runs/real", help="folder of data and runs")
    flag("--report", action="store_true", help="train nothing; write the page from OUT/real.jsonl")
    return parser


if __name__ == "__main__":
    parse_first(build_parser().parse_args)          # before torch, which takes seconds to import

import io
import json
import math
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stdout
from functools import cache, cached_property, partial
from multiprocessing import active_children, get_context

import torch
from torch import Tensor

import train
from files.lock import locked
from files.text import whole_lines, write_text
from model import Llama, load_llama
from step import METHODS, tree_rewards
from study import real_scores as measuring
from study.real_data import BATCH, BETA, Data
from study.real_plan import (INSTRUCTIONS, STAGES, TUNING_SEED, base_run, judge_run, next_run,
                             not_run, sft_of, waiting_runs)
from study.real_report import write_page
from study.runs import Training, end_with_parent
from tokenizer import Tokenizer
from training.checkpoint import load_run
from training.flags import WORLD_FLAGS

# ---- a run --------------------------------------------------------------------------------------

def machine() -> str:
    """The GPU's name, or the CPU's and how many threads are used."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = [line.partition(":")[2].strip() for line in whole_lines("/proc/cpuinfo")
             if line.startswith("model name")]
    threads = torch.get_num_threads()
    return f"{(names or [platform.machine()])[0]}, {threads} thread{'s' * (threads > 1)}"


def rows_file(out: str) -> str:
    return os.path.join(out, "real.jsonl")


def read_rows(out: str) -> list[dict]:
    return [json.loads(line) for line in whole_lines(rows_file(out))]


class Study:
    """Executes runs of one command line."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.tokenizer = args, Tokenizer(args.model)
        self.data = {}

    def of(self, name: str) -> Data:
        if name not in self.data:
            self.data[name] = Data(self.args, name, self.tokenizer)
        return self.data[name]

    @cached_property
    def device(self) -> str:
        return "cuda" if torch.cuda.is_available() else "cpu"

    def rows_of(self, stages: Sequence[str]) -> list[dict]:
        """The rows with this command's settings, of the data of these stages."""
        names = {STAGES[stage][0].data for stage in stages}
        return [row for row in read_rows(self.args.out) if row["data"] in names
                and row["settings"] == self.of(row["data"]).settings]

    # training

    def folder(self, run: Training) -> str:
        name = run.cell.name.replace(" ", ",")
        return os.path.join(self.of(run.cell.data).folder,
                            f"{name}-lr{run.learning_rate:g}-seed{run.seed}")

    def arguments(self, run: Training) -> list[str]:
        """The command line of train.py."""
        method, data = METHODS[run.cell.method], self.of(run.cell.data)
        flags = {"method": run.cell.method, "model_name_or_path": self.args.model,
                 "dataset": data.file("judge" if method.reward_model else "train"),
                 "output_dir": self.folder(run), "learning_rate": run.learning_rate, "beta": BETA,
                 "seed": run.seed, "batch_size": BATCH * (2 if method.trains_on == "all" else 1),
                 "max_length": data.max_length, "max_prompt_length": data.max_length - 1,
                 "lora_target_modules": " ".join(WORLD_FLAGS["lora_target_modules"]),
                 "logging_steps": 8, "save_steps": 8} | dict(run.cell.flags)
        if method.trains_on == "anchors":
            flags |= {"anchor_tokens": self.args.new_tokens,
                      "max_length": data.max_length + self.args.new_tokens}
        if "anchor_instructions" in flags:
            flags["anchor_instructions"] = INSTRUCTIONS
        if "sft_adapter" in flags:
            flags["sft_adapter"] = os.path.join(self.folder(sft_of(run)), "final")
        argv = [part for name, value in flags.items()
                for part in (f"--{name}", *str(value).split(" "))]
        return argv + ["--bf16"] * self.args.bf16

    def train(self, run: Training) -> None:
        if "sft_adapter" in dict(run.cell.flags):
            self.train(sft_of(run))
        if run.learning_rate and not os.path.isdir(os.path.join(self.folder(run), "final")):
            train.main(self.arguments(run))

    def model_of(self, run: Training, part: str = "held-out") -> tuple[Llama, Tensor | None]:
        """(the run's model, in float32; log-probs of a part of the pairs under its own reference,
        where that is not the base)."""
        if not run.learning_rate:
            dtype = torch.bfloat16 if self.args.bf16 else torch.float32
            return load_llama(self.args.model, dtype, self.device).float().eval(), None
        model, reference, _ = load_run(self.folder(run))
        model.float()
        if "sft_adapter" not in dict(run.cell.flags):
            return model, None
        with reference() as before:
            pairs = self.of(run.cell.data).pairs[part]
            return model, measuring.all_logps(before, pairs.trees)

    # measuring

    def base_logps(self, name: str, part: str) -> Tensor:
        data = self.of(name)
        return data.cached(f"base-{part}", lambda: measuring.all_logps(
            self.model_of(base_run(name))[0], data.pairs[part].trees))

    def chosen_rewards(self, name: str, judge: Llama) -> Tensor:
        """The judge's r of the chosen and rejected answer of every held-out pair: [P, 2]."""
        pairs = self.of(name).pairs["held-out"]
        return self.of(name).cached("judged-pairs", lambda: pairs.of(
            tree_rewards(judge, pairs.trees)))

    def measure(self, run: Training) -> dict:
        """All scores of a run; of a tuning run those of the tuning pairs alone."""
        name, data = run.cell.data, self.of(run.cell.data)
        if METHODS.get(run.cell.method, METHODS["sft"]).reward_model:
            rewards = self.chosen_rewards(name, self.model_of(run)[0])
            right = (rewards[:, 0] > rewards[:, 1]).double()
            return {"pairs": len(right), "accuracy": float(right.mean()),
                    "accuracy se": measuring.standard_error(right)}
        part = "tune" if run.seed == TUNING_SEED else "held-out"
        pairs, reference = data.pairs[part], self.base_logps(name, part)
        model, own = self.model_of(run, part)
        reference = reference if own is None else own
        policy = measuring.all_logps(model, pairs.trees) if run.learning_rate else reference
        scores = measuring.pair_scores(pairs, policy, reference, BETA)
        if part == "tune":
            return scores
        if not run.learning_rate:
            scores["longer"] = measuring.longer_digits(pairs.of(pairs.lengths))
        return scores | self.measure_answers(run, model) | {
            "perplexity/neutral": measuring.neutral_perplexity(model, self.tokenizer)}

    def measure_answers(self, run: Training, model: Llama) -> dict:
        """Scores of the run's own answers to held-out prompts, and its answers to mild ones."""
        name, data = run.cell.data, self.of(run.cell.data)
        answers = measuring.own_answers(model, self.tokenizer, data.prompts, self.args.new_tokens)
        logps = measuring.all_logps(model, answers.trees)
        base = model if not run.learning_rate else self.model_of(base_run(name))[0]
        scores = measuring.answer_scores(answers, logps, measuring.all_logps(base, answers.trees))
        judge = self.model_of(judge_run(name))[0]
        chosen = self.chosen_rewards(name, judge)[data.pairs["held-out"].first_of_trees, 0]
        rewards = measuring.judged(judge, answers)
        base_rewards = data.cached("judged-base", lambda: rewards if not run.learning_rate else
                                   self.judged_base(name, judge))
        others = {"chosen": chosen[:len(rewards)], "base": base_rewards}
        return scores | measuring.against(rewards, others) | {
            "reward": float(rewards.mean()), "mild": measuring.mild_answers(
                model, self.tokenizer, self.args.new_tokens)}

    def judged_base(self, name: str, judge: Llama) -> Tensor:
        """The judge's r of the base's own answers: [X]; where its row is there and its file is not."""
        answers = measuring.own_answers(self.model_of(base_run(name))[0], self.tokenizer,
                                        self.of(name).prompts, self.args.new_tokens)
        return measuring.judged(judge, answers)

    def execute(self, run: Training) -> dict:
        """Train and measure a run; returns its row."""
        start = time.perf_counter()
        data = self.of(run.cell.data)
        row = run.key | {"settings": data.settings, "sizes": data.sizes}
        try:
            self.train(run)
            row["train s"] = round(time.perf_counter() - start, 1)
            row |= self.measure(run)
        except FloatingPointError as error:              # this rate is too large for the method
            row["failed"] = str(error)
        side_by_side = f", {self.args.workers} runs side by side" * (self.args.workers > 1)
        return row | {"measure s": round(time.perf_counter() - start - row.get("train s", 0), 1),
                      "torch": torch.__version__, "device": machine() + side_by_side}


# ---- the schedule -------------------------------------------------------------------------------

@cache
def study_of(argv: tuple[str, ...]) -> Study:
    """The study of a command line, whose data a worker process reads once."""
    return Study(build_parser().parse_args(argv))


def execute(argv: tuple[str, ...], run: Training) -> dict:
    """A run's row, in a worker process: what it prints goes to a file beside its folder.

    raises  ValueError where the runs side by side need more memory than the GPU has
    """
    with redirect_stdout(io.StringIO()):                 # the process that started it has said it
        study, file = study_of(argv), study_of(argv).folder(run) + ".log"
    with open(file, "a", encoding="utf-8") as log, redirect_stdout(log):
        try:
            return study.execute(run)
        except torch.OutOfMemoryError as error:
            raise ValueError(f"{study.args.workers} runs side by side need more memory than the GPU "
                             "has; go on with fewer --workers: what is finished stays") from error


def start_worker() -> None:
    """A worker process ends with the one that started it, which alone Ctrl-C is meant for."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


def done(row: dict) -> Future:
    """A future with its result."""
    future = Future()
    future.set_result(row)
    return future


def add_row(out: str, row: dict) -> None:
    """Add a row to OUT/real.jsonl and write the page."""
    rows = [*read_rows(out), row]
    write_text(rows_file(out), "".join(json.dumps(one) + "\n" for one in rows))
    write_page(out, rows, not_run(rows))
    print(f"{row['data']} {row['method']}, {row['learning_rate']:g}, seed {row['seed']}: accuracy "
          f"{row.get('accuracy', math.nan):.3f} on {row.get('pairs', 0)} pairs", flush=True)


def schedule(stages: Sequence[str], study: Study, submit: Callable[[Training], Future]) -> None:
    """Execute all runs of the stages that have no row; after each, add its row, write the page.

    raises  what a run raises, once those beside it have their rows
    """
    start, executed, running, error = time.perf_counter(), 0, {}, None
    while True:
        waiting = waiting_runs(stages, study.rows_of(stages), running.values())
        run = next_run(waiting, running.values())
        if run and not error and len(running) < study.args.workers:
            left = len(waiting) + len(running)
            estimate = time_left(time.perf_counter() - start, executed, executed + left)
            print(f"\n==== {run.cell.data} {run.cell.name}, learning rate {run.learning_rate:g}, seed "
                  f"{run.seed}; {left} runs to go" + f", {estimate}" * bool(executed), flush=True)
            running[submit(run)] = run
            continue
        if not running:
            break
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            run, executed = running.pop(future), executed + 1
            if future.exception():
                error = error or future.exception()
                print(f"failed, see {study.folder(run)}.log", flush=True)
            else:
                add_row(study.args.out, future.result())
    if error:
        raise error


def execute_stages(stages: Sequence[str], study: Study, argv: tuple[str, ...]) -> None:
    """`schedule` in this process, or on --workers of them, which Ctrl-C ends."""
    for name in dict.fromkeys(STAGES[stage][0].data for stage in stages):
        study.of(name)                                   # what is wrong with it is said at once
        waiting = [run for run in waiting_runs(stages, study.rows_of(stages), [])
                   if run.cell.data == name and run.seed != TUNING_SEED]
        if waiting and judge_run(name) not in waiting:
            study.train(judge_run(name))                 # its row is there, its folder may not be
    if not waiting_runs(stages, study.rows_of(stages), []):
        print(f"all runs of {', '.join(stages)} are in {rows_file(study.args.out)} already")
    if study.args.workers == 1:
        return schedule(stages, study, lambda run: done(study.execute(run)))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // study.args.workers)))
    with ProcessPoolExecutor(study.args.workers, get_context("spawn"), start_worker) as pool:
        try:
            schedule(stages, study, partial(pool.submit, execute, argv))
        except KeyboardInterrupt:
            for child in active_children():              # their folders survive it
                child.kill()
            raise
        except BrokenProcessPool as error:
            raise ValueError("a worker process was killed, perhaps because memory ran out; go on with "
                             "fewer --workers: what is finished stays") from error


def main(argv: Sequence[str] | None = None) -> None:
    argv = tuple(sys.argv[1:] if argv is None else argv)
    args = build_parser().parse_args(argv)
    check_ranges(args, ("pairs", "held_out", "answers", "new_tokens", "max_length", "qa_pairs",
                        "qa_max_length", "workers"), {})
    if unknown := sorted(set(args.stages) - set(STAGES)):
        raise ValueError(f"no stage is called {', '.join(unknown)}; there are {', '.join(STAGES)}")
    stages = [stage for stage in STAGES if stage in (args.stages or STAGES)]
    if args.qa is None:
        if "qa" in args.stages:
            raise ValueError("the stage qa needs --qa FILE")
        stages = [stage for stage in stages if stage != "qa"]
    if not args.report:
        file = rows_file(args.out)
        with locked(file + ".lock", file):
            execute_stages(stages, Study(args), argv)
    rows = read_rows(args.out)
    if not rows:
        raise FileNotFoundError(f"{rows_file(args.out)}: no run is finished yet")
    write_page(args.out, rows, not_run(rows))


if __name__ == "__main__":
    run_cli(main)
