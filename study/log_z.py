"""What can stand for beta log Z(x) in pointwise DPO: a constant, a batch's estimate, the truth.

Labels are absolute, so beta log Z(x) does not cancel as it does in DPO. With Z(x) = 1, which
--method pointwise_dpo assumes, the optimum of the loss is another policy than
pi* = pi_ref exp(r / beta) / Z. On the world Z is known:

    Z(x) = sum over outcomes y of pi_ref(y | x) exp(r*(x, y) / beta)
"""
import hashlib
import json
import os
from functools import cache

import torch
from torch import Tensor

from eval import optimum, with_rest, world_logps
from files.fingerprint import weights_of
from files.text import write_text
from model import load_llama
from packing import Stream
from step import Method, Objective
from tokenizer import Tokenizer, encode_prompt
from training.flags import WORLD_FLAGS
from ulma import pointwise_dpo_loss
from world import answers, base_model, question, training_prompts, world_folder


def outcome_rewards(prompt: tuple[str, str]) -> Tensor:
    """r* of every valid answer, then of everything else, the smallest of them: [Y + 1] float64."""
    rewards = [reward for _, reward, *_ in answers(*prompt)]
    return torch.tensor([*rewards, min(rewards)], dtype=torch.float64)


@cache
def exact_log_z() -> dict[tuple[int, ...], float]:
    """{prompt ids: beta log Z(x)} of the training prompts; computed once, then read from a file,
    whose name has what it depends on."""
    tokenizer, beta = Tokenizer(base_model()), WORLD_FLAGS["beta"]
    key = hashlib.sha256(repr((beta, weights_of(base_model()))).encode()).hexdigest()[:8]
    path = os.path.join(world_folder(), f"log_z-{key}.json")
    prompts = training_prompts()
    if not os.path.isfile(path):
        logps, _ = world_logps(load_llama(base_model()), tokenizer, prompts)     # [X, Y]
        write_text(path, json.dumps([
            optimum(with_rest(row), outcome_rewards(prompt), beta)[1]
            for row, prompt in zip(logps, prompts, strict=True)]))
    with open(path, encoding="utf-8") as file:
        values = json.load(file)
    return {tuple(encode_prompt(tokenizer, [("Human", question(*prompt))])): value
            for prompt, value in zip(prompts, values, strict=True)}


def stream_log_z(stream: Stream) -> Tensor:
    """beta log Z(x) of every response's prompt: [R]"""
    log_z, values = exact_log_z(), []
    lengths = stream.response_ids.bincount(minlength=len(stream.scores))         # [R]
    first = lengths.cumsum(0) - lengths          # scored position of a response's first token
    for tree in stream.tree_ids[stream.predict_from[first]].tolist():
        in_prompt = (stream.tree_ids == tree) & (stream.branch_ids == 0)         # [T]
        values.append(log_z[tuple(stream.input_ids[in_prompt].tolist())])
    return torch.tensor(values, device=stream.scores.device)


# ---- methods: log-probs [R] of policy and reference -> losses [R] -------------------------------

def exact_z_loss(policy_logps: Tensor, reference_logps: Tensor, stream: Stream,
                 objective: Objective) -> Tensor:
    """Pointwise DPO with every prompt's own beta log Z(x)."""
    return pointwise_dpo_loss(policy_logps, reference_logps, stream.scores, objective.beta,
                              stream_log_z(stream))


def constant_z_loss(policy_logps: Tensor, reference_logps: Tensor, stream: Stream,
                    objective: Objective) -> Tensor:
    """Pointwise DPO with one constant: the mean of beta log Z(x) over the training prompts."""
    values = exact_log_z().values()
    return pointwise_dpo_loss(policy_logps, reference_logps, stream.scores, objective.beta,
                              sum(values) / len(values))


def batch_z_loss(policy_logps: Tensor, reference_logps: Tensor, stream: Stream,
                 objective: Objective) -> Tensor:
    """Pointwise DPO with minus the micro-batch's mean reward: BCO's shift, without a running mean."""
    log_z = -objective.beta * (policy_logps - reference_logps).detach().mean()   # []
    return pointwise_dpo_loss(policy_logps, reference_logps, stream.scores, objective.beta, log_z)


EXTRA_METHODS = {
    "pointwise_dpo_exact_z": Method(exact_z_loss, trains_on="all", reference="all"),
    "pointwise_dpo_constant_z": Method(constant_z_loss, trains_on="all", reference="all"),
    "pointwise_dpo_batch_z": Method(batch_z_loss, trains_on="all", reference="all"),
}
