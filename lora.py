"""LoRA: y = x Wᵀ + scaling · x Aᵀ Bᵀ with W frozen (arXiv:2106.09685); adapters in PEFT's format.

The reference model of an objective is this same model with its adapters off:

    add_lora(model, r=8, alpha=32)
    with torch.no_grad(), lora_disabled(model):
        reference_hidden = model(input_ids)
"""
import json
import math
import os
from contextlib import contextmanager

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from model import Linear, linear
from weights import misfits, read_files, read_json

PREFIX = "base_model.model."        # PEFT wraps the model twice


class LoRALinear(nn.Module):
    """A frozen linear layer with a low-rank update.

    weight   [out, in]   the base layer's own parameter, under its own name
    lora_A   [r, in]     float32, uniform ± 1/sqrt(in) (kaiming with a = sqrt 5, as PEFT)
    lora_B   [out, r]    float32, zero: the update starts at nothing
    """

    def __init__(self, base: Linear, r: int, alpha: float, dropout: float):
        super().__init__()
        self.weight = base.weight.requires_grad_(False)
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        place = {"dtype": wide, "device": self.weight.device}
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features, **place))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, **place))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.scaling, self.dropout, self.enabled = alpha / r, dropout, True

    def forward(self, x: Tensor) -> Tensor:
        y = linear(x, self.weight)                                               # [T, out]
        if not self.enabled:
            return y
        x = F.dropout(x, self.dropout, self.training)
        low = linear(x, self.lora_A.to(x.dtype))                                 # [T, r]
        return y + self.scaling * linear(low, self.lora_B.to(x.dtype))


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def add_lora(model: nn.Module, r: int = 8, alpha: float = 32, dropout: float = 0.1,
             target_modules=("q_proj", "v_proj")) -> nn.Module:
    """Freeze `model` and put an adapter on every linear layer whose last name is a target.

    Set dropout=0 for an objective that compares with the reference: with dropout the two would
    differ before the first step.
    raises  ValueError for a target that names no linear layer, an adapter already there, r < 1
    """
    if r < 1 or lora_layers(model):
        raise ValueError(f"r = {r} must be at least 1" if r < 1 else "the model has adapters")
    # not the head: its weight is used by kernels/, it is never called
    found = [(name, module) for name, module in model.named_modules()
             if isinstance(module, Linear) and name != "lm_head"]
    names = {name.rpartition(".")[2] for name, _ in found}
    if unknown := set(target_modules) - names:
        raise ValueError(f"no linear layer is called {', '.join(sorted(unknown))}; "
                         f"there are {', '.join(sorted(names))}")
    model.requires_grad_(False)
    for name, module in found:
        parent, _, last = name.rpartition(".")
        if last in target_modules:
            setattr(model.get_submodule(parent), last, LoRALinear(module, r, alpha, dropout))
    return model


@contextmanager
def lora_disabled(model: nn.Module):
    """Inside, the model is the base model: its adapters are off."""
    layers = [layer for layer in lora_layers(model).values() if layer.enabled]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


@torch.no_grad()
def merge_lora(model: nn.Module) -> nn.Module:
    """W <- W + scaling · B A, formed in float32, and plain linear layers again.

    In bf16 the sum is rounded to bf16: small updates partly vanish; merge a float32 model.
    """
    for name, layer in lora_layers(model).items():
        merged = Linear(layer.weight.shape[1], layer.weight.shape[0])
        update = layer.scaling * (layer.lora_B @ layer.lora_A)                   # [out, in]
        merged.weight = nn.Parameter((layer.weight.to(update.dtype) + update).to(layer.weight.dtype))
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, merged)
    return model


# ---- PEFT's files -------------------------------------------------------------------------------

def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """PEFT's names for the adapters' parameters."""
    return {f"{PREFIX}{name}.{part}.weight": getattr(layer, part).data
            for name, layer in lora_layers(model).items() for part in ("lora_A", "lora_B")}


def save_adapter(model: nn.Module, path: str, base_model: str = "") -> None:
    """Write adapter_config.json and adapter_model.safetensors, as PeftModel.from_pretrained reads."""
    layers = lora_layers(model)
    if not layers:
        raise ValueError("the model has no adapter to save")
    layer = next(iter(layers.values()))
    r = layer.lora_A.shape[0]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_model,
              "r": r, "lora_alpha": layer.scaling * r, "lora_dropout": layer.dropout,
              "target_modules": sorted({name.rpartition(".")[2] for name in layers}),
              "bias": "none", "fan_in_fan_out": False, "init_lora_weights": True,
              "modules_to_save": None, "use_rslora": False, "use_dora": False,
              "inference_mode": True}
    if config["lora_alpha"] == int(config["lora_alpha"]):
        config["lora_alpha"] = int(config["lora_alpha"])
    os.makedirs(path, exist_ok=True)
    with open(os.path.join(path, "adapter_config.json"), "w", encoding="utf-8") as stream:
        json.dump(config, stream, indent=2)
    tensors = {name: t.contiguous() for name, t in adapter_tensors(model).items()}
    save_file(tensors, os.path.join(path, "adapter_model.safetensors"), metadata={"format": "pt"})


def load_adapter(model: nn.Module, path: str) -> nn.Module:
    """Put the adapter of a PEFT folder on `model`, without dropout; or into the adapters it has,
    whose dropout stays (a resumed run must go on with its own).

    raises  ValueError listing every missing, unexpected and mis-shaped tensor, and for a config
            that is not plain LoRA
    """
    file = os.path.join(path, "adapter_config.json")
    if not os.path.isfile(file):
        raise FileNotFoundError(f"{file}: no such file (a PEFT adapter folder has one)")
    config = read_json(file)
    if missing := {"peft_type", "r", "lora_alpha", "target_modules"} - set(config):
        raise ValueError(f"{file}: missing {', '.join(sorted(missing))}")
    plain = {"peft_type": "LORA", "use_rslora": False, "use_dora": False, "bias": "none",
             "fan_in_fan_out": False, "modules_to_save": None, "rank_pattern": {},
             "alpha_pattern": {}, "layers_to_transform": None, "layer_replication": None}
    wrong = [f"{key} = {config[key]!r}" for key, value in plain.items()
             if config.get(key, value) not in (value, None)]
    if wrong:
        raise ValueError(f"{file}: only plain LoRA is supported, not {', '.join(wrong)}")
    if not lora_layers(model):
        targets = config["target_modules"]
        add_lora(model, config["r"], config["lora_alpha"], 0.0,
                 [targets] if isinstance(targets, str) else targets)
    expected = adapter_tensors(model)
    file = os.path.join(path, "adapter_model.safetensors")
    if not os.path.isfile(file):
        raise FileNotFoundError(f"{file}: no such file")
    if problems := misfits([file], {name: t.shape for name, t in expected.items()}):
        raise ValueError(f"{file}: does not fit the model: " + "; ".join(problems))
    for name, tensor in read_files([file]):
        expected[name].copy_(tensor)
    for layer in lora_layers(model).values():
        layer.scaling = config["lora_alpha"] / config["r"]
    return model
