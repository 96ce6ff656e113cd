"""python -m tools.gguf against models whose weights and tokenizer are known, and transformers."""
import json
import os
import shutil

import pytest
import torch
from chat_templates import HARD_TEXTS, TEMPLATES, write_byte_level
from conftest import ROOT, need, save_tiny_model, tree_of
from test_gguf import sentencepiece_keys

from files.config import Llama3Rope, read_config
from generate import generate
from model import load_llama, rotary_angles
from tokenizer import Tokenizer, encode_dialogue
from tools import gguf

package, transformers = need("gguf"), need("transformers")
NAMES = {ours: theirs for theirs, ours in gguf.NAMES.items()} | {
    ours: theirs for theirs, ours in gguf.LAYER_NAMES.items()}


def their_name(name: str) -> str:
    parts = name.removeprefix("model.layers.").removesuffix(".weight")
    if name.startswith("model.layers."):
        number, _, rest = parts.partition(".")
        return f"blk.{number}.{NAMES[rest]}.weight"
    return f"{NAMES[parts]}.weight"


def permuted(weight, config):
    """As llama.cpp stores q and k: the halves of each head interleaved."""
    return weight.view(-1, 2, config.head_dim // 2, weight.shape[1]).transpose(1, 2).reshape(
        weight.shape)


def write_gguf(file, model, tokens: dict, kind: str, changes=(), skip=(), quantize=False) -> str:
    """A GGUF file of one of our models, as llama.cpp's converter writes it."""
    config, writer = model.config, package.GGUFWriter(str(file), "llama")
    keys = {"llama.block_count": config.num_hidden_layers,
            "llama.context_length": config.max_position_embeddings,
            "llama.embedding_length": config.hidden_size,
            "llama.feed_forward_length": config.intermediate_size,
            "llama.attention.head_count": config.num_attention_heads,
            "llama.attention.head_count_kv": config.num_key_value_heads,
            "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
            "llama.rope.freq_base": config.rope_theta,
            "llama.attention.key_length": config.head_dim, "tokenizer.ggml.model": kind}
    keys |= {f"tokenizer.ggml.{key}": value for key, value in tokens.items()} | dict(changes)
    for key, value in keys.items():
        if key in skip or value is None:
            continue
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32,
             str: writer.add_string}[type(value)](key, value)
    for name, weight in model.state_dict().items():
        if config.tie_word_embeddings and name == "lm_head.weight" or name in skip:
            continue
        if "q_proj" in name or "k_proj" in name:
            weight = permuted(weight, config)
        array, options = weight.float().numpy(), {}
        if quantize and array.ndim == 2:
            options = {"raw_dtype": package.GGMLQuantizationType.Q8_0}
            array = package.quants.quantize(array, package.GGMLQuantizationType.Q8_0)
        writer.add_tensor(their_name(name), array, **options)
    if config.rope_llama3:
        one = torch.ones(1)
        angles = [torch.atan2(sin, cos) for cos, sin in (
            rotary_angles(one, config.head_dim, config.rope_theta),
            rotary_angles(one, config.head_dim, config.rope_theta, 1.0, config.rope_llama3))]
        writer.add_tensor("rope_freqs.weight", (angles[0] / angles[1])[0].float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(file)


def byte_level_keys(folder) -> dict:
    raw = json.loads((folder / "tokenizer.json").read_text())
    vocab = raw["model"]["vocab"] | {token["content"]: token["id"] for token in raw["added_tokens"]}
    kinds = {token["content"]: 3 if token["special"] else 4 for token in raw["added_tokens"]}
    tokens = sorted(vocab, key=vocab.get)
    return {"tokens": tokens, "token_type": [kinds.get(token, 1) for token in tokens],
            "merges": [" ".join(merge) for merge in raw["model"]["merges"]]}


@pytest.mark.parametrize("shape", [
    {}, {"tie_word_embeddings": True}, {"num_key_value_heads": 1, "head_dim": 12},
    {"rope_llama3": Llama3Rope(32.0), "rope_theta": 5e5, "head_dim": 16}, {"rope_theta": 1e5},
], ids=["plain", "tied", "wide heads", "llama3 rope", "theta"])
def test_weights_and_a_sentencepiece_tokenizer_come_back(shape, tmp_path, tiny_tokenizer):
    source = save_tiny_model(tmp_path / "from", tiny_tokenizer, **shape)
    model = load_llama(source)
    file = write_gguf(tmp_path / "m.gguf", model, sentencepiece_keys(tiny_tokenizer), "llama",
                      {"tokenizer.chat_template": TEMPLATES["Zephyr"]})
    gguf.main([file, str(tmp_path / "to")])
    assert read_config(str(tmp_path / "to")) == model.config
    for name, weight in load_llama(str(tmp_path / "to")).state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name
    (tmp_path / "zephyr.jinja").write_text(TEMPLATES["Zephyr"])
    ours = Tokenizer(source, chat_template=str(tmp_path / "zephyr.jinja"))
    made = Tokenizer(str(tmp_path / "to"))
    assert made.chat_template == "model" and made.eos_ids == ours.eos_ids
    for text in HARD_TEXTS:
        turns = [("Human", text), ("Assistant", text)]
        assert encode_dialogue(made, turns) == encode_dialogue(ours, turns)


@pytest.mark.parametrize("kind, pre", [("Llama-3", "llama-bpe"), ("SmolLM2", "smollm")])
def test_a_byte_level_tokenizer_comes_back(kind, pre, tmp_path):
    source = tmp_path / "from"
    source.mkdir()
    write_byte_level(source, kind)
    ours = Tokenizer(str(source), chat_template="model")
    save_tiny_model(source, vocab_size=ours.vocab_size)
    end = ours.vocabulary.ids.get("<|end_of_text|>", ours.eos_id)
    keys = byte_level_keys(source) | {
        "pre": pre, "bos_token_id": ours.bos_id, "eos_token_id": end, "eot_token_id": ours.eos_id,
        "add_bos_token": bool(ours.vocabulary.start)}
    file = write_gguf(tmp_path / "m.gguf", load_llama(str(source)), keys, "gpt2",
                      {"tokenizer.chat_template": TEMPLATES[kind]})
    gguf.main([file, str(tmp_path / "to"), "--dtype", "bfloat16"])
    made = Tokenizer(str(tmp_path / "to"))
    assert made.vocabulary.names == ours.vocabulary.names
    assert made.vocabulary.start == ours.vocabulary.start
    assert made.eos_id == ours.eos_id and set(made.eos_ids) == {ours.eos_id, end}
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "to"))
    for text in [*HARD_TEXTS, "a <tool> b"]:
        turns = [("Human", text), ("Assistant", text)]
        assert encode_dialogue(made, turns) == encode_dialogue(ours, turns), text
        assert theirs(text, split_special_tokens=True, add_special_tokens=False).input_ids == (
            ours.encode(text))
    assert json.loads((tmp_path / "to/config.json").read_text())["torch_dtype"] == "bfloat16"
    assert read_config(str(tmp_path / "to")).eos_token_id == (
        (end, ours.eos_id) if end != ours.eos_id else end)


def test_quantised_weights_equal_transformers_reader(tmp_path, tiny_tokenizer):
    model = load_llama(save_tiny_model(tmp_path / "from"))
    file = write_gguf(tmp_path / "m.gguf", model, sentencepiece_keys(tiny_tokenizer), "llama",
                      quantize=True)
    gguf.main([file, str(tmp_path / "to")])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        str(tmp_path), gguf_file="m.gguf", dtype=torch.float32).state_dict()
    for name, weight in load_llama(str(tmp_path / "to")).state_dict().items():
        assert torch.equal(weight, theirs[name]), name
        assert not weight.dim() == 2 or not torch.equal(weight, model.state_dict()[name])


@pytest.mark.parametrize("changes, skip, words", [
    ({"llama.expert_count": 8}, [], "a mixture of experts"),
    ({"llama.rope.scaling.type": "yarn"}, [], "rope scaling of type 'yarn'"),
    ({"tokenizer.ggml.model": "bert"}, [], "a tokenizer of kind 'bert'"),
    ({"llama.block_count": 3}, [], "model.layers.2.input_layernorm.weight is missing"),
    ({"llama.block_count": 10 ** 9}, [], "num_hidden_layers is 1000000000"),
    ({"llama.block_count": 1}, [], "blk.1.attn_norm.weight [32] is unexpected"),
    ({}, ["model.layers.1.mlp.up_proj.weight"], "model.layers.1.mlp.up_proj.weight is missing"),
    ({}, ["tokenizer.ggml.tokens"], "the key tokenizer.ggml.tokens is missing"),
    ({"llama.feed_forward_length": 48}, [], "blk.0.ffn_"),
])
def test_a_file_that_does_not_fit_is_refused_and_nothing_written(changes, skip, words, tmp_path,
                                                                 tiny_model, tiny_tokenizer):
    file = write_gguf(tmp_path / "m.gguf", load_llama(tiny_model),
                      sentencepiece_keys(tiny_tokenizer), "llama", changes, skip)
    before = tree_of(tmp_path)
    with pytest.raises(ValueError) as error:
        gguf.main([file, str(tmp_path / "to")])
    assert str(error.value).startswith(f"{file}: ") and words in str(error.value)
    assert tree_of(tmp_path) == before


def test_no_gguf_file_is_said_to_be_none(tmp_path, tiny_model):
    shutil.copy(f"{tiny_model}/model.safetensors", tmp_path / "a.gguf")
    with pytest.raises(ValueError, match="a.gguf: not a GGUF file: "):
        gguf.main([str(tmp_path / "a.gguf"), str(tmp_path / "to")])
    with pytest.raises(FileNotFoundError, match="b.gguf: no such file"):
        gguf.main([str(tmp_path / "b.gguf"), str(tmp_path / "to")])


def test_the_real_model_answers():
    # SmolLM2-135M-Instruct, after `make real-model`.
    folder = str(ROOT / "models/smollm2")
    if not os.path.isdir(folder):
        pytest.skip("no models/smollm2: make real-model")
    model, tokenizer = load_llama(folder), Tokenizer(folder)
    ids, _ = encode_dialogue(tokenizer, [("Human", "What is the capital of France?")])
    answer, = generate(model, [ids], 20, temperature=0, eos_id=tokenizer.eos_ids)
    assert tokenizer.decode(answer) == "The capital of France is Paris."
    assert answer[-1] == tokenizer.eos_id == 2
