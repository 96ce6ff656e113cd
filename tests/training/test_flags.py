"""The flags of train.py, and that no command imports torch before it has read its own."""
import subprocess
import sys

import pytest
from conftest import ONE_THREAD, ROOT

import train
from packing import MAX_RESPONSES
from step import METHODS
from training.flags import (ELSEWHERE, METHOD_NAMES, MOST_ANCHORS, WORLD_FLAGS, build_parser,
                            parse_args)

COMMANDS = ("train.py", "eval.py", "generate.py", "data.py", "rlhf/ppo.py", "judge/__main__.py",
            "study/__main__.py", "study/real.py", "study/exact.py", "tools/export.py",
            "tools/heatmap.py", "tools/plot.py", "tools/gguf.py")


def test_what_is_written_twice_to_spare_imports_is_the_same():
    parser = build_parser()
    choices = {action.dest: action.choices for action in parser._actions}
    assert tuple(METHODS) == METHOD_NAMES and MOST_ANCHORS == MAX_RESPONSES - 1
    assert set(choices["kernels"]) == train.KERNELS.keys()
    assert WORLD_FLAGS.keys() <= choices.keys()


def test_there_are_at_most_36_flags_and_none_of_another_trainers_names_is_one_too():
    parser = build_parser()
    names = {action.dest for action in parser._actions} - {"help"}
    assert len(names) <= 36
    assert not set(ELSEWHERE) & set(parser.flags())
    for name, advice in ELSEWHERE.items():
        with pytest.raises(ValueError) as caught:
            parse_args([name, "1"])
        assert str(caught.value) == f"there is no flag {name}; {advice}"


def test_trls_names_with_the_same_meaning_are_taken():
    args = parse_args(["--model_name_or_path", "m", "--dataset_name", "d.jsonl"])
    assert args.dataset == "d.jsonl"


def test_half_of_a_sequence_is_the_prompts_unless_said_otherwise():
    # --max_length 256 alone was refused: it met a default of 512 that nobody had given
    for given, want in (([], 512), (["--max_length", "256"], 128),
                        (["--max_length", "256", "--max_prompt_length", "200"], 200)):
        assert parse_args(given).max_prompt_length == want


def test_no_default_is_shown_where_there_is_none():
    shown = build_parser().format_help()
    assert "None" not in shown and "False" not in shown and "default: 0.1" in shown


@pytest.mark.parametrize("flags", ["--help", "--lerning_rate 1"])
def test_help_and_wrong_flags_are_answered_before_torch_is_imported(flags):
    # Importing torch takes more than a second. Measured by what is loaded, not by a clock.
    script = f"""
import runpy, sys
for command in {COMMANDS}:
    sys.argv = [command, *{flags.split()}]
    try:
        runpy.run_path(command, run_name="__main__")
    except SystemExit as left:
        print(command, left.code)
    assert not {{"torch", "numpy"}} & sys.modules.keys(), command
"""
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=ONE_THREAD,
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    ended = [line for line in run.stdout.splitlines() if line.split(" ")[0] in COMMANDS]
    code = 0 if flags == "--help" else 2
    assert ended == [f"{command} {code}" for command in COMMANDS]
