"""RMSNorm, rotary embedding, SwiGLU: as exact as their dtype allows, and little is kept."""
import math

import pytest
import torch
from layers_cases import (
    EPS,
    HEADS,
    NORMS,
    ROUNDING,
    SIZES,
    each_dtype,
    each_place,
    gradients,
    norm_inputs,
    normal,
    relative_error,
    rotary_inputs,
    swiglu_inputs,
    true_norm,
    true_rotary,
    true_swiglu,
)
from torch.nn import functional as F
from torch.testing import assert_close

from kernels.layers import rotary_torch, swiglu_torch

# numpy warns in the interpreter: exp(100) in float32
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")


def assert_exact(ours, dtype, found, truths, eager_roundings):
    """Every value: a kernel's is rounded once, plain torch's `eager_roundings` times at most.

    1e-6 of the norm is for float32 in between: exp of a gate of 16 is off by 16 · 2^-24.
    """
    roundings = 1 if ours.is_kernel else eager_roundings
    for value, truth in zip(found, truths, strict=True):
        assert value.dtype == dtype and value.shape == truth.shape
        assert relative_error(value, truth) <= roundings * ROUNDING[dtype] + 1e-6


# ---- error budget -------------------------------------------------------------------------------

@each_place
@each_dtype
@pytest.mark.parametrize("case", NORMS.values(), ids=NORMS)
def test_rms_norm_and_its_gradients(ours, device, dtype, case):
    # Plain torch rounds normed, y, and in the backward g w, g n, both branches and their sum. The
    # gradient of x is a difference: in bf16 it may lose digits to plain torch's rounding of g w, up
    # to ‖g w‖ / ‖grad‖ < 4 here.
    x, weight, added = norm_inputs(*case, dtype, device)
    inputs = [t for t in (x, weight, added) if t is not None and t.requires_grad]
    found = ours.rms_norm(x, weight, EPS, added)
    assert_exact(ours, dtype, found[:1], true_norm(x, weight, EPS, added)[:1], 1)
    truths = true_norm(x, weight, EPS, added, stored=found[0])
    assert_exact(ours, dtype, found, truths, 2)
    assert_exact(ours, dtype, gradients(found, inputs), gradients(truths, inputs), 12)


@each_place
@each_dtype
@pytest.mark.parametrize("case", HEADS.values(), ids=HEADS)
def test_rotary_and_its_gradients(ours, device, dtype, case):
    # Plain torch rounds two products and their sum.
    inputs = rotary_inputs(*case, dtype, device)
    found, truths = ours.rotary(*inputs), true_rotary(*inputs)
    assert_exact(ours, dtype, found, truths, 3)
    assert_exact(ours, dtype, gradients(found, inputs[:2]), gradients(truths, inputs[:2]), 3)


@each_place
@each_dtype
@pytest.mark.parametrize("case", SIZES.values(), ids=SIZES)
def test_swiglu_and_its_gradients(ours, device, dtype, case):
    # Plain torch rounds silu and each product.
    inputs = swiglu_inputs(*case, dtype, device)
    found, truth = ours.swiglu(*inputs), true_swiglu(*inputs)
    assert_exact(ours, dtype, [found], [truth], 2)
    assert_exact(ours, dtype, gradients(found, inputs), gradients(truth, inputs), 3)


@each_place
def test_gradcheck(ours, device):
    # Central differences in float64 of every input (of 19 rows in one random direction); norms with
    # and without a branch that is added.
    for case in ((3, 4, True, True), (19, 2, False, True), (2, 4, True, False)):
        x, weight, added = norm_inputs(*case, torch.float64, device)
        inputs = [t for t in (x, weight, added) if t is not None]
        assert torch.autograd.gradcheck(
            lambda x, weight, added=None: ours.rms_norm(x, weight, EPS, added), inputs,
            fast_mode=len(x) > 3)
    assert torch.autograd.gradcheck(ours.rotary, rotary_inputs(2, 3, 1, 6, torch.float64, device))
    assert torch.autograd.gradcheck(ours.swiglu, swiglu_inputs(3, 5, torch.float64, device))


# ---- by hand ------------------------------------------------------------------------------------

@each_place
def test_rms_norm_by_hand(ours, device):
    # (3, 4): mean square 25/2, y = (3, 4) / sqrt(25/2) · (1, 2). A row of zeros is 0 / sqrt(eps).
    # For the upstream (1, 0): grad_x = r (w - n mean(w n)) with n = (3, 4) r, w n = (3 r, 0):
    # r (1 - 9 r² / 2, -12 r² / 2) = r (1 - 0.36, -0.48). The sum's own gradient comes on top.
    r = 1 / math.sqrt(12.5)
    x = torch.tensor([[1.0, 4.0], [0.0, 0.0]], device=device, requires_grad=True)
    added = torch.tensor([[2.0, 0.0], [0.0, 0.0]], device=device, requires_grad=True)
    weight = torch.tensor([1.0, 2.0], device=device)
    total, y = ours.rms_norm(x, weight, 1e-20, added)
    assert total.tolist() == [[3.0, 4.0], [0.0, 0.0]]
    assert_close(y.cpu(), torch.tensor([[3 * r, 8 * r], [0.0, 0.0]]))
    grads = torch.autograd.grad(y[0, 0] + 10 * total[0, 1], (x, added))
    for grad in grads:
        assert_close(grad[0].cpu(), torch.tensor([0.64 * r, 10 - 0.48 * r]))


@each_place
@each_dtype
def test_the_norm_is_that_of_the_sum_as_it_is_stored(ours, device, dtype):
    # The backward reads the stored sum: a norm of the sum before its rounding is another function.
    x, weight, added = norm_inputs(9, 33, True, False, dtype, device)
    total, y = ours.rms_norm(x, weight, EPS, added)
    assert torch.equal(y, ours.rms_norm(total, weight, EPS)[1])


@each_place
def test_gradients_of_a_trained_weight_are_summed_in_float32(ours, device):
    # Rows of ones: grad_weight is the sum of the upstream rows, 256 + 1 of one program and -256 of
    # the next. A bfloat16 sum of the first would be 256.
    x = torch.ones(20, 8, dtype=torch.bfloat16, device=device)
    weight = torch.ones(8, dtype=torch.bfloat16, device=device, requires_grad=True)
    upstream = torch.zeros_like(x)
    upstream[0], upstream[1], upstream[17] = 256, 1, -256
    grad, = torch.autograd.grad(ours.rms_norm(x, weight, 0.0)[1], weight, upstream)
    assert grad.dtype == torch.bfloat16 and grad.tolist() == [1.0] * 8


@each_place
def test_rotary_pairs_the_halves(ours, device):
    # A quarter turn takes (x_i, x_{i+2}) to (-x_{i+2}, x_i): (1, 2, 3, 4) -> (-3, -4, 1, 2). Meta's
    # pairing of neighbours would give (-2, 1, -4, 3). The backward turns back.
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]], device=device, requires_grad=True)
    k = -x.detach()
    cos, sin = torch.zeros(1, 1, 2, device=device), torch.ones(1, 1, 2, device=device)
    turned, turned_k = ours.rotary(x, k, cos, sin)
    assert turned.tolist() == [[[-3.0, -4.0, 1.0, 2.0]]] and torch.equal(turned_k, -turned)
    assert torch.autograd.grad(turned, x, turned.detach())[0].tolist() == x.tolist()


@each_place
@each_dtype
def test_numbers_of_any_size(ours, device, dtype):
    # In fp16 300² is infinite, 1e-4² is 0; silu of ±1e4 is 1e4 and 0, its slope 1 and 0.
    for size in (1e-4, 300.0, 3e4):
        x = torch.full((1, 96), size, dtype=dtype, device=device, requires_grad=True)
        x.data[0, ::2] *= -1
        _, y = ours.rms_norm(x, torch.ones_like(x[0]), 1e-20)
        assert_close(y.abs(), torch.ones_like(y), rtol=2 ** -7, atol=0)
        assert (gradients(y, x)[0].double() * size).abs().max() < 10
    gate = torch.tensor([[0.0, 100.0, -100.0, 1e4, -1e4]], dtype=dtype, device=device)
    up = torch.full_like(gate, 2.0).requires_grad_()
    y = ours.swiglu(gate.requires_grad_(), up)
    assert_close(y, torch.where(gate > 0, 2 * gate, 0.0))
    gate_grad, up_grad = torch.autograd.grad(y.sum(), (gate, up))
    assert gate_grad.tolist() == [[1.0, 2.0, 0.0, 2.0, 0.0]]
    assert_close(up_grad, gate.clamp(min=0))


# ---- nothing more is kept, nothing else is touched ----------------------------------------------

def saved_by(function):
    """What a function returns, and the storages of all tensors that autograd saves in it."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        result = function()
    return result, saved


@each_place
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_what_is_stated_is_kept_for_the_backward(ours, device, dtype):
    # rms_norm: the sum, one float32 per row, the weight; rotary: cos and sin; swiglu: its inputs.
    # (Plain torch's norm of bf16 rows also keeps them in float32: a CPU's affair.)
    x, weight, added = norm_inputs(6, 40, True, False, dtype, device)
    (total, _), saved = saved_by(lambda: ours.rms_norm(x, weight, EPS, added))
    if ours.is_kernel:
        assert sorted(t.numel() for t in saved) == [6, 40, 240]
        assert {t.data_ptr() for t in saved} >= {total.data_ptr(), weight.data_ptr()}
        assert {t.dtype for t in saved if t.numel() == 6} == {torch.float32}
        (total, _), saved = saved_by(lambda: ours.rms_norm(x, weight, EPS))
        assert sorted(t.numel() for t in saved) == [6, 40, 240] and total.data_ptr() == x.data_ptr()
        assert {t.data_ptr() for t in saved} >= {x.data_ptr(), weight.data_ptr()}
    q, k, cos, sin = rotary_inputs(6, 4, 2, 8, dtype, device)
    _, saved = saved_by(lambda: ours.rotary(q, k, cos, sin))
    assert {t.data_ptr() for t in saved} == {cos.data_ptr(), sin.data_ptr()}
    inputs = swiglu_inputs(6, 40, dtype, device)
    _, saved = saved_by(lambda: ours.swiglu(*inputs))
    assert [t.data_ptr() for t in saved] == [t.data_ptr() for t in inputs]


def run_all(ours, device, dtype=torch.float32):
    """Every output and gradient of one call of each function, and the inputs."""
    norm = norm_inputs(37, 33, True, True, dtype, device)
    turned, halves = rotary_inputs(5, 3, 2, 6, dtype, device), swiglu_inputs(5, 700, dtype, device)
    x, weight, added = norm
    outputs = ours.rms_norm(x, weight, EPS, added), ours.rotary(*turned), (ours.swiglu(*halves),)
    results = [*outputs[0], *gradients(outputs[0], norm), *outputs[1],
               *gradients(outputs[1], turned[:2]), *outputs[2], *gradients(outputs[2], halves)]
    return results, [*norm, *turned, *halves]


@each_place
@each_dtype
def test_same_bits_twice_whatever_memory_held(ours, device, dtype):
    # No sum whose order varies; and outputs, allocated without being cleared, are written in full:
    # filled with NaN first (which torch does in its deterministic mode) they come out the same.
    first, _ = run_all(ours, device, dtype)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        second, _ = run_all(ours, device, dtype)
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(first) == 12
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@each_place
def test_arguments_are_left_alone(ours, device):
    _, inputs = run_all(ours, device)
    _, fresh = run_all(ours, device)
    results, after = run_all(ours, device)
    assert all(torch.equal(a, b) for a, b in zip(inputs, fresh, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(inputs, after, strict=True))
    # the two gradients of a sum are one tensor: adding to one must not change the other
    x, weight, added = norm_inputs(3, 8, True, False, torch.float32, device)
    for _ in range(2):
        ours.rms_norm(x, weight, EPS, added)[1].sum().backward()
    assert torch.equal(x.grad, added.grad) and x.grad.data_ptr() != added.grad.data_ptr()


# ---- parts of a graph ---------------------------------------------------------------------------

@each_place
def test_outputs_that_are_not_used_cost_no_gradient(ours, device):
    # After the last layer nobody reads x + added; of a stream nobody scores, nobody reads the norm.
    x, weight, added = norm_inputs(4, 10, True, True, torch.float64, device)
    for used in (0, 1):
        found = torch.autograd.grad(ours.rms_norm(x, weight, EPS, added)[used].sum(),
                                    (x, weight, added), allow_unused=True, materialize_grads=True)
        wanted = torch.autograd.grad(true_norm(x, weight, EPS, added)[used].sum(),
                                     (x, weight, added), allow_unused=True, materialize_grads=True)
        for mine, other in zip(found, wanted, strict=True):
            assert_close(mine, other, rtol=0, atol=1e-12)
    q, k, cos, sin = rotary_inputs(4, 3, 2, 6, torch.float64, device)
    for used, x in enumerate((q, k)):
        mine, = torch.autograd.grad(ours.rotary(q, k, cos, sin)[used].sin().sum(), x)
        wanted, = torch.autograd.grad(true_rotary(q, k, cos, sin)[used].sin().sum(), x)
        assert_close(mine, wanted, rtol=0, atol=1e-12)


@each_place
def test_inputs_without_a_gradient_get_none(ours, device):
    # The first layer's k depends on nothing that is trained: attention need not find its gradient.
    q, k, cos, sin = rotary_inputs(4, 3, 2, 6, torch.float64, device)
    turned, turned_k = ours.rotary(q, k.detach(), cos, sin)
    assert turned.requires_grad and not turned_k.requires_grad
    found, = torch.autograd.grad((turned * turned_k[:, :1]).sum(), q)
    wanted, = torch.autograd.grad((true_rotary(q, k, cos, sin)[0] * turned_k[:, :1]).sum(), q)
    assert_close(found, wanted, rtol=0, atol=1e-12)
    gate, up = swiglu_inputs(3, 8, torch.float64, device)
    found, = torch.autograd.grad(ours.swiglu(gate.detach(), up).sum(), up)
    assert_close(found, F.silu(gate).detach(), rtol=0, atol=1e-12)
    x, weight, added = norm_inputs(3, 8, True, False, torch.float64, device)
    found, = torch.autograd.grad(ours.rms_norm(x.detach(), weight, EPS, added)[1].sum(), added)
    wanted, = torch.autograd.grad(true_norm(x, weight, EPS, added)[1].sum(), added)
    assert_close(found, wanted, rtol=0, atol=1e-12)
    with torch.no_grad():
        assert not any(t.requires_grad for t in (*ours.rms_norm(x, weight, EPS, added),
                                                 *ours.rotary(q, k, cos, sin),
                                                 ours.swiglu(gate, up)))


@each_place
def test_any_strides(ours, device):
    # Attention gives gradients of q and k as [H, T, Dh], transposed; a sum gives expanded ones.
    q, k, cos, sin = rotary_inputs(4, 3, 2, 6, torch.float64, device)
    wanted = true_rotary(q, k, cos, sin)

    def transposed(t, *dims):
        return t.detach().transpose(*dims).contiguous().transpose(*dims).requires_grad_()

    q_t, k_t = transposed(q, 0, 1), transposed(k, 1, 2)
    found = ours.rotary(q_t, k_t, cos, sin)
    upstream = [transposed(normal(*t.shape, dtype=torch.float64, device=device), i, i + 1)
                for i, t in enumerate(wanted)]
    for mine, other in zip((*found, *torch.autograd.grad(found, (q_t, k_t), upstream)),
                           (*wanted, *torch.autograd.grad(wanted, (q, k), upstream)), strict=True):
        assert_close(mine, other, rtol=0, atol=1e-12)
    wide = normal(8, 20, dtype=torch.float64, device=device)
    x, added = wide[::2, ::2].requires_grad_(), wide[1::2, 1::2].requires_grad_()
    gate, up = wide[:4, :10].requires_grad_(), wide.T[:4, :8].T[:4, :4]
    weight = normal(20, dtype=torch.float64, device=device)[::2]
    for found, wanted, inputs in (
            (ours.rms_norm(x, weight, EPS, added), true_norm(x, weight, EPS, added), (x, added)),
            ((ours.swiglu(gate[:, :4], up),), (true_swiglu(gate[:, :4], up),), (gate,))):
        mine = torch.autograd.grad(sum(t.sum() for t in found), inputs)
        other = torch.autograd.grad(sum(t.sum() for t in wanted), inputs)
        for a, b in zip((*found, *mine), (*wanted, *other), strict=True):
            assert_close(a, b, rtol=0, atol=1e-12)


@each_place
def test_second_derivatives_are_refused_or_right(ours, device):
    # The kernels' backwards have no derivative; a wrong one would be worse than an error.
    gate, up = swiglu_inputs(2, 3, torch.float64, device)
    x, weight, _ = norm_inputs(2, 4, False, False, torch.float64, device)
    for found, wanted, at in ((ours.swiglu(gate, up), true_swiglu(gate, up), gate),
                              (ours.rms_norm(x, weight, EPS)[1], true_norm(x, weight, EPS)[1], x)):
        def second(y, at=at):
            grad, = torch.autograd.grad(y.square().sum(), at, create_graph=True)
            return torch.autograd.grad(grad.square().sum(), at)[0]
        try:
            mine = second(found)
        except RuntimeError:
            continue
        assert_close(mine, second(wanted), rtol=1e-9, atol=0)


# ---- the specification's bits -------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_specification_of_swiglu_has_the_bits_of_autograd(dtype):
    gate, up = swiglu_inputs(7, 40, dtype, "cpu")
    gate.data[0, :4] = torch.tensor([0.0, 30.0, -30.0, -100.0])
    found, plain = swiglu_torch(gate, up), F.silu(gate) * up
    assert torch.equal(found, plain)
    for mine, wanted in zip(gradients(found, (gate, up)), gradients(plain, (gate, up)),
                            strict=True):
        assert torch.equal(mine, wanted)


def test_the_specification_of_rotary_is_a_rotation():
    # Lengths stay, and two rotations add their angles.
    q, k, cos, sin = rotary_inputs(3, 2, 1, 8, torch.float64, "cpu")
    once, _ = rotary_torch(q, k, cos, sin)
    assert_close(once.norm(dim=-1), q.norm(dim=-1))
    twice, _ = rotary_torch(once, k, cos, sin)
    assert_close(twice, rotary_torch(q, k, cos ** 2 - sin ** 2, 2 * sin * cos)[0])
