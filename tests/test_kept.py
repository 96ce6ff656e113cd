"""The reference's log-probs, computed once: the same gradient, reused, and never by mistake."""
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from test_step import make_model, make_trees, trainable, usable
from test_train import adapter_hash, finish, logged, pairs_file  # noqa: F401

from kept import keep_reference, reference_key
from kernels import linear_logps
from step import METHODS, adapters_off, backward_batch, batch_counts

RUNNING = SimpleNamespace(signal=0)


def keep(out, reference, trees, which, key="k"):
    out.mkdir(exist_ok=True)
    return keep_reference(str(out), key, reference, trees, which, False, 40, linear_logps, 0, 1,
                          RUNNING)


@pytest.mark.parametrize("name", ["ulma", "dpo", "pointwise_dpo", "negative_dpo", "ulma_mse"])
def test_kept_log_probs_give_the_gradient_and_metrics_of_those_computed_on_the_way(tmp_path, name):
    # ULMA's good responses need none: a pack without a bad one has nothing to compute.
    method, found = METHODS[name], []
    for kept in (False, True):
        model, trees = make_model(), usable(make_trees(), METHODS[name].uses)
        reference = partial(adapters_off, model)
        if kept:
            trees = keep(tmp_path / "run", reference, trees, method.reference)
            reference = None                               # asking it would raise
        total = backward_batch(model, reference, method, trees, batch_counts(trees), beta=0.3,
                               log_z=0.2, mean_logps=False, reduction="mean", micro_tokens=64)
        found.append((total, torch.cat([p.grad.flatten() for p in trainable(model).values()])))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)


def test_a_second_run_reads_what_the_first_one_left_beside_it(tmp_path):
    model, trees = make_model(), usable(make_trees(), "pairs")
    first = keep(tmp_path / "a", partial(adapters_off, model), trees, "all")
    assert (tmp_path / "reference-k.jsonl").exists() and not list((tmp_path / "a").iterdir())
    assert keep(tmp_path / "b", None, trees, "all") == first
    with pytest.raises(TypeError):                         # another key: the reference is asked
        keep(tmp_path / "b", None, trees, "all", key="other")


def test_the_key_changes_with_all_that_the_log_probs_depend_on(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft/adapter_model.safetensors").write_bytes(b"adapter")
    (tmp_path / "sft/adapter_config.json").write_bytes(b'{"lora_alpha": 16}')
    trees, sft = make_trees(), str(tmp_path / "sft")
    changed = [replace(trees[0], response_ids=[[9, *ids[1:]] for ids in trees[0].response_ids]),
               *trees[1:]]
    keys = [reference_key(trees, str(tmp_path), None, "all", "sum"),
            reference_key(changed, str(tmp_path), None, "all", "sum"),
            reference_key(trees[1:], str(tmp_path), None, "all", "sum"),
            reference_key(trees, str(tmp_path), sft, "all", "sum"),
            reference_key(trees, str(tmp_path), None, "negative", "sum"),
            reference_key(trees, str(tmp_path), None, "all", "mean")]
    assert keys[0] == reference_key(trees, str(tmp_path), None, "all", "sum")
    (tmp_path / "model.safetensors").write_bytes(b"other weights")
    keys.append(reference_key(trees, str(tmp_path), None, "all", "sum"))
    (tmp_path / "sft/adapter_model.safetensors").write_bytes(b"another")
    keys.append(reference_key(trees, str(tmp_path), sft, "all", "sum"))
    (tmp_path / "sft/adapter_config.json").write_bytes(b'{"lora_alpha": 64}')
    keys.append(reference_key(trees, str(tmp_path), sft, "all", "sum"))
    assert len(set(keys)) == len(keys)


def test_a_run_of_two_epochs_asks_the_reference_once_and_the_next_run_not_at_all(
        tmp_path, tiny_model, pairs_file):  # noqa: F811
    flags = ("--method", "dpo", "--num_train_epochs", "2")
    shown = finish(tiny_model, pairs_file, tmp_path / "a", *flags)
    assert "reference log-probs: batch" in shown
    shown = finish(tiny_model, pairs_file, tmp_path / "b", *flags)
    assert "reference log-probs: those of" in shown
    assert adapter_hash(tmp_path / "a") == adapter_hash(tmp_path / "b")
    assert logged(tmp_path / "a") == logged(tmp_path / "b")
    # one epoch has no use for it, and the first steps are those of the run that had
    assert "reference log-probs" not in finish(tiny_model, pairs_file, tmp_path / "c", "--method",
                                               "dpo", "--num_train_epochs", "1")
    assert logged(tmp_path / "c")[0]["loss"] == pytest.approx(logged(tmp_path / "a")[0]["loss"])
    # all weights are trained: no copy of the model is needed for it either
    shown = finish(tiny_model, pairs_file, tmp_path / "full", *flags, "--lora_r", "0")
    assert "reference log-probs: those of" in shown
