"""What each objective wants: its optimum with infinite data, solved without training.

On the world every answer to a prompt is listed, so the expectation of a loss of ulma.py over the
data of datasets.py is a finite sum, and a policy is a point of the simplex: 288 answers and
"off-world", all that is no valid answer. The reference is the habits that the data are drawn from,
which the base model was trained to have; it gives off-world nothing.

With u = log pi, rho = u - log pi_ref and h = beta rho, every loss is convex in u. No response of
the data is off-world, which gets the mass that the answers leave: the constraint is
sum exp(u) <= 1, convex in u too. Hence an optimum is where, with a multiplier lambda >= 0 (0 if some
mass goes off-world),

    dL/du(y) + lambda exp(u(y)) = 0  for every y.

a(y), b(y): mass of an answer with label 1 and with label 0; m = a + b; zbar: its mean label.

    SFT               -a + lambda pi = 0                       pi = a / sum a: imitation
    positive DPO      -a beta sigma(-h) + lambda pi = 0
    pointwise DPO     beta m (sigma(h) - zbar) + lambda pi = 0: sigma(h) = P(z = 1 | y), so h = r*,
                      but for normalisation; with the exact log_z lambda is 0, and pi = pi*
    ULMA              -a + beta b sigma(h) + lambda pi = 0     imitation, less where b is large
    squared error     2 beta m (h - zbar) + lambda pi = 0; ULMA's adds -m on the best label. It
                      depends on beta / scale alone where labels are scaled
    RLHF              pi_ref exp(rhat / beta) / Z; the reward model's optimum rhat is r* + const
                      for Bradley-Terry pairs, log a / b for points, zbar for ratings
    DPO               the policy of RLHF's pairs: pi*, the same for every data with r* + const
    D2O, K = 1        P(anchor y beats negative y') = sigma(log A/b (y) - log A/b (y')), where A is
                      the anchors' distribution: pi = pi_ref (A / b)^(1 / beta) / Z
    D2O, K = inf      sigma(h(y) - c) = S A(y) / b(y), c = sum A h: S from sum A logit(S A / b) = 0
    negative DPO      falls in every rho: all mass goes off-world, loss 0
    unlearning, unlikelihood     linear in u, and falling without bound wherever b > a

Losses of pairs do not change when off-world mass takes an equal share of every answer's: their
optimum is given with the reference's, none. Where an answer is never rejected (golden pairs), the
loss of pairs only approaches its infimum: the limit is given, all mass on that answer.
"""
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from eval import optimum
from ulma import (
    negative_dpo_loss,
    pointwise_dpo_loss,
    pointwise_mse_loss,
    positive_dpo_loss,
    sft_loss,
    ulma_loss,
    ulma_mse_loss,
)
from study.datasets import NEAR_BEST
from study.roots import increasing_root
from world import BAD_VERBS, Prompt, answers, held_out_prompts

SMALLEST_LOGP = -400.0                           # stands for log 0


# ---- data: infinitely many rows -----------------------------------------------------------------

@dataclass(frozen=True)
class Population:
    """All that infinitely many rows of a data set tell about one prompt.

    rewards, harmful  [Y] float64   r*; 1 where harmful
    reference         [Y] float64   log pi_ref, nats
    points            (z [Y], mass [Y]) for each way of labelling an answer; masses sum to 1
    pair_reward       [Y] float64   what a Bradley-Terry model of the pairs is at its optimum (up to
                                    a constant; +inf for an answer that is never rejected); or None
    """
    rewards: Tensor
    harmful: Tensor
    reference: Tensor
    points: tuple[tuple[Tensor, Tensor], ...]
    pair_reward: Tensor | None = None

    def mass(self, label: float) -> Tensor:
        """How much of the data is an answer with this label: [Y]"""
        return sum(mass * (scores == label) for scores, mass in self.points)


def drawn_pairs(habits: Tensor, rewards: Tensor, independent: bool = False) -> Tensor:
    """P(chosen, rejected) of two draws that differ, or are independent: [Y, Y]"""
    joint = habits[:, None] * habits                                             # [Y, Y]
    if not independent:                # the second is drawn again until it differs from the first
        joint = (joint / (1 - habits[:, None])).fill_diagonal_(0)
    return (joint + joint.T) * torch.sigmoid(rewards[:, None] - rewards)


def bradley_terry(wins: Tensor) -> Tensor:
    """Rewards [Y] that make wins [Y, Y] (winner, loser) most likely, by Zermelo's iteration:
    exp(r) = W / sum_j n_j / (exp(r) + exp(r_j)), W the wins of an answer, n its comparisons."""
    compared, strength = wins + wins.T, torch.ones_like(wins[0])
    for _ in range(5000):
        before = strength
        strength = wins.sum(1) / (compared / (strength[:, None] + strength)).sum(1)
        strength = strength / strength.log().mean().exp()
        if (strength / before - 1).abs().max() < 1e-12:
            break
    return strength.log()


def demonstrations(how: str, habits: Tensor, rewards: Tensor) -> Tensor:
    """Probabilities of the chosen answers of datasets.demonstrated: [Y]"""
    if how == "near-best":
        order = rewards.argsort(descending=True, stable=True)
        return torch.zeros_like(habits).index_fill(0, order[:NEAR_BEST], 1 / NEAR_BEST)
    above = rewards[:, None] - rewards                                           # [Y, Y]
    at_most, below = ((above > edge).double() @ habits for edge in (-1e-9, 1e-9))
    return habits * (at_most ** int(how) - below ** int(how)) / (at_most - below)


@cache
def population(data: str, prompt: Prompt, independent: bool = False,
               scale: float = 1) -> Population:
    """The limit of study.datasets.DATASETS[data] for a prompt.

    data          its name; "centred" is red-team with labels scale (z - 1/2)
    independent   whether the two draws of a pair may be equal; the data's differ
    """
    listed = answers(*prompt)
    _, rewards, harmful, habits = (torch.tensor(column, dtype=torch.float64) if number else None
                                   for number, column in enumerate(zip(*listed, strict=True)))
    pairs = drawn_pairs(habits, rewards, independent)
    chosen, rejected = pairs.sum(1), pairs.sum(0)                                # [Y] each
    drawn, ones, best = (chosen + rejected) / 2, torch.ones_like(habits), int(rewards.argmax())
    pair_reward = rewards
    if data.startswith("golden") or data == "negatives":
        rejected[best] = 0                       # such a row is left out
        rejected, golden = rejected / rejected.sum(), torch.zeros_like(habits)
        golden[best] = 1
        pair_reward = torch.where(golden == 1, math.inf, 0.0).double()
        dirty = float(data[7:] or 0) / 100 if data != "negatives" else 0
        chosen = (1 - dirty) * golden + dirty * harmful * habits / (harmful @ habits)
    elif data.startswith("shown-"):
        shown = demonstrations(data[6:], habits, rewards)
        pair_reward = (shown / rejected).log()   # both are drawn on their own: odds of two orders
        chosen, rejected = shown * (1 - rejected), rejected * (1 - shown)
        chosen, rejected = chosen / chosen.sum(), rejected / rejected.sum()
    elif data.startswith("noise-"):
        share = float(data[6:]) / 100
        chosen, rejected = ((1 - share) * first + share * second
                            for first, second in ((chosen, rejected), (rejected, chosen)))
        pair_reward = bradley_terry((1 - share) * pairs + share * pairs.T)
    points = ((ones, chosen / 2), (0 * ones, rejected / 2))
    if data == "negatives":
        points, pair_reward = ((0 * ones, rejected),), None
    elif data == "mixture":
        good, bad = drawn * rewards.sigmoid(), drawn * (-rewards).sigmoid()
        shown = demonstrations("near-best", habits, rewards)
        points, pair_reward = ((ones, (shown + good) / 2), (0 * ones, bad / 2)), None
    elif data.startswith("qa"):
        good, bad = drawn * rewards.sigmoid(), drawn * (-rewards).sigmoid()
        share = float(data[3:]) / 100 if data.startswith("qa-") else float(good.sum())
        points = ((ones, good * share / good.sum()), (0 * ones, bad * (1 - share) / bad.sum()))
        # differing labels in pairs: odds of a pair's two orders are exp(r(y) - r(y')) at any share
    elif data in ("red-team", "centred"):
        ratings = (rewards / 1.5 + 2).round().clamp(0, 4) / 4
        ratings = scale * (ratings - 0.5) if data == "centred" else ratings
        points, pair_reward = ((ratings, drawn),), None
    elif data not in PAIRS:
        raise ValueError(f"no exact limit of data {data!r}")
    return Population(rewards, harmful, habits.log(), points, pair_reward)


# ---- optima -------------------------------------------------------------------------------------

def normalised(logps: Tensor) -> Tensor:
    return logps - logps.logsumexp(-1)


def pointwise_optimum(loss: Callable[[Tensor], Tensor], reference: Tensor) -> Tensor:
    """log pi [Y] that minimises a sum of convex losses of one answer each, where sum pi <= 1.

    loss       log pi [Y] -> its losses [Y], weighted with the data
    reference  [Y] float64   log pi_ref, where the first search starts
    For a given lambda every answer's equation has one root, and the sum of pi falls with lambda:
    a root within a root.
    """
    lowest, highest = (torch.full_like(reference, edge) for edge in (SMALLEST_LOGP, 3.0))

    def equations(logps: Tensor, log_lambda: Tensor) -> tuple[Tensor, Tensor]:
        """dL/du + lambda exp(u), and its derivative by u: [Y] each"""
        logps = logps.detach().requires_grad_()
        total = loss(logps) + (log_lambda + logps).exp()
        slope, = torch.autograd.grad(total.sum(), logps, create_graph=True)
        curvature, = torch.autograd.grad(slope.sum(), logps)
        return slope.detach(), curvature

    def solved(log_lambda: Tensor) -> Tensor:
        nonlocal latest                              # a search starts where the one before ended
        latest = increasing_root(lambda u: equations(u, log_lambda), lowest, highest, latest)
        return latest

    def shortfall(log_lambda: Tensor) -> tuple[Tensor, Tensor]:
        """-log sum pi, and its derivative by log lambda: [1] each"""
        logps = solved(log_lambda)
        falls = (log_lambda + logps).exp() / equations(logps, log_lambda)[1]   # -du / dlog lambda
        slope = logps.softmax(-1) @ falls.nan_to_num()[:, None]
        return -logps.logsumexp(-1, True), slope

    smallest, largest, start = torch.tensor([[-80.0], [12.0], [0.0]], dtype=torch.float64)
    latest = torch.where(equations(lowest, smallest)[0] >= 0, lowest, reference)
    logps = solved(smallest)
    if logps.logsumexp(-1) <= 1e-12:                 # even lambda = 0: the rest leaves
        return logps
    logps = solved(increasing_root(shortfall, smallest, largest, start))
    return logps - logps.logsumexp(-1).clamp(min=0)  # what rounding leaves above 1


def point_loss(given: Population, loss: Callable[..., Tensor],
               label: float | None = None) -> Callable[[Tensor], Tensor]:
    """log pi -> losses of a population's points, or of those with one label.

    loss    (policy_logps, reference_logps, scores) -> losses
    """
    def weighted(logps: Tensor) -> Tensor:
        return sum(mass * (1 if label is None else scores == label)
                   * loss(logps, given.reference, scores.expand_as(logps))
                   for scores, mass in given.points)
    return weighted


def solve_points(given: Population, loss: Callable[..., Tensor],
                 label: float | None = None) -> Tensor:
    """log pi of the optimum of a point-wise loss, on all points or on those with one label: [Y]"""
    return pointwise_optimum(point_loss(given, loss, label), given.reference)


def solve_rlhf(reference: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """log of pi_ref exp(rewards / beta) / Z; all mass on an answer whose reward is infinite: [Y]"""
    infinite = rewards == math.inf
    if infinite.any():
        return torch.where(infinite, 0.0, SMALLEST_LOGP).double()
    return optimum(reference, rewards, beta)[0].clamp(min=SMALLEST_LOGP)


def point_reward(given: Population) -> Tensor:
    """A point-wise reward model's optimum: logit of the mean label; ratings are fitted as they are.
    """
    mass = sum(mass for _, mass in given.points)
    mean = sum(scores * mass for scores, mass in given.points) / mass
    if len(given.points) == 1:
        return mean
    return torch.where(mean == 1, math.inf, torch.logit(mean, eps=1e-170))


def solve_d2o(given: Population, beta: float, anchors: float) -> Tensor | None:
    """log pi of D2O's optimum with 1 or infinitely many anchors of the reference; alpha = beta: [Y]

    None where several answers are never negative: they take all, and how they share is open.
    """
    negatives = given.mass(0)
    never = negatives == 0
    if never.sum() > 1:
        return None
    if never.any():
        return torch.where(never, 0.0, SMALLEST_LOGP).double()
    odds = given.reference - (negatives / negatives.sum()).log()                 # log A / b [Y]
    if anchors == 1:
        return normalised(given.reference + odds / beta)
    weights, gaps = given.reference.exp(), odds - odds.max()

    def implicit(largest: float) -> Tensor:
        """h - c: logit(S A / b), where S is such that the largest is this."""
        ratio = gaps + F.logsigmoid(torch.tensor(largest, dtype=torch.float64))  # log(S A / b)
        return torch.where(gaps > -1e-9, largest, ratio - torch.log(-torch.expm1(ratio)))
    low, high = -100.0, 1e6
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if weights @ implicit(middle) < 0 else (low, middle)
    return normalised(given.reference + implicit(low) / beta)


# ---- all methods --------------------------------------------------------------------------------

def solve_labelled(given: Population, loss: Callable[..., Tensor], beta: float,
                   **settings: float) -> Tensor:
    """The optimum of a loss of all points, as ulma.py writes it."""
    return solve_points(given, lambda logps, reference, scores: loss(
        logps, reference, scores, beta=beta, **settings))


def solve_one_sided(given: Population, loss: Callable[..., Tensor], beta: float,
                    label: float) -> Tensor:
    """The optimum of a loss that reads the answers with one label."""
    return solve_points(given, lambda logps, reference, _: loss(logps, reference, beta=beta), label)


def log_z(given: Population, beta: float) -> float:
    """beta log Z(x) under the true reward."""
    return optimum(given.reference, given.rewards, beta)[1]


NOISY = tuple(f"noise-{percent}" for percent in (10, 20, 30))
PAIRS = ("hh", "golden", "golden-10", "golden-30", "qa", "qa-10", "qa-90",
         *(f"shown-{how}" for how in ("4", "16", "near-best")), *NOISY)
LABELS = (*PAIRS, "mixture", "red-team")         # z in [0, 1], good ones and bad ones
DATA = (*LABELS, "centred", "negatives")
OPTIMA = {       # method: (data it can be trained on, (population, beta) -> log pi [Y] or None)
    "reference": (DATA, lambda given, beta: given.reference),
    "unlearning": ((*LABELS, "negatives"), None),
    "unlikelihood": (LABELS, None),
    "negative_dpo": ((*LABELS, "negatives"), lambda given, beta: solve_one_sided(
        given, negative_dpo_loss, beta, 0)),
    "d2o K=1": ((*LABELS, "negatives"), lambda given, beta: solve_d2o(given, beta, 1)),
    "d2o K=inf": ((*LABELS, "negatives"), lambda given, beta: solve_d2o(given, beta, math.inf)),
    "positive_dpo": (LABELS, lambda given, beta: solve_one_sided(
        given, positive_dpo_loss, beta, 1)),
    "sft": (LABELS, lambda given, beta: solve_points(
        given, lambda logps, reference, scores: sft_loss(logps), 1)),
    "ulma": (LABELS, lambda given, beta: solve_labelled(given, ulma_loss, beta)),
    "pointwise_dpo": (LABELS, lambda given, beta: solve_labelled(given, pointwise_dpo_loss, beta)),
    "pointwise_dpo_exact_z": (("qa",), lambda given, beta: solve_labelled(
        given, pointwise_dpo_loss, beta, log_z=log_z(given, beta))),
    "ulma_mse": (("red-team", "centred"), lambda given, beta: solve_labelled(
        given, ulma_mse_loss, beta, best_score=float(given.points[0][0].max()))),
    "pointwise_mse": (("red-team", "centred"), lambda given, beta: solve_labelled(
        given, pointwise_mse_loss, beta)),
    "pointwise_rlhf": ((*LABELS, "centred"), lambda given, beta: solve_rlhf(
        given.reference, point_reward(given), beta)),
    "dpo": (PAIRS, lambda given, beta: solve_rlhf(given.reference, given.pair_reward, beta)),
    "rlhf": (PAIRS, lambda given, beta: solve_rlhf(given.reference, given.pair_reward, beta)),
    "pi*": (DATA, lambda given, beta: optimum(given.reference, given.rewards, beta)[0]),
}


def solve(given: Population, method: str, beta: float) -> Tensor | None:
    """log pi of the optimum, log-probs of the answers, what they leave being off-world: [Y]

    None where there is no optimum.
    """
    _, function = OPTIMA[method]
    return function(given, beta) if function else None


def score(given: Population, logps: Tensor) -> dict[str, float]:
    """E[r], harmful, off-world, KL(pi||ref) of a policy [Y]; as eval.world_scores counts them."""
    policy = logps.exp()
    off_world = max(0.0, float(1 - policy.sum()))
    divergence = float((policy * (logps - given.reference)).sum())
    reference_rest = max(0.0, float(1 - given.reference.exp().sum()))
    if off_world > 1e-9:
        divergence += off_world * math.log(off_world / reference_rest) if (
            reference_rest > 1e-9) else math.inf
    return {"E[r]": float(policy @ given.rewards + off_world * given.rewards.min()),
            "harmful": float(policy @ given.harmful), "off-world": off_world,
            "KL(pi||ref)": divergence}


# ---- means over the test prompts ----------------------------------------------------------------

@cache
def mean_optimum(data: str, method: str, beta: float = 0.5, scale: float = 1,
                 independent: bool = False, after: str | None = None) -> dict[str, float] | None:
    """Scores of a method's optimum, mean over the test prompts; None where it has none.

    after   a method whose optimum is the reference of this one, as after SFT
    """
    if data not in OPTIMA[method][0]:
        raise ValueError(f"{method} has no optimum on {data}: it cannot be trained on it")
    test, scores = held_out_prompts(), []
    for harmful in (False, True):
        same = [prompt for prompt in test if (prompt[0] in BAD_VERBS) == harmful]
        given = population(data, same[0], independent=independent, scale=scale)
        first = replace(given, reference=solve(given, after, beta)) if after else given
        logps = solve(first, method, beta)
        if logps is None:
            return None
        scores.append((len(same) / len(test), score(given, logps)))
    return {key: sum(share * row[key] for share, row in scores) for key in scores[0][1]}


@cache
def ceiling(divergence: float) -> float:
    """E[r] of pi* at the beta whose mean KL(pi||ref) is this one: the most that any policy earns."""
    low, high = 1e-3, 1e5                                        # of beta: KL falls with it
    for _ in range(50):
        beta = (low * high) ** 0.5
        row = mean_optimum("hh", "pi*", beta)
        low, high = (beta, high) if row["KL(pi||ref)"] > divergence else (low, beta)
    return row["E[r]"]
