"""What every implementation of bench/step.py is given: a shape, an adapter, tokens, weights.

The workers that run TRL import this file too. So the project is imported only where HH is read, and
torch only where weights are made.
"""
import random
import zlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.nn import Module

SIZES = {     # a Llama's shape, with the names of config.json
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 4, "intermediate_size": 176, "vocab_size": 32000},
    "small": {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8,
              "num_key_value_heads": 8, "intermediate_size": 1408, "vocab_size": 32000},
    "7b": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 32, "intermediate_size": 11008, "vocab_size": 32000}}
OURS = ("ours-dpo", "ours-ulma", "ours-d2o", "ours-d2o-unshared")    # the second word: the method
LORA_R, LORA_ALPHA, LORA_TARGETS = 8, 32, ("q_proj", "v_proj")
BETA, LEARNING_RATE, MAX_GRAD_NORM = 0.1, 1e-4, 1.0            # but for the rate, TRL's defaults
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}               # of the frozen weights
ANCHORS = 11                                                   # K of D2O, arXiv:2403.03419v2


def hh_pairs(dataset: str, tokenizer: str, n: int) -> list[dict]:
    """The first n records of an HH file that have two responses, as token ids.

    dataset    path of an HH .jsonl.gz
    tokenizer  path of a SentencePiece model
    returns    [{"prompt": ids, "chosen": ids, "rejected": ids}]; a prompt starts with BOS, a
               response ends with EOS, so no implementation has to add a token
    raises     ValueError if the file has fewer than n
    """
    from data import read_dataset
    from tokenizer import Tokenizer, encode_dialogue

    encoder, pairs = Tokenizer(tokenizer), []
    for record in read_dataset(dataset):
        if sorted(record.scores) != [0, 1]:
            continue
        chosen, rejected = (record.responses[record.scores.index(score)] for score in (1, 0))
        prompt_ids, chosen_ids = encode_dialogue(encoder, [*record.prompt, ("Assistant", chosen)])
        _, rejected_ids = encode_dialogue(encoder, [*record.prompt, ("Assistant", rejected)])
        pairs.append({"prompt": prompt_ids, "chosen": chosen_ids, "rejected": rejected_ids})
        if len(pairs) == n:
            return pairs
    raise ValueError(f"{dataset}: {len(pairs)} records with two responses, --pairs asks for {n}")


def with_anchors(pairs: list[dict], n: int) -> list[dict]:
    """The first n prompts with their bad response and K = 11 answers to other prompts of `pairs`.

    An anchor of D2O is a sample of the model; here only its length counts, which is that of an HH
    response.
    returns   [{"prompt": ids, "negative": ids, "anchors": [ids] · K}]
    """
    draw, prompts = random.Random(0), []
    for number, pair in enumerate(pairs[:n]):
        others = [other[key] for i, other in enumerate(pairs) if i != number
                  for key in ("chosen", "rejected")]
        prompts.append({"prompt": pair["prompt"], "negative": pair["rejected"],
                        "anchors": draw.choices(others, k=ANCHORS)})
    return prompts


def longest(pair: dict) -> int:
    """Tokens of the pair's longer sequence."""
    return len(pair["prompt"]) + max(len(pair["chosen"]), len(pair["rejected"]))


def padded_tokens(pairs: list[dict], micro_pairs: int) -> int:
    """Tokens of padded micro-batches of so many pairs in this order, a response per row."""
    lengths = [longest(pair) for pair in pairs]
    batches = [lengths[i:i + micro_pairs] for i in range(0, len(lengths), micro_pairs)]
    return sum(2 * len(batch) * max(batch) for batch in batches)


def token_counts(pairs: list[dict], prompts: list[dict], micro_pairs: int) -> dict:
    """Tokens that a step handles, by how prompts are laid out."""
    prompt = sum(len(pair["prompt"]) for pair in pairs)
    response = sum(len(pair["chosen"]) + len(pair["rejected"]) for pair in pairs)
    d2o_prompt = sum(len(tree["prompt"]) for tree in prompts)
    d2o_response = sum(len(ids) for tree in prompts for ids in (tree["negative"], *tree["anchors"]))
    return {"pairs": len(pairs), "response": response, "shared_prompt": prompt + response,
            "unpadded": 2 * prompt + response, "padded": padded_tokens(pairs, 8),
            "padded_by_length": padded_tokens(sorted(pairs, key=longest), micro_pairs),
            "d2o_prompts": len(prompts), "d2o_shared_prompt": d2o_prompt + d2o_response,
            "d2o_unshared": (1 + ANCHORS) * d2o_prompt + d2o_response}


def random_weights_(model: "Module") -> None:
    """Fill a Llama and its adapter, in place: every tensor from a seed made of its name alone.

    So each worker makes the same weights on its device, and no 13.5 GB go through a file. Norms
    are one, A uniform in ±1/√D (which is what kaiming_uniform_(a=√5) of loralib and PEFT
    gives), the rest N(0, 0.02²). PEFT's names are read as ours. With PEFT's B = 0 the first updates of
    bf16 weights would mostly be rounded away, and losses that should agree would not.
    """
    import torch

    for name, parameter in model.named_parameters():
        name = name.removeprefix("base_model.model.").replace(".base_layer", "")
        name = name.replace(".default.weight", "")
        generator = torch.Generator(parameter.device).manual_seed(zlib.crc32(name.encode()))
        if parameter.dim() == 1:
            parameter.data.fill_(1.0)
        elif name.endswith("lora_A"):
            bound = parameter.shape[1] ** -0.5
            parameter.data.uniform_(-bound, bound, generator=generator)
        else:
            parameter.data.normal_(0.0, 0.02, generator=generator)
