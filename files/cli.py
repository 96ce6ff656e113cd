"""What every command shares: one sentence for bad input, checked ranges, the time that is left."""
import argparse
import math
import os
import sys
from collections.abc import Callable


def run_cli(main: Callable[[], None]) -> None:
    """Run a command; bad input (ValueError, OSError) becomes one sentence and exit code 2."""
    try:
        main()
    except BrokenPipeError:
        sys.exit(0)
    except (ValueError, OSError) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults behind every flag, and the file's header as it is written."""


def check_ranges(args: argparse.Namespace, counts: tuple[str, ...],
                 ranges: dict[str, tuple[float, float]]) -> None:
    """Raise ValueError, naming the flag, for a count below 1 or a value outside its range."""
    for name in counts:
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)} must be at least 1")
    for name, (low, high) in ranges.items():
        value = getattr(args, name)
        if not (math.isfinite(value) and low <= value <= high):
            raise ValueError(f"--{name} {value} must be a number in [{low}, {high}]")


def time_left(seconds: float, done: float, total: float) -> str:
    """"3:20 left" (hours first where there are some), if the rest goes as the first `done` went.

    seconds   what `done` of `total` took; the two in any one unit
    """
    left = round(seconds / done * max(0, total - done)) if done else 0
    hours, minutes = left // 3600, left // 60 % 60
    return (f"{hours}:{minutes:02}" if hours else f"{minutes}") + f":{left % 60:02} left"
