"""config.json: what is read, what is refused by name, what is written; published sizes."""
import json

import pytest
import torch
from helpers import SHAPE

from files.config import Llama3Rope, LlamaConfig, read_config, write_config
from model import Llama, load_llama, save_llama

VICUNA = dict(      # lmsys/vicuna-7b-v1.5, of July 2023
    _name_or_path="vicuna-7b-v1.5", architectures=["LlamaForCausalLM"], bos_token_id=1,
    eos_token_id=2, hidden_act="silu", hidden_size=4096, initializer_range=0.02,
    intermediate_size=11008, max_position_embeddings=4096, model_type="llama",
    num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=32, pad_token_id=0,
    pretraining_tp=1, rms_norm_eps=1e-05, rope_scaling=None, tie_word_embeddings=False,
    torch_dtype="float16", transformers_version="4.31.0", use_cache=True, vocab_size=32000)


LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}


def config_of(tmp_path, values):
    (tmp_path / "config.json").write_text(json.dumps(values))
    return read_config(str(tmp_path))


# ---- what is read -------------------------------------------------------------------------------

@pytest.mark.parametrize("changes, count", [
    # V D twice, and per layer (2 + 2 kv/H) D² + 3 D F + 2 D, and D; V = 32000
    ({}, 6_738_415_616),
    (dict(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40,
          num_key_value_heads=40), 13_015_864_320),
    (dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
          num_key_value_heads=8), 68_976_648_192),
], ids=["7B", "13B", "70B"])
def test_published_sizes_have_the_published_number_of_parameters(tmp_path, changes, count):
    # 13B: 2·32000·5120 + 40 (4·5120² + 3·5120·13824 + 2·5120) + 5120. 70B, k and v of 8 · 128:
    # 2·32000·8192 + 80 (2·8192² + 2·8192·1024 + 3·8192·28672 + 2·8192) + 8192. On the meta device
    # there are shapes and no memory.
    with torch.device("meta"):
        model = Llama(config_of(tmp_path, VICUNA | changes))
    assert sum(p.numel() for p in model.parameters()) == count


def test_config_of_vicuna(tmp_path):
    # Keys that change no number here are accepted; vicuna-7b-v1.5-16k has two more keys.
    assert config_of(tmp_path, VICUNA) == LlamaConfig()
    long = {"max_sequence_length": 16384, "rope_scaling": {"factor": 4.0, "type": "linear"}}
    assert config_of(tmp_path, VICUNA | long) == LlamaConfig(rope_factor=4.0)


def test_missing_keys_mean_transformers_defaults(tmp_path):
    # transformers' LlamaConfig: 2048 positions, eps 1e-6, theta 10000; LlamaConfig() is Llama-2's.
    assert config_of(tmp_path, {}) == LlamaConfig(max_position_embeddings=2048, rms_norm_eps=1e-6)


@pytest.mark.parametrize("values, expected", [
    ({}, {}),
    ({"num_key_value_heads": None}, {"num_key_value_heads": 4}),
    ({"num_key_value_heads": 2}, {"num_key_value_heads": 2}),
    ({"eos_token_id": [7, 8]}, {"eos_token_id": (7, 8)}),
    ({"eos_token_id": [7]}, {"eos_token_id": 7}),
    ({"dtype": "bfloat16"}, {}),
    ({"rope_scaling": {"type": "linear", "factor": 4.0}}, {"rope_factor": 4.0}),
    ({"rope_scaling": {"rope_type": "linear", "factor": 4}}, {"rope_factor": 4.0}),
    ({"rope_scaling": {"rope_type": "default"}}, {"rope_factor": 1.0}),
    ({"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
     {"rope_theta": 5e5}),
    ({"rope_theta": None, "rope_parameters": {"rope_type": "linear", "factor": 2.0,
                                              "rope_theta": 7.0}},
     {"rope_theta": 7.0, "rope_factor": 2.0}),
    # both spellings, agreeing
    ({"rope_scaling": {"type": "linear", "factor": 2},
      "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 100}},
     {"rope_factor": 2.0}),
    ({"head_dim": 6}, {}),
    ({"head_dim": None, "sliding_window": None, "some_switch": False}, {}),
    ({"head_dim": 8}, {"head_dim": 8}),
    ({"hidden_act": "swish", "partial_rotary_factor": 1.0, "logit_scale": 1}, {}),
    ({"rope_scaling": LLAMA3}, {"rope_llama3": Llama3Rope(32.0, 1.0, 4.0, 8192)}),
    ({"rope_theta": None, "rope_parameters": LLAMA3 | {"rope_theta": 5e5, "type": "llama3"}},
     {"rope_theta": 5e5, "rope_llama3": Llama3Rope(32.0, 1.0, 4.0, 8192)}),
    ({"tie_word_embeddings": True}, {"tie_word_embeddings": True}),
])
def test_config_spellings_of_transformers_versions(values, expected, tmp_path):
    # Version 4 writes rope_theta and rope_scaling, version 5 rope_parameters.
    given = SHAPE | {"max_position_embeddings": 4096} | values
    assert config_of(tmp_path, given) == LlamaConfig(**(SHAPE | expected))


def test_llama_3s_config(tmp_path):
    # meta-llama/Llama-3.2-1B-Instruct: tied head, three ids that end an answer, stretched rope.
    config = config_of(tmp_path, dict(
        architectures=["LlamaForCausalLM"], attention_bias=False, attention_dropout=0.0,
        bos_token_id=128000, eos_token_id=[128001, 128008, 128009], head_dim=64, hidden_act="silu",
        hidden_size=2048, initializer_range=0.02, intermediate_size=8192,
        max_position_embeddings=131072, mlp_bias=False, model_type="llama", num_attention_heads=32,
        num_hidden_layers=16, num_key_value_heads=8, pretraining_tp=1, rms_norm_eps=1e-5,
        rope_scaling=LLAMA3, rope_theta=500000.0, tie_word_embeddings=True,
        torch_dtype="bfloat16", transformers_version="4.45.0.dev0", use_cache=True,
        vocab_size=128256))
    assert config.eos_token_id == (128001, 128008, 128009) and config.tie_word_embeddings
    assert config.rope_llama3 == Llama3Rope(32.0, 1.0, 4.0, 8192)
    assert config.max_positions == 131072


def test_mistrals_config_and_its_window(tmp_path):
    # v0.2's file says null; v0.1's, like a file without the key, means 4096, and longer sequences
    # would need a window: there are no positions for them.
    new = dict(model_type="mistral", hidden_size=4096, num_attention_heads=32, vocab_size=32000,
               max_position_embeddings=32768, rope_theta=1e6, sliding_window=None)
    config = config_of(tmp_path, new)
    assert (config.max_positions, config.sliding_window) == (32768, None)
    assert (config.num_key_value_heads, config.intermediate_size) == (8, 14336)     # its defaults
    del new["sliding_window"]
    assert config_of(tmp_path, new).max_positions == 4096
    assert config_of(tmp_path, new | {"sliding_window": 65536}).max_positions == 32768


def test_keys_without_a_meaning_are_named_once(tmp_path, capsys):
    # SmolLM2's file; keys that every file has are not worth a line.
    odd = {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"a": 1}}
    assert config_of(tmp_path, SHAPE | odd | VICUNA) == config_of(tmp_path, SHAPE | odd | VICUNA)
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1
    assert "keys without a meaning here: is_llama_config, transformers.js_config\n" in shown.err


# ---- what is refused ----------------------------------------------------------------------------

@pytest.mark.parametrize("values, words", [
    ({"hidden_act": "gelu"}, ["hidden_act = 'gelu' (supported: 'silu' or 'swish')"]),
    ({"attention_bias": True}, ["attention_bias = True (supported: False)"]),
    ({"mlp_bias": True}, ["mlp_bias = True (supported: False)"]),
    ({"attention_dropout": 0.1}, ["attention_dropout = 0.1 (supported: 0)"]),
    ({"model_type": "qwen2"}, ["model_type = 'qwen2' (supported: 'llama' or 'mistral')"]),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["rope_scaling type 'dynamic'"]),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
     ["rope_scaling is llama3 without high_freq_factor, low_freq_factor, original_max"]),
    ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}},
     ["rope of type llama3: low_freq_factor 4.0 is not below high_freq_factor 4.0"]),
    ({"rope_scaling": LLAMA3 | {"factor": "8"}}, ["llama3: factor is '8'; expected a number"]),
    ({"rope_scaling": LLAMA3 | {"attention_factor": 1.0}}, ["rope_scaling has attention_factor"]),
    ({"rope_parameters": {"rope_type": "yarn"}}, ["rope_parameters type 'yarn'"]),
    ({"rope_parameters": {"rope_type": ["linear"]}}, ["rope_parameters type ['linear']"]),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}},
     ["rope_parameters has full_attention (unknown"]),
    ({"rope_scaling": {"type": "linear"}}, ["rope_scaling is linear without factor"]),
    ({"rope_scaling": {"type": "linear", "factor": -2}}, ["rope_factor is -2; expected a number"]),
    ({"rope_scaling": "linear"}, ["rope_scaling = 'linear' (expected an object)"]),
    ({"rope_parameters": {"rope_theta": 5e5}}, ["rope_theta is given as 100.0 and as 500000.0"]),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 100.0}},
     ["rope_factor is given as 2.0 and as 1.0"]),
    ({"rope_theta": [1]}, ["rope_theta is [1]; expected a number"]),
    ({"eos_token_id": []}, ["eos_token_id is (); expected token ids"]),
    ({"eos_token_id": [2, True]}, ["eos_token_id is (2, True); expected token ids"]),
    ({"bos_token_id": -1}, ["bos_token_id is -1; expected token ids"]),
    ({"tie_word_embeddings": "false"}, ["tie_word_embeddings is 'false'; expected true or false"]),
    ({"hidden_size": "24", "vocab_size": 0, "mlp_bias": True},
     ["hidden_size is '24'", "vocab_size is 0", "mlp_bias = True"]),
    ({"quantization_config": {"bits": 4}}, ["quantization_config = {'bits': 4}"]),
    ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor = 0.5 (supported: 1)"]),
    ({"logit_scale": 0.0625}, ["logit_scale = 0.0625 (supported: 1)"]),
    ({"final_logit_softcapping": 30.0}, ["final_logit_softcapping = 30.0"]),
    ({"num_local_experts": 8, "hidden_act": "gelu", "rope_scaling": {"type": "yarn"}},
     ["num_local_experts = 8", "hidden_act = 'gelu'", "rope_scaling type 'yarn'"]),
])
def test_config_with_an_unsupported_feature_is_refused_by_name(values, words, tmp_path):
    # Otherwise the weights would load and compute another model. One message has all reasons.
    with pytest.raises(ValueError) as error:
        config_of(tmp_path, SHAPE | values)
    assert "config.json: not supported: " in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("key, value, words", [
    ("num_hidden_layers", True, "is True; expected an integer"),     # bool is Python's int
    ("hidden_size", 2 ** 62, "expected an integer in 1..262144"),
    ("num_hidden_layers", 10 ** 9, "expected an integer in 1..1000"),
    ("rope_theta", 2 ** 63, "is 9223372036854775808; expected a number"),
    ("rope_theta", True, "is True; expected a number"),
    ("max_position_embeddings", 2048.0, "is 2048.0; expected an integer"),
    ("bos_token_id", 2 ** 40, "is 1099511627776; expected token ids"),
    ("bos_token_id", True, "is True; expected token ids"),
    ("head_dim", 7, "head_dim 7 is odd"),
    ("sliding_window", -4096, "is -4096; expected an integer"),
])
def test_a_value_that_no_model_has_is_refused_before_anything_is_built(key, value, words, tmp_path):
    with pytest.raises(ValueError) as error:
        config_of(tmp_path, SHAPE | {key: value})
    assert key in str(error.value) and words in str(error.value)


@pytest.mark.parametrize("key", ["vocab_size", "rope_theta", "bos_token_id", "rms_norm_eps"])
@pytest.mark.parametrize("value", [10 ** 400, float("inf"), float("-inf"), float("nan")])
def test_a_number_beyond_all_bounds_is_refused(key, value, tmp_path):
    # In a file (Python's own reader takes Infinity and NaN) and in a LlamaConfig.
    for make in (lambda: config_of(tmp_path, SHAPE | {key: value}),
                 lambda: LlamaConfig(**SHAPE | {key: value})):
        with pytest.raises(ValueError) as error:
            make()
        assert len(str(error.value)) < 300


@pytest.mark.parametrize("values, words", [
    ({"hidden_size": 26}, "hidden_size 26 is not an even multiple of num_attention_heads 4"),
    ({"hidden_size": 20}, "hidden_size 20 is not an even multiple of num_attention_heads 4"),
    ({"num_key_value_heads": 3},
     "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
])
def test_heads_that_do_not_divide_are_refused(values, words, tmp_path):
    # Dh must be even to be rotated in pairs (20 / 4 = 5 is not); kv heads serve equal groups.
    with pytest.raises(ValueError, match=words):
        config_of(tmp_path, SHAPE | values)


def test_missing_or_broken_config_is_refused_by_file_name(tmp_path):
    # A wrong path is the most frequent mistake: the message names the file.
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
        read_config(str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"nowhere.config\.json: no such file"):
        load_llama(str(tmp_path / "nowhere"))
    (tmp_path / "config.json").write_text("{'vocab_size': 3}")
    with pytest.raises(ValueError, match=r"config\.json: not JSON: "):
        read_config(str(tmp_path))


# ---- what is written ----------------------------------------------------------------------------

def test_a_saved_config_has_what_transformers_reads(tmp_path):
    # The keys that LlamaForCausalLM.from_pretrained reads, for a model with a rope factor.
    save_llama(Llama(LlamaConfig(**SHAPE, num_key_value_heads=2, rope_factor=2.0)), str(tmp_path))
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float32",
        "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0,
        "vocab_size": 29, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5, "rope_theta": 100.0, "tie_word_embeddings": False,
        "bos_token_id": 1, "eos_token_id": 2, "rope_scaling": {"type": "linear", "factor": 2.0}}


@pytest.mark.parametrize("config, expected", [
    (LlamaConfig(**SHAPE, rope_llama3=Llama3Rope(), eos_token_id=(3, 4)),
     {"eos_token_id": [3, 4], "model_type": "llama",
      "rope_scaling": LLAMA3 | {"factor": 8.0}}),
    (LlamaConfig(**SHAPE, sliding_window=64),
     {"model_type": "mistral", "sliding_window": 64, "architectures": ["MistralForCausalLM"]}),
    (LlamaConfig(**SHAPE, head_dim=8), {"head_dim": 8}),
], ids=["llama3", "window", "wide heads"])
def test_what_is_written_is_read_again(config, expected, tmp_path):
    write_config(config, "float32", str(tmp_path))
    raw = json.loads((tmp_path / "config.json").read_text())
    assert {key: raw[key] for key in expected} == expected
    assert read_config(str(tmp_path)) == config
