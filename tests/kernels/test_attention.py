"""Attention under one rule: dense blocks, and which way is chosen where.

test_tree_attention.py compares both ways with float64, output and gradients.
"""
import pytest
import torch
from attention_rule import rule_mask, whole_mask
from helpers import GQA, make_llama, random_trees
from torch.testing import assert_close

import generate as generate_file
import kernels.attention as attention_file
from kernels.attention import (
    ATTENTIONS,
    DenseSegments,
    attention,
    attention_segments,
    choose_attention,
)
from packing import build_stream

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
    # The two sizes trade speed for waste; they must not change the mask, the hidden states or a
    # gradient.
    model, _ = make_llama(GQA)
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
                       rule_mask(stream.tree_ids.tolist(), stream.branch_ids.tolist()))
    for mine, wanted in zip(hidden_and_gradients(stream), expected, strict=True):
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


# ---- what holds for both ------------------------------------------------------------------------

@pytest.mark.parametrize("how", ATTENTIONS)
def test_an_empty_stream_has_segments_and_an_empty_output(how):
    # A micro-batch none of whose responses needs the reference. Output and gradients of no row.
    segments = attention_segments([], [], how=how)
    q, k, v = (torch.randn(0, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    output = attention(q, k, v, segments)
    assert output.shape == (0, 4, 8)
    gradients = torch.autograd.grad(output.sum(), (q, k, v))
    assert [len(gradient) for gradient in gradients] == [0, 0, 0]


@pytest.mark.parametrize("masked", [True, False])
def test_dense_on_a_gpu_never_runs_cudnn(masked, monkeypatch):
    # cuDNN's backward with a mask gives NaN (see exact_backends). Here "a GPU" is pretended. On a
    # CPU torch may take what it likes.
    def enabled():
        backends = torch.backends.cuda
        return {"cudnn": backends.cudnn_sdp_enabled(), "flash": backends.flash_sdp_enabled(),
                "efficient": backends.mem_efficient_sdp_enabled(),
                "math": backends.math_sdp_enabled()}

    def record(q, k, v, *mask, **options):
        seen.append(enabled())
        return q
    seen, before = [], enabled()
    segments = DenseSegments([[torch.ones(3, 3, dtype=torch.bool)]]) if masked else None
    monkeypatch.setattr(attention_file.F, "scaled_dot_product_attention", record)
    attention(*torch.ones(3, 3, 2, 4), segments)
    exact_backends = attention_file.exact_backends
    monkeypatch.setattr(attention_file, "exact_backends", lambda device: exact_backends("cuda"))
    attention(*torch.ones(3, 3, 2, 4), segments)
    exact = {"cudnn": False, "flash": False, "efficient": True, "math": True}
    assert seen == [before, exact] and enabled() == before
    seen.clear()                                  # nor does decoding, two layers for two tokens
    monkeypatch.setattr(generate_file, "exact_backends", lambda device: exact_backends("cuda"))
    model, _ = make_llama(GQA)
    generate_file.generate(model, [[1, 5]], 2, eos_id=None)
    assert seen == [exact] * 4 and enabled() == before


def test_auto_is_our_kernels_on_a_gpu():
    assert choose_attention("auto", "cpu") == "dense"
    assert choose_attention("auto", "cuda") == "tree"
    assert choose_attention("auto", "mps") == "dense"
    assert choose_attention("auto", "cuda", 160) == "dense"       # wider than the kernels take
    for how in ATTENTIONS:
        assert choose_attention(how, "cuda") == how


def test_a_way_that_is_none_is_refused():
    # "auto" is resolved by choose_attention, and must not quietly become one of them here
    with pytest.raises(ValueError, match="attention is 'auto'; expected one of dense, tree"):
        attention_segments([0], [0], how="auto")


def test_attention_that_cannot_run_here_is_refused(monkeypatch):
    assert choose_attention("dense", "cpu") == "dense"
    with pytest.raises(ValueError, match="tree attention cannot run: .*needs a GPU .*; train.py --kernels torch"):
        choose_attention("tree", "cpu")
    monkeypatch.setattr(attention_file, "tree_attention_problem", lambda device_type: "no Triton")
    with pytest.raises(ValueError, match="tree attention cannot run: no Triton; train.py --kernels torch"):
        choose_attention("auto", "cuda")


# ---- only the rows that are asked for -----------------------------------------------------------

def test_rows_are_those_of_the_whole_stream_and_so_are_their_gradients():
    # The last layer's product and MLP are computed for these rows alone; nothing else may change.
    model, _ = make_llama(GQA)
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
        gradients = torch.autograd.grad(found, parameters, upstream)
        for mine, wanted in zip(gradients, expected, strict=True):
            assert_close(mine, wanted, rtol=0, atol=1e-12)
