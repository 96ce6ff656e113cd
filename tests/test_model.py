"""The model against tests/plain.py, and the tree rule: who sees whom in a stream."""
import math
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from helpers import GQA, SHAPE, each_config, make_llama, random_tokens, random_trees
from plain import plain_hidden, plain_log_probs, plain_logps
from torch.testing import assert_close

from files.config import Llama3Rope, LlamaConfig
from kernels.attention import attention
from model import Llama, RMSNorm, rotary_angles
from packing import Tree, build_stream
from step import Compute, sequence_logps, tree_logps


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
    # Lengths 1, 2 and 17; plain.py pads them on the right, here each is alone. Finds a wrong rotary
    # pairing, head order, mask, scale, norm or residual.
    model, weights = make_llama(config)
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
    # Full fine-tuning: the gradient of the sum of three responses' log-probs. A tied embedding has
    # the sum of the gradients of its two uses.
    model, weights = make_llama(config, seed=1)
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
    # Relative rounding errors of 2^-24 and 2^-8 through two layers: about 1e-6 and 1e-2 of the
    # norm. Angles of position 4000 in bfloat16 would be wrong altogether.
    model, _ = make_llama(GQA)
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
    assert_close(norm(torch.tensor([[3.0, 4.0]]))[1], torch.tensor([[3 / rms, 8 / rms]]))
    # A row of zeros is 0 / sqrt(eps), not 0 / 0.
    assert RMSNorm(2, eps=1e-5)(torch.zeros(1, 2))[1].tolist() == [[0.0, 0.0]]
    # bfloat16 rows are rounded once, at the end: a mean or a root in bfloat16 would add 2^-8 each.
    x = bf16_normal(50, 64, seed=0)
    truth = x.double() / (x.double() ** 2).mean(-1, keepdim=True).sqrt()
    assert_rounded_once(RMSNorm(64, eps=0.0).bfloat16()(x)[1], truth)


def test_rotary_angles_by_hand():
    # Dh = 4, theta = 100: frequencies 1 and 100^(-2/4) = 1/10. Position 4095: float32 angles are
    # off by up to 2^-13 = 1.2e-4. With factor 4 position 4 has the angles of position 1.
    cos, sin = rotary_angles(torch.tensor([0, 3, 4095]), head_dim=4, theta=100.0)
    for t, position in enumerate((0, 3, 4095)):
        for i, frequency in enumerate((1.0, 0.1)):
            assert abs(cos[t, i].item() - math.cos(position * frequency)) < 1e-12
            assert abs(sin[t, i].item() - math.sin(position * frequency)) < 1e-12
    slow = rotary_angles(torch.tensor([4]), 4, 100.0, factor=4.0)
    assert_close(slow, rotary_angles(torch.tensor([1]), 4, 100.0), rtol=0, atol=1e-15)


def test_llama_3_stretches_slow_frequencies_by_hand():
    # Dh 8, theta 10⁴: frequencies 1, 0.1, 0.01, 0.001. In a context of 300 they turn 47.7, 4.77,
    # 0.477 and 0.0477 times: above 8 as it is, below 0.4 divided by 2; 4.77 is 0.5756 of the way
    # from 0.4 to 8, 0.477 is 0.0102 of it.
    rope = Llama3Rope(2.0, 0.4, 8.0, 300)
    cos, sin = rotary_angles(torch.tensor([1]), 8, 1e4, llama3=rope)
    shares = [(300 * f / (2 * math.pi) - 0.4) / 7.6 for f in (0.1, 0.01)]
    expected = [1.0, 0.1 * (shares[0] + (1 - shares[0]) / 2),
                0.01 * (shares[1] + (1 - shares[1]) / 2), 0.0005]
    assert_close(torch.atan2(sin, cos)[0], torch.tensor(expected, dtype=torch.float64),
                 rtol=0, atol=1e-12)
    assert shares == pytest.approx([0.5756, 0.0102], abs=1e-4)


def test_tensor_names_are_those_of_hugging_face():
    # The whole state dict of LlamaForCausalLM with one layer.
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
    # Two kv heads, four q heads: q heads 0, 1 read kv 0 and 2, 3 read kv 1. In the order 0, 1, 0, 1
    # the checkpoint would load without an error and compute another model.
    v = torch.tensor([10.0, 20.0]).view(1, 2, 1).expand(1, 2, 2)
    q, k = torch.ones(1, 4, 2), torch.ones(1, 2, 2)
    mixed = attention(q, k, v)
    assert mixed[0, :, 0].tolist() == [10.0, 10.0, 20.0, 20.0]


# ---- the tree rule ------------------------------------------------------------------------------

@each_config
def test_packed_stream_equals_each_response_alone(config):
    # Packing and prompt sharing are exact: every response in the stream of five trees has the
    # log-prob of its own row, prompt + response.
    model, weights = make_llama(config, seed=2)
    trees = random_trees()
    packed = stream_logps(model, build_stream(trees))
    examples = [(tree.prompt_ids, ids) for tree in trees for ids in tree.response_ids]
    assert_close(packed, plain_logps(weights, config, examples), rtol=0, atol=1e-9)
    alone = torch.cat([stream_logps(model, build_stream([Tree(prompt, [ids], [1.0], [])]))
                       for prompt, ids in examples])
    assert_close(packed, alone, rtol=0, atol=1e-12)


def test_left_out_responses_keep_their_number():
    # The reference stream holds the wanted responses only: the others get 0, so that the two
    # vectors line up.
    model, _ = make_llama(GQA)
    trees = [Tree(tree.prompt_ids, tree.response_ids,
                  [float(k % 2) for k in range(len(tree.scores))], []) for tree in random_trees()]
    stream = build_stream(trees)
    part = build_stream(trees, wanted=lambda score: score < 1)
    assert len(part.input_ids) < len(stream.input_ids)
    expected = torch.where(stream.scores < 1, stream_logps(model, stream), 0.0)
    assert_close(stream_logps(model, part), expected, rtol=0, atol=1e-12)


def test_a_changed_token_is_seen_only_by_later_tokens_of_its_response():
    # A token in the middle of the last tree's first response changes. Hidden states of the other
    # responses, of other trees and of earlier tokens stay to the bit, those of later tokens do not.
    model, _ = make_llama(GQA, seed=3)
    trees = random_trees()
    stream = build_stream(trees)
    mine = (stream.tree_ids == 4) & (stream.branch_ids == 1)
    places = mine.nonzero()[:, 0]
    changed = stream.input_ids.clone()
    changed[places[3]] = (changed[places[3]] + 1) % SHAPE["vocab_size"]
    before = stream_hidden(model, stream)
    with torch.no_grad():
        after = model(changed, stream.position_ids, stream.segments)
    changes = (before != after).any(-1)
    later = torch.zeros_like(changes)
    later[places[3:]] = True
    assert torch.equal(changes, later)


def test_a_changed_prompt_token_is_seen_by_all_of_its_tree_and_no_other():
    # Token 2 of tree 0's prompt: the prompt from there on and all three responses change.
    model, _ = make_llama(GQA, seed=4)
    stream = build_stream(random_trees())
    changed = stream.input_ids.clone()
    changed[2] = (changed[2] + 1) % SHAPE["vocab_size"]
    with torch.no_grad():
        after = model(changed, stream.position_ids, stream.segments)
    changes = (stream_hidden(model, stream) != after).any(-1)
    expected = stream.tree_ids == 0
    expected[:2] = False
    assert torch.equal(changes, expected)


# ---- the reference when all weights are trained -------------------------------------------------

def test_policy_and_reference_each_use_their_own_head():
    # Full fine-tuning: two models, π_ref's log-probs are cached. Another head of the policy must
    # change log π and not log π_ref.
    reference, weights = make_llama(GQA)
    policy, _ = make_llama(GQA)
    moved = weights | {"lm_head.weight": weights["lm_head.weight"].flip(0)}
    policy.load_state_dict(moved)
    trees = random_trees()
    examples = [(tree.prompt_ids, ids) for tree in trees for ids in tree.response_ids]
    logps = sequence_logps(policy, build_stream(trees)).detach()
    assert_close(logps, plain_logps(moved, GQA, examples), rtol=0, atol=1e-9)
    cached = tree_logps(partial(nullcontext, reference), trees, lambda score: True, False,
                             Compute())
    assert_close(torch.tensor(sum(cached, []), dtype=torch.float64),
                 plain_logps(weights, GQA, examples), rtol=0, atol=1e-9)
