"""Whole runs through the command line: resume to the same bits, signals, ranks, metrics."""
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys

import pytest
import torch
from conftest import ONE_THREAD, ROOT
from helpers import (adapter_hash, command, finish, kill_with_workers, logged, train_flags,
                     wait_for_lines)

import train
from files.cli import run_cli
from step import METHODS, Method
from training.checkpoint import checkpoints
from training.ranks import flushes_denormals
from ulma import sft_loss


# SFT trains with dropout (0.1): the masks must come out the same after a resume. A line every 2
# steps and a checkpoint every 3: some lines average steps from before the resume and after it.
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_and_stopped_runs_end_with_the_same_adapter_bytes(tmp_path, tiny_model, pairs_file,
                                                                 ranks):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    flags = ("--method", "sft", "--num_train_epochs", "2", "--logging_steps", "2")
    finish(tiny_model, pairs_file, whole, *flags, ranks=ranks)
    rng = random.Random(ranks)
    for number, kind in enumerate((signal.SIGKILL, signal.SIGTERM)):
        process = subprocess.Popen(command(tiny_model, pairs_file, broken, *flags, ranks=ranks),
                                   cwd=ROOT, env=ONE_THREAD, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        wait_for_lines(process, broken / "metrics.jsonl", 2 + 4 * number + rng.randint(0, 2))
        if kind == signal.SIGTERM:
            process.terminate()                          # torchrun passes it on to its workers
        else:
            kill_with_workers(process)
        process.wait(timeout=60)
        assert not (broken / "final").exists(), "the run was over before the signal came"
    finish(tiny_model, pairs_file, broken, *flags, ranks=ranks)
    assert adapter_hash(whole) == adapter_hash(broken)
    assert logged(whole) == logged(broken)


def test_sigterm_saves_at_once_and_says_so(tmp_path, tiny_model, pairs_file):
    out = tmp_path / "run"
    process = subprocess.Popen(command(tiny_model, pairs_file, out, "--save_steps", "1000",
                                       "--num_train_epochs", "50"), cwd=ROOT, env=ONE_THREAD,
                               stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step 5/"):
            process.terminate()
            break
    rest = process.stdout.read()
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert "saved; the same command continues" in rest
    (step, _), = checkpoints(str(out))
    assert step == logged(out)[-1]["step"] >= 5


def finish_on_two_machines(*flags):
    """Two torchruns of one process each that meet at an address, with a common disk."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    machines = [subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1",
         "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", *map(str, flags)],
        cwd=ROOT, env=ONE_THREAD, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)]
    try:
        for machine in machines:
            _, errors = machine.communicate(timeout=120)
            assert machine.returncode == 0, errors
    finally:
        for machine in machines:
            kill_with_workers(machine)


def test_one_and_three_ranks_and_two_machines_log_the_same_numbers(tmp_path, tiny_model,
                                                                   pairs_file):
    # Metrics are sums and counts over ranks: a mean of means would differ on uneven shares. One of
    # three ranks makes the token ids, and one of two machines that share a disk.
    flags = ("--method", "ulma", "--max_steps", "6", "--num_train_epochs", "1")
    shown = finish(tiny_model, pairs_file, tmp_path / "3", *flags, ranks=3)
    assert shown.count("distinct prompts") == 1 and "token ids: those of" not in shown
    finish(tiny_model, pairs_file, tmp_path / "1", *flags)
    (tmp_path / "disk").mkdir()
    finish_on_two_machines(*train_flags(tiny_model, pairs_file, tmp_path / "disk/2", *flags))
    for folder in (tmp_path, tmp_path / "disk"):
        assert len(list(folder.glob("*tokens-*"))) == 1
    one = logged(tmp_path / "1", "tokens")
    for ranks in ("disk/2", "3"):
        for line, expected in zip(logged(tmp_path / ranks, "tokens"), one, strict=True):
            assert line.keys() == expected.keys()
            for key, value in expected.items():
                assert line[key] == pytest.approx(value, rel=2e-4, abs=2e-6), key


def test_the_same_command_twice_gives_the_same_bits_and_bf16_and_full_weights_run(
        tmp_path, tiny_model, pairs_file):
    for name in ("a", "b"):
        finish(tiny_model, pairs_file, tmp_path / name, "--method", "dpo", "--max_steps", "4")
    assert adapter_hash(tmp_path / "a") == adapter_hash(tmp_path / "b")
    assert logged(tmp_path / "a") == logged(tmp_path / "b")
    shown = finish(tiny_model, pairs_file, tmp_path / "bf16", "--bf16", "--max_steps", "4")
    assert "step 4/4" in shown and logged(tmp_path / "bf16")[-1]["loss"] > 0
    shown = finish(tiny_model, pairs_file, tmp_path / "full", "--lora_r", "0", "--max_steps", "4")
    assert "a copy that is not" in shown                 # says what the reference is
    assert (tmp_path / "full/final/model.safetensors").exists()


def test_a_non_finite_loss_stops_before_anything_is_updated(tmp_path, tiny_model, pairs_file,
                                                            capsys):
    # (z - h)² with log_z = 1e30 is infinite in float32 at the first step.
    with pytest.raises(SystemExit, match="2"):
        run_cli(lambda: finish(tiny_model, pairs_file, tmp_path / "run", "--method",
                               "pointwise_mse", "--log_z", "1e30"))
    assert "this update was not made, and nothing was" in capsys.readouterr().err
    assert not checkpoints(str(tmp_path / "run")) and not (tmp_path / "run/final").exists()


def test_a_run_leaves_the_process_as_it_found_it(tmp_path, tiny_model, pairs_file):
    # To its end, stopped by a signal, and ended by an error. A method of one's own is passed in;
    # the table of methods stays as it is.
    def stopping_loss(policy_logps, reference_logps, stream, objective):
        signal.raise_signal(signal.SIGTERM)
        return sft_loss(policy_logps)

    def state():
        return (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT),
                flushes_denormals(), torch.get_rng_state().tolist(), random.getstate(),
                torch.is_grad_enabled(), dict(os.environ), dict(METHODS))

    methods = METHODS | {"stopping": Method(stopping_loss, "positive", "none")}
    for handler in (signal.SIG_IGN, signal.default_int_handler):
        put_back = signal.signal(signal.SIGTERM, handler)
        try:
            before = state()
            for method, error in (("sft", None), ("stopping", SystemExit), ("none", ValueError),
                                  ("unlearning", ValueError)):
                data = __file__ if error is ValueError else pairs_file
                _, *argv = map(str, train_flags(tiny_model, data, tmp_path / "run", "--method",
                                                method, "--max_steps", "2"))
                if error is not ValueError:
                    shutil.rmtree(tmp_path / "run", ignore_errors=True)
                with pytest.raises(error) if error else contextlib.nullcontext():
                    train.main(argv, methods)
                assert state() == before
            assert [step for step, _ in checkpoints(str(tmp_path / "run"))] == [1]
        finally:
            signal.signal(signal.SIGTERM, put_back)


@pytest.mark.parametrize("flags", [
    "--method ulma --batch_size 3 --micro_tokens 40",
    "--method dpo --batch_size 1 --gradient_checkpointing",
    "--method reward_model --batch_size 3 --micro_tokens 90"],
    ids=lambda flags: flags.split()[1])
def test_sharded_layers_train_the_same_adapter(tiny_model, pairs_file, tmp_path, flags):
    # FSDP2 gathers a layer's weights on all ranks at a time: a rank with fewer micro-batches, with
    # no response that needs a reference, or with nothing at all (batches of one tree) must run as
    # many passes as the others, or they wait for ever. The log is that of one process.
    points = tmp_path / "points.jsonl"               # two good responses in three, one a prompt
    points.write_text("".join(
        json.dumps({"prompt": row["prompt"] + str(n), "completion": row["chosen"],
                    "label": n % 3 > 0}) + "\n"
        for n, row in enumerate(map(json.loads, pairs_file.read_text().splitlines()))))
    data = points if "ulma" in flags else pairs_file
    flags = [*flags.split(), "--max_steps", "12"]
    # a rank's dropout masks, of methods without a reference, are its own: as many ranks as below
    finish(tiny_model, data, tmp_path / "whole", *flags, ranks=2 if "reward_model" in flags else 1)
    finish(tiny_model, data, tmp_path / "sharded", *flags, "--fsdp", ranks=2)
    whole, sharded = logged(tmp_path / "whole"), logged(tmp_path / "sharded")
    assert len(whole) == 12
    for line, other in zip(whole, sharded, strict=True):
        assert line == pytest.approx(other, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("warmup, rates", [("0.1", [1.5e-3, 3e-3]), ("1.5", [1.5e-3, 3e-3]),
                                           ("0.05", [3e-3])])
def test_no_step_of_a_warm_up_is_above_the_peak(tiny_model, pairs_file, tmp_path, warmup, rates):
    # 11 steps: a tenth of them is 1.1, rounded up to 2; unrounded the second was 1.82 times the peak.
    finish(tiny_model, pairs_file, tmp_path / "run", "--method", "sft", "--learning_rate", "3e-3",
           "--max_steps", "11", "--warmup_steps", warmup)
    found = [line["lr"] for line in logged(tmp_path / "run")]
    assert found[:len(rates)] == pytest.approx(rates) and max(found) == pytest.approx(3e-3)
