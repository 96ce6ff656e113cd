"""Weight files that are broken, foreign or malicious: one sentence each, and no code is run."""
import json
import math
import os
import struct
from pathlib import Path

import pytest
import torch
from helpers_models import assert_same_model, each_kind, index_file, read_index, saved, write_index
from safetensors.torch import load_file, save_file

from files.weights import read_file, weight_files
from model import load_llama


def rewrite(file, change):
    """Write a weight file again after `change` has edited the dict of its tensors."""
    tensors = {name: t.detach().clone() for name, t in read_file(file)}
    change(tensors)
    if file.endswith(".bin"):
        torch.save(tensors, file)
    else:
        save_file(tensors, file)


def refusal(path, error=ValueError):
    """The sentence of the error that load_llama raises for a folder."""
    with pytest.raises(error) as caught:
        load_llama(str(path))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    return str(caught.value)


def test_the_first_of_the_four_names_is_read(tmp_path):
    # transformers' order, so that a folder is the same model in both: a file before an index,
    # safetensors before .bin. What comes later is not even opened.
    model, path = saved(tmp_path)
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json",
                 "model.safetensors.index.json"):
        (tmp_path / name).write_text("no weights")
    assert_same_model(load_llama(path), model)
    order = ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
             "pytorch_model.bin.index.json"]
    for name in order:
        assert name in refusal(path) if name != order[0] else True
        os.remove(tmp_path / name)
    assert refusal(path, FileNotFoundError) == f"{path}: no weights; looked for {', '.join(order)}"


# ---- what does not fit --------------------------------------------------------------------------

@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_named(kind, dtype, value, tmp_path):
    # One of them makes every logit NaN: generate.py printed " ⁇  ⁇ ", or ended in an IndexError.
    _, path = saved(tmp_path, kind=kind)
    file = weight_files(path)[0]
    name = "model.layers.0.mlp.up_proj.weight"

    def change(tensors):
        tensors[name] = tensors[name].to(dtype)
        tensors[name][-1, -1] = value
    rewrite(file, change)
    assert refusal(path).startswith(f"{file}: {name} has values that are not finite")


def test_a_bin_file_whose_tensor_repeats_one_value_is_refused(tmp_path):
    # Four bytes on disk may claim any shape: the model would be built of it.
    _, path = saved(tmp_path, kind="bin")

    def change(tensors):
        tensors["lm_head.weight"] = torch.zeros(1).expand_as(tensors["lm_head.weight"])
    rewrite(weight_files(path)[0], change)
    assert "'lm_head.weight' is a Tensor" in refusal(path)


@each_kind
def test_all_misfits_are_listed_at_once(kind, tmp_path):
    # Missing, mis-shaped, unexpected, and dtypes that are not supported (quantized weights need
    # scales): all in one error, and nothing else.
    _, path = saved(tmp_path, kind=kind)

    def change(tensors):
        del tensors["model.norm.weight"]
        tensors["lm_head.weight"] = torch.zeros(30, 24)
        tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(40, 24)
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(24)
        tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(24, 24, dtype=torch.int8)
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(40, 24).to(torch.float8_e4m3fn)

    rewrite(weight_files(path)[0], change)
    sentence = refusal(path)
    assert sentence.startswith(f"{path}: weights do not fit config.json: ")
    floats = "expected float16, bfloat16, float32 or float64"
    assert sorted(sentence.split("config.json: ")[1].split("; ")) == [
        "lm_head.weight is [30, 24], expected [29, 24]",
        "missing model.norm.weight [24]",
        f"model.layers.0.mlp.up_proj.weight is float8_e4m3fn, {floats}",
        f"model.layers.0.self_attn.q_proj.weight is int8, {floats}",
        "unexpected model.layers.0.self_attn.q_proj.bias [24]",
        "unexpected model.layers.2.mlp.up_proj.weight [40, 24]"]


@each_kind
def test_misfits_are_listed_across_shards(kind, tmp_path):
    # A problem in the first file does not hide one in the last. A tensor that is not in the file
    # the index names counts as missing.
    _, path = saved(tmp_path, kind=kind, max_shard_bytes=1)
    places = read_index(path, kind)["weight_map"]
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        rewrite(os.path.join(path, places[name]), lambda t, name=name: t.update(
            {name: torch.zeros(1, 1)}))
    rewrite(os.path.join(path, places["model.norm.weight"]),
            lambda t: t.update(other=t.pop("model.norm.weight")))
    assert sorted(refusal(path).split("config.json: ")[1].split("; ")) == [
        "lm_head.weight is [1, 1], expected [29, 24]", "missing model.norm.weight [24]",
        "model.embed_tokens.weight is [1, 1], expected [29, 24]", "unexpected other [24]"]


@each_kind
def test_nothing_is_converted_before_all_is_checked(kind, tmp_path, monkeypatch):
    # A misfit at the end of 13 GB is reported at once, not after a minute of loading.
    _, path = saved(tmp_path, kind=kind, max_shard_bytes=10_000)
    rewrite(weight_files(path)[-1], lambda tensors: tensors.popitem())
    monkeypatch.setattr(torch.Tensor, "to", lambda *_, **__: pytest.fail("converted a tensor"))
    with pytest.raises(ValueError, match="missing lm_head.weight"):
        load_llama(path)


def test_duplicate_tensor_in_two_shards_is_refused(tmp_path):
    # Which of the two would win depends on file order.
    _, path = saved(tmp_path, max_shard_bytes=10_000)
    first, last = weight_files(path)[0], weight_files(path)[-1]
    name, tensor = next(iter(load_file(first).items()))
    save_file(load_file(last) | {name: tensor}, last)
    with pytest.raises(ValueError, match=f"unexpected {name}"):
        load_llama(path)


# ---- what is not a weight file ------------------------------------------------------------------

@each_kind
def test_missing_weight_files_are_named(kind, tmp_path):
    # An interrupted download: the index lists files that are not there; all are named.
    _, path = saved(tmp_path, kind=kind, max_shard_bytes=10_000)
    names = [os.path.basename(file) for file in weight_files(path)]
    for name in names[1:3]:
        os.remove(os.path.join(path, name))
    assert (refusal(path, FileNotFoundError)
            == f"{path}: missing weight file(s) {names[1]}, {names[2]}")


@each_kind
@pytest.mark.parametrize("content, words", [
    ({}, "key 'weight_map' is missing"), ({"weight_map": {}}, "key 'weight_map' is missing"),
    ({"weight_map": ["a"]}, "key 'weight_map' is missing"), ([], "not a JSON object"),
    ({"weight_map": {"a": "../secret.KIND", "b": "/etc/x.KIND", "c": "sub/x.KIND", "d": "x.py",
                     "e": None, "f": "fine.KIND"}},
     "may only name .KIND files of its own folder, not '../secret.KIND', '/etc/x.KIND', 'None', "
     "'sub/x.KIND', 'x.py'")])
def test_an_index_that_cannot_be_followed_is_refused(kind, content, words, tmp_path):
    # The author of a downloaded index must not choose which files we open.
    _, path = saved(tmp_path, kind=kind, max_shard_bytes=10_000)
    write_index(path, kind, json.loads(json.dumps(content).replace("KIND", kind)))
    sentence = refusal(path)
    assert sentence.startswith(index_file(path, kind)) and words.replace("KIND", kind) in sentence


@each_kind
@pytest.mark.parametrize("end", [0, 1, 5, 100, 20_000, -30, -1])
def test_truncated_weight_file_is_refused_by_name_and_size(kind, end, tmp_path):
    # Cut to nothing, in the header, in the data, and before the last byte.
    _, path = saved(tmp_path, kind=kind)
    file = weight_files(path)[0]
    whole = Path(file).read_bytes()
    Path(file).write_bytes(whole[:end])
    sentence = refusal(path)
    assert sentence.startswith(f"{file} ({len(whole[:end])} bytes) is not a readable {kind} file: ")
    assert "git-lfs" not in sentence and "web page" not in sentence


@each_kind
@pytest.mark.parametrize("start, end", [(12, 60), (64, 300), (400, 460)])
def test_corrupt_bytes_of_a_header_are_refused(kind, start, end, tmp_path):
    # JSON header, zip header or pickle: whatever the library raises, one sentence names the file.
    # (Flipped bits of the numbers themselves load: torch reads no checksum in either format.)
    _, path = saved(tmp_path, kind=kind)
    file = weight_files(path)[0]
    content = bytearray(Path(file).read_bytes())
    content[start:end] = b"\xfe\x93" * ((end - start) // 2)
    Path(file).write_bytes(content)
    assert refusal(path).startswith(file)


@each_kind
@pytest.mark.parametrize("text, words", [
    (f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 9976576152\n",
     "this is a git-lfs pointer, run `git lfs pull`"),
    ("\n<!DOCTYPE html>\n<html><body>Repository not found</body></html>",
     "this is a web page, not the file: download it again"),
    ("<html>401</html>", "this is a web page")])
def test_pointers_and_web_pages_are_recognised(kind, text, words, tmp_path):
    # A clone without git-lfs leaves 130 bytes instead of 13 GB, a refused download leaves a web
    # page: as weights, index or config.json.
    _, path = saved(tmp_path, kind=kind, max_shard_bytes=10_000)
    for file in (weight_files(path)[1], index_file(path, kind), os.path.join(path, "config.json")):
        Path(file).write_text(text)
        sentence = refusal(path)
        assert sentence.startswith(file) and words in sentence


def test_header_that_promises_more_than_the_file_is_refused(tmp_path):
    # A header length of 2^62 must end in our error, not in an attempt to allocate it.
    file = str(tmp_path / "model.safetensors")
    Path(file).write_bytes(struct.pack("<Q", 2 ** 62) + b"{}")
    with pytest.raises(ValueError, match=r"\(10 bytes\) is not a readable safetensors file"):
        list(read_file(file))


# ---- .bin files in particular -------------------------------------------------------------------

class Writes:
    """Creates a file where it is unpickled as code."""

    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return open, (self.file, "w")


@pytest.mark.parametrize("new", [True, False], ids=["zip", "before 1.6"])
def test_a_pickle_with_code_is_refused_and_not_run(new, tmp_path):
    # torch.load would run it; weights_only=True does not.
    model, path = saved(tmp_path, kind="bin")
    state, file = dict(model.state_dict()), os.path.join(path, "pytorch_model.bin")
    torch.save(state | {"x": Writes(tmp_path / "written")}, file,
               _use_new_zipfile_serialization=new)
    sentence = refusal(path)
    assert sentence.startswith(f"{file}: ") and not (tmp_path / "written").exists()
    if new:
        assert sentence.endswith("holds a Python object (io.open) where only tensors may be; it "
                                 "was not executed")
    torch.load(file, weights_only=False)             # the code does run if it is let
    assert (tmp_path / "written").exists()


def test_a_bin_of_before_torch_1_6_is_refused_with_advice_that_works(tmp_path):
    # It cannot be mapped, so loading it would take twice its size in memory.
    model, path = saved(tmp_path, kind="bin")
    file = os.path.join(path, "pytorch_model.bin")
    torch.save(model.state_dict(), file, _use_new_zipfile_serialization=False)
    assert refusal(path) == (
        f"{file}: was saved as before torch 1.6 and cannot be memory-mapped; rewrite it with "
        "torch.save(torch.load(FILE, weights_only=True), FILE)")
    torch.save(torch.load(file, weights_only=True), file)
    assert_same_model(load_llama(path), model)


@pytest.mark.parametrize("content, words", [
    ([torch.zeros(1)], "not a state dict: holds a list"),
    (torch.zeros(1), "not a state dict: holds a Tensor"),
    ({"model": {"a": torch.zeros(1)}, "epoch": 3, "a": torch.zeros(1)},
     "not a state dict of plain tensors: 'model' is a dict, 'epoch' is a int"),
    ({3: torch.zeros(1)}, "not a state dict of plain tensors: 3 is a Tensor"),
    ({"a": torch.zeros(3).to_sparse(), "b": torch.zeros(1, device="meta")},
     "not a state dict of plain tensors: 'a' is a Tensor, 'b' is a Tensor"),
    (torch.nn.Linear(1, 1), "holds a Python object (torch.nn.modules.linear.Linear) where only"),
])
def test_a_bin_that_is_no_state_dict_is_refused(content, words, tmp_path):
    # Training checkpoints, whole modules, sparse tensors, tensors without values.
    _, path = saved(tmp_path, kind="bin")
    torch.save(content, os.path.join(path, "pytorch_model.bin"))
    assert words in refusal(path)
