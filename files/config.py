"""config.json of a Hugging Face folder of the Llama architecture: read and checked, written."""
import os
import sys
from dataclasses import dataclass, fields

import torch.distributed as dist

from files.cli import visible
from files.folders import what_it_is
from files.text import read_json, write_json


@dataclass(frozen=True)
class Llama3Rope:
    """Llama 3.1's stretched rotary frequencies (arXiv:2407.21783), see `model.rotary_angles`."""
    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self):
        if problems := range_problems(self):
            raise ValueError("; ".join(problems))
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(f"low_freq_factor {self.low_freq_factor} is not below "
                             f"high_freq_factor {self.high_freq_factor}")


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a Llama, with the names of Hugging Face's config.json."""
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None       # None: as many as num_attention_heads
    head_dim: int | None = None                  # None: hidden_size / num_attention_heads
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_factor: float = 1.0                     # linear rope scaling: positions are divided by it
    rope_llama3: Llama3Rope | None = None        # rope scaling of Llama 3.1 and later
    sliding_window: int | None = None            # Mistral v0.1's: sequences are no longer than it
    tie_word_embeddings: bool = False
    bos_token_id: int = 1
    eos_token_id: int | tuple[int, ...] = 2      # several: each of them ends an answer

    def __post_init__(self):
        problems = range_problems(self)
        if not problems:
            heads = self.num_attention_heads
            if self.num_key_value_heads is None:
                object.__setattr__(self, "num_key_value_heads", heads)
            if self.head_dim is None and self.hidden_size % (2 * heads):
                problems.append(f"hidden_size {self.hidden_size} is not an even multiple of "
                                f"num_attention_heads {heads}")
            elif self.head_dim is None:
                object.__setattr__(self, "head_dim", self.hidden_size // heads)
            elif self.head_dim % 2:
                problems.append(f"head_dim {self.head_dim} is odd")
            if heads % self.num_key_value_heads:
                problems.append(f"num_attention_heads {heads} is not a multiple "
                                f"of num_key_value_heads {self.num_key_value_heads}")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def max_positions(self) -> int:
        """Longest sequence: vicuna-16k has max_position_embeddings 4096 and rope factor 4. Within
        its sliding window attention sees everything, so no sequence may be longer than that."""
        positions = int(self.max_position_embeddings * self.rope_factor)
        return min(positions, self.sliding_window or positions)


# ---- values -------------------------------------------------------------------------------------

# Largest values of the fields; the smallest is 1, or just above 0 for numbers that are no integers.
# Larger ones are no model's; a few would hang or fill the memory before the weights are looked at.
LIMITS = {"vocab_size": 2 ** 24, "hidden_size": 2 ** 18, "intermediate_size": 2 ** 20,
          "num_hidden_layers": 1000, "num_attention_heads": 2 ** 12, "num_key_value_heads": 2 ** 12,
          "head_dim": 2 ** 12, "max_position_embeddings": 2 ** 30, "sliding_window": 2 ** 30,
          "original_max_position_embeddings": 2 ** 30, "rms_norm_eps": 1.0, "rope_theta": 1e12,
          "rope_factor": 1e6, "factor": 1e6, "low_freq_factor": 1e6, "high_freq_factor": 1e6}


def is_id(value: object) -> bool:
    """Whether a value is a token id. bool is a kind of int in Python, and not here."""
    return type(value) is int and 0 <= value < 2 ** 31


def range_problems(config: LlamaConfig | Llama3Rope) -> list[str]:
    """What is wrong with the fields of a config, one by one: a phrase each."""
    problems = []
    for field in fields(config):
        name, value = field.name, getattr(config, field.name)
        if value is None and field.default is None:
            continue
        if name == "tie_word_embeddings":
            fits, expected = isinstance(value, bool), "true or false"
        elif name.endswith("_id"):
            ids = value if isinstance(value, tuple) and name == "eos_token_id" else (value,)
            fits, expected = len(ids) > 0 and all(map(is_id, ids)), "token ids"
        elif name == "rope_llama3":
            fits, expected = isinstance(value, Llama3Rope), "Llama3Rope"
        else:
            kinds = (int, float) if field.type is float else (int,)
            fits = type(value) in kinds and 0 < value <= LIMITS[name]
            expected = f"{'a number' if field.type is float else 'an integer'} in " + (
                f"(0, {LIMITS[name]:g}]" if field.type is float else f"1..{LIMITS[name]}")
        if not fits:
            problems.append(f"{name} is {shown(value)}; expected {expected}")
    return problems


def shown(value: object) -> str:
    """A value in an error message."""
    return repr(value)[:80]


# ---- reading ------------------------------------------------------------------------------------

# What transformers takes where a file says nothing (Llama-2's says 4096 and 1e-5 itself).
DEFAULTS = {"llama": {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6},
            "mistral": {"max_position_embeddings": 2 ** 17, "rms_norm_eps": 1e-6,
                        "intermediate_size": 14336, "num_key_value_heads": 8,
                        "sliding_window": 4096}}
READ_APART = {"rope_scaling", "rope_parameters", "rope_theta"}
# Keys that change a number, with the values that are computed here; null and false stand for off.
FIXED_KEYS = {"model_type": ("llama", "mistral"), "hidden_act": ("silu", "swish"),
              "attention_bias": (False,), "mlp_bias": (False,), "attention_dropout": (0,),
              "quantization_config": (), "partial_rotary_factor": (1,),
              "rope_interleaved": (False,), "logit_scale": (1,), "logits_scaling": (1,),
              "embedding_multiplier": (1,), "residual_multiplier": (1,),
              "attention_multiplier": (),
              "final_logit_softcapping": (), "attn_logit_softcapping": (),
              "query_pre_attn_scalar": (), "clip_qkv": (), "use_qk_norm": (), "qk_norm": (),
              "num_local_experts": (0, 1), "num_experts": (0, 1)}
# Keys of every published file that change no number. Others are ignored too, and named.
SILENT_KEYS = {"architectures", "torch_dtype", "dtype", "transformers_version", "use_cache",
               "pad_token_id", "initializer_range", "_name_or_path", "pretraining_tp",
               "max_sequence_length", "_attn_implementation"}
named_files = set()          # whose ignored keys were named


def read_rope(raw: dict, problems_: list[str]) -> dict:
    """rope_theta, rope_factor and rope_llama3 of config.json; problems_ gets what is not supported.

    transformers 4 writes rope_theta and rope_scaling {type, factor}, transformers 5 rope_parameters
    {rope_type, rope_theta, factor}; both may be there if they agree.
    """
    values = {"rope_theta": [raw["rope_theta"]] if "rope_theta" in raw else [], "rope_factor": [],
              "rope_llama3": []}
    names = {"default": set(), "linear": {"factor"},
             "llama3": {field.name for field in fields(Llama3Rope)}}
    for key in ("rope_scaling", "rope_parameters"):
        rope = raw.get(key) or {}
        if not isinstance(rope, dict):
            problems_.append(f"{key} = {shown(rope)} (expected an object)")
            continue
        rope = {name: value for name, value in rope.items() if value is not None}
        theta = [rope.pop("rope_theta")] if "rope_theta" in rope else []
        kinds = [rope.pop(name) for name in ("rope_type", "type") if name in rope] or ["default"]
        if kinds[0] not in list(names):
            problems_.append(f"{key} type {shown(kinds[0])} (supported: {', '.join(names)})")
        elif unknown := sorted(set(rope) - names[kinds[0]] - {"factor"}):
            problems_.append(f"{key} has {', '.join(unknown)[:200]} (unknown to this code)")
        elif missing := sorted(names[kinds[0]] - set(rope)):
            problems_.append(f"{key} is {kinds[0]} without {', '.join(missing)}")
        elif theta or rope or len(kinds) > 1:
            values["rope_theta"] += theta
            values["rope_factor"].append(rope["factor"] if kinds[0] == "linear" else 1.0)
            values["rope_llama3"].append(rope if kinds[0] == "llama3" else None)
    for name, found in values.items():
        if any(value != found[0] for value in found):
            problems_.append(f"{name} is given as {' and as '.join(map(shown, found))}")
    if values["rope_llama3"] and values["rope_llama3"][0]:
        try:
            values["rope_llama3"][0] = Llama3Rope(**values["rope_llama3"][0])
        except ValueError as error:
            problems_.append(f"rope of type llama3: {error}")
            values["rope_llama3"] = []
    return {name: found[0] for name, found in values.items() if found}


def read_config(path: str) -> LlamaConfig:
    """LlamaConfig of a Hugging Face folder; raises ValueError naming all that is not supported.

    Keys that are not known here change no number: they are ignored, and named once on stderr.
    """
    file = os.path.join(path, "config.json")
    if not os.path.isfile(file):
        raise FileNotFoundError(f"{file}: no such file (a Hugging Face model folder has one)"
                                f"{what_it_is(path, 'model')}")
    given = read_json(file)
    raw = {key: value for key, value in given.items() if value is not None}
    problems = [f"{key} = {shown(raw[key])}" + (
        f" (supported: {' or '.join(map(repr, values))})" if values else "")
        for key, values in FIXED_KEYS.items()
        if key in raw and raw[key] is not False and raw[key] not in values]
    defaults = DEFAULTS["mistral" if raw.get("model_type") == "mistral" else "llama"]
    names = {field.name for field in fields(LlamaConfig)} - {"rope_factor", "rope_llama3"}
    values = {key: value for key, value in defaults.items() if key not in given}
    values |= {key: raw[key] for key in names & set(raw)} | read_rope(raw, problems)
    if isinstance(values.get("eos_token_id"), list):
        ids = tuple(values["eos_token_id"])
        values["eos_token_id"] = ids[0] if len(ids) == 1 else ids
    try:
        config = LlamaConfig(**values)
    except ValueError as error:
        problems.append(str(error))
    if problems:
        raise ValueError(f"{file}: not supported: " + "; ".join(problems))
    ignored = sorted(set(raw) - names - READ_APART - SILENT_KEYS - set(FIXED_KEYS))
    first_rank = not dist.is_initialized() or dist.get_rank() == 0
    if ignored and file not in named_files and first_rank:
        print(visible(f"{file}: keys without a meaning here: {', '.join(ignored)[:500]}"),
              file=sys.stderr)
    named_files.add(file)
    return config


# ---- writing ------------------------------------------------------------------------------------

def write_config(config: LlamaConfig, dtype: str, path: str) -> None:
    """Write config.json with transformers 4's keys, which transformers 5 reads too."""
    raw = {field.name: getattr(config, field.name) for field in fields(LlamaConfig)}
    factor, llama3, window = (raw.pop(name)
                              for name in ("rope_factor", "rope_llama3", "sliding_window"))
    if config.head_dim * config.num_attention_heads == config.hidden_size:
        del raw["head_dim"]                      # transformers' default
    rope = {"type": "linear", "factor": factor} if factor != 1 else None
    if llama3:
        rope = {"rope_type": "llama3", **vars(llama3)}
    name = "Llama" if window is None else "Mistral"
    raw |= {"architectures": [f"{name}ForCausalLM"], "model_type": name.lower(),
            "torch_dtype": dtype, "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
            "attention_dropout": 0.0, "rope_scaling": rope}
    if window is not None:
        raw["sliding_window"] = window
    write_json(os.path.join(path, "config.json"), raw)
