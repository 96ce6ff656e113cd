"""files/cli.py: errors as one sentence, ranges of flags, the time that is left."""
import argparse
import math

import pytest

from files.cli import check_ranges, run_cli, time_left


def fail(error):
    raise error


@pytest.mark.parametrize("error", [ValueError("bad"), FileNotFoundError("bad"), OSError("bad")])
@pytest.mark.parametrize("rank, sentence", [(None, "error: bad\n"), ("0", "error: bad\n"),
                                            ("3", "")])
def test_bad_input_is_one_sentence_of_the_first_rank(monkeypatch, capsys, error, rank, sentence):
    # Eight ranks meet the same bad file: one sentence, eight exit codes.
    monkeypatch.delenv("RANK", raising=False)
    if rank:
        monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as left:
        run_cli(lambda: fail(error))
    assert (left.value.code, capsys.readouterr().err) == (2, sentence)


def test_other_errors_keep_their_traceback_and_a_closed_pipe_is_no_error(capsys):
    # A bug must not look like bad input; `python data.py FILE | head` must end quietly.
    for error in (KeyError("x"), RuntimeError("x"), FloatingPointError("x")):
        with pytest.raises(type(error)):
            run_cli(lambda error=error: fail(error))
    with pytest.raises(SystemExit) as left:
        run_cli(lambda: fail(BrokenPipeError()))
    assert not left.value.code and capsys.readouterr() == ("", "")


@pytest.mark.parametrize("name, value, sentence", [
    ("steps", 0, "--steps 0 must be at least 1"),
    ("share", -0.1, r"--share -0.1 must be a number in \[0, 1\]"),
    ("share", 1.1, r"--share 1.1 must be a number in \[0, 1\]"),
    ("share", math.nan, "--share nan must be a number in"),
    ("beta", math.inf, r"--beta inf must be a number in \[0, inf\]")])
def test_a_value_outside_its_range_is_named(name, value, sentence):
    good, ranges = {"steps": 1, "share": 1.0, "beta": 1e9}, {"share": (0, 1), "beta": (0, math.inf)}
    check_ranges(argparse.Namespace(**good), ("steps",), ranges)
    with pytest.raises(ValueError, match=sentence):
        check_ranges(argparse.Namespace(**good | {name: value}), ("steps",), ranges)


@pytest.mark.parametrize("seconds, done, total, text", [
    (10, 1, 21, "3:20 left"), (10, 20, 20, "0:00 left"), (10, 25, 20, "0:00 left"),
    (3600, 1, 3, "2:00:00 left"), (3599.6, 1, 2, "1:00:00 left"), (5, 0, 9, "0:00 left"),
    (60, 1e9, 1.5e9, "0:30 left")])
def test_time_left_by_hand(seconds, done, total, text):
    # 10 s for 1 of 21: 20 more of them are 3:20.
    assert time_left(seconds, done, total) == text
