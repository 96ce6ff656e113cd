"""LoRA: y = x Wᵀ + scaling · x Aᵀ Bᵀ with W frozen (arXiv:2106.09685); adapters in PEFT's format.

The reference model of an objective is this same model with its adapters off:

    add_lora(model, r=8, alpha=32)
    with torch.no_grad(), lora_disabled(model) as reference:
        reference_hidden = reference(input_ids)

Several models can stand on one set of frozen weights, each with an adapter of its own:

    value = add_lora(share_base(model))
"""
import math
import os
import re
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from files.folders import what_it_is
from files.manifest import check_final
from files.text import read_json, write_json
from files.weights import misfits, read_file, read_files, save_tensors
from kernels.lora_linear import linear, lora_linear
from model import Linear, Llama

PREFIX = "base_model.model."        # PEFT wraps the model twice
PATTERN_SECONDS = 2.0               # for a regular expression that names layers
MAX_R = 2 ** 16                     # a larger rank is a mistake, and exhausts the memory

# Keys of adapter_config.json that are read below or change no number, and keys accepted with these
# values only (other initialisations, such as PiSSA's, change the base model's weights).
IGNORED_KEYS = {"auto_mapping", "base_model_name_or_path", "inference_mode", "lora_alpha",
                "lora_dropout", "megatron_core", "peft_version", "qalora_group_size", "r",
                "revision", "target_modules", "task_type"}
ACCEPTED_VALUES = {"peft_type": ("LORA",), "bias": ("none",),
                   "init_lora_weights": (True, "gaussian", "orthogonal")}


class WithUpdates(nn.Module):
    """A layer whose `updates` move with it: `.to(device)` and `.float()` reach them too."""

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.updates = tuple((fn(lora_A), fn(lora_B), scaling)
                             for lora_A, lora_B, scaling in self.updates)
        return self


class AdaptedLinear(WithUpdates, Linear):
    """A linear layer with updates that belong to the base model: never trained, saved or switched
    off.

    updates   ((lora_A, lora_B, scaling), …)   added unmerged: exact, whatever the weights' dtype
    """

    def __init__(self, weight: nn.Parameter, updates: tuple):
        nn.Module.__init__(self)
        self.weight, self.updates = weight, updates

    def forward(self, x: Tensor) -> Tensor:
        return lora_linear(x, self.weight, self.updates)                         # [T, out]


class LoRALinear(WithUpdates):
    """A frozen linear layer with a low-rank update.

    weight   [out, in]   the base layer's own parameter, under its own name
    lora_A   [r, in]     float32, uniform ± 1/sqrt(in) (kaiming with a = sqrt 5, as PEFT)
    lora_B   [out, r]    float32, zero: the update starts at nothing
    updates              those of the base layer, see AdaptedLinear
    """

    def __init__(self, base: Linear, r: int, alpha: float, dropout: float):
        super().__init__()
        self.weight = base.weight.requires_grad_(False)
        self.updates = getattr(base, "updates", ())
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        # drawn on the CPU: a seed gives the same adapter on every device
        lora_A = torch.empty(r, self.weight.shape[1], dtype=wide, device="cpu")
        nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))
        self.lora_A = nn.Parameter(lora_A.to(self.weight.device))
        self.lora_B = nn.Parameter(self.lora_A.new_zeros(self.weight.shape[0], r))
        self.scaling, self.dropout, self.enabled = alpha / r, dropout, True

    def forward(self, x: Tensor) -> Tensor:
        own = (self.lora_A, self.lora_B, self.scaling)
        if not self.enabled:
            return lora_linear(x, self.weight, self.updates)                     # [T, out]
        if not (self.dropout and self.training):
            return lora_linear(x, self.weight, (*self.updates, own))
        y = lora_linear(x, self.weight, self.updates)
        x = F.dropout(x, self.dropout)
        low = self.scaling * linear(x, self.lora_A.to(x.dtype))                  # [T, r]
        return y + linear(low, self.lora_B.to(x.dtype))


def weight_update(layer: LoRALinear | AdaptedLinear) -> Tensor:
    """Σ scaling · B A, what all adapters add to the layer's weight: [out, in] float32."""
    own = [(layer.lora_A, layer.lora_B, layer.scaling)] if isinstance(layer, LoRALinear) else []
    return sum(scaling * (lora_B @ lora_A) for lora_A, lora_B, scaling in [*layer.updates, *own])


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def updated_layers(model: nn.Module) -> dict[str, LoRALinear | AdaptedLinear]:
    """Layers with an update on top of W."""
    return {name: m for name, m in model.named_modules()
            if isinstance(m, (LoRALinear, AdaptedLinear))}


def linear_names(model: nn.Module) -> list[str]:
    """Names of the linear layers, adapted or not."""
    # no head: kernels/ reads that of the vocabulary, and a reward model's is trained as a whole
    return [name for name, module in model.named_modules()
            if isinstance(module, (Linear, LoRALinear)) and name not in ("lm_head", "score")]


def fully_matched(pattern: str, names: list[str]) -> list[str]:
    """The names that a regular expression matches as a whole.

    raises   ValueError for a bad expression, and for one that needs more than PATTERN_SECONDS: some
             try exponentially many ways. An alarm ends it, in the main thread alone.
    """
    def stop(number: int, frame: Any) -> None:
        raise TimeoutError
    alarmed = threading.current_thread() is threading.main_thread()
    try:
        if alarmed:
            before = signal.signal(signal.SIGALRM, stop)
            signal.setitimer(signal.ITIMER_REAL, PATTERN_SECONDS)
        compiled = re.compile(pattern)
        return [name for name in names if compiled.fullmatch(name)]
    except (re.error, RecursionError, OverflowError, TimeoutError) as error:
        reason = f"takes more than {PATTERN_SECONDS:g} s" if isinstance(
            error, TimeoutError) else error
        raise ValueError(f"target_modules {pattern[:80]!r}: {reason}") from None
    finally:
        if alarmed:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def matching(names: list[str], target_modules: str | Sequence[str]) -> list[str]:
    """The names that target_modules selects, by PEFT's rules.

    target_modules  names or their ends ("q_proj", "0.self_attn.q_proj"); or one text: a regular
                    expression for whole names, or "all-linear"
    raises          ValueError naming the targets that select no layer, or for a bad expression
    """
    if target_modules == "all-linear":
        return names
    if isinstance(target_modules, str):
        selected = {target_modules: fully_matched(target_modules, names)}
    else:
        selected = {target: [name for name in names if f".{name}".endswith(f".{target}")]
                    for target in target_modules}
    if unknown := sorted(target for target in selected if not selected[target]):
        raise ValueError(f"no linear layer is called {', '.join(unknown)}; there are "
                         f"{', '.join(sorted({name.rpartition('.')[2] for name in names}))}")
    return [name for name in names if any(name in found for found in selected.values())]


def add_lora(model: nn.Module, r: int = 8, alpha: float = 32, dropout: float = 0.1,
             target_modules: str | Sequence[str] = ("q_proj", "v_proj")) -> nn.Module:
    """Freeze `model` and put an adapter on every linear layer that is a target (see `matching`).

    Set dropout=0 for an objective that compares with the reference: with dropout the two would
    differ before the first step.
    raises  ValueError for a target that names no linear layer, an adapter already there, r < 1
    """
    if not 1 <= r <= MAX_R or lora_layers(model):
        raise ValueError("the model has adapters" if 1 <= r <= MAX_R else
                         f"r = {r} must be at least 1, and at most {MAX_R}")
    names = matching(linear_names(model), target_modules)
    model.requires_grad_(False)
    for name in names:
        model.set_submodule(name, LoRALinear(model.get_submodule(name), r, alpha, dropout))
    return model


def share_base(model: nn.Module) -> nn.Module:
    """Another Llama whose weights are those of `model`, frozen and not copied, without its adapter.

    An SFT adapter that belongs to the base (see AdaptedLinear) belongs to the other's base too.
    """
    with torch.device("meta"):
        twin = type(model)(model.config)
    base = model.state_dict()                      # an adapted layer keeps its weight's name
    twin.load_state_dict({name: base[name] for name in twin.state_dict()}, assign=True)
    if model.config.tie_word_embeddings:
        twin.lm_head.weight = twin.model.embed_tokens.weight
    for name, layer in updated_layers(model).items():
        if layer.updates:
            twin.set_submodule(name, AdaptedLinear(twin.get_submodule(name).weight, layer.updates))
    return twin.requires_grad_(False)


@contextmanager
def lora_disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, the model, which it yields, is the base model: its adapters are off."""
    layers = [layer for layer in lora_layers(model).values() if layer.enabled]
    for layer in layers:
        layer.enabled = False
    try:
        yield model
    finally:
        for layer in layers:
            layer.enabled = True


@torch.no_grad()
def merge_lora(model: nn.Module) -> nn.Module:
    """W <- W + Σ scaling · B A, formed in float32, and plain linear layers again.

    In bf16 the sum is rounded to bf16: small updates partly vanish; merge a float32 model.
    """
    for name, layer in updated_layers(model).items():
        update, weight = weight_update(layer), layer.weight                      # [out, in]
        with torch.device("meta"):                      # its first weights are never used
            merged = Linear(*reversed(weight.shape))
        merged.weight = nn.Parameter((weight.to(update.dtype) + update).to(weight.dtype))
        model.set_submodule(name, merged)
    return model


def freeze_lora(model: nn.Module) -> nn.Module:
    """Make the adapters part of the base model, unmerged; the next `add_lora` goes on top."""
    for name, layer in lora_layers(model).items():
        own = (layer.lora_A.detach(), layer.lora_B.detach(), layer.scaling)
        model.set_submodule(name, AdaptedLinear(layer.weight, (*layer.updates, own)))
    return model


def add_score_head(model: Llama) -> Llama:
    """Make it a reward model: give it `score.weight` [1, D], trained, in float32.

    Zero, so all rewards start at 0. Saved in the adapter's own file, where PEFT has it: listed in
    `modules_to_save`, for transformers' LlamaForSequenceClassification with num_labels = 1.
    """
    embedding = model.model.embed_tokens.weight
    model.score = Linear(model.config.hidden_size, 1).to(
        embedding.device, torch.promote_types(embedding.dtype, torch.float32))
    torch.nn.init.zeros_(model.score.weight)
    return model


# ---- PEFT's files -------------------------------------------------------------------------------

def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """PEFT's names for what is trained: the adapters, and a reward model's head."""
    head = {f"{PREFIX}score.weight": model.score.weight.data} if hasattr(model, "score") else {}
    return head | {f"{PREFIX}{name}.{part}.weight": getattr(layer, part).data
                   for name, layer in lora_layers(model).items() for part in ("lora_A", "lora_B")}


def save_adapter(model: nn.Module, path: str, base_model: str = "") -> None:
    """Write adapter_config.json and adapter_model.safetensors for PeftModel.from_pretrained."""
    layers = lora_layers(model)
    if not layers:
        raise ValueError("the model has no adapter to save")
    layer = next(iter(layers.values()))
    r = layer.lora_A.shape[0]
    targets = sorted({name.rpartition(".")[2] for name in layers})
    if len(matching(linear_names(model), targets)) > len(layers):
        targets = sorted(layers)                        # not on every layer of these names
    has_head = hasattr(model, "score")
    alpha = layer.scaling * r
    os.makedirs(path, exist_ok=True)
    write_json(os.path.join(path, "adapter_config.json"), {
        "peft_type": "LORA", "task_type": "SEQ_CLS" if has_head else "CAUSAL_LM",
        "base_model_name_or_path": base_model, "r": r,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha, "lora_dropout": layer.dropout,
        "target_modules": targets, "bias": "none", "fan_in_fan_out": False,
        "init_lora_weights": True, "modules_to_save": ["score"] if has_head else None,
        "use_rslora": False, "use_dora": False, "inference_mode": True})
    tensors = {name: t.contiguous() for name, t in adapter_tensors(model).items()}
    save_tensors(tensors, os.path.join(path, "adapter_model.safetensors"), {"format": "pt"})


def read_adapter_config(path: str, has_head: bool) -> dict:
    """The adapter_config.json of a PEFT folder.

    has_head   the model has a score head, so the adapter may save one
    raises     FileNotFoundError without one; ValueError for values of the wrong type, and for
               anything but plain LoRA
    """
    file = os.path.join(path, "adapter_config.json")
    if not os.path.isfile(file):
        raise FileNotFoundError(f"{file}: no such file (a PEFT adapter folder has one)"
                                f"{what_it_is(path, 'adapter')}")
    config = read_json(file)
    if missing := {"peft_type", "r", "lora_alpha", "target_modules"} - set(config):
        raise ValueError(f"{file}: missing {', '.join(sorted(missing))}")
    targets, saved = config["target_modules"], config.get("modules_to_save") or []
    names = [targets] if isinstance(targets, str) else targets
    fits = {"r": type(config["r"]) is int and config["r"] > 0,
            "lora_alpha": type(config["lora_alpha"]) in (int, float),
            "target_modules": isinstance(names, list) and all(isinstance(n, str) for n in names),
            "modules_to_save": isinstance(saved, list) and all(isinstance(n, str) for n in saved)}
    if bad := [f"{key} is {config.get(key)!r}" for key in fits if not fits[key]]:
        raise ValueError(f"{file}: {', '.join(bad)}; PEFT writes an integer r, a number "
                         "lora_alpha, names or a pattern target_modules, a list modules_to_save")
    wrong = [f"{key} = {value!r}" for key, value in config.items()
             if key not in {*IGNORED_KEYS, "modules_to_save"}
             and value not in (None, False, {}, [], *ACCEPTED_VALUES.get(key, ()))]
    # PEFT lists "classifier" beside "score" for every sequence classifier, and may repeat one
    heads = {"score", "classifier"} if has_head else set()
    if extra := set(saved) - heads:
        wrong.append(f"modules_to_save = {sorted(extra)}")
    if wrong:
        raise ValueError(f"{file}: only plain LoRA is supported, not {', '.join(wrong)}")
    return config


def load_adapter(model: nn.Module, path: str) -> nn.Module:
    """Put the adapter of a PEFT folder on `model`, without dropout; or, where the model has
    adapters, into those, whose dropout stays (a resumed run must go on with its own).

    What the folder holds is trained, a reward model's head too; all else is frozen.
    raises  ValueError listing every missing, unexpected and mis-shaped tensor, and for a config
            that is not plain LoRA
    """
    check_final(path)
    config = read_adapter_config(path, hasattr(model, "score"))
    file = os.path.join(path, "adapter_model.safetensors")
    if not os.path.isfile(file):
        raise FileNotFoundError(f"{file}: no such file")
    ranks = {len(t) for name, t in read_file(file) if name.endswith("lora_A.weight") and t.dim()}
    if ranks and config["r"] not in ranks:                       # before layers of rank r are made
        raise ValueError(f"{path}: adapter_config.json says r = {config['r']}, and the file's "
                         f"lora_A have {', '.join(map(str, sorted(ranks)))} rows")
    if not lora_layers(model):
        try:
            add_lora(model, config["r"], config["lora_alpha"], 0.0, config["target_modules"])
        except ValueError as error:
            raise ValueError(f"{path}: adapter_config.json: {error}") from None
        if hasattr(model, "score"):
            model.score.requires_grad_(True)
    expected = adapter_tensors(model)
    if problems := misfits([file], {name: t.shape for name, t in expected.items()}):
        raise ValueError(f"{file}: does not fit the model: " + "; ".join(problems))
    for name, tensor in read_files([file]):
        expected[name].copy_(tensor)
    for layer in lora_layers(model).values():
        layer.scaling = config["lora_alpha"] / config["r"]
    return model


def start_from_adapter(model: nn.Module, path: str, merge: bool = False) -> nn.Module:
    """Make the model with the adapter of a PEFT folder the base: for an objective that follows SFT.

    merge   into the weights, for training all of them; else beside them, exact in bf16 too
    """
    load_adapter(model, path)
    return merge_lora(model).requires_grad_(True) if merge else freeze_lora(model)
