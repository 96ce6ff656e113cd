"""config.json of a Hugging Face Llama folder: read and checked, written."""
import os
from dataclasses import dataclass, fields

from files.text import read_json, write_json


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
            value = getattr(self, field.name)
            if field.type is bool:
                if not isinstance(value, bool):
                    problems.append(f"{field.name} is {value!r}; expected bool")
            elif field.name.endswith("_id"):                                     # may be 0
                if not isinstance(value, int):
                    problems.append(f"{field.name} is {value!r}; expected int")
            elif not isinstance(value, (int, float) if field.type is float else int) or value <= 0:
                problems.append(f"{field.name} is {value!r}; expected a positive number")
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
IGNORED_KEYS = {"architectures", "torch_dtype", "dtype", "transformers_version", "use_cache",
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
        elif key not in {*IGNORED_KEYS, *READ_APART, *FIXED_KEYS} and value is not False:
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


def write_config(config: LlamaConfig, dtype: str, path: str) -> None:
    """Write config.json with transformers 4's keys, which transformers 5 reads too."""
    raw = {field.name: getattr(config, field.name) for field in fields(LlamaConfig)}
    factor = raw.pop("rope_factor")
    raw |= {"architectures": ["LlamaForCausalLM"], "torch_dtype": dtype, **FIXED_KEYS,
            "rope_scaling": None if factor == 1 else {"type": "linear", "factor": factor}}
    write_json(os.path.join(path, "config.json"), raw)
