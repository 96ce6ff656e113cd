"""Three ways of attention under one rule: dense blocks, varlen segments, FlexAttention."""
from itertools import pairwise

import pytest
import torch
from test_model import GQA, make_model, random_trees
from torch.testing import assert_close

import attention as attention_file
from attention import attention, attention_segments, choose_attention
from model import compile_layers
from trees import build_stream


def rule(tree_ids, branch_ids):
    """The sentence at the top of attention.py, one pair of positions at a time."""
    size = len(tree_ids)
    mask = torch.zeros(size, size, dtype=torch.bool)
    for i in range(size):
        for j in range(i + 1):
            mask[i, j] = (tree_ids[i] == tree_ids[j]
                          and branch_ids[j] in (0, branch_ids[i]))
    return mask


def whole_mask(segments):
    """Dense blocks and their strips put back into one [T, T] mask; outside them nothing is seen."""
    sizes = [masks[-1].shape[1] for masks in segments.blocks]
    whole, row, start = torch.zeros(sum(sizes), sum(sizes), dtype=torch.bool), 0, 0
    for masks, size in zip(segments.blocks, sizes):
        for mask in masks:
            assert mask.dtype == torch.bool and start + mask.shape[1] == row + len(mask)
            whole[row:row + len(mask), start:start + mask.shape[1]] = mask
            row += len(mask)
        start += size
    return whole


def varlen_by_hand(q, k, v, queries_until, keys_until, max_q, max_k, *, window_size):
    """What torch documents of varlen_attn: segments of queries and keys, end to end; with window
    (-1, 0), query i of n sees key j of m iff j <= i + m - n (causal from the bottom right)."""
    assert window_size == (-1, 0) and queries_until.dtype == keys_until.dtype == torch.int32
    outputs = []
    for (a, b), (c, d) in zip(pairwise(queries_until.tolist()), pairwise(keys_until.tolist())):
        assert 0 < b - a <= max_q and 0 < d - c <= max_k
        sees = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - (b - a))
        scores = torch.einsum("ihd,jhd->hij", q[a:b], k[c:d]) / q.shape[-1] ** 0.5
        weights = scores.masked_fill(~sees, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hij,jhd->ihd", weights, v[c:d]))
    return torch.cat(outputs)


# ---- dense --------------------------------------------------------------------------------------

@pytest.mark.parametrize("block_tokens, strip_tokens, strips", [        # trees: 14, 3, 8, 11, 18
    (10 ** 9, 1, [[54]]),
    (1, 10 ** 9, [[14], [3], [8], [11], [18]]),
    (20, 128, [[17], [19], [18]]),
    (12, 4, [[4, 4, 4, 2], [11], [11], [4, 4, 4, 4, 2]]),
    (1, 3, [[3, 3, 3, 3, 2], [3], [3, 3, 2], [3, 3, 3, 2], [3] * 6]),
    (1, 1, [[1] * 14, [1] * 3, [1] * 8, [1] * 11, [1] * 18]),
])
def test_dense_blocks_follow_the_rule_at_any_size(monkeypatch, block_tokens, strip_tokens, strips):
    # The two sizes trade speed for waste; they must not touch what sees what, nor the hidden
    # states, nor a gradient.
    model, _ = make_model(GQA)
    trees = random_trees()

    def hidden_and_gradients(stream):
        hidden = model(stream.input_ids, stream.position_ids, stream.segments)
        return hidden, *torch.autograd.grad(hidden.square().sum(), list(model.model.parameters()))

    stream = build_stream(trees)
    assert [len(masks) for masks in stream.segments.blocks] == [1]
    expected = hidden_and_gradients(stream)
    monkeypatch.setattr(attention_file, "BLOCK_TOKENS", block_tokens)
    monkeypatch.setattr(attention_file, "STRIP_TOKENS", strip_tokens)
    stream = build_stream(trees)
    assert torch.equal(whole_mask(stream.segments),
                       rule(stream.tree_ids.tolist(), stream.branch_ids.tolist()))
    for mine, wanted in zip(hidden_and_gradients(stream), expected):
        assert_close(mine, wanted, rtol=1e-10, atol=1e-12)
    assert [[len(mask) for mask in masks] for masks in stream.segments.blocks] == strips


@pytest.mark.parametrize("sizes, blocks, strips", [
    ([100, 100, 56], [256], [[256]]),                        # just fits
    ([100, 100, 57], [200, 57], [[200], [57]]),              # one token too many
    ([300, 10, 10], [300, 20], [[128, 128, 44], [20]]),      # too large: alone, in strips
    ([10, 300, 10], [10, 300, 10], [[10], [128, 128, 44], [10]]),
    ([256, 1, 255, 1], [256, 256, 1], [[256], [256], [1]]),
    ([384], [384], [[128, 128, 128]]),
])
def test_blocks_merge_trees_up_to_256_tokens_and_larger_ones_are_cut(sizes, blocks, strips):
    # By hand, at BLOCK_TOKENS = 256, STRIP_TOKENS = 128: whole trees, in order, greedily.
    assert (attention_file.BLOCK_TOKENS, attention_file.STRIP_TOKENS) == (256, 128)
    tree_ids = torch.cat([torch.full((size,), number) for number, size in enumerate(sizes)])
    segments = attention_segments(tree_ids, torch.zeros_like(tree_ids))
    assert [masks[-1].shape[1] for masks in segments.blocks] == blocks
    assert [[len(mask) for mask in masks] for masks in segments.blocks] == strips
    assert torch.equal(whole_mask(segments), (tree_ids[:, None] == tree_ids).tril())


def test_blocks_are_cut_on_a_cpu_only():
    ids = torch.zeros(300, dtype=torch.int64)
    segments = attention_segments(ids, ids, "meta")
    assert [[mask.shape for mask in masks] for masks in segments.blocks] == [[(300, 300)]]


# ---- varlen and flex against it -----------------------------------------------------------------

def test_varlen_segments_by_hand():
    # Two trees, x = 2 tokens with responses of 1 and 2, then x = 1 with one of 1:
    #   stream   x0 x1 a0 b0 b1 | x2 c0
    #   segments x0 x1; a0 with keys x0 x1 a0; b0 b1 with x0 x1 b0 b1; x2; c0 with x2 c0
    segments = attention_segments([0, 0, 0, 0, 0, 1, 1], [0, 0, 1, 2, 2, 0, 1], how="varlen")
    assert segments.queries_until.tolist() == [0, 2, 3, 5, 6, 7]
    assert segments.keys_until.tolist() == [0, 2, 5, 9, 10, 12]
    assert (segments.max_queries, segments.max_keys) == (2, 4)
    assert segments.key_rows.tolist() == [0, 1, 0, 1, 2, 0, 1, 3, 4, 5, 5, 6]
    readers = [[part.tolist() for part in reader] for reader in segments.readers]
    assert readers == [[[0, 1, 2, 3, 4, 5, 6], [0, 1, 4, 7, 8, 9, 11]],
                       [[0, 1, 5], [2, 3, 10]], [[0, 1], [5, 6]]]


@pytest.mark.parametrize("how", ["varlen", "flex"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_varlen_and_flex_equal_the_dense_blocks(monkeypatch, how, kv_heads):
    # The same trees, the same q, k, v in float64: outputs, and varlen's gradients (torch has no
    # backward of FlexAttention on a CPU; bench/attention.py checks both on a GPU). Trees with one
    # and four responses, and one whose only response is its EOS (no token of its own is fed).
    monkeypatch.setattr(attention_file, "varlen_attn", varlen_by_hand)
    stream = build_stream(random_trees())
    ids = stream.tree_ids.tolist(), stream.branch_ids.tolist()
    torch.manual_seed(0)
    q, k, v = (torch.randn(len(ids[0]), heads, 8, dtype=torch.float64,
                           requires_grad=how == "varlen") for heads in (4, kv_heads, kv_heads))
    expected = attention(q, k, v, stream.segments)
    found = attention(q, k, v, attention_segments(*ids, how=how))
    assert_close(found, expected, rtol=0, atol=1e-12)
    if how == "varlen":
        upstream = torch.randn(len(ids[0]), 4, 8, dtype=torch.float64)
        for mine, wanted in zip(torch.autograd.grad(found, (q, k, v), upstream),
                                torch.autograd.grad(expected, (q, k, v), upstream)):
            assert_close(mine, wanted, rtol=0, atol=1e-12)


def test_attention_that_cannot_run_here_is_refused():
    choose_attention("dense", "cpu", False)
    choose_attention("varlen", "cuda", True)
    for how in ("varlen", "flex"):
        with pytest.raises(ValueError, match=f"--attention {how} needs a GPU"):
            choose_attention(how, "cpu", True)
    with pytest.raises(ValueError, match="--attention varlen needs --bf16"):
        choose_attention("varlen", "cuda", False)


# ---- only the rows that are asked for; compiled layers ------------------------------------------

def test_rows_are_those_of_the_whole_stream_and_so_are_their_gradients():
    # The last layer's product and MLP are computed for these rows alone; nothing else may change.
    model, _ = make_model(GQA)
    stream = build_stream(random_trees())
    arguments = stream.input_ids, stream.position_ids, stream.segments
    rows = torch.tensor([3, 0, 20])
    parameters = list(model.model.parameters())
    upstream = torch.randn(3, 24, dtype=torch.float64)
    whole = model(*arguments)[rows]
    expected = torch.autograd.grad(whole, parameters, upstream)
    for checkpointing in (False, True):
        model.gradient_checkpointing = checkpointing
        found = model(*arguments, rows=rows)
        assert_close(found, whole, rtol=0, atol=1e-13)
        for mine, wanted in zip(torch.autograd.grad(found, parameters, upstream), expected):
            assert_close(mine, wanted, rtol=0, atol=1e-12)


def test_compiled_layers_give_the_same_and_are_compiled_once_for_all_lengths(monkeypatch):
    # torch would compile a layer anew for every number of blocks and every length, and give up
    # after eight; here the attention stays outside and lengths are dynamic. aot_eager: all but the
    # code generation, which needs a C++ compiler.
    monkeypatch.setattr(attention_file, "BLOCK_TOKENS", 1)       # as many blocks as trees
    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    model, _ = make_model(GQA)
    streams = [build_stream(random_trees()[:number]) for number in (5, 2, 3, 4)]

    def run(stream):
        inputs = stream.input_ids, stream.position_ids, stream.segments
        hidden = model(*inputs, rows=stream.rows)
        with torch.no_grad():                                     # as the reference runs
            frozen = model(*inputs, rows=stream.rows)
        return hidden, frozen, *torch.autograd.grad(hidden.square().sum(),
                                                    list(model.model.parameters()))

    expected = [run(stream) for stream in streams]
    compile_layers(model, backend="aot_eager")
    graphs = []
    for stream, wanted in zip(streams, expected):
        for mine, other in zip(run(stream), wanted):
            assert_close(mine, other, rtol=1e-9, atol=1e-12)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0 and graphs[1:] == [graphs[0]] * 3
    # nothing but the attention stays outside: torch follows _SwiGLU, too
    (reason,) = counters["graph_break"]
    assert "function attention" in reason
