"""README.md and docs/usage.md say what is there: commands run, counts and figures are true."""
import importlib.util
import json
import re
import shlex
import shutil
import sys

import pytest
import torch
from conftest import ROOT, finish, write_jsonl

import world

README, USAGE = ((ROOT / name).read_text() for name in ("README.md", "docs/usage.md"))
SMALL = {          # what keeps a command small; flags given last win
    "train.py": "--max_steps 2 --batch_size 8 --max_length 256 --max_prompt_length 128",
    "rlhf.ppo": "--max_steps 1 --batch_size 2 --max_new_tokens 8",
    "generate.py": "--max_new_tokens 8"}
ELSEWHERE = "--nnodes=2", "HOST", "sample.py", "models/smollm2"     # tests of their own


def commands(text: str) -> list[str]:
    """The commands of the indented blocks, without comments, continued lines joined."""
    lines = re.findall(r"^    ((?:.*\\\n)*.*)", text, re.MULTILINE)
    joined = [re.sub(r"\\\n\s*", "", line).partition("  #")[0].strip() for line in lines]
    return [line for line in joined if re.match(r"(python|torchrun|make) ", line)]


def arguments(command: str, tiny_model: str, dataset: str) -> tuple[str, list[str], int]:
    """(script or module, flags, ranks) of a command, with files of this test in it."""
    words = shlex.split(command.replace("DIR", tiny_model).replace("FILE", dataset)
                        .replace("TEST", dataset))
    ranks = 1
    if words[0] == "torchrun":
        ranks = int(next(w for w in words if w.startswith("--nproc_per_node"))[-1])
        words = ["python", *(w for w in words[1:] if not w.startswith(("--standalone", "--nproc")))]
    script, flags = (words[2], words[3:]) if words[1] == "-m" else (words[1], words[2:])
    flags += shlex.split(SMALL.get(script, ""))
    if "d2o" in flags:
        flags += ["--anchor_tokens", "8"]
    return script, flags, ranks


@pytest.fixture
def small_world(tmp_path, tiny_model, monkeypatch):
    """A folder in which the embedded world is a tiny model and a few of its rows."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model, world.base_model())
    for name, rows in world.draw_data(1, 40).items():
        world.write_jsonl(world.data_file(name), rows)


def test_every_command_runs_at_small_size_in_the_order_it_is_shown(
        small_world, tmp_path, tiny_model, monkeypatch):
    monkeypatch.setattr(sys, "stdin", open("/dev/null"))                    # the chat ends at once
    monkeypatch.setattr(world, "held_out_prompts", lambda: world.prompts()[152:153])
    dataset = write_jsonl(tmp_path / "pairs.jsonl", [
        {"prompt": f"Question {n}?", "chosen": f"Yes, {n}.", "rejected": f"No {n}."}
        for n in range(60)])
    ran = []
    for command in [*commands(README), *commands(USAGE)]:
        if command.startswith("make ") or "..." in command or any(
                word in command for word in ELSEWHERE):
            continue
        script, flags, ranks = arguments(command, tiny_model, dataset)
        if script == "tools.plot" and not importlib.util.find_spec("matplotlib"):
            continue                                       # an extra; see tests/tools/test_plot.py
        like = {"runs/rm": "runs/reward_model", "runs/a": "runs/mine", "runs/b": "runs/mine"}
        flags = [like.get(flag, flag) for flag in flags]   # any run of the page will do
        torch.manual_seed(0)
        finish(script, *flags, ranks=ranks)
        ran.append(script)
    assert {"train.py", "rlhf.ppo", "eval.py", "generate.py", "data.py", "judge", "tools.export",
            "tools.heatmap"} <= set(ran)
    assert (tmp_path / "runs/mine/final/adapter_model.safetensors").is_file()


def test_make_targets_and_tests_that_are_named_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:`|    )make ([a-z-]+)", README + USAGE))
    assert named <= targets and {"demo", "test", "oracles", "reproduce", "bench"} <= named
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", README):
        assert f"def {name}(" in tests, name


def test_line_counts_of_the_reading_order_are_true():
    rows = re.findall(r"^\| `([\w/.]+)` \| (\d+) \|", README, re.MULTILINE)
    assert [name for name, _ in rows][:3] == ["ulma.py", "data.py", "packing.py"] and len(rows) == 8
    for name, lines in rows:
        files = (ROOT / name).glob("*.py") if name.endswith("/") else [ROOT / name]
        assert sum(len(file.read_text().splitlines()) for file in files) == int(lines), name


def test_the_first_screen_has_a_command_and_a_number():
    lines = README.splitlines()
    assert any("make demo" in line for line in lines[:20])
    assert any(re.search(r"\d+\.\d+ s\b", line) for line in lines[:25])
    assert len(lines) <= 140


def test_cpu_figures_are_those_of_the_result_file():
    rows = {row["implementation"]: row for row in json.loads(
        (ROOT / "bench/results/step.json").read_text())["results"]}
    table = {"DPO, this project": "ours-dpo", "ULMA, this project": "ours-ulma",
             "DPO, TRL 1.16 tuned": "trl-compact", "DPO, TRL 1.16 as it comes": "trl"}
    for label, name in table.items():
        row, seconds = rows[name], rows[name]["seconds"][1:]
        shown = (f"| {label} | {row['median_seconds']:.2f} ({min(seconds):.2f}-{max(seconds):.2f}) "
                 f"| {row['peak_gb']:.2f} |")
        assert shown in README
    share = rows["ours-dpo"]["share_of_matrix_rate"] * rows["ours-dpo"]["median_seconds"]
    assert f"sustained rate | {share:.2f} |" in README


def test_help_of_every_command_fits_the_screen(capsys):
    # a description that argparse cannot print, or a % in a help text, ends in a traceback
    for script in ("train.py", "eval.py", "generate.py", "rlhf.ppo", "tools.export",
                   "tools.heatmap", "tools.plot", "tools.gguf", "judge", "study", "study.exact",
                   "study.real", "world.py", "data.py"):
        with pytest.raises(SystemExit) as stop:
            finish(script, "--help")
        assert stop.value.code == 0


