"""What PPO learns from: responses sampled from the policy, and what was known of every token.

    prompts -> sampled responses -> one pass without gradients -> rollouts, known to every rank
"""
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from generate import generate
from kept import gather
from kernels import linear_logps
from model import Llama
from reward import feed_last_tokens, stream_rewards
from step import adapters_off, scored_hidden, token_logps
from tokenizer import Tokenizer
from trees import Stream, Tree, build_stream, pack
from world import answers, prompts, question


@dataclass(frozen=True, kw_only=True)
class Rollout(Tree):
    """A tree of sampled responses, n tokens in all; `scores` holds r_φ(x, y). On the CPU."""
    per_token_logps: Tensor              # [n] of its tokens, under the policy that sampled them
    reference_per_token_logps: Tensor    # [n]
    entropy: Tensor                      # [n] of the policy's next token
    kl: Tensor                           # [n] exact KL(policy || reference) of the next token
    values: Tensor                       # [n]
    advantages: Tensor | None = None     # [n] whitened over the batch
    returns: Tensor | None = None        # [n]


def joined(rollouts: list[Rollout], name: str, device="cpu") -> Tensor:
    """One field of all rollouts, end to end: [N]."""
    return torch.cat([getattr(rollout, name) for rollout in rollouts]).to(device)


def sample(policy: Llama, prompt_ids: list[list[int]], seeds: list[int], max_new_tokens: int,
           rank: int = 0, world_size: int = 1) -> list[Tree]:
    """Sampled responses to this rank's share of the prompts: numbers rank, rank + world_size, …

    seeds    K for every prompt: it gets K responses, which share its tokens in one tree
    """
    count, numbers = len(seeds) // len(prompt_ids), range(rank, len(prompt_ids), world_size)
    rows = [i * count + k for i in numbers for k in range(count)]
    said = generate(policy, [prompt_ids[row // count] for row in rows], max_new_tokens,
                    generator=[seeds[row] for row in rows])
    return [Tree(prompt_ids[i], said[n * count:(n + 1) * count], [0.0] * count, [])
            for n, i in enumerate(numbers)]


def token_values(value: Llama, stream: Stream) -> Tensor:
    """V(x, y_<t) before every scored token of a stream: [N] float32."""
    hidden = scored_hidden(value, stream)                                        # [N, D]
    return hidden.to(value.score.weight.dtype) @ value.score.weight[0]


@torch.no_grad()
def observe(policy: Llama, value: Llama, reward_model: Llama, trees: list[Tree], eos_id: int,
            missing_eos_penalty: float, micro_tokens: int, device="cpu") -> list[Rollout]:
    """The rollouts of sampled trees.

    missing_eos_penalty   taken off the reward of a response that was cut: it does not end in EOS
    """
    rollouts, with_extras = [], partial(linear_logps, entropy=True, kl=True)
    for group in pack(trees, micro_tokens):
        stream = build_stream(group, device)
        names = ("per_token_logps", "reference_per_token_logps", "entropy", "kl", "values")
        columns = (*token_logps(policy, partial(adapters_off, policy), stream, stream,
                                with_extras), token_values(value, stream))       # [N] each
        lengths = [sum(map(len, tree.response_ids)) for tree in group]
        rewards = stream_rewards(reward_model, build_stream(feed_last_tokens(group), device))  # [R]
        rewards = iter(rewards.tolist())
        for tree, *tokens in zip(group, *(column.cpu().split(lengths) for column in columns)):
            scores = [next(rewards) - missing_eos_penalty * (ids[-1] != eos_id)
                      for ids in tree.response_ids]
            rollouts.append(Rollout(tree.prompt_ids, tree.response_ids, scores, [],
                                    **dict(zip(names, tokens))))
    return rollouts


def exchange(rollouts: list[Rollout], world_size: int) -> list[Rollout]:
    """Every rank's rollouts, in the order of the batch, on every rank."""
    shares = gather(rollouts)
    return [shares[i % world_size][i // world_size] for i in range(sum(map(len, shares)))]


# ---- what a batch says of its policy ------------------------------------------------------------

def world_rewards() -> dict[tuple, dict[str, float]]:
    """{prompt: {answer: r*}} of the embedded world."""
    return {(("Human", question(*asked)),): {text: reward for text, reward, *_ in answers(*asked)}
            for asked in prompts()}


def true_rewards(rollout: Rollout, listed: dict[str, float], tokenizer: Tokenizer) -> list[float]:
    """r* of each response; that of the prompt's worst answer if it is no valid one, or was cut."""
    return [listed.get(tokenizer.decode(ids).strip() if ids[-1] == tokenizer.eos_id else None,
                       min(listed.values())) for ids in rollout.response_ids]


def batch_metrics(rollouts: list[Rollout], beta: float, eos_id: int) -> dict[str, float]:
    """What the batch says of the policy that sampled it; means over responses, nats.

    objective/kl is the exact KL of every next token, summed over the response: the same mean as
    TRL's sum of log-ratios, with less noise. objective/rlhf_reward estimates Eq. 3.
    """
    responses = [ids for rollout in rollouts for ids in rollout.response_ids]
    score = sum(sum(rollout.scores) for rollout in rollouts) / len(responses)
    divergence = float(joined(rollouts, "kl").double().sum()) / len(responses)
    return {"objective/scores": score, "objective/kl": divergence,
            "objective/rlhf_reward": score - beta * divergence,
            "policy/entropy": float(joined(rollouts, "entropy").double().mean()),
            "response_length": sum(map(len, responses)) / len(responses),
            "ended_by_eos": sum(ids[-1] == eos_id for ids in responses) / len(responses)}
