"""Draw the curves of runs: one PNG and one SVG, a panel per metric of metrics.jsonl and eval.jsonl.

    python -m tools.plot runs/ulma runs/dpo --out curves          writes curves.png and curves.svg

Thin lines are what was logged, bold ones its exponential moving average. Runs differ in colour
(Okabe and Ito's, which colour-blind readers can tell apart) and in the dashes of the line.
Needs matplotlib.
"""
if __name__ == "__main__":
    from files.interrupt import catch_interrupts
    catch_interrupts()

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from files.cli import Help, Parser, check_ranges, run_cli
from files.folders import what_it_is
from files.text import json_value, whole_lines, writing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (6, 1.5, 1.5, 1.5)))
PANELS = {           # in this order; a metric that is not here comes after them under its own name
    "loss": "loss",
    "eval/loss": "loss, held out",
    "rewards/positive": "reward of good responses",
    "rewards/negative": "reward of bad responses",
    "rewards/margins": "reward margin of pairs",
    "eval/rewards/margins": "reward margin of pairs, held out",
    "rewards/accuracies": "pairs ordered right",
    "eval/rewards/accuracies": "pairs ordered right, held out",
    "objective/kl": "KL to the reference, nats",
    "eval/kl": "KL to the reference, held out, nats a token",
    "logps/positive": "log-prob of good responses, nats",
    "logps/negative": "log-prob of bad responses, nats",
    "grad_norm": "gradient norm",
    "tokens_per_s": "tokens per second",
}
NO_PANEL = ("step", "tokens", "lr")

Lines = list[dict[str, float]]           # of one run's metrics.jsonl and eval.jsonl


def read_metrics(run: str) -> Lines:
    """The logged lines of a run, finished or not; raises FileNotFoundError or ValueError else."""
    lines = []
    for file in (os.path.join(run, name) for name in ("metrics.jsonl", "eval.jsonl")):
        for number, text in enumerate(whole_lines(file), 1):
            try:
                line = json_value(text.encode())
            except ValueError as error:
                raise ValueError(f"{file}:{number}: not JSON: {error}") from None
            if not isinstance(line, dict) or not isinstance(line.get("step"), int):
                raise ValueError(f"{file}:{number}: not a line of metrics: it has no step")
            lines.append(line)
    if not lines:
        raise FileNotFoundError(f"{os.path.join(run, 'metrics.jsonl')} holds no logged step"
                                f"{what_it_is(run, 'run')}")
    return lines


def short_names(runs: Sequence[str]) -> list[str]:
    """Each run's path from the folder that all of them lie in."""
    paths = [os.path.abspath(run) for run in runs]
    common = os.path.commonpath([os.path.dirname(path) for path in paths])
    return [os.path.relpath(path, common) for path in paths]


def smooth(values: Sequence[float], span: float) -> list[float]:
    """The exponential moving average over about `span` values; the first weigh as much as they can,
    so that it starts at the first value and not at 0."""
    average, weight, result = 0.0, 0.0, []
    keep = 1 - 1 / max(1.0, span)
    for value in values:
        average, weight = keep * average + value, keep * weight + 1
        result.append(average / weight)
    return result


def metrics_of(runs: Mapping[str, Lines]) -> list[str]:
    """What is drawn: every number that a run logged, those of PANELS first."""
    found = dict.fromkeys(key for lines in runs.values() for line in lines
                          for key, value in line.items() if isinstance(value, (int, float)))
    known = [key for key in PANELS if key in found]
    return known + [key for key in found if key not in PANELS and key not in NO_PANEL]


def draw(runs: Mapping[str, Lines], share: float = 0.1) -> "Figure":
    """The figure; `runs` are the lines of each by its name, `share` the part of a run's lines that
    the average spans (0: bold lines are what was logged)."""
    from matplotlib.figure import Figure                # not pyplot: no window, no global state
    from matplotlib.ticker import MaxNLocator

    metrics = metrics_of(runs)
    if not metrics:
        raise ValueError("these runs have logged no number yet")
    columns = min(3, len(metrics))
    rows = -(-len(metrics) // columns)
    legend_rows = -(-len(runs) // columns)
    height = 2.7 * rows + 0.3 * legend_rows + 0.2
    figure = Figure(figsize=(4.6 * columns, height), dpi=120)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel in panels[len(metrics):]:
        panel.remove()
    for panel, key in zip(panels[:len(metrics)], metrics, strict=True):
        for number, lines in enumerate(runs.values()):
            points = [(line["step"], line[key]) for line in lines
                      if isinstance(line.get(key), (int, float))]
            if not points:
                continue
            steps, values = zip(*points, strict=True)
            colour, dashes = COLOURS[number % len(COLOURS)], DASHES[number % len(DASHES)]
            panel.plot(steps, values, color=colour, linewidth=0.8, alpha=0.3, zorder=1)
            panel.plot(steps, smooth(values, share * len(values)), color=colour, linewidth=2,
                       zorder=2, linestyle=dashes, marker="o" if len(values) < 10 else None)
        panel.set_title(PANELS.get(key, key), fontsize=11, loc="left")
        panel.set_xlabel("step", fontsize=10)
        panel.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        panel.tick_params(labelsize=9)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    add_legend(figure, list(runs), columns)
    figure.tight_layout(rect=(0, 0, 1, 1 - (0.3 * legend_rows + 0.1) / height))
    return figure


def add_legend(figure: "Figure", names: Sequence[str], columns: int) -> None:
    """The runs' names above the panels, each beside its line."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=COLOURS[n % len(COLOURS)], linewidth=2,
                      linestyle=DASHES[n % len(DASHES)]) for n in range(len(names))]
    figure.legend(handles, names, loc="upper left", ncols=columns, frameon=False, fontsize=11,
                  handlelength=3.5)


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=Help)
    parser.add_argument("runs", nargs="+", help="output folders of train.py or rlhf.ppo")
    parser.add_argument("--out", default="curves", help="name of both files, without .png, .svg")
    parser.add_argument("--smooth", type=float, default=0.1,
                        help="share of a run that the average spans; 0 draws what was logged")
    args = parser.parse_args(argv)
    check_ranges(args, (), {"smooth": (0, 1)})
    try:
        import matplotlib
    except ImportError:
        raise ValueError("curves need matplotlib: pip install matplotlib") from None
    matplotlib.rcParams["svg.hashsalt"] = "ulma"                 # same curves, same file
    folders = list({os.path.abspath(run): run for run in args.runs}.values())    # each once
    runs = dict(zip(short_names(folders), map(read_metrics, folders), strict=True))
    figure = draw(runs, args.smooth)
    for kind, metadata in (("png", {}), ("svg", {"Date": None})):
        with writing(f"{args.out}.{kind}"):
            figure.savefig(f"{args.out}.{kind}", metadata=metadata)
    print(f"wrote {args.out}.png and {args.out}.svg")


if __name__ == "__main__":
    run_cli(main)
