"""The model against tests/plain.py; the tree rule."""
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from plain import plain_hidden, plain_log_probs, plain_logps, random_weights
from torch.testing import assert_close

import model as model_file
from attention import attention
from model import (
    Llama,
    LlamaConfig,
    RMSNorm,
    _SwiGLU,
    _UpcastLinear,
    linear,
    rotary_angles,
    rotate,
)
from step import frozen_copy, sequence_logps
from trees import Tree, build_stream

SHAPE = dict(vocab_size=29, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
             num_attention_heads=4, rms_norm_eps=1e-5, rope_theta=100.0)
CONFIGS = {
    "multi-head": LlamaConfig(**SHAPE),
    "grouped-query": LlamaConfig(**SHAPE, num_key_value_heads=2),
    "multi-query": LlamaConfig(**SHAPE, num_key_value_heads=1),
    "tied head": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "rope factor 2": LlamaConfig(**SHAPE, num_key_value_heads=2, rope_factor=2.0),
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
GQA = CONFIGS["grouped-query"]


def make_model(config, seed=0):
    """The project's model with plain.py's random weights, float64; and those weights."""
    weights = random_weights(config, seed)
    model = Llama(config).double()
    model.load_state_dict(weights)
    return model, weights


def random_tokens(length, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(SHAPE["vocab_size"], (length,), generator=generator).tolist()


def random_trees():
    """Five trees: none, one and many responses apart from each other, one of a single EOS."""
    sizes = [(5, [4, 1, 7]), (1, [3]), (8, [1]), (3, [2, 2, 2, 6]), (6, [9, 5])]
    trees, seed = [], 100
    for prompt_size, response_sizes in sizes:
        responses = [random_tokens(n - 1, seed + k) + [2] for k, n in enumerate(response_sizes)]
        trees.append(Tree([1] + random_tokens(prompt_size - 1, seed + 50), responses,
                          [1.0] * len(responses), []))
        seed += 100
    return trees


def stream_hidden(model, stream):
    with torch.no_grad():
        return model(stream.input_ids, stream.position_ids, stream.segments)


def stream_logps(model, stream):
    """Sum of log π of every response of a stream, from its scored positions: [R]."""
    logits = stream_hidden(model, stream)[stream.predict_from] @ model.lm_head.weight.T
    values = logits.log_softmax(-1)[torch.arange(len(stream.labels)), stream.labels]
    return torch.zeros(len(stream.scores), dtype=values.dtype).index_add(0, stream.response_ids,
                                                                         values.detach())


def bf16_normal(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def assert_rounded_once(value, truth):
    """value is truth rounded to bfloat16 (2^-8 relative), give or take float32 accumulation."""
    assert value.dtype == torch.bfloat16
    assert ((value.double() - truth).abs() <= 2 ** -8 * truth.abs() + 1e-5).all()


# ---- against the plain forward ------------------------------------------------------------------

@each_config
def test_hidden_and_logits_equal_the_plain_forward(config):
    # Lengths 1, 2 and 17, right-padded there and one at a time here. Catches a wrong rotary
    # pairing, head order, mask, scale, norm or residual.
    model, weights = make_model(config)
    rows = [random_tokens(n, seed=n) for n in (1, 2, 17)]
    hidden = plain_hidden(weights, config, rows)
    log_probs = plain_log_probs(weights, config, rows)
    for b, row in enumerate(rows):
        with torch.no_grad():
            ours = model(torch.tensor(row))                                      # [T, D]
        assert ours.dtype == torch.float64
        assert_close(ours, hidden[b, :len(row)], rtol=0, atol=1e-9)
        logits = ours @ model.lm_head.weight.T
        assert_close(logits.log_softmax(-1), log_probs[b, :len(row)], rtol=0, atol=1e-9)


@each_config
def test_gradient_of_every_weight_equals_the_plain_forward(config):
    # Full fine-tuning: Σ of three responses' log-probs, differentiated by all weights. A tied
    # embedding has the gradient of both its uses.
    model, weights = make_model(config, seed=1)
    weights = {name: t.clone().requires_grad_() for name, t in weights.items()
               if not (config.tie_word_embeddings and name == "lm_head.weight")}
    tree = random_trees()[0]
    examples = [(tree.prompt_ids, ids) for ids in tree.response_ids]
    plain_logps(weights, config, examples).sum().backward()
    stream = build_stream([tree])
    hidden = model(stream.input_ids, stream.position_ids, stream.segments)
    logits = hidden[stream.predict_from] @ model.lm_head.weight.T
    logits.log_softmax(-1).gather(1, stream.labels[:, None]).sum().backward()
    parameters = dict(model.named_parameters())
    assert set(parameters) == set(weights)
    for name, weight in weights.items():
        assert_close(parameters[name].grad, weight.grad, rtol=0, atol=1e-9)


def test_float32_and_bfloat16_stay_near_float64():
    # Relative rounding 2^-24 and 2^-8 through two layers: about 1e-6 and 1e-2 of the norm. A cast
    # that drops the position (cos of position 4096 in bfloat16 angles) would be off by all of it.
    model, _ = make_model(GQA)
    input_ids, position_ids = torch.tensor(random_tokens(20, seed=5)), torch.arange(4000, 4020)
    with torch.no_grad():
        truth = model(input_ids, position_ids)
        single = model.float()(input_ids, position_ids)
        half = model.bfloat16()(input_ids, position_ids)
    assert single.dtype == torch.float32 and half.dtype == torch.bfloat16
    assert (single - truth).norm() < 3e-6 * truth.norm()
    assert (half - truth).norm() < 5e-2 * truth.norm()


def test_rms_norm_by_hand_and_in_float32():
    # (3, 4): mean square 25/2, so 3 / sqrt(25/2 + eps) and 4 / …; gain (1, 2).
    norm = RMSNorm(2, eps=0.0)
    norm.weight.data = torch.tensor([1.0, 2.0])
    rms = math.sqrt(12.5)
    assert_close(norm(torch.tensor([[3.0, 4.0]])), torch.tensor([[3 / rms, 8 / rms]]))
    # A zero row is 0 / sqrt(eps), not 0 / 0.
    assert RMSNorm(2, eps=1e-5)(torch.zeros(1, 2)).tolist() == [[0.0, 0.0]]
    # bfloat16 rows are rounded once, at the end: a mean or a root in bfloat16 would add 2^-8 each.
    x = bf16_normal(50, 64, seed=0)
    truth = x.double() / (x.double() ** 2).mean(-1, keepdim=True).sqrt()
    assert_rounded_once(RMSNorm(64, eps=0.0).bfloat16()(x), truth)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_swiglu_has_the_bits_of_autograd_and_keeps_its_two_inputs_only(dtype):
    generator = torch.Generator().manual_seed(3)
    gate, up, grad = (4 * torch.randn(7, 40, generator=generator).to(dtype) for _ in range(3))
    gate[0, :4] = torch.tensor([0.0, 30.0, -30.0, -100.0])
    copies, kept = [t.clone() for t in (gate, up, grad)], []
    inputs = gate.requires_grad_(), up.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        found = _SwiGLU.apply(*inputs)
    assert [t.data_ptr() for t in kept] == [t.data_ptr() for t in inputs]
    plain = F.silu(gate) * up
    assert torch.equal(found, plain)
    for mine, wanted in zip(torch.autograd.grad(found, inputs, grad),
                            torch.autograd.grad(plain, inputs, grad)):
        assert torch.equal(mine, wanted)
    assert all(torch.equal(t, copy) for t, copy in zip((*inputs, grad), copies))
    if dtype == torch.float64:
        assert torch.autograd.gradcheck(_SwiGLU.apply, inputs)


def test_rotary_angles_by_hand():
    # Dh = 4, theta = 100: frequencies 1 and 100^(-2/4) = 1/10. Position 4095: float32 angles are
    # off by up to 2^-13 = 1.2e-4. Factor 4 reads position 4 where 1 was.
    cos, sin = rotary_angles(torch.tensor([0, 3, 4095]), head_dim=4, theta=100.0)
    for t, position in enumerate((0, 3, 4095)):
        for i, frequency in enumerate((1.0, 0.1)):
            assert abs(cos[t, i].item() - math.cos(position * frequency)) < 1e-12
            assert abs(sin[t, i].item() - math.sin(position * frequency)) < 1e-12
    slow = rotary_angles(torch.tensor([4]), 4, 100.0, factor=4.0)
    assert_close(slow, rotary_angles(torch.tensor([1]), 4, 100.0), rtol=0, atol=1e-15)


def test_rotate_pairs_the_halves():
    # A quarter turn takes (x_i, x_{i+2}) to (-x_{i+2}, x_i): (1, 2, 3, 4) -> (-3, -4, 1, 2). Meta's
    # pairing of neighbours would give (-2, 1, -4, 3).
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
    turned = rotate(x, torch.zeros(1, 1, 2), torch.ones(1, 1, 2))
    assert turned.tolist() == [[[-3.0, -4.0, 1.0, 2.0]]]


def test_tensor_names_are_those_of_hugging_face():
    # LlamaForCausalLM's state dict for one layer, in full: a renamed module loads nothing.
    config = LlamaConfig(**(SHAPE | {"num_hidden_layers": 1}))
    layer = "model.layers.0."
    assert sorted(Llama(config).state_dict()) == sorted([
        "model.embed_tokens.weight",
        layer + "self_attn.q_proj.weight", layer + "self_attn.k_proj.weight",
        layer + "self_attn.v_proj.weight", layer + "self_attn.o_proj.weight",
        layer + "mlp.gate_proj.weight", layer + "mlp.up_proj.weight",
        layer + "mlp.down_proj.weight",
        layer + "input_layernorm.weight", layer + "post_attention_layernorm.weight",
        "model.norm.weight", "lm_head.weight"])


def test_grouped_query_repeats_each_key_for_neighbouring_queries():
    # Two kv heads, four q heads: q heads 0, 1 read kv 0 and 2, 3 read kv 1. Tiling instead of
    # interleaving (0, 1, 0, 1) loads the checkpoint without complaint and computes another model.
    v = torch.tensor([10.0, 20.0]).view(1, 2, 1).expand(1, 2, 2)
    q, k = torch.ones(1, 4, 2), torch.ones(1, 2, 2)
    mixed = attention(q, k, v)
    assert mixed[0, :, 0].tolist() == [10.0, 10.0, 20.0, 20.0]


# ---- the tree rule ------------------------------------------------------------------------------

@each_config
def test_packed_stream_equals_each_response_alone(config):
    # Packing and prompt sharing are exact: the stream of five trees gives, for every response, the
    # log-prob of its own padded row prompt + response.
    model, weights = make_model(config, seed=2)
    trees = random_trees()
    packed = stream_logps(model, build_stream(trees))
    examples = [(tree.prompt_ids, ids) for tree in trees for ids in tree.response_ids]
    assert_close(packed, plain_logps(weights, config, examples), rtol=0, atol=1e-9)
    alone = torch.cat([stream_logps(model, build_stream([Tree(prompt, [ids], [1.0], [])]))
                       for prompt, ids in examples])
    assert_close(packed, alone, rtol=0, atol=1e-12)


def test_left_out_responses_keep_their_number():
    # The reference stream holds only the responses asked for (`wanted`): the others get 0, the
    # rest is unchanged, so the two vectors line up.
    model, _ = make_model(GQA)
    trees = [Tree(tree.prompt_ids, tree.response_ids,
                  [float(k % 2) for k in range(len(tree.scores))], []) for tree in random_trees()]
    stream = build_stream(trees)
    part = build_stream(trees, wanted=lambda score: score < 1)
    assert len(part.input_ids) < len(stream.input_ids)
    expected = torch.where(stream.scores < 1, stream_logps(model, stream), 0.0)
    assert_close(stream_logps(model, part), expected, rtol=0, atol=1e-12)


def test_a_changed_token_is_seen_only_by_later_tokens_of_its_response():
    # The middle token of response 1 of tree 3 changes: not one bit of its siblings, of its own
    # earlier tokens or of the other trees may move; its own later tokens must.
    model, _ = make_model(GQA, seed=3)
    trees = random_trees()
    stream = build_stream(trees)
    mine = (stream.tree_ids == 4) & (stream.branch_ids == 1)
    places = mine.nonzero()[:, 0]
    changed = stream.input_ids.clone()
    changed[places[3]] = (changed[places[3]] + 1) % SHAPE["vocab_size"]
    before = stream_hidden(model, stream)
    with torch.no_grad():
        after = model(changed, stream.position_ids, stream.segments)
    moved = (before != after).any(-1)
    later = torch.zeros_like(moved)
    later[places[3:]] = True
    assert torch.equal(moved, later)


def test_a_changed_prompt_token_is_seen_by_all_of_its_tree_and_no_other():
    # Token 2 of tree 0's prompt: the prompt from there on and all three responses move.
    model, _ = make_model(GQA, seed=4)
    stream = build_stream(random_trees())
    changed = stream.input_ids.clone()
    changed[2] = (changed[2] + 1) % SHAPE["vocab_size"]
    with torch.no_grad():
        after = model(changed, stream.position_ids, stream.segments)
    moved = (stream_hidden(model, stream) != after).any(-1)
    expected = stream.tree_ids == 0
    expected[:2] = False
    assert torch.equal(moved, expected)


# ---- the reference when all weights are trained -------------------------------------------------

def test_reference_keeps_its_own_head_when_the_head_is_trained():
    # Full fine-tuning: policy and reference are two models with two heads. One step on the head
    # alone must move log π and leave log π_ref where plain.py has it.
    reference, weights = make_model(GQA)
    policy, _ = make_model(GQA)
    moved = weights | {"lm_head.weight": weights["lm_head.weight"].flip(0)}
    policy.load_state_dict(moved)
    trees = random_trees()
    stream = build_stream(trees)
    policy_logps, reference_logps = sequence_logps(policy, partial(frozen_copy, reference), stream,
                                                   stream)
    examples = [(tree.prompt_ids, ids) for tree in trees for ids in tree.response_ids]
    assert_close(policy_logps.detach(), plain_logps(moved, GQA, examples), rtol=0, atol=1e-9)
    assert_close(reference_logps, plain_logps(weights, GQA, examples), rtol=0, atol=1e-9)


# ---- bfloat16 products on CPUs without bfloat16 units -------------------------------------------

@pytest.mark.parametrize("x_learns, weight_learns", [(True, False), (False, True), (True, True)])
def test_upcast_linear_and_its_backward_round_once(x_learns, weight_learns):
    # Against float64 products of the same bfloat16 numbers; called directly, so that a CPU with
    # bfloat16 units tests it too. The backward must follow y = x Wᵀ: grad W and gradᵀ x.
    x, weight, upstream = (bf16_normal(7, 33, seed=0), bf16_normal(5, 33, seed=1),
                           bf16_normal(7, 5, seed=2))
    x.requires_grad_(x_learns)
    weight.requires_grad_(weight_learns)
    y = _UpcastLinear.apply(x, weight)
    assert_rounded_once(y, x.double() @ weight.double().T)
    y.backward(upstream)
    if x_learns:
        assert_rounded_once(x.grad, upstream.double() @ weight.detach().double())
    if weight_learns:
        assert_rounded_once(weight.grad, upstream.double().T @ x.detach().double())
    assert (x.grad is None) == (not x_learns) and (weight.grad is None) == (not weight_learns)


def test_upcast_linear_keeps_no_float32_copy():
    # A frozen bfloat16 7B model has 13 GB of weights: a saved float32 copy would be 26 GB more.
    # With the weight frozen the input is not kept either.
    x, weight = bf16_normal(7, 33, seed=0).requires_grad_(), bf16_normal(5, 33, seed=1)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        _UpcastLinear.apply(x, weight)
    assert [t.data_ptr() for t in kept] == [weight.data_ptr()]
    assert kept[0].dtype == torch.bfloat16


@pytest.mark.parametrize("has_units", [False, True])
def test_linear_gives_the_same_with_and_without_bf16_units(monkeypatch, has_units):
    # `linear` picks by CPU: both ways must be one rounding from the float64 product, and the
    # float32 detour is taken without units only.
    monkeypatch.setattr(model_file, "cpu_multiplies_bf16", lambda: has_units)
    x, weight = bf16_normal(7, 33, seed=0).requires_grad_(), bf16_normal(5, 33, seed=1)
    y = linear(x, weight)
    assert ("Upcast" in type(y.grad_fn).__name__) != has_units
    assert_rounded_once(y, x.double() @ weight.double().T)
    assert_close(linear(x.float(), weight.float()), x.float() @ weight.float().T)
