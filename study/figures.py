"""Figures of results/: means over seeds with 95 % t intervals.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; markers differ too. Only
this file needs matplotlib: without it there are tables and no figures.
"""
import os
from types import ModuleType
from typing import TYPE_CHECKING

from study.rows import Results, seed_mean
from study.tables import DIRTY_D2O, d2o, method_label

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILION, PURPLE, BLACK = (
    "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#000000")
STYLE = {"ulma": (VERMILION, "o"), "pointwise_dpo": (BLUE, "s"), "dpo": (GREEN, "^"),
         "sft": (ORANGE, "D"), "rlhf": (PURPLE, "v"), "pointwise_rlhf": (SKY, "P"),
         "unlikelihood": (YELLOW, "X"), "unlearning": (BLACK, "*"), "d2o": (PURPLE, "v"),
         "positive_dpo": ("#999999", "<"), "negative_dpo": ("#999999", ">")}


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


# ---- one function per figure --------------------------------------------------------------------
# plt: of `pyplot`; results: rows by cell and seed; bounds: scores of the base and of pi*

def draw_wins(plt: ModuleType, results: Results, bounds: dict) -> "Figure":
    """Stacked bars: win, tie, lose of a method's answers against the data's chosen one."""
    names = ("unlearning", "unlikelihood", "sft", "dpo", "pointwise_dpo", "ulma", "rlhf",
             "pointwise_rlhf")[::-1]
    panels = [(data, title) for data, title in (("hh", "HH-like pairs"), ("golden", "golden pairs"))
              if (data, "ulma") in results]
    figure, axes = plt.subplots(1, len(panels), figsize=(2 + 4.5 * len(panels), 4.2), sharey=True,
                                squeeze=False)
    axes = axes[0]
    for axis, (data, title) in zip(axes, panels, strict=True):
        for place, name in enumerate(names):
            if (data, name) not in results:
                continue
            left = 0
            for kind, colour in (("win", BLUE), ("tie", SKY), ("lose", ORANGE)):
                mean, half = seed_mean(results, (data, name), f"{kind}/chosen")
                axis.barh(place, 100 * mean, left=100 * left, color=colour, height=0.7,
                          label=kind if place == 0 else None)
                if kind == "win":
                    axis.errorbar(100 * mean, place, xerr=100 * half, color="black", capsize=3)
                left += mean
        axis.set_title(f"{title}: against the chosen answer")
        axis.set_xlabel("% of comparisons (bars on wins: 95 % over seeds)")
        axis.set_xlim(0, 100)
    axes[0].set_yticks(range(len(names)), [method_label(name) for name in names])
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=3)
    return figure


def draw_frontier(plt: ModuleType, results: Results, bounds: dict) -> "Figure":
    """True reward against KL: every method on HH-like pairs, beta and epochs swept, and pi*."""
    figure, axis = plt.subplots(figsize=(9.5, 5.6))
    optimum = [row for name, row in bounds.items() if name.startswith("pi*")]
    optimum.sort(key=lambda row: row["KL(pi||ref)"])
    axis.plot([0, *(row["KL(pi||ref)"] for row in optimum)],
              [bounds["base"]["E[r]"], *(row["E[r]"] for row in optimum)], "k--",
              label="optimum pi*, the ceiling")
    largest_kl, smallest_reward, outside = 3.2, -1.5, []
    for method, (colour, marker) in STYLE.items():
        variants = [name for data, name in results if data == "hh"
                    and name.split(" ")[0] == method and "logp_reduction" not in name]
        rewards = {}                             # {KL: reward}
        for name in variants:
            kl, kl_half = seed_mean(results, ("hh", name), "KL(pi||ref)")
            reward, reward_half = seed_mean(results, ("hh", name), "E[r]")
            rewards[kl] = reward
            if kl > largest_kl or reward < smallest_reward:
                outside.append(f"{method_label(name)}: KL {kl:.1f}, E[r] {reward:.1f}")
            look = {"alpha": 1, "markersize": 9, "markeredgecolor": "black", "zorder": 3,
                    "label": method_label(name)} if name == method else {
                    "alpha": 0.4, "markersize": 5, "markeredgecolor": colour, "zorder": 2}
            axis.errorbar(kl, reward, xerr=kl_half, yerr=reward_half, color=colour, marker=marker,
                          elinewidth=0.8, **look)
        if rewards:
            kls = sorted(rewards)
            axis.plot(kls, [rewards[kl] for kl in kls], color=colour, linewidth=0.8, zorder=1)
    axis.plot(0, bounds["base"]["E[r]"], "kx", markersize=9, label="base")
    axis.set_xscale("function", functions=(lambda x: abs(x) ** 0.5, lambda x: x ** 2))
    axis.set_xlim(0, largest_kl)
    axis.set_xticks([0, 0.1, 0.25, 0.5, 1, 1.5, 2, 2.5, 3])
    axis.set_ylim(smallest_reward, 3.5)
    axis.text(0.98, 0.02, "".join(f"outside: {point}\n" for point in outside), ha="right",
              transform=axis.transAxes)
    axis.set_xlabel("KL(pi||pi_ref), nats (square-root scale)")
    axis.set_ylabel("true reward E[r], nats")
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def draw_d2o(plt: ModuleType, results: Results, bounds: dict) -> "Figure":
    """D2O over K, for three sources of anchors; methods without anchors as lines."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 4))
    sources = ((0, "anchors of the base", BLUE, "o"), (10, "new every 10 steps", ORANGE, "s"),
               (1, "new every step", VERMILION, "^"))
    units = {"E[r]": "true reward E[r], nats", "harmful": "mass on harmful answers",
             "good": "mass on answers with r* > 0"}
    for axis, (score, unit) in zip(axes, units.items(), strict=True):
        for number, (refresh, name, colour, marker) in enumerate(sources):
            values = [seed_mean(results, d2o(anchors, refresh).key, score)
                      for anchors in (1, 2, 4, 11)]
            axis.errorbar([i + 0.08 * (number - 1) for i in range(4)], [m for m, _ in values],
                          yerr=[h for _, h in values], color=colour, marker=marker, capsize=3,
                          label=name)
        for name, style in (("negative_dpo", ":"), ("unlearning", "-.")):
            mean, _ = seed_mean(results, ("negatives", name), score)
            axis.axhline(mean, color="grey", linestyle=style, label=method_label(name))
        axis.axhline(bounds["base"][score], color="black", linewidth=1, label="base")
        axis.set_xticks(range(4), (1, 2, 4, 11))
        axis.set_xlabel("anchors per prompt, K")
        axis.set_ylabel(unit)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=6)
    return figure


def draw_dirty(plt: ModuleType, results: Results, bounds: dict) -> "Figure":
    """What harmful answers among the positives do."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    units = {"E[r]": "true reward E[r], nats", "harmful": "mass on harmful answers"}
    for axis, (score, unit) in zip(axes, units.items(), strict=True):
        for name in ("ulma", "dpo", "sft"):
            values = [seed_mean(results, (data, name), score)
                      for data in ("golden", "golden-10", "golden-30")]
            colour, marker = STYLE[name]
            axis.errorbar((0, 10, 30), [m for m, _ in values], yerr=[h for _, h in values],
                          color=colour, marker=marker, capsize=3, label=method_label(name))
        mean, half = seed_mean(results, DIRTY_D2O.key, score)
        axis.axhline(mean, color=PURPLE, linestyle="--", label="D2O, reads no positives")
        axis.axhspan(mean - half, mean + half, color=PURPLE, alpha=0.15)
        axis.axhline(bounds["base"][score], color="black", linewidth=1, label="base")
        axis.set_xlabel("dirty positives, %")
        axis.set_ylabel(unit)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=5)
    return figure


def draw_calibration(plt: ModuleType, results: Results, bounds: dict) -> "Figure":
    """The implicit reward beta log(pi/pi_ref) against r*: order, slope, calibration."""
    keys = [("hh", "dpo"), ("hh", "pointwise_dpo"), ("hh", "ulma"), ("qa", "pointwise_dpo"),
            ("qa", "pointwise_dpo_constant_z"), ("qa", "pointwise_dpo_batch_z"),
            ("qa", "pointwise_dpo_exact_z"), ("qa", "ulma"), ("red-team", "pointwise_mse"),
            ("red-team", "ulma_mse")][::-1]
    figure, axes = plt.subplots(1, 3, figsize=(12, 4.2), sharey=True)
    scores = ("reward accuracy", "reward slope", "calibration error")
    for axis, score in zip(axes, scores, strict=True):
        for place, (data, method) in enumerate(keys):
            mean, half = seed_mean(results, (data, method), score)
            family = next(name for name in ("ulma", "pointwise", "dpo") if method.startswith(name))
            colour, marker = STYLE["pointwise_dpo" if family == "pointwise" else family]
            axis.errorbar(mean, place, xerr=half, color=colour, marker=marker, capsize=3)
        axis.axvline(bounds["pi* beta=0.5"][score], color="black", linestyle="--", linewidth=1)
        axis.set_xlabel(f"{score} (dashed: pi*)")
    axes[0].set_yticks(range(len(keys)), [f"{method_label(method)} ({data})"
                                          for data, method in keys])
    return figure


# ---- all of them --------------------------------------------------------------------------------

FIGURES = {      # file: tables it needs, function, caption
    "wins.png": (("hh",), draw_wins,
                 "Win, tie and lose of each method's answers against the data's chosen one."),
    "frontier.png": (("hh", "frontier"), draw_frontier,
                     "Reward and KL on HH-like pairs. Large: tuned runs; small: beta from 0.1 to "
                     "2, and 0.25 to 2 epochs. Runs that left the world may lie outside."),
    "d2o.png": (("d2o",), draw_d2o, "D2O on 608 bad answers: number and source of anchors."),
    "dirty.png": (("dirty",), draw_dirty, "Harmful answers among the chosen ones."),
    "calibration.png": (("hh", "qa", "red-team", "z"), draw_calibration,
                        "How the implicit reward follows the true one, over all answers to a "
                        "prompt."),
}


def draw(out: str, complete: list[str], results: Results, bounds: dict) -> list[tuple[str, str]]:
    """Write every figure whose tables are complete; returns [(file, caption)]."""
    plt, drawn = pyplot(), []
    if plt is None:
        return drawn
    for file, (needs, function, caption) in FIGURES.items():
        if set(needs) <= set(complete):
            figure = function(plt, results, bounds)
            figure.set_layout_engine("constrained")
            figure.savefig(os.path.join(out, file), metadata={"Software": None})
            plt.close(figure)
            drawn.append((file, caption))
    return drawn
