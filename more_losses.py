"""What others have proposed beside DPO: pure functions of log-probs, to compare with ulma.py.

Names, shapes and units are those of ulma.py: log-probs of whole responses in nats, one loss per
pair [P] or per response [R] out. ρ = log π - log π_ref. Some of these objectives are written with
length averages, `mean_logps` (ulma.response_logps with mean=True); they say so.
"""
import torch
import torch.nn.functional as F
from torch import Tensor


# ---- pairs --------------------------------------------------------------------------------------

def ipo_loss(policy_chosen_logps: Tensor, policy_rejected_logps: Tensor,
             reference_chosen_logps: Tensor, reference_rejected_logps: Tensor,
             tau: float) -> Tensor:
    """(ρ(chosen) - ρ(rejected) - 1 / (2 tau))²: a margin to reach, not one to grow without end.

    policy_chosen_logps, …  [P] float   nats
    tau                     KL strength
    returns                 [P] float   squared error per pair
    Source: IPO, arXiv:2310.12036, Eq. 17.
    Differs: TRL passes length averages, as its authors were told by IPO's; the paper writes sums.
    """
    chosen_logratios = policy_chosen_logps - reference_chosen_logps              # [P]
    rejected_logratios = policy_rejected_logps - reference_rejected_logps        # [P]
    return (chosen_logratios - rejected_logratios - 1 / (2 * tau)) ** 2


def nca_loss(policy_chosen_logps: Tensor, policy_rejected_logps: Tensor,
             reference_chosen_logps: Tensor, reference_rejected_logps: Tensor,
             beta: float) -> Tensor:
    """-log σ(a) - ½ log σ(-a) - ½ log σ(-b),  a = beta ρ(chosen), b = beta ρ(rejected).

    policy_chosen_logps, …  [P] float   nats
    beta                    KL strength
    returns                 [P] float   loss per pair, nats; least at a = ln 2, b -> -∞
    Source: NCA, arXiv:2402.05369, for pairs (TRL's nca_pair).
    Note: unlike DPO's it holds the chosen response's likelihood, not only the difference.
    """
    chosen_rewards = beta * (policy_chosen_logps - reference_chosen_logps)       # [P]
    rejected_rewards = beta * (policy_rejected_logps - reference_rejected_logps)
    return -(F.logsigmoid(chosen_rewards) + 0.5 * F.logsigmoid(-chosen_rewards)
             + 0.5 * F.logsigmoid(-rejected_rewards))


def cpo_loss(policy_chosen_logps: Tensor, policy_rejected_logps: Tensor, beta: float,
             alpha: float = 1.0) -> Tensor:
    """-log σ(beta (log π(chosen) - log π(rejected))) - alpha log π(chosen): no reference.

    policy_chosen_logps, …  [P] float   nats
    alpha                   weight of SFT on the chosen response
    returns                 [P] float   loss per pair, nats
    Source: CPO, arXiv:2401.08417; Eq. 3 is the first term.
    Differs: TRL's second term is the mean per token over the whole batch.
    """
    margins = beta * (policy_chosen_logps - policy_rejected_logps)               # [P]
    return -F.logsigmoid(margins) - alpha * policy_chosen_logps


def simpo_loss(chosen_mean_logps: Tensor, rejected_mean_logps: Tensor, beta: float,
               gamma: float) -> Tensor:
    """-log σ(beta (m(chosen) - m(rejected)) - gamma),  m = log π / length: no reference.

    chosen_mean_logps, …  [P] float   length averages, nats per token
    beta, gamma           scale (2 or more, since m is small) and margin
    returns               [P] float   loss per pair, nats
    Source: SimPO, arXiv:2405.14734.
    """
    return -F.logsigmoid(beta * (chosen_mean_logps - rejected_mean_logps) - gamma)


def log_odds(mean_logps: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = e^m: [P] m <= 0, nats per token -> [P]; finite up to m = 0.

    Note: log1p(-e^m), the usual remedy where e^m is small, adds nothing to m - log(1 - e^m): what
    it saves is below the last bit of m. The clamp stands for p = 1, whose odds are infinite.
    """
    m = mean_logps.clamp(max=-1e-6)
    return m - torch.log(-torch.expm1(m))


def orpo_loss(chosen_mean_logps: Tensor, rejected_mean_logps: Tensor, weight: float) -> Tensor:
    """-m(chosen) - weight log σ(log odds(chosen) - log odds(rejected)): no reference, no SFT stage.

    chosen_mean_logps, …  [P] float   m = log π / length <= 0, nats per token; odds are of e^m
    weight                lambda, of the preference
    returns               [P] float   loss per pair, nats
    Source: ORPO, arXiv:2403.07691, Eq. 4 and 7.
    Differs: TRL's first term is over prompt and response, and the mean over the batch's tokens.
    """
    margins = log_odds(chosen_mean_logps) - log_odds(rejected_mean_logps)        # [P]
    return -chosen_mean_logps - weight * F.logsigmoid(margins)


# ---- single responses ---------------------------------------------------------------------------

def kto_reference_point(policy_mismatched_logps: Tensor,
                        reference_mismatched_logps: Tensor) -> Tensor:
    """z0 = max(0, mean ρ(y' | x)), a biased estimate of KL(π || π_ref): [M], [M] -> [] detached.

    M responses y' that belong to other prompts than x. With several ranks: the mean over all, then
    the maximum.
    Source: KTO, arXiv:2402.01306.
    """
    logratios = policy_mismatched_logps - reference_mismatched_logps             # [M]
    return logratios.mean().clamp(min=0).detach()


def kto_loss(policy_logps: Tensor, reference_logps: Tensor, scores: Tensor,
             reference_point: Tensor | float, beta: float, positive_weight: float = 1.0,
             negative_weight: float = 1.0) -> Tensor:
    """λ₊ z σ(beta (z0 - ρ)) + λ₋ (1 - z) σ(beta (ρ - z0)): bounded, so outliers count for little.

    policy_logps, reference_logps     [R] float   nats
    scores                            [R] float   z, 1 or 0
    reference_point                   []          z0, a constant (`kto_reference_point`)
    positive_weight, negative_weight  λ₊, λ₋
    returns                           [R] float   loss per response, in [0, λ]
    Source: KTO, arXiv:2402.01306; the labels' weights are its λ_D and λ_U.
    """
    margins = beta * (policy_logps - reference_logps - reference_point)          # [R]
    return (positive_weight * scores * torch.sigmoid(-margins)
            + negative_weight * (1 - scores) * torch.sigmoid(margins))


def bco_loss(policy_logps: Tensor, reference_logps: Tensor, scores: Tensor, delta: float,
             beta: float) -> Tensor:
    """-[z log σ(beta ρ - delta) + (1 - z) log σ(delta - beta ρ)].

    policy_logps, reference_logps  [R] float   nats
    scores                         [R] float   z, 1 or 0
    delta                          running mean of beta ρ over all responses; a constant
    returns                        [R] float   loss per response, nats
    Source: BCO, arXiv:2404.04656.
    Note: point-wise DPO with log_z = -delta: an estimate of what ULMA sets to 0.
    """
    reward_logits = beta * (policy_logps - reference_logps) - delta              # [R]
    return -(scores * F.logsigmoid(reward_logits) + (1 - scores) * F.logsigmoid(-reward_logits))


def npo_loss(policy_logps: Tensor, reference_logps: Tensor, beta: float) -> Tensor:
    """-(2 / beta) log σ(-beta ρ): unlearning that fades as the response becomes unlikely.

    policy_logps, reference_logps  [R] float   bad responses only, nats
    returns                        [R] float   loss per response, nats; bounded below by 0
    Source: NPO, arXiv:2404.05868, Eq. 3. It is 2/beta times `negative_dpo_loss`.
    """
    return -2 / beta * F.logsigmoid(-beta * (policy_logps - reference_logps))    # [R]
