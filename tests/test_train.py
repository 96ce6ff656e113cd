"""Whole runs through the command line: resume to the same bits, signals, ranks, metrics."""
import hashlib
import json
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import conftest
import pytest
import torch
from conftest import QUIET, ROOT, launch

from checkpoint import checkpoints, load_checkpoint, save_checkpoint, write_folder
from train import learning_rate, plan_batches
from trees import Tree


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory):
    """120 short pairs over 60 prompts."""
    path, rng = tmp_path_factory.mktemp("data") / "pairs.jsonl", random.Random(0)
    words = "the a cat dog sat ran on under mat hill and then some more".split()

    def say(low, high):
        return " ".join(rng.choices(words, k=rng.randint(low, high)))

    path.write_text("".join(json.dumps({"prompt": say(2, 9), "chosen": say(1, 12) + " yes",
                                        "rejected": say(1, 12) + " no"}) + "\n"
                            for _ in range(120)))
    return path


def flags_of(model, data, out, *flags):
    return ("train.py", "--model_name_or_path", model, "--dataset", data, "--output_dir", out,
            "--batch_size", "8", "--learning_rate", "1e-3", "--micro_tokens", "128",
            "--save_steps", "3", "--logging_steps", "1", *flags)


def command(*args, ranks=1):
    return launch(*flags_of(*args), ranks=ranks)


def finish(*args, ranks=1):
    return conftest.finish(*flags_of(*args), ranks=ranks)


def adapter_hash(out):
    return hashlib.sha256((Path(out) / "final/adapter_model.safetensors").read_bytes()).hexdigest()


def logged(out, *without):
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("tokens_per_s", *without)}
            for line in lines]


# SFT trains with dropout (0.1): the masks must come out the same after a resume.
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_and_stopped_runs_end_with_the_same_adapter_bytes(tmp_path, tiny_model, pairs_file,
                                                                 ranks):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    flags = ("--method", "sft", "--num_train_epochs", "2")
    finish(tiny_model, pairs_file, whole, *flags, ranks=ranks)
    rng = random.Random(ranks)
    for number, kind in enumerate((signal.SIGKILL, signal.SIGTERM)):
        process = subprocess.Popen(command(tiny_model, pairs_file, broken, *flags, ranks=ranks),
                                   cwd=ROOT, env=QUIET, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        target = 4 + 8 * number + rng.randint(0, 5)      # stop once this many steps are logged
        deadline = time.time() + 120
        while time.time() < deadline and process.poll() is None:
            file = broken / "metrics.jsonl"
            if file.exists() and file.read_text().count("\n") >= target:
                break
            time.sleep(0.01)
        if kind == signal.SIGTERM:
            process.terminate()                          # torchrun passes it on to its workers
        else:                                            # but its workers would outlive a kill
            subprocess.run(["pkill", "-9", "-f", str(broken)])
        process.wait(timeout=60)
        assert not (broken / "final").exists(), "the run was over before the signal came"
    finish(tiny_model, pairs_file, broken, *flags, ranks=ranks)
    assert adapter_hash(whole) == adapter_hash(broken)
    assert logged(whole) == logged(broken)


def test_sigterm_saves_at_once_and_says_so(tmp_path, tiny_model, pairs_file):
    out = tmp_path / "run"
    process = subprocess.Popen(command(tiny_model, pairs_file, out, "--save_steps", "1000",
                                       "--num_train_epochs", "50"), cwd=ROOT, env=QUIET,
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


def test_one_two_and_three_ranks_log_the_same_numbers(tmp_path, tiny_model, pairs_file):
    # Metrics are sums and counts over ranks: a mean of means would differ on uneven shares.
    runs = []
    for ranks in (1, 2, 3):
        finish(tiny_model, pairs_file, tmp_path / str(ranks), "--max_steps", "6",
               "--num_train_epochs", "1", "--method", "ulma", ranks=ranks)
        runs.append(logged(tmp_path / str(ranks), "tokens"))
    for run in runs[1:]:
        for line, expected in zip(run, runs[0], strict=True):
            assert line.keys() == expected.keys()
            for key, value in expected.items():
                assert line[key] == pytest.approx(value, rel=2e-4, abs=2e-6), key


def test_two_machines_are_two_ranks(tmp_path, tiny_model, pairs_file):
    # Two torchruns of one process each meet at an address, as on two machines with a common disk.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = flags_of(tiny_model, pairs_file, tmp_path / "two", "--method", "ulma", "--max_steps", 4)
    machines = [subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1",
         "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", *map(str, flags)],
        cwd=ROOT, env=QUIET, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)]
    try:
        for machine in machines:
            _, errors = machine.communicate(timeout=120)
            assert machine.returncode == 0, errors
    finally:
        for machine in machines:
            machine.kill()
    finish(tiny_model, pairs_file, tmp_path / "one", "--method", "ulma", "--max_steps", 4)
    for line, expected in zip(logged(tmp_path / "two", "tokens"),
                              logged(tmp_path / "one", "tokens"), strict=True):
        assert line == pytest.approx(expected, rel=2e-4, abs=2e-6)


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
    from test_step import make_model, trainable
    model = make_model(torch.float32)
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-3)
    sum(p.square().sum() for p in trainable(model).values()).backward()
    optimizer.step()
    for step in (1, 2, 3):
        save_checkpoint(str(tmp_path), step, model, optimizer, "base", keep=2)
    assert [step for step, _ in checkpoints(str(tmp_path))] == [2, 3]
    assert load_checkpoint(str(tmp_path / "checkpoint-3"), model, optimizer) == 3
    file = tmp_path / "checkpoint-3/optimizer.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="optimizer.safetensors is damaged"):
        load_checkpoint(str(tmp_path / "checkpoint-3"), model, optimizer)


def test_a_non_finite_loss_stops_before_anything_is_updated(tmp_path, tiny_model, pairs_file):
    # (z - h)² with log_z = 1e30 is infinite in float32 at the first step.
    run = subprocess.run(command(tiny_model, pairs_file, tmp_path / "run", "--method",
                                 "pointwise_mse", "--log_z", "1e30"), cwd=ROOT, env=QUIET,
                         capture_output=True, text=True, timeout=120)
    assert run.returncode == 1 and "this update was not made, and nothing was" in run.stderr
    assert not checkpoints(str(tmp_path / "run")) and not (tmp_path / "run/final").exists()


def test_learning_rate_warms_up_linearly_and_ends_on_a_cosine_at_zero():
    rates = [learning_rate(step, 2.0, 4, 12) for step in range(12)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[8] == pytest.approx(1.0) and rates[11] == pytest.approx(2 * 0.03806, rel=1e-3)


def test_a_plan_is_whole_epochs_then_a_fraction():
    trees = [Tree([1], [[2]], [1.0], []) for _ in range(10)]
    plan = plan_batches(trees, "all", 4, 2.0, -1, seed=0)
    assert [len(batch) for batch in plan] == [4, 4, 2, 4, 4, 2]
    assert sorted(sum(plan[:3], [])) == list(range(10)) and plan[:3] != plan[3:]
    assert len(plan_batches(trees, "all", 4, 1.5, -1, seed=0)) == 4     # half of six steps is 4.5
    assert plan_batches(trees, "all", 4, 1.0, 5, seed=0) == plan[:5]    # max_steps goes on


@pytest.mark.parametrize("flags", [
    "--method ulma --batch_size 3 --micro_tokens 40",
    "--method dpo --batch_size 1 --gradient_checkpointing",
    "--method reward_model --lora_dropout 0 --batch_size 3 --micro_tokens 90"],
    ids=lambda flags: flags.split()[1])
def test_sharded_layers_train_the_same_adapter(tiny_model, pairs_file, tmp_path, flags):
    # FSDP2 gathers a layer's weights on all ranks at a time: a rank with fewer micro-batches, with
    # no response that needs a reference, or with nothing at all (batches of one tree) must run as
    # many passes as the others, or they wait for ever. The log is that of one process, which runs
    # here in a second (two ranks of DDP end with the same bits).
    points = tmp_path / "points.jsonl"               # two good responses in three, one a prompt
    points.write_text("".join(
        json.dumps({"prompt": row["prompt"] + str(n), "completion": row["chosen"],
                    "label": n % 3 > 0}) + "\n"
        for n, row in enumerate(map(json.loads, pairs_file.read_text().splitlines()))))
    data = points if "ulma" in flags else pairs_file
    flags = [*flags.split(), "--max_steps", "12"]
    finish(tiny_model, data, tmp_path / "whole", *flags)
    finish(tiny_model, data, tmp_path / "sharded", *flags, "--fsdp", ranks=2)
    whole, sharded = logged(tmp_path / "whole"), logged(tmp_path / "sharded")
    assert len(whole) == 12
    for line, other in zip(whole, sharded, strict=True):
        assert line == pytest.approx(other, rel=1e-3, abs=1e-5)


def test_a_sharded_layer_is_whole_only_while_it_runs(tmp_path):
    # Bug this catches: without a common root every layer is FSDP's root, and roots stay gathered
    # after their forward: the whole model in the memory of every rank.
    script = tmp_path / "ranks.py"
    script.write_text(f"""
import sys, torch
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from loop import set_up_processes, shard_layers
from test_step import make_model
set_up_processes()
model = shard_layers(make_model(), "cpu")
with torch.no_grad():
    model(torch.arange(9))
for layer in model.model.layers:
    assert layer.mlp.up_proj.weight.to_local().numel() == 48 * 32 // 2
    assert layer.self_attn.q_proj.lora_A.shape == (4, 32)
assert model.lm_head.weight.shape == (97, 32)
torch.distributed.barrier()
""")
    run = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                          "--nproc_per_node=2", str(script)], env=QUIET, capture_output=True,
                         text=True, timeout=120)
    assert run.returncode == 0, run.stderr
