"""What is measured on held-out responses: by hand, during a run and after it, on one rank or two."""
import json
import math
import shutil
from functools import partial

import pytest
import torch
from helpers import adapter_hash, finish, logged, make_model, make_trees
from torch.testing import assert_close

import eval as evaluate
from lora import lora_disabled
from packing import build_stream, mismatched_trees
from step import METHODS, Compute, Objective, sequence_logps, tree_rewards
from training import held_out
from training.checkpoint import held_out_records, load_run
from training.held_out import (HeldOut, compare_tokens, held_out_losses, held_out_metrics, measure,
                               measure_group, measure_objective)

NAN = [math.nan] * 4


def by_hand(policy, reference, kls=(0.5, 0.25, 0.125, 0.125)):
    """Two prompts with a good and a bad response each, of 1, 2, 3 and 4 tokens."""
    return HeldOut(torch.tensor([1.0, 0.0, 1.0, 0.0]).double(), torch.tensor([[0, 1], [2, 3]]),
                   *(torch.tensor(column, dtype=torch.float64)
                     for column in (policy, reference, kls, [1, 2, 3, 4])))


# ---- numbers by hand ----------------------------------------------------------------------------

def test_metrics_of_pairs_by_hand():
    # beta 0.1, log-ratios 10 ln 3 and 0, then 0 and 0: margins ln 3 and 0, one pair right, one tied.
    held = by_hand([10 * math.log(3), -5, -7, -2], [0, -5, -7, -2])
    assert held_out_metrics(held, Objective(METHODS["dpo"])) == pytest.approx({
        "eval/loss": (math.log(4 / 3) + math.log(2)) / 2, "eval/rewards/accuracies": 0.75,
        "eval/rewards/margins": math.log(3) / 2, "eval/kl": 1 / 10})


def test_the_loss_is_of_the_responses_that_the_method_trains_on():
    held = by_hand([-1, -20, -3, -40], [-1, -20, -3, -40])
    for name, loss in (("sft", 2.0), ("unlearning", -30.0), ("unlikelihood", (4 - 60) / 4),
                       ("negative_dpo", math.log(2)), ("ulma", (4 + 2 * math.log(2)) / 4)):
        assert held_out_metrics(held, Objective(METHODS[name]))["eval/loss"] == pytest.approx(loss)
    # as authors: log-probs a token, 1 and 1, 10 and 10; mean over good plus mean over bad
    objective = Objective(METHODS["unlikelihood"], mean_logps=True, reduction="class")
    assert held_out_metrics(held, objective)["eval/loss"] == pytest.approx(1 - 10)
    assert not len(held_out_losses(held, Objective(METHODS["d2o"])))
    assert "eval/loss" not in held_out_metrics(held, Objective(METHODS["d2o"], alpha=0.1))


def test_without_a_reference_only_what_needs_none_is_there():
    assert held_out_metrics(by_hand([-1, -20, -3, -40], NAN, NAN), Objective(METHODS["sft"])) == {
        "eval/loss": 2.0}
    rewards = by_hand([3, 1, 1, 2], [0] * 4, NAN)
    metrics = held_out_metrics(rewards, Objective(METHODS["reward_model"], beta=7.0))
    assert metrics == pytest.approx({
        "eval/rewards/accuracies": 0.5, "eval/rewards/margins": 0.5,
        "eval/loss": (math.log1p(math.exp(-2)) + math.log1p(math.exp(1))) / 2})


def test_exact_kl_and_log_probs_of_tokens_in_any_number_of_rows(monkeypatch):
    torch.manual_seed(0)
    hidden, other = torch.randn(2, 11, 6)
    head, other_head = torch.randn(2, 9, 6)
    labels = torch.randint(9, (11,))
    p, q = (hidden @ head.T).softmax(1), (other @ other_head.T).softmax(1)
    expected = torch.stack([p[range(11), labels].log(), q[range(11), labels].log(),
                            (p * (p / q).log()).sum(1)])
    for rows in (4, 512):
        monkeypatch.setattr(held_out, "HEAD_ROWS", rows)
        assert_close(compare_tokens(hidden, head, other, other_head, labels), expected)


# ---- a model ------------------------------------------------------------------------------------

def test_measured_log_probs_are_those_of_the_step_however_trees_are_packed():
    model, trees = make_model(), make_trees()
    model.train()
    reference = partial(lora_disabled, model)
    stream = build_stream(trees)
    with torch.no_grad():
        policy = sequence_logps(model, stream)
        with reference() as base:
            other = sequence_logps(base, stream)
    for micro_tokens in (15, 8192):
        held = measure(model, reference, trees, Compute(micro_tokens=micro_tokens))
        order = [int((policy - value).abs().argmin()) for value in held.policy_logps]
        assert sorted(order) == list(range(len(policy)))         # packing puts trees elsewhere
        assert_close(held.policy_logps, policy[order], rtol=1e-5, atol=1e-5)
        assert_close(held.reference_logps, other[order], rtol=1e-5, atol=1e-5)
        assert_close(held.scores, stream.scores.double()[order])
        lengths = [len(ids) for tree in trees for ids in tree.response_ids]
        assert (held.kls > 0).all() and held.lengths.tolist() == [lengths[n] for n in order]
        assert sorted([order[i], order[j]] for i, j in held.pairs) == sorted(stream.pairs.tolist())
    assert model.training
    assert measure(model, None, trees, Compute()).kls.isnan().all()


def test_a_reward_models_rewards_are_measured():
    model, trees = make_model(score_head=True), make_trees()
    held = measure(model, None, trees, Compute(micro_tokens=15))
    assert_close(held.policy_logps.sort().values, tree_rewards(model, trees).sort().values,
                 rtol=1e-5, atol=1e-5)
    assert not held.reference_logps.any()
    assert sorted(held.lengths.tolist()) == sorted(
        len(ids) for tree in trees for ids in tree.response_ids)
    # A reward is one number, whatever the length averages of --reduction.
    for name in ("reward_model", "pointwise_reward_model"):
        plain, averaged = (held_out_metrics(held, Objective(METHODS[name], mean_logps=mean))
                           for mean in (False, True))
        assert plain == averaged


@pytest.mark.parametrize("score_head", [False, True])
def test_a_rank_without_trees_runs_the_layers_all_the_same(score_head):
    # With --fsdp every rank must gather every layer, or the others wait for it.
    model, forwards = make_model(score_head=score_head), []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda *_: forwards.append(1))
    assert not len(measure_group(model, None, [], Compute()).scores)
    assert len(forwards) >= len(model.model.layers)


def test_without_pairs_no_accuracy_is_made_up(recwarn):
    held = by_hand([-1, -20, -3, -40], [-1, -20, -3, -40])._replace(
        pairs=torch.zeros(0, 2, dtype=torch.int64))
    metrics = held_out_metrics(held, Objective(METHODS["pointwise_dpo"]))
    assert set(metrics) == {"eval/loss", "eval/kl"} and not recwarn


@pytest.mark.parametrize("mean", [False, True])
def test_log_z_of_kto_and_bco_is_estimated_from_the_held_out_responses(mean):
    # In training's units: with length averages their mean, else that of the sums.
    model, trees = make_model(), make_trees()
    reference, compute = partial(lora_disabled, model), Compute()
    held = measure(model, reference, trees, compute)
    others = measure(model, reference, mismatched_trees(trees, 64), compute)
    rewards, unrelated = (float(((one.policy_logps - one.reference_logps)
                                 / (one.lengths if mean else 1)).mean()) for one in (held, others))
    for name, expected in (("bco", -0.3 * rewards), ("kto", -0.3 * max(0.0, unrelated)),
                           ("dpo", 0.0)):
        start = Objective(METHODS[name], beta=0.3, log_z=0.25, mean_logps=mean)
        found, objective = measure_objective(model, reference, trees, 64, start, compute)
        assert objective.log_z == pytest.approx(0.25 + expected)
        assert torch.equal(found.kls, held.kls)
    # The responses of a single prompt have no other prompt to stand under.
    _, objective = measure_objective(model, reference, trees[:1], 64,
                                     Objective(METHODS["kto"], log_z=0.25), compute)
    assert objective.log_z == 0.25


# ---- a run --------------------------------------------------------------------------------------

FLAGS = ("--held_out", "0.25", "--max_steps", "8", "--learning_rate", "3e-3")


def rows(out):
    return [json.loads(line) for line in (out / "eval.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_measuring_changes_no_bit_of_training_and_says_what_eval_says(
        method, tiny_model, pairs_file, tmp_path, capsys):
    # sft draws dropout masks in every step. eval.py reads the same numbers off the finished run.
    plain, watched = tmp_path / "plain", tmp_path / "watched"
    finish(tiny_model, pairs_file, plain, "--method", method, *FLAGS)
    shown = finish(tiny_model, pairs_file, watched, "--method", method, *FLAGS, "--eval_steps", "3")
    assert adapter_hash(plain) == adapter_hash(watched) and logged(plain) == logged(watched)
    assert not (plain / "eval.jsonl").exists()
    assert [row["step"] for row in rows(watched)] == [3, 6, 8]
    assert shown.count(", held out:") == 3 and "  policy " in shown and "  reference " in shown
    last, answers = dict(rows(watched)[-1]), rows(watched)[-1]["answers"]
    model, reference, flags = load_run(str(watched))
    _, records = held_out_records(str(watched), flags, None)
    assert [row["prompt"] for row in answers] == list(
        dict.fromkeys(record.prompt[-1][1] for record in records))[:2]
    assert all(row.keys() == {"prompt", "policy", "reference"} for row in answers)
    evaluate.main([str(watched)])
    shown = capsys.readouterr().out
    for name, line in (("eval/loss", "loss   "), ("eval/rewards/margins", "reward margin  "),
                       ("eval/rewards/accuracies", "accuracy of implicit reward"),
                       ("eval/kl", "KL(pi || pi_ref)")):
        value = next(row for row in shown.splitlines() if row.strip().startswith(line))
        assert float(value.strip()[len(line):].split()[0]) == pytest.approx(last[name], rel=2e-3)
    trees = evaluate.held_out_trees({str(watched): flags}, None)[str(watched)]
    again, objective = measure_objective(model, reference, trees, 1024, Objective(
        METHODS[method], flags["beta"]), Compute())
    assert held_out_metrics(again, objective) == pytest.approx(
        {name: value for name, value in last.items() if name.startswith("eval/")}, rel=1e-5)


def test_two_ranks_measure_the_same_and_a_resumed_run_writes_each_row_once(
        tiny_model, pairs_file, tmp_path):
    flags = ("--method", "dpo", *FLAGS, "--eval_steps", "2")
    one, two = tmp_path / "one", tmp_path / "two"
    finish(tiny_model, pairs_file, one, *flags)
    finish(tiny_model, pairs_file, two, *flags, ranks=2)
    for row, other in zip(rows(one), rows(two), strict=True):
        assert row.pop("answers") == other.pop("answers")
        assert row == pytest.approx(other, rel=1e-3)
    before = rows(one)
    shutil.rmtree(one / "final")                     # it was killed after step 8, saved at step 6
    shown = finish(tiny_model, pairs_file, one, *flags)
    assert "continuing after step 6" in shown and rows(one) == before


def test_sharded_layers_are_measured_too(tiny_model, pairs_file, tmp_path):
    flags = ("--method", "dpo", *FLAGS[:2], "--max_steps", "2", "--eval_steps", "2")
    finish(tiny_model, pairs_file, tmp_path / "one", *flags)
    finish(tiny_model, pairs_file, tmp_path / "two", *flags, "--fsdp", ranks=2)
    (row,), (other,) = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert row.pop("answers") == other.pop("answers")
    assert row == pytest.approx(other, rel=1e-3)
