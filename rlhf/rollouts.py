"""What PPO learns from: responses sampled from the policy, and what was computed for every token.

    prompts -> sampled responses -> one pass without gradients -> rollouts, known to every rank
"""
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from generate import Sampling, cache_slots, generate
from kernels.attention import to_device
from lora import lora_disabled
from model import Llama
from packing import Stream, Tree, build_stream, pack
from step import Compute, feed_last_tokens, scored_hidden, stream_rewards
from tokenizer import Tokenizer
from training.ranks import Ranks, gather
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


def joined(rollouts: list[Rollout], name: str, device: torch.device | str = "cpu") -> Tensor:
    """One field of all rollouts, end to end: [N]."""
    return to_device(torch.cat([getattr(rollout, name) for rollout in rollouts]), device)


def sample_responses(policy: Llama, prompt_ids: list[list[int]], seeds: list[int],
                     sampling: Sampling, ranks: Ranks) -> list[Tree]:
    """Sampled responses to this rank's share of the prompts: numbers rank, rank + world_size, …

    seeds    K for every prompt: it gets K responses, which share its tokens in one tree
    As many rows at a time as `generate.cache_slots` has room for; a row's text depends on its seed.
    """
    count, numbers = len(seeds) // len(prompt_ids), range(ranks.rank, len(prompt_ids),
                                                          ranks.world_size)
    rows = [number * count + k for number in numbers for k in range(count)]
    longest = max(map(len, prompt_ids)) + sampling.max_new_tokens
    at_a_time, sampled = max(1, cache_slots(policy, longest * len(seeds)) // longest), []
    for first in range(0, len(rows), at_a_time):
        some = rows[first:first + at_a_time]
        sampled += generate(policy, [prompt_ids[row // count] for row in some], **vars(sampling),
                            generator=[seeds[row] for row in some])
    return [Tree(prompt_ids[number], sampled[i * count:(i + 1) * count], [0.0] * count, [])
            for i, number in enumerate(numbers)]


def token_values(value: Llama, stream: Stream) -> Tensor:
    """V(x, y_<t) before every scored token of a stream: [N] float32."""
    hidden = scored_hidden(value, stream)                                        # [N, D]
    return hidden.to(value.score.weight.dtype) @ value.score.weight[0]


@torch.no_grad()
def score_responses(policy: Llama, value: Llama, reward_model: Llama, trees: list[Tree],
                    eos_ids: Collection[int], missing_eos_penalty: float,
                    compute: Compute) -> list[Rollout]:
    """The rollouts of sampled trees: log-probs, values and rewards of all of them.

    missing_eos_penalty   taken off the reward of a response that was cut: it does not end in EOS
    """
    rollouts, layout = [], {"device": compute.device, "attention": compute.attention}
    for group in pack(trees, compute.micro_tokens):
        stream = build_stream(group, **layout)
        hidden = scored_hidden(policy, stream)                                   # [N, D]
        with lora_disabled(policy) as reference:
            reference_hidden = scored_hidden(reference, stream)                  # [N, D]
        logps = compute.linear_logps(                                            # [N] each
            hidden, reference_hidden, policy.lm_head.weight, stream.labels, stream.labels,
            entropy=True, kl=True)
        rewards = stream_rewards(reward_model, build_stream(feed_last_tokens(group), **layout))
        lengths = [sum(map(len, tree.response_ids)) for tree in group]
        columns = {"per_token_logps": logps.policy_logps,
                   "reference_per_token_logps": logps.reference_logps,
                   "entropy": logps.entropy, "kl": logps.kl, "values": token_values(value, stream)}
        columns = {name: column.cpu().split(lengths) for name, column in columns.items()}
        rewards = rewards.cpu().split([len(tree.response_ids) for tree in group])
        for i, tree in enumerate(group):
            scores = [reward - missing_eos_penalty * (ids[-1] not in eos_ids)
                      for reward, ids in zip(rewards[i].tolist(), tree.response_ids)]
            rollouts.append(Rollout(
                prompt_ids=tree.prompt_ids, response_ids=tree.response_ids, scores=scores, pairs=[],
                **{name: column[i] for name, column in columns.items()}))
    return rollouts


def exchange(rollouts: list[Rollout], world_size: int) -> list[Rollout]:
    """Every rank's rollouts, in the order of the batch, on every rank."""
    shares = gather(rollouts)
    return [shares[i % world_size][i // world_size] for i in range(sum(map(len, shares)))]


# ---- metrics of a batch -------------------------------------------------------------------------

def world_rewards() -> dict[tuple, dict[str, float]]:
    """{prompt: {answer: r*}} of the embedded world."""
    return {(("Human", question(*prompt)),): {text: reward for text, reward, *_ in answers(*prompt)}
            for prompt in prompts()}


def true_rewards(rollout: Rollout, listed: dict[str, float], tokenizer: Tokenizer) -> list[float]:
    """r* of each response; the prompt's worst one if it is no valid answer, or was cut."""
    return [listed.get(tokenizer.decode(ids).strip() if ids[-1] in tokenizer.eos_ids else None,
                       min(listed.values())) for ids in rollout.response_ids]


def batch_metrics(rollouts: list[Rollout], beta: float,
                  eos_ids: Collection[int]) -> dict[str, float]:
    """Metrics of the policy that sampled the batch: means over responses, of entropy over tokens;
    nats.

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
            "ended_by_eos": sum(ids[-1] in eos_ids for ids in responses) / len(responses)}
