"""Every method of both papers on the embedded world: the papers' claims as hypotheses.

    python reproduce.py                  all tables (make reproduce); about three hours on two cores
    python reproduce.py ablation d2o     some of them, each under half an hour
    python reproduce.py --report         only write results/ anew from results/runs.jsonl

1. Data of every shape are drawn from the world, anew for every seed (shapes.py).
2. A *cell* is a method on data. Its learning rate is tuned: one run of seed 0 for each of
   LEARNING_RATES, the best E[r] on 12 training prompts wins. No test prompt is asked.
3. The winner runs with seeds 1 to 5, and is measured on 40 prompts that no objective has trained on
   (the base has seen them): exactly, over all valid answers (eval.py); nothing is sampled, no judge
   is asked.
4. report.py compares cells seed by seed, and writes tables, figures and verdicts.

A run that is done is not done again: kill this and start it as often as you like. Every run is one
call of train.py or ppo.py on one thread, so its numbers do not depend on --workers.
"""
import argparse
import contextlib
import hashlib
import json
import math
import os
import shutil
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait as wait_for

import torch
from torch import Tensor

import ppo
import report
import train
from checkpoint import load_run, write_text
from data import run_cli
from eval import agreement, kl, mean_scores, optimum, with_rest, world_logps, world_scores
from model import load_llama
from offsets import EXTRA_METHODS, outcome_rewards
from shapes import DATA, RESPONSES
from step import METHODS
from tokenizer import Tokenizer
from weights import read_json
from world import (WORLD_FLAGS, answers, base_model, ensure_world, held_out_prompts,
                   training_prompts, world_folder, write_jsonl)

BETA, BATCH = WORLD_FLAGS["beta"], 32
LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
REWARD_MODEL_EPOCHS, PPO_STEPS = 2, 40
TUNING_SEED, TUNING_PROMPTS = 0, 12


# ---- data ------------------------------------------------------------------------------------

def work_folder() -> str:
    """Where the runs are: elsewhere with other settings, so that old ones are not taken for new."""
    settings = repr((BETA, BATCH, RESPONSES, REWARD_MODEL_EPOCHS, PPO_STEPS)).encode()
    return os.path.join(world_folder(), "reproduce-" + hashlib.sha256(settings).hexdigest()[:8])


def data_path(name: str, seed: int) -> str:
    """The file of DATA[name](seed), written if it is not there."""
    path = os.path.join(work_folder(), "data", f"{name}-{seed}.jsonl")
    if not os.path.isfile(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        write_jsonl(path, DATA[name](seed))
    return path


# ---- one run ------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Cell:
    """A row of a table: a method on data."""
    data: str
    method: str
    flags: tuple = ()                    # ((flag, value), …) beside the learning rate
    tuned_as: "Cell | None" = None       # take the learning rate of this cell
    seeds: int = 5

    @property
    def name(self) -> str:
        return " ".join([self.method, *(f"{flag}={value}" for flag, value in self.flags)])


@dataclass(frozen=True)
class Run:
    cell: Cell
    learning_rate: float
    seed: int

    @property
    def folder(self) -> str:
        return os.path.join(work_folder(), self.cell.data, self.cell.name.replace(" ", ","),
                            f"lr{self.learning_rate:g}-seed{self.seed}")

    def row(self) -> dict:
        return {"data": self.cell.data, "method": self.cell.name, "seed": self.seed,
                "learning_rate": self.learning_rate, "runs": work_folder()}


def reward_model_of(run: Run) -> Run:
    return Run(Cell(run.cell.data, run.cell.method.replace("rlhf", "reward_model")), 3e-3, run.seed)


def command(run: Run) -> tuple:
    """(main, arguments) of train.py or ppo.py."""
    flags = {"learning_rate": run.learning_rate, "seed": run.seed, "output_dir": run.folder,
             "save_steps": 100000, "beta": BETA} | dict(run.cell.flags)
    if run.cell.method.endswith("rlhf"):
        flags |= {"reward_model": reward_model_of(run).folder, "max_steps": PPO_STEPS}
        main = ppo.main
    else:
        pairs = (METHODS | EXTRA_METHODS)[run.cell.method].uses == "pairs"
        flags = {"method": run.cell.method, "model_name_or_path": base_model(),
                 "dataset": data_path(run.cell.data, run.seed), "logging_steps": 100000,
                 "num_train_epochs": REWARD_MODEL_EPOCHS if "reward" in run.cell.method else 1,
                 "batch_size": BATCH // 2 if pairs else BATCH,
                 "lora_target_modules": " ".join(WORLD_FLAGS["lora_target_modules"])} | flags
        main = train.main
    return main, [part for name, value in flags.items()
                  for part in (f"--{name}", *str(value).split(" "))]


def execute(run: Run) -> dict:
    """Train and measure one run, unless that was done; returns its scores.

    A rate too large to train at (a loss that is not finite) is the worst of its cell.
    """
    torch.set_num_threads(1)
    METHODS.update(EXTRA_METHODS)
    path = os.path.join(run.folder, "scores.json")
    if os.path.isfile(path):
        return read_json(path)
    shutil.rmtree(run.folder, ignore_errors=True)            # what a kill left of it
    os.makedirs(os.path.dirname(run.folder), exist_ok=True)
    with open(run.folder + ".log", "w", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        main, argv = command(run)
        try:
            main(argv)
        except FloatingPointError:
            if run.seed != TUNING_SEED:
                raise
            return {"E[r]": -math.inf}
    scores = {} if run.cell.method.endswith("reward_model") else measure(run)
    write_text(path, json.dumps(scores, indent=2))
    return scores


# ---- its scores ---------------------------------------------------------------------------------

@cache
def base_logps(tuning: bool):
    """(prompts, log π_ref [X, Y], lengths [X, Y]) of the prompts that tuning, or a test, asks."""
    asked = training_prompts()[:TUNING_PROMPTS] if tuning else held_out_prompts()
    return asked, *world_logps(load_llama(base_model()), Tokenizer(base_model()), asked)


def win_tie_lose(policy: Tensor, other: Tensor, rewards: Tensor, name: str) -> dict[str, float]:
    """How often a draw of one distribution has a larger true reward than a draw of another.

    policy, other  [O] log-probs of outcomes; rewards [O]
    """
    joint = policy.exp()[:, None] * other.exp()                                  # [O, O]
    gap = rewards[:, None] - rewards
    return {f"win/{name}": float(joint[gap > 1e-9].sum()),
            f"tie/{name}": float(joint[gap.abs() <= 1e-9].sum()),
            f"lose/{name}": float(joint[gap < -1e-9].sum())}


def chosen_distribution(prompt, golden: bool) -> Tensor:
    """log-probs of the data's chosen answer: of two draws (here they may be equal) the preferred
    one, or the best: [Y + 1]"""
    rewards = outcome_rewards(prompt)[:-1]
    if golden:
        probs = torch.zeros_like(rewards)
        probs[rewards.argmax()] = 1
    else:
        habits = torch.tensor([weight for *_, weight in answers(*prompt)]).double()
        probs = 2 * habits * (torch.sigmoid(rewards[:, None] - rewards) @ habits)
    return torch.cat([probs, probs.new_zeros(1)]).log()


def prompt_scores(prompt, policy: Tensor, reference: Tensor, lengths: Tensor,
                  golden: bool) -> dict[str, float]:
    """eval.py's scores of one prompt, and what only these tables need. Log-probs [Y]."""
    scores = world_scores(policy, reference, lengths, answers(*prompt), BETA)
    rewards, implicit = outcome_rewards(prompt), BETA * (policy - reference)     # [Y + 1], [Y]
    with_policy, with_reference = with_rest(policy), with_rest(reference)
    scores |= win_tie_lose(with_policy, chosen_distribution(prompt, golden), rewards, "chosen")
    scores |= win_tie_lose(with_policy, with_reference, rewards, "base")
    weights, r = reference.exp() / reference.exp().sum(), rewards[:-1]           # [Y]
    centred = r - (weights * r).sum()
    return scores | {
        "good": float(policy.exp()[r > 0].sum()),
        "KL(ref||pi)": kl(with_reference, with_policy),
        "reward accuracy": agreement(implicit, r)[0],
        "reward slope": float((weights * centred * implicit).sum()
                              / (weights * centred.square()).sum()),
        "calibration error": float((weights * (implicit.sigmoid() - r.sigmoid()).abs()).sum()),
        "length": float((policy.exp() * lengths).sum() / policy.exp().sum())}


def measure(run: Run) -> dict[str, float]:
    """Means over prompts: of training prompts for a tuning run, else of the test prompts."""
    asked, reference, lengths = base_logps(run.seed == TUNING_SEED)
    policy, _ = world_logps(load_run(run.folder)[0], Tokenizer(base_model()), asked)
    golden = run.cell.data.startswith("golden")
    return mean_scores([prompt_scores(*row, golden) for row in
                        zip(asked, policy, reference, lengths)])


def bounds() -> dict[str, dict]:
    """Scores of the base and of the optimum pi* for several beta, on the test prompts; those called
    "golden …" meet golden chosen answers."""
    asked, reference, lengths = base_logps(False)
    rows = {"base": reference}
    for beta in (0.1, 0.15, 0.25, 0.35, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10):
        rows[f"pi* beta={beta:g}"] = [optimum(with_rest(ref), outcome_rewards(prompt), beta)[0][:-1]
                                      for prompt, ref in zip(asked, reference)]
    return {prefix + name: mean_scores([prompt_scores(*row, prefix == "golden ") for row in
                                        zip(asked, policy, reference, lengths)])
            for name, policy in rows.items() for prefix in ("", "golden ")}


# ---- tables -------------------------------------------------------------------------------------

def cells(data: str, *methods: str) -> list[Cell]:
    return [Cell("qa-pairs" if (data, method) == ("qa", "dpo") else data, method)
            for method in methods]


def variants(cell: Cell, *flags: dict, seeds: int = 5) -> list[Cell]:
    """The same method with other flags, at the learning rate tuned for `cell`."""
    return [Cell(cell.data, cell.method, tuple(given.items()), cell, seeds) for given in flags]


ALL = ("sft", "unlearning", "unlikelihood", "dpo", "pointwise_dpo", "ulma", "rlhf",
       "pointwise_rlhf")
[ULMA, POINTWISE, DPO, SFT] = cells("hh", "ulma", "pointwise_dpo", "dpo", "sft")
D2O = Cell("negatives", "d2o", (("num_anchors", 4), ("anchor_tokens", 48)))

TABLES = {
    "hh": cells("hh", *ALL),
    "golden": cells("golden", *ALL),
    "qa": cells("qa", *ALL[:6]),
    "red-team": cells("red-team", "sft", "pointwise_dpo", "ulma", "pointwise_mse", "ulma_mse"),
    "ablation": [cell for data in ("hh", "qa") for cell in
                 cells(data, "sft", "positive_dpo", "unlearning", "negative_dpo")],
    "d2o": cells("negatives", "unlearning", "negative_dpo") + [D2O] + [
        Cell("negatives", "d2o", (("num_anchors", k), ("anchor_tokens", 48), *refresh), D2O)
        for refresh in ((), (("refresh_anchors", 10),), (("refresh_anchors", 1),))
        for k in (1, 2, 4, 11) if (k, refresh) != (4, ())],
    "dirty": [Cell("golden", "d2o", D2O.flags)] + [
        cell for data in ("golden", "golden-10", "golden-30")
        for cell in cells(data, "sft", "dpo", "ulma")],
    "z": cells("qa", "pointwise_dpo", "pointwise_dpo_constant_z", "pointwise_dpo_batch_z",
               "pointwise_dpo_exact_z"),
    "mean": [ULMA, POINTWISE] + [
        Cell("hh", method, (("logp_reduction", "mean"), ("beta", beta)))
        for method in ("ulma", "pointwise_dpo") for beta in (BETA, 24 * BETA)],
    "balance": [
        Cell(data, method, (("reduction", reduction),), Cell("qa", method))
        for data in ("qa-10", "qa-90") for method in ("pointwise_dpo", "ulma")
        for reduction in ("mean", "class")],
    "frontier": [ULMA, POINTWISE, DPO, SFT] + [
        variant for cell in (ULMA, POINTWISE, DPO, SFT) for variant in variants(
            cell, *([{"beta": beta} for beta in (0.1, 0.25, 1, 2)] if cell is not SFT else []),
            *({"num_train_epochs": epochs} for epochs in (0.25, 0.5, 2)), seeds=3)],
}


# ---- the schedule -------------------------------------------------------------------------------

def die_with_parent() -> None:
    """In a worker: end when the process that started it has ended, however it did."""
    def wait():
        wait_for([parent_process().sentinel])
        os._exit(1)
    threading.Thread(target=wait, daemon=True).start()


class Progress:
    """Runs batches of runs on worker processes, and says how far it is."""

    def __init__(self, workers: int):
        os.environ["OMP_NUM_THREADS"] = "1"             # read by torch in the children
        self.pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"),
                                        initializer=die_with_parent)
        self.total = self.done = self.fresh = 0
        self.start = time.perf_counter()

    def scores(self, runs: list[Run]) -> dict[Run, dict]:
        """The scores of these runs; those that are on disk already cost nothing."""
        todo = [run for run in runs if not os.path.isfile(os.path.join(run.folder, "scores.json"))]
        self.done += len(runs) - len(todo)
        futures = {self.pool.submit(execute, run): run for run in todo}
        found = {}
        for future in as_completed(futures):
            try:
                run, scores = futures[future], future.result()
            except BaseException:                       # also Ctrl-C: start nothing more
                self.pool.shutdown(cancel_futures=True)
                raise
            found[run] = scores
            self.done, self.fresh = self.done + 1, self.fresh + 1
            seconds = time.perf_counter() - self.start
            left = int(seconds / self.fresh * max(0, self.total - self.done))
            print(f"{self.done}/{self.total}  {run.cell.data:10} {run.cell.name:44} "
                  f"lr {run.learning_rate:<6g} seed {run.seed}  "
                  + (f"E[r] {scores['E[r]']:+.2f}" if scores else "").ljust(12)
                  + f"  {left // 60}:{left % 60:02} left", flush=True)
        return {run: found[run] if run in found else execute(run) for run in runs}


def all_runs(wanted: list[Cell], progress: Progress) -> list[dict]:
    """Tune every cell, run its seeds; returns one row per run."""
    tuned = list(dict.fromkeys(cell.tuned_as or cell for cell in wanted))
    trials = [Run(cell, rate, TUNING_SEED) for cell in tuned for rate in LEARNING_RATES]
    seeds = [Run(cell, 0, seed) for cell in wanted for seed in range(1, cell.seeds + 1)]
    reward_models = list(dict.fromkeys(reward_model_of(run) for run in trials + seeds
                                       if run.cell.method.endswith("rlhf")))
    progress.total = len(reward_models) + len(trials) + len(seeds)
    progress.scores(reward_models)
    tried = progress.scores(trials)

    def tuning_score(cell, rate):
        reward = tried[Run(cell, rate, TUNING_SEED)]["E[r]"]
        return -math.inf if math.isnan(reward) else reward

    best = {cell: max(LEARNING_RATES, key=partial(tuning_score, cell)) for cell in tuned}
    finished = progress.scores([Run(run.cell, best[run.cell.tuned_as or run.cell], run.seed)
                                for run in seeds])
    return [run.row() | scores for run, scores in (tried | finished).items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", metavar="TABLE", default=[],
                        help="; ".join(TABLES) + " (default: all)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(),
                        help="runs at a time, one thread each (default: the cores)")
    parser.add_argument("--out", default="results", help="folder of tables and figures")
    parser.add_argument("--report", action="store_true", help="train nothing; write OUT anew")
    args = parser.parse_args()
    if unknown := sorted(set(args.tables) - set(TABLES)):
        raise ValueError(f"no table is called {', '.join(unknown)}; there are {', '.join(TABLES)}")
    if args.workers < 1:
        raise ValueError(f"--workers {args.workers} must be at least 1")
    if not args.report:
        ensure_world()
        names = args.tables or list(TABLES)
        rows = all_runs(list(dict.fromkeys(cell for name in names for cell in TABLES[name])),
                        Progress(args.workers))
        report.save_rows(args.out, rows, bounds())
    report.write(args.out, {name: [(cell.data, cell.name) for cell in group]
                            for name, group in TABLES.items()})


if __name__ == "__main__":
    run_cli(main)
