"""bench/gpu.py without a GPU: it says so; a dry run runs stages and stores what each left."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ONE_THREAD, ROOT
from scripts import load_script, write_hh

NO_GPU = ONE_THREAD | {"CUDA_VISIBLE_DEVICES": ""}


def run_gpu(*flags):
    return subprocess.run([sys.executable, str(ROOT / "bench/gpu.py"), *map(str, flags)],
                          env=NO_GPU, capture_output=True, text=True, timeout=120)


def test_without_a_gpu_it_says_so_in_one_sentence(tmp_path):
    run = run_gpu("--out", tmp_path / "gpu.json")
    assert run.returncode == 2 and not run.stdout and not os.listdir(tmp_path)
    assert re.fullmatch(r"error: there is no GPU that torch \S+ can use; .*--dry-run .*\n",
                        run.stderr)


def test_a_dry_run_stores_every_stage_as_it_ends(tmp_path, tiny_tokenizer):
    out = tmp_path / "gpu.json"
    run = run_gpu("--dry-run", "--dataset", write_hh(tmp_path), "--tokenizer", tiny_tokenizer,
                  "--only", "tests", "attention", "--out", out)
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads(out.read_text())
    tests, stage = report["stages"]
    assert (tests["stage"], tests["rc"]) == ("tests", 0) and " passed" in tests["output"]
    assert (stage["stage"], stage["rc"]) == ("attention", 0) and stage["seconds"] > 0
    assert stage["command"].startswith("python bench/attention.py --dataset hh.jsonl.gz ")
    assert "tokens, 4 heads of 16" in stage["output"]
    assert stage["result"]["errors"]["dense"] == [0.0] * 4
    assert report["gpu"] is None and report["data"] == "hh.jsonl.gz"
    assert str(tmp_path) not in out.read_text() and str(ROOT) not in out.read_text()


def report_of(chosen, tmp_path, seconds=60.0):
    script, report = load_script("gpu"), {"stages": []}
    args = script.argparse.Namespace(seconds=seconds, dry_run=True, out=tmp_path / "gpu.json")
    well = script.run_all([script.Stage(*stage) for stage in chosen], report, args, tmp_path)
    assert json.loads(args.out.read_text()) == report
    return well, report["stages"]


def test_a_stage_that_fails_or_takes_too_long_does_not_end_the_others(tmp_path, capsys):
    # The second waits in a process of its own, which must end with it.
    pid = tmp_path / "pid"
    slow = f"""import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({str(pid)!r}, "w").write(str(child.pid))
print("so far", flush=True)
child.wait()"""
    well, rows = report_of([
        ("fails", 20, ["-c", "print('why'); raise SystemExit(3)"]), ("slow", 3, ["-c", slow]),
        ("absent", 20, ["-c", ""], ("no_such_package",)), ("fine", 20, ["-c", "print(1)"])],
        tmp_path)
    assert not well and [row["rc"] for row in rows] == [3, None, 0, 0]
    assert rows[0]["output"] == "why\n" and rows[3]["output"] == "1\n"
    assert rows[1]["ended"] == "at its limit" and rows[1]["output"] == "so far\n"
    assert rows[2]["left_out"] == "needs no_such_package"
    stat = Path(f"/proc/{pid.read_text()}/stat")
    assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"
    assert "why" in capsys.readouterr().out


def test_no_stage_starts_when_the_time_is_over(tmp_path):
    well, rows = report_of([("late", 20, ["-c", "print(1)"])], tmp_path, seconds=1.0)
    assert not well and rows[0]["rc"] is None and rows[0]["left_out"] == "no time left of 1.0 s"


@pytest.mark.parametrize("dry", [True, False])
def test_every_stage_names_files_and_flags_that_exist(dry):
    # All limits together may be over eight minutes: the last stages then get what is left.
    stages = load_script("gpu").stages(["--dataset", "d", "--tokenizer", "t"], Path("x"), dry)
    assert stages[0].limit + stages[1].limit < 300
    for stage in stages:
        files = [word for word in stage.words if word.startswith(("bench/", "tests/"))]
        assert files and all((ROOT / file).exists() for file in files), stage
        if files[0].startswith("bench/"):
            source = (ROOT / files[0]).read_text()
            for flag in re.findall(r"--\w+", " ".join(stage.words)):
                assert f'"{flag}"' in source, (stage.name, flag)
            assert stage.out == f"x/{stage.name}.json"
            assert ("--dataset" in stage.words) == ('"--dataset"' in source)
    step = next(stage.words for stage in stages if stage.name == "step")
    assert dry or step[step.index("--together") + 1] == "1"        # two 7B models need two cards


def test_the_stand_in_for_hh_has_its_lengths(tmp_path):
    # HH's first 200 pairs, with Llama's tokenizer: prompts of 150 tokens, responses of 40.
    script, task = load_script("gpu"), load_script("task")
    _, data, _, tokenizer = script.write_stand_in(tmp_path)
    pairs = task.hh_pairs(data, tokenizer, 200)
    means = {key: sum(len(pair[key]) for pair in pairs) / 200 for key in pairs[0]}
    assert 120 < means["prompt"] < 180
    assert all(30 < means[key] < 50 for key in ("chosen", "rejected"))
