"""What every command shares: flags, bad input as one sentence, checked ranges, the time left."""
import argparse
import difflib
import json
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from files.interrupt import leave_at_once, speaks

MESSAGE_LENGTH = 1000      # characters of an error message; a longer one loses its middle
INPUT_ERRORS = (ValueError, OSError, FloatingPointError)     # what bad input may raise

SHOWN_EVERY = 5.0       # seconds from one line of progress to the next

SEEDS = (-2**31, 2**31 - 1)      # what a seed may be: a step's seed is made of it in 64 bits

# What can move a terminal's cursor, turn the order of text around or cannot be encoded: control
# characters, marks of writing direction, lone surrogates.
HIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str, keep: str = "") -> str:
    """Text with control characters as escapes, but for those in `keep` ("\\n\\t" for answers)."""
    return HIDDEN.sub(lambda found: found[0] if found[0] in keep
                      else found[0].encode("unicode_escape").decode(), text)


# ---- how a command ends -------------------------------------------------------------------------

def sentence_of(error: BaseException) -> str:
    """One line for the error that ends a command, of at most MESSAGE_LENGTH characters."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    kind, what = "" if isinstance(error, INPUT_ERRORS) else f"{type(error).__name__}: ", error
    if isinstance(error, OSError) and error.filename and error.strerror:
        what = f"{error.filename}: {error.strerror}"         # not "[Errno 2] ..."
    text = visible(f"error: {kind}{what}")
    end = MESSAGE_LENGTH // 4
    return text if len(text) <= MESSAGE_LENGTH else (
        f"{text[:MESSAGE_LENGTH - end - 3]} … {text[-end:]}")


def tell_torchrun(sentence: str) -> None:
    """Write the error file of this process, if torchrun asks for one: its last lines show it."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with open(file, "w", encoding="utf-8") as out:
            json.dump({"message": {"message": sentence, "extraInfo": {
                "timestamp": str(int(time.time()))}}}, out)


def exit_code(error: BaseException) -> int:
    """2 for bad input, 130 after Ctrl-C, 1 for a bug."""
    return 130 if isinstance(error, KeyboardInterrupt) else 2 if isinstance(
        error, INPUT_ERRORS) else 1


def end_at_once(code: int) -> NoReturn:
    """End a rank with os._exit: during Python's shutdown gloo may abort it, or torchrun's SIGTERM
    change its exit code."""
    sys.stdout.flush()
    os._exit(code)


def leave(error: BaseException, show: bool = True, at_once: bool = False) -> NoReturn:
    """End the process with the error's exit code; its sentence goes to stderr.

    at_once   see `end_at_once`
    """
    sentence = sentence_of(error)
    tell_torchrun(sentence)
    if show:
        print(sentence, file=sys.stderr, flush=True)
    if at_once:
        end_at_once(exit_code(error))
    sys.exit(exit_code(error))


def run_cli(main: Callable[[], None]) -> None:
    """Run a command; what bad input raises, and Ctrl-C, become one line and an exit code.

    Under torchrun the first process of each machine speaks for its others; once they are
    connected, see training.ranks.running.
    """
    is_rank = int(os.environ.get("WORLD_SIZE", 1)) > 1
    is_process = signal.getsignal(signal.SIGINT) is leave_at_once        # else called in a test
    interrupted = [-math.inf]                                            # when Ctrl-C came

    def interrupt(number: int, frame: object) -> NoReturn:
        interrupted[0] = time.monotonic()
        raise KeyboardInterrupt
    try:
        if is_process:
            signal.signal(signal.SIGINT, interrupt)
        for file in (sys.stdout, sys.stderr):            # a terminal may lack a character
            if hasattr(file, "reconfigure"):
                file.reconfigure(errors="backslashreplace")
        main()
        if is_rank:
            end_at_once(0)
    except SystemExit as stop:                           # a run that was stopped, and saved
        if is_rank and isinstance(stop.code, int):
            end_at_once(stop.code)
        raise
    except BrokenPipeError:
        sys.exit(0)
    except (Exception, KeyboardInterrupt) as error:
        if time.monotonic() - interrupted[0] < 1:            # a library made another error of it
            leave(KeyboardInterrupt(), speaks())
        if not isinstance(error, (*INPUT_ERRORS, KeyboardInterrupt)):
            raise
        leave(error, speaks())
    finally:
        if is_process:                                   # nothing is left to do but end
            signal.signal(signal.SIGINT, leave_at_once)


def parse_first(parse: Callable[[], object]) -> None:
    """Parse the command line before torch is imported, which takes seconds: --help, or a wrong
    flag, ends the command here."""
    try:
        parse()
    except INPUT_ERRORS as error:
        leave(error, speaks())


# ---- flags --------------------------------------------------------------------------------------

class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults behind every flag that has one, and the file's header as it is written."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        without = action.default is None or action.default is False
        return action.help if without else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Raises ValueError for wrong flags, and names the nearest one, instead of the usage of all.

    elsewhere   {flag of another trainer: what to do here}, the end of the sentence on that flag
    """

    def __init__(self, *args: Any, elsewhere: Mapping[str, str] | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.elsewhere = elsewhere or {}

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)

    def flags(self) -> list[str]:
        """All flags, those of subcommands too."""
        parsers = [self] + [parser for action in self._actions
                            if isinstance(action, argparse._SubParsersAction)
                            for parser in action.choices.values()]
        return sorted({flag for parser in parsers for flag in parser._option_string_actions})

    def parse_args(self, args: Sequence[str] | None = None,
                   namespace: argparse.Namespace | None = None) -> argparse.Namespace:
        args = sys.argv[1:] if args is None else list(args)
        for given in args[:args.index("--") if "--" in args else None]:
            name, flags = given.partition("=")[0], self.flags()
            if name.startswith("--") and " " not in name and not any(
                    flag.startswith(name) for flag in flags):
                near = difflib.get_close_matches(name, flags, 1)
                raise ValueError(f"there is no flag {name}; " + (
                    self.elsewhere.get(name) or
                    (f"did you mean {near[0]}?" if near else f"there are {', '.join(flags)}")))
        return super().parse_args(args, namespace)


def check_ranges(args: argparse.Namespace, counts: tuple[str, ...],
                 ranges: dict[str, tuple[float, float]]) -> None:
    """Raise ValueError, naming the flag, for a count below 1 or a value outside its range."""
    for name in counts:
        if not 1 <= getattr(args, name) < 2**63:
            raise ValueError(f"--{name} {getattr(args, name)} must be at least 1, and below 2**63")
    for name, (low, high) in ranges.items():
        value = getattr(args, name)
        if not low <= value <= high or abs(value) > 1e300:                   # NaN is not in it
            raise ValueError(f"--{name} {value} must be a number in [{low}, {high}]")


def time_left(seconds: float, done: float, total: float) -> str:
    """"3:20 left" (hours first where there are some), if the rest goes as the first `done` went.

    seconds   what `done` of `total` took; the two in any one unit
    """
    left = round(seconds / done * max(0, total - done)) if done else 0
    hours, minutes = left // 3600, left // 60 % 60
    return (f"{hours}:{minutes:02}" if hours else f"{minutes}") + f":{left % 60:02} left"


Item = TypeVar("Item")


def show_progress(items: Iterable[Item], title: str, total: int = 0,
                  shown: bool = True) -> Iterator[Item]:
    """The items; every few seconds a line says how many there were and, of `total`, the time left.

    total   0: unknown
    """
    start = last = time.monotonic()
    for number, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if shown and now - last > SHOWN_EVERY:
            left = f" of {total:,}  {time_left(now - start, number, total)}" if total else ""
            print(f"{title}: {number:,}{left}", flush=True)
            last = now
