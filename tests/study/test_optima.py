"""study/optima.py: optima against an optimiser, rivals, and numbers found by other means."""
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from study.datasets import DATASETS
from study.optima import (
    OPTIMA,
    Population,
    bradley_terry,
    demonstrations,
    drawn_pairs,
    point_loss,
    population,
    solve,
    mean_optimum,
)
from study.roots import increasing_root
from ulma import (
    d2o_loss,
    dpo_loss,
    negative_dpo_loss,
    pointwise_dpo_loss,
    pointwise_mse_loss,
    pointwise_reward_model_loss,
    positive_dpo_loss,
    sft_loss,
    ulma_loss,
    ulma_mse_loss,
    unlearning_loss,
    unlikelihood_loss,
)
from world import BAD_VERBS, answers, question, training_prompts

HARMLESS, HARMFUL = ("paint", "a door"), ("steal", "a car")


def pair_loss(given: Population, wins: Tensor, beta: float):
    """log pi -> expectation of dpo_loss over pairs."""
    def mean(logps: Tensor) -> Tensor:
        size = len(logps)
        chosen, rejected = (logps[:, None].expand(size, size), logps[None].expand(size, size))
        reference = given.reference.expand(size, size)
        return (wins * dpo_loss(chosen, rejected, reference.T, reference, beta)).sum()
    return mean


def anchor_loss(given: Population, beta: float, many: bool):
    """log pi -> expectation of d2o_loss, over one anchor of the reference, or their mean."""
    weights, negatives = given.reference.exp(), given.mass(0) / given.mass(0).sum()

    def mean(logps: Tensor) -> Tensor:
        if many:          # the mean log-ratio of the anchors is its expectation
            ratio = (weights @ (logps - given.reference)).expand(len(logps), 1)
            return negatives @ d2o_loss(ratio, logps, 0 * ratio, given.reference, beta, beta)
        losses = d2o_loss(logps[:, None, None].expand(-1, len(logps), 1), logps,
                          given.reference[:, None, None], given.reference, beta, beta)
        return weights @ losses @ negatives
    return mean


def objective(given: Population, method: str, beta: float, wins: Tensor):
    """log pi of the answers -> the loss that `solve` is to have minimised, by ulma.py."""
    def of_points(loss, label=None, **settings):
        weighted = point_loss(given, lambda u, ref, z: loss(u, ref, z, **settings), label)
        return lambda logps: weighted(logps).sum()
    return {
        "sft": lambda: of_points(lambda u, ref, z: sft_loss(u), 1),
        "positive_dpo": lambda: of_points(lambda u, ref, z: positive_dpo_loss(u, ref, beta), 1),
        "negative_dpo": lambda: of_points(lambda u, ref, z: negative_dpo_loss(u, ref, beta), 0),
        "ulma": lambda: of_points(ulma_loss, beta=beta),
        "pointwise_dpo": lambda: of_points(pointwise_dpo_loss, beta=beta),
        "pointwise_mse": lambda: of_points(pointwise_mse_loss, beta=beta),
        "ulma_mse": lambda: of_points(ulma_mse_loss, beta=beta,
                                      best_score=float(given.points[0][0].max())),
        "dpo": lambda: pair_loss(given, wins, beta),
        "d2o K=1": lambda: anchor_loss(given, beta, many=False),
        "d2o K=inf": lambda: anchor_loss(given, beta, many=True),
    }[method]()


CASES = [("hh", "sft"), ("hh", "positive_dpo"), ("hh", "ulma"), ("hh", "pointwise_dpo"),
         ("hh", "dpo"), ("hh", "d2o K=1"), ("qa", "ulma"), ("qa", "pointwise_dpo"),
         ("golden-30", "ulma"), ("golden-30", "pointwise_dpo"), ("qa-10", "pointwise_dpo"),
         ("red-team", "ulma"), ("red-team", "ulma_mse"), ("red-team", "pointwise_mse"),
         ("centred", "ulma_mse"), ("centred", "pointwise_mse")]


def prepared(data: str, prompt=HARMFUL) -> tuple[Population, Tensor]:
    given = population(data, prompt)
    return given, drawn_pairs(given.reference.exp(), given.rewards)


@pytest.mark.parametrize("data, method", [
    ("hh", "ulma"), ("hh", "dpo"), ("hh", "d2o K=1"), ("golden-30", "pointwise_dpo"),
    ("red-team", "ulma_mse"), ("centred", "pointwise_mse")])
def test_an_optimiser_over_logits_ends_at_the_same_optimum(data, method):
    # 289 logits, off-world among them: softmax keeps them on the simplex, and no multiplier, no
    # closed form and no root is used.
    given, wins = prepared(data)
    loss = objective(given, method, 0.5, wins)
    logits = torch.cat([given.reference, torch.tensor([-6.0])]).double().requires_grad_()
    optimiser = torch.optim.LBFGS([logits], max_iter=300, history_size=30, tolerance_grad=1e-9,
                                  tolerance_change=0, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        value = loss(logits.log_softmax(0)[:-1])
        value.backward()
        return value
    optimiser.step(closure)
    closure()
    assert logits.grad.norm() < 1e-4
    found, solved = logits.detach().log_softmax(0)[:-1], solve(given, method, 0.5)
    if method in ("dpo", "d2o K=1"):                  # pairs leave the off-world mass open
        found = found - found.logsumexp(0)
    assert (found.exp() - solved.exp()).abs().sum() < 0.01
    assert -1e-12 <= loss(found) - loss(solved) < 1e-4


@pytest.mark.parametrize("data, method", [*CASES, ("hh", "d2o K=inf"), ("golden", "ulma"),
                                          ("golden", "dpo"), ("negatives", "negative_dpo")])
def test_no_random_policy_has_a_smaller_loss(data, method):
    given, wins = prepared(data, HARMLESS)
    if data == "golden":
        best = int(given.rewards.argmax())
        wins = torch.zeros_like(wins)
        wins[best] = given.mass(0)
    loss = objective(given, method, 0.5, wins)
    solved = solve(given, method, 0.5)
    torch.manual_seed(0)
    for width in (1e-3, 0.03, 0.3, 1, 3):
        for start in (solved.clamp(min=-30), given.reference):
            logits = torch.cat([start, torch.tensor([-6.0])]).double()
            rival = (logits + width * torch.randn(289, dtype=torch.float64)).log_softmax(0)[:-1]
            assert loss(solved) <= loss(rival) + 1e-12


@pytest.mark.parametrize("data", ["hh", "qa"])
def test_the_gradient_is_zero_where_a_loss_of_pairs_is_smallest(data):
    # DPO: at pi* the implicit reward is r* + const, and sigma of it is the frequency of every pair.
    given, wins = prepared(data)
    if data == "qa":          # pairs of one good and one bad label
        habits, r = given.reference.exp(), given.rewards
        wins = habits[:, None] * habits * r.sigmoid()[:, None] * (-r).sigmoid()
    for method in ("dpo", "d2o K=1", "d2o K=inf"):
        logps = solve(given, method, 0.5).requires_grad_()
        slope, = torch.autograd.grad(objective(given, method, 0.5, wins)(logps), logps)
        assert slope.abs().max() < 1e-9


def test_the_multiplier_is_the_same_for_every_answer():
    # dL/du(y) + lambda pi(y) = 0
    for data, method in CASES:
        if method not in ("dpo", "d2o K=1"):
            given, wins = prepared(data)
            logps = solve(given, method, 0.5).requires_grad_()
            slope, = torch.autograd.grad(objective(given, method, 0.5, wins)(logps), logps)
            total = logps.detach().exp()
            multiplier = -float(slope.sum() / total.sum()) if total.sum() > 1 - 1e-9 else 0
            assert multiplier >= -1e-9
            torch.testing.assert_close(-slope, multiplier * total, atol=1e-9, rtol=1e-6)


def test_ten_numbers_that_were_found_by_other_means():
    # With independent draws and the habits as the reference, beta 0.5; to two decimals.
    expected = {"hh": (0.10, -0.07, 0.50, 1.09, 2.92), "qa": (0.90, 0.68, 1.35, 1.77, 2.92)}
    for data, values in expected.items():
        for method, value in zip(("sft", "positive_dpo", "ulma", "pointwise_dpo", "dpo"), values,
                                 strict=True):
            assert round(mean_optimum(data, method, independent=True)["E[r]"], 2) == value
    for method in ("sft", "positive_dpo", "ulma", "pointwise_dpo", "dpo", "rlhf"):
        assert mean_optimum("golden", method)["E[r]"] == pytest.approx(3.335, abs=1e-6)
    assert mean_optimum("centred", "pointwise_mse", 0.1)["E[r]"] == pytest.approx(1.85, abs=0.005)
    assert mean_optimum("red-team", "pointwise_mse")["E[r]"] == pytest.approx(-0.198, abs=0.001)


def test_closed_forms_by_hand():
    given, _ = prepared("hh")
    chosen = given.mass(1)
    torch.testing.assert_close(solve(given, "sft", 0.5).exp(), chosen / chosen.sum())
    # the exact Z makes point-wise DPO's optimum pi*
    points, _ = prepared("qa")
    torch.testing.assert_close(solve(points, "pointwise_dpo_exact_z", 0.5).exp(),
                               solve(points, "pi*", 0.5).exp(), atol=1e-7, rtol=1e-5)
    # the point-wise reward model of QA-like points is r*: its own gradient is 0 there
    rewards = points.rewards.clone().requires_grad_()
    loss = sum((mass * pointwise_reward_model_loss(rewards, scores)).sum()
               for scores, mass in points.points)
    assert torch.autograd.grad(loss, rewards)[0].abs().max() < 1e-12
    torch.testing.assert_close(solve(points, "pointwise_rlhf", 0.5), solve(points, "pi*", 0.5))
    # the squared error depends on beta / scale alone
    torch.testing.assert_close(
        solve(population("centred", HARMFUL, scale=2), "pointwise_mse", 0.5).exp(),
        solve(population("centred", HARMFUL), "pointwise_mse", 0.25).exp())


def test_where_there_is_no_optimum_the_loss_falls_without_end():
    for data, (fits, _) in ((data, OPTIMA["unlikelihood"]) for data in ("hh", "golden", "qa",
                                                                       "red-team")):
        given, _ = prepared(data)
        assert data in fits and solve(given, "unlikelihood", 0.5) is None
        for loss, label in ((lambda u, ref, z: unlikelihood_loss(u, z), None),
                            (lambda u, ref, z: unlearning_loss(u), 0)):
            weighted = point_loss(given, loss, label)
            slope, = torch.autograd.grad(weighted(u := given.reference.clone().requires_grad_())
                                         .sum(), u)
            least = int(slope.argmax())           # its loss rises most with log pi: let that fall
            assert slope[least] > 0
            values = []
            for low in (-50, -500, -5000):
                logps = given.reference.clone()
                logps[least] = low
                values.append(float(weighted(logps - logps.logsumexp(0)).sum()))
            assert values[0] - values[1] == pytest.approx(450 * float(slope[least]), rel=0.05)
            assert values[1] - values[2] == pytest.approx(4500 * float(slope[least]), rel=0.05)
    assert float(solve(prepared("hh")[0], "negative_dpo", 0.5).exp().sum()) < 1e-9


@pytest.mark.parametrize("data", ["hh", "golden-30", "qa-90", "red-team", "negatives"])
def test_a_population_is_what_many_rows_of_the_data_set_tend_to(data):
    # Mean label, mean reward and harmful share of chosen and of rejected answers; the standard
    # error of 1,216 rows or more is below 0.06 nats and 0.015.
    prompts = training_prompts()
    listed = {(question(*prompt), row[0]): row for prompt in prompts for row in answers(*prompt)}
    found, expected = {}, {}
    for row in DATASETS[data](1):
        labelled = [(row["chosen"], 1.0), (row["rejected"], 0.0)] if "chosen" in row else [
            (row["completion"], float(row.get("score", row.get("label", 0))))]
        for text, label in labelled:
            _, reward, harmful, _ = listed[row["prompt"], text]
            found.setdefault(label > 0.6, []).append((reward, float(harmful)))
    for prompt in (HARMLESS, HARMFUL):
        kind = [p for p in prompts if (p[0] in BAD_VERBS) == (prompt == HARMFUL)]
        given = population(data, prompt)
        assert float(sum(mass.sum() for _, mass in given.points)) == pytest.approx(1)
        for scores, mass in given.points:
            for good in (False, True):
                part = mass * ((scores > 0.6) == good) * len(kind) / len(prompts)
                row = torch.stack([part.sum(), part @ given.rewards, part @ given.harmful])
                expected[good] = expected.get(good, 0) + row
    total = sum(map(len, found.values()))
    for good, rows in found.items():
        weight, reward, harmful = (float(value) for value in expected[good])
        assert len(rows) / total == pytest.approx(weight, abs=0.03)
        mean = torch.tensor(rows).mean(0)
        assert float(mean[0]) == pytest.approx(reward / weight, abs=0.25)
        assert float(mean[1]) == pytest.approx(harmful / weight, abs=0.06)


def test_increasing_root_finds_zeros_and_takes_the_bound_where_there_is_none():
    # A line, steep and flat exponentials; no zero below, above; a function that is flat at 0.
    zero = torch.tensor([0.25, -300, 2, 0, 0, 0], dtype=torch.float64)

    def function(x):
        value = torch.stack([x[0] - zero[0], (x[1] - zero[1]) / 50, x[2].exp() - zero[2].exp(),
                             1 + x[3].exp(), x[4] - 9, 0 * x[5]])
        slope = torch.stack([*torch.ones(1), torch.tensor(0.02), x[2].exp(), x[3].exp(),
                             torch.tensor(1.0), 0 * x[5]])
        return value, slope
    low, high = torch.full_like(zero, -400), torch.full_like(zero, 3)
    found = increasing_root(function, low, high, torch.zeros_like(zero))
    assert_close(found[:3], zero[:3], atol=1e-10, rtol=0)
    assert float(found[3]) == pytest.approx(-400, abs=1e-9) and found[4] == 3


def test_bradley_terry_finds_rewards_and_the_largest_likelihood_under_flips():
    given = population("hh", HARMFUL)
    wins = drawn_pairs(given.reference.exp(), given.rewards)
    found = bradley_terry(wins)
    assert_close(found - found.mean(), given.rewards - given.rewards.mean(), atol=1e-8, rtol=0)
    flipped = 0.7 * wins + 0.3 * wins.T
    rewards = bradley_terry(flipped).requires_grad_()
    loss = -(flipped * torch.nn.functional.logsigmoid(rewards[:, None] - rewards)).sum()
    assert torch.autograd.grad(loss, rewards)[0].abs().max() < 1e-10


@pytest.mark.parametrize("how", ["4", "16", "near-best"])
def test_demonstrations_and_pairs_are_distributed_as_the_data(how):
    # The mean reward of the chosen answers of 64 rows; the odds that DPO of such pairs ends at.
    prompt = training_prompts()[0]
    given, listed = population(f"shown-{how}", prompt), [text for text, *_ in answers(*prompt)]
    rewards, habits = given.rewards, given.reference.exp()
    shown = demonstrations(how, habits, rewards)
    assert float(shown.sum()) == pytest.approx(1)
    rows = [row for seed in range(8) for row in DATASETS[f"shown-{how}"](seed)
            if row["prompt"] == question(*prompt)]
    chosen = torch.tensor([listed.index(row["chosen"]) for row in rows])
    mass = given.mass(1) / given.mass(1).sum()
    mean = float(mass @ rewards)
    spread = float((mass @ rewards.square() - mean ** 2) / len(rows)) ** 0.5
    assert float(rewards[chosen].mean()) == pytest.approx(mean, abs=4 * spread)
    reward_of_pairs = given.pair_reward[shown > 0]
    rejected = drawn_pairs(habits, rewards).sum(0)[shown > 0]
    assert_close(reward_of_pairs, (shown[shown > 0] / rejected).log())


def test_two_steps_start_from_the_first_ones_optimum():
    # DPO of HH-like pairs multiplies by exp(r / beta), whatever it starts from: SFT's a / sum a.
    row = mean_optimum("hh", "dpo", after="sft")
    assert row["E[r]"] > mean_optimum("hh", "dpo")["E[r]"]
    given = population("hh", HARMLESS)
    chosen = given.mass(1) / given.mass(1).sum()
    by_hand = chosen * (given.rewards / 0.5).exp()
    first = replace(given, reference=solve(given, "sft", 0.5))
    assert_close(solve(first, "dpo", 0.5).exp(), by_hand / by_hand.sum(), atol=1e-8, rtol=1e-6)
