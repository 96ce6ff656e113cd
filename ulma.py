"""The objectives of ULMA and its baselines: pure functions of log-probs, one per method.

Read this file first. Every function takes log-probabilities of whole responses (sums over the
response's tokens, in nats, float32) and returns `losses`, one per response or pair; the caller
reduces them. Reward models get `rewards` instead. ρ stands for log π - log π_ref.
Symbols, for a prompt x, a response y and its human score z in [0, 1]:

    log π(y | x)     policy_logps       what the model under training gives the response
    log π_ref(y | x) reference_logps    the same under the frozen reference; a constant
    h                reward_logits      beta (log π - log π_ref) + log_z: the implicit reward, Eq. 4
    log_z            beta log Z(x); 0 is the papers' Z(x) = 1 (`constant_zx` in the authors' code)

Z(x) does not cancel in a point-wise loss as it does in DPO: a wrong constant shifts the optimum
(tests/test_ulma.py shows by how much). Sources: "Eq. n" is ULMA's ICLR 2024 submission,
arXiv:2312.02554. Where the paper's print is wrong, the function says so under `Differs:`.
"""
import torch
import torch.nn.functional as F
from torch import Tensor


def sft_loss(policy_logps: Tensor) -> Tensor:
    """-log π(y | x): supervised fine-tuning on demonstrations (positives only).

    policy_logps  [R] float   Σ_t log π(y_t | x, y_<t), nats
    returns       [R] float   loss per response, nats
    Source: section 3.1.
    """
    return -policy_logps


def unlearning_loss(policy_logps: Tensor) -> Tensor:
    """+log π(y | x): gradient ascent on the negative log-likelihood of negatives.

    policy_logps  [R] float   log-probs of bad responses, nats
    returns       [R] float   loss per response, nats; unbounded below: stop early
    Source: section 3.1 (Nguyen et al. 2022).
    """
    return policy_logps


def unlikelihood_loss(policy_logps: Tensor, scores: Tensor, alpha: float = 1.0) -> Tensor:
    """-z log π + alpha (1 - z) log π: raise the likelihood of positives, lower that of negatives.

    policy_logps  [R] float   nats
    scores        [R] float   z in [0, 1]
    alpha         weight of the negatives, in [0, 1]
    returns       [R] float   loss per response, nats; unbounded below
    Source: section 5.1 (Rafailov et al. 2023); alpha = 1 in the authors' code.
    Differs: Welleck et al. 2019, who named it, use -Σ_t log(1 - π(y_t)), another (bounded) loss.
    """
    return (alpha * (1 - scores) - scores) * policy_logps


def dpo_loss(policy_chosen_logps: Tensor, policy_rejected_logps: Tensor,
             reference_chosen_logps: Tensor, reference_rejected_logps: Tensor,
             beta: float) -> Tensor:
    """-log σ(beta [(log π - log π_ref)(chosen) - (log π - log π_ref)(rejected)]).

    policy_chosen_logps, …  [P] float   log-probs of the two responses of each pair, nats
    beta                    KL strength
    returns                 [P] float   loss per pair, nats; Z(x) cancels
    Source: Eq. 5 (Rafailov et al. 2023, Eq. 7).
    """
    chosen_logratios = policy_chosen_logps - reference_chosen_logps              # [P]
    rejected_logratios = policy_rejected_logps - reference_rejected_logps        # [P]
    return -F.logsigmoid(beta * (chosen_logratios - rejected_logratios))         # [P]


def pointwise_dpo_loss(policy_logps: Tensor, reference_logps: Tensor, scores: Tensor,
                       beta: float, log_z: float = 0.0) -> Tensor:
    """-[z log σ(h) + (1 - z) log σ(-h)],  h = beta (log π - log π_ref) + log_z.

    policy_logps     [R] float   nats
    reference_logps  [R] float   the same under the frozen model; constant
    scores           [R] float   z in [0, 1]
    returns          [R] float   loss per response, nats
    Source: Eq. 8. Its gradient in h is σ(h) - z.
    Differs: Eq. 7 prints σ(1 - r) for 1 - σ(r), and section 4.3 swaps the two gradient weights;
    the authors' trainer passes length averages (`--reduction tokens`).
    Note: BCO, arXiv:2404.04656, is this with log_z = -(running mean of beta (log π - log π_ref)).
    """
    reward_logits = beta * (policy_logps - reference_logps) + log_z              # [R]
    return -(scores * F.logsigmoid(reward_logits) + (1 - scores) * F.logsigmoid(-reward_logits))


def pointwise_mse_loss(policy_logps: Tensor, reference_logps: Tensor, scores: Tensor,
                       beta: float, log_z: float = 0.0) -> Tensor:
    """(z - h)²,  h = beta (log π - log π_ref) + log_z: point-wise DPO for continuous labels.

    policy_logps     [R] float   nats
    reference_logps  [R] float   constant
    scores           [R] float   z on the reward's own scale, higher = better
    returns          [R] float   squared error per response
    Source: Eq. 9 with Eq. 4.
    """
    reward_logits = beta * (policy_logps - reference_logps) + log_z              # [R]
    return (scores - reward_logits) ** 2


def ulma_loss(policy_logps: Tensor, reference_logps: Tensor, scores: Tensor,
              beta: float, log_z: float = 0.0) -> Tensor:
    """-z log π - (1 - z) log σ(-h): SFT on positives, point-wise DPO on negatives.

    policy_logps     [R] float   nats
    reference_logps  [R] float   constant; ignored where z = 1 (any finite value will do)
    scores           [R] float   z in [0, 1]
    returns          [R] float   loss per response, nats
    Source: the ULMA objective, section 4.3 (unnumbered; it lacks a closing parenthesis).
    Note: a positive's gradient weight is 1, a negative's at most beta.
    """
    reward_logits = beta * (policy_logps - reference_logps) + log_z              # [R]
    return -scores * policy_logps - (1 - scores) * F.logsigmoid(-reward_logits)  # [R]


def ulma_mse_loss(policy_logps: Tensor, reference_logps: Tensor, scores: Tensor,
                  beta: float, log_z: float = 0.0, best_score: float = 1.0,
                  mse_on_best: bool = True) -> Tensor:
    """1[z = best] (-log π) + (z - h)²: ULMA for continuous labels; the best are demonstrations.

    policy_logps     [R] float   nats
    reference_logps  [R] float   constant
    scores           [R] float   z, higher = better
    best_score       responses with this score are treated as demonstrations too
    mse_on_best      False leaves them out of the regression, as the authors' code does
    returns          [R] float   loss per response
    Source: section 4.3, "Handling Continuous Labels".
    Differs: the authors' code has the squared error on z != best only; the paper on all.
    """
    is_best = (scores == best_score).to(policy_logps.dtype)                      # [R]
    reward_logits = beta * (policy_logps - reference_logps) + log_z              # [R]
    squared_error = (scores - reward_logits) ** 2                                # [R]
    if not mse_on_best:
        squared_error = (1 - is_best) * squared_error
    return -is_best * policy_logps + squared_error


def positive_dpo_loss(policy_logps: Tensor, reference_logps: Tensor, beta: float,
                      log_z: float = 0.0) -> Tensor:
    """-log σ(h): the positive half of point-wise DPO (ablation against SFT).

    policy_logps, reference_logps  [R] float   good responses only, nats
    returns                        [R] float   loss per response, nats
    Source: section 5.3, Table 3.
    """
    return -F.logsigmoid(beta * (policy_logps - reference_logps) + log_z)        # [R]


def negative_dpo_loss(policy_logps: Tensor, reference_logps: Tensor, beta: float,
                      log_z: float = 0.0) -> Tensor:
    """-log σ(-h): the negative half of point-wise DPO and of ULMA (ablation against unlearning).

    policy_logps, reference_logps  [R] float   bad responses only, nats
    returns                        [R] float   loss per response, nats; bounded below by 0
    Source: section 5.3, Table 3. NPO (arXiv:2404.05868) is 2/beta times this.
    """
    return -F.logsigmoid(-(beta * (policy_logps - reference_logps) + log_z))     # [R]


def d2o_loss(policy_anchor_logps: Tensor, policy_negative_logps: Tensor,
             reference_minus_anchor_logps: Tensor, reference_plus_negative_logps: Tensor,
             beta: float, alpha: float) -> Tensor:
    """-log σ((beta / K) Σ_k log π/π_r-(y_k) - alpha log π/π_r+(y_l)): no human positives.

    policy_anchor_logps            [P, K] float   K self-generated responses y_k per prompt, nats
    policy_negative_logps          [P] float      the response y_l that humans marked as bad
    reference_minus_anchor_logps   [P, K] float   y_k under π_r-, the more harmful reference
    reference_plus_negative_logps  [P] float      y_l under π_r+, the more helpful one
    beta, alpha                    weights of the anchors' mean log-ratio and of the negative's
    returns                        [P] float      loss per prompt, nats
    Source: D2O, arXiv:2403.03419v2, Eq. 3; its gradient is Eq. 4. There K = 11, alpha = beta = 0.1
    and both references are the model before training.
    Note: references only shift the argument of σ. Anchors sampled from the policy of the same step
    carry no signal: over y ~ π the mean of grad log π(y) is 0.
    """
    anchor_logratios = (policy_anchor_logps - reference_minus_anchor_logps).mean(-1)     # [P]
    negative_logratios = policy_negative_logps - reference_plus_negative_logps   # [P]
    # beta A - alpha N, written so that K = 1 and alpha = beta give dpo_loss to the bit
    reward_logits = (beta * (anchor_logratios - negative_logratios)
                     + (beta - alpha) * negative_logratios)                      # [P]
    return -F.logsigmoid(reward_logits)                                          # [P]


# ---- rivals of the papers' objectives ----------------------------------------------------------

def ipo_loss(policy_chosen_logps: Tensor, policy_rejected_logps: Tensor,
             reference_chosen_logps: Tensor, reference_rejected_logps: Tensor,
             tau: float) -> Tensor:
    """(ρ(chosen) - ρ(rejected) - 1 / (2 tau))², ρ = log π - log π_ref: a margin to reach, not one
    to grow without end.

    policy_chosen_logps, …  [P] float   nats
    tau                     KL strength
    returns                 [P] float   squared error per pair
    Source: IPO, arXiv:2310.12036, Eq. 17.
    Differs: TRL passes length averages, on the advice of IPO's authors; the paper writes sums.
    """
    chosen_logratios = policy_chosen_logps - reference_chosen_logps              # [P]
    rejected_logratios = policy_rejected_logps - reference_rejected_logps        # [P]
    return (chosen_logratios - rejected_logratios - 1 / (2 * tau)) ** 2


def simpo_loss(chosen_mean_logps: Tensor, rejected_mean_logps: Tensor, beta: float,
               gamma: float) -> Tensor:
    """-log σ(beta (m(chosen) - m(rejected)) - gamma),  m = log π / length: no reference.

    chosen_mean_logps, …  [P] float   length averages, nats per token
    beta, gamma           scale (2 or more, since m is small) and margin
    returns               [P] float   loss per pair, nats
    Source: SimPO, arXiv:2405.14734.
    """
    return -F.logsigmoid(beta * (chosen_mean_logps - rejected_mean_logps) - gamma)


def kto_loss(policy_logps: Tensor, reference_logps: Tensor, scores: Tensor, beta: float,
             log_z: float = 0.0) -> Tensor:
    """z σ(-h) + (1 - z) σ(h),  h = beta (log π - log π_ref) + log_z: outliers count for little.

    policy_logps     [R] float   nats
    reference_logps  [R] float   constant
    scores           [R] float   z, 1 or 0
    log_z            -beta z0; z0, a constant, estimates KL(π || π_ref) as the mean log-ratio of
                     responses under prompts they do not belong to, at least 0 (training/log_z.py)
    returns          [R] float   loss per response, in [0, 1]
    Source: KTO, arXiv:2402.01306; its weights of the two labels multiply these losses, in the
    ratio that balances them with `--reduction class`.
    """
    reward_logits = beta * (policy_logps - reference_logps) + log_z              # [R]
    return scores * torch.sigmoid(-reward_logits) + (1 - scores) * torch.sigmoid(reward_logits)


# ---- reward models -------------------------------------------------------------------------------

def reward_model_loss(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """-log σ(r(chosen) - r(rejected)): the reward model of Bradley and Terry, from pairs.

    chosen_rewards, rejected_rewards  [P] float   r(x, y), log-odds; defined up to a constant per x
    returns                           [P] float   loss per pair, nats
    Source: Eq. 2.
    Differs: the authors' code averages this over all tokens from the first that differs.
    """
    return -F.logsigmoid(chosen_rewards - rejected_rewards)                      # [P]


def pointwise_reward_model_loss(rewards: Tensor, scores: Tensor) -> Tensor:
    """-[z log σ(r) + (1 - z) log σ(-r)]: the reward model of point-wise scores.

    rewards  [R] float   r(x, y), log-odds of a good answer: P(z = 1 | x, y) = σ(r), Eq. 6
    scores   [R] float   z in [0, 1]
    returns  [R] float   loss per response, nats; gradient in r is σ(r) - z
    Source: Eq. 7.
    Differs: Eq. 7 prints log σ(1 - r) for log(1 - σ(r)), see `pointwise_dpo_loss`.
    """
    return -(scores * F.logsigmoid(rewards) + (1 - scores) * F.logsigmoid(-rewards))


def mse_reward_model_loss(rewards: Tensor, scores: Tensor) -> Tensor:
    """(z - r)²: the reward model of continuous scores.

    rewards  [R] float   r(x, y), on the scale of the scores
    scores   [R] float   z, higher = better
    returns  [R] float   squared error per response
    Source: Eq. 9.
    """
    return (scores - rewards) ** 2


# ---- tokens -> responses -------------------------------------------------------------------------

def response_logps(per_token_logps: Tensor, response_ids: Tensor, num_responses: int,
                   mean: bool = False) -> Tensor:
    """Σ_t log π(y_t | x, y_<t) of every response; with `mean` divided by its number of tokens.

    per_token_logps  [N] float   scored positions of a stream, nats
    response_ids     [N] int64   whose token it is, in [0, num_responses)
    returns          [R] float   0 for a response without scored positions
    Differs: the papers write sums; the authors' code averages in all but DPO (mean=True).
    """
    zeros = per_token_logps.new_zeros(num_responses)
    sums = zeros.index_add(0, response_ids, per_token_logps)                     # [R]
    if not mean:
        return sums
    lengths = zeros.index_add(0, response_ids, torch.ones_like(per_token_logps))
    return sums / lengths.clamp(min=1)     # a response without positions keeps its 0
