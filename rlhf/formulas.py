"""PPO's formulas, on N tokens of R responses end to end, the tokens of a response together."""
import torch
from torch import Tensor


def kl_penalised_rewards(per_token_logps: Tensor, reference_per_token_logps: Tensor,
                         response_ids: Tensor, scores: Tensor, beta: float) -> Tensor:
    """r_t = -beta (log π - log π_ref)(y_t | x, y_<t), and r_φ(x, y) on top at the last token.

    per_token_logps            [N] float   of sampled tokens under the policy, nats
    reference_per_token_logps  [N] float
    response_ids               [N] int64   0 0 0 1 1 …: whose token; every response has one
    scores                     [R] float   r_φ(x, y)
    returns                    [N] float   sums to r_φ - beta (log π - log π_ref)(y | x), Eq. 3
    The difference of log-probs is the k1 estimate of the KL: unbiased, and negative at times.
    """
    rewards = -beta * (per_token_logps - reference_per_token_logps)              # [N]
    last = response_ids.bincount(minlength=len(scores)).cumsum(0) - 1            # [R]
    return rewards.index_add(0, last, scores)


def gae(rewards: Tensor, values: Tensor, response_ids: Tensor, gamma: float, lam: float) -> Tensor:
    """A_t = δ_t + γλ A_{t+1},  δ_t = r_t + γ V_{t+1} - V_t; A and V are 0 past the last token.

    rewards, values  [N] float   V_t is the value before token t is known
    response_ids     [N] int64   0 0 0 1 1 …
    returns          [N] float   advantages; A + V are the returns a value function learns
    Source: Generalized Advantage Estimation, arXiv:1506.02438, Eq. 16.
    """
    advantages, next_advantage, next_value, current = [], 0.0, 0.0, None
    for reward, value, response in reversed(list(zip(
            rewards.tolist(), values.tolist(), response_ids.tolist()))):
        if response != current:
            next_advantage, next_value, current = 0.0, 0.0, response
        next_advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
        next_value = value
        advantages.append(next_advantage)
    return values.new_tensor(advantages[::-1])


def whiten(values: Tensor) -> Tensor:
    """(v - mean) / standard deviation: [N] -> [N]. Of a whole batch, never of one rank's share.

    One value has no deviation: it becomes 0, as equal values do.
    """
    if len(values) < 2:
        return torch.zeros_like(values)
    return (values - values.mean()) / (values.var() + 1e-8).sqrt()    # 1e-8: all may be equal


def clipped_policy_loss(per_token_logps: Tensor, old_per_token_logps: Tensor, advantages: Tensor,
                        cliprange: float) -> Tensor:
    """max(-A q, -A clip(q, 1 - c, 1 + c)),  q = π(y_t) / π_old(y_t).

    per_token_logps      [N] float   of sampled tokens, now
    old_per_token_logps  [N] float   when they were sampled; constant, as is A
    advantages           [N] float
    returns              [N] float   loss per token
    Source: PPO, arXiv:1707.06347, Eq. 7, negated.
    """
    ratio = (per_token_logps - old_per_token_logps).exp()                        # [N]
    return torch.maximum(-advantages * ratio,
                         -advantages * ratio.clamp(1 - cliprange, 1 + cliprange))


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor,
                       cliprange_value: float) -> Tensor:
    """max((V - R)², (clip(V, V_old - c, V_old + c) - R)²) / 2: [N] each -> [N].

    Source: TRL's PPO (trl/experimental/ppo, removed before 1.16).
    """
    clipped = values.clamp(old_values - cliprange_value, old_values + cliprange_value)     # [N]
    return 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())
