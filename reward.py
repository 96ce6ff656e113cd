"""Reward models: the policy's Llama with an adapter and a scalar head instead of the vocabulary.

    r(x, y) = w · h,   h = the last layer's state at the last token of the response, EOS included

A policy's stream leaves that token out: it predicts nothing. A reward model has to read it. After
"a b c" the state is the same whether the answer ended there or was cut one token later, and only
the first of the two deserves a finished answer's reward.

    python train.py --method reward_model             pairs, Bradley-Terry
    python train.py --method pointwise_reward_model   z in [0, 1], cross-entropy
    python train.py --method mse_reward_model         continuous z, squared error

The head is saved in the adapter's own file, where PEFT keeps it: `score.weight` [1, D], listed in
`modules_to_save`, for transformers' LlamaForSequenceClassification with num_labels = 1.
"""
import os
from dataclasses import replace

import torch
from torch import Tensor

from lora import load_adapter
from model import Linear, Llama, load_llama
from trees import Stream, Tree, build_stream, pack
from weights import read_json


def add_score_head(model: Llama) -> Llama:
    """Give the model `score.weight` [1, D], trained, in float32; zero: all rewards start at 0."""
    embedding = model.model.embed_tokens.weight
    model.score = Linear(model.config.hidden_size, 1).to(
        embedding.device, torch.promote_types(embedding.dtype, torch.float32))
    torch.nn.init.zeros_(model.score.weight)
    return model


def feed_last_tokens(trees: list[Tree]) -> list[Tree]:
    """Trees whose streams hold every token of every response: a label nobody reads comes after."""
    return [replace(tree, response_ids=[[*ids, 0] for ids in tree.response_ids]) for tree in trees]


def stream_rewards(model: Llama, stream: Stream) -> Tensor:
    """r(x, y) of every response: [R] float32.

    model    with a score head
    stream   of trees from `feed_last_tokens`: a response's last position is its last token's
    """
    hidden = model(stream.input_ids, stream.position_ids, stream.segments)       # [T, D]
    numbers = torch.arange(len(stream.scores), device=stream.scores.device)      # [R]
    last = torch.searchsorted(stream.response_ids, numbers, right=True) - 1      # [R]
    hidden = hidden.index_select(0, stream.predict_from[last])                   # [R, D]
    return hidden.to(model.score.weight.dtype) @ model.score.weight[0]           # [R]


@torch.no_grad()
def tree_rewards(model: Llama, trees: list[Tree], micro_tokens: int = 8192) -> Tensor:
    """r(x, y) of every response of trees as `trees.make_trees` gives them, in order: [R] float."""
    device = model.score.weight.device
    return torch.cat([stream_rewards(model, build_stream(group, device))
                      for group in pack(feed_last_tokens(trees), micro_tokens)])


def load_reward_model(path: str, dtype: torch.dtype = torch.float32, device="cpu",
                      base: str | None = None) -> Llama:
    """The reward model of a folder such as OUT/final, for `tree_rewards`; without dropout.

    base     the Hugging Face folder under the adapter (default: what adapter_config.json says)
    raises   ValueError or OSError for a folder that is no adapter, or one without a score head
    """
    file = os.path.join(path, "adapter_config.json")
    if not os.path.isfile(file):
        raise FileNotFoundError(f"{file}: no such file (a reward model's folder has one)")
    config = read_json(file)
    if "score" not in (config.get("modules_to_save") or []):
        raise ValueError(f"{file}: modules_to_save is {config.get('modules_to_save')!r}; a reward "
                         "model's is ['score']")
    model = load_llama(base or config["base_model_name_or_path"], dtype, device)
    return load_adapter(add_score_head(model), path).eval()
