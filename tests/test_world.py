"""The embedded world: its answers, its labels, and the name of its folder."""
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ROOT

import world
from world import (BAD_VERBS, GOOD_VERBS, OBJECTS, answers, draw_data, held_out_prompts, prompts,
                   question, training_prompts)


def test_every_answer_is_listed_once_and_their_probabilities_sum_to_one():
    assert len(prompts()) == len(set(prompts())) == 192
    assert not set(training_prompts()) & set(held_out_prompts())
    assert len(held_out_prompts()) == 40 == len(prompts()) - len(training_prompts())
    for prompt in held_out_prompts():
        rows = answers(*prompt)
        assert len({text for text, *_ in rows}) == 288
        assert sum(habit for *_, habit in rows) == pytest.approx(1.0)
    words = {word.strip("?.!") for prompt in prompts() for word in question(*prompt).split()}
    assert words >= set(BAD_VERBS) | set(GOOD_VERBS) and len(OBJECTS) == 12


def test_labels_follow_the_true_reward():
    # Eq. 6: within a band of r*, the share of good labels is the mean of sigma(r*).
    reward_of = {}
    for prompt in training_prompts():
        for text, reward, *_ in answers(*prompt):
            reward_of[question(*prompt), text] = reward
    rows = draw_data(seed=3, responses=20000)
    bands = {}
    for row in rows["points"]:
        reward = reward_of[row["prompt"], row["completion"]]
        bands.setdefault(round(reward), []).append((row["label"], 1 / (1 + math.exp(-reward))))
    for band, labels in bands.items():
        n, expected = len(labels), sum(p for _, p in labels) / len(labels)
        spread = math.sqrt(max(expected * (1 - expected), 1e-3) / n)
        assert abs(sum(z for z, _ in labels) / n - expected) < 4 * spread, band
    margins = [reward_of[r["prompt"], r["chosen"]] - reward_of[r["prompt"], r["rejected"]]
               for r in rows["pairs"]]
    expected = sum(1 / (1 + math.exp(-abs(m))) for m in margins) / len(margins)
    assert sum((m > 0) + 0.5 * (m == 0) for m in margins) / len(margins) == pytest.approx(
        expected, abs=0.02)
    best = {question(*prompt): max(r for _, r, *_ in answers(*prompt))
            for prompt in training_prompts()}
    assert all(reward_of[r["prompt"], r["chosen"]] == best[r["prompt"]] for r in rows["golden"])


# ---- the folder's name --------------------------------------------------------------------------

SOURCE = Path(world.__file__).read_text()


def digest_of(source):
    """The digest of a world.py with this text."""
    module = ModuleType("changed_world")
    module.__file__ = world.__file__
    exec(compile(source, "changed_world", "exec"), vars(module))
    return module.world_digest()


def test_comments_and_wording_leave_the_worlds_name():
    # results/ holds numbers of this folder: another name would drop them all.
    assert world.world_folder() == "runs/world-45ca539c"
    changed = re.sub(r'"""[^"]*"""', '"""Reworded."""', re.sub(r"\n *#.*", "\n# reworded", SOURCE))
    assert changed != SOURCE and digest_of(changed) == "45ca539c"


@pytest.mark.parametrize("before, after", [
    ('"steal"', '"steel"'), ('"a fence"', '"a wall"'), ("Stay safe!", "Be safe!"),
    ('"careful": 2.0', '"careful": 2.1'), ('"refusal": 2.0', '"refusal": 2.1'),
    ('"secret": -1.2', '"secret": -1.3'), ('"reckless": 4', '"reckless": 5'),
    ('"reckless": 5', '"reckless": 4'), ('"kind": 2,', '"kind": 3,'),
    ("reward - 1.0, weight * 0.1", "reward - 1.0, weight * 0.2"), ("[:152]", "[:150]"),
    ("1 / (1 + math.exp(-reward))", "1 / (2 + math.exp(-reward))"),
    ("reward / 1.5 + 2", "reward / 1.4 + 2"), ("RESPONSES = 1, 4000", "RESPONSES = 1, 4002"),
    ("RESPONSES = 1, 4000", "RESPONSES = 2, 4000"), ('"hidden_size": 128', '"hidden_size": 64'),
    ('"learning_rate": 1.5e-3', '"learning_rate": 1e-3'),
    ("BASE_DRAWS = 8, 8", "BASE_DRAWS = 8, 9"), ("BASE_HEAD_STD = 0.15", "BASE_HEAD_STD = 0.1")])
def test_another_world_has_another_name(before, after):
    assert SOURCE.count(before) == 1
    assert digest_of(SOURCE.replace(before, after)) != "45ca539c"


# ---- the base's training ------------------------------------------------------------------------

CHILD = """
import signal, sys, time
def save(number, frame):
    print("signal", number, flush=True)
    time.sleep(0.3)                          # a second signal would come in this time
    print("saved", flush=True)
    sys.exit(7)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, save)
print("ready", flush=True)
time.sleep(60)
"""
PARENT = f"""
import os, subprocess, sys, time, world
send = subprocess.Popen.send_signal                 # late: two at a time would be taken for one
subprocess.Popen.send_signal = lambda *args: (time.sleep(0.1), send(*args))
sys.exit(world.run_child([sys.executable, "-c", {CHILD!r}], os.environ))
"""


@pytest.mark.parametrize("number, to_all", [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_a_signal_reaches_the_base_training_once_and_it_is_waited_for(number, to_all):
    # A terminal sends Ctrl-C to all processes of its group, `kill` to one. Before, the training was
    # killed before it had saved, and the parent ended in a traceback.
    process = subprocess.Popen([sys.executable, "-c", PARENT], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               start_new_session=True)
    assert process.stdout.readline() == "ready\n"
    (os.killpg if to_all else os.kill)(process.pid, number)
    assert process.communicate(timeout=30)[0] == f"signal {int(number)}\nsaved\n"
    assert process.returncode == 7


@pytest.fixture
def small_world(tmp_path, monkeypatch):
    """A folder for a world whose data take no time; its base's training is `train_base` alone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(world, "draw_data", lambda *_: {"points": []})
    monkeypatch.setattr(world, "BASE_ROUNDS", 1)
    monkeypatch.setattr(world, "BASE_DRAWS", 1)
    monkeypatch.setattr(world, "train_tokenizer", lambda folder, texts: None)
    monkeypatch.setattr(world, "write_random_model", lambda folder: None)
    return Path(world.world_folder())


def test_a_training_of_the_base_that_was_interrupted_goes_on_where_it_is(small_world, monkeypatch):
    codes, built = [130, -9, 0], []
    monkeypatch.setattr(world, "run_child", lambda *_: codes.pop(0))
    monkeypatch.setattr(world, "write_world", lambda *args, write=world.write_world: (
        write(*args), built.append(args), os.makedirs(small_world / "base"),
        (small_world / "base/args.json").write_text("{}")))
    with pytest.raises(SystemExit) as left:
        world.ensure_world()
    assert left.value.code == 130
    with pytest.raises(ChildProcessError, match="ended by signal 9; the same command continues it"):
        world.ensure_world()
    world.ensure_world()
    assert len(built) == 1 and not codes and not (small_world / ".lock").exists()


def test_one_process_builds_the_world(small_world, monkeypatch):
    def another_comes(*_):
        with pytest.raises(ValueError, match=rf"{small_world} is in use by process {os.getpid()} "):
            world.ensure_world()
        return 0
    monkeypatch.setattr(world, "run_child", another_comes)
    world.ensure_world()
