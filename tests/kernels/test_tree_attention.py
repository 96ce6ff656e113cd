"""Each way of attention against float64: the kernels in Triton's interpreter or on a GPU.

Without either only `dense` is tested here; test_tree_attention_code.py runs this file once more
with TRITON_INTERPRET=1, which must be set before the kernels are defined.
"""
import os
import random

import pytest
import torch
from attention_rule import plain_attention, rule_mask, stream_ids
from helpers import GQA, make_llama, random_trees
from torch.testing import assert_close

from kernels.attention import attention, attention_segments
from kernels.tree_attention import TreeSegments, tree_attention, tree_blocks
from packing import build_stream

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRETED
WAYS = [("dense", "cpu")]
WAYS += [("tree", "cpu")] if INTERPRETED else []
WAYS += [("dense", "cuda"), ("tree", "cuda")] if ON_GPU else []
KERNEL_DEVICES = [device for how, device in WAYS if how == "tree"]
each_way = pytest.mark.parametrize("how, device", WAYS, ids=[f"{how}-{on}" for how, on in WAYS])
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
# numpy warns in the interpreter, about hidden places of a tile
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")


@pytest.fixture(autouse=INTERPRETED)
def nearest_bf16(monkeypatch):
    """Let the interpreter round float32 to the nearest bf16, as a GPU does: it cuts digits off."""
    from triton.runtime import interpreter
    convert = interpreter._convert_float

    def convert_float(values, source, target, rounding_mode):
        if (source.name, target.name) != ("fp32", "bf16"):
            return convert(values, source, target, rounding_mode)
        rounded = torch.from_numpy(values.copy()).to(torch.bfloat16)
        return rounded.view(torch.uint16).numpy()
    monkeypatch.setattr(interpreter, "_convert_float", convert_float)


def make_inputs(tokens, heads=1, kv_heads=1, head_dim=16, dtype=torch.float32, device="cpu",
                seed=0):
    """q, k, v with gradient, and the output's upstream gradient; all standard normal."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v, upstream = (
        torch.randn(tokens, number, head_dim, generator=generator).to(device, dtype)
        for number in (heads, kv_heads, kv_heads, heads))
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), upstream


def run(how, device, ids, q, k, v, upstream):
    """[output, dq, dk, dv]"""
    output = attention(q, k, v, attention_segments(*ids, device, how))
    return [output, *torch.autograd.grad(output, (q, k, v), upstream)]


def rms(x):
    return float(x.detach().double().square().mean().sqrt())


def errors(found, truth):
    """Of output, dq, dk, dv: rms of the error over that of the truth, or over 0.1 if it is less
    (a row that sees only itself has dq = dk = 0)."""
    return [rms(f.double() - t) / max(rms(t), 0.1)
            for f, t in zip(found, truth, strict=True)]


def assert_accurate(how, device, ids, inputs, largest_score=10):
    """float32: at most what rounding the scores explains, 5e-6 for scores up to 10 (a bf16 product
    is off by 4e-3, a TF32 one by 4e-4). bf16: at most 1.5 times the error of attention written out
    in bf16, and 2 % (which rounds the scores, too: at scores of -120 to half a unit)."""
    mask = rule_mask(*ids)
    found, truth = run(how, device, ids, *inputs), plain_attention(*inputs, mask)
    # (torch's own kernel on a GPU replaces a float32 product by three of TF32)
    least = (2e-6 if (how, device) == ("dense", "cuda") else 5e-7) * largest_score
    budget = [least] * 4
    if inputs[0].dtype == torch.bfloat16:
        eager = plain_attention(*inputs, mask, torch.bfloat16)
        budget = [min(1.5 * error + least, 0.02) for error in errors(eager, truth)]
    assert all(f.dtype == inputs[0].dtype and f.isfinite().all() for f in found)
    for name, error, allowed in zip(("output", "dq", "dk", "dv"), errors(found, truth), budget,
                                    strict=True):
        assert error <= allowed, f"{name}: {error:.1e}, at most {allowed:.1e}"


# ---- accuracy -----------------------------------------------------------------------------------

TREES = {                                         # tokens of the prompt, of each response
    "uneven prompts and responses": [(37, [20, 5]), (9, [31, 2]), (4, [11])],
    "responses of one token": [(5, [1, 1]), (20, [1])],
    "prompts of one token": [(1, [3, 17]), (1, [1])],
    "many responses": [(18, [7] * 12)],
    "prompts alone, and one token": [(40, []), (1, [])],
    "whole steps": [(32, [16, 32])],
    "a block and one token": [(65, [33])],
    "a block less one token": [(63, [64, 15])],
}


@each_way
@each_dtype
@pytest.mark.parametrize("trees", TREES.values(), ids=TREES)
def test_shapes_of_trees(how, device, dtype, trees):
    ids = stream_ids(trees)
    assert_accurate(how, device, ids, make_inputs(len(ids[0]), dtype=dtype, device=device))


@each_way
@each_dtype
@pytest.mark.parametrize("seed", range(3))
def test_random_trees(how, device, dtype, seed):
    rng = random.Random(seed)
    trees = [(rng.randint(1, 70), [rng.randint(1, 30) for _ in range(rng.randint(0, 3))])
             for _ in range(2)]
    ids = stream_ids(trees)
    assert_accurate(how, device, ids, make_inputs(len(ids[0]), 1, 1, 16, dtype, device, seed))


@each_way
@each_dtype
@pytest.mark.parametrize("heads, kv_heads, head_dim", [
    (2, 2, 16), (4, 2, 16), (1, 1, 32), (3, 1, 32), (2, 2, 64), (2, 1, 64), (2, 2, 96), (2, 1, 96),
    (1, 1, 128), (4, 2, 128), (2, 1, 6), (1, 1, 80)])
def test_heads_and_their_widths(how, device, dtype, heads, kv_heads, head_dim):
    # Widths that are no power of two are padded with zeros, which must reach no result.
    ids = stream_ids([(7, [18, 1])])
    assert_accurate(how, device, ids,
                    make_inputs(len(ids[0]), heads, kv_heads, head_dim, dtype, device))


@each_way
@each_dtype
@pytest.mark.parametrize("size", [64, 192] if INTERPRETED else [64, 192, 320])
def test_scores_around_minus_120(how, device, dtype, size):
    # The case of pytorch#196678: log-sum-exp below -88.7 (exp of it is no float32) in a block with
    # size % 128 == 64. The first component of q and k adds -32 · 30 / sqrt(64) = -120. The prompt
    # ends within a tile, so there are places without a key: exp(0 - lse) is inf there.
    ids = stream_ids([(size // 2 + 3, [size // 4, size // 4 - 3])])
    q, k, v, upstream = make_inputs(size, 1, 1, 64, dtype, device)
    with torch.no_grad():
        q[..., 0], k[..., 0] = 32, -30
    assert_accurate(how, device, ids, (q, k, v, upstream), 130)


@each_way
@each_dtype
def test_hidden_scores_far_above_the_visible_ones(how, device, dtype):
    # The last key of every segment has a score of 1e4 with the rows before it, which do not see it;
    # what they see has scores near 0. 2^(1e4 - lse) is inf and must count as nothing.
    ids = stream_ids([(20, [10, 10]), (6, [])])
    last = [29, 39, 45]
    q, k, v, upstream = make_inputs(46, 1, 1, 16, dtype, device)
    with torch.no_grad():
        q[..., 0], k[..., 0] = 200, 0
        q[last, :, 0], k[last, :, 0] = 0, 200                    # 200 * 200 / sqrt(16) = 1e4
    assert_accurate(how, device, ids, (q, k, v, upstream))


@each_way
def test_a_model_gives_the_same_hidden_states_and_gradients(how, device):
    model, _ = make_llama(GQA)
    model.float().to(device)
    streams = [build_stream(random_trees()[:3], device, attention=name) for name in ("dense", how)]
    results = []
    for stream in streams:
        hidden = model(stream.input_ids, stream.position_ids, stream.segments)
        results.append([hidden, *torch.autograd.grad(hidden.square().sum(),
                                                     list(model.model.parameters()))])
    for mine, wanted in zip(*results, strict=True):
        assert_close(mine, wanted, rtol=1e-4, atol=1e-4 * float(wanted.detach().abs().max()))


# ---- what the kernels promise beyond their values -----------------------------------------------

if KERNEL_DEVICES:
    @pytest.mark.parametrize("device", KERNEL_DEVICES)
    @each_dtype
    def test_same_bits_twice_whatever_memory_held(device, dtype):
        # No sum whose order varies; and outputs are allocated without being cleared: filled with
        # NaN first (which torch does in its deterministic mode), they come out the same.
        ids = stream_ids([(20, [1, 40])])
        inputs = make_inputs(len(ids[0]), dtype=dtype, device=device)
        first, second = (run("tree", device, ids, *inputs) for _ in range(2))
        torch.use_deterministic_algorithms(True)
        try:
            assert torch.empty(3).isnan().all()
            poisoned = run("tree", device, ids, *inputs)
        finally:
            torch.use_deterministic_algorithms(False)
        for a, b, c in zip(first, second, poisoned, strict=True):
            assert torch.equal(a, b) and torch.equal(a, c)

    @pytest.mark.parametrize("device", KERNEL_DEVICES)
    def test_layouts_of_the_tensors_do_not_matter(device):
        # q, k and v as slices of one product; the gradient of a sum, which is one number, expanded.
        ids = stream_ids([(10, [8])])
        q, k, v, _ = make_inputs(18, 4, 2, 16, device=device)
        fused = torch.cat([q, k, v], dim=1).detach().requires_grad_()            # [T, 8, Dh]
        segments = attention_segments(*ids, device, "tree")
        output = attention(*fused.split([4, 2, 2], dim=1), segments)
        gradient, = torch.autograd.grad(output.sum(), fused)
        expected = run("tree", device, ids, q, k, v, torch.ones_like(q))
        assert torch.equal(output, expected[0])
        assert torch.equal(gradient, torch.cat(expected[1:], dim=1))
        with torch.no_grad():
            assert torch.equal(attention(q, k, v, segments), output)

    @pytest.mark.parametrize("device", KERNEL_DEVICES)
    def test_bits_of_a_tree_do_not_depend_on_its_neighbours(device):
        # Tiles begin where a prompt or a response begins: packing a tree elsewhere changes no bit.
        middle, around = [(66, [20, 9])], [(70, [])]
        tokens = [len(stream_ids(trees)[0]) for trees in (around, middle)]
        alone = make_inputs(tokens[1], device=device, seed=1)
        others = make_inputs(tokens[0], device=device, seed=2)
        packed = [torch.cat([o, a, o]).detach() for o, a in zip(others, alone, strict=True)]
        for t in packed[:3]:
            t.requires_grad_()
        expected = run("tree", device, stream_ids(middle), *alone)
        found = run("tree", device, stream_ids(around + middle + around), *packed)
        for mine, wanted in zip(found, expected, strict=True):
            assert torch.equal(mine[tokens[0]:-tokens[0]], wanted)

    @pytest.mark.parametrize("device", KERNEL_DEVICES)
    def test_the_kernels_take_no_token(device):
        q, k, v, upstream = make_inputs(0, 4, 2, 16, device=device)
        output = tree_attention(q, k, v, TreeSegments(tree_blocks([], []).to(device), 0))
        gradients = torch.autograd.grad(output, (q, k, v), upstream)
        assert [list(t.shape) for t in (output, *gradients)] == [[0, 4, 16], [0, 4, 16], [0, 2, 16],
                                                                 [0, 2, 16]]
