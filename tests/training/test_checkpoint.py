"""Checkpoints are whole or absent, the newest few, and never read damaged."""
import contextlib
import json
import os
import re
import resource
import shutil
from pathlib import Path

import pytest
import torch
from conftest import tree_of
from helpers import finish, make_model, train_flags

import train
from files.cli import run_cli
from files.text import write_folder
from lora import load_adapter
from model import load_llama
from training.checkpoint import (RunFolder, checkpoints, load_checkpoint, load_run,
                                 save_checkpoint, trainable)


def model_and_optimizer():
    model = make_model(torch.float32)
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-3)
    sum(p.square().sum() for p in trainable(model).values()).backward()
    optimizer.step()
    return model, optimizer


@contextlib.contextmanager
def largest_file(size):
    """As a full disk: what is written past `size` bytes of a file fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_checkpoint_is_whole_or_absent(tmp_path):
    # A write that dies between two files leaves the older checkpoints alone and no new one.
    def dies(folder):
        Path(folder, "half").write_text("x")
        raise OSError("disk full")

    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(OSError, match="disk full"):
        write_folder(str(tmp_path / "checkpoint-6"), dies)
    assert [step for step, _ in checkpoints(str(tmp_path))] == [3]
    write_folder(str(tmp_path / "checkpoint-6"), lambda folder: Path(folder, "a").write_text("x"))
    assert [step for step, _ in checkpoints(str(tmp_path))] == [3, 6]
    assert not list(tmp_path.glob(".tmp-*"))


def test_a_restored_optimizer_has_everything_on_its_parameters_device(tmp_path):
    # The fused AdamW of a GPU reads "step" from there too: on the CPU it was an illegal access.
    model, optimizer = model_and_optimizer()
    path = save_checkpoint(RunFolder(str(tmp_path), "base", 1), 1, model, optimizer)
    model = make_model(torch.float32).to("meta")
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-3)
    load_checkpoint(path, model, optimizer)
    states = [optimizer.state[p] for p in trainable(model).values()]
    assert all(state.keys() == {"step", "exp_avg", "exp_avg_sq"} for state in states)
    assert {t.device.type for state in states for t in state.values()} == {"meta"}


def test_a_flipped_byte_in_a_checkpoint_is_named(tmp_path):
    model, optimizer = model_and_optimizer()
    folder = RunFolder(str(tmp_path), "base", save_steps=1)
    for step in (1, 2, 3):
        assert save_checkpoint(folder, step, model, optimizer) == f"{tmp_path}/checkpoint-{step}"
    assert [step for step, _ in checkpoints(str(tmp_path))] == [2, 3]
    assert load_checkpoint(str(tmp_path / "checkpoint-3"), model, optimizer)["step"] == 3
    file = tmp_path / "checkpoint-3/optimizer.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="optimizer.safetensors is damaged"):
        load_checkpoint(str(tmp_path / "checkpoint-3"), model, optimizer)


@pytest.mark.parametrize("change, words", [
    ({"step": 6}, "trainer_state.json is damaged"), ({"sha256": {}}, "trainer_state.json is dama"),
    (None, "holds the state after step 4")])
def test_a_checkpoint_of_another_step_or_without_hashes_is_refused(tmp_path, change, words):
    # An edited state, and a folder that was renamed.
    model, optimizer = model_and_optimizer()
    path = save_checkpoint(RunFolder(str(tmp_path), "base", 1), 4, model, optimizer, [0.5])
    assert load_checkpoint(path, model, optimizer)["loop"] == [0.5]
    if change:
        file = Path(path, "trainer_state.json")
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    else:
        path = shutil.move(path, tmp_path / "checkpoint-6")
    with pytest.raises(ValueError, match=f"{words}.*; remove {path} to continue from an older"):
        load_checkpoint(str(path), model, optimizer)


# ---- the disk -----------------------------------------------------------------------------------

@pytest.mark.parametrize("size, file", [(2000, "adapter_model.safetensors"),
                                        (8000, "optimizer.safetensors")])
def test_a_disk_that_is_full_is_a_sentence_and_leaves_the_older_checkpoint(tmp_path, size, file):
    model, optimizer = model_and_optimizer()
    folder = RunFolder(str(tmp_path), "base", save_steps=1)
    save_checkpoint(folder, 1, model, optimizer)
    before = tree_of(tmp_path)
    with largest_file(size), pytest.raises(OSError, match=f"{file} cannot be written: .*too larg"):
        save_checkpoint(folder, 2, model, optimizer)
    assert tree_of(tmp_path) == before                       # the room that was taken is free again
    assert load_checkpoint(str(tmp_path / "checkpoint-1"), model, optimizer)["step"] == 1


def test_a_run_on_a_full_disk_ends_with_one_sentence_and_goes_on_later(tmp_path, tiny_model,
                                                                       pairs_file, capsys):
    _, *argv = map(str, train_flags(tiny_model, pairs_file, tmp_path / "run", "--max_steps", "4",
                                    "--save_steps", "2"))
    finish(tiny_model, pairs_file, tmp_path / "before", "--max_steps", "1")      # token ids are there
    with largest_file(7000), pytest.raises(SystemExit) as left:
        run_cli(lambda: train.main(argv))
    error = capsys.readouterr().err
    assert left.value.code == 2 and error.count("\n") == 1, error
    assert "safetensors cannot be written: " in error and str(tmp_path / "run") in error
    assert not list((tmp_path / "run").glob(".*"))
    assert "step 4/4" in finish(tiny_model, pairs_file, tmp_path / "run", *argv[6:])


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o007, 0o660)])
def test_the_umask_decides_who_may_read_weights(tmp_path, tiny_model, pairs_file, umask, mode):
    before = os.umask(umask)
    try:
        finish(tiny_model, pairs_file, tmp_path / "run", "--max_steps", "2", "--save_steps", "1")
        finish(tiny_model, pairs_file, tmp_path / "full", "--max_steps", "1", "--lora_r", "0")
    finally:
        os.umask(before)
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert path.stat().st_mode & 0o777 == mode, path
    assert len(list(tmp_path.rglob("*.safetensors"))) == 4


# ---- what a run left ----------------------------------------------------------------------------

def test_a_finished_run_that_is_damaged_is_named(tmp_path, tiny_model, pairs_file):
    # Its adapter, as another run's start too; its flags, which hold beta.
    finish(tiny_model, pairs_file, tmp_path / "run", "--max_steps", "1")
    finish(tiny_model, pairs_file, tmp_path / "full", "--max_steps", "1", "--lora_r", "0")
    run, final = tmp_path / "run", tmp_path / "run/final"
    load_run(str(run))
    for file, load in (
            (final / "adapter_model.safetensors", lambda: load_run(str(run))),
            (final / "adapter_model.safetensors",
             lambda: load_adapter(load_llama(tiny_model), str(final))),
            (final / "adapter_config.json", lambda: load_run(str(run))),
            (final / "manifest.json", lambda: load_run(str(run))),
            (run / "args.json", lambda: load_run(str(run))),
            (tmp_path / "full/final/model.safetensors",
             lambda: load_llama(str(tmp_path / "full/final")))):
        raw, other = file.read_bytes(), lambda digit: b"%d" % (9 - int(digit[0]))
        file.write_bytes(raw[:-3] + bytes([raw[-3] ^ 1]) + raw[-2:] if file.suffix != ".json"
                         else re.sub(rb"\d", other, raw, count=1))
        with pytest.raises(ValueError, match=f"{file} (is damaged|has changed).*train it again, or "
                                             "remove .*/manifest.json if you changed it yourself"):
            load()
        file.write_bytes(raw)
