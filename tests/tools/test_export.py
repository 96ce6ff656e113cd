"""tools.export writes what the adapters compute, whole, and as other tools read it."""
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY_VOCAB, tree_of
from safetensors import safe_open
from safetensors.torch import load_file
from torch.testing import assert_close

from files.lock import locked
from lora import add_lora, load_adapter, lora_layers, save_adapter
from model import Linear, load_llama
from tokenizer import Tokenizer
from tools import export

ROW = [1, 5, 7, 30, 300, 7, 12, 3, 2]


@pytest.fixture
def adapter_of(tmp_path, tiny_model):
    """adapter_of(name, seed, targets): path of an adapter on the tiny model, B not zero."""
    def make(name, seed=0, targets=("q_proj", "v_proj", "up_proj")):
        model = add_lora(load_llama(tiny_model), r=3, alpha=7, target_modules=targets)
        generator = torch.Generator().manual_seed(seed)
        for layer in lora_layers(model).values():
            for p in (layer.lora_A, layer.lora_B):
                p.data = 0.2 * torch.randn(p.shape, generator=generator)
        save_adapter(model, str(tmp_path / name), tiny_model)
        return str(tmp_path / name)
    return make


def run(*argv):
    export.main([str(argument) for argument in argv])


def logits(model):
    return export.logits_of(model, ROW)


def test_the_merged_folder_computes_what_the_adapter_does(tmp_path, tiny_model, adapter_of, capsys):
    # And the printed difference is that of the folder, not of the model in memory.
    adapter, out = adapter_of("a"), tmp_path / "out"
    run("--model", tiny_model, "--adapter", adapter, "--out", out)
    expected = logits(load_adapter(load_llama(tiny_model), adapter))
    assert (expected - logits(load_llama(tiny_model))).abs().max() > 0.05
    assert_close(logits(load_llama(str(out))), expected, rtol=0, atol=1e-5)
    shown = capsys.readouterr().out
    assert float(shown.split("adapter logits: ")[1].split()[0]) < 1e-5
    assert float(shown.split("move them by ")[1].split(";")[0]) > 0.05
    assert "rounding" not in shown and f"done: {out}" in shown


def test_the_folder_holds_what_converters_and_servers_ask_for(tmp_path, tiny_model, adapter_of):
    # llama.cpp's converter and vLLM want: a Llama's tensor names and no others, tokenizer.model
    # beside them, and as many embedding rows as it has pieces (an added pad row is refused there).
    out = tmp_path / "out"
    run("--model", tiny_model, "--adapter", adapter_of("a"), "--out", out)
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    merged, base = (load_file(f"{path}/model.safetensors") for path in (out, tiny_model))
    assert {name: t.shape for name, t in merged.items()} == {
        name: t.shape for name, t in base.items()}
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["model_type"] == "llama"
    assert config["torch_dtype"] == "float32"
    assert len(merged["model.embed_tokens.weight"]) == config["vocab_size"] == TINY_VOCAB
    assert Tokenizer(str(out)).vocab_size == TINY_VOCAB
    assert json.loads((out / "generation_config.json").read_text()) == {"bos_token_id": 1,
                                                                        "eos_token_id": 2}
    assert {file.name for file in out.iterdir()} == {
        "model.safetensors", "config.json", "generation_config.json", "tokenizer.model",
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
        "chat_template.jinja"}
    for name, tensor in base.items():         # what no adapter touched is the base's, to the bit
        touched = any(target in name for target in ("q_proj", "v_proj", "up_proj"))
        assert torch.equal(merged[name], tensor) != touched, name


def test_a_foreign_template_does_not_come_along(tmp_path, tiny_model, adapter_of, capsys):
    # Trained on Vicuna's text, a server would prompt with [INST]. What is no tokenizer's stays
    # behind; a template that is asked for is written.
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    foreign = "{{ bos_token }}{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}"
    (base / "tokenizer_config.json").write_text(json.dumps({"chat_template": foreign, "own": "me"}))
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 7, "top_p": 0.5}))
    run("--model", base, "--adapter", adapter_of("a"), "--out", tmp_path / "out")
    told = capsys.readouterr()
    assert "has a chat template of its own; Vicuna's is used" in told.err
    assert "generation_config.json: eos_token_id is [7], but here answers end in [2]" in told.err
    assert "chat template: vicuna; answers end in [2]" in told.out
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        written = (tmp_path / "out" / name).read_text()
        assert "ASSISTANT:" in written and "INST" not in written and '"own"' not in written
    assert json.loads((tmp_path / "out/generation_config.json").read_text()) == {
        "eos_token_id": 2, "bos_token_id": 1, "top_p": 0.5}
    pytest.importorskip("jinja2")
    (tmp_path / "mine.jinja").write_text(
        "{% for m in messages %}{{ m.content }}</s>{% endfor %}")
    run("--model", base, "--adapter", adapter_of("b"), "--out", tmp_path / "other",
        "--chat_template", tmp_path / "mine.jinja")
    written = (tmp_path / "other/chat_template.jinja").read_text()
    assert written == (tmp_path / "mine.jinja").read_text()


def test_a_link_among_a_models_files_leads_nowhere(tmp_path, tiny_model, adapter_of):
    # special_tokens_map.json -> a private file: its tokens are written, not its bytes.
    base, secret = Path(shutil.copytree(tiny_model, tmp_path / "base")), tmp_path / "secret.json"
    secret.write_text(json.dumps({"password": "open sesame"}))
    for name in ("special_tokens_map.json", "tokenizer_config.json", "generation_config.json"):
        (base / name).symlink_to(secret)
    run("--model", base, "--adapter", adapter_of("a"), "--out", tmp_path / "out")
    for file in (tmp_path / "out").iterdir():
        assert b"open sesame" not in file.read_bytes(), file


def test_two_adapters_are_rounded_once(tmp_path, tiny_model, adapter_of):
    # bfloat16(W + U1 + U2): the second added to an already rounded sum gives other bits.
    first, second = adapter_of("a", 1), adapter_of("b", 2, ["v_proj", "o_proj"])
    run("--model", tiny_model, "--adapter", first, second, "--out", tmp_path / "out",
        "--dtype", "bfloat16")
    merged = load_file(tmp_path / "out/model.safetensors")
    name = "model.layers.1.self_attn.v_proj.weight"
    exact = load_file(f"{tiny_model}/model.safetensors")[name].bfloat16().float()
    twice = exact
    for path in (first, second):
        ab = load_file(path + "/adapter_model.safetensors")
        key = "base_model.model.model.layers.1.self_attn.v_proj.lora_{}.weight"
        update = 7 / 3 * (ab[key.format("B")] @ ab[key.format("A")])
        exact, twice = exact + update, (twice + update).bfloat16().float()
    assert merged[name].dtype == torch.bfloat16
    assert_close(merged[name].float(), exact, rtol=2 ** -8, atol=0)      # half a unit in the last
    assert (merged[name].float() - exact).norm() < 0.9 * (twice - exact).norm()


def test_what_rounding_took_by_hand(capsys, tmp_path, tiny_model, adapter_of):
    # W = 1, bfloat16 steps of 2^-7 above it. U = (2^-7, 2^-9): the first is added exactly, the
    # second vanishes: error² / size² = 2^-18 / (2^-14 + 2^-18) = 1 / 17, one of two entries
    # unchanged.
    model = torch.nn.Module()
    model.layer = Linear(1, 2).bfloat16()
    model.layer.weight.data.fill_(1)
    add_lora(model, r=1, alpha=1, dropout=0.0, target_modules=["layer"])
    model.layer.lora_A.data.fill_(1)
    model.layer.lora_B.data = torch.tensor([[2.0 ** -7], [2.0 ** -9]])
    assert export.rounding_loss(model) == (pytest.approx(17 ** -0.5), 0.5)
    run("--model", tiny_model, "--adapter", adapter_of("a"), "--out", tmp_path / "out",
        "--dtype", "bfloat16")
    shown = capsys.readouterr().out
    assert "rounding to bfloat16 took 0." in shown
    assert "of the entries it changes as they were" in shown


def test_one_copy_of_the_model_at_a_time(tmp_path, tiny_model, adapter_of, monkeypatch):
    # 7 B weights are 14 GB: the merged model must be gone before the written one is loaded.
    models = []

    def load(path, dtype):
        assert all(p.is_meta for model in models for p in model.parameters())
        models.append(load_llama(path, dtype))
        return models[-1]

    monkeypatch.setattr(export, "load_llama", load)
    run("--model", tiny_model, "--adapter", adapter_of("a"), "--out", tmp_path / "out")
    assert len(models) == 2


def test_a_folder_that_computes_something_else_is_not_left_behind(tmp_path, tiny_model, adapter_of,
                                                                  monkeypatch):
    # One merged weight damaged on its way to disk.
    def save(model, folder):
        model.model.layers[1].self_attn.v_proj.weight.data[3] += 0.1
        real_save(model, folder)

    real_save = export.save_llama
    monkeypatch.setattr(export, "save_llama", save)
    with pytest.raises(ValueError, match="logits of what was written are off by"):
        run("--model", tiny_model, "--adapter", adapter_of("a"), "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_exported_is_refused_and_nothing_written(tmp_path, tiny_model, adapter_of):
    # An output that holds anything is never written into; an empty folder is as good as none.
    adapter, full, file = adapter_of("a"), tmp_path / "full", tmp_path / "file"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    file.write_text("mine")
    before = tree_of(tmp_path)
    for out in (full, file):
        with pytest.raises(ValueError, match=f"{out} is there already"):
            run("--model", tiny_model, "--adapter", adapter, "--out", out)
    with pytest.raises(FileNotFoundError, match="adapter_config.json: no such file"):
        run("--model", tiny_model, "--adapter", tiny_model, "--out", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="no such tokenizer file"):
        run("--model", adapter, "--adapter", adapter, "--out", tmp_path / "out")
    assert tree_of(tmp_path) == before
    (tmp_path / "out").mkdir()
    run("--model", tiny_model, "--adapter", adapter, "--out", tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").exists()


def test_two_exports_to_one_folder_are_one_too_many(tmp_path, tiny_model, adapter_of):
    # They would write into one temporary folder, and the second would remove the first one's.
    flags = ("--model", tiny_model, "--adapter", adapter_of("a"), "--out", tmp_path / "out/")
    with locked(str(tmp_path / "out.lock"), "out"):
        with pytest.raises(ValueError, match="out is in use by process"):
            run(*flags)
    run(*flags)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "out"]
