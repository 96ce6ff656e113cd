"""The page and the figure of the exact optima: what each objective wants, without training.

    python -m study.exact [--out results]      writes OUT/exact.md, exact.png and exact.svg

optima.py derives and solves them. All prompts of a kind (harmful or harmless) are alike but for two
words, so one of each is solved, and counts as often as the 40 test prompts have it. Points where
training ended are read from OUT/runs.jsonl.
"""
if __name__ == "__main__":
    from files.interrupt import catch_interrupts
    catch_interrupts()

import argparse

from files.cli import Parser, parse_first, run_cli


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m study.exact", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="results", help="folder of the page (results)")
    return parser


if __name__ == "__main__":
    parse_first(build_parser().parse_args)          # before torch, which takes seconds to import

import os
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from files.text import write_text
from study.claims import PAPER_CLAIMS
from study.figures import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    STYLE,
    VERMILION,
    pyplot,
    save,
    square_root_scale,
)
from study.optima import OPTIMA, ceiling, mean_optimum
from study.report import effect_shown, exploratory, markdown, plain
from study.rows import Key, Study, read_rows, sort_rows
from study.runs import BETA
from study.tables import SAME_LIMIT, method_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BETAS, SCALES = (0.1, 0.25, 0.5, 1, 2), (0.5, 1, 2, 4, 8)
TIE = 0.005                                      # nats of E[r]; smaller differences are ties
HEADS = {"hh": "HH-like", "golden": "golden", "golden-10": "10 % dirty", "golden-30": "30 % dirty",
         "qa": "QA-like", "qa-10": "10 % good", "qa-90": "90 % good", "red-team": "ratings z",
         "centred": "ratings z - 1/2", "negatives": "bad only"}
DIAL_HEADS = {"hh": "HH-like", "shown-4": "best of 4", "shown-16": "best of 16",
              "shown-near-best": "one of the 16 best", "mixture": "mixture",
              "noise-10": "10 % flipped", "noise-20": "20 % flipped", "noise-30": "30 % flipped"}
NAMES = {"reference": "reference (the habits)", "dpo": "DPO, RLHF",
         "pi*": "pi*, the optimum of Eq. 3", "d2o K=1": "D2O, 1 anchor",
         "d2o K=inf": "D2O, infinitely many anchors"}
ROWS = [method for method in OPTIMA if method != "rlhf"]     # DPO's row is RLHF's


def name_of(method: str) -> str:
    return NAMES.get(method) or method_label(method)


# ---- tables -------------------------------------------------------------------------------------

def why_none(method: str) -> str:
    return "none: unbounded" if OPTIMA[method][1] is None else "none: many"


def cell_of(data: str, method: str, beta: float, show: Callable[[dict], str],
            scale: float = 1) -> str:
    """A table's cell: what `show` makes of the scores, or why there are none."""
    if data not in OPTIMA[method][0]:
        return "–"
    row = mean_optimum(data, method, beta, scale)
    return why_none(method) if row is None else show(row)


def reward_shown(row: dict) -> str:
    leaves = f" (off-world {plain(row['off-world'])})" if row["off-world"] > TIE else ""
    return plain(row["E[r]"]) + leaves


def triple_shown(row: dict) -> str:
    """E[r], KL(pi||ref), harmful mass; of a policy that leaves the world the share that leaves."""
    third = f"off-world {plain(row['off-world'])}" if row["off-world"] > TIE else plain(
        row["harmful"])
    return f"{plain(row['E[r]'])}; {plain(row['KL(pi||ref)'])}; {third}"


def details(data: str) -> list[str]:
    """All scores at BETA, and what pi* earns at the same KL."""
    rows = []
    for method in ROWS:
        row = data in OPTIMA[method][0] and mean_optimum(data, method)
        if row:
            divergence = row["KL(pi||ref)"]
            rows.append([name_of(method), *(plain(row[key]) for key in (
                "E[r]", "harmful", "off-world", "KL(pi||ref)")),
                "–" if divergence > 5 else plain(ceiling(divergence))])
    return markdown(("objective", "E[r]", "harmful", "off-world", "KL(pi‖ref)", "pi* at this KL"),
                 rows)


def sweep(data: str) -> list[str]:
    """Every method that depends on beta, over beta."""
    rows = [[name_of(method), *(cell_of(data, method, beta, triple_shown) for beta in BETAS)]
            for method in ROWS if method not in ("reference", "sft", "unlearning", "unlikelihood",
                                                 "negative_dpo") and data in OPTIMA[method][0]]
    return markdown(("objective", *(f"beta {beta:g}" for beta in BETAS)), rows)


def scales() -> list[str]:
    """The squared errors over the scale of centred labels."""
    heads = ("objective", "z", *(f"{scale:g} (z - 1/2)" for scale in SCALES))
    return markdown(heads, [[name_of(method), cell_of("red-team", method, BETA, triple_shown),
                          *(cell_of("centred", method, BETA, triple_shown, scale)
                            for scale in SCALES)] for method in ("pointwise_mse", "ulma_mse")])


# ---- claims -------------------------------------------------------------------------------------

def wanted(key: Key) -> float | None:
    """E[r] of the optimum of a cell of the study; None where there is none."""
    data, method = SAME_LIMIT.get(key[0], key[0]), key[1]
    if data not in OPTIMA.get(method, ((), None))[0]:
        return None
    row = mean_optimum(data, method)
    return row and row["E[r]"]


def claims(study: Study) -> tuple[list[str], dict[str, int]]:
    """(table of the papers' claims about E[r] whose methods all have an optimum, counts)."""
    rows = []
    counts = dict.fromkeys(("decided", "as measured", "against", "undecided", "ties"), 0)
    for claim, comparison, _, word in exploratory(study):
        ends = [wanted(key) for key in claim.keys]
        if (claim not in PAPER_CLAIMS or claim.score != "E[r]" or claim.how != "more"
                or None in ends or not claim.worse):
            continue
        gap = sum(sign * end for sign, end in zip((1, -1, -1, 1), ends, strict=False))
        says = "tie" if abs(gap) < TIE else "holds" if gap > 0 else "fails"
        counts["ties" if says == "tie" else "decided"] += 1
        if says != "tie":
            counts["as measured" if word == says else
                   "undecided" if word == "undecided" else "against"] += 1
        rows.append([claim.source, claim.words, plain(gap), f"**{says}**",
                     effect_shown(claim, comparison), word])
    return markdown(("source", "claim", "difference of the optima", "so it", "measured", "verdict"),
                    rows), counts


# ---- the page -----------------------------------------------------------------------------------

PAGE_START = """# What each objective wants: its optimum with infinite data

Written by `python -m study.exact`; do not edit. No training: every loss of `ulma.py`, its
expectation taken over all data, is minimised over the probabilities of 288 answers and of
off-world. The derivations are at the top of `study/optima.py`.

**What is decided before training.** Of the {compared} claims of the papers about E[r] in
[README.md](README.md) whose methods all have an optimum, the optima decide {decided}. The runs
found the same for {as_measured} of these, the opposite for {against}, and left {undecided}
undecided. The other {ties} are ties: on golden pairs every objective that has an
optimum ends at the best answer, so what is measured there is how fast and how safely a method gets
near it. On noisy pairs ULMA beats SFT, and with enough data and steps cannot beat DPO, pointwise
DPO or RLHF: a positive is often a bad answer there, and imitating it costs reward (SFT {sft:.2f},
ULMA {ulma:.2f}, pointwise DPO {pointwise:.2f}, DPO {dpo:.2f}). That SFT beats positive DPO is as
fixed. Verdicts on ratings with the squared error follow from the labels' scale: z in [0, 1] at beta
0.5 asks for {raw:.2f}, z - 1/2 at beta 0.1 for {centred:.2f}. Unlearning and unlikelihood have no
optimum and negative DPO's is to leave the world, so claims about them are claims about early
stopping. Not decided here: what a run of 76 steps reaches (DPO's end well below its optimum), and
who leaves the world on the way. D2O's optimum, with many anchors, puts all mass on the answer that
is least often bad. The trained base, unlike the reference here, also gives off-world text some
mass; nobody labels that as bad, so with the base's own samples as anchors it takes the mass, alone
or beside answers that are never bad.
"""

PAGE_NOTES = """Mean over 40 test prompts (22 harmless, 18 harmful; all of a kind are alike). The
reference is the habits that the data are drawn from; the base model was trained to have them.
E[r]: nats, off-world mass counting as the worst answer. dirty: harmful answers among the chosen.
–: the method cannot be trained on the data (KTO is left out: its reference point moves with the
policy, so that it minimises no fixed loss). none: unbounded: the loss falls without end. none:
many: several answers are never negative, and how they share the mass is open. Pair-wise losses
leave off-world mass open: the reference's, none, is taken. On golden data they only approach their
infimum; the limit is given. flipped: HH-like pairs with chosen and rejected exchanged; mixture:
half demonstrations (one of the 16 best), half QA-like points. Pairs are of two draws that differ; with
independent draws the HH-like column would be SFT {sft:.2f}, positive DPO {positive_dpo:.2f}, ULMA
{ulma:.2f}, pointwise DPO {pointwise_dpo:.2f}.
"""


def page(study: Study) -> str:
    """The text of exact.md."""
    claim_lines, counts = claims(study)
    independent = {method: mean_optimum("hh", method, independent=True)["E[r]"]
                   for method in ("sft", "positive_dpo", "ulma", "pointwise_dpo")}
    start = PAGE_START.format(
        compared=counts["decided"] + counts["ties"], decided=counts["decided"],
        as_measured=counts["as measured"], against=counts["against"],
        undecided=counts["undecided"], ties=counts["ties"],
        **{name: mean_optimum("hh", method)["E[r]"] for name, method in (
            ("ulma", "ulma"), ("pointwise", "pointwise_dpo"), ("dpo", "dpo"), ("sft", "sft"))},
        raw=mean_optimum("red-team", "pointwise_mse")["E[r]"],
        centred=mean_optimum("centred", "pointwise_mse", 0.1)["E[r]"])
    mains = [markdown(("E[r] of the optimum", *heads.values()), [
        [name_of(method), *(cell_of(data, method, BETA, reward_shown) for data in heads)]
        for method in ROWS]) for heads in (HEADS, DIAL_HEADS)]
    lines = [start, f"## E[r], beta {BETA:g}\n", *mains[0], *mains[1],
             PAGE_NOTES.format(**independent),
             "![Reward against KL of every optimum, beta swept.](exact.png)\n",
             "Dashed: optima, beta from 0.1 to 2 (large: 0.5). Filled: mean of the runs at beta 0.5 "
             "(for DPO, RLHF: DPO's), which start from the trained base, not from the habits. "
             "Policies that leave the world have an infinite KL and are not drawn.\n"]
    for data in ("hh", "golden-30", "qa", "red-team", "centred"):
        lines += [f"## {HEADS[data]}, beta {BETA:g}\n", *details(data)]
    lines.append("## Beta swept: E[r]; KL(pi‖ref); harmful mass\n")
    for data in ("hh", "golden-30", "qa", "red-team", "centred"):
        lines += [f"{HEADS[data]}\n", *sweep(data)]
    lines += [f"## The scale of the labels, beta {BETA:g}: E[r]; KL(pi‖ref); harmful mass\n",
              *scales(), "The squared error depends on beta / scale alone: labels 2 (z - 1/2) at "
              "beta 0.5 are z - 1/2 at beta 0.25.\n",
              "## Claims about E[r], and what the optima say\n", *claim_lines]
    return "\n".join(lines).rstrip() + "\n"


# ---- the figure ---------------------------------------------------------------------------------

PANELS = (     # title, (data, method, colour, marker, label)
    ("HH-like pairs", [("hh", method, *STYLE[method], name_of(method)) for method in (
        "dpo", "pointwise_rlhf", "pointwise_dpo", "ulma", "sft", "positive_dpo")]),
    ("QA-like points", [("qa", method, *STYLE[method], name_of(method)) for method in (
        "dpo", "pointwise_dpo", "ulma", "sft", "positive_dpo")]),
    ("red-team-like ratings", [
        ("red-team", "sft", ORANGE, "D", "SFT"),
        ("red-team", "pointwise_dpo", BLUE, "s", "pointwise DPO"),
        ("red-team", "ulma", VERMILION, "o", "ULMA"),
        ("red-team", "pointwise_mse", PURPLE, "v", "squared error, z"),
        ("centred", "pointwise_mse", SKY, "P", "squared error, z - 1/2"),
        ("red-team", "ulma_mse", GREEN, "X", "ULMA, squared error, z"),
        ("centred", "ulma_mse", GREY, "<", "ULMA, squared error, z - 1/2")]))


def draw_line(axis: "Axes", study: Study, line: tuple[str, str, str, str, str]) -> None:
    """One method's optima over beta, and the way from the one at BETA to where its runs ended."""
    data, method, colour, marker, label = line
    swept = {beta: mean_optimum(data, method, beta) for beta in BETAS}
    inside = {beta: (row["KL(pi||ref)"], row["E[r]"]) for beta, row in swept.items()
              if row["off-world"] < TIE}
    axis.plot(*zip(*inside.values(), strict=True), color=colour, marker=marker, markersize=4,
              linestyle="--", linewidth=1.2, label=label)
    if BETA not in inside:
        return
    axis.plot(*inside[BETA], color=colour, marker=marker, markersize=9, markerfacecolor="white",
              markeredgewidth=1.8, zorder=3)
    key = ("qa-pairs" if (data, method) == ("qa", "dpo") else data, method)
    if study.has(key):
        ended = [study.middle(key, name) for name in ("KL(pi||ref)", "E[r]")]
        axis.plot(*zip(inside[BETA], ended, strict=True), color=colour, linestyle=":", linewidth=1)
        axis.plot(*ended, color=colour, marker=marker, markersize=8, markeredgecolor="black",
                  zorder=4)


def draw_exact(plt: ModuleType, study: Study) -> "Figure":
    """E[r] against KL: optima over beta, pi* as the ceiling, and where runs ended."""
    figure, axes = plt.subplots(1, 3, figsize=(13.5, 5.8), sharey=True)
    best = [mean_optimum("hh", "pi*", 10 ** (x / 10)) for x in range(-14, 41)]
    for axis, (title, lines) in zip(axes, PANELS, strict=True):
        axis.plot([row["KL(pi||ref)"] for row in best], [row["E[r]"] for row in best],
                  color=BLACK, linewidth=1.5, label="pi*, the ceiling")
        for line in lines:
            draw_line(axis, study, line)
        square_root_scale(axis, 4.2)
        axis.set_title(title)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, fontsize=8.5)
    for look, label in (({"markerfacecolor": "white"}, "optimum at beta 0.5"),
                        ({"markeredgecolor": "black"}, "where its training ended")):
        axes[0].plot([], [], color=GREY, marker="o", markersize=8, linestyle="", label=label,
                     **look)
    axes[0].legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, fontsize=8.5)
    axes[0].set_ylabel("true reward E[r], nats")
    return figure


def write(out: str) -> None:
    """Write exact.md, and exact.png and exact.svg where matplotlib is installed."""
    study = sort_rows(read_rows(out))
    write_text(os.path.join(out, "exact.md"), page(study))
    if plt := pyplot():
        save(plt, draw_exact(plt, study), out, "exact")


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    torch.set_num_threads(1)
    os.makedirs(args.out, exist_ok=True)
    write(args.out)
    print(f"{args.out}/exact.md")


if __name__ == "__main__":
    run_cli(main)
