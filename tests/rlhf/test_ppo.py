"""PPO: the formulas by hand and against Eq. 3 itself, the updates, and whole runs."""
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
from pathlib import Path

import conftest
import pytest
import torch
from conftest import ONE_THREAD, ROOT, launch, write_jsonl
from helpers import adapter_hash, logged, reward_model_in
from helpers_models import make_rollouts, three_models
from safetensors.torch import load_file
from torch.nn import ModuleDict
from torch.testing import assert_close

from files.cli import run_cli
from model import load_llama, save_llama
from packing import build_stream, deal
from rlhf import ppo
from rlhf.ppo import (Clipping, minibatch_gradient, add_advantages, clipped_policy_loss,
                      clipped_value_loss, gae, kl_penalised_rewards, whiten)
from rlhf.rollouts import token_values
from step import Compute
from training.checkpoint import trainable


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


# ---- formulas -----------------------------------------------------------------------------------

def test_rewards_by_hand_sum_to_the_integrand_of_eq_3():
    # beta 0.5; log-ratios 1 2 | -4: rewards -0.5 -1 | 2, and 10 and 20 at the last tokens.
    rewards = kl_penalised_rewards(tensor(-1, -2, -3), tensor(-2, -4, 1), torch.tensor([0, 0, 1]),
                                   tensor(10, 20), beta=0.5)
    assert_close(rewards, tensor(-0.5, 9, 22))


def test_advantages_by_hand_do_not_cross_into_the_next_response():
    # gamma 1/2, lam 1/2. First response: delta_2 = 3 - 2 = 1, delta_1 = 1 + 2/2 - 4 = -2, so
    # A_1 = -2 + 1/4. The second, one token: 5 - 1. If the recursion went on across the border, the
    # first would continue with V = 1, A = 4.
    advantages = gae(tensor(1, 3, 5), tensor(4, 2, 1), torch.tensor([0, 0, 1]), 0.5, 0.5)
    assert_close(advantages, tensor(-1.75, 1, 4))


def test_advantages_are_the_sum_of_discounted_errors_of_every_response():
    # arXiv:1506.02438, Eq. 16, response by response and without the recursion.
    generator = torch.Generator().manual_seed(0)
    lengths, gamma, lam = [5, 1, 9, 2], 0.9, 0.8
    rewards, values = torch.randn(2, sum(lengths), generator=generator, dtype=torch.float64)
    expected = []
    for r, v in zip(rewards.split(lengths), values.split(lengths), strict=True):
        errors = r + gamma * torch.cat([v[1:], torch.zeros(1)]) - v
        expected += [sum((gamma * lam) ** (later - t) * errors[later]
                         for later in range(t, len(r))) for t in range(len(r))]
    response_ids = torch.arange(4).repeat_interleave(torch.tensor(lengths))
    assert_close(gae(rewards, values, response_ids, gamma, lam), torch.stack(expected))


def test_policy_loss_by_hand_and_where_it_has_no_gradient():
    # c = 0.2. The clip limits what a gain counts (q 1.5, A 1: 1.2; q 0.5, A -1: 0.8), not a loss.
    ratio = tensor(1.5, 1.5, 0.5, 0.5, 1.0)
    logps = ratio.log().requires_grad_()
    losses = clipped_policy_loss(logps, torch.zeros(5), tensor(1, -1, 1, -1, 3), 0.2)
    assert_close(losses, tensor(-1.2, 1.5, -0.5, 0.8, -3))
    losses.sum().backward()
    assert_close(logps.grad, tensor(0, 1.5, -0.5, 0, -3))       # -A q, or 0 beyond the clip


def test_value_loss_by_hand():
    # Old value 0, c = 0.2. V 1, R 2: near is 0.2, further away, so (0.2 - 2)²/2. V 1, R -1: V is
    # further. V 0.1 is near itself. The clip's side has no gradient.
    values = tensor(1, 1, 0.1).requires_grad_()
    losses = clipped_value_loss(values, torch.zeros(3), tensor(2, -1, 1), 0.2)
    assert_close(losses, tensor(1.62, 2, 0.405))
    losses.sum().backward()
    assert_close(values.grad, tensor(0, 2, -0.9))


def test_whitened_values_have_mean_0_and_variance_1_and_equal_ones_are_0():
    assert_close(whiten(tensor(1, 2, 3)), tensor(-1, 0, 1), rtol=0, atol=1e-8)
    assert not whiten(torch.full((4,), 7.0)).any()
    assert whiten(tensor(3)).tolist() == [0]             # a batch of one token has no deviation


def test_the_first_update_climbs_eq_3():
    # All 9 answers of two tokens, with their probabilities: expectations are sums. The gradient of
    # the loss must be that of -(E[r] - beta KL) for any value function, which is only a baseline;
    # with the KL's sign turned, or added at another token, it is not.
    generator = torch.Generator().manual_seed(1)
    logits, reference, values = torch.randn(3, 4, 3, generator=generator, dtype=torch.float64)
    answers, beta = list(itertools.product(range(3), range(3))), 0.7
    scores = 3 * torch.randn(len(answers), generator=generator, dtype=torch.float64)
    response_ids = torch.arange(len(answers)).repeat_interleave(2)

    def per_token(table):                                   # row 0, then row 1 + the first token
        table = table.log_softmax(-1)
        return torch.stack([table[row, token] for a, b in answers
                            for row, token in ((0, a), (1 + a, b))])

    logits.requires_grad_()
    logps, reference_logps = per_token(logits), per_token(reference)
    probs = logps.view(-1, 2).sum(1).exp()
    objective = (probs * scores).sum() - beta * (
        probs * (logps - reference_logps).view(-1, 2).sum(1)).sum()
    expected, = torch.autograd.grad(-objective, logits)
    old, state_values = per_token(logits.detach()), torch.stack(
        [values[row, 0] for a, _ in answers for row in (0, 1 + a)])
    rewards = kl_penalised_rewards(old, reference_logps, response_ids, scores, beta)
    advantages = gae(rewards, state_values, response_ids, 1.0, 1.0)
    losses = clipped_policy_loss(per_token(logits), old, advantages, 0.2)
    gradient, = torch.autograd.grad((probs.detach().repeat_interleave(2) * losses).sum(), logits)
    assert expected.abs().max() > 0.1
    assert_close(gradient, expected)


# ---- one update ---------------------------------------------------------------------------------

def test_advantages_are_whitened_over_the_batch_and_returns_are_not():
    rollouts = make_rollouts(*three_models())
    done = add_advantages(rollouts, beta=0.3, gamma=1.0, lam=1.0)
    advantages = torch.cat([rollout.advantages for rollout in done])
    assert float(advantages.mean()) == pytest.approx(0, abs=1e-9)
    assert float(advantages.var()) == pytest.approx(1, abs=1e-6)
    for rollout in done:
        # with lam = 1 a return is the sum of the rewards from there on: at the first token of all
        firsts = torch.tensor([0] + [len(ids) for ids in rollout.response_ids][:-1]).cumsum(0)
        kls = (rollout.per_token_logps - rollout.reference_per_token_logps).split(
            [len(ids) for ids in rollout.response_ids])
        assert_close(rollout.returns[firsts].tolist(), [
            score - 0.3 * float(kl.sum())
            for score, kl in zip(rollout.scores, kls, strict=True)])


def gradient(shares, micro_tokens=8192):
    """(totals, flat gradient, models and rollouts) of a minibatch dealt to ranks that take turns;
    the policy has changed since the responses were sampled."""
    policy, value, reward_model = three_models()
    rollouts = add_advantages(make_rollouts(policy, value, reward_model), 0.3, 1.0, 0.95)
    models = ModuleDict({"policy": policy, "value": value})
    with torch.no_grad():
        for p in trainable(models).values():
            p *= 1.5
    count = sum(len(rollout.per_token_logps) for rollout in rollouts)
    totals = sum(minibatch_gradient(models, share, count, Clipping(0.01, 0.01, 0.1),
                                     Compute(micro_tokens=micro_tokens))
                 for share in deal(rollouts, shares))
    whole = torch.cat([p.grad.flatten() for p in trainable(models).values()])
    return totals, whole, (models, rollouts)


def test_an_update_does_not_depend_on_packing_and_ranks():
    totals, whole, _ = gradient(1)
    assert 0.1 < totals[3] < 0.9 and 0.1 < totals[4] < 0.9       # the shares that are clipped
    for shares, micro_tokens in ((1, 40), (3, 8192), (2, 64)):
        again = gradient(shares, micro_tokens)
        assert_close(again[0], totals, rtol=1e-9, atol=1e-12)
        assert_close(again[1], whole, rtol=1e-8, atol=1e-12)


def test_an_update_is_the_mean_loss_over_tokens_of_plain_forwards():
    totals, whole, (models, rollouts) = gradient(1)
    policy, value, losses = models["policy"], models["value"], []
    for rollout in rollouts:
        stream = build_stream([rollout])
        hidden = policy(stream.input_ids, stream.position_ids, stream.segments)
        logits = hidden[stream.predict_from] @ policy.lm_head.weight.T
        logps = logits.log_softmax(-1).gather(1, stream.labels[:, None])[:, 0]
        losses.append(clipped_policy_loss(logps, rollout.per_token_logps, rollout.advantages, 0.01)
                      + 0.1 * clipped_value_loss(token_values(value, stream), rollout.values,
                                                 rollout.returns, 0.01))
    loss = torch.cat(losses).mean()
    expected = torch.cat([gradient.flatten() for gradient in torch.autograd.grad(
        loss, list(trainable(models).values()))])
    assert float(totals[0]) == pytest.approx(loss.item(), rel=1e-9)
    assert_close(whole, expected, rtol=1e-7, atol=1e-12)


# ---- whole runs ---------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def reward_run(tmp_path_factory, tiny_model):
    """The output folder of a reward model of train.py: args.json and final/.

    The head of its base is 20 times the usual: with a random one logits differ by 0.1, whatever an
    adapter does to the hidden state.
    """
    folder = tmp_path_factory.mktemp("reward")
    base, model = str(folder / "base"), load_llama(tiny_model)
    model.lm_head.weight.data *= 20
    save_llama(model, base)
    shutil.copy(os.path.join(tiny_model, "tokenizer.model"), base)
    data = write_jsonl(folder / "pairs.jsonl", [
        {"prompt": f"Question {n}?", "chosen": "Yes.", "rejected": "No."} for n in range(12)] * 2)
    reward_model_in(folder / "run/final", base)
    (folder / "run/args.json").write_text(json.dumps({
        "method": "pointwise_reward_model", "model_name_or_path": base, "bf16": False,
        "lora_r": 4, "lora_alpha": 8, "lora_target_modules": ["q_proj", "down_proj"],
        "dataset": data, "beta": 0.05, "held_out": 0.0, "max_length": 128,
        "max_prompt_length": 64}))
    return str(folder / "run")


def flags_of(run, out, *flags):
    return ("rlhf.ppo", "--reward_model", run, "--output_dir", out, "--batch_size", "5",
            "--num_generations", "2", "--num_mini_batches", "2", "--max_new_tokens", "6",
            "--learning_rate", "3e-3", "--max_steps", "6", "--save_steps", "2",
            "--num_ppo_epochs", "2", *flags)


def finish(*args, ranks=1):
    return conftest.finish(*flags_of(*args), ranks=ranks)


def test_a_killed_and_a_stopped_run_end_with_the_same_bytes(tmp_path, reward_run):
    # The checkpoint holds the value function and the moments of both adapters, and the seeds of
    # the samples depend on the step only.
    finish(reward_run, tmp_path / "whole")
    out = tmp_path / "broken"
    for number, target in ((signal.SIGKILL, "step 3/"), (signal.SIGTERM, "step 4/")):
        process = subprocess.Popen(launch(*flags_of(reward_run, out)), cwd=ROOT, env=ONE_THREAD,
                                   stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for line in process.stdout:
            if line.startswith(target):
                process.send_signal(number)
                break
        rest = process.stdout.read()
        assert process.wait(timeout=60) == (-9 if number == signal.SIGKILL else 128 + number)
        assert not (out / "final").exists(), "the run was over before the signal came"
    assert "saved; the same command continues" in rest
    assert "continuing after step" in finish(reward_run, out)
    assert adapter_hash(out) == adapter_hash(tmp_path / "whole")
    assert logged(out) == logged(tmp_path / "whole") and len(logged(out)) == 6


def test_the_value_function_is_trained_adapter_and_head(tmp_path, reward_run):
    # It starts as the reward model: after two steps every one of its trained tensors has moved.
    finish(reward_run, tmp_path / "run", "--max_steps", "3")
    trained = load_file(tmp_path / "run/checkpoint-2/trained.safetensors")
    before = load_file(Path(reward_run) / "final/adapter_model.safetensors")
    for name, start in before.items():
        name = name.removeprefix("base_model.model.").replace(
            "lora_A.weight", "lora_A").replace("lora_B.weight", "lora_B")
        assert not torch.equal(trained[f"value.{name}"], start), name
    assert "value.score.weight" in trained


def test_two_ranks_log_the_same_numbers_as_one(tmp_path, reward_run):
    # 5 prompts on 2 ranks: uneven shares. Whitening per rank, or a mean of means, would differ.
    for ranks in (1, 2):
        finish(reward_run, tmp_path / str(ranks), ranks=ranks)
    for line, expected in zip(*(logged(tmp_path / str(ranks)) for ranks in (2, 1)), strict=True):
        assert line.keys() == expected.keys()
        for key, value in expected.items():
            assert line[key] == pytest.approx(value, rel=2e-3, abs=2e-5), key


def test_ppo_raises_the_reward_it_is_given_and_eval_reads_the_run(tmp_path, reward_run):
    # Answers of two tokens, so that few steps are enough; scores have a standard deviation of 0.5.
    finish(reward_run, tmp_path / "run", "--max_steps", "12", "--batch_size", "12", "--beta", "0",
           "--num_generations", "8", "--max_new_tokens", "2", "--learning_rate", "1e-2")
    lines = logged(tmp_path / "run")
    scores = [line["objective/scores"] for line in lines]
    assert sum(scores[-3:]) / 3 > scores[0] + 0.3, scores
    assert lines[0]["objective/kl"] < 1e-6 < lines[-1]["objective/kl"]
    assert "objective/true_reward" not in lines[0]
    assert lines[-1]["policy/entropy"] < lines[0]["policy/entropy"] < math.log(448)
    assert "accuracy of implicit reward" in conftest.finish(
        "eval.py", tmp_path / "run", "--dataset", Path(reward_run).parent / "pairs.jsonl")
    flags = json.loads((tmp_path / "run/args.json").read_text())
    assert flags["method"] == "pointwise_rlhf" and flags["lora_target_modules"] == [
        "q_proj", "down_proj"]


@pytest.mark.parametrize("flags, words", [
    (["--max_new_tokens", "2000"], "--max_prompt_length 64 and --max_new_tokens 2000 exceed"),
    (["--held_out", "1"], "--held_out 1.0 leaves no prompt of"),
    (["--cliprange", "2"], "--cliprange 2.0 must be a number in [0, 1]"),
    (["--num_mini_batches", "0"], "--num_mini_batches 0 must be at least 1"),
    (["--reward_model", "POLICY"], "is a run of ulma; expected one of"),
    (["--reward_model", "nowhere"], "nowhere is not a finished run"),
])
def test_bad_flags_are_refused_before_anything_is_written(tmp_path, reward_run, flags, words,
                                                          capsys):
    (tmp_path / "policy/final").mkdir(parents=True)
    raw = json.loads((Path(reward_run) / "args.json").read_text()) | {"method": "ulma"}
    (tmp_path / "policy/args.json").write_text(json.dumps(raw))
    flags = [str(tmp_path / "policy") if flag == "POLICY" else flag for flag in flags]
    with pytest.raises(SystemExit) as left:
        run_cli(lambda: ppo.main(["--reward_model", reward_run, "--output_dir",
                                  str(tmp_path / "out"), *flags]))
    assert left.value.code == 2 and words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
