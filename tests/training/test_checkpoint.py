"""Checkpoints are whole or absent, the newest few, and never read damaged."""
from pathlib import Path

import pytest
import torch
from helpers import make_model

from files.text import write_folder
from training.checkpoint import (RunFolder, checkpoints, load_checkpoint, save_checkpoint,
                                 trainable)


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


def test_a_flipped_byte_in_a_checkpoint_is_named(tmp_path):
    model = make_model(torch.float32)
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-3)
    sum(p.square().sum() for p in trainable(model).values()).backward()
    optimizer.step()
    folder = RunFolder(str(tmp_path), "base", save_steps=1, save_total_limit=2)
    for step in (1, 2, 3):
        assert save_checkpoint(folder, step, model, optimizer) == f"{tmp_path}/checkpoint-{step}"
    assert [step for step, _ in checkpoints(str(tmp_path))] == [2, 3]
    assert load_checkpoint(str(tmp_path / "checkpoint-3"), model, optimizer) == 3
    file = tmp_path / "checkpoint-3/optimizer.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="optimizer.safetensors is damaged"):
        load_checkpoint(str(tmp_path / "checkpoint-3"), model, optimizer)
