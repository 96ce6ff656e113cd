"""Hugging Face folders: what is saved loads to the same bits, from one copy in memory."""
import json
import os

import pytest
import torch
from helpers import CONFIGS, GQA, each_config, make_llama
from helpers_models import assert_same_model, each_kind, read_index, saved
from safetensors.torch import load_file, save_file

import files.weights as weights
from files.weights import read_files, weight_files
from model import load_llama, save_llama

linux = pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs Linux's /proc")


# ---- what is saved loads ------------------------------------------------------------------------

@each_config
def test_round_trip_in_one_file(config, tmp_path):
    # Bit for bit, with the rope factor and the tied head in config.json's own words.
    model, path = saved(tmp_path, config)
    assert sorted(os.listdir(path)) == ["config.json", "model.safetensors"]
    assert_same_model(load_llama(path), model)


@pytest.mark.parametrize("max_shard_bytes", [1, 10_000])
def test_round_trip_in_shards(max_shard_bytes, tmp_path):
    # One tensor per file (one above the limit is a file of its own), and a few per file. The index
    # lists every tensor and the sum of all bytes.
    model, path = saved(tmp_path, max_shard_bytes=max_shard_bytes)
    files = weight_files(path)
    sizes = [{name: t.nbytes for name, t in load_file(file).items()} for file in files]
    assert all(len(size) == 1 or sum(size.values()) <= max_shard_bytes for size in sizes)
    assert len(files) == len(model.state_dict()) if max_shard_bytes == 1 else len(files) > 2
    # Files are full: the first tensor of the next file would not have fitted.
    order = list(model.state_dict())
    for size, following in zip(sizes, sizes[1:], strict=False):
        assert sum(size.values()) + following[min(following, key=order.index)] > max_shard_bytes
    index = read_index(path, "safetensors")
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in model.state_dict().values())
    assert set(index["weight_map"]) == set(model.state_dict())
    for file, size in zip(files, sizes, strict=True):
        assert {index["weight_map"][name] for name in size} == {os.path.basename(file)}
    assert not os.path.exists(os.path.join(path, "model.safetensors"))
    assert_same_model(load_llama(path), model)


def test_round_trip_of_a_tied_head(tmp_path):
    # The head is not written, and after loading is the embedding itself: one parameter, not two
    # that drift apart in training. A file that has the copy as well loads too.
    model, path = saved(tmp_path, CONFIGS["tied head"])
    tensors = load_file(os.path.join(path, "model.safetensors"))
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    for _ in range(2):
        loaded = load_llama(path)
        assert_same_model(loaded, model)
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
        save_file(tensors, os.path.join(path, "model.safetensors"))


def test_round_trip_in_bfloat16(tmp_path):
    # Saved in its own dtype (config.json names it), loaded in the dtype wanted: bfloat16 to float32
    # is exact.
    model, path = saved(tmp_path, dtype=torch.bfloat16)
    with open(os.path.join(path, "config.json"), encoding="utf-8") as file:
        assert json.load(file)["torch_dtype"] == "bfloat16"
    tensors = load_file(os.path.join(path, "model.safetensors"))
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert_same_model(load_llama(path, dtype=torch.bfloat16), model)
    assert_same_model(load_llama(path), model.float())


def test_old_rotary_buffers_in_a_checkpoint_are_skipped(tmp_path):
    # Llama files of 2023 carry rotary_emb.inv_freq, which is computed here.
    model, path = saved(tmp_path)
    file = os.path.join(path, "model.safetensors")
    tensors = load_file(file)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(3)
    save_file(tensors, file)
    assert_same_model(load_llama(path), model)


@each_config
@pytest.mark.parametrize("options", [{}, {"max_shard_bytes": 10_000}], ids=["one file", "shards"])
def test_bin_files_load_to_the_bit(config, options, tmp_path):
    # lmsys/vicuna-7b-v1.5 ships float16 .bin shards; float16 to float32 is exact.
    model, path = saved(tmp_path, config, torch.float16, "bin", **options)
    files = weight_files(path)
    assert all(file.endswith(".bin") for file in files) and (len(files) > 2) == bool(options)
    assert_same_model(load_llama(path, torch.float16), model)
    assert_same_model(load_llama(path), model.float())


def test_a_weight_that_was_saved_transposed_loads_contiguous(tmp_path):
    # torch.save stores strides; kernels/ need rows that lie one after the other.
    model, path = saved(tmp_path, GQA, torch.float32, "bin")
    file = next(file for file in weight_files(path) if file.endswith(".bin"))
    state = torch.load(file, weights_only=True)
    state["lm_head.weight"] = state["lm_head.weight"].T.contiguous().T
    torch.save(state, file)
    assert load_llama(path).lm_head.weight.is_contiguous()
    assert_same_model(load_llama(path), model)


def test_one_file_saved_over_shards_is_what_loads(tmp_path):
    # An index left by an earlier, sharded save still names the old shards: unless it is removed,
    # the old weights are loaded without a warning.
    saved(tmp_path, max_shard_bytes=10_000)
    model = make_llama(GQA, seed=1)[0].float()
    save_llama(model, str(tmp_path))
    assert_same_model(load_llama(str(tmp_path)), model)
    # The other way round: transformers, and we, would read the old single file.
    other = make_llama(GQA, seed=2)[0].float()
    save_llama(other, str(tmp_path), max_shard_bytes=10_000)
    assert_same_model(load_llama(str(tmp_path)), other)


@each_kind
@pytest.mark.parametrize("options", [{}, {"max_shard_bytes": 10_000}], ids=["one file", "shards"])
def test_a_model_is_saved_over_the_files_it_was_loaded_from(kind, options, tmp_path):
    # Its weights may still be those files' pages: truncating them in place would be a bus error.
    model, path = saved(tmp_path, kind=kind, **options)
    loaded = load_llama(path)
    with torch.no_grad():
        loaded.model.norm.weight += 1
        model.model.norm.weight += 1
    save_llama(loaded, path, **options)
    assert_same_model(load_llama(path), model)
    assert_same_model(loaded, model)


# ---- one copy in memory -------------------------------------------------------------------------

def mapped(path):
    """{file: [(start, end)]} of the weight files that are mapped into this process."""
    spans = {}
    with open("/proc/self/maps", encoding="utf-8") as file:
        for words in map(str.split, file):
            if words[-1].startswith(os.path.realpath(path)):
                span = tuple(int(address, 16) for address in words[0].split("-"))
                spans.setdefault(words[-1], []).append(span)
    return spans


@linux
@each_kind
def test_files_are_mapped_one_at_a_time_and_nothing_is_copied(kind, tmp_path):
    # 7B in float16 is 13.5 GB: a copy of it beside the model in its final dtype does not fit into
    # 24 GB. Every tensor consists of pages of its file, and no other file is mapped.
    _, path = saved(tmp_path, dtype=torch.float16, kind=kind, max_shard_bytes=10_000)
    files, seen = weight_files(path), set()
    for _, tensor in read_files(files):
        (file, spans), = mapped(path).items()
        assert any(start <= tensor.data_ptr() < end for start, end in spans)
        seen.add(file)
    del tensor
    assert sorted(seen) == [os.path.realpath(file) for file in files] and not mapped(path)


@linux
@each_kind
def test_files_stay_mapped_only_if_the_dtype_is_not_converted(kind, tmp_path):
    # Converted weights have memory of their own and the files are unmapped. Others on the CPU need
    # no memory of their own, and a write to them (training) does not change the file.
    _, path = saved(tmp_path, dtype=torch.float16, kind=kind, max_shard_bytes=10_000)
    converted = load_llama(path, torch.bfloat16)
    assert not mapped(path) and converted.lm_head.weight.dtype == torch.bfloat16
    model = load_llama(path, torch.float16)
    assert len(mapped(path)) == len(weight_files(path))
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert load_llama(path, torch.float16).lm_head.weight.any()


def test_only_a_slow_load_prints_its_progress(tmp_path, monkeypatch, capsys):
    # No line for a small model; bytes, total and time for a large one; only rank 0 prints.
    _, path = saved(tmp_path)
    load_llama(path)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(weights, "PROGRESS_SECONDS", -1.0)
    clock = iter(range(1000))
    monkeypatch.setattr(weights.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(os.path, "getsize", lambda file: 4_000_000_000)
    for _ in read_files(weight_files(path)):
        pass
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 21          # a line per tensor
    assert lines[1].startswith(f"loading {path}/model.safetensors: 0.0 of 4.0 GB, ")
    assert lines[1].endswith(" left")
    monkeypatch.setattr(weights.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(weights.dist, "get_rank", lambda: 1)
    for _ in read_files(weight_files(path)):
        pass
    assert capsys.readouterr() == ("", "")
