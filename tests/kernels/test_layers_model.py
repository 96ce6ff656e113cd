"""A whole Llama by what a GPU runs: the kernels of layers.py, and LoRA's fused products."""
from functools import partial

import pytest
import torch
from helpers import GQA, make_llama, random_trees
from helpers_models import ALL_LINEAR
from layers_cases import INTERPRETED, TORCH, TRITON
from torch.testing import assert_close

import lora
import model as model_file
from kernels.lora_linear import lora_linear_fused
from lora import add_lora, freeze_lora, lora_disabled, lora_layers
from packing import build_stream

OURS = TRITON if INTERPRETED else TORCH


def fused(monkeypatch):
    """From here on models call what a GPU runs (without the interpreter: LoRA's products alone)."""
    for name in ("rms_norm", "rotary", "swiglu"):
        monkeypatch.setattr(model_file, name, getattr(OURS, name))
    monkeypatch.setattr(lora, "lora_linear", lora_linear_fused)


def small_llama(kind):
    """Two layers in float64, all weights trained; or an adapter on top of a frozen one."""
    model, _ = make_llama(GQA)
    for r in {"full": (), "lora": (3,), "lora on sft": (2, 3)}[kind]:
        freeze_lora(model)
        add_lora(model, r, 6, 0.0, ALL_LINEAR if r == 3 else ["q_proj", "down_proj"])
        generator = torch.Generator().manual_seed(r)
        for layer in lora_layers(model).values():
            layer.lora_B.data = 0.2 * torch.randn(layer.lora_B.shape, generator=generator).double()
    return model


def run(model, stream, rows):
    hidden = model(stream.input_ids, stream.position_ids, stream.segments,
                   rows=stream.rows if rows else None)
    upstream = torch.linspace(-1, 1, hidden.numel(), dtype=torch.float64).view_as(hidden)
    parameters = [p for p in model.model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(hidden, parameters, upstream, allow_unused=True)
    with torch.no_grad(), lora_disabled(model) as reference:
        return [hidden, *grads, reference(stream.input_ids, stream.position_ids, stream.segments)]


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("kind", ["full", "lora", "lora on sft"])
def test_hidden_states_and_every_gradient_are_those_of_the_specification(monkeypatch, kind, rows):
    model, stream = small_llama(kind), build_stream(random_trees()[2:4])
    expected = run(model, stream, rows)
    fused(monkeypatch)
    for checkpointing in (False, True):
        model.gradient_checkpointing = checkpointing
        found = run(model, stream, rows)
        for mine, wanted in zip(found, expected, strict=True):
            assert (mine is None) == (wanted is None)
            if mine is not None:
                assert_close(mine, wanted, rtol=0, atol=1e-11)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_stream_of_no_token_has_gradients_of_zero(monkeypatch, kind):
    # A micro-batch none of whose responses needs the reference.
    fused(monkeypatch)
    model, stream = small_llama(kind), build_stream([])
    hidden = model(stream.input_ids, stream.position_ids, stream.segments)
    assert hidden.shape == (0, 24)
    parameters = [p for p in model.model.parameters() if p.requires_grad]
    for grad in torch.autograd.grad(hidden.sum(), parameters, allow_unused=True):
        assert grad is None or not grad.any()


def test_tokens_one_by_one_with_a_cache_of_keys_and_values(monkeypatch):
    # As generate.py does: `cache` replaces the attention of every layer, under inference mode.
    model, _ = make_llama(GQA)
    input_ids = torch.tensor([1, 5, 7, 2])
    expected = model(input_ids).detach()
    fused(monkeypatch)
    cached = [[], []]

    def attend(layer, q, k, v, segments):
        cached[layer].append((k, v))
        keys, values = (torch.cat(t).repeat_interleave(2, 1) for t in zip(*cached[layer],
                                                                         strict=True))
        weights = (torch.einsum("qhd,khd->hqk", q, keys) / q.shape[-1] ** 0.5).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, values)

    with torch.inference_mode():
        for position, token in enumerate(input_ids):
            hidden = model(token[None], torch.tensor([position]), None,
                           [partial(attend, layer) for layer in range(2)])
            assert_close(hidden[0], expected[position], rtol=0, atol=1e-11)


def test_gradient_checkpointing_keeps_one_tensor_per_layer(monkeypatch):
    # [T, D] of every layer's input, and nothing of its inside: x and what a layer adds to it are
    # summed before, not kept both.
    fused(monkeypatch)
    model, stream = small_llama("lora"), build_stream(random_trees()[2:3])
    model.gradient_checkpointing, saved = True, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        hidden = model(stream.input_ids, stream.position_ids, stream.segments)
    sizes = {t.data_ptr(): t.numel() for t in saved if t.numel() >= hidden.numel()}
    weights = {p.data_ptr() for p in model.parameters()}
    assert [sizes[place] for place in sizes if place not in weights] == [hidden.numel()] * 3
