"""files/fingerprint.py: what changes a fingerprint, of small files and of sampled large ones."""
import os
import shutil

import pytest

from files import fingerprint as module
from files.fingerprint import fingerprint, fingerprints
from files.text import sha256


def test_a_large_file_is_known_by_its_size_header_and_blocks(tmp_path, monkeypatch):
    # 8 blocks of 16 bytes: a file of 5,000 bytes with a header of 1,000 is large.
    monkeypatch.setattr(module, "BLOCK_BYTES", 16)
    monkeypatch.setattr(module, "BLOCKS", 8)
    raw = (1000).to_bytes(8, "little") + os.urandom(4992)
    blocks = [number * (5000 - 16) // 7 for number in range(8)]
    assert blocks[0] == 0 and blocks[-1] == 4984
    seen = {*range(1008), *(start + i for start in blocks for i in range(16))}
    file = tmp_path / "model.safetensors"

    def changed(place):
        file.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1:])
        return fingerprint(str(file)) != whole

    file.write_bytes(raw)
    whole, times = fingerprint(str(file)), (0, 0)
    for place in (0, 8, 500, 1007, 1008, blocks[3], blocks[3] + 15, blocks[3] + 16, 4983, 4999):
        assert changed(place) == (place in seen), place
    file.write_bytes(raw + b"\0")
    assert fingerprint(str(file)) != whole
    file.write_bytes(raw)
    os.utime(file, times)
    assert fingerprint(str(file)) == whole                   # the time is no part of it
    file.rename(tmp_path / "pytorch_model.bin")              # no header there: blocks alone
    assert fingerprint(str(tmp_path / "pytorch_model.bin")) != whole
    file.write_bytes(bytes(5000))
    zeros = fingerprint(str(file))
    file.write_bytes(bytes(5001))
    assert fingerprint(str(file)) != zeros                   # of one content, but for the size
    file.write_bytes(raw[:128])
    assert fingerprint(str(file)) == sha256(str(file))       # a small one is read whole


def test_all_that_is_read_of_a_model_and_its_adapters_has_a_fingerprint(tmp_path, tiny_model):
    model, adapter = tmp_path / "model", tmp_path / "sft"
    shutil.copytree(tiny_model, model)
    adapter.mkdir()
    for file in (model / "README.md", model / "tokenizer_config.json",
                 adapter / "adapter_config.json", adapter / "adapter_model.safetensors",
                 adapter / "tokenizer.model", tmp_path / "anchors.jsonl"):
        file.write_text("{}")
    found = fingerprints(str(model), None, str(adapter), str(tmp_path / "anchors.jsonl"),
                         str(tmp_path / "nothing"))
    assert {os.path.relpath(file, tmp_path) for file in found} == {
        "model/config.json", "model/tokenizer.model", "model/tokenizer_config.json",
        "model/model.safetensors", "sft/adapter_config.json", "sft/adapter_model.safetensors",
        "anchors.jsonl"}
    assert found[str(model / "config.json")] == sha256(str(model / "config.json"))


@pytest.mark.parametrize("missing", ["model.safetensors", "config.json"])
def test_what_is_missing_is_left_to_loading(tmp_path, tiny_model, missing):
    shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "model" / missing).unlink()
    assert str(tmp_path / "model" / missing) not in fingerprints(str(tmp_path / "model"))
