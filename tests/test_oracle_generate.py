"""Greedy generation against transformers' generate, token for token."""
import torch
from conftest import need
from helpers import each_config, make_llama, random_tokens

from generate import generate
from model import save_llama

transformers = need("transformers")


@each_config
def test_greedy_equals_transformers(config, tmp_path):
    model, _ = make_llama(config)
    save_llama(model, str(tmp_path))
    other = transformers.LlamaForCausalLM.from_pretrained(str(tmp_path), dtype=torch.float64)
    prompts = [random_tokens(length, seed=length) for length in (3, 40, 17, 1, 29)]
    length = max(map(len, prompts))
    padded = torch.tensor([[0] * (length - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts])
    rows = other.generate(input_ids=padded, attention_mask=mask, do_sample=False,
                          max_new_tokens=64, pad_token_id=0, eos_token_id=None)[:, length:]
    assert generate(model, prompts, 64, temperature=0, eos_id=None) == rows.tolist()
