"""Adapters against PEFT: each loads what the other wrote, with the same logits to 1e-5.

PEFT must load without a warning. transformers' norms and rotary tables are float32 in any dtype.
"""
import json
import warnings

import pytest
import torch
from conftest import need, write_jsonl
from helpers import make_trees, reward_model_in
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import train
from lora import add_score_head, load_adapter, lora_layers
from model import load_llama
from step import tree_rewards
from tools import export

peft, transformers = need("peft"), need("transformers")

ROW = torch.tensor([1, 5, 7, 30, 300, 7, 12, 3, 2])


def our_logits(model):
    with torch.no_grad():
        return model.eval()(ROW) @ model.lm_head.weight.T


def their_logits(model):
    with torch.no_grad():
        return model.eval()(ROW[None]).logits[0]


def their_base(path):
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def load_strictly(base, path):
    """PeftModel.from_pretrained with warnings as errors: for a wrong key it only warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # PEFT 0.21 reads an attribute that transformers 5.23 has renamed
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        return peft.PeftModel.from_pretrained(base, path)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"],
                                     ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj",
                                      "up_proj", "down_proj"]])
def test_peft_loads_what_training_wrote_without_a_warning(tmp_path, tiny_model, targets):
    # After real steps B is not zero, so the adapter changes the logits.
    pairs = write_jsonl(tmp_path / "pairs.jsonl",
                        [{"prompt": f"How do I fix {n}?", "chosen": "First ask.",
                          "rejected": "No."} for n in range(16)])
    train.main(["--method", "dpo", "--model_name_or_path", tiny_model, "--dataset", pairs,
                "--output_dir", str(tmp_path / "run"), "--max_steps", "4", "--batch_size", "4",
                "--learning_rate", "3e-2", "--lora_r", "3", "--lora_alpha", "7",
                "--lora_target_modules", *targets])
    final = str(tmp_path / "run/final")
    theirs = load_strictly(their_base(tiny_model), final)
    ours = load_adapter(load_llama(tiny_model), final)
    assert {module.scaling["default"] for module in theirs.modules()
            if isinstance(module, peft.tuners.lora.LoraLayer)} == {7 / 3}
    assert (our_logits(ours) - our_logits(load_llama(tiny_model))).abs().max() > 0.01
    assert_close(our_logits(ours), their_logits(theirs), rtol=0, atol=1e-5)


def test_peft_does_warn_of_a_wrong_key(tmp_path, tiny_model):
    # With one prefix too many nothing is loaded: the test above would notice.
    save_peft_adapter(tiny_model, tmp_path, target_modules=["q_proj"])
    file = tmp_path / "adapter_model.safetensors"
    save_file({"x." + name: t for name, t in load_file(file).items()}, file)
    with pytest.raises(UserWarning, match="missing adapter keys"):
        load_strictly(their_base(tiny_model), str(tmp_path))


def save_peft_adapter(model, path, **config):
    """A PEFT model on `model` with random A and B, saved by PEFT."""
    torch.manual_seed(0)
    options = {"r": 3, "lora_alpha": 7, "lora_dropout": 0.1, "task_type": "CAUSAL_LM"} | config
    theirs = peft.get_peft_model(their_base(model), peft.LoraConfig(**options))
    for name, p in theirs.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.3)
    theirs.save_pretrained(str(path))
    return theirs


@pytest.mark.parametrize("options, layers", [
    ({"target_modules": ["q_proj", "v_proj"]}, 4),
    ({"target_modules": ["o_proj", "up_proj", "down_proj"], "r": 5}, 6),
    ({"target_modules": "all-linear"}, 14),
    ({"target_modules": r".*\.(q|k)_proj"}, 4),
    ({"target_modules": ["0.self_attn.q_proj", "model.layers.1.mlp.up_proj"]}, 2),
    ({"target_modules": ["q_proj"], "init_lora_weights": "gaussian"}, 2),
    ({}, 4),                                             # PEFT's own targets of a Llama
])
def test_what_peft_wrote_loads_here(tmp_path, tiny_model, options, layers):
    # Every kind of target_modules; some select only part of the layers with a name.
    theirs = save_peft_adapter(tiny_model, tmp_path, **options)
    ours = load_adapter(load_llama(tiny_model), str(tmp_path))
    assert len(lora_layers(ours)) == layers
    assert (our_logits(ours) - our_logits(load_llama(tiny_model))).abs().max() > 0.01
    assert_close(our_logits(ours), their_logits(theirs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("options, words", [
    ({"rank_pattern": {"q_proj": 2}}, "not rank_pattern = {'q_proj': 2}"),
    ({"alpha_pattern": {"q_proj": 2}}, "not alpha_pattern = {'q_proj': 2}"),
    ({"use_rslora": True}, "not use_rslora = True"),
    ({"use_dora": True}, "not use_dora = True"),
    ({"modules_to_save": ["lm_head"]}, r"not modules_to_save = \['lm_head'\]"),
    ({"layers_to_transform": [0]}, r"not layers_to_transform = \[0\]"),
    ({"init_lora_weights": "pissa"}, "not init_lora_weights = 'pissa'"),
    ({"target_modules": ["q_proj", "lm_head"]}, "no linear layer is called lm_head"),
    ({"bias": "lora_only"}, "not bias = 'lora_only'"),
])
def test_what_is_not_plain_lora_is_refused_by_name(tmp_path, tiny_model, options, words):
    # Each loads in PEFT and computes another function than W + scaling B A on the targets.
    save_peft_adapter(tiny_model, tmp_path, **({"target_modules": ["q_proj"]} | options))
    with pytest.raises(ValueError, match=words):
        load_adapter(load_llama(tiny_model), str(tmp_path))


def test_every_key_peft_writes_is_known(tmp_path, tiny_model):
    # Keys of a later PEFT are accepted if they are off by default; this fails if one is not.
    save_peft_adapter(tiny_model, tmp_path, target_modules=["q_proj"])
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert len(config) > 30 and config["peft_version"]
    load_adapter(load_llama(tiny_model), str(tmp_path))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_loads_what_export_wrote(tmp_path, tiny_model, dtype):
    # float32: the logits of PEFT with the adapter. Both dtypes: the weights that PEFT merges.
    theirs = save_peft_adapter(tiny_model, tmp_path / "adapter", target_modules="all-linear")
    export.main(["--model", tiny_model, "--adapter", str(tmp_path / "adapter"), "--out",
                 str(tmp_path / "out"), "--dtype", dtype])
    merged = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"), dtype="auto")
    assert merged.dtype == getattr(torch, dtype)
    assert merged.generation_config.eos_token_id == 2
    if dtype == "float32":
        assert_close(their_logits(merged), their_logits(theirs), rtol=0, atol=1e-5)
    for name, weight in theirs.merge_and_unload().named_parameters():
        weight = weight.bfloat16().float() if dtype == "bfloat16" else weight
        # ours rounds the base before the update is added, too: one unit in the last place
        rtol, atol = (2 ** -7, 2 ** -11) if dtype == "bfloat16" else (1e-5, 1e-6)
        assert_close(merged.get_parameter(name).float(), weight, rtol=rtol, atol=atol)


def test_transformers_gives_a_reward_models_rewards_and_we_load_what_peft_saved(tmp_path,
                                                                                tiny_model):
    # The logit of LlamaForSequenceClassification is at the last token too. One row at a time: it
    # takes no batches without a pad token.
    model, trees = reward_model_in(tmp_path / "ours", tiny_model), make_trees()
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        tiny_model, num_labels=1, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "ours")).eval()
    rows = [tree.prompt_ids + ids for tree in trees for ids in tree.response_ids]
    with torch.no_grad():
        expected = torch.stack([theirs(input_ids=torch.tensor([row])).logits[0, 0] for row in rows])
    assert expected.std() > 0.01
    assert_close(tree_rewards(model, trees), expected, rtol=1e-5, atol=1e-6)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = load_adapter(add_score_head(load_llama(tiny_model)), str(tmp_path / "theirs"))
    assert_close(tree_rewards(again, trees), expected, rtol=1e-5, atol=1e-6)
