"""Llama-2, by hand, over a flat stream of tokens; loads and saves Hugging Face folders.

No padding: the model reads T tokens laid end to end, several *trees* (one prompt and its
responses) after one another; kernels/attention.py has who attends to whom, which is sequence
packing and prompt sharing together. Module attributes carry the checkpoint's names
(`model.layers.0.self_attn.q_proj.weight`), so loading needs no table.

    model = load_llama("vicuna-7b-v1.5", dtype=torch.bfloat16)
    hidden = model(input_ids)                        # [T, D] after the final norm
    logits = hidden @ model.lm_head.weight.T         # [T, V]
"""
import math
import os
from collections.abc import Callable
from itertools import repeat

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from files.config import Llama3Rope, LlamaConfig, read_config, write_config
from files.manifest import check_final
from files.weights import SHARD_BYTES, misfits, read_files, weight_files, write_weights
from kernels.attention import Segments, attention
from kernels.layers import rms_norm, rotary, swiglu
from kernels.lora_linear import linear

# ---- layers -------------------------------------------------------------------------------------

class Linear(nn.Linear):
    """nn.Linear without bias, through `linear`."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


class RMSNorm(nn.Module):
    """See `kernels.layers.rms_norm`."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: Tensor, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(x + added, its norm): [T, D] each."""
        return rms_norm(x, self.weight, self.eps, added)


def rotary_angles(position_ids: Tensor, head_dim: int, theta: float, factor: float = 1.0,
                  llama3: Llama3Rope | None = None) -> tuple[Tensor, Tensor]:
    """cos and sin of position / factor / theta^(2i / Dh), i < Dh/2: [T] -> two [T, Dh/2] float64.

    Source: RoFormer, arXiv:2104.09864, section 3.2; `factor` is linear position interpolation,
    arXiv:2306.15595. Computed in float64: at position 4096 a float32 angle is off by 1e-4.
    llama3: frequencies that turn fewer than low_freq_factor times in the context of pretraining are
    divided by its factor, those that turn more than high_freq_factor times stay, and between the
    two it is interpolated linearly (Llama 3.1, arXiv:2407.21783; transformers' rope type llama3).
    """
    exponents = torch.arange(0, head_dim, 2, device=position_ids.device).double() / head_dim
    frequencies = theta ** -exponents                                            # [Dh/2]
    if llama3:
        turns = llama3.original_max_position_embeddings * frequencies / (2 * math.pi)
        share = (turns - llama3.low_freq_factor) / (
            llama3.high_freq_factor - llama3.low_freq_factor)
        share = share.clamp(0, 1)                                                # 1: as it is
        frequencies = frequencies * (share + (1 - share) / llama3.factor)
    angles = (position_ids.double() / factor)[:, None] * frequencies             # [T, Dh/2]
    return angles.cos(), angles.sin()


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        width, self.head_dim = config.hidden_size, config.head_dim
        q_width, kv_width = (heads * config.head_dim for heads in (
            config.num_attention_heads, config.num_key_value_heads))
        self.q_proj, self.k_proj = Linear(width, q_width), Linear(width, kv_width)
        self.v_proj, self.o_proj = Linear(width, kv_width), Linear(q_width, width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, segments: Segments | None,
                attend: Callable = attention, rows: Tensor | None = None) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim))                    # [T, H, Dh]
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotary(q, k, cos, sin)
        mixed = attend(q, k, v, segments).flatten(1)
        return self.o_proj(mixed if rows is None else mixed.index_select(0, rows))     # [T, D]


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x)) (arXiv:2002.05202)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))            # [T, D]


class Layer(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, added: Tensor | None, cos: Tensor, sin: Tensor,
                segments: Segments | None, attend: Callable = attention,
                rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """From the layer before (x, what it adds to x) to the same for the next layer.

        x, added   [T, D] each      not yet summed: the norm of the sum reads both anyway
        rows       [S] int64        positions to go on with after the attention; None: all
        """
        x, normed = self.input_layernorm(x, added)
        mixed = self.self_attn(normed, cos, sin, segments, attend, rows)
        if rows is not None:
            x = x.index_select(0, rows)
        x, normed = self.post_attention_layernorm(x, mixed)
        return x, self.mlp(normed)


class Llama(nn.Module):
    """Llama-2; call it with input_ids [T] to get hidden [T, D] after the final norm.

    gradient_checkpointing   keep a layer's input only, and run the layer again in the backward:
                             a tenth of the memory for a third more time
    """

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config, self.gradient_checkpointing = config, False
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.model.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        for module in self.modules():          # GPT-2's initialisation; loading overwrites it
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None,
                segments: Segments | None = None,
                cache: list[Callable] | None = None, rows: Tensor | None = None) -> Tensor:
        """input_ids [T], position_ids [T], segments (see `attention`) -> hidden [T, D].

        cache   for each layer what replaces `attention`: a method of `Cache`
        rows    [S] int64, distinct: the positions whose hidden is wanted, the only ones that the
                last layer computes beyond its attention; returns hidden [S, D]
        """
        if position_ids is None:
            position_ids = torch.arange(len(input_ids), device=input_ids.device)
        x = self.model.embed_tokens(input_ids)                                   # [T, D]
        config = self.config
        cos, sin = (t.to(x.dtype)[:, None] for t in rotary_angles(
            position_ids, config.head_dim, config.rope_theta, config.rope_factor,
            config.rope_llama3))
        added = None
        for layer, attend in zip(self.model.layers, cache or repeat(attention), strict=False):
            arguments = cos, sin, segments, attend, rows if layer is self.model.layers[-1] else None
            if self.gradient_checkpointing and torch.is_grad_enabled():
                if added is not None:          # summed first: one [T, D] per layer is kept, not two
                    x, added = x + added, None
                x, added = checkpoint(layer, x, added, *arguments, use_reentrant=False)
            else:
                x, added = layer(x, added, *arguments)
        return self.model.norm(x, added)[1]


# ---- decoding -----------------------------------------------------------------------------------

class Cache:
    """Keys and values of B rows that decode together, allocated once.

    lengths          [B] int   prompt lengths; P is the longest
    max_new_tokens   int       slots after the prompts
    All prompts end in slot P - 1, so new tokens of all rows go to one slot, `end`; `mask` hides the
    empty slots before a shorter prompt.
    """

    def __init__(self, model: Llama, lengths: list[int], max_new_tokens: int):
        config, weight = model.config, model.lm_head.weight
        self.end = max(lengths)
        self.starts = [self.end - length for length in lengths]     # slot of a row's first token
        shape = (len(lengths), config.num_key_value_heads, self.end + max_new_tokens,
                 config.head_dim)                                                # [B, Hkv, S, Dh]
        # zeros: a hidden slot gets weight 0, and 0 times uninitialised memory could be NaN
        self.keys, self.values = ([weight.new_zeros(shape) for _ in range(config.num_hidden_layers)]
                                  for _ in range(2))
        hidden = (torch.arange(shape[2], device=weight.device)
                  < torch.tensor(self.starts, device=weight.device)[:, None])    # [B, S]
        self.mask = weight.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)[:, None, None]

    def fill(self, layer: int, places: Tensor, q: Tensor, k: Tensor, v: Tensor,
             segments: Segments) -> Tensor:
        """`attention` over a stream of prompts that also copies their k and v into the cache."""
        rows, slots, positions = places          # [3, n] int64: where each position is copied to
        self.keys[layer][rows, :, slots] = k[positions]
        self.values[layer][rows, :, slots] = v[positions]
        return attention(q, k, v, segments)

    def extend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, segments: None) -> Tensor:
        """`attention` of one new token per row: [B, H, Dh], [B, Hkv, Dh] -> [B, H, Dh]."""
        first = min(self.starts)
        if q.is_cuda:                # whose attention reads a mask from addresses of 16 bytes only
            first -= first % 8
        rows, seen = slice(len(self.starts)), slice(first, self.end + 1)
        keys, values = self.keys[layer], self.values[layer]
        keys[rows, :, self.end], values[rows, :, self.end] = k, v
        # queries that share a key head are passed as a sequence of G: no key is repeated
        grouped = q.unflatten(1, (k.shape[1], -1))                               # [B, Hkv, G, Dh]
        return F.scaled_dot_product_attention(grouped, keys[rows, :, seen], values[rows, :, seen],
                                              self.mask[rows, :, :, seen]).flatten(1, 2)

    def compact(self, alive: list[int]) -> list[int]:
        """Drop all rows but `alive` (ascending); returns the former numbers of the rows left."""
        order = list(range(len(alive)))       # the last rows move to where others were dropped
        free = sorted(set(order) - set(alive))
        for target, source in zip(free, alive[len(alive) - len(free):]):
            order[target] = source
            for tensor in (*self.keys, *self.values, self.mask):
                tensor[target] = tensor[source]
        self.starts = [self.starts[row] for row in order]
        return order


# ---- Hugging Face folders -----------------------------------------------------------------------

def load_llama(path: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Llama:
    """Build the model of a Hugging Face folder, tensor by tensor in its final dtype and place.

    raises  ValueError listing every missing, unexpected and mis-shaped tensor at once
    """
    check_final(path)
    with torch.device("meta"):
        model = Llama(read_config(path))
    tied, files = model.config.tie_word_embeddings, weight_files(path)
    expected = {name: t.shape for name, t in model.state_dict().items()
                if not (tied and name == "lm_head.weight")}
    # rotary frequencies are computed here; a tied head is a copy of the embedding
    optional = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq"
                for i in range(len(model.model.layers))} | ({"lm_head.weight"} if tied else set())
    if problems := misfits(files, expected, optional):
        raise ValueError(f"{path}: weights do not fit config.json: " + "; ".join(problems))
    tensors = {name: tensor.to(device=device, dtype=dtype).contiguous()
               for name, tensor in read_files(files) if name in expected}
    if tied:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors, assign=True)
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


def save_llama(model: Llama, path: str, max_shard_bytes: int = SHARD_BYTES) -> None:
    """Write config.json and safetensors for transformers and us, sharded past max_shard_bytes."""
    os.makedirs(path, exist_ok=True)
    write_config(model.config, str(model.model.norm.weight.dtype).removeprefix("torch."), path)
    tensors = model.state_dict()
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    write_weights(path, {name: t.nbytes for name, t in tensors.items()}, tensors.__getitem__,
                  max_shard_bytes)
