"""PEFT's adapter files: what is written, what is read, what is refused."""
import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
from helpers_models import (ALL_LINEAR, adapted_model, base_model, hidden_of, saved_adapter,
                            trained)
from safetensors.torch import load_file, save_file

import lora
from lora import adapter_tensors, add_lora, load_adapter, lora_layers, save_adapter


def read_config(path):
    return json.loads(Path(path, "adapter_config.json").read_text())


def edit_config(path, **values):
    """Change values of adapter_config.json; the value "drop" removes a key."""
    config = read_config(path) | values
    Path(path, "adapter_config.json").write_text(json.dumps(
        {key: value for key, value in config.items() if value != "drop"}))


def test_names_and_shapes_are_those_of_peft(tmp_path):
    # From PEFT's get_peft_model_state_dict: a LlamaForCausalLM of width 24 with two kv heads of 6,
    # r = 3 on q_proj and v_proj.
    _, path = saved_adapter(tmp_path)
    tensors = load_file(os.path.join(path, "adapter_model.safetensors"))
    layer = "base_model.model.model.layers.{}.self_attn."
    assert {name: list(t.shape) for name, t in tensors.items()} == {
        layer.format(0) + "q_proj.lora_A.weight": [3, 24],
        layer.format(0) + "q_proj.lora_B.weight": [24, 3],
        layer.format(0) + "v_proj.lora_A.weight": [3, 24],
        layer.format(0) + "v_proj.lora_B.weight": [12, 3],
        layer.format(1) + "q_proj.lora_A.weight": [3, 24],
        layer.format(1) + "q_proj.lora_B.weight": [24, 3],
        layer.format(1) + "v_proj.lora_A.weight": [3, 24],
        layer.format(1) + "v_proj.lora_B.weight": [12, 3]}
    assert {t.dtype for t in tensors.values()} == {torch.float32}


def test_adapter_config_is_that_of_peft(tmp_path):
    # What PEFT's PeftConfig.from_pretrained reads. lora_alpha is alpha, not alpha / r.
    _, path = saved_adapter(tmp_path, r=3, alpha=32, dropout=0.1, targets=["v_proj", "q_proj"])
    config = read_config(path)
    assert config == {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "vicuna-7b-v1.5",
        "r": 3, "lora_alpha": 32, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"],
        "bias": "none", "fan_in_fan_out": False, "init_lora_weights": True,
        "modules_to_save": None, "use_rslora": False, "use_dora": False, "inference_mode": True}
    assert isinstance(config["lora_alpha"], int)


@pytest.mark.parametrize("r, alpha", [(3, 7), (4, 0.5), (8, 32), (49, 1)])
def test_alpha_survives_saving(r, alpha, tmp_path):
    # alpha is recovered from scaling = alpha / r: 1 / 49 · 49 is 1 - 2^-53 in floating point.
    _, path = saved_adapter(tmp_path, r=r, alpha=alpha)
    assert math.isclose(read_config(path)["lora_alpha"], alpha, rel_tol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_adapters", [False, True])
def test_round_trip_is_bit_exact(has_adapters, dtype, tmp_path):
    # Loaded on a model without adapters, or into adapters with another alpha: the same function to
    # the bit, on a float32 and on a bfloat16 base.
    model, path = saved_adapter(tmp_path, dtype=dtype, r=3, alpha=7, targets=ALL_LINEAR)
    other = (adapted_model(dtype, r=3, alpha=100, targets=ALL_LINEAR, seed=0) if has_adapters
             else base_model(dtype))
    if has_adapters:
        for layer in lora_layers(other).values():
            layer.lora_A.data.fill_(9)
    assert load_adapter(other, path) is other
    expected = adapter_tensors(model)
    assert list(adapter_tensors(other)) == list(expected)
    for name, t in adapter_tensors(other).items():
        assert t.dtype == torch.float32 and torch.equal(t, expected[name])
    assert torch.equal(hidden_of(other), hidden_of(model))
    assert trained(other) == trained(model)


def test_loaded_adapter_has_no_dropout(tmp_path):
    # 0 whatever the file has: with dropout, an objective that compares with a reference would start
    # with random log-ratios.
    _, path = saved_adapter(tmp_path, dropout=0.5)
    model = load_adapter(base_model(), path).train()
    assert {layer.dropout for layer in lora_layers(model).values()} == {0.0}


def test_all_misfits_of_an_adapter_are_listed_at_once(tmp_path):
    # One missing, one mis-shaped, one unexpected: three names in one error.
    _, path = saved_adapter(tmp_path)
    file, layer = os.path.join(path, "adapter_model.safetensors"), "base_model.model.model.layers."
    tensors = load_file(file)
    del tensors[layer + "1.self_attn.v_proj.lora_B.weight"]
    tensors[layer + "0.self_attn.q_proj.lora_A.weight"] = torch.zeros(5, 24)
    tensors[layer + "2.self_attn.q_proj.lora_A.weight"] = torch.zeros(3, 24)
    save_file(tensors, file)
    with pytest.raises(ValueError, match="does not fit the model: ") as error:
        load_adapter(base_model(), path)
    assert str(error.value).startswith(file)
    assert sorted(str(error.value).split("the model: ")[1].split("; ")) == [
        f"{layer}0.self_attn.q_proj.lora_A.weight is [5, 24], expected [3, 24]",
        f"missing {layer}1.self_attn.v_proj.lora_B.weight [12, 3]",
        f"unexpected {layer}2.self_attn.q_proj.lora_A.weight [3, 24]"]


def test_a_misfit_leaves_existing_adapters_alone(tmp_path):
    # A refused file must not be half loaded.
    _, path = saved_adapter(tmp_path, seed=5)
    file = os.path.join(path, "adapter_model.safetensors")
    save_file(load_file(file) | {"extra": torch.zeros(1)}, file)
    model = adapted_model()
    before = {name: t.clone() for name, t in adapter_tensors(model).items()}
    with pytest.raises(ValueError, match=r"unexpected extra \[1\]"):
        load_adapter(model, path)
    assert all(torch.equal(t, before[name]) for name, t in adapter_tensors(model).items())


@pytest.mark.parametrize("values, words", [
    ({"use_rslora": True}, "only plain LoRA is supported, not use_rslora = True"),
    ({"use_dora": True}, "not use_dora = True"),
    ({"bias": "all"}, "not bias = 'all'"),
    ({"peft_type": "IA3"}, "not peft_type = 'IA3'"),
    ({"modules_to_save": ["lm_head"]}, r"not modules_to_save = \['lm_head'\]"),
    ({"rank_pattern": {"q_proj": 4}}, "not rank_pattern = {'q_proj': 4}"),
    ({"alpha_pattern": {"q_proj": 4}}, "not alpha_pattern"),
    ({"layers_to_transform": [0]}, r"not layers_to_transform = \[0\]"),
    ({"fan_in_fan_out": True}, "not fan_in_fan_out = True"),
    ({"layer_replication": [[0, 2]]}, "not layer_replication"),
    ({"use_dora": True, "bias": "all"}, "not bias = 'all', use_dora = True"),
    ({"init_lora_weights": "pissa_niter_4"}, "not init_lora_weights = 'pissa_niter_4'"),
    ({"exclude_modules": ["k_proj"]}, r"not exclude_modules = \['k_proj'\]"),
    ({"an_idea_of_2027": 1}, "not an_idea_of_2027 = 1"),
    ({"target_modules": "("}, r"target_modules '\(': missing \), unterminated subpattern"),
    ({"target_modules": ".*c_attn"}, r"no linear layer is called \.\*c_attn; there are"),
    ({"r": "8"}, "adapter_config.json: r is '8'; PEFT writes an integer r"),
    ({"r": 0, "lora_alpha": None}, "r is 0, lora_alpha is None; PEFT writes"),
    ({"r": True}, "r is True; PEFT writes"), ({"lora_alpha": True}, "lora_alpha is True; PEFT"),
    ({"r": 2 ** 62}, r"says r = 4611686018427387904, and the file's lora_A have 3 rows"),
    ({"r": 4}, "says r = 4, and the file's lora_A have 3 rows"),
    ({"lora_alpha": 10 ** 400}, "adapter_config.json: not JSON: 10.* is too large a number"),
    ({"lora_alpha": float("inf")}, "not JSON: Infinity is not a number"),
    ({"modules_to_save": [[1]]}, r"modules_to_save is \[\[1\]\]; PEFT writes"),
    ({"target_modules": "((" * 9000}, "target_modules '.*': maximum recursion depth"),
    ({"target_modules": "a{99999999999999999999}"}, "the repetition number is too large"),
    ({"target_modules": 3}, "target_modules is 3; PEFT writes"),
    ({"target_modules": [1]}, r"target_modules is \[1\]; PEFT writes"),
    ({"modules_to_save": 1}, "modules_to_save is 1; PEFT writes"),
    ({"r": "drop", "peft_type": "drop"}, "adapter_config.json: missing peft_type, r"),
    ({"target_modules": ["c_attn"]}, "no linear layer is called c_attn"),
])
def test_adapters_that_are_not_plain_lora_are_refused(values, words, tmp_path):
    # Each would load and compute another function than PEFT does (rsLoRA divides by sqrt(r), …).
    _, path = saved_adapter(tmp_path)
    edit_config(path, **values)
    with pytest.raises(ValueError, match=words):
        load_adapter(base_model(), path)


def test_a_pattern_that_takes_for_ever_is_stopped(tmp_path, monkeypatch):
    # (.*)*x tries every way to cut a name into pieces: 2^32 of them. The handler is put back.
    monkeypatch.setattr(lora, "PATTERN_SECONDS", 0.05)
    before = signal.getsignal(signal.SIGALRM)
    _, path = saved_adapter(tmp_path)
    edit_config(path, target_modules="(.*)*x")
    with pytest.raises(ValueError, match=r"target_modules '\(\.\*\)\*x': takes more than 0.05 s"):
        load_adapter(base_model(), path)
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.parametrize("targets, written", [
    (ALL_LINEAR, sorted(ALL_LINEAR)),
    ("all-linear", sorted(ALL_LINEAR)),
    (r".*\.(q|v)_proj", ["q_proj", "v_proj"]),
    (["0.self_attn.q_proj", "model.layers.1.mlp.up_proj"],
     ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"]),
])
def test_targets_mean_what_they_mean_to_peft(targets, written, tmp_path):
    # A list holds ends of names after a dot, a text is a pattern for whole names: "q_proj" as a
    # pattern matches none. The saved targets must name these layers and no others.
    model, path = saved_adapter(tmp_path, targets=targets)
    assert read_config(path)["target_modules"] == written
    again = load_adapter(base_model(), path)
    assert list(lora_layers(again)) == list(lora_layers(model))
    assert torch.equal(hidden_of(again), hidden_of(model))
    assert len(lora_layers(model)) == {"all-linear": 14, r".*\.(q|v)_proj": 4}.get(
        targets if isinstance(targets, str) else "", 14 if targets is ALL_LINEAR else 2)
    with pytest.raises(ValueError, match="no linear layer is called q_proj"):
        add_lora(base_model(), target_modules="q_proj")


def test_missing_adapter_files_are_named(tmp_path):
    # A base model's folder, or an interrupted download.
    with pytest.raises(FileNotFoundError, match="adapter_config.json: no such file"):
        load_adapter(base_model(), str(tmp_path))
    _, path = saved_adapter(tmp_path)
    os.remove(os.path.join(path, "adapter_model.safetensors"))
    with pytest.raises(FileNotFoundError, match="adapter_model.safetensors: no such file"):
        load_adapter(base_model(), path)
    with pytest.raises(ValueError, match="the model has no adapter to save"):
        save_adapter(base_model(), path)
