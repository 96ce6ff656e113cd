"""Intervals over prompts and seeds, and the length-controlled win rate."""
import pytest
import torch

from intervals import bootstrap, length_controlled_wins, seed_interval, t_quantile, wins

# ---- intervals ----------------------------------------------------------------------------------

def test_t_quantiles_are_the_tabulated_ones():
    # two-sided 95 % of Student's t, from any printed table
    table = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 10: 2.228, 29: 2.045, 30: 2.042,
             120: 1.980}
    for degrees, t in table.items():
        assert t_quantile(degrees) == pytest.approx(t, abs=5e-4)


def test_three_seeds_by_hand():
    # 1, 2, 3: mean 2, s = 1, 4.303 / sqrt 3 = 2.484 (the notes' 2.48 times the sample s.d.)
    assert seed_interval([1.0, 2.0, 3.0]) == (2.0, pytest.approx(2.4841, abs=1e-4))
    with pytest.raises(ValueError, match="at least two runs; got 1"):
        seed_interval([1.0])


def test_bootstrap_draws_the_rows_of_a_prompt_together():
    # 50 prompts asked 8 times, always with the same outcome, tell no more than 50 rows: the
    # interval must be that of 50 rows; drawing 400 rows on their own would shrink it by sqrt 8.
    few = (torch.arange(50.0) % 2)[:, None]
    many = few.repeat_interleave(8, 0)
    prompts = torch.arange(50).repeat_interleave(8)
    _, low, high = bootstrap(lambda v: v.mean(), few)
    _, low_8, high_8 = bootstrap(lambda v: v.mean(), many, prompts=prompts)
    assert high_8 - low_8 == pytest.approx(high - low, rel=0.1)
    shuffled = torch.randperm(400, generator=torch.Generator().manual_seed(0))
    _, low_s, high_s = bootstrap(lambda v: v.mean(), many[shuffled], prompts=prompts[shuffled])
    assert (low_s, high_s) == (low_8, high_8)


# ---- length control -----------------------------------------------------------------------------

def test_without_a_length_effect_the_controlled_rate_is_the_raw_one():
    # Every outcome occurs with gap +d and -d: φ = 0 solves the equations, so θ = logit(raw).
    outcomes = torch.tensor([1, 1, 1, 0, -1, -1] * 10)
    gaps = torch.cat([torch.full((30,), 20.0), torch.full((30,), -20.0)])
    rate = length_controlled_wins(outcomes, 100 + gaps, torch.full((60,), 100.0))
    assert rate == pytest.approx(float(wins(outcomes)), abs=1e-5)
    assert float(wins(outcomes)) == pytest.approx(7 / 12)


def test_a_judge_that_only_looks_at_length_gives_one_half():
    # P(win) = σ(2 tanh(d / s)) and A is longer in 85 % of the pairs: raw rate 0.74, controlled 0.5.
    generator = torch.Generator().manual_seed(0)
    gaps = torch.randn(20000, generator=generator).double() + 1.0
    chance = torch.sigmoid(2 * torch.tanh(gaps / gaps.std()))
    outcomes = torch.where(torch.rand(20000, generator=generator) < chance, 1, -1)
    assert float(wins(outcomes)) > 0.7
    assert length_controlled_wins(outcomes, gaps + 5, torch.full((20000,), 5.0)) == pytest.approx(
        0.5, abs=0.015)
    # the longer always wins, as often either way: separable, and still 0.5
    sign = torch.tensor([1, -1] * 50)
    assert length_controlled_wins(sign, 10 + sign, torch.full((100,), 10)) == pytest.approx(0.5)


def test_the_regression_equals_another_optimiser():
    # The same penalised likelihood by LBFGS in float64, on skewed data with ties.
    generator = torch.Generator().manual_seed(1)
    lengths = torch.rand(3, 300, generator=generator).double() * 100
    gaps = lengths[0] - lengths[1]
    outcomes = (lengths[2] + 0.5 * gaps > 60).double() - (lengths[2] < 20).double()
    features = torch.tanh(gaps / gaps.std())
    weights = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=500, tolerance_grad=1e-12,
                                  tolerance_change=1e-15, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(
            weights[0] + weights[1] * features, (outcomes + 1) / 2) + (
            5e-7 * weights[0]**2 + 5e-5 * weights[1]**2)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert abs(float(weights[1].detach())) > 0.3             # there is an effect to control for
    assert length_controlled_wins(outcomes, lengths[0], lengths[1]) == pytest.approx(
        float(weights[0].detach().sigmoid()), abs=1e-7)


def test_length_control_at_the_edges():
    # nothing to control for; nothing but wins; one pair
    assert length_controlled_wins(torch.tensor([1, 1, 0]), torch.ones(3), torch.ones(3)) == \
        pytest.approx(5 / 6)
    assert length_controlled_wins(torch.ones(9), torch.arange(9), torch.ones(9)) > 0.999
    assert length_controlled_wins(torch.tensor([-1]), torch.ones(1), torch.zeros(1)) == 0.0
