"""The reference's log-probs, computed once: the same gradient, reused, and never by mistake."""
import os
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import (adapter_hash, backward, finish, flat_gradient, logged, make_model, make_trees,
                     no_reference, usable)

from lora import lora_disabled
from step import METHODS, Compute, Objective
from training.ranks import Ranks
from training.reference_cache import (cache_reference, read_rows, reference_key, seal,
                                      whole_batches)
from training.token_cache import TokenTable, flat_arrays


def table_of(trees):
    return TokenTable(**flat_arrays(trees))


def cache(out, reference, trees, name, key="k"):
    out.mkdir(exist_ok=True)
    return list(cache_reference(str(out), key, reference, table_of(trees),
                                Objective(METHODS[name]), Compute(micro_tokens=40), Ranks()))


@pytest.mark.parametrize("name", ["ulma", "dpo", "pointwise_dpo", "negative_dpo", "ulma_mse"])
def test_cached_log_probs_give_the_gradient_and_metrics_of_those_computed_in_the_step(tmp_path,
                                                                                      name):
    # ULMA's good responses need none: a pack without a bad one has nothing to compute.
    found = []
    for cached in (False, True):
        model, trees = make_model(), usable(make_trees(), METHODS[name].trains_on)
        reference = partial(lora_disabled, model)
        if cached:
            trees = cache(tmp_path / "run", reference, trees, name)
            reference = no_reference(model)
        totals = backward(model, trees, name, reference=reference, beta=0.3, log_z=0.2,
                          compute=Compute(micro_tokens=64))
        found.append((totals, flat_gradient(model)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)


def test_a_second_run_reads_what_the_first_one_left_beside_it(tmp_path):
    model, trees = make_model(), usable(make_trees(), "pairs")
    first = cache(tmp_path / "a", partial(lora_disabled, model), trees, "dpo")
    assert (tmp_path / "reference-k.jsonl").exists() and not list((tmp_path / "a").iterdir())
    unknown = partial(nullcontext, None)                   # a model that cannot be run
    assert cache(tmp_path / "b", unknown, trees, "dpo") == first
    with pytest.raises(AttributeError):                    # another key: the reference is run
        cache(tmp_path / "b", unknown, trees, "dpo", key="other")


def test_a_batch_that_a_kill_cut_short_is_made_again_as_a_whole(tmp_path):
    # Batches of 2, 1 and 3 rows; its rows depend on a batch in the last bits.
    file, batches = tmp_path / "rows.jsonl", [[0, 1], [2], [3, 4, 5]]
    assert whole_batches(str(file), batches) == (0, "rows.jsonl") and not file.exists()
    lines, checksums = [], ["rows.jsonl"]
    for number in range(6):
        line, checksum = seal(f'{{"tree": {number}', checksums[-1])
        lines.append(line)
        checksums.append(checksum)
    for whole, torn, done, rest in ((0, 0, 0, 0), (1, 0, 0, 0), (2, 0, 1, 2), (2, 20, 1, 2),
                                    (5, 0, 2, 3), (6, 0, 3, 6)):
        file.write_text("".join(lines)[:len("".join(lines[:whole])) + torn])
        assert whole_batches(str(file), batches) == (done, checksums[rest])
        assert file.read_text() == "".join(lines[:rest])


def test_whatever_changes_in_a_file_of_rows_is_named(tmp_path):
    # A digit, two lines, a line less, another file's name: trained on before, with exit code 0.
    file, lines, checksum = tmp_path / "reference-a.jsonl", [], "reference-a.jsonl"
    for number in range(4):
        line, checksum = seal(f'{{"tree": {number}, "reference_logps": [-1.25]', checksum)
        lines.append(line)
    file.write_text("".join(lines))
    assert [row["tree"] for row in read_rows(str(file))] == [0, 1, 2, 3]
    (tmp_path / "reference-b.jsonl").write_text("".join(lines))
    for name, text, number in (
            ("a", [lines[0], lines[1].replace("1.25", "1.35"), *lines[2:]], 2),
            ("a", [lines[0], lines[2], lines[1], lines[3]], 2),
            ("a", [lines[0], *lines[2:]], 2), ("a", [lines[0], lines[0], *lines[1:]], 2),
            ("a", [lines[0], "\n", *lines[1:]], 2),
            ("a", ['{"tree": 0, "reference_logps": [-1.25]}\n', *lines[1:]], 1),
            ("b", lines, 1)):
        (tmp_path / f"reference-{name}.jsonl").write_text("".join(text))
        with pytest.raises(ValueError, match=rf"reference-{name}.jsonl:{number}: damaged: .*remove "
                                             "it, and the same command computes it again"):
            read_rows(str(tmp_path / f"reference-{name}.jsonl"))


def test_a_damaged_cache_is_refused_by_the_run_that_reads_it(tmp_path):
    model, trees = make_model(), usable(make_trees(), "pairs")
    cache(tmp_path / "a", partial(lora_disabled, model), trees, "dpo")
    file, unknown = tmp_path / "reference-k.jsonl", partial(nullcontext, None)
    lines = file.read_text().splitlines(True)
    file.write_text("".join(lines[:-1]))
    with pytest.raises(ValueError, match=f"reference-k.jsonl has {len(lines) - 1} rows, not "):
        cache(tmp_path / "a", unknown, trees, "dpo")
    file.write_text("".join(lines).replace("-", "", 1))
    with pytest.raises(ValueError, match="reference-k.jsonl:1: damaged"):
        cache(tmp_path / "a", unknown, trees, "dpo")
    file.rename(tmp_path / "a/reference-k.jsonl")             # and by the run that goes on with it
    with pytest.raises(ValueError, match="a/reference-k.jsonl:1: damaged"):
        cache(tmp_path / "a", unknown, trees, "dpo")


def test_the_key_changes_with_all_that_the_log_probs_depend_on(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    os.utime(tmp_path / "model.safetensors", (0, 0))
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft/adapter_model.safetensors").write_bytes(b"adapter")
    (tmp_path / "sft/adapter_config.json").write_bytes(b'{"lora_alpha": 16}')
    trees, sft = make_trees(), str(tmp_path / "sft")
    changed = [replace(trees[0], response_ids=[[9, *ids[1:]] for ids in trees[0].response_ids]),
               *trees[1:]]
    fewer, changed, trees = table_of(trees[1:]), table_of(changed), table_of(trees)
    keys = [reference_key(trees, str(tmp_path), None, "all", "sum"),
            reference_key(changed, str(tmp_path), None, "all", "sum"),
            reference_key(fewer, str(tmp_path), None, "all", "sum"),
            reference_key(trees, str(tmp_path), sft, "all", "sum"),
            reference_key(trees, str(tmp_path), None, "z < 1", "sum"),
            reference_key(trees, str(tmp_path), None, "all", "mean")]
    assert keys[0] == reference_key(trees, str(tmp_path), None, "all", "sum")
    (tmp_path / "model.safetensors").write_bytes(b"Weights")         # of one size, at one time
    os.utime(tmp_path / "model.safetensors", (0, 0))
    keys.append(reference_key(trees, str(tmp_path), None, "all", "sum"))
    (tmp_path / "sft/adapter_model.safetensors").write_bytes(b"another")
    keys.append(reference_key(trees, str(tmp_path), sft, "all", "sum"))
    (tmp_path / "sft/adapter_config.json").write_bytes(b'{"lora_alpha": 64}')
    keys.append(reference_key(trees, str(tmp_path), sft, "all", "sum"))
    assert len(set(keys)) == len(keys)


def test_a_run_of_two_epochs_runs_the_reference_once_and_the_next_run_not_at_all(
        tmp_path, tiny_model, pairs_file):
    flags = ("--method", "dpo", "--batch_size", "24", "--num_train_epochs", "2")
    shown = finish(tiny_model, pairs_file, tmp_path / "a", *flags)
    assert "reference log-probs: batch" in shown
    shown = finish(tiny_model, pairs_file, tmp_path / "b", *flags)
    assert "reference log-probs: those of" in shown
    assert adapter_hash(tmp_path / "a") == adapter_hash(tmp_path / "b")
    assert logged(tmp_path / "a") == logged(tmp_path / "b")
    # one epoch has no use for it, and the first steps are those of the run that had
    shown = finish(tiny_model, pairs_file, tmp_path / "c", *flags, "--num_train_epochs", "1")
    assert "reference log-probs" not in shown
    assert logged(tmp_path / "c")[0]["loss"] == pytest.approx(logged(tmp_path / "a")[0]["loss"])
    # the reference is the same where all weights are trained
    shown = finish(tiny_model, pairs_file, tmp_path / "full", *flags, "--lora_r", "0")
    assert "reference log-probs: those of" in shown


def test_where_all_weights_are_trained_the_reference_has_gone_before_the_first_step(
        tmp_path, tiny_model, pairs_file):
    # One epoch and less, of a policy and a second model that is not trained: its log-probs come
    # from the cache all the same, and are those that an adapter's run computes in its steps.
    flags = ("--method", "pointwise_dpo", "--max_steps", "4", "--micro_tokens", "64")
    shown = finish(tiny_model, pairs_file, tmp_path / "full", *flags, "--lora_r", "0")
    assert "reference log-probs: batch" in shown
    assert "reference log-probs" not in finish(tiny_model, pairs_file, tmp_path / "lora", *flags)
    first, other = logged(tmp_path / "full")[0], logged(tmp_path / "lora")[0]
    assert first["rewards/positive"] == pytest.approx(0, abs=1e-5)
    assert first["loss"] == pytest.approx(other["loss"], rel=1e-6)
