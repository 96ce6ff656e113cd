"""Every script of bench/ at its smallest size: it runs, and its checks find what is wrong."""
import dataclasses
import json
import math
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import ONE_THREAD, ROOT
from scripts import load_script, run_script, write_hh

from lora import lora_disabled
from packing import Tree
from step import METHODS, Compute, Objective, batch_counts, micro_batches
from train import accumulate_gradient

ADAPTER_BYTES = 4 * 2 * 2 * 2 * 8 * 64     # size tiny: float32, layers, q and v, A and B, r, D


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tiny_tokenizer) -> list[str]:
    """The flags of an HH file and a tokenizer."""
    return ["--dataset", write_hh(tmp_path_factory.mktemp("hh")), "--tokenizer", tiny_tokenizer]


# ---- step.py ------------------------------------------------------------------------------------

def test_step_measures_ours_and_losses_agree(inputs, tmp_path):
    names = ["ours-d2o", "ours-d2o-unshared"]
    out = tmp_path / "step.json"
    run = subprocess.run(
        [sys.executable, str(ROOT / "bench/step.py"), *inputs, "--size", "tiny", "--pairs", "2",
         "--repeats", "1", "--threads", "1", "--precision", "fp32", "--only", *names,
         "--out", str(out)], capture_output=True, text=True, env=ONE_THREAD)
    assert run.returncode == 0, run.stderr
    report = json.loads(out.read_text())
    assert [row["implementation"] for row in report["results"]] == names
    for row in report["results"]:            # near the reference: -log sigmoid of little
        first, second = row["losses"]
        assert first == pytest.approx(math.log(2), abs=0.05) and second < first
        assert row["seconds"][1] == row["median_seconds"]
        assert row["peak_gb"] > 0 and row["share_of_matrix_rate"] > 0
    assert report["largest_relative_difference_of_losses"]["d2o fp32"] < 1e-5
    assert str(tmp_path) not in out.read_text()          # of files only their names


def test_step_ends_where_losses_differ(capsys):
    script = load_script("step")
    rows = [{"implementation": name, "precision": "fp32", "losses": losses}
            for name, losses in (("ours-dpo", [0.7, 0.6]), ("trl", [0.7, 0.60012]))]
    differences = script.loss_differences(rows)
    assert differences == {"dpo fp32": pytest.approx(2e-4)}
    with pytest.raises(SystemExit, match="losses of dpo fp32 differ by 2.0e-04"):
        script.show({"results": rows, "goals": [],
                     "largest_relative_difference_of_losses": differences}, rows)


def test_unshared_prompts_give_the_gradient_of_shared_ones():
    # DPO, where a pair of the wrong responses would change the gradient's sign or size
    script = load_script("ours_step")
    trees = [Tree([1, 5, 6], [[7, 8, 2], [9, 2]], [1.0, 0.0], [(0, 1)]),
             Tree([1, 10], [[11, 2], [12, 13, 14, 2], [15, 2]], [0.0, 1.0, 0.5],
                  [(1, 0), (1, 2), (2, 0)])]
    objective, gradients, tokens = Objective(METHODS["dpo"]), [], []
    for micro_tokens in (100, 1):                         # both trees in a stream, and one in each
        compute = Compute(micro_tokens=micro_tokens)
        for streams in (micro_batches(trees, objective.method, compute),
                        script.unshared_batches(trees, compute)):
            model = script.make_model("tiny")
            totals = accumulate_gradient(model, partial(lora_disabled, model), streams,
                                         batch_counts(trees), objective, compute)
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()
                                        if p.requires_grad]))
            tokens.append(int(totals[1]))
    assert tokens == [6 + 7, 9 + 11] * 2                  # one and two prompts of 3 and 2 more
    for micro_tokens, count in ((20, 1), (19, 2)):
        streams = list(script.unshared_batches(trees, Compute(micro_tokens=micro_tokens)))
        assert len(streams) == count
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-3, atol=1e-9)


# ---- breakdown.py, scale.py ---------------------------------------------------------------------

def test_breakdown_of_a_step(inputs, tmp_path, monkeypatch, capsys):
    script, out = load_script("breakdown"), tmp_path / "breakdown.json"
    monkeypatch.setattr(script, "matrix_rate", lambda device: (2e9, 4e9))
    run_script(script, monkeypatch, *inputs, "--size", "tiny", "--pairs", 2, "--method", "ulma",
               "--repeats", 2, "--out", out)
    result = json.loads(out.read_text())
    assert result["shares_of_matrix_rate"] == pytest.approx(
        [result["necessary_gflop"] / seconds / 2 for seconds in result["seconds"]])
    assert result["self_s_by_kind"].keys() >= {"matrix products", "attention"}
    assert "ulma, 2 HH pairs" in capsys.readouterr().out


@pytest.mark.parametrize("kernel, kind", [
    ("nvjet_sm90_tst_256x144_64x4_2x1_v_bz_coopA_TNT", "matrix products"),
    ("_swiglu_forward", "norms, rotary, SwiGLU"), ("_forward", "attention"),
    ("_backward_kv", "attention"), ("_logp_rows", "softmax, logs"),
    ("softmax_warp_forward", "softmax, logs"),
    ("void at::native::vectorized_elementwise_kernel<8, at::native::CUDAFunctor_add<c10::BFloat16>",
     "sums of gradients"),
    ("void at::native::elementwise_kernel<128, 4, at::native::direct_copy_kernel_cuda",
     "copies, casts"), ("Memcpy DtoD (Device -> Device)", "copies, casts"),
    ("void another", "everything else")])
def test_kernels_of_a_gpu_have_a_kind(kernel, kind):
    script = load_script("breakdown")
    assert script.kind_of(kernel, script.GPU_KINDS) == kind


def test_the_rate_of_matrix_products_is_a_mean_and_a_maximum():
    mean, fastest = load_script("breakdown").matrix_rate(seconds=0.1)
    assert 1e8 < mean <= fastest


def test_necessary_operations_by_hand():
    # A prompt of 3 tokens, responses of 2 and 4: 3 + 1 + 3 = 7 tokens, of which 1 + 1 + 3 = 5
    # predict 2 + 4 = 6 labels. A token sees itself and what is before it in its prompt and
    # response: 1 + 2 + 3, 4, 4 + 5 + 6 = 25 pairs of positions.
    script = load_script("breakdown")
    model = script.make_model("tiny")                            # D 64, L 2, F 176, V 32000
    trees = [Tree([1, 5, 6], [[7, 2], [8, 9, 10, 2]], [1.0, 0.0], [(0, 1)])]
    mlp, behind = 3 * 64 * 176, 64 * 64 + 3 * 64 * 176
    before = 2 * (4 * 64 * 64 + mlp) - behind
    products = 2 * (before * 7 + behind * 5 + 32000 * 64 * 6)
    attention = 4 * 25 * 64 * 2
    assert script.necessary_flops(model, "dpo", trees) == 3 * products + 4.5 * attention
    # ULMA's reference is needed for the second response only: 6 tokens, 4 rows, 4 labels, 21 pairs
    reference = 2 * (before * 6 + behind * 4 + 32000 * 64 * 4) + 4 * 21 * 64 * 2
    assert script.necessary_flops(model, "ulma", trees) == (
        2 * products + 3.5 * attention + reference)
    assert script.necessary_flops(model, "sft", trees) == 2 * products + 3.5 * attention


def test_scale_counts_the_bytes_that_ranks_reduce(inputs, tmp_path, monkeypatch, capsys):
    script, out = load_script("scale"), tmp_path / "scale.json"
    run_script(script, monkeypatch, *inputs, "--model_size", "tiny", "--sizes", 1, 2,
               "--ranks", 2, "--repeats", 1, "--out", out)
    result = json.loads(out.read_text())
    assert [row["batch"] for row in result["batch_sizes"]] == [1, 2]
    ranks, = result["ranks"]
    assert ranks["adapter_bytes"] == ADAPTER_BYTES
    # one all-reduce: gradients, loss, tokens, sum and count of 5 metrics, in float32
    assert ranks["reduced_bytes_per_step"] == ADAPTER_BYTES + 4 * (2 + 2 * 6)
    assert len(ranks["seconds"]) == 1 and ranks["efficiency"] == 1.0


# ---- attention.py, kernel.py --------------------------------------------------------------------

def test_attention_is_right_before_it_is_timed(inputs, tmp_path, monkeypatch, capsys):
    script, out = load_script("attention"), tmp_path / "attention.json"
    run_script(script, monkeypatch, *inputs, "--tokens", 256, "--repeats", 1, "--out", out)
    result = json.loads(out.read_text())
    assert result["errors"]["dense"] == [0.0] * 4 and result["errors"]["flex"][0] < 1e-6
    assert result["ms_forward_backward"].keys() == {"dense", "flex"} == result["ms_prepare"].keys()
    with pytest.raises(SystemExit, match="flex is wrong"):
        script.check({"dense": [1e-3, 1e-3], "flex": [1e-3, 3e-3]})


def test_layers_are_right_before_they_are_timed(tmp_path, monkeypatch, capsys):
    script, out = load_script("layers"), tmp_path / "layers.json"
    run_script(script, monkeypatch, "--tokens", 8, "--repeats", 1, "--out", out)
    rows = json.loads(out.read_text())["rows"]
    # D 64, F 176, 8 tokens, float32: RMSNorm reads x and added, writes their sum and its norm
    assert [row["forward"]["bytes"] for row in rows] == [8192, 8192, 16896, 6144]
    assert all(row["errors"]["ours"] < 1e-6 for row in rows)
    *_, update = script.make_cases(8, 64, 176, 4, torch.float32, "cpu")
    wrong = dataclasses.replace(update, ours=lambda *inputs: 1.001 * update.plain(*inputs))
    with pytest.raises(SystemExit, match="LoRA's update is wrong"):
        script.check(wrong)


def test_kernel_compares_losses_and_gradients_first(tmp_path, monkeypatch, capsys):
    script, out = load_script("kernel"), tmp_path / "kernel.json"
    monkeypatch.setattr(torch, "compile", lambda function: function)       # takes seconds
    run_script(script, monkeypatch, "--rows", 128, "--width", 16, "--vocab", 100, "--repeats", 1,
               "--out", out)
    rows = {(row["task"], row["contestant"]): row for row in json.loads(out.read_text())["rows"]}
    for task in ("dpo", "ulma"):
        for name in ("ours, torch", "eager"):
            row = rows[task, name]
            assert row["loss error"] < 1e-5 and row["gradient error"] < 1e-5
            assert row["median ms"] > 0


def test_kernel_times_no_wrong_gradient():
    script = load_script("kernel")
    data = script.make_rows(128, 16, 100, torch.float32, "cpu")
    wrong = script.from_logps(script.one_after_the_other(
        lambda hidden, weight, labels: 1.001 * script.eager(hidden, weight, labels)))
    row = script.check("wrong", "dpo", data, wrong, script.float64_truth("dpo", data))
    assert row["left out"] == "off by more than 0.0001"
