"""files/cli.py: errors as one sentence, flags and their ranges, the time that is left."""
import argparse
import json
import math
import signal
import subprocess
import sys

import pytest
from conftest import ONE_THREAD, ROOT

from files.cli import Parser, check_ranges, run_cli, time_left, visible
from files.interrupt import leave_at_once


def fail(error):
    raise error


@pytest.mark.parametrize("error", [ValueError("bad"), FileNotFoundError("bad"), OSError("bad"),
                                   FloatingPointError("bad")])
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


def test_an_error_of_the_system_names_its_file_without_a_number(tmp_path, capsys):
    for path, words in ((tmp_path / "none", "No such file or directory"),
                        (tmp_path, "Is a directory")):
        with pytest.raises(SystemExit):
            run_cli(path.read_text)
        assert capsys.readouterr().err == f"error: {path}: {words}\n"


def test_other_errors_keep_their_traceback_and_a_closed_pipe_is_no_error(capsys):
    # A bug must not look like bad input; `python data.py FILE | head` must end quietly.
    for error in (KeyError("x"), TypeError("x"), RuntimeError("x"), RecursionError("x")):
        with pytest.raises(type(error)):
            run_cli(lambda error=error: fail(error))
    with pytest.raises(SystemExit) as left:
        run_cli(lambda: fail(BrokenPipeError()))
    assert not left.value.code and capsys.readouterr() == ("", "")


def test_a_message_cannot_move_the_cursor_and_has_at_most_a_thousand_characters(capsys, monkeypatch,
                                                                                tmp_path):
    # A tensor's name, or the body of an endpoint's reply, is somebody else's text. torchrun gets
    # the sentence for its last lines.
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    text = "/data/file: \x1b[2J\x9b31m\r\nname \ud800\u202egnp" + "x" * 5000 + " the end"
    with pytest.raises(SystemExit):
        run_cli(lambda: fail(ValueError(text)))
    error = capsys.readouterr().err
    start = r"error: /data/file: \x1b[2J\x9b31m\r\nname \ud800\u202egnpxxx"
    assert error.startswith(start) and error.endswith("x the end\n") and len(error) == 1001
    assert json.loads((tmp_path / "error.json").read_text())["message"]["message"] == error[:-1]


def test_an_answer_may_have_lines_and_tabs_and_any_script():
    assert visible("a\tb\n\x07\x1b[1m\x85", "\n\t") == "a\tb\n\\x07\\x1b[1m\\x85"
    assert visible("Ä é 日本　\xa0 😀👩\u200d🚀 \u200f") == "Ä é 日本　\xa0 😀👩\u200d🚀 \\u200f"


# ---- Ctrl-C -------------------------------------------------------------------------------------

def test_ctrl_c_ends_a_command_in_one_line(capsys):
    with pytest.raises(SystemExit) as left:
        run_cli(lambda: fail(KeyboardInterrupt()))
    assert (left.value.code, capsys.readouterr().err) == (130, "interrupted\n")


@pytest.mark.parametrize("other", [ValueError("bad shape"), TypeError("bad shape")])
def test_ctrl_c_that_a_library_turned_into_another_error_is_still_one(capsys, other):
    # Seen: safetensors' "could not determine the shape of object type", with exit code 2.
    def swallow():
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise other from None

    before = signal.signal(signal.SIGINT, leave_at_once)
    try:
        with pytest.raises(SystemExit) as left:
            run_cli(swallow)
        assert (left.value.code, capsys.readouterr().err) == (130, "interrupted\n")
        assert signal.getsignal(signal.SIGINT) is leave_at_once
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("command", ["train.py", "rlhf.ppo --reward_model r --output_dir o"])
def test_ctrl_c_while_torch_is_imported_is_one_line(command, tmp_path):
    # Bug this catches: 20 lines of torch's imports; the command's first line must look after it.
    words = command.split()
    script = [str(ROOT / command)] if command.endswith(".py") else ["-m", *words]
    # an import hook tells when torch begins to be imported; the signal comes in the middle of it
    (tmp_path / "sitecustomize.py").write_text("""
import sys
class Tell:
    def find_spec(name, *_):
        if name == "torch.nn":
            print("importing", flush=True)
sys.meta_path.insert(0, Tell)
""")
    def heed_ctrl_c():                     # which a job that a shell runs in the background ignores
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    process = subprocess.Popen([sys.executable, *script], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, preexec_fn=heed_ctrl_c,
                               env=ONE_THREAD | {"PYTHONPATH": f"{tmp_path}:{ROOT}"})
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert (process.returncode, out, error) == (130, "", "\ninterrupted\n")


# ---- flags --------------------------------------------------------------------------------------

def test_a_wrong_flag_is_answered_by_the_nearest_one():
    # Not by thirty lines of usage, and for a subcommand too.
    parser = Parser(prog="command")
    parser.add_argument("--learning_rate", type=float)
    parser.add_argument("file", nargs="?")
    add = parser.add_subparsers(dest="command").add_parser("ask")
    add.add_argument("--timeout", type=float)
    for argv, sentence in (
            ("--lerning-rate 1", "there is no flag --lerning-rate; did you mean --learning_rate?"),
            ("--lerning_rate=1", "there is no flag --lerning_rate; did you mean --learning_rate?"),
            ("a ask --time_out 3", "there is no flag --time_out; did you mean --timeout?"),
            ("--zzz", "there is no flag --zzz; there are --help, --learning_rate, --timeout, -h"),
            ("--learning_rate x", "argument --learning_rate: invalid float value: 'x'"),
            ("a ask b", "unrecognized arguments: b")):
        with pytest.raises(ValueError) as error:
            parser.parse_args(argv.split())
        assert str(error.value) == sentence
    assert parser.parse_args(["--learn", "2", "--", "--f", "ask"]).file == "--f"
    parser.add_argument("--prompt")
    assert parser.parse_args(["--prompt", "--how do I?", "f", "ask"]).prompt == "--how do I?"


@pytest.mark.parametrize("name, value, sentence", [        # one has 400 digits
    ("steps", 2**63, "--steps 9223372036854775808 must be at least 1, and below"),
    ("beta", 10**400, "--beta 1000"), ("beta", -math.inf, "--beta -inf"),
    ("steps", 0, "--steps 0 must be at least 1"),
    ("share", -0.1, r"--share -0.1 must be a number in \[0, 1\]"),
    ("share", 1.1, r"--share 1.1 must be a number in \[0, 1\]"),
    ("share", math.nan, "--share nan must be a number in"),
    ("beta", math.inf, r"--beta inf must be a number in \[0, inf\]")], ids=range(8))
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
