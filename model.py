"""Llama-2, by hand, over a flat stream of tokens; loads and saves Hugging Face folders.

No padding: the model reads T tokens laid end to end, several *trees* (one prompt and its
responses) after one another. Position i sees position j iff

    j <= i,  the same tree,  and j is in the shared prompt or in i's own response.

This one rule is sequence packing and prompt sharing together. Module attributes carry the
checkpoint's names (`model.layers.0.self_attn.q_proj.weight`), so loading needs no table.

    model = load_llama("vicuna-7b-v1.5", dtype=torch.bfloat16)
    hidden = model(input_ids)                        # [T, D] after the final norm
    logits = hidden @ model.lm_head.weight.T         # [T, V]
"""
import json
import os
from dataclasses import dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

BLOCK_TOKENS = 256      # small trees share one attention block up to this size
SHARD_BYTES = 5_000_000_000


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
        for field in fields(self):
            value, kind = getattr(self, field.name), (int, float) if field.type is float else int
            if not (field.type is bool or field.name.endswith("_id")
                    or (isinstance(value, kind) and value > 0)):
                raise ValueError(f"{field.name} is {value!r}; expected a positive number")
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(f"hidden_size {self.hidden_size} is not an even multiple of "
                             f"num_attention_heads {self.num_attention_heads}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"num_attention_heads {self.num_attention_heads} is not a multiple "
                             f"of num_key_value_heads {self.num_key_value_heads}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


# Keys of config.json that change no number here, and keys accepted with this value only.
INERT_KEYS = {"architectures", "torch_dtype", "dtype", "transformers_version", "use_cache",
              "pad_token_id", "initializer_range", "_name_or_path", "pretraining_tp",
              "max_sequence_length", "rope_parameters", "rope_scaling", "_attn_implementation"}
FIXED_KEYS = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False,
              "mlp_bias": False, "attention_dropout": 0.0}


def read_json(file: str) -> dict:
    """The JSON object in a file; raises ValueError with its name."""
    with open(file, encoding="utf-8") as stream:
        try:
            value = json.load(stream)
        except ValueError as error:
            raise ValueError(f"{file}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file}: not a JSON object")
    return value


def read_config(path: str) -> LlamaConfig:
    """LlamaConfig of a Hugging Face folder; raises ValueError naming what is not supported."""
    file = os.path.join(path, "config.json")
    if not os.path.isfile(file):
        raise FileNotFoundError(f"{file}: no such file (a Hugging Face model folder has one)")
    raw = read_json(file)
    known = {field.name for field in fields(LlamaConfig)} - {"rope_factor"}
    rope = raw.get("rope_parameters") or {}
    scaling = raw.get("rope_scaling") or rope
    if not isinstance(scaling, dict):
        raise ValueError(f"{file}: rope_scaling is {scaling!r}; expected an object")
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    problems = []
    if rope_type not in ("default", "linear"):
        problems.append(f"rope_scaling type {rope_type!r} (supported: linear)")
    for key, value in raw.items():
        if key in FIXED_KEYS and value != FIXED_KEYS[key]:
            problems.append(f"{key} = {value!r} (supported: {FIXED_KEYS[key]!r})")
        elif key == "head_dim":
            if value and value * raw.get("num_attention_heads", 32) != raw.get("hidden_size"):
                problems.append(f"head_dim = {value} (supported: hidden_size / heads)")
        elif key not in known | INERT_KEYS | set(FIXED_KEYS) and value not in (None, False):
            problems.append(f"{key} = {value!r} (unknown to this code)")
    if problems:
        raise ValueError(f"{file}: not supported: " + "; ".join(problems))
    values = {key: raw[key] for key in known if raw.get(key) is not None}
    if isinstance(values.get("eos_token_id"), list):
        values["eos_token_id"] = values["eos_token_id"][0]
    values.setdefault("rope_theta", rope.get("rope_theta", 10000.0))
    values.setdefault("rms_norm_eps", 1e-6)      # Hugging Face's default; Llama-2 says 1e-5 itself
    factor = float(scaling.get("factor", 1.0)) if rope_type == "linear" else 1.0
    return LlamaConfig(**values, rope_factor=factor)


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


def attention_segments(tree_ids: Tensor, branch_ids: Tensor) -> list[tuple[int, int, Tensor]]:
    """Cut a stream into blocks that do not see each other, each with its mask.

    tree_ids, branch_ids  [T] int64   which tree; 0 = shared prompt, 1.. = response (CPU tensors)
    returns               [(start, end, mask)], mask [end - start, end - start] bool, True = sees
    Whole trees, merged up to BLOCK_TOKENS: the cost stays linear in the number of trees.
    """
    _, sizes = tree_ids.unique_consecutive(return_counts=True)
    spans, start, end = [], 0, 0
    for size in sizes.tolist():
        if end > start and end + size - start > BLOCK_TOKENS:
            spans.append((start, end))
            start = end
        end += size
    spans.append((start, end))
    segments = []
    for start, end in spans:
        tree, branch = tree_ids[start:end], branch_ids[start:end]                # [n]
        mask = tree[:, None] == tree[None]                                       # [n, n]
        mask &= (branch[None] == 0) | (branch[:, None] == branch[None])
        segments.append((start, end, mask.tril_()))
    return segments


def attention(q: Tensor, k: Tensor, v: Tensor, segments=None) -> Tensor:
    """softmax(q kᵀ / sqrt(Dh)) v under the tree rule: [T, H, Dh], [T, Hkv, Dh] -> [T, H, Dh].

    segments   from `attention_segments`; None = one plain causal sequence
    """
    groups = q.shape[1] // k.shape[1]          # grouped-query attention: one k, v for many q
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))                       # [1, H, T, Dh]
    if segments is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)[0].transpose(0, 1)
    outputs = [F.scaled_dot_product_attention(q[:, :, start:end], k[:, :, start:end],
                                              v[:, :, start:end], attn_mask=mask)
               for start, end, mask in segments]                                 # [1, H, n, Dh]
    return torch.cat(outputs, dim=2)[0].transpose(0, 1)                          # [T, H, Dh]


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        width, self.head_dim = config.hidden_size, config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj, self.k_proj = Linear(width, width), Linear(width, kv_width)
        self.v_proj, self.o_proj = Linear(width, kv_width), Linear(width, width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, segments) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim))                    # [T, H, Dh]
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        mixed = attention(rotate(q, cos, sin), rotate(k, cos, sin), v, segments)
        return self.o_proj(mixed.flatten(1))                                     # [T, D]


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x)) (arXiv:2002.05202)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))       # [T, D]


class Layer(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, segments) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, segments)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """Llama-2; call it with input_ids [T] to get hidden [T, D] after the final norm."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
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
                segments: list | None = None) -> Tensor:
        """input_ids [T], position_ids [T], segments (see `attention`) -> hidden [T, D]."""
        if position_ids is None:
            position_ids = torch.arange(len(input_ids), device=input_ids.device)
        x = self.model.embed_tokens(input_ids)                                   # [T, D]
        config = self.config
        cos, sin = (t.to(x.dtype)[:, None] for t in rotary_angles(
            position_ids, config.head_dim, config.rope_theta, config.rope_factor))
        for layer in self.model.layers:
            x = layer(x, cos, sin, segments)
        return self.model.norm(x)


# ---- Hugging Face folders -----------------------------------------------------------------------

def weight_files(path: str) -> list[str]:
    """The safetensors files of a folder, by its index if it is sharded."""
    index = os.path.join(path, "model.safetensors.index.json")
    if os.path.isfile(index):
        if "weight_map" not in (content := read_json(index)):
            raise ValueError(f"{index}: key 'weight_map' is missing")
        names = sorted(set(content["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    if missing := [name for name in names if not os.path.isfile(os.path.join(path, name))]:
        raise FileNotFoundError(f"{path}: missing weight file(s) {', '.join(missing)}")
    return [os.path.join(path, name) for name in names]


def open_safetensors(file: str):
    """safe_open with the file's name, size and a hint in the error."""
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        with open(file, "rb") as stream:
            hint = ("; this is a git-lfs pointer, run `git lfs pull`"
                    if stream.read(7) == b"version" else "")
        raise ValueError(f"{file} ({os.path.getsize(file)} bytes) is not a readable safetensors "
                         f"file: {error}{hint}") from None


def load_llama(path: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Llama:
    """Build the model of a Hugging Face folder, tensor by tensor in its final dtype and place.

    raises  ValueError listing every missing, unexpected and mis-shaped tensor at once
    """
    with torch.device("meta"):
        model = Llama(read_config(path))
    tied, tensors, problems = model.config.tie_word_embeddings, {}, []
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items()
                if not (tied and name == "lm_head.weight")}
    for file in weight_files(path):
        with open_safetensors(file) as weights:
            for name in weights.keys():
                if name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight"):
                    continue                    # computed here; a copy of the embedding
                shape = tuple(weights.get_slice(name).get_shape())
                if name not in expected:
                    problems.append(f"unexpected {name} {list(shape)}")
                elif shape != expected[name]:
                    problems.append(f"{name} is {list(shape)}, config.json asks for "
                                    f"{list(expected[name])}")
                elif not problems:              # after a problem only names are collected
                    tensors[name] = weights.get_tensor(name).to(device=device, dtype=dtype)
                expected.pop(name, None)
    problems += [f"missing {name} {list(shape)}" for name, shape in expected.items()]
    if problems:
        raise ValueError(f"{path}: weights do not fit config.json: " + "; ".join(problems))
    if tied:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors, assign=True)
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


def save_llama(model: Llama, path: str, max_shard_bytes: int = SHARD_BYTES) -> None:
    """Write config.json and safetensors as transformers reads them, sharded past max_shard_bytes."""
    os.makedirs(path, exist_ok=True)
    config = {field.name: getattr(model.config, field.name) for field in fields(LlamaConfig)}
    factor = config.pop("rope_factor")
    dtype = str(model.model.norm.weight.dtype).removeprefix("torch.")
    config |= {"architectures": ["LlamaForCausalLM"], "torch_dtype": dtype, **FIXED_KEYS,
               "rope_scaling": None if factor == 1 else {"type": "linear", "factor": factor}}
    with open(os.path.join(path, "config.json"), "w", encoding="utf-8") as stream:
        json.dump(config, stream, indent=2)
    tensors = {name: t.contiguous() for name, t in model.state_dict().items()
               if not (model.config.tie_word_embeddings and name == "lm_head.weight")}
    shards, size = [{}], 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    index_file = os.path.join(path, "model.safetensors.index.json")
    if os.path.isfile(index_file):
        os.remove(index_file)                   # an older model's; loaders would follow it
    if len(shards) == 1:
        save_file(tensors, os.path.join(path, "model.safetensors"), metadata={"format": "pt"})
        return
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": {}}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, os.path.join(path, name), metadata={"format": "pt"})
        index["weight_map"] |= {key: name for key in shard}
    with open(index_file, "w", encoding="utf-8") as stream:
        json.dump(index, stream, indent=2)
