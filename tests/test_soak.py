"""tests/soak.py: some rounds of it, and that it sees what is lost."""
import json
import subprocess
import sys
from collections import Counter
from random import Random
from types import SimpleNamespace

import pytest
import soak
from conftest import ONE_THREAD, ROOT


def test_some_disturbed_rounds_end_with_the_same_bytes(tmp_path):
    run = subprocess.run([
        sys.executable, str(ROOT / "tests/soak.py"), "--rounds", "2", "--jobs", "generate",
        "--out", str(tmp_path / "soak.json")], env=ONE_THREAD | {"TMPDIR": str(tmp_path)},
        capture_output=True, text=True, timeout=400)
    assert run.returncode == 0, run.stdout + run.stderr
    figures = json.loads((tmp_path / "soak.json").read_text())
    assert (figures["rounds"], figures["faults"]) == (2, [])
    assert sum(row["times"] for row in figures["rows"]) >= 1
    assert "2 rounds, 0 lost" in run.stdout and not list(tmp_path.glob("soak-*"))


@pytest.mark.parametrize("code, shown, changed, fault", [
    (0, "done", None, None),
    (2, "error: run holds a finished run", None, None),
    (2, "error: damaged", None, "does not continue: exit code 2: error: damaged"),
    (1, "Traceback", None, "does not continue: exit code 1"),
    (0, "done", "a", "other bytes: a"),
    (0, "done", ".tmp-a", "other bytes: .tmp-a"),
    (0, "done", "metrics.jsonl", "other bytes: metrics.jsonl"),
])
def test_what_is_lost_is_seen(code, shown, changed, fault, tmp_path, monkeypatch):
    (tmp_path / "a").write_text("1")
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "tokens_per_s": 5}))
    (tmp_path / "trainer_state.json").write_text("seconds")
    job = soak.Job("a job", (), tmp_path, expected=soak.content(tmp_path))
    (tmp_path / "trainer_state.json").write_text("other seconds")
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "tokens_per_s": 6}))
    if changed:
        (tmp_path / changed).write_text("{}")
    monkeypatch.setattr(soak.Round, "start", lambda round: SimpleNamespace(
        wait=lambda: code, output=lambda: shown))
    round = soak.Round(job, Random(0), Counter({"9": 2}))
    soak.finish(round)
    assert len(round.faults) == bool(fault) and all(
        found.startswith(fault) for found in round.faults), round.faults
    assert soak.table([round]) == [{"disturbance": "9", "job": "a job", "times": 2, "rounds": 1,
                                    "lost": int(bool(fault))}]
