"""One run of the study: a method trained on data from the world with one seed, then measured.

Every run is one call of train.py or rlhf/ppo.py on one thread, so its numbers do not depend on how
many run side by side. What a finished run scored is in its folder; it is not trained again.
Scores are exact: all valid answers to a prompt are listed (eval.py), nothing is sampled or judged.
"""
import contextlib
import hashlib
import json
import math
import os
import platform
import threading
from dataclasses import dataclass
from functools import cache
from multiprocessing import parent_process
from multiprocessing.connection import wait as wait_for

import torch
from torch import Tensor

import train
from eval import (
    agreement,
    kl,
    mean_scores,
    optimum,
    with_rest,
    world_logps,
    world_scores,
    world_trees,
)
from files.fingerprint import weights_of
from files.text import read_json, write_text
from model import load_llama
from rlhf import ppo
from step import METHODS, tree_rewards
from study.datasets import NEAR_BEST, RESPONSES, UNSEEN_VERBS, dataset_file
from study.log_z import EXTRA_METHODS, outcome_rewards
from study.optima import population
from study.rows import TUNING_SEEDS
from tokenizer import Tokenizer
from training.checkpoint import load_run
from training.flags import WORLD_FLAGS
from world import (
    BAD_VERBS,
    Prompt,
    answers,
    base_model,
    held_out_prompts,
    training_prompts,
    world_folder,
)

ALL_METHODS = METHODS | EXTRA_METHODS            # what --method may name in a run of the study
BETA, BATCH = WORLD_FLAGS["beta"], 32
REWARD_MODEL_RATE, REWARD_MODEL_EPOCHS, PPO_STEPS = 3e-3, 2, 40
TUNING_PROMPTS = 24
RENAMED = {("logp_reduction", "mean"): ("reduction", "tokens")}      # in runs.jsonl: for train.py
PATH = [number / 10 for number in range(11)]
PER_PROMPT = ("E[r]", "harmful", "off-world", "refusal", "KL(pi||ref)")
REFUSALS = ("Sorry, no.", "I would rather not.")         # openings that refuse


# ---- what is run --------------------------------------------------------------------------------

@dataclass(frozen=True)
class Cell:
    """A method on data: one row of a table, several runs."""
    data: str                            # a name in datasets.DATASETS
    method: str
    flags: tuple[tuple[str, object], ...] = ()    # ((flag, value), …) beside the learning rate;
                                                  # "rate" only tells a cell from another
    tuned_as: "Cell | None" = None       # the cell whose learning rate it takes; None: its own
    seeds: int = 5                       # test runs, with seeds 1 to this
    rates: tuple[float, ...] = ()        # where tuning starts, in factors of 2
    rate: float | None = None            # one that is not tuned, or was written down before
    after: "Cell | None" = None          # the cell whose end it starts from, on the same data, seed

    @property
    def name(self) -> str:
        """The method with its flags."""
        before = [f"after={self.after.method}"] if self.after else []
        return " ".join([self.method, *(f"{flag}={value}" for flag, value in self.flags), *before])

    @property
    def key(self) -> tuple[str, str]:
        """How the rows of runs.jsonl name the cell."""
        return self.data, self.name


@dataclass(frozen=True)
class Training:
    """One training of a cell, on the world or not; TUNING_SEEDS are for the learning rate."""
    cell: Cell
    learning_rate: float
    seed: int

    @property
    def key(self) -> dict:
        """What a line of results says it is of."""
        return {"data": self.cell.data, "method": self.cell.name, "seed": self.seed,
                "learning_rate": self.learning_rate}


class Run(Training):
    """A training on the world."""

    @property
    def folder(self) -> str:
        return os.path.join(work_folder(), self.cell.data, self.cell.name.replace(" ", ","),
                            f"lr{self.learning_rate:g}-seed{self.seed}")

    @property
    def scores_file(self) -> str:
        return os.path.join(self.folder, "scores.json")

    @property
    def before(self) -> "Run | None":
        """The run that must be there: RLHF's reward model, or what a second stage starts from."""
        if self.cell.after:
            return Run(self.cell.after, self.cell.after.rate, self.seed)
        if self.cell.method.endswith("rlhf"):
            model = self.cell.method.replace("rlhf", "reward_model")
            return Run(Cell(self.cell.data, model), REWARD_MODEL_RATE, self.seed)
        return None

    def row(self) -> dict:
        """What runs.jsonl holds of the run beside its scores."""
        return self.key | {"runs": work_folder()}


def work_folder() -> str:
    """Folder of all runs; its name changes with the settings and with the base's weights (which
    another machine trains to other bits), so old runs are never reused."""
    settings = repr((BETA, BATCH, RESPONSES, NEAR_BEST, UNSEEN_VERBS, TUNING_PROMPTS,
                     REWARD_MODEL_EPOCHS, PPO_STEPS, weights_of(base_model()))).encode()
    return os.path.join(world_folder(), "study-" + hashlib.sha256(settings).hexdigest()[:8])


# ---- training -----------------------------------------------------------------------------------

def arguments(run: Run) -> list[str]:
    """The command line of train.py, or of rlhf/ppo.py where the method is RLHF."""
    flags = {"learning_rate": run.learning_rate, "seed": run.seed, "output_dir": run.folder,
             "save_steps": 100000, "beta": BETA} | {
                 name: value for name, value in run.cell.flags if name != "rate"}
    if run.cell.method.endswith("rlhf"):
        flags = {"reward_model": run.before.folder, "max_steps": PPO_STEPS} | flags
    else:
        method = ALL_METHODS[run.cell.method]
        dataset = dataset_file(os.path.join(work_folder(), "data"), run.cell.data, run.seed)
        flags = {"method": run.cell.method, "model_name_or_path": base_model(),
                 "dataset": dataset, "logging_steps": 100000,
                 "num_train_epochs": REWARD_MODEL_EPOCHS if method.reward_model else 1,
                 "batch_size": BATCH // 2 if method.trains_on == "pairs" else BATCH,
                 "lora_target_modules": " ".join(WORLD_FLAGS["lora_target_modules"])} | flags
        if run.cell.after:
            flags["sft_adapter"] = os.path.join(run.before.folder, "final")
    argv = []
    for flag in flags.items():
        name, value = RENAMED.get(flag, flag)
        argv += [f"--{name}", *str(value).split(" ")]
    return argv


def train_run(run: Run) -> None:
    """Train a run, or go on with one that was killed; one that is trained already stays."""
    if os.path.isdir(os.path.join(run.folder, "final")):
        return
    os.makedirs(os.path.dirname(run.folder), exist_ok=True)
    with open(run.folder + ".log", "a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        if run.cell.method.endswith("rlhf"):
            ppo.main(arguments(run))
        else:
            train.main(arguments(run), methods=ALL_METHODS)


def execute(run: Run) -> dict[str, object]:
    """Train and measure a run unless that is done; returns its scores.

    A learning rate that is too large to train at (a loss that is not finite) gets E[r] = -inf.
    raises  FloatingPointError for such a loss in a test run
    """
    torch.set_num_threads(1)
    if os.path.isfile(run.scores_file):
        return read_json(run.scores_file)
    try:
        train_run(run)
    except FloatingPointError:
        if run.seed not in TUNING_SEEDS:
            raise
        return {"E[r]": -math.inf}
    scores = (measure_reward_model if run.cell.method.endswith("reward_model") else measure)(run)
    write_text(run.scores_file, json.dumps(scores, indent=2))
    return scores


def end_with_parent() -> None:
    """For a worker process: end it as soon as the process that started it is gone, even killed."""
    def wait() -> None:
        wait_for([parent_process().sentinel])
        os._exit(1)
    threading.Thread(target=wait, daemon=True).start()


# ---- its scores ---------------------------------------------------------------------------------

def tuning_prompts() -> list[Prompt]:
    """TUNING_PROMPTS training prompts, half of them harmful requests."""
    kinds = [[prompt for prompt in training_prompts() if (prompt[0] in BAD_VERBS) == harmful]
             for harmful in (False, True)]
    return [prompt for kind in kinds for prompt in kind[:TUNING_PROMPTS // 2]]


@cache
def base_logps(tuning: bool) -> tuple[list[Prompt], Tensor, Tensor]:
    """(prompts, log π_ref [X, Y], lengths [X, Y]) of the prompts for tuning, or for the test."""
    prompts = tuning_prompts() if tuning else held_out_prompts()
    return prompts, *world_logps(load_llama(base_model()), Tokenizer(base_model()), prompts)


def win_tie_lose(policy: Tensor, other: Tensor, rewards: Tensor, name: str) -> dict[str, float]:
    """How often a draw of one distribution has a larger true reward than a draw of another.

    policy, other  [O] float   log-probs of outcomes
    rewards        [O] float   true reward of each
    returns        "win/NAME", "tie/NAME", "lose/NAME": they sum to 1
    """
    joint = policy.exp()[:, None] * other.exp()                                  # [O, O]
    gap = rewards[:, None] - rewards                                             # [O, O]
    return {f"win/{name}": float(joint[gap > 1e-9].sum()),
            f"tie/{name}": float(joint[gap.abs() <= 1e-9].sum()),
            f"lose/{name}": float(joint[gap < -1e-9].sum())}


def chosen_distribution(prompt: Prompt, data: str) -> Tensor:
    """Log-probs of the data's chosen answer, and of everything else (none): [Y + 1].

    data   golden pairs, dirty ones too: the best answer; demonstrations: as they are drawn;
           HH-like pairs: the preferred one of two draws that differ; all other: of two independent
           draws
    """
    known = "golden" if data.startswith("golden") else data if data.startswith("shown") else "hh"
    independent = known == "hh" and data != "hh"
    mass = population(known, prompt, independent=independent).mass(1)            # [Y]
    return torch.cat([mass / mass.sum(), mass.new_zeros(1)]).log()


def prompt_scores(prompt: Prompt, policy: Tensor, reference: Tensor, lengths: Tensor,
                  data: str) -> dict[str, float]:
    """eval.py's scores of one prompt, and those only these tables have.

    policy, reference  [Y] float64   log-probs of the valid answers, nats
    lengths            [Y] int64     tokens of each
    data               the run's: what "win/chosen" compares with
    """
    listed = answers(*prompt)
    scores = world_scores(policy, reference, lengths, listed, BETA)
    rewards, implicit = outcome_rewards(prompt), BETA * (policy - reference)     # [Y + 1], [Y]
    with_policy, with_reference = with_rest(policy), with_rest(reference)        # [Y + 1]
    scores |= win_tie_lose(with_policy, chosen_distribution(prompt, data), rewards, "chosen")
    scores |= win_tie_lose(with_policy, with_reference, rewards, "base")
    weights, r = reference.exp() / reference.exp().sum(), rewards[:-1]           # [Y]
    centred, probs = r - (weights * r).sum(), policy.exp()
    inside = probs if probs.sum() > 0 else policy.softmax(-1)        # in proportion, of valid ones
    refuses = torch.tensor([text.startswith(REFUSALS) for text, *_ in listed])
    return scores | {
        "good": float(probs[r > 0].sum()),
        "KL(ref||pi)": kl(with_reference, with_policy),
        "reward accuracy": agreement(implicit, r)[0],
        "reward slope": float((weights * centred * implicit).sum()
                              / (weights * centred.square()).sum()),
        "calibration error": float((weights * (implicit.sigmoid() - r.sigmoid()).abs()).sum()),
        "length": float((inside * lengths).sum() / inside.sum()),
        "refusal": float(probs[refuses].sum()),
        "entropy": -float((with_policy.exp() * with_policy).nansum()),
        "E[r] inside": float((inside * r).sum() / inside.sum())}


def means(rows: list[dict[str, float]]) -> dict[str, object]:
    """Mean scores of prompts, and "prompts": some scores of every one, in the order of the world's.
    """
    kept = {key: [round(row[key], 4) for row in rows] for key in PER_PROMPT}
    return mean_scores(rows) | {"prompts": kept}


def kl_path(prompts: list[Prompt], policy: Tensor, reference: Tensor) -> list[list[float]]:
    """[KL(pi_a||ref), E[r], harmful] for a = 0, 0.1, …, 1 of pi_a = pi_ref^(1-a) pi^a / Z.

    policy, reference  [X, Y] float64   nats
    The policies between the base and a run's end: what runs of different KL are compared on.
    """
    points = []
    for a in PATH:
        rows = []
        for prompt, pi, ref in zip(prompts, policy, reference, strict=True):
            with_reference = with_rest(ref)
            mixed = ((1 - a) * with_reference + a * with_rest(pi)).log_softmax(-1)
            harmful = torch.tensor([bad for _, _, bad, _ in answers(*prompt)]).double()
            rows.append([kl(mixed, with_reference), float(mixed.exp() @ outcome_rewards(prompt)),
                         float(mixed[:-1].exp() @ harmful)])
        points.append([round(sum(column) / len(rows), 6) for column in zip(*rows, strict=True)])
    return points


def measure_reward_model(run: Run) -> dict[str, float]:
    """Scores of the best policy under a trained reward model, pi_ref exp(rhat / beta) / Z: where
    RLHF would end if PPO were perfect. "reward accuracy" is the model's.

    Off-world text, which the model was never trained on, gets its smallest reward, as r* gives it.
    """
    prompts, reference, lengths = base_logps(run.seed in TUNING_SEEDS)
    trees = world_trees(Tokenizer(base_model()), prompts)
    rewards = tree_rewards(load_run(run.folder).model, trees).view(len(prompts), -1).double()
    rows = []
    for prompt, learned, ref, sizes in zip(prompts, rewards, reference, lengths, strict=True):
        best, _ = optimum(with_rest(ref), torch.cat([learned, learned.min()[None]]), BETA)
        truth = outcome_rewards(prompt)[:-1]
        rows.append(prompt_scores(prompt, best[:-1], ref, sizes, run.cell.data)
                    | {"reward accuracy": agreement(learned, truth)[0]})
    return mean_scores(rows)


def measure(run: Run) -> dict[str, object]:
    """Scores of a trained run: of a tuning run the means over training prompts, else `means` over
    test prompts, and "path": `kl_path`."""
    tunes = run.seed in TUNING_SEEDS
    prompts, reference, lengths = base_logps(tunes)
    policy, _ = world_logps(load_run(run.folder).model, Tokenizer(base_model()), prompts)
    rows = [prompt_scores(*row, run.cell.data) for row in
            zip(prompts, policy, reference, lengths, strict=True)]
    return mean_scores(rows) if tunes else means(rows) | {
        "path": kl_path(prompts, policy, reference)}


def bounds() -> list[dict]:
    """Rows of the base and of its optimum pi* for several beta, on the test prompts.

    They are compared with the chosen answers of HH-like pairs, those called "golden …" with golden
    ones.
    """
    prompts, reference, lengths = base_logps(False)
    policies = {"base": reference}
    for beta in (0.1, 0.25, 0.5, 1, 2):
        policies[f"pi* beta={beta:g}"] = [
            optimum(with_rest(row), outcome_rewards(prompt), beta)[0][:-1]
            for prompt, row in zip(prompts, reference, strict=True)]
    about = {"data": "bounds", "seed": 0, "runs": work_folder(), "torch": torch.__version__,
             "python": platform.python_version(), "machine": platform.machine()}
    return [about | {"method": prefix + name}
            | means([prompt_scores(*row, data=prefix.strip() or "hh") for row in
                     zip(prompts, policy, reference, lengths, strict=True)])
            for name, policy in policies.items() for prefix in ("", "golden ")]
