"""train.py itself on a GPU, at a small size: each kind of run, what it agrees with, what it never
does. `make gpu` runs this file; without a GPU all of it is skipped.
"""
import json
import math
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import conftest
import pytest
import torch
from conftest import ONE_THREAD, ROOT, save_tiny_model
from helpers import finish, flat_gradient, logged, make_trees, train_flags, usable
from torch.testing import assert_close

from files.cli import run_cli
from generate import generate
from kernels import choose_linear_logps
from kernels.attention import ATTENTIONS
from lora import add_lora, add_score_head, lora_disabled
from model import Llama, LlamaConfig
from step import METHODS, Compute, Objective, batch_counts, micro_batches
from study import real_report
from train import accumulate_gradient
from training import start_check
from training.checkpoint import checkpoints
from training.ranks import all_reduce_gradients_, shard_layers

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU (see make gpu)")
CHECKED = {"RMSNorm", "rotary", "SwiGLU", "LoRA", "attention", "log-probs"}
PRECISIONS = {"float32": (), "bf16": ("--bf16",)}
each_precision = pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_tokenizer) -> str:
    """Heads of 16; two query heads read one key head."""
    return save_tiny_model(tmp_path_factory.mktemp("gpu-model"), tiny_tokenizer, hidden_size=64,
                           intermediate_size=96)


@pytest.fixture(scope="module")
def cpu_run(tmp_path_factory, model, pairs_file):
    """30 steps in float32 by a process that sees no GPU: the flags, the logged lines."""
    out, flags = tmp_path_factory.mktemp("cpu") / "run", (
        "--method", "dpo", "--max_steps", "30", "--num_train_epochs", "3")
    run = subprocess.run(conftest.launch(*train_flags(model, pairs_file, out, *flags)),
                         env=ONE_THREAD | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True,
                         text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return flags, logged(out)


def assert_finite_run(out, steps):
    lines = logged(out)
    assert lines[-1]["step"] == steps and (Path(out) / "final").is_dir()
    assert all(math.isfinite(value) for line in lines for value in line.values())


# ---- every kind of run --------------------------------------------------------------------------

@each_precision
@pytest.mark.parametrize("method", ["ulma", "dpo", "d2o", "reward_model"])
def test_a_run_is_checked_at_its_start_and_ends(method, precision, tmp_path, model, pairs_file):
    # D2O samples its anchors with generate.py: 16 new tokens.
    sampling = ("--num_anchors", "2", "--anchor_tokens", "16") if method == "d2o" else ()
    out = tmp_path / "run"
    shown = finish(model, pairs_file, out, "--method", method, "--max_steps", "4", *precision,
                   *sampling)
    assert "checked against plain torch, relative errors: " in shown
    assert_finite_run(out, 4)
    flags = json.loads((out / "args.json").read_text())
    assert flags["start_check"].keys() == CHECKED - (
        {"log-probs"} if method == "reward_model" else set())
    assert flags["device"] == torch.cuda.get_device_name()


@each_precision
def test_ppo_runs_on_a_reward_model(precision, tmp_path, model, pairs_file):
    finish(model, pairs_file, tmp_path / "reward", "--method", "reward_model", "--max_steps", "2",
           *precision)
    conftest.finish("rlhf.ppo", "--reward_model", tmp_path / "reward", "--output_dir",
                    tmp_path / "ppo", "--batch_size", "4", "--max_steps", "2",
                    "--max_new_tokens", "12")
    assert_finite_run(tmp_path / "ppo", 2)
    flags = json.loads((tmp_path / "ppo/args.json").read_text())
    assert flags["start_check"].keys() == CHECKED


def test_the_real_study_runs(tmp_path, model, pairs_file, monkeypatch):
    # What is measured comes from the device, what it is compared with from files.
    monkeypatch.setattr(real_report, "pyplot", lambda: None)
    conftest.finish("study.real", "first", "more", "--model", model, "--hh", pairs_file, "--pairs",
                    16, "--held_out", 32, "--answers", 4, "--new_tokens", 4, "--max_length", 160,
                    "--out", tmp_path / "out", "--work", tmp_path / "work", "--bf16")
    rows = [json.loads(line) for line in (tmp_path / "out/real.jsonl").read_text().splitlines()]
    assert len(rows) == 2 + 7 + 4
    assert {row["device"] for row in rows} == {torch.cuda.get_device_name()}


@pytest.mark.parametrize("method", ["dpo", "reward_model"])
def test_what_a_run_held_out_is_evaluated(method, tmp_path, model, pairs_file):
    out = tmp_path / "run"
    finish(model, pairs_file, out, "--method", method, "--max_steps", "2", "--held_out", "0.3",
           "--eval_steps", "1")
    assert "reward margin" in conftest.finish("eval", out)


def test_full_weights_and_checkpointed_layers_train(tmp_path, model, pairs_file):
    finish(model, pairs_file, tmp_path / "full", "--lora_r", "0", "--max_steps", "3")
    finish(model, pairs_file, tmp_path / "again", "--gradient_checkpointing", "--max_steps", "3")
    finish(model, pairs_file, tmp_path / "kept", "--max_steps", "3")
    for name in ("full", "again"):
        assert_finite_run(tmp_path / name, 3)
    for mine, other in zip(logged(tmp_path / "again"), logged(tmp_path / "kept"), strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5)


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(tmp_path, model, pairs_file):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(model, pairs_file, whole, "--max_steps", "6")
    shutil.copytree(whole, broken)
    shutil.rmtree(broken / "final")                    # as if it had been killed in step 5
    for step, folder in checkpoints(str(broken)):
        if step > 3:
            shutil.rmtree(folder)
    finish(model, pairs_file, broken, "--max_steps", "6")
    for mine, other in zip(logged(broken), logged(whole), strict=True):
        # a GPU adds up responses in any order; a moment that was lost would be seen in 1e-2
        assert mine == pytest.approx(other, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("part", ["attention", "rms_norm", "lora_linear"])
def test_a_run_whose_kernel_is_wrong_ends_before_its_first_step(part, tmp_path, model, pairs_file,
                                                                monkeypatch, capsys):
    def spoiled(*arguments):
        outputs = function(*arguments)
        return 1.3 * outputs if torch.is_tensor(outputs) else tuple(1.3 * t for t in outputs)
    function = getattr(start_check, part)
    monkeypatch.setattr(start_check, part, spoiled)
    with pytest.raises(SystemExit) as ended:
        run_cli(lambda: finish(model, pairs_file, tmp_path / "run"))
    assert ended.value.code == 2 and "is wrong on this device" in capsys.readouterr().err
    assert not (tmp_path / "run/args.json").exists()


# ---- what it must agree with --------------------------------------------------------------------

@pytest.mark.parametrize("flags, bound", [
    ((), 2e-4), (("--kernels", "torch"), 2e-4), (("--bf16",), 5e-3)], ids=["tree", "dense", "bf16"])
def test_thirty_steps_follow_the_cpu_in_float32(flags, bound, tmp_path, model, pairs_file, cpu_run):
    # Losses and rewards of every step. float32 sums in another order, 30 updates of 1e-3: 2e-4 of
    # the loss; bfloat16 weights are another model: 5e-3 (on a CPU they give 6e-4).
    steps, expected = cpu_run
    finish(model, pairs_file, tmp_path / "gpu", *steps, *flags)
    lines = list(zip(logged(tmp_path / "gpu"), expected, strict=True))
    assert len(lines) == 30 and lines[-1][1]["loss"] < lines[0][1]["loss"]
    for mine, other in lines:
        assert mine["tokens"] == other["tokens"]
        assert mine["loss"] == pytest.approx(other["loss"], rel=bound), mine["step"]
        assert mine["rewards/positive"] == pytest.approx(
            other["rewards/positive"], rel=10 * bound, abs=bound), mine["step"]


def test_decoding_gives_the_cpus_tokens():
    # Greedy, float32, prompts of several lengths; a row's bits may differ, its largest logit not.
    small, prompts = small_model(), [[1, *range(3, 3 + n)] for n in (1, 5, 17, 40)]
    found = [generate(small.to(device), prompts, 30, eos_id=None, temperature=0)
             for device in ("cpu", "cuda")]
    assert found[0] == found[1] and len({tuple(ids) for ids in found[0]}) == 4


def small_model() -> Llama:
    torch.manual_seed(0)
    return Llama(LlamaConfig(vocab_size=97, hidden_size=64, intermediate_size=96,
                             num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2))


def small_step(method="ulma", attention="tree", dtype=torch.float32):
    """A model, and a function that runs forward and backward of a batch in several micro-batches,
    whose streams it prepares."""
    device = torch.device("cuda", 0)
    small = small_model()
    generator = torch.Generator().manual_seed(0)
    add_lora(small, r=4, alpha=8, dropout=0.0)
    if METHODS[method].reward_model:
        add_score_head(small)
    for name, p in small.named_parameters():
        if name.endswith("lora_B"):
            p.data.normal_(std=0.05, generator=generator)
    small.to(dtype).to(device)
    trees = usable(make_trees(), METHODS[method].trains_on)
    compute = Compute(device, 60, choose_linear_logps("auto", "cuda"), attention)
    objective = Objective(METHODS[method], alpha=0.1)

    def step(trained=small):
        trained.zero_grad()
        return accumulate_gradient(
            trained, partial(lora_disabled, trained),
            micro_batches(trees, objective.method, compute), batch_counts(trees), objective,
            compute)
    return small, step


@pytest.fixture
def one_nccl_rank():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1,
                                         device_id=torch.device("cuda", 0))
    yield
    torch.distributed.destroy_process_group()


def test_one_rank_over_nccl_sharded_or_not_has_the_gradient_of_a_process(one_nccl_rank):
    # --fsdp is refused on one rank, so its parts are called here. What NCCL sends is not among them:
    # a group of one copies its shard.
    torch.manual_seed(0)
    small, step = small_step()
    losses = step()
    expected = flat_gradient(small).clone()
    reduced = all_reduce_gradients_([p for p in small.parameters() if p.requires_grad], losses)
    assert_close(flat_gradient(small), expected, rtol=0, atol=0)
    assert reduced == pytest.approx(losses.tolist(), rel=1e-6)
    device = torch.device("cuda", 0)
    sharded = shard_layers(small.cpu(), device)
    assert start_check.check_start(sharded, make_trees(), Compute(
        device, 60, choose_linear_logps("auto", "cuda"), "tree")).keys() == CHECKED
    assert_close(step(sharded), losses, rtol=1e-5, atol=1e-6)
    assert_close(flat_gradient(sharded), expected, rtol=1e-4, atol=1e-6)


def test_torchrun_starts_a_run(tmp_path, model, pairs_file):
    flags = train_flags(model, pairs_file, tmp_path / "run", "--max_steps", "2")
    _, *command = conftest.launch(*flags)
    run = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                          "--nproc_per_node=1", *command], env=ONE_THREAD, capture_output=True,
                         text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert_finite_run(tmp_path / "run", 2)


# ---- what it must not do ------------------------------------------------------------------------

@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("method", ["ulma", "dpo", "sft", "reward_model", "d2o"])
def test_a_step_never_waits_for_the_device(method, attention):
    # Preparing streams included, so the next one is made while the device computes. The first step
    # compiles kernels, which may wait.
    _, step = small_step(method, attention)
    expected = step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # a GPU adds up responses in any order: sums of 0.03 differ by 2e-6
    assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_no_nan_in_64_pairs_at_7b_width(hh_file, shared_data):
    # The step in which cuDNN's masked attention gave NaN (see kernels/attention.py), with two layers.
    # Both ways of attention agree in the loss and its gradient.
    sys.path.append(str(ROOT / "bench"))
    import breakdown as bench
    bench.SIZES["7b, 2 layers"] = bench.SIZES["7b"] | {"num_hidden_layers": 2}
    wide = bench.make_model("7b, 2 layers", torch.bfloat16, "cuda")
    trees = bench.hh_trees(hh_file, str(shared_data / "llama2_tokenizer/tokenizer.model"), 64)
    losses, gradients = [], []
    for attention in ATTENTIONS:
        compute = Compute(torch.device("cuda", 0), 8192, choose_linear_logps("auto", "cuda"),
                          attention)
        wide.zero_grad()
        totals = accumulate_gradient(
            wide, partial(lora_disabled, wide), micro_batches(trees, METHODS["dpo"], compute),
            batch_counts(trees), Objective(METHODS["dpo"]), compute)
        losses.append(float(totals[0]))
        gradients.append(flat_gradient(wide).clone())
        assert gradients[-1].isfinite().all() and gradients[-1].norm() > 0
    assert 0.5 < losses[0] < 1 and losses[1] == pytest.approx(losses[0], rel=1e-2)
    dense, tree = gradients
    assert float((tree - dense).norm() / dense.norm()) < 0.05
