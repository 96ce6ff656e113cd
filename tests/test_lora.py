"""Adapters against tests/plain.py, the switch that makes the reference, merging."""
from dataclasses import replace

import pytest
import torch
from helpers_models import (ALL_LINEAR, LORA_CONFIG, ROW, adapted_model, base_model, hidden_of,
                            trained)
from plain import plain_hidden, plain_logps
from torch.testing import assert_close

from lora import (LoRALinear, add_lora, add_score_head, freeze_lora, linear_names, load_adapter,
                  lora_disabled, lora_layers, merge_lora, save_adapter, share_base, updated_layers)
from model import Linear, Llama
from packing import Tree, build_stream

TREE = Tree([1, 5, 7], [[3, 9, 2], [4, 2], [8, 8, 6, 2]], [1.0, 0.0, 0.5], [])


# ---- the adapter --------------------------------------------------------------------------------

def test_lora_linear_by_hand():
    # W = I, A = (1, 2), B = (3, 4)ᵀ, alpha / r = 2: x = (5, 6) gives A x = 17 and
    # (5, 6) + 2 · 17 · (3, 4) = (107, 142).
    base = Linear(2, 2)
    base.weight.data = torch.eye(2)
    layer = LoRALinear(base, r=1, alpha=2, dropout=0.0)
    layer.lora_A.data, layer.lora_B.data = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0]])
    assert layer(torch.tensor([[5.0, 6.0]])).tolist() == [[107.0, 142.0]]
    assert layer.weight is base.weight and not layer.weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_adapter_gives_the_base_exactly(dtype):
    # B = 0: before the first step policy and reference are the same function to the bit, so every
    # log-ratio starts at 0.
    before = hidden_of(base_model(dtype))
    model = add_lora(base_model(dtype), r=4, alpha=8, dropout=0.0, target_modules=ALL_LINEAR)
    assert torch.equal(hidden_of(model), before)
    with lora_disabled(model):
        assert torch.equal(hidden_of(model), before)


def test_initialisation_is_that_of_peft():
    # A uniform in ±1 / sqrt(in) (kaiming with a = sqrt 5): variance 1 / (3 in). B = 0. With A = 0
    # instead the update would start at zero too, but A would be trained first.
    torch.manual_seed(0)
    layer = LoRALinear(Linear(400, 30), r=50, alpha=16, dropout=0.0)
    assert layer.lora_A.shape == (50, 400) and layer.lora_B.shape == (30, 50)
    assert layer.lora_A.abs().max() <= 1 / 20 and layer.lora_A.abs().max() > 0.99 / 20
    assert_close(layer.lora_A.var().item(), 1 / 1200, rtol=0.03, atol=0)
    assert not layer.lora_B.any()
    assert layer.scaling == 16 / 50


def test_only_adapters_of_the_targets_are_trained():
    # Everything else is frozen: embedding, norms, head, and linear layers that are no target.
    model = add_lora(base_model(), r=2, alpha=4, dropout=0.0, target_modules=["k_proj", "up_proj"])
    assert trained(model) == {f"model.layers.{n}.{layer}.{part}" for n in (0, 1)
                              for layer in ("self_attn.k_proj", "mlp.up_proj")
                              for part in ("lora_A", "lora_B")}
    assert trained(add_lora(base_model())) == {
        f"model.layers.{n}.self_attn.{layer}.{part}" for n in (0, 1)
        for layer in ("q_proj", "v_proj") for part in ("lora_A", "lora_B")}


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ALL_LINEAR])
def test_forward_and_gradient_equal_the_plain_model(targets):
    # plain.py forms W + scaling B A and pads rows; here there are two thin products and a shared
    # prompt. Upstream gradients of both signs, as those of a preference loss.
    model = adapted_model(torch.float64, r=3, alpha=7, targets=targets, seed=2)
    weights = {name: t.clone().requires_grad_("lora" in name)
               for name, t in model.state_dict().items()}
    upstream = torch.tensor([1.0, -0.3, 0.05], dtype=torch.float64)
    examples = [(TREE.prompt_ids, ids) for ids in TREE.response_ids]
    expected = plain_logps(weights, LORA_CONFIG, examples, scaling=7 / 3)
    (expected * upstream).sum().backward()

    stream = build_stream([TREE])
    hidden = model(stream.input_ids, stream.position_ids, stream.segments)[stream.predict_from]
    per_token = (hidden @ model.lm_head.weight.T).log_softmax(-1).gather(1, stream.labels[:, None])
    logps = torch.zeros(3, dtype=torch.float64).index_add(0, stream.response_ids, per_token[:, 0])
    (logps * upstream).sum().backward()

    assert_close(logps, expected, rtol=0, atol=1e-9)
    parameters = dict(model.named_parameters())
    compared = 0
    for name, weight in weights.items():
        if weight.grad is not None:
            assert weight.grad.abs().max() > 1e-4              # or the comparison says nothing
            assert_close(parameters[name].grad, weight.grad, rtol=0, atol=1e-9)
            compared += 1
        else:
            assert parameters[name].grad is None
    assert compared == 2 * 2 * len(targets)


def test_gradient_of_a_new_adapter_reaches_b_only():
    # y = W x + s B A x: at B = 0 the gradient of A is s Bᵀ g xᵀ = 0 and that of B is not.
    model = add_lora(base_model(), r=2, alpha=4, dropout=0.0)
    model(ROW).sum().backward()
    for layer in lora_layers(model).values():
        assert not layer.lora_A.grad.any() and layer.lora_B.grad.any()


def test_bfloat16_base_keeps_float32_adapters_and_trains_them():
    # A step of 1e-5 on a weight of 0.05 is below bfloat16's resolution of 2e-4: adapters and their
    # gradients must be float32. bfloat16 products cost 0.2 of the gradient's norm here.
    model = adapted_model(torch.bfloat16, seed=3)
    exact = adapted_model(torch.float64, seed=3)
    exact.load_state_dict(model.state_dict())              # the rounded weights, in float64
    for m in (model, exact):
        hidden = m(ROW)
        assert hidden.dtype == m.lm_head.weight.dtype
        (hidden.double() ** 3).sum().backward()
    for name, layer in lora_layers(model).items():
        assert layer.weight.dtype == torch.bfloat16 and layer.weight.grad is None
        other = lora_layers(exact)[name]
        for p, truth in ((layer.lora_A, other.lora_A), (layer.lora_B, other.lora_B)):
            assert p.dtype == p.grad.dtype == torch.float32
            assert (p.grad.double() - truth.grad).norm() < 0.2 * truth.grad.norm()


# ---- the switch ---------------------------------------------------------------------------------

def test_lora_disabled_is_the_base_and_comes_back():
    # Inside: the base to the bit, and plain.py's model with scaling 0. After: the policy again.
    model = adapted_model(torch.float64)
    policy, base = hidden_of(model), hidden_of(base_model(torch.float64))
    assert (policy - base).norm() > 0.1 * base.norm()
    with lora_disabled(model) as reference:
        inside = hidden_of(reference)
    assert reference is model and torch.equal(inside, base)
    assert torch.equal(hidden_of(model), policy)
    plain = plain_hidden(model.state_dict(), LORA_CONFIG, [ROW.tolist()], scaling=0.0)[0]
    assert_close(inside, plain, rtol=0, atol=1e-9)


def test_lora_disabled_comes_back_after_an_exception():
    # A loop that catches an out-of-memory error of the reference pass and retries must not go on
    # with adapters that are off.
    model = adapted_model()
    policy = hidden_of(model)
    with pytest.raises(RuntimeError, match="out of memory"):
        with lora_disabled(model):
            raise RuntimeError("out of memory")
    assert torch.equal(hidden_of(model), policy)


def test_lora_disabled_nests():
    # The end of the inner block must not turn the adapters on inside the outer one.
    model = adapted_model()
    policy, base = hidden_of(model), hidden_of(base_model())
    with lora_disabled(model):
        with lora_disabled(model):
            assert torch.equal(hidden_of(model), base)
        assert torch.equal(hidden_of(model), base)
    assert torch.equal(hidden_of(model), policy)


def test_lora_disabled_leaves_a_single_disabled_adapter_off():
    # A layer that was off before stays off after.
    model = adapted_model()
    first = next(iter(lora_layers(model).values()))
    first.enabled = False
    with lora_disabled(model):
        pass
    assert [layer.enabled for layer in lora_layers(model).values()] == [False, True, True, True]


def test_no_gradient_reaches_adapters_that_are_off():
    # Even where gradients are computed: the base does not depend on them.
    model = adapted_model()
    model.requires_grad_(True)
    with lora_disabled(model):
        model(ROW).sum().backward()
    for layer in lora_layers(model).values():
        assert layer.lora_A.grad is None and layer.lora_B.grad is None


def test_dropout_only_in_training_mode_and_only_on_the_adapter():
    # p = 0.5: two passes in training mode differ. In evaluation mode, with p = 0 and with adapters
    # off nothing is dropped.
    model = adapted_model(dropout=0.5)
    without = hidden_of(adapted_model(dropout=0.0))
    torch.manual_seed(0)
    model.train()
    assert not torch.equal(hidden_of(model), hidden_of(model))
    with lora_disabled(model):
        assert torch.equal(hidden_of(model), hidden_of(base_model()))
    model.eval()
    assert torch.equal(hidden_of(model), without)
    assert torch.equal(hidden_of(adapted_model(dropout=0.0).train()), without)


def test_dropout_keeps_the_mean():
    # What is not dropped is divided by 1 - p: the mean of many draws is the layer without dropout.
    torch.manual_seed(0)
    layer = LoRALinear(Linear(16, 4), r=2, alpha=2, dropout=0.25)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.ones(1, 16)
    mean = layer.train()(x.expand(4000, 16)).mean(0)
    assert_close(mean, layer.eval()(x)[0], rtol=0, atol=0.05)


# ---- several models on one base -----------------------------------------------------------------

def storages(model):
    return {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes()
            for p in model.parameters()}


@pytest.mark.parametrize("tied", [False, True])
def test_models_that_share_a_base_hold_its_weights_once(tied):
    # Another model must cost the memory of its adapter only.
    model = Llama(replace(LORA_CONFIG, tie_word_embeddings=tied))
    base = storages(model)
    add_lora(model, 3, 6, 0.0)
    twin = share_base(model)
    assert storages(twin) == base and not trained(twin) and not lora_layers(twin)
    for name, p in twin.named_parameters():
        assert p.data_ptr() == model.get_parameter(name).data_ptr(), name
    assert (twin.lm_head.weight is twin.model.embed_tokens.weight) == tied
    add_lora(twin, 2, 4, 0.0, ["o_proj"])
    adapters = [p.nbytes for m in (model, twin) for p in m.parameters() if p.requires_grad]
    assert sum((storages(model) | storages(twin)).values()) == sum(base.values()) + sum(adapters)


def test_models_on_one_base_have_adapters_of_their_own():
    model = adapted_model()
    twin = share_base(model)
    with lora_disabled(model):
        assert torch.equal(hidden_of(twin), hidden_of(model))
    before = hidden_of(model)
    add_lora(twin, 2, 4, 0.0)
    for layer in lora_layers(twin).values():
        torch.nn.init.normal_(layer.lora_B)
    assert torch.equal(hidden_of(model), before) and not torch.equal(hidden_of(twin), before)
    with lora_disabled(twin):
        assert torch.equal(hidden_of(model), before)


# ---- refusals -----------------------------------------------------------------------------------

def test_targets_that_name_no_linear_layer_are_refused_by_name():
    # GPT-2's names on a Llama: the error lists all unknown names and those that exist; the model
    # stays as it was.
    model = base_model()
    with pytest.raises(ValueError) as error:
        add_lora(model, target_modules=["q_proj", "c_attn", "Wqkv"])
    unknown, known = str(error.value).split("; there are ")
    assert unknown == "no linear layer is called Wqkv, c_attn"
    assert set(ALL_LINEAR) <= set(known.split(", "))
    assert not lora_layers(model) and len(trained(model)) == len(list(model.parameters()))


def test_an_adapter_on_the_head_is_refused():
    # The step multiplies by lm_head.weight and never calls the head: an adapter there would be
    # trained, saved and loaded without any effect.
    with pytest.raises(ValueError, match="no linear layer is called lm_head"):
        add_lora(base_model(torch.float64), r=2, alpha=4, dropout=0.0, target_modules=["lm_head"])


def test_second_adapter_and_rank_zero_are_refused():
    # A second call would change nothing, so its rank would have no effect; r = 0 divides by zero.
    with pytest.raises(ValueError, match="the model has adapters"):
        add_lora(adapted_model())
    with pytest.raises(ValueError, match="r = 0 must be at least 1"):
        add_lora(base_model(), r=0)


# ---- merging ------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-6), (torch.float64, 1e-13)])
def test_merged_weights_equal_the_adapter(dtype, atol):
    # W + scaling B A: the outputs of the layers agree up to rounding, and the merged model is a
    # plain Llama with the base's tensor names.
    model = adapted_model(dtype, targets=ALL_LINEAR)
    generator = torch.Generator().manual_seed(4)
    before = {name: (layer, torch.randn(5, layer.weight.shape[1], generator=generator).to(dtype))
              for name, layer in lora_layers(model).items()}
    with torch.no_grad():
        outputs = {name: layer(x) for name, (layer, x) in before.items()}
        policy = hidden_of(model)
        assert merge_lora(model) is model
        for name, (_, x) in before.items():
            merged = model.get_submodule(name)(x)
            assert_close(merged, outputs[name], rtol=0, atol=atol * outputs[name].abs().max())
        assert (hidden_of(model) - policy).abs().max() <= 10 * atol * policy.abs().max()
    assert not lora_layers(model)
    assert list(model.state_dict()) == list(base_model().state_dict())
    assert {t.dtype for t in model.state_dict().values()} == {dtype}


def test_merge_is_formed_in_float32_for_a_bfloat16_base():
    # W = 1, scaling B A = 2 · 1.25 · 0.001 = 2.5e-3 in float32: the sum rounds to 1 (bfloat16
    # steps are 2^-7 = 7.8e-3), and 2 · 1.25 · 0.004 = 0.01 to 1 + 2^-7. The layer stays bfloat16.
    for b, expected in ((0.001, 1.0), (0.004, 1 + 2 ** -7)):
        model = torch.nn.Module()
        model.layer = Linear(1, 1).bfloat16()
        model.layer.weight.data.fill_(1)
        add_lora(model, r=1, alpha=2, dropout=0.0, target_modules=["layer"])
        model.layer.lora_A.data.fill_(1.25)
        model.layer.lora_B.data.fill_(b)
        merge_lora(model)
        assert model.layer.weight.dtype == torch.bfloat16
        assert model.layer.weight.item() == expected


def test_a_seed_gives_the_same_adapter_on_every_device(monkeypatch):
    # No other device is here: what is drawn lies on the CPU, whatever holds the base's weights.
    drawn, draw = [], torch.nn.init.kaiming_uniform_
    monkeypatch.setattr(torch.nn.init, "kaiming_uniform_",
                        lambda tensor, a: drawn.append(tensor.device.type) or draw(tensor, a=a))
    model = add_lora(base_model().to("meta"), r=2, alpha=4, dropout=0.0)
    assert set(drawn) == {"cpu"} and {p.device.type for p in model.parameters()} == {"meta"}


def test_updates_of_the_base_move_with_the_layer():
    # They are no parameters: .double() and .to(device) must reach them too.
    model = freeze_lora(adapted_model())
    before = hidden_of(model)
    layer = next(iter(updated_layers(model.double()).values()))
    assert {t.dtype for pair in layer.updates for t in pair[:2]} == {torch.float64}
    assert_close(hidden_of(model).float(), before.float())
    assert {t.device.type for pair in next(iter(updated_layers(model.to("meta")).values())).updates
            for t in pair[:2]} == {"meta"}
    again = add_lora(freeze_lora(adapted_model()), r=2, alpha=4, dropout=0.0).double()
    assert {t.dtype for pair in next(iter(lora_layers(again).values())).updates
            for t in pair[:2]} == {torch.float64}


def test_a_reward_models_head_is_trained_as_a_whole_and_gets_no_adapter(tmp_path):
    model = add_score_head(base_model())
    assert "score" not in linear_names(model)
    saved = add_score_head(add_lora(base_model(), r=2, alpha=4))
    save_adapter(saved, str(tmp_path))
    assert "score.weight" in trained(load_adapter(model, str(tmp_path)))
