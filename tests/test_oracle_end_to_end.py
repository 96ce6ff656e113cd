"""Every command on folders as they are downloaded, and what comes out in transformers.

TinyLlama's kind: SentencePiece, Zephyr's template; Llama-3's: tokenizer.json, stretched rope,
several ids that end an answer, a padded embedding. Random weights, the real commands.
"""
import json
import shutil
from pathlib import Path

import pytest
import torch
from chat_templates import TEMPLATES, messages_of, write_byte_level
from conftest import finish, need, save_tiny_model, tree_of, write_jsonl

from files.config import Llama3Rope
from files.text import read_json
from lora import load_adapter
from model import load_llama
from tokenizer import Tokenizer, encode_dialogue

transformers = need("transformers")
need("jinja2")
SIZES = "--batch_size 4 --max_length 192 --max_prompt_length 128 --held_out 0.3".split()


@pytest.fixture(params=["TinyLlama", "Llama-3"], scope="module")
def folder(request, tmp_path_factory, tiny_tokenizer) -> Path:
    """A model's folder as it is published."""
    path = tmp_path_factory.mktemp("model") / request.param
    path.mkdir()
    if request.param == "TinyLlama":
        shutil.copy(tiny_tokenizer, path)
        (path / "tokenizer_config.json").write_text(json.dumps({
            "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>",
            "legacy": False, "tokenizer_class": "LlamaTokenizer",
            "model_max_length": 10 ** 30, "chat_template": TEMPLATES["Zephyr"]}))
        save_tiny_model(path, num_key_value_heads=1)
    else:
        ids = Tokenizer(write_byte_level(path, "Llama-3", 640)).vocabulary.ids
        save_tiny_model(path, vocab_size=len(ids) + 7, rope_theta=5e5, tie_word_embeddings=True,
                        rope_llama3=Llama3Rope(32.0), bos_token_id=ids["<|begin_of_text|>"],
                        eos_token_id=(ids["<|end_of_text|>"], ids["<|eot_id|>"]))
    return path


@pytest.fixture(scope="module")
def data_file(tmp_path_factory) -> str:
    turns = [{"role": "user", "content": "Can you paint a boat?"},
             {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "And sell it?"}]
    rows = [{"prompt": turns if number % 2 else f"How do I fix door {number}?",
             "chosen": f"First ask, then wait {number}.", "rejected": "</s><|eot_id|> No."}
            for number in range(24)]
    return write_jsonl(tmp_path_factory.mktemp("data") / "pairs.jsonl", rows)


@pytest.fixture(scope="module")
def run(folder, data_file, tmp_path_factory) -> Path:
    """A finished run of DPO with the folder's own template."""
    out = tmp_path_factory.mktemp("run") / "dpo"
    finish("train.py", "--method", "dpo", "--model_name_or_path", folder, "--dataset", data_file,
           "--output_dir", out, "--chat_template", "model", "--max_steps", 3, "--save_steps", 1,
           "--learning_rate", "1e-2", *SIZES)
    return out


def test_the_run_records_its_template(run, folder):
    flags, own = read_json(str(run / "args.json")), Tokenizer(str(folder), chat_template="model")
    assert flags["chat_template"] == "model" and len(flags["chat_template_sha256"]) == 64
    assert (run / "final/chat_template.jinja").read_text() == own.template_text
    assert Tokenizer(str(run / "final")).template_text == own.template_text


def test_a_killed_run_goes_on_to_the_same_bytes(run, folder, data_file, tmp_path):
    # As after a kill behind step 1: checkpoint-1 alone; another template is another run.
    out = tmp_path / "dpo"
    shutil.copytree(run, out)
    for name in ("final", "checkpoint-2"):
        shutil.rmtree(out / name)
    flags = ["--method", "dpo", "--model_name_or_path", folder, "--dataset", data_file,
             "--output_dir", out, "--max_steps", 3, "--save_steps", 1, "--learning_rate", "1e-2",
             *SIZES]
    with pytest.raises(ValueError, match="chat_template was 'model', now 'vicuna'"):
        finish("train.py", *flags, "--chat_template", "vicuna")
    assert "continuing after step 1" in finish("train.py", *flags, "--chat_template", "model")
    ours, theirs = tree_of(out / "final"), tree_of(run / "final")
    assert ours["adapter_model.safetensors"] == theirs["adapter_model.safetensors"]


def test_it_is_measured_and_generates_with_its_template(run, folder, data_file, tmp_path,
                                                        monkeypatch):
    import generate as generate_file
    import packing
    finish("tools.heatmap", run, "--html", tmp_path / "heat.html", "--first", 1)
    assert "ASSISTANT" not in (tmp_path / "heat.html").read_text()
    templates = set()
    for module in (generate_file, packing):
        original = module.encode_prompt
        monkeypatch.setattr(module, "encode_prompt", lambda tokenizer, turns, f=original: (
            templates.add(tokenizer.chat_template), f(tokenizer, turns))[1])
    assert "accuracy" in finish("eval.py", run)
    finish("generate.py", "--model", folder, "--adapter", run / "final", "--dataset", data_file,
           "--out", tmp_path / "out.jsonl", "--max_new_tokens", 12, "--temperature", 2)
    assert templates == {str(run / "final/chat_template.jinja")}
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(rows) == 24 and all(row["tokens"] <= 12 for row in rows)


def test_other_methods_run(folder, data_file, tmp_path):
    flags = ["--model_name_or_path", folder, "--dataset", data_file, "--chat_template", "model",
             "--max_steps", 1, *SIZES]
    finish("train.py", "--method", "d2o", "--output_dir", tmp_path / "d2o", "--num_anchors", 2,
           "--anchor_tokens", 8, *flags)
    anchors = [json.loads(line) for line in (tmp_path / "d2o/anchors-0.jsonl").open()]
    unused = Tokenizer(str(folder)).unused_ids(load_llama(str(folder)).config.vocab_size)
    ids = [number for row in anchors for anchor in row.get("anchor_ids", []) for number in anchor]
    assert ids and not set(ids) & set(unused)
    finish("train.py", "--method", "reward_model", "--output_dir", tmp_path / "rm", *flags)
    finish("rlhf.ppo", "--reward_model", tmp_path / "rm", "--output_dir", tmp_path / "ppo",
           "--max_steps", 1, "--batch_size", 8, "--max_new_tokens", 8)
    assert Tokenizer(str(tmp_path / "ppo/final")).template_text == Tokenizer(
        str(folder), chat_template="model").template_text
    assert "accuracy" in finish("eval.py", tmp_path / "rm", tmp_path / "ppo")


@pytest.mark.parametrize("template", ["model", "vicuna"])
def test_the_exported_folder_is_the_same_model_in_transformers(run, folder, template, tmp_path):
    # Logits, ids of a dialogue in the template that was trained, what ends an answer.
    out = tmp_path / "out"
    flags = [] if template == "model" else ["--chat_template", "vicuna"]
    finish("tools.export", "--model", folder, "--adapter", run / "final", "--out", out, *flags)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(str(out), dtype=torch.float32)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(str(out))
    ours = load_adapter(load_llama(str(folder)), str(run / "final")).eval()
    tokenizer = Tokenizer(str(folder), chat_template=template)
    turns = [("System", "Be kind."), ("Human", "How  do I fix it?\n"), ("Assistant", "Ask."),
             ("Human", "Why 123? 👍"), ("Assistant", "Because.")]
    prompt_ids, response_ids = encode_dialogue(tokenizer, turns)
    assert prompt_ids == their_tokenizer.apply_chat_template(
        messages_of(turns[:-1]), add_generation_prompt=True, return_dict=False)
    whole = their_tokenizer.apply_chat_template(messages_of(turns), return_dict=False)
    assert whole[:len(prompt_ids + response_ids)] == prompt_ids + response_ids
    with torch.no_grad():
        expected = ours(torch.tensor(whole)) @ ours.lm_head.weight.T
        logits = theirs(torch.tensor([whole])).logits[0]
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-6 * expected.abs().max().item())
    ends = theirs.generation_config.eos_token_id
    assert set(ends if isinstance(ends, list) else [ends]) == set(tokenizer.eos_ids)
    again = Tokenizer(str(out))
    assert again.eos_ids == tokenizer.eos_ids and again.chat_template == template
    assert encode_dialogue(again, turns) == (prompt_ids, response_ids)


def test_without_the_flag_vicunas_text_is_served_where_it_was_trained(folder, data_file, tmp_path):
    # A tokenizer.model: Vicuna's text as ever; else the folder's own.
    out = tmp_path / "sft"
    finish("train.py", "--method", "sft", "--model_name_or_path", folder, "--dataset", data_file,
           "--output_dir", out, "--max_steps", 1, *SIZES)
    name = "vicuna" if folder.name == "TinyLlama" else "model"
    assert read_json(str(out / "args.json"))["chat_template"] == name
    written = (out / "final/chat_template.jinja").read_text()
    assert ("ASSISTANT: " in written) == (name == "vicuna")
    finish("tools.export", "--model", folder, "--adapter", out / "final", "--out", tmp_path / "ex")
    assert (tmp_path / "ex/chat_template.jinja").read_text() == written
