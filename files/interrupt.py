"""Ctrl-C while a command imports torch: one line. Imports next to nothing: it must come first."""
import os
import signal


def speaks() -> bool:
    """Whether this process prints what each process of its machine has to say."""
    return os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0"


def leave_at_once(number: int, frame: object) -> None:
    if speaks():
        os.write(2, b"\ninterrupted\n")
    os._exit(130)


def catch_interrupts() -> None:
    """Let Ctrl-C end this process in one line, until `files.cli.run_cli` takes over."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:        # as in the background
        signal.signal(signal.SIGINT, leave_at_once)
