"""Llama-2, by hand, over a flat stream of tokens; loads and saves Hugging Face folders.

No padding: the model reads T tokens laid end to end, several *trees* (one prompt and its
responses) after one another; attention.py says who sees whom, which is sequence packing and prompt
sharing together. Module attributes carry the checkpoint's names
(`model.layers.0.self_attn.q_proj.weight`), so loading needs no table.

    model = load_llama("vicuna-7b-v1.5", dtype=torch.bfloat16)
    hidden = model(input_ids)                        # [T, D] after the final norm
    logits = hidden @ model.lm_head.weight.T         # [T, V]
"""
import json
import os
from dataclasses import dataclass, fields
from itertools import repeat

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from attention import attention
from weights import SHARD_BYTES, misfits, read_files, read_json, weight_files, write_weights


# ---- configuration ------------------------------------------------------------------------------

@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a Llama, with the names of Hugging Face's config.json."""
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None       # None: as many as num_attention_heads
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_factor: float = 1.0                     # linear rope scaling: positions are divided by it
    tie_word_embeddings: bool = False
    bos_token_id: int = 1
    eos_token_id: int = 2

    def __post_init__(self):
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        problems = []
        for field in fields(self):
            value, kind = getattr(self, field.name), {bool: bool, float: (int, float)}
            free = field.type is bool or field.name.endswith("_id")              # may be 0
            if not (isinstance(value, kind.get(field.type, int)) and (free or value > 0)):
                wanted = "a positive number" if not free else field.type.__name__
                problems.append(f"{field.name} is {value!r}; expected {wanted}")
        if not problems and self.hidden_size % (2 * self.num_attention_heads):
            problems.append(f"hidden_size {self.hidden_size} is not an even multiple of "
                            f"num_attention_heads {self.num_attention_heads}")
        if not problems and self.num_attention_heads % self.num_key_value_heads:
            problems.append(f"num_attention_heads {self.num_attention_heads} is not a multiple "
                            f"of num_key_value_heads {self.num_key_value_heads}")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def max_positions(self) -> int:
        """Longest sequence: vicuna-16k says max_position_embeddings 4096 and rope factor 4."""
        return int(self.max_position_embeddings * self.rope_factor)


# Keys of config.json that change no number, keys read apart, keys accepted with this value only.
INERT_KEYS = {"architectures", "torch_dtype", "dtype", "transformers_version", "use_cache",
              "pad_token_id", "initializer_range", "_name_or_path", "pretraining_tp",
              "max_sequence_length", "_attn_implementation"}
READ_APART = {"rope_scaling", "rope_parameters", "head_dim"}
FIXED_KEYS = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False,
              "mlp_bias": False, "attention_dropout": 0.0}


def read_rope(raw: dict, problems_: list[str]) -> dict[str, float]:
    """rope_theta and rope_factor of config.json; what is not supported is added to problems_.

    transformers 4 writes rope_theta and rope_scaling {type, factor}, transformers 5 rope_parameters
    {rope_type, rope_theta, factor}; both may be there if they agree.
    """
    values = {"rope_theta": [raw["rope_theta"]] if "rope_theta" in raw else [], "rope_factor": []}
    for key in ("rope_scaling", "rope_parameters"):
        rope = raw.get(key) or {}
        if not isinstance(rope, dict):
            problems_.append(f"{key} = {rope!r} (expected an object)")
            continue
        rope = {name: value for name, value in rope.items() if value is not None}
        kind, factor = rope.get("rope_type", rope.get("type", "default")), rope.get("factor")
        unknown = sorted(set(rope) - {"rope_type", "type", "factor", "rope_theta"})
        if kind not in ("default", "linear"):
            problems_.append(f"{key} type {kind!r} (supported: linear)")
        elif unknown:
            problems_.append(f"{key} has {', '.join(unknown)} (unknown to this code)")
        elif kind == "linear" and not isinstance(factor, (int, float)):
            problems_.append(f"{key} is linear with factor {factor!r} (expected a number)")
        elif rope:
            values["rope_theta"] += [rope["rope_theta"]] if "rope_theta" in rope else []
            values["rope_factor"] += [float(factor) if kind == "linear" else 1.0]
    for name, found in values.items():
        if any(value != found[0] for value in found):
            problems_.append(f"{name} is given as {' and as '.join(map(str, found))}")
    return {name: found[0] for name, found in values.items() if found}


def read_config(path: str) -> LlamaConfig:
    """LlamaConfig of a Hugging Face folder; raises ValueError naming all that is not supported."""
    file = os.path.join(path, "config.json")
    if not os.path.isfile(file):
        raise FileNotFoundError(f"{file}: no such file (a Hugging Face model folder has one)")
    raw = {key: value for key, value in read_json(file).items() if value is not None}
    # what transformers takes where a file says nothing; Llama-2's says 4096 and 1e-5 itself
    values = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6}
    known, problems = {field.name for field in fields(LlamaConfig)} - {"rope_factor"}, []
    for key, value in raw.items():
        if key in FIXED_KEYS and value != FIXED_KEYS[key]:
            problems.append(f"{key} = {value!r} (supported: {FIXED_KEYS[key]!r})")
        elif key == "eos_token_id" and isinstance(value, list) and value:
            values[key] = value[0]
        elif key in known:
            values[key] = value
        elif key not in {*INERT_KEYS, *READ_APART, *FIXED_KEYS} and value is not False:
            problems.append(f"{key} = {value!r} (unknown to this code)")
    values |= read_rope(raw, problems)
    try:
        config = LlamaConfig(**values)
    except ValueError as error:
        problems.append(str(error))
    else:
        if raw.get("head_dim", config.head_dim) != config.head_dim:
            problems.append(f"head_dim = {raw['head_dim']} (supported: hidden_size / heads)")
    if problems:
        raise ValueError(f"{file}: not supported: " + "; ".join(problems))
    return config


# ---- layers -------------------------------------------------------------------------------------

def cpu_multiplies_bf16() -> bool:
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


class _UpcastLinear(torch.autograd.Function):
    """x Wᵀ of bf16 tensors through a float32 product; keeps no float32 copy for the backward.

    Same result as a bf16 product with float32 accumulation. For CPUs without bf16 units, where
    torch's own bf16 product is 10 (forward) to 80 (backward) times slower.
    """

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return (x.float() @ weight.float().T).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad = grad.float()
        grad_x = (grad @ weight.float()).to(weight.dtype) if ctx.needs_input_grad[0] else None
        grad_w = (grad.T @ x.float()).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return grad_x, grad_w


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ: [T, in], [out, in] -> [T, out] in x's dtype."""
    if x.dtype == torch.bfloat16 and x.device.type == "cpu" and not cpu_multiplies_bf16():
        return _UpcastLinear.apply(x, weight)
    return F.linear(x, weight)


class Linear(nn.Linear):
    """nn.Linear without bias, through `linear`."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight, the mean in float32 (arXiv:1910.07467)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))                 # [T, D]
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


def rotary_angles(position_ids: Tensor, head_dim: int, theta: float, factor: float = 1.0):
    """cos and sin of position / factor / theta^(2i / Dh), i < Dh/2: [T] -> two [T, Dh/2] float64.

    Source: RoFormer, arXiv:2104.09864, section 3.2; `factor` is linear position interpolation,
    arXiv:2306.15595. Computed in float64: at position 4096 a float32 angle is off by 1e-4.
    """
    exponents = torch.arange(0, head_dim, 2, device=position_ids.device).double() / head_dim
    angles = (position_ids.double() / factor)[:, None] * theta ** -exponents     # [T, Dh/2]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_{i + Dh/2}): [T, H, Dh] with cos, sin [T, 1, Dh/2].

    Differs from the paper (and Meta's weights), which pair neighbours: the half-split pairing is
    that of Hugging Face checkpoints, whose q and k rows are permuted to fit it.
    """
    first, second = x.chunk(2, dim=-1)                                           # [T, H, Dh/2]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        width, self.head_dim = config.hidden_size, config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj, self.k_proj = Linear(width, width), Linear(width, kv_width)
        self.v_proj, self.o_proj = Linear(width, kv_width), Linear(width, width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, segments, attend=attention,
                rows: Tensor | None = None) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim))                    # [T, H, Dh]
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        mixed = attend(rotate(q, cos, sin), rotate(k, cos, sin), v, segments).flatten(1)
        return self.o_proj(mixed if rows is None else mixed.index_select(0, rows))     # [T, D]


class _SwiGLU(torch.autograd.Function):
    """silu(gate) · up, to autograd's bits, but silu(gate) is computed again in the backward.

    A frozen MLP then keeps two [T, F] tensors and not three, and the forward is faster by a fresh
    buffer that it does not fill; the backward takes as long.
    """

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x)) (arXiv:2002.05202)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(_SwiGLU.apply(self.gate_proj(x), self.up_proj(x)))     # [T, D]


class Layer(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, segments, attend=attention,
                rows: Tensor | None = None) -> Tensor:
        """[T, D] -> [T, D]; rows [S]: positions to go on with after the attention, None for all"""
        mixed = self.self_attn(self.input_layernorm(x), cos, sin, segments, attend, rows)
        x = mixed + (x if rows is None else x.index_select(0, rows))
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """Llama-2; call it with input_ids [T] to get hidden [T, D] after the final norm.

    gradient_checkpointing   keep a layer's input only, and run the layer again in the backward:
                             a tenth of the memory for a third more time
    attend                   what every layer calls as its attention; see `compile_layers`
    """

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config, self.gradient_checkpointing, self.attend = config, False, attention
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
                segments=None, cache: list | None = None, rows: Tensor | None = None) -> Tensor:
        """input_ids [T], position_ids [T], segments (see `attention`) -> hidden [T, D].

        cache   for each layer what replaces `attention`: generate.py keeps k and v in it
        rows    [S] int64, distinct: the positions whose hidden is wanted, the only ones that the
                last layer computes beyond its attention; returns hidden [S, D]
        """
        if position_ids is None:
            position_ids = torch.arange(len(input_ids), device=input_ids.device)
        x = self.model.embed_tokens(input_ids)                                   # [T, D]
        config = self.config
        cos, sin = (t.to(x.dtype)[:, None] for t in rotary_angles(
            position_ids, config.head_dim, config.rope_theta, config.rope_factor))
        for layer, attend in zip(self.model.layers, cache or repeat(self.attend)):
            arguments = (x, cos, sin, segments, attend,
                         rows if layer is self.model.layers[-1] else None)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                x = layer(*arguments)
        return self.model.norm(x)


def compile_layers(model: Llama, backend: str = "inductor") -> Llama:
    """Let torch.compile fuse what every layer computes beside its products and its attention.

    Layers share their code: compiled are the first, an inner and the last one, each for the
    policy and for the reference, and for streams of any length. The attention stays as it is: how
    many blocks a stream has would be compiled in, anew for every stream.
    """
    model.attend = torch.compiler.disable(attention)
    for layer in model.model.layers:
        layer.compile(backend=backend, dynamic=True)
    return model


# ---- Hugging Face folders -----------------------------------------------------------------------

def load_llama(path: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Llama:
    """Build the model of a Hugging Face folder, tensor by tensor in its final dtype and place.

    raises  ValueError listing every missing, unexpected and mis-shaped tensor at once
    """
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


def write_config(config: LlamaConfig, dtype: torch.dtype, path: str) -> None:
    """Write config.json with transformers 4's keys, which transformers 5 reads too."""
    raw = {field.name: getattr(config, field.name) for field in fields(LlamaConfig)}
    factor = raw.pop("rope_factor")
    raw |= {"architectures": ["LlamaForCausalLM"], "torch_dtype": str(dtype).removeprefix("torch."),
            **FIXED_KEYS,
            "rope_scaling": None if factor == 1 else {"type": "linear", "factor": factor}}
    with open(os.path.join(path, "config.json"), "w", encoding="utf-8") as stream:
        json.dump(raw, stream, indent=2)


def save_llama(model: Llama, path: str, max_shard_bytes: int = SHARD_BYTES) -> None:
    """Write config.json and safetensors for transformers and us, sharded past max_shard_bytes."""
    os.makedirs(path, exist_ok=True)
    write_config(model.config, model.model.norm.weight.dtype, path)
    tensors = model.state_dict()
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    write_weights(path, {name: t.nbytes for name, t in tensors.items()}, tensors.__getitem__,
                  max_shard_bytes)
