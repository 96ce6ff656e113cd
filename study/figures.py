"""Figures of results/, PNG and SVG: means over seeds with 95 % t intervals.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; markers differ too. Only
this file needs matplotlib: without it there are tables and no figures.
"""
import os
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

from study.optima import OPTIMA, ceiling, mean_optimum
from study.rows import Key, Study, mean_rewards
from study.statistics import MARGIN, clipped
from study.tables import DATA_LABEL, DIAL, FOUR, SAME_LIMIT, SHOWN, dial_rows, method_label, shown
from world import BAD_VERBS, held_out_prompts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from study.report import Found

ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILION, PURPLE, BLACK = (
    "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#000000")
GREY = "#777777"
STYLE = {"ulma": (VERMILION, "o"), "pointwise_dpo": (BLUE, "s"), "dpo": (GREEN, "^"),
         "sft": (ORANGE, "D"), "rlhf": (PURPLE, "v"), "pointwise_rlhf": (SKY, "P"),
         "unlikelihood": (YELLOW, "X"), "unlearning": (BLACK, "*"), "kto": (SKY, "P"),
         "positive_dpo": ("#999999", "<"), "negative_dpo": ("#999999", ">"),
         "dpo after=sft": (PURPLE, "v"), "dpo rate=tuned after=sft": (PURPLE, "<"),
         "ulma after=sft": (GREY, "X")}


def pyplot() -> ModuleType | None:
    """matplotlib.pyplot, set up to draw into files; None, with a message, where it is missing."""
    try:
        import matplotlib
    except ImportError:
        print("no figures: they need matplotlib (pip install matplotlib)")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False,
                         "axes.grid": True, "grid.alpha": 0.3, "figure.dpi": 120,
                         "legend.frameon": False, "svg.hashsalt": "ulma"})
    return plt


def save(plt: ModuleType, figure: "Figure", out: str, name: str) -> None:
    """Write OUT/NAME.png and OUT/NAME.svg, the same bytes whenever they are drawn."""
    figure.set_layout_engine("constrained")
    figure.savefig(os.path.join(out, f"{name}.png"), metadata={"Software": None})
    figure.savefig(os.path.join(out, f"{name}.svg"), metadata={"Date": None, "Creator": None})
    plt.close(figure)


def square_root_scale(axis: "Axes", largest: float) -> None:
    """KL on the x axis, on a square-root scale: paths are nearly straight there."""
    axis.set_xscale("function", functions=(lambda x: abs(x) ** 0.5, lambda x: x ** 2))
    axis.set_xlim(0, largest)
    axis.set_xticks([x for x in (0.1, 0.25, 0.5, 1, 1.5, 2, 3, 4) if x <= largest],
                    [f"{x:g}" for x in (0.1, 0.25, 0.5, 1, 1.5, 2, 3, 4) if x <= largest])
    axis.set_xlabel("KL(pi||pi_ref), nats (square-root scale)")


def shared_legend(figure: "Figure", axes: Sequence["Axes"], **place: object) -> None:
    """One legend for all axes, every label once."""
    handles = {label: handle for axis in axes for handle, label in
               zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), **place)


# ---- one function per figure: (plt, study, found claims) -> figure or None ---------------------

def draw_dial(plt: ModuleType, study: Study, found: "Found") -> "Figure":
    """E[r] reached over the quality of demonstrations; optima dashed."""
    figure, axis = plt.subplots(figsize=(8.5, 5))
    for number, cells in enumerate(dial_rows()):
        colour, marker = STYLE[cells[0].name]
        if cells[0].method in OPTIMA and not cells[0].after:
            axis.plot(range(4), [mean_optimum(*cell.key)["E[r]"] for cell in cells],
                      color=colour, linestyle="--", linewidth=1.3)
        done = [(place, cell.key) for place, cell in enumerate(cells) if study.has(cell.key)]
        for place, key in done:
            values = list(study.values(key, "E[r]").values())
            mean, low, high = clipped(values, "E[r]")
            if study.diverged(key):                  # as in the tables: median, and all of them
                mean, low, high = study.middle(key, "E[r]"), min(values), max(values)
            axis.errorbar(place + 0.06 * (number - 3), mean, yerr=[[mean - low], [high - mean]],
                          color=colour, marker=marker, markersize=7, capsize=2, linestyle="",
                          label=method_label(key[1]) if place == done[0][0] else None)
    axis.plot([], [], color=GREY, linestyle="--", label="its optimum, infinite data")
    start = mean_optimum("hh", "reference")["E[r]"]
    axis.axhline(start, color=BLACK, linewidth=0.8)
    axis.text(-0.3, start + 0.06, "before training")
    axis.set_xlim(-0.35, 3.35)
    axis.set_xticks(range(4), [DATA_LABEL[data] for data in SHOWN])
    axis.set_xlabel("what the chosen answers are")
    axis.set_ylabel("true reward E[r], nats")
    axis.set_ylim(-3, 3.6)
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


DATA_PANELS = (   # x axis, {data: x}
    ("HH-like pairs (one epoch)", {"size-quarter": 304, "hh": 1216, "size-four": 4864}),
    ("HH-like pairs with chosen and rejected exchanged, %",
     {"hh": 0, "noise-10": 10, "noise-20": 20, "noise-30": 30}))


def draw_data(plt: ModuleType, study: Study, found: "Found") -> "Figure | None":
    """E[r] reached over the number of pairs, and over label noise; optima dashed."""
    if not study.has(*((data, method) for _, places in DATA_PANELS for data in places
                       for method in FOUR)):
        return None
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), sharey=True)
    for axis, (label, places) in zip(axes, DATA_PANELS, strict=True):
        for method in FOUR:
            colour, marker = STYLE[method]
            means, lows, highs = zip(*(
                clipped(list(study.values((data, method), "E[r]").values()), "E[r]")
                for data in places), strict=True)
            axis.fill_between(places.values(), lows, highs, color=colour, alpha=0.2, linewidth=0)
            axis.plot(places.values(), means, color=colour, marker=marker,
                      label=method_label(method))
            axis.plot(places.values(), [mean_optimum(SAME_LIMIT.get(data, data), method)["E[r]"]
                                        for data in places], color=colour, linestyle="--")
        axis.set_xlabel(label)
    axes[0].plot([], [], color=GREY, linestyle="--", label="its optimum, infinite data")
    axes[0].set_xscale("log")
    axes[0].set_xticks([304, 1216, 4864], ["304", "1,216", "4,864"])
    axes[0].set_xticks([], minor=True)
    axes[1].set_xticks([0, 10, 20, 30])
    axes[0].set_ylabel("true reward E[r], nats")
    shared_legend(figure, axes, loc="outside upper center", ncols=5)
    return figure


def draw_kl(plt: ModuleType, study: Study, found: "Found") -> "Figure":
    """E[r] against KL: the path from the base to the mean end of every method, under pi*."""
    figure, axes = plt.subplots(1, 4, figsize=(15, 4.6), sharey=True)
    kls = [0.01, 0.05, *(0.1 * n for n in range(1, 41, 2))]
    for axis, data in zip(axes, SHOWN, strict=True):
        axis.plot([0, *kls], [mean_optimum("hh", "reference")["E[r]"], *map(ceiling, kls)],
                  color=BLACK, linewidth=1.3, label="pi*, the ceiling")
        for method, after in DIAL:
            cell = shown(data, method, after)
            if not study.has(cell.key):
                continue
            colour, marker = STYLE[cell.name]
            paths = [row["path"] for row in study.results[cell.key].values()]
            mean = [[sum(point[n] for point in points) / len(points) for n in (0, 1)]
                    for points in zip(*paths, strict=True)]
            axis.plot(*zip(*mean, strict=True), color=colour, linewidth=1.2)
            axis.plot(*zip(*(path[-1][:2] for path in paths), strict=True), color=colour,
                      marker=marker, linestyle="", markersize=5, alpha=0.5)
            axis.plot(*mean[-1], color=colour, marker=marker, markersize=9,
                      markeredgecolor=BLACK, linestyle="", label=method_label(cell.name))
        square_root_scale(axis, 4.2)
        axis.set_title(DATA_LABEL[data])
    axes[0].set_ylim(-1.5, 3.6)
    axes[0].set_ylabel("true reward E[r], nats")
    shared_legend(figure, axes, loc="outside upper center", ncols=8)
    return figure


KNOBS = (     # line, label, (data, what follows the method)
    ("-", "beta 0.1, 0.5, 2", (("hh", " beta=0.1"), ("hh", ""), ("hh", " beta=2"))),
    (":", "304, 1,216, 4,864 pairs", (("size-quarter", ""), ("hh", ""), ("size-four", ""))))


def draw_knobs(plt: ModuleType, study: Study, found: "Found") -> "Figure | None":
    """E[r] against KL on HH-like pairs: one line per method and knob, through the dial's run."""
    def end(key: Key) -> list[float]:
        return [study.middle(key, score) for score in ("KL(pi||ref)", "E[r]")]

    if not study.has(*(("hh", method) for method in FOUR), ("hh", "ulma beta=2")):
        return None
    figure, axis = plt.subplots(figsize=(8.5, 5))
    kls = [0.01, 0.05, *(0.1 * n for n in range(1, 33, 2))]
    axis.plot(kls, list(map(ceiling, kls)), color=BLACK, label="pi*, the ceiling")
    for method in FOUR:
        colour, marker = STYLE[method]
        for line, label, settings in KNOBS:
            points = [end(key) for key in ((data, method + rest) for data, rest in settings)
                      if study.has(key)]
            axis.plot(*zip(*points, strict=True), color=colour, linestyle=line, marker=".",
                      label=f"{method_label(method)}: {label}" if len(points) > 1 else None)
        axis.plot(*end(("hh", method)), color=colour, marker=marker, markersize=9,
                  markeredgecolor=BLACK)
    square_root_scale(axis, 3.2)
    axis.set_ylim(-1.5, 3.6)
    axis.set_ylabel("true reward E[r], nats")
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def draw_rates(plt: ModuleType, study: Study, found: "Found") -> "Figure":
    """E[r] of the tuning runs over the learning rate: plateaus and cliffs."""
    panels = [data for data in ("hh", "golden", "qa", "red-team")
              if any(key[0] == data for key in study.tuning)] or ["hh"]
    figure, axes = plt.subplots(1, len(panels) + 1, figsize=(3.6 * (len(panels) + 1), 4),
                                sharey=True)
    for axis, data in zip(axes, panels, strict=False):
        for method in ("sft", "ulma", "pointwise_dpo", "dpo", "unlikelihood", "unlearning", "rlhf"):
            key = ("qa-pairs" if (data, method) == ("qa", "dpo") else data, method)
            draw_rate(axis, study, key, *STYLE[method], method_label(method))
        axis.set_title(DATA_LABEL[data])
    for data, colour, marker in zip(SHOWN, (VERMILION, BLUE, GREEN, PURPLE), "os^v", strict=True):
        draw_rate(axes[-1], study, shown(data, "dpo").key, colour, marker, DATA_LABEL[data])
    axes[-1].set_title("DPO on the dial")
    axes[-1].legend(fontsize=8)
    axes[0].legend(fontsize=8)
    axes[0].set_ylabel("E[r] of tuning runs, mean of two seeds, nats")
    return figure


def draw_rate(axis: "Axes", study: Study, key: Key, colour: str, marker: str, label: str) -> None:
    """One cell's E[r] over the learning rates that were tried."""
    if points := mean_rewards(study, key):
        axis.plot(points.keys(), points.values(), color=colour, marker=marker, markersize=5,
                  label=label)
        axis.set_xscale("log")
        axis.set_xticks([1.25e-4, 5e-4, 2e-3, 8e-3], ["1.25e-4", "5e-4", "2e-3", "8e-3"])
        axis.set_xticks([], minor=True)
        axis.set_xlabel("learning rate")


def draw_kinds(plt: ModuleType, study: Study, found: "Found") -> "Figure":
    """Harm on harmful requests against reward, and refusal, on harmless ones."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4))
    bad = [verb in BAD_VERBS for verb, _ in held_out_prompts()]
    for data, size in zip(SHOWN, (4, 6, 8, 10), strict=True):
        for method, after in DIAL:
            cell = shown(data, method, after)
            rows = [row["prompts"] for row in study.results.get(cell.key, {}).values()]
            if not rows:
                continue
            colour, marker = STYLE[cell.name]

            def mean(score, harmful, rows=rows):
                values = [value for row in rows
                          for value, is_bad in zip(row[score], bad, strict=True)
                          if is_bad == harmful]
                return sum(values) / len(values)
            for axis, score in zip(axes, ("E[r]", "refusal"), strict=True):
                axis.plot(mean("harmful", True), mean(score, False), color=colour, marker=marker,
                          markersize=size, markeredgecolor=BLACK, linestyle="",
                          label=method_label(cell.name))
    for axis, label in zip(axes, ("E[r], nats", "refusing openings"), strict=True):
        axis.set_xlabel("harmful mass on harmful requests")
        axis.set_ylabel(f"{label}, harmless requests")
    shared_legend(figure, axes, loc="outside right upper")
    return figure


def draw_forest(plt: ModuleType, study: Study, found: "Found") -> "Figure":
    """Differences in E[r] with intervals: every claim, coloured by its verdict."""
    rows = [row for row in found if row[0].score == "E[r]"][::-1]
    figure, axis = plt.subplots(figsize=(10, 1 + 0.2 * len(rows)))
    colours = {"holds": BLUE, "fails": VERMILION, "undecided": GREY}
    for place, (_, comparison, _, word) in enumerate(rows):
        axis.plot([comparison.low, comparison.high], [place, place], color=colours[word])
        axis.plot(comparison.mean, place, color=colours[word], marker="o", markersize=4)
    for word, colour in colours.items():
        axis.plot([], [], color=colour, marker="o", label=word)
    axis.axvline(0, color=BLACK, linewidth=0.8)
    axis.axvspan(-MARGIN, MARGIN, color=GREY, alpha=0.2, linewidth=0)
    axis.set_yticks(range(len(rows)), [f"{claim.source}: {claim.words}" for claim, *_ in rows],
                    fontsize=7)
    axis.set_ylim(-1, len(rows))
    axis.set_xlim(-4, 7)
    axis.set_xlabel("difference in E[r], nats, 95 % t interval (band: the margin of 0.1)")
    axis.legend(loc="lower right")
    return figure


# ---- all of them --------------------------------------------------------------------------------

FIGURES = {      # name: function, caption
    "dial": (draw_dial, "True reward over the quality of the chosen answers: dashed, where a "
             "method would end with infinite data; points, where runs of 76 steps ended."),
    "kl": (draw_kl, "Reward against KL on the dial: from the base to the end of each run by "
           "pi_ref^(1-a) pi^a; large: the mean over seeds."),
    "data": (draw_data, "True reward over the number of pairs and over label noise: dashed, the "
             "optimum with infinite data; bands, 95 % t intervals over seeds."),
    "kinds": (draw_kinds, "Harm against helpfulness, by kind of request; larger: better "
              "demonstrations."),
    "knobs": (draw_knobs, "Reward against KL on HH-like pairs, a line per method and knob; large: "
              "beta 0.5, 1,216 pairs."),
    "rates": (draw_rates, "Sensitivity to the learning rate: tuning runs, two seeds each."),
    "forest": (draw_forest, "Every claim about E[r]: difference, interval, verdict."),
}


def draw(out: str, study: Study, found: "Found") -> list[tuple[str, str]]:
    """Write every figure that has rows; returns [(file, caption)]."""
    plt, drawn = pyplot(), []
    if plt is None:
        return drawn
    for name, (function, caption) in FIGURES.items():
        figure = function(plt, study, found)
        if figure is not None:
            save(plt, figure, out, name)
            drawn.append((f"{name}.png", caption))
    return drawn
