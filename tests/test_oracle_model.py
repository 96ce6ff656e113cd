"""Against transformers' LlamaForCausalLM: each reads the other's folders, with the same logits."""
import json
import os

import pytest
import torch
from conftest import need
from helpers_models import assert_same_model, saved

from files.config import Llama3Rope, LlamaConfig, read_config
from model import load_llama

transformers = need("transformers")

SHAPES = {
    "multi-head": dict(vocab_size=101, hidden_size=48, intermediate_size=80, num_hidden_layers=3,
                       num_attention_heads=6),
    "grouped-query": dict(vocab_size=67, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                          num_attention_heads=8, num_key_value_heads=2, rms_norm_eps=1e-6),
    "tied head": dict(vocab_size=53, hidden_size=32, intermediate_size=72, num_hidden_layers=2,
                      num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True),
    "linear rope": dict(vocab_size=71, hidden_size=40, intermediate_size=64, num_hidden_layers=2,
                        num_attention_heads=5, rope_theta=5e5, rope_factor=4.0),
    # a context of 32 tokens: of Dh/2 = 8 frequencies some stay, some change, some are between
    "llama3 rope": dict(vocab_size=67, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                        num_attention_heads=4, num_key_value_heads=2, rope_theta=5e5,
                        rope_llama3=Llama3Rope(8.0, 1.0, 4.0, 32), max_position_embeddings=256),
    "wide heads": dict(vocab_size=67, hidden_size=48, intermediate_size=96, num_hidden_layers=2,
                       num_attention_heads=4, num_key_value_heads=1, head_dim=20),
    "sliding window": dict(vocab_size=67, hidden_size=48, intermediate_size=96,
                           num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                           sliding_window=64),
}
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
each_size = pytest.mark.parametrize("shard_bytes", [10 ** 9, 20_000], ids=["one file", "shards"])


def logits_of(model):
    """[T, V] of 40 fixed tokens, by our model or by theirs."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(50, (40,), generator=generator)
    with torch.no_grad():
        if isinstance(model, transformers.PreTrainedModel):
            return model(input_ids[None]).logits[0]
        return model(input_ids) @ model.lm_head.weight.T


def assert_same_logits(ours, theirs):
    # float32 sums in another order: the largest difference measured is 1.0e-6 of the largest logit,
    # which is 4 to 22.
    expected = logits_of(theirs)
    largest = expected.abs().max().item()
    assert largest > 3
    torch.testing.assert_close(logits_of(ours), expected, rtol=0, atol=2e-6 * largest)


def their_rope(shape):
    """{rope_type, …} of one of SHAPES."""
    if llama3 := shape.get("rope_llama3"):
        return {"rope_type": "llama3", **vars(llama3)}
    factor = shape.get("rope_factor")
    return {"rope_type": "linear", "factor": factor} if factor else {"rope_type": "default"}


def their_model(shape):
    """A random LlamaForCausalLM; MistralForCausalLM for a shape with a window."""
    rope, theta = their_rope(shape), shape.get("rope_theta", 10000.0)
    shape = {key: value for key, value in shape.items() if not key.startswith("rope_")}
    kind = "Mistral" if "sliding_window" in shape else "Llama"
    if kind == "Mistral":
        shape = {"max_position_embeddings": 4096} | shape
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(
        **shape, rope_parameters=rope | {"rope_theta": theta}, initializer_range=0.2,
        eos_token_id=[2, 3])).eval()


@each_size
@each_shape
def test_they_read_what_we_save(shape, shard_bytes, tmp_path):
    # No missing, unexpected or newly initialised tensor, and our logits.
    model, path = saved(tmp_path, LlamaConfig(**shape), max_shard_bytes=shard_bytes)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype="auto", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.dtype == torch.float32
    assert_same_logits(model, theirs)


@each_size
@each_shape
def test_we_read_what_they_save(shape, shard_bytes, tmp_path):
    # Safetensors and config.json (rope_parameters, lists of end tokens) of transformers 5.
    theirs = their_model(shape)
    theirs.save_pretrained(tmp_path, max_shard_size=shard_bytes)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or shard_bytes == 10 ** 9
    assert_same_logits(load_llama(str(tmp_path)), theirs)


@each_size
@each_shape
def test_we_read_what_transformers_4_saved(shape, shard_bytes, tmp_path):
    # .bin state dicts (a tied head was written twice, one storage) and rope_theta, rope_scaling.
    theirs = their_model(shape)
    config = {key: value for key, value in shape.items()
              if key not in ("rope_factor", "rope_llama3")}
    rope = their_rope(shape)
    if rope["rope_type"] != "default":
        config["rope_scaling"] = rope
    (tmp_path / "config.json").write_text(json.dumps(config | {
        "model_type": theirs.config.model_type, "torch_dtype": "float32",
        "transformers_version": "4.31.0", "rms_norm_eps": theirs.config.rms_norm_eps,
        "pad_token_id": 0, "rope_theta": 10000.0}
        | ({"rope_theta": shape["rope_theta"]} if "rope_theta" in shape else {})))
    state = theirs.state_dict()
    half = list(state)[len(state) // 2:] if shard_bytes < 10 ** 9 else []
    parts = [{k: v for k, v in state.items() if k not in half}] + (
        [{k: state[k] for k in half}] if half else [])
    names = [f"pytorch_model-{i + 1:05}-of-{len(parts):05}.bin" for i in range(len(parts))]
    if len(parts) == 1:
        names = ["pytorch_model.bin"]
    else:
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({
            "metadata": {"total_size": 1},
            "weight_map": {k: name for part, name in zip(parts, names, strict=True)
                           for k in part}}))
    for part, name in zip(parts, names, strict=True):
        torch.save(part, os.path.join(tmp_path, name))
    assert_same_logits(load_llama(str(tmp_path)), theirs)


def test_an_empty_config_means_the_same_to_both(tmp_path):
    # Their defaults, not Llama-2's: 2048 positions, eps 1e-6. Llama-1 folders rely on them.
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    ours, theirs = read_config(str(tmp_path)), transformers.LlamaConfig.from_pretrained(tmp_path)
    assert ours.rope_factor == 1 and theirs.rope_parameters["rope_type"] == "default"
    assert ours.rope_llama3 is None and ours.sliding_window is None
    for name in set(vars(ours)) - {"rope_theta", "rope_factor", "rope_llama3", "sliding_window"}:
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]


def test_mistrals_empty_config_means_the_same_to_both(tmp_path):
    # A window of 4096, 8 key heads, 131,072 positions, of which we take the window's.
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
    ours, theirs = read_config(str(tmp_path)), transformers.MistralConfig.from_pretrained(tmp_path)
    for name in set(vars(ours)) - {"rope_theta", "rope_factor", "rope_llama3", "head_dim"}:
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"] and ours.max_positions == 4096


def test_a_float16_folder_that_they_save_again_is_the_same(tmp_path):
    # To the bit, in the dtype that published models have.
    model, path = saved(tmp_path / "ours", LlamaConfig(**SHAPES["grouped-query"]), torch.float16)
    theirs = transformers.LlamaForCausalLM.from_pretrained(path, dtype="auto")
    assert theirs.dtype == torch.float16
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same_model(load_llama(str(tmp_path / "theirs"), torch.float16), model)
