"""Ranks: sums over them, sharded layers, the stop, the schedule; a process left as it was."""
import random
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from conftest import ONE_THREAD
from helpers import kill_with_workers, run_ranks

import training.ranks
from training.ranks import Stop, flushes_denormals, learning_rate, running, set_up_processes


def state_of_process():
    """What a run may change for its whole process, and must put back."""
    return (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), flushes_denormals(),
            torch.get_rng_state().tolist(), random.getstate(), torch.is_grad_enabled(),
            torch.get_default_dtype())


# ---- several ranks ------------------------------------------------------------------------------

SUMS = """
import training.ranks
shapes, calls, all_reduce = [(3,), (2, 4), (4, 10), (1,), (5,)], [], dist.all_reduce

def counting(tensor):
    calls.append(tensor.numel())
    all_reduce(tensor)

def gradients(rank):
    generator = torch.Generator().manual_seed(rank)
    found = [torch.randint(-99, 99, shape, generator=generator).float() for shape in shapes]
    return [None if rank == 2 or (rank == 1 and i == 2) else g for i, g in enumerate(found)]

dist.all_reduce = counting
for bucket_bytes, expected in ((64, [11, 40, 9]), (64 * 2 ** 20, [60])):
    training.ranks.BUCKET_BYTES = bucket_bytes
    calls.clear()
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    for p, gradient in zip(parameters, gradients(rank)):
        p.grad = gradient
    extras = torch.tensor([1, 10, 100], dtype=torch.float64) * (rank + 1)
    totals = training.ranks.all_reduce_gradients_(parameters, extras)
    assert totals == [6, 60, 600], totals
    assert calls == expected, calls
    for i, p in enumerate(parameters):
        rows = [gradients(r)[i] for r in range(3)]
        assert torch.equal(p.grad, sum(row for row in rows if row is not None)), i
dist.all_reduce = all_reduce
"""
SHARDED_LAYERS = """
model = training.ranks.shard_layers(make_model(), "cpu")
with torch.no_grad():
    model(torch.arange(9))
for layer in model.model.layers:
    assert layer.mlp.up_proj.weight.to_local().numel() == 48 * 32 // 3
    assert layer.self_attn.q_proj.lora_A.shape == (4, 32)
assert model.lm_head.weight.shape == (97, 32)
"""


def test_three_ranks_sum_gradients_in_buckets_and_shard_layers(tmp_path):
    # Sums: whole numbers, exact in any order. Sizes in bytes 12, 32 | 160 | 4, 20 and 12 of extras:
    # three buckets of at most 64, where a larger tensor is alone; or one all-reduce for all. Rank 1
    # has no gradient of the third, rank 2 none at all. Every rank ends with the sums.
    # Layers are whole only while they run. Bug this catches: without a common root every layer is
    # FSDP's root, and roots stay gathered after their forward: all weights in every rank's memory.
    run_ranks(tmp_path, SUMS + SHARDED_LAYERS, ranks=3)


# ---- ranks that fail ----------------------------------------------------------------------------

def torchrun(script, *flags):
    """The command line of a script on two ranks."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
            *flags, str(script)]


FAILING = """
import os, signal, sys, time
from files.cli import run_cli
from training.ranks import gather, running

def main():
    with running() as (ranks, _):
        assert gather(ranks.rank) == [0, 1]
        attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
        if attempt == "0" and ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if attempt == "1" and ranks.rank == 1:
            raise ValueError("bad file on rank 1")
        if attempt == "1":
            time.sleep(60)                       # busy, and not in a collective
        if attempt == "2":
            raise ValueError("the same bad file everywhere")
        ranks.barrier()

run_cli(main)
"""


def test_what_ends_a_rank_ends_all_with_one_sentence_and_they_can_be_restarted(tmp_path):
    # Three attempts in one torchrun. Without a prefix for each in torchrun's store, a restarted
    # rank reads the address of a dead one: an error, or a wait for ever. A rank that is not in a
    # collective learns of the failure too; what torchrun shows last is the sentence.
    script = tmp_path / "script.py"
    script.write_text(FAILING)
    run = subprocess.run(torchrun(script, "--max-restarts=2"), env=ONE_THREAD, cwd=tmp_path,
                         capture_output=True, text=True, timeout=50)
    sentences = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    # after the SIGKILL of the first attempt torchrun may end the other rank before that notices
    assert sentences[:-2] in ([], [
        "error: another process of this run ended, and this one cannot go on without it; the same "
        "command continues"])
    assert sentences[-2:] == ["error: bad file on rank 1", "error: the same bad file everywhere"]
    report = run.stderr.rpartition("script.py FAILED")[2]
    assert report.count("exitcode  : 2 ") == 2, run.stderr
    assert report.splitlines()[-2] == "  traceback : error: the same bad file everywhere"
    assert "running()" not in run.stderr, "a traceback of ours"


def test_each_attempt_of_torchrun_has_keys_of_its_own(monkeypatch):
    store, stores = dist.HashStore(), []
    monkeypatch.setattr(dist, "rendezvous", lambda url, timeout: iter([(store, 0, 2)]))
    monkeypatch.setattr(dist, "init_process_group", lambda *_, store, **__: stores.append(store))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for attempt in range(3):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
        set_up_processes()
        assert not stores[-1].check(["address"])
        stores[-1].set("address", "here")


STOPPABLE = """
import os, sys, time
from pathlib import Path
from training.ranks import gather, running

with running() as (ranks, _), ranks.stop:
    Path(f"ready{ranks.rank}").touch()
    end = time.time() + 60
    while not any(gather(ranks.stop.signal)) and time.time() < end:
        time.sleep(0.01)
    Path(f"saved{ranks.rank}").touch()                   # that it can go on is another test's
    sys.exit(143)
"""


def test_a_rank_whose_torchrun_was_killed_before_it_joined_leaves(monkeypatch):
    # Bug this catches: ranks that were starting when torchrun was killed waited half an hour.
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                        "TORCHELASTIC_USE_AGENT_STORE": "True"}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(training.ranks, "CONNECT", timedelta(seconds=1))
    with pytest.raises(ValueError, match=f"nothing answers at 127.0.0.1:{port}, where torchrun"):
        set_up_processes()


def test_workers_whose_torchrun_is_killed_save_and_leave(tmp_path):
    # They would go on as orphans, and hold the output folder against the command that continues.
    script = tmp_path / "script.py"
    script.write_text(STOPPABLE)
    process = subprocess.Popen(torchrun(script), env=ONE_THREAD, cwd=tmp_path,
                               stderr=subprocess.DEVNULL)
    try:
        for name in ("ready", "saved"):
            deadline = time.time() + 40
            while time.time() < deadline and len([*tmp_path.glob(f"{name}?")]) < 2:
                time.sleep(0.02)
            assert len([*tmp_path.glob(f"{name}?")]) == 2, f"not {name}"
            process.kill()
    finally:
        kill_with_workers(process)


# ---- a process and its settings -----------------------------------------------------------------

@pytest.mark.parametrize("flushed", [False, True])
def test_a_run_leaves_the_process_as_it_found_it(flushed):
    torch.set_flush_denormal(flushed)
    try:
        before = state_of_process()
        for error in (None, ValueError, SystemExit):
            try:
                with running() as (ranks, _), ranks.stop:
                    assert (ranks.rank, ranks.world_size, ranks.is_first) == (0, 1, True)
                    assert flushes_denormals()
                    torch.manual_seed(5)
                    assert signal.getsignal(signal.SIGTERM) == ranks.stop.handle
                    if error:
                        raise error
            except (ValueError, SystemExit) as raised:
                assert type(raised) is error
            assert state_of_process() == before
    finally:
        torch.set_flush_denormal(False)


def test_the_first_signal_waits_for_the_step_and_a_second_ctrl_c_does_not():
    with Stop() as stop:
        assert stop.signal == 0
        signal.raise_signal(signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with Stop() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.signal == signal.SIGINT


def test_more_processes_than_gpus_is_a_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="local rank 2 has no GPU: there are 2, .*node=2"):
        training.ranks.own_device()


# ---- the schedule -------------------------------------------------------------------------------

def test_learning_rate_warms_up_linearly_and_ends_on_a_cosine_at_zero():
    rates = [learning_rate(step, 2.0, 4, 12) for step in range(12)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[8] == pytest.approx(1.0) and rates[11] == pytest.approx(2 * 0.03806, rel=1e-3)
