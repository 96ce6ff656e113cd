"""Saved folders, models with adapters and rollouts that several test files share.

What more tests need is in helpers.py.
"""
import json
import os
from collections import OrderedDict

import pytest
import torch
from helpers import GQA, make_llama, make_model, make_trees
from plain import random_weights
from safetensors.torch import load_file

from files.config import LlamaConfig
from files.weights import weight_files
from lora import add_lora, lora_layers, save_adapter
from model import Llama, save_llama
from rlhf.rollouts import score_responses
from step import Compute

# ---- weight files -------------------------------------------------------------------------------

each_kind = pytest.mark.parametrize("kind", ["safetensors", "bin"])


def saved(tmp_path, config=GQA, dtype=torch.float32, kind="safetensors", **options):
    """A model and its folder: our safetensors, or the .bin files transformers 4 made of them."""
    model, path = make_llama(config)[0].to(dtype), str(tmp_path)
    save_llama(model, path, **options)
    if kind == "bin":
        convert_to_bin(path)
    return model, path


def convert_to_bin(path):
    """Rewrite the safetensors of a folder as .bin state dicts, with their index."""
    for file in weight_files(path):
        state = OrderedDict((name, torch.nn.Parameter(t)) for name, t in load_file(file).items())
        state._metadata = {"": {"version": 1}}                       # what nn.Module adds
        torch.save(state, os.path.join(path, bin_name(os.path.basename(file))))
        os.remove(file)
    index = index_file(path, "safetensors")
    if os.path.isfile(index):
        content = read_index(path, "safetensors")
        content["weight_map"] = {k: bin_name(v) for k, v in content["weight_map"].items()}
        os.remove(index)
        write_index(path, "bin", content)


def bin_name(name):
    return name.replace("model", "pytorch_model", 1).replace(".safetensors", ".bin")


def index_file(path, kind):
    return os.path.join(path, {"bin": "pytorch_model.bin.index.json",
                               "safetensors": "model.safetensors.index.json"}[kind])


def read_index(path, kind):
    with open(index_file(path, kind), encoding="utf-8") as file:
        return json.load(file)


def write_index(path, kind, content):
    with open(index_file(path, kind), "w", encoding="utf-8") as file:
        json.dump(content, file)


def assert_same_model(loaded, model):
    assert loaded.config == model.config
    expected = model.state_dict()
    assert list(loaded.state_dict()) == list(expected)
    for name, t in loaded.state_dict().items():
        assert t.dtype == expected[name].dtype and torch.equal(t, expected[name]), name
    assert all(p.requires_grad and p.is_leaf for p in loaded.parameters())


# ---- models with adapters -----------------------------------------------------------------------

LORA_CONFIG = LlamaConfig(vocab_size=31, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
                          num_attention_heads=4, num_key_value_heads=2, rope_theta=100.0)
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ROW = torch.tensor([1, 5, 7, 30, 0, 7, 12, 3, 2])


def base_model(dtype=torch.float32, seed=0):
    model = Llama(LORA_CONFIG)
    model.load_state_dict(random_weights(LORA_CONFIG, seed))
    return model.to(dtype)


def adapted_model(dtype=torch.float32, r=3, alpha=6, dropout=0.0, targets=("q_proj", "v_proj"),
                  seed=0):
    """A base model with adapters whose B is not zero, as after training."""
    model = add_lora(base_model(dtype, seed), r, alpha, dropout, targets)
    generator = torch.Generator().manual_seed(seed + 1)
    for layer in lora_layers(model).values():
        for p in (layer.lora_A, layer.lora_B):
            p.data = 0.2 * torch.randn(p.shape, generator=generator).to(p.dtype)
    return model


def saved_adapter(tmp_path, **options):
    """An adapted model and the folder of its adapter."""
    model = adapted_model(**options)
    save_adapter(model, str(tmp_path), base_model="vicuna-7b-v1.5")
    return model, str(tmp_path)


def hidden_of(model):
    with torch.no_grad():
        return model(ROW)


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


# ---- PPO ----------------------------------------------------------------------------------------

def three_models():
    """Policy, value function and reward model: unlike each other, float64."""
    return (make_model(), make_model(seed=1, score_head=True),
            make_model(seed=2, score_head=True))


def make_rollouts(policy, value, reward_model, trees=None):
    """The rollouts of some trees, EOS being token 2 and its penalty 0.5."""
    return score_responses(policy, value, reward_model, trees or make_trees(), eos_ids={2},
                           missing_eos_penalty=0.5, compute=Compute(micro_tokens=64))
