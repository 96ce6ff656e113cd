"""`make demo`: what was interrupted goes on, what ended starts over. A stub stands for Python."""
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

STUB = """#!/bin/sh
echo "$*" >> commands
case "$*" in
  *eval.py*) mkdir -p runs/demo; touch runs/demo/table.json ;;
  *"$FAILS"*) exit 130 ;;
  *) mkdir -p "runs/demo/$3/final" ;;
esac
"""


@pytest.fixture
def demo(tmp_path):
    """demo(fails): run `make demo`, in which the training of this method fails; what it ran."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "requirements.txt").touch()
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").write_text(STUB)
    (tmp_path / ".venv/bin/python").chmod(0o755)
    (tmp_path / ".venv/ready").touch()

    def run(fails):
        (tmp_path / "commands").write_text("")
        made = subprocess.run(["make", "demo"], cwd=tmp_path, env=os.environ | {"FAILS": fails},
                              capture_output=True, text=True)
        lines = (tmp_path / "commands").read_text().splitlines()
        parts = [line.split()[1:5] for line in made.stdout.splitlines() if line.startswith("==")]
        ran = [line.split()[2] if "train" in line else "eval" for line in lines]
        assert [part[3] for part in parts] == ran and all(part[1:3] == ["of", "5:"] for part in parts)
        assert made.stdout.count("3 minutes in all") == 1
        assert made.stdout.count("s left in all") == len(ran) - 1
        return made.returncode, ran
    return run


def test_a_demo_that_was_interrupted_goes_on_and_one_that_ended_starts_over(demo):
    assert demo("--method pointwise_dpo") == (2, ["sft", "dpo", "pointwise_dpo"])
    whole = ["sft", "dpo", "pointwise_dpo", "ulma", "eval"]
    assert demo("nothing") == (0, whole[2:])
    assert demo("nothing") == (0, whole)


def test_an_old_python_is_told_before_anything_is_made(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "requirements.txt").touch()
    old = tmp_path / "python3.10"
    old.write_text(f"""#!{sys.executable}
import sys
sys.version_info = (3, 10, 14)
exec(sys.argv[2])
""")
    old.chmod(0o755)
    made = subprocess.run(["make", "test", f"PYTHON={old}"], cwd=tmp_path, capture_output=True,
                          text=True)
    assert made.returncode == 2 and not (tmp_path / ".venv").exists()
    assert made.stderr.splitlines()[0] == (
        f"error: {old} is Python 3.10, and ulma needs 3.11 or newer: make PYTHON=python3.12")
