"""Attention under one rule: dense blocks, FlexAttention on a CPU, and which way is chosen where.

test_tree_attention.py compares all ways with float64, output and gradients.
"""
import pytest
import torch
from attention_rule import rule_mask, stream_ids, whole_mask
from helpers import GQA, make_llama, random_trees
from torch.nn.attention import flex_attention as flex_module
from torch.nn.attention.flex_attention import create_block_mask, create_mask
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


# ---- flex against it, and what holds for all ----------------------------------------------------

@pytest.mark.parametrize("kv_heads", [4, 2])
def test_flex_equals_the_dense_blocks(kv_heads):
    # The same trees, the same q, k, v in float64: outputs (torch has no backward of FlexAttention
    # on a CPU). Trees with one and four responses, and one whose only response is its EOS (no token
    # of its own is fed).
    stream = build_stream(random_trees())
    ids = stream.tree_ids.tolist(), stream.branch_ids.tolist()
    torch.manual_seed(0)
    q, k, v = (torch.randn(len(ids[0]), heads, 8, dtype=torch.float64)
               for heads in (4, kv_heads, kv_heads))
    expected = attention(q, k, v, stream.segments)
    found = attention(q, k, v, attention_segments(*ids, how="flex"))
    assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tokens", [1, 127, 128, 129, 700, 1500])
def test_flex_gets_the_block_mask_that_torch_would_make(tokens):
    # Every table, from the rule itself. Prompts of 300 tokens and more have blocks that are seen as
    # a whole.
    generator, trees = torch.Generator().manual_seed(tokens), []
    while sum(prompt + sum(responses) for prompt, responses in trees) < tokens:
        prompt, *responses = torch.randint(1, 600, (3,), generator=generator).tolist()
        trees.append((prompt, responses))
    ids = [torch.tensor(part[:tokens]) for part in stream_ids(trees)]
    found = attention_segments(*ids, how="flex")
    expected = create_block_mask(found.mask_mod, None, None, tokens, tokens, device="cpu")
    mask = rule_mask(*(part.tolist() for part in ids))
    assert torch.equal(create_mask(found.mask_mod, None, None, tokens, tokens, "cpu")[0, 0], mask)
    tables = ("kv_num_blocks", "kv_indices", "q_num_blocks", "q_indices")
    for name in (*tables, *(f"full_{table}" for table in tables)):
        mine, wanted = getattr(found, name), getattr(expected, name)
        assert mine.dtype == wanted.dtype and torch.equal(mine, wanted), name
    assert found.seq_lengths == expected.seq_lengths and found.BLOCK_SIZE == expected.BLOCK_SIZE


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


def test_flex_is_compiled_once_for_each_grad_mode(monkeypatch):
    # Lengths of several blocks; a first layer whose k needs no gradient and whose v is a view of
    # another shape, as q_proj and v_proj adapters make it; and no fall back to all scores at the end.
    graphs = []
    monkeypatch.setattr(flex_module, "_validate_device", lambda *_: None)     # CPU: no backward
    flex = torch.compile(flex_module.flex_attention, dynamic=True, fullgraph=True,
                         backend=lambda graph, _: graphs.append(1) or graph)
    monkeypatch.setattr(attention_file, "flex_attention", flex)
    for tokens in (300, 1000, 512):
        ids = [i // 50 for i in range(tokens)], [i % 50 // 20 for i in range(tokens)]
        segments = attention_segments(*ids, how="flex")
        for first_layer in (False, True):
            q, k = (torch.randn(tokens, 4, 16).requires_grad_() * 1 for _ in range(2))
            v = (torch.randn(tokens, 64).requires_grad_() * 1).unflatten(1, (4, 16))
            attention(q, k.detach() if first_layer else k, v, segments)
            with torch.no_grad():
                attention(q.detach(), k.detach(), v.detach(), segments)
    assert len(graphs) == 2


def test_auto_is_what_is_known_to_be_right_there():
    assert choose_attention("auto", "cpu") == "dense"
    assert choose_attention("auto", "cuda") == "flex"
    assert choose_attention("auto", "mps") == "dense"
    for how in ATTENTIONS:
        assert choose_attention(how, "cuda") == how


def test_a_way_that_is_none_is_refused():
    # "auto" is resolved by choose_attention, and must not quietly become one of them here
    with pytest.raises(ValueError, match="attention is 'auto'; expected one of dense, flex, tree"):
        attention_segments([0], [0], how="auto")


def test_attention_that_cannot_run_here_is_refused(monkeypatch):
    assert choose_attention("dense", "cpu") == "dense"
    with pytest.raises(ValueError, match="flex attention needs a GPU; --kernels torch runs everywhere"):
        choose_attention("flex", "cpu")
    with pytest.raises(ValueError, match="tree attention cannot run: .*needs a GPU .*; --kernels torch"):
        choose_attention("tree", "cpu")
    monkeypatch.setattr(attention_file, "tree_attention_problem", lambda device_type: "no Triton")
    with pytest.raises(ValueError, match="tree attention cannot run: no Triton; --kernels torch"):
        choose_attention("tree", "cuda")


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
