"""The check before a run's first step: it passes what is right, and names what is wrong.

It runs here on a CPU, where all functions are plain torch; each is broken in turn.
"""
import json
import math
import re

import conftest
import pytest
import torch
from attention_rule import plain_attention, rule_mask
from helpers import finish, make_model, make_trees, usable

import generate
from files.cli import run_cli
from kernels import linear_logps
from kernels.attention import attention
from packing import Tree, build_stream, pack
from step import METHODS, Compute
from training import start_check
from training.output import changed_flags
from training.start_check import check_start

start_check_plain = start_check.plain_attention
PARTS = ["RMSNorm", "rotary", "SwiGLU", "LoRA", "attention", "log-probs"]
BREAKS = {      # a function of the file: what it returns, made wrong; which part the message names
    "attention": (lambda out: out * 1.2, "attention .dense, layer 1."),
    "rms_norm": (lambda outs: (outs[0], outs[1] * 1.2), "RMSNorm"),
    "rotary": (lambda outs: (outs[0], -outs[1]), "the rotary embedding"),
    "swiglu": (lambda out: out.detach() + 0 * out, "SwiGLU .*: the gradient of input 1"),
    "lora_linear": (lambda out: out.masked_fill(out < -0.1, math.nan), "LoRA"),
}


def check(method="ulma", dtype=torch.float32, score_head=False, **changes):
    model = make_model(dtype=dtype, score_head=score_head)
    trees = usable(make_trees(), METHODS[method].trains_on)
    return check_start(model, trees, Compute(micro_tokens=60, **changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_right_passes_and_every_part_is_measured(dtype):
    errors = check("dpo", dtype)
    assert list(errors) == PARTS
    most = 1e-6 if dtype == torch.float32 else 0.02
    assert all(0 <= error < most for error in errors.values())
    assert errors["attention"] > 0 and errors["log-probs"] > 0


def test_a_reward_model_has_no_head_to_check():
    assert "log-probs" not in check("reward_model", score_head=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BREAKS)
def test_each_function_that_is_wrong_is_refused_by_name(name, dtype, monkeypatch):
    spoil, message = BREAKS[name]
    function = getattr(start_check, name)
    monkeypatch.setattr(start_check, name, lambda *arguments: spoil(function(*arguments)))
    with pytest.raises(ValueError, match=f"^{message}.* off by .*nothing was run"):
        check(dtype=dtype)


@pytest.mark.parametrize("wrong", ["policy", "reference", "gradient"])
def test_a_wrong_head_is_refused(wrong):
    def broken(hidden, *arguments):
        found = linear_logps(hidden, *arguments)
        if wrong == "gradient":        # right values, and a gradient of half the size
            half = found.policy_logps / 2
            return found._replace(policy_logps=half + half.detach())
        name = f"{wrong}_logps"
        return found._replace(**{name: getattr(found, name) * 1.01})
    part = {"policy": "output 1", "reference": "output 2", "gradient": "the gradient of input 1"}
    with pytest.raises(ValueError, match=f"^log-probs of the head .*: {part[wrong]} is off"):
        check(linear_logps=broken)


def test_a_wrong_mask_is_refused(monkeypatch):
    # Responses that see each other: what a forgotten branch_ids gives.
    def forgetful(q, k, v, segments):
        for strips in segments.blocks:
            for mask in strips:
                mask |= torch.ones_like(mask).tril(mask.shape[1] - len(mask))
        return attention(q, k, v, segments)
    monkeypatch.setattr(start_check, "attention", forgetful)
    with pytest.raises(ValueError, match="^attention .*off by"):
        check()


def test_what_all_keys_have_in_common_is_not_counted(monkeypatch):
    # Every fused backward reads the rounded output, and is off by that rounding times what the keys
    # share. Here all tokens share a vector, as in the deep layers of a random model: dq as it is would
    # be off by 0.032, allowed are 0.030.
    class Fused(torch.autograd.Function):
        @staticmethod
        @torch.enable_grad()
        def forward(ctx, q, k, v, mask):
            out = plain_attention(q, k, v, q, mask, torch.float32)[0].to(q)
            ctx.save_for_backward(q, k, v, mask, out)
            return out

        @staticmethod
        @torch.enable_grad()
        def backward(ctx, upstream):
            q, k, v, mask, out = ctx.saved_tensors
            exact, *gradients = plain_attention(q, k, v, upstream, mask, torch.float32)
            rounding = (upstream.float() * (out.float() - exact)).sum(-1, keepdim=True)  # [T, H, 1]
            common = plain_attention(q, k, k, upstream, mask, torch.float32)[0]
            gradients[0] = gradients[0] - rounding * common * q.shape[2] ** -0.5
            return *(gradient.to(q) for gradient in gradients), None

    model = make_model(torch.float32)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(10).add_(
            torch.randn(32, generator=torch.Generator().manual_seed(3)))
    trees = usable(make_trees(), "all")
    ids = build_stream(pack(trees, 60)[0])
    mask = rule_mask(ids.tree_ids.tolist(), ids.branch_ids.tolist())
    monkeypatch.setattr(start_check, "attention", lambda q, k, v, _: Fused.apply(q, k, v, mask))
    assert check_start(model.bfloat16(), trees, Compute(micro_tokens=60))["attention"] < 0.02
    # Half of a gradient is refused as ever.
    monkeypatch.setattr(start_check, "attention", lambda q, k, v, _: Fused.apply(
        q / 2 + q.detach() / 2, k, v, mask))
    with pytest.raises(ValueError, match="^attention .*the gradient of input 1 is off by"):
        check_start(model, trees, Compute(micro_tokens=60))


def test_nan_in_a_gradient_of_any_layer_is_refused(monkeypatch):
    # As cuDNN's backward with a mask gives it. Of four layers the second is not compared.
    calls, layers = [], make_model().model.layers

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q):
            return q.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * math.nan

    def broken(q, k, v, segments):
        calls.append(q)
        return attention(Broken.apply(q) if len(calls) == 4 else q, k, v, segments)
    model = make_model(torch.float32)
    model.model.layers.extend(layers.float())
    monkeypatch.setattr(start_check, "attention", broken)
    with pytest.raises(ValueError, match="^attention .dense, layer 2. .*not finite"):
        check_start(model, make_trees(), Compute(micro_tokens=60))


@pytest.mark.parametrize("right", [True, False])
def test_a_run_is_checked_before_anything_is_written(right, tmp_path, tiny_model, pairs_file,
                                                     monkeypatch, capsys):
    # On a GPU; here a CPU counts as one. A resumed run is checked again, and its figures may differ.
    monkeypatch.setattr(start_check, "CHECKED_DEVICES", ("cpu",))
    out = tmp_path / "run"
    if not right:
        monkeypatch.setattr(start_check, "swiglu", lambda gate, up: gate * up)
        with pytest.raises(SystemExit) as ended:
            run_cli(lambda: finish(tiny_model, pairs_file, out, "--max_steps", "2"))
        assert ended.value.code == 2 and "error: SwiGLU is wrong on" in capsys.readouterr().err
        assert not (out / "args.json").exists()
        return
    shown = finish(tiny_model, pairs_file, out, "--max_steps", "2")
    assert re.search(r"^checked against plain torch, relative errors: RMSNorm \d", shown, re.M)
    flags = json.loads((out / "args.json").read_text())
    assert list(flags["start_check"]) == PARTS
    flags["start_check"]["attention"] *= 1.01
    assert changed_flags(str(out / "args.json"), flags) == ("", "")


def test_ppo_is_checked_as_train_is(tmp_path, tiny_model, pairs_file, monkeypatch):
    monkeypatch.setattr(start_check, "CHECKED_DEVICES", ("cpu",))
    finish(tiny_model, pairs_file, tmp_path / "reward", "--method", "reward_model",
           "--max_steps", "1")
    shown = conftest.finish("rlhf.ppo", "--reward_model", tmp_path / "reward", "--output_dir",
                            tmp_path / "ppo", "--batch_size", "2", "--max_steps", "1",
                            "--max_new_tokens", "4")
    assert "checked against plain torch, relative errors: RMSNorm" in shown
    flags = json.loads((tmp_path / "ppo/args.json").read_text())
    assert list(flags["start_check"]) == PARTS


def test_generate_is_checked_before_it_answers(tiny_model, monkeypatch, capsys):
    monkeypatch.setattr(start_check, "CHECKED_DEVICES", ("cpu",))
    flags = ["--model", tiny_model, "--prompt", "Why?", "--max_new_tokens", "3"]
    run_cli(lambda: generate.main(flags))
    assert capsys.readouterr().out
    monkeypatch.setattr(start_check, "rotary", lambda q, k, cos, sin: (q, k))
    with pytest.raises(SystemExit) as ended:
        run_cli(lambda: generate.main(flags))
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and not out and "error: the rotary embedding is wrong on" in err


def test_the_oracle_itself_follows_the_rule():
    # Against attention by a mask that is made one pair of positions at a time; grouped queries.
    stream = build_stream(make_trees(4))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(len(stream.input_ids), heads, 8, generator=generator).double()
               for heads in (4, 2, 2))
    mask = rule_mask(stream.tree_ids.tolist(), stream.branch_ids.tolist())
    expected = plain_attention(q, k, v, torch.zeros_like(q), mask)[0]
    torch.testing.assert_close(start_check.plain_attention(q, k, v, stream), expected.detach())


def test_a_tree_too_long_for_one_head_is_compared_in_part(monkeypatch):
    # 2 query heads share one of k: with room for 2 · 12² scores trees are cut to 12 tokens.
    sizes = []
    monkeypatch.setattr(start_check, "SCORES", 2 * 12 ** 2)
    monkeypatch.setattr(start_check, "plain_attention", lambda q, *rest: sizes.append(len(q)) or
                        start_check_plain(q, *rest))
    assert list(check("dpo")) == PARTS and 0 < max(sizes) <= 12
    tree = Tree(list(range(9)), [[1, 2, 3], [4, 5], [6]], [1.0, 0.0, 0.0], [(0, 1)])
    assert start_check.shortened(tree, 10) == Tree(list(range(5)), [[1, 2, 3], [4, 5]], [1.0, 0.0], [])
    assert start_check.shortened(tree, 6).response_ids == [[1, 2, 3]]


def test_large_trees_are_compared_in_some_heads(monkeypatch):
    # Room for the scores of one of the two heads of k: the two query heads that share it.
    heads, group = [], pack(usable(make_trees(), "all"), 60)[0]
    monkeypatch.setattr(start_check, "SCORES", 2 * sum(tree.num_tokens ** 2 for tree in group))
    monkeypatch.setattr(start_check, "plain_attention", lambda q, *rest: heads.append(q.shape[1]) or
                        start_check_plain(q, *rest))
    assert 0 < check()["attention"] < 1e-6 and set(heads) == {2}
