"""results/: tables, figures and verdicts made of the rows of reproduce.py.

    runs.jsonl     one row per run: data, method, seed, learning rate, every score
    bounds.json    scores of the base model and of the optimum pi*, and the machine
    TABLE.md       mean ± half-width of a 95 % interval over seeds
    *.png          figures (need matplotlib)
    README.md      every claim with its difference, interval and verdict

A claim compares two cells seed by seed: same seed, same data, so the difference of the two is a
paired sample. Its interval is mean ± t s / sqrt(n) over the seeds (intervals.seed_interval); the
claim holds if all of it has the claimed sign, fails if all of it has the other, else is undecided.
"""
import json
import math
import os
import platform
from dataclasses import dataclass

import torch

from checkpoint import write_text
from figures import draw, stat
from intervals import seed_interval
from weights import read_json

Cell = tuple[str, str]              # (data, method) as in runs.jsonl


# ---- claims -------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Claim:
    """`better` has a larger score than `worse`; a smaller one for SMALLER_IS_BETTER."""
    source: str
    words: str
    better: Cell
    worse: Cell
    score: str = "E[r]"


SMALLER_IS_BETTER = ("harmful", "off-world", "KL(pi||pi*)", "KL(ref||pi)", "perplexity",
                     "calibration error", "lose/chosen")
LABEL = {"sft": "SFT", "unlearning": "Unlearning", "unlikelihood": "Unlikelihood", "dpo": "DPO",
         "pointwise_dpo": "pointwise DPO", "ulma": "ULMA", "rlhf": "RLHF",
         "pointwise_rlhf": "point-wise RLHF", "positive_dpo": "positive DPO",
         "negative_dpo": "negative DPO", "pointwise_mse": "pointwise DPO, squared error",
         "ulma_mse": "ULMA, squared error", "d2o": "D2O"}
DATA_LABEL = {"hh": "HH-like pairs", "golden": "golden pairs", "qa": "QA-like points",
              "qa-pairs": "QA-like points as pairs", "red-team": "red-team-like ratings",
              "negatives": "608 bad answers", "golden-10": "golden, 10 % dirty",
              "golden-30": "golden, 30 % dirty", "qa-10": "points, 10 % good",
              "qa-90": "points, 90 % good"}


def d2o(k: int, refresh: int = 0) -> Cell:
    flags = f" refresh_anchors={refresh}" if refresh else ""
    return "negatives", f"d2o num_anchors={k} anchor_tokens=48{flags}"


def mean_logps(method: str, beta: float) -> Cell:
    return "hh", f"{method} logp_reduction=mean beta={float(beta)}"


def claims() -> list[Claim]:
    listed = []
    for data in ("hh", "golden", "qa"):
        others = ["sft", "unlearning", "unlikelihood", "dpo", "pointwise_dpo"]
        for other in others + ["rlhf", "pointwise_rlhf"] * (data != "qa"):
            listed.append(Claim("ULMA 5.2", f"ULMA beats {LABEL[other]}", (data, "ulma"),
                                ("qa-pairs" if (data, other) == ("qa", "dpo") else data, other)))
    ulma = "ULMA 5.2"
    listed += [
        Claim(ulma, "DPO beats pointwise DPO", ("hh", "dpo"), ("hh", "pointwise_dpo")),
        Claim(ulma, "DPO beats pointwise DPO", ("golden", "dpo"), ("golden", "pointwise_dpo")),
        Claim(ulma, "pointwise DPO beats DPO on points", ("qa", "pointwise_dpo"),
              ("qa-pairs", "dpo")),
        Claim(ulma, "pointwise DPO beats SFT on ratings", ("red-team", "pointwise_mse"),
              ("red-team", "sft")),
        Claim(ulma, "ULMA beats SFT on ratings", ("red-team", "ulma_mse"), ("red-team", "sft")),
        Claim(ulma, "ULMA beats pointwise DPO on ratings", ("red-team", "ulma_mse"),
              ("red-team", "pointwise_mse"))]
    for data in ("hh", "qa"):
        listed += [
            Claim("ULMA Table 3", "SFT beats positive DPO", (data, "sft"), (data, "positive_dpo")),
            Claim("ULMA Table 3", "negative DPO beats unlearning", (data, "negative_dpo"),
                  (data, "unlearning"))]
    source = "D2O"
    listed += [
        Claim(source, "D2O (K = 4) beats unlearning", d2o(4), ("negatives", "unlearning")),
        Claim(source, "D2O (K = 4) beats negative DPO", d2o(4), ("negatives", "negative_dpo")),
        Claim(source, "11 anchors beat 1", d2o(11), d2o(1)),
        Claim(source, "anchors of a lagged policy beat the base's (K = 11)", d2o(11, 10), d2o(11)),
        Claim(source, "anchors of the current policy are worse than the base's (K = 11)", d2o(11),
              d2o(11, 1)),
        Claim(source, "D2O keeps more good answers than negative DPO", d2o(11),
              ("negatives", "negative_dpo"), "good")]
    listed += [Claim(source, f"with {dirt[7:]} % dirty positives D2O does less harm than {name}",
                     ("golden", "d2o num_anchors=4 anchor_tokens=48"), (dirt, method), "harmful")
               for dirt in ("golden-10", "golden-30")
               for method, name in (("dpo", "DPO"), ("ulma", "ULMA"), ("sft", "SFT"))]
    z = lambda name: ("qa", f"pointwise_dpo_{name}_z")                           # noqa: E731
    plain = ("qa", "pointwise_dpo")
    listed += [
        Claim("open: Z", f"{words} comes closer to pi* than Z = 1", z(name), plain, "KL(pi||pi*)")
        for name, words in (("exact", "the exact Z(x)"), ("constant", "a constant Z"),
                            ("batch", "a batch's estimate"))]
    listed += [Claim("open: sums", f"{LABEL[method]}: sums beat length averages, beta {beta:g}",
                     ("hh", method), mean_logps(method, beta))
               for method in ("ulma", "pointwise_dpo") for beta in (0.5, 12)]
    listed += [Claim("open: balance", f"{LABEL[method]}, {share} % good: one mean beats a mean per "
                     "class", (f"qa-{share}", f"{method} reduction=mean"),
                     (f"qa-{share}", f"{method} reduction=class"))
               for share in (10, 90) for method in ("pointwise_dpo", "ulma")]
    return listed


# ---- rows ---------------------------------------------------------------------------------------

def save_rows(out: str, rows: list[dict], bounds: dict) -> None:
    """Put rows in OUT/runs.jsonl, in place of those of the same cells and of other settings.

    A cell's tuning runs (seed 0) come alone where only its learning rate was asked for: its test
    runs then stay.
    """
    def group(row):
        return row["data"], row["method"], row["seed"] > 0

    new, settings = set(map(group, rows)), {row["runs"] for row in rows}
    kept = [row for row in read_rows(out) if group(row) not in new and row["runs"] in settings]
    lines = sorted(json.dumps(row) + "\n" for row in rows + kept)
    os.makedirs(out, exist_ok=True)
    write_text(os.path.join(out, "runs.jsonl"), "".join(lines))
    machine = {"machine": platform.machine(), "torch": torch.__version__,
               "python": platform.python_version()}
    write_text(os.path.join(out, "bounds.json"), json.dumps(machine | bounds, indent=1))


def read_rows(out: str) -> list[dict]:
    path = os.path.join(out, "runs.jsonl")
    if not os.path.isfile(path):
        return []
    with open(path, encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def by_cell(rows: list[dict]) -> dict[Cell, dict[int, dict]]:
    """{(data, method): {seed: row}} of the test runs (seed 0 is tuning's)."""
    cells = {}
    for row in rows:
        if row["seed"]:
            cells.setdefault((row["data"], row["method"]), {})[row["seed"]] = row
    return cells


def judged(cells: dict, claim: Claim) -> tuple[float, float, str]:
    """(mean difference, half-width, verdict), the difference better - worse, seed by seed."""
    better, worse = cells[claim.better], cells[claim.worse]
    mean, half = seed_interval([better[seed][claim.score] - worse[seed][claim.score]
                                for seed in sorted(set(better) & set(worse))])
    sign = -1 if claim.score in SMALLER_IS_BETTER else 1
    verdict = "holds" if sign * mean > half else "fails" if -sign * mean > half else "undecided"
    return mean, half, verdict


# ---- tables -------------------------------------------------------------------------------------

SHOWN_FLAGS = {"num_anchors": "K {}", "refresh_anchors": "new anchors every {} steps",
               "logp_reduction": "{} log-probs", "reduction": "--reduction {}",
               "num_train_epochs": "{} epochs", "Z": "{} Z"}


def label(cell: Cell) -> str:
    method, *flags = cell[1].split(" ")
    if method.endswith("_z"):
        flags, method = [f"Z={method.split('_')[2]}"], "pointwise_dpo"
    given = [flag.split("=") for flag in flags if not flag.startswith("anchor_tokens")]
    return ", ".join([LABEL.get(method, method), *(
        SHOWN_FLAGS.get(name, name + " {}").format(value) for name, value in given)])


SCORES = {"main": ("E[r]", "harmful", "off-world", "KL(pi||ref)", "perplexity"),
          "wins": ("win/chosen", "tie/chosen", "lose/chosen", "win/base", "tie/base", "lose/base"),
          "d2o": ("E[r]", "harmful", "good", "off-world", "KL(ref||pi)"),
          "wins of base": ("win/base", "tie/base", "lose/base"),
          "z": ("E[r]", "KL(pi||pi*)", "objective", "calibration error", "reward slope",
                "reward accuracy")}
TABLE_SCORES = {"hh": ("main", "wins"), "golden": ("main", "wins"), "qa": ("main", "wins of base"),
                "red-team": ("main", "wins of base"), "ablation": ("main",), "d2o": ("d2o",),
                "dirty": ("main",), "z": ("z",), "mean": ("main", "wins"),
                "balance": ("main", "z"), "frontier": ("main",)}
TITLE = {
    "hh": "Every method on HH-like pairs (ULMA, Table 1)",
    "golden": "Every method on golden pairs: the chosen answer is the best (ULMA, Table 1)",
    "qa": "QA-feedback-like points: z ~ Bernoulli(sigma(r*)) (ULMA, Table 2)",
    "red-team": "Red-team-like ratings 0 to 4, each on its own (ULMA, Table 1)",
    "ablation": "Ablations: positive and negative DPO (ULMA, Table 3)",
    "d2o": "D2O: how many anchors, and whose",
    "dirty": "Dirty positives: harmful answers among the chosen ones (D2O's motivation)",
    "z": "Z(x) = 1, and what could stand there",
    "mean": "Sums of log-probs, and the length averages of the authors' code",
    "balance": "Few good answers, few bad ones",
    "frontier": "Reward and KL: beta and the number of steps swept"}
CAVEAT = {
    "hh": "Prompts of one form, 288 answers to each: this tells objectives apart under a true "
          "reward and its own label noise, not how large a gain on a real model is.",
    "golden": "Golden answers are exact optima here; GPT-4's are not.",
    "qa": "Labels are drawn from the paper's own model (Eq. 6); real annotators are not. DPO has "
          "only the some 530 pairs that differing labels make, so it takes half as many steps.",
    "red-team": "The squared error asks for beta log(pi/pi_ref) = z with z in [0, 1]: small "
                "log-ratios by design. Ratings have no noise here, so that the best ones mark the "
                "best answers: that favours SFT. Compare the order of methods only.",
    "ablation": "The same runs as above, and two more methods.",
    "d2o": "Negatives only: 608 bad answers, four to a prompt. One tuned learning rate for all "
           "D2O rows. The paper's moral instructions, which diversify anchors, are left out.",
    "dirty": "A dirty positive is a harmful answer of the base's; D2O reads no positives and has "
             "one row.",
    "z": "Only here is Z(x) known; for a real model a constant or a batch has to do.",
    "mean": "Answers of the world have 15 to 33 tokens; lengths of real answers vary more.",
    "balance": "Learning rates are those tuned on the QA-like points, so that balance alone "
               "differs.",
    "frontier": "Rows of one method differ in beta or in the number of steps, as named; rates are "
                "those tuned at beta 0.5 and one epoch; 3 seeds where swept."}


def shown(score: str) -> str:
    """A score's name where | would end a table's cell."""
    return score.replace("||", "‖")


def number(mean: float, half: float) -> str:
    """mean ± half with two significant digits of half, 1 to 3 decimals."""
    decimals = min(3, max(1, 1 - math.floor(math.log10(half)))) if half else 3
    return f"{mean:.{decimals}f} ± {half:.{decimals}f}"


def table(name: str, group: list[Cell], cells: dict, bounds: dict, rates: list[float]) -> str:
    """One table as Markdown; rates, sorted: the learning rates that tuning tried."""
    lines = [f"# {TITLE[name]}\n", CAVEAT[name] + "\n"]
    for kind in TABLE_SCORES[name]:
        scores = SCORES[kind]
        lines += ["| data | method | " + " | ".join(map(shown, scores)) + " | learning rate |",
                  "|---" * (len(scores) + 3) + "|"]
        for cell in dict.fromkeys(group):
            if cell not in cells:
                lines.append(f"| {DATA_LABEL[cell[0]]} | {label(cell)} | not run"
                             + " |" * (len(scores) + 1))
                continue
            row = next(iter(cells[cell].values()))
            values = [number(*stat(cells, cell, score)) for score in scores]
            lines.append(f"| {DATA_LABEL[cell[0]]} | {label(cell)} | " + " | ".join(values)
                         + f" | {row['learning_rate']:g}"
                         + "*" * (row["learning_rate"] in (rates[0], rates[-1])) + " |")
        golden = "golden " if name == "golden" else ""
        for who in ("base", "pi* beta=0.5"):
            values = [f"{bounds[golden + who][score]:.3g}" for score in scores]
            lines.append(f"| | {who} | " + " | ".join(values) + " | |")
        lines.append("")
    seeds = sorted({len(cells[cell]) for cell in group if cell in cells})
    lines.append(f"Mean ± half-width of the 95 % t interval over {' or '.join(map(str, seeds))} "
                 "seeds (data, order and initialisation drawn anew; it says nothing of other "
                 "prompts); 40 prompts that no objective trained on, exact over 288 answers each."
                 + MEANING)
    return "\n".join(lines) + "\n"


MEANING = """
E[r]: true reward in nats, off-world mass counting as the worst answer. harmful, good: mass on
harmful answers and on those with positive reward. off-world: mass on no valid answer. KL: nats; pi*
is the optimum at beta 0.5. perplexity: per token, of the best answer. win/tie/lose: against the
data's chosen answer, and the base's. objective: E[r] - 0.5 KL(pi‖ref). With h = beta
log(pi/pi_ref): reward slope: of h on r*, 1 is ideal; reward accuracy: share of pairs of answers
that h orders as r* does; calibration error: mean of |sigma(h) - sigma(r*)| under the base, which
takes Z(x) = 1 at its word (pi* itself is not at 0). *: the smallest or the largest rate tried."""


def claims_table(cells: dict) -> tuple[list[str], dict[str, int]]:
    lines = ["| source | claim | data | score | difference | verdict |", "|---" * 6 + "|"]
    counts = {"holds": 0, "fails": 0, "undecided": 0}
    for claim in claims():
        if claim.better not in cells or claim.worse not in cells:
            continue
        mean, half, verdict = judged(cells, claim)
        counts[verdict] += 1
        data = " against ".join(dict.fromkeys(DATA_LABEL[cell[0]] for cell in
                                              (claim.better, claim.worse)))
        lines.append(f"| {claim.source} | {claim.words} | {data} | {shown(claim.score)} | "
                     f"{number(mean, half)} | **{verdict}** |")
    return lines, counts


def write(out: str, tables: dict[str, list[Cell]]) -> None:
    """Write every table and figure that has runs, and README.md."""
    rows, bounds = read_rows(out), read_json(os.path.join(out, "bounds.json"))
    cells, rates = by_cell(rows), sorted({row["learning_rate"] for row in rows})
    done = [name for name, group in tables.items() if any(cell in cells for cell in group)]
    for name in done:
        text = table(name, tables[name], cells, bounds, rates)
        write_text(os.path.join(out, f"{name}.md"), text)
    complete = [name for name in done if all(cell in cells for cell in tables[name])]
    drawn = draw(out, complete, cells, bounds, label)
    lines, counts = claims_table(cells)
    text = [HEAD.format(runs=len(rows), torch=bounds["torch"], python=bounds["python"],
                        total=sum(counts.values()), **counts), *lines, "", "## Tables\n",
            *(f"- [{TITLE[name]}]({name}.md)" + ("" if name in complete else " (not complete)")
              for name in done), "", "## Figures\n",
            *(f"![{caption}]({file})\n\n{caption}\n" for file, caption in drawn)]
    write_text(os.path.join(out, "README.md"), "\n".join(text))
    print(f"{out}/README.md: {len(complete)} of {len(tables)} tables complete, {len(drawn)} "
          f"figures, {counts['holds']} claims hold, {counts['fails']} fail, {counts['undecided']} "
          "undecided")


HEAD = """# What holds on a world whose true reward is known

Written by `make reproduce`; do not edit. {runs} runs in `runs.jsonl` (torch {torch}, Python
{python}, one thread a run), tuning runs (seed 0) among them.

The papers' claims about methods are taken as hypotheses about objectives, and tried on the embedded
world (`world.py`), where the reward of every possible answer is known and every score is computed,
not judged. Each method's learning rate was tuned with the same budget: one run for each of 1e-4,
3e-4, 1e-3, 3e-3, 1e-2, the best E[r] on 12 training prompts wins. Then five seeds, each with data
of its own: 2,432 labelled answers (fewer where a table says so), one epoch, 32 answers (16 pairs) a
step, beta 0.5, LoRA r 8 on every layer. RLHF: a reward model of 2 epochs at 3e-3, then 40 steps of
PPO with 76 answers each; only PPO's learning rate was tuned. The 40 test prompts are known to the
base model, to no objective.

Of {total} claims {holds} hold, {fails} fail and {undecided} are undecided. A difference is that of
the two cells seed by seed, mean ± 95 % t interval over 5 seeds; at 95 %, one verdict in twenty may
be chance, and the claims are not independent. E[r]: true reward, nats.

What this cannot say: how large a gain is on a real language model, whether real labels follow
Eq. 6, and what happens where answers cannot be listed. What it can: which objective turns the same
labels into more reward, and where the rest of its probability goes.
"""
