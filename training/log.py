"""What a run logs: lines on the screen and in metrics.jsonl, and TensorBoard's files if asked."""
import argparse
import time
from collections.abc import Mapping, Sequence

import torch

from files.cli import time_left, visible
from step import METRICS, Method
from training.output import write_metrics

QUIET = 10.0                 # seconds after which a step is shown though no line is due
HEADER_EVERY = 20            # lines
SHOWN_TEXT = 240             # characters of a held-out answer; eval.jsonl has all of it
COLUMNS = {                  # metric: what stands above the column, on it, and its width
    "loss": ("", "loss", 7), "rewards/positive": ("reward", "good", 7),
    "rewards/negative": ("reward", "bad", 7), "rewards/margins": ("reward", "margin", 7),
    "rewards/accuracies": ("reward", "right", 6), "logps/positive": ("log-prob", "good", 9),
    "logps/negative": ("log-prob", "bad", 8), "grad_norm": ("", "grad", 7), "lr": ("", "lr", 8),
    "tokens_per_s": ("", "tok/s", 7)}


def unrewarded(name: str, method: Method) -> str:
    """In words, which rewards a method does not log, and why; "" where it logs all."""
    if method.reward_model or method.trains_on == "pairs" or method.reference == "all":
        return ""
    what = "" if method.reference == "none" else " of good responses, and so no margins"
    return (f"the log has no rewards{what}: --method {name} runs no reference for them; "
            "--eval_steps and eval.py do")


# ---- a line on the screen -----------------------------------------------------------------------

def fitted(name: str, value: float) -> str:
    """A metric in its column, with as many of four decimals as leave a space in front of it."""
    width = COLUMNS[name][2]
    if name == "lr":
        return f"{value:.1e}".rjust(width)
    texts = [f"{value:.{digits}f}" for digits in range(0 if name == "tokens_per_s" else 4, -1, -1)]
    texts.append(f"{value:.0e}")
    return next((text for text in texts if len(text) < width), texts[-1]).rjust(width)


def header(names: Sequence[str], start: int) -> str:
    """The two lines above the columns of these metrics, of which the first begins at `start`."""
    above, below, group = " " * start, "step".ljust(start), ""
    for name in names:
        before, (group, title, width) = group, COLUMNS[name]
        above += ("" if group == before else group).rjust(width)
        below += title.rjust(width)
    return f"{above.rstrip()}\n{below}     left"


class Log:
    """One line per logged step on the screen and in metrics.jsonl: means since the last line."""

    def __init__(self, args: argparse.Namespace, first: int, total_steps: int,
                 since_line: Sequence[float] | None = None):
        self.output_dir, self.logging_steps = args.output_dir, args.logging_steps
        self.first, self.total_steps = first, total_steps
        self.steps, seconds, *sums = since_line or [0.0] * (4 + 2 * len(METRICS))
        self.sums = torch.tensor(sums, dtype=torch.float64)
        self.start = self.last_shown = time.perf_counter()
        self.last_time = self.start - seconds
        self.names, self.lines = [], 0
        self.board = None
        if args.report_to == "tensorboard":
            self.board = TensorBoard(args.output_dir, first)

    def since_line(self) -> list[float]:
        """Steps, seconds and sums since the last line, for a run that goes on from here."""
        return [self.steps, time.perf_counter() - self.last_time, *self.sums.tolist()]

    def add(self, step: int, totals: Sequence[float], grad_norm: float, lr: float) -> None:
        """Add one step's totals, over all ranks; write a line if one is due."""
        self.steps += 1
        self.sums += torch.tensor(totals, dtype=torch.float64)
        self.added = now = time.perf_counter()
        left = time_left(now - self.start, step - self.first, self.total_steps - self.first)
        if step % self.logging_steps and step != self.total_steps:
            if now - self.last_shown > QUIET:
                self.last_shown = now
                print(f"step {step}/{self.total_steps}  loss {totals[0]:.4f}  {left}", flush=True)
            return
        loss, tokens, *sums = self.sums.tolist()
        line = {"step": step, "loss": loss / self.steps}
        for name, total, count in zip(METRICS, sums[::2], sums[1::2]):
            if count:
                line[name] = total / count
        line |= {"grad_norm": grad_norm, "lr": lr, "tokens": int(tokens),
                 "tokens_per_s": round(tokens / (now - self.last_time), 1)}
        write_metrics(self.output_dir, line)
        if self.board:
            self.board.add(line)
        self.show(line, left)
        self.last_time = self.last_shown = now
        self.steps = 0
        self.sums.zero_()

    def add_held_out(self, step: int, metrics: Mapping[str, float],
                     answers: Sequence[Mapping[str, str]]) -> None:
        """Add what was measured on held-out responses right after a step."""
        write_metrics(self.output_dir, {"step": step, **metrics, "answers": answers}, "eval.jsonl")
        if self.board:
            self.board.add({"step": step, **metrics})
        shown = "  ".join(f"{name.split('/')[-1]} {value:.4g}" for name, value in metrics.items())
        print(f"after step {step}, held out:  {shown}", flush=True)
        for answer in answers:
            for who, text in answer.items():
                print(f"  {who:9}  {visible(text[:SHOWN_TEXT])}{' …' * (len(text) > SHOWN_TEXT)}")
        self.last_shown = time.perf_counter()
        self.last_time += self.last_shown - self.added       # no part of the speed of training

    def show(self, line: Mapping[str, float], left: str) -> None:
        """Print a line in columns, below their names now and then."""
        names = [name for name in COLUMNS if name in line or name in self.names]
        start = len(f"step {self.total_steps}/{self.total_steps}")
        if names != self.names or self.lines % HEADER_EVERY == 0:
            print(header(names, start))
        self.names, self.lines = names, self.lines + 1
        cells = "".join(fitted(name, line[name]) if name in line else " " * COLUMNS[name][2]
                        for name in names)
        print(f"step {line['step']}/{self.total_steps}".ljust(start)
              + f"{cells} {left.removesuffix(' left'):>8}", flush=True)


class TensorBoard:
    """TensorBoard's event files in the run's folder; its package is imported here alone."""

    def __init__(self, output_dir: str, first: int):
        from torch.utils.tensorboard import SummaryWriter
        # what a killed run wrote after the step it goes on from is hidden
        self.writer = SummaryWriter(output_dir, purge_step=first + 1 if first else None)

    def add(self, line: Mapping[str, float]) -> None:
        """Write every number of a line under its name; flushed, for a run may be killed."""
        for name, value in line.items():
            if name != "step" and isinstance(value, (int, float)):
                self.writer.add_scalar(name, value, line["step"])
        self.writer.flush()
