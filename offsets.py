"""What can stand for beta log Z(x) in pointwise DPO: nothing, a constant, a batch, the exact value.

Labels are absolute, so beta log Z(x) does not cancel as it does in DPO; with Z(x) = 1 the optimum
of the loss is another policy than pi* = pi_ref exp(r / beta) / Z. On the world Z is known:

    Z(x) = sum over outcomes y of pi_ref(y | x) exp(r*(x, y) / beta)
"""
import json
import os
from functools import cache

import torch
from torch import Tensor

from checkpoint import write_text
from eval import optimum, with_rest, world_logps
from model import load_llama
from step import Method
from tokenizer import Tokenizer, encode_dialogue
from ulma import pointwise_dpo_loss
from world import WORLD_FLAGS, answers, base_model, question, training_prompts, world_folder


def outcome_rewards(prompt) -> Tensor:
    """r* of every valid answer, and of all else, which earns the worst: [Y + 1] float64."""
    rewards = [reward for _, reward, *_ in answers(*prompt)]
    return torch.tensor([*rewards, min(rewards)], dtype=torch.float64)


@cache
def exact_log_z() -> dict[tuple, float]:
    """{prompt ids: beta log Z(x)} of the training prompts, under the true reward."""
    tokenizer, path = Tokenizer(base_model()), os.path.join(world_folder(), "log_z.json")
    if not os.path.isfile(path):
        asked = training_prompts()
        logps, _ = world_logps(load_llama(base_model()), tokenizer, asked)
        write_text(path, json.dumps([optimum(with_rest(row), outcome_rewards(prompt),
                                             WORLD_FLAGS["beta"])[1]
                                     for row, prompt in zip(logps, asked)]))
    with open(path, encoding="utf-8") as stream:
        values = json.load(stream)
    return {tuple(encode_dialogue(tokenizer, [("Human", question(*prompt))])[0]): value
            for prompt, value in zip(training_prompts(), values)}


def stream_log_z(stream) -> Tensor:
    """beta log Z(x) of every response's prompt: [R]"""
    known, values = exact_log_z(), []
    first = stream.response_ids.bincount(minlength=len(stream.scores)).cumsum(0).roll(1)
    first[0] = 0                                 # scored position of a response's first token
    for tree in stream.tree_ids[stream.predict_from[first]].tolist():
        prompt = (stream.tree_ids == tree) & (stream.branch_ids == 0)
        values.append(known[tuple(stream.input_ids[prompt].tolist())])
    return torch.tensor(values, device=stream.scores.device)


def mean_log_z() -> float:
    values = exact_log_z().values()
    return sum(values) / len(values)


def batch_log_z(p: Tensor, r: Tensor, beta: float) -> Tensor:
    """Minus the batch's mean reward, as BCO's shift, without its running average: []"""
    return -beta * (p - r).detach().mean()


EXTRA_METHODS = {
    "pointwise_dpo_exact_z": Method("all", "all", lambda p, r, s, b, c: pointwise_dpo_loss(
        p, r, s.scores, b, stream_log_z(s))),
    "pointwise_dpo_constant_z": Method("all", "all", lambda p, r, s, b, c: pointwise_dpo_loss(
        p, r, s.scores, b, mean_log_z())),
    "pointwise_dpo_batch_z": Method("all", "all", lambda p, r, s, b, c: pointwise_dpo_loss(
        p, r, s.scores, b, batch_log_z(p, r, b))),
}
