"""Linear layers: rounded once on any CPU; LoRA's fused products against float64 and plain torch."""
import pytest
import torch
from layers_cases import ROUNDING, gradients, normal, relative_error
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from kernels import lora_linear as lora_linear_file
from kernels.lora_linear import (
    _UpcastLinear,
    linear,
    lora_linear,
    lora_linear_fused,
    lora_linear_torch,
)


def bf16_normal(*shape, seed):
    return normal(*shape, dtype=torch.bfloat16, seed=seed)


def assert_rounded_once(value, truth):
    """value is truth rounded to bfloat16 (2^-8 relative), give or take float32 accumulation."""
    assert value.dtype == torch.bfloat16
    assert ((value.double() - truth).abs() <= 2 ** -8 * truth.abs() + 1e-5).all()


# ---- bfloat16 products on CPUs without bfloat16 units -------------------------------------------

@pytest.mark.parametrize("x_learns, weight_learns", [(True, False), (False, True), (True, True)])
def test_upcast_linear_and_its_backward_round_once(x_learns, weight_learns):
    # Against float64 products of the same bfloat16 numbers; called directly, to be tested on CPUs
    # with bfloat16 units too. The gradients of y = x Wᵀ are grad W and gradᵀ x.
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


def test_upcast_linear_saves_no_float32_copy():
    # A frozen bfloat16 7B model has 13 GB of weights: float32 copies of them would be 26 GB more.
    # With the weight frozen the input is not saved either.
    x, weight = bf16_normal(7, 33, seed=0).requires_grad_(), bf16_normal(5, 33, seed=1)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        _UpcastLinear.apply(x, weight)
    assert [t.data_ptr() for t in saved] == [weight.data_ptr()]
    assert saved[0].dtype == torch.bfloat16


@pytest.mark.parametrize("has_units", [False, True])
def test_linear_gives_the_same_with_and_without_bf16_units(monkeypatch, has_units):
    # `linear` chooses by the CPU: either way the result is the float64 product rounded once, and
    # the product is formed in float32 only without units.
    monkeypatch.setattr(lora_linear_file, "cpu_multiplies_bf16", lambda: has_units)
    x, weight = bf16_normal(7, 33, seed=0).requires_grad_(), bf16_normal(5, 33, seed=1)
    y = linear(x, weight)
    assert ("Upcast" in type(y.grad_fn).__name__) != has_units
    assert_rounded_once(y, x.double() @ weight.double().T)
    assert_close(linear(x.float(), weight.float()), x.float() @ weight.float().T)


# ---- low-rank updates ---------------------------------------------------------------------------

CASES = {                       # T, in, out, ranks, which A and B are trained, weight trained?
    "one adapter": (7, 12, 10, [3], [True], False),
    "one row": (1, 12, 10, [8], [True], False),
    "no row": (0, 12, 10, [3], [True], False),
    "on top of a frozen one": (7, 12, 10, [2, 3], [False, True], False),
    "two of them": (5, 4, 20, [1, 2], [True, True], False),
    "frozen": (7, 12, 10, [3], [False], False),
    "a trained weight": (7, 12, 10, [3], [True], True),
    "no update": (7, 12, 10, [], [], True),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def make_inputs(t, width, out, ranks, trained, trained_weight, dtype=torch.float64):
    """x, weight, ((A, B, scaling), …); A and B are float32 beside a bfloat16 weight."""
    x = normal(t, width, dtype=dtype, seed=1).requires_grad_()
    weight = normal(out, width, dtype=dtype, seed=2, scale=width ** -0.5)
    wide, updates = torch.promote_types(dtype, torch.float32), []
    for i, (r, learns) in enumerate(zip(ranks, trained, strict=True)):
        updates.append((normal(r, width, dtype=wide, seed=3 + i, scale=0.3).requires_grad_(learns),
                        normal(out, r, dtype=wide, seed=7 + i, scale=0.3).requires_grad_(learns),
                        1.7 + i))
    return x, weight.requires_grad_(trained_weight), tuple(updates)


def trained(x, weight, updates):
    return [t for t in (x, weight, *(f for a, b, _ in updates for f in (a, b))) if t.requires_grad]


def true_lora(x, weight, updates):
    """x (W + Σ scaling B A)ᵀ in float64."""
    total = weight.double()
    for lora_A, lora_B, scaling in updates:
        total = total + scaling * lora_B.double() @ lora_A.double()
    return x.double() @ total.T


@pytest.mark.parametrize("function", [lora_linear_torch, lora_linear_fused])
@each_case
def test_values_and_every_gradient_in_float64(function, case):
    inputs = make_inputs(*case)
    found, truth = function(*inputs), true_lora(*inputs)
    assert_close(found, truth, rtol=0, atol=1e-12)
    learn = trained(*inputs)
    for mine, wanted in zip(gradients(found, learn), gradients(truth, learn), strict=True):
        assert_close(mine, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fused_is_no_further_from_the_truth_than_plain_torch(dtype):
    # And by itself: the long product, the sum, A and B are rounded once each, and so is what is
    # between A and B: 5 roundings; 1e-6 of the norm is float32's accumulation.
    inputs = make_inputs(40, 64, 48, [8, 4], [True, False], False, dtype)
    learn, truth = trained(*inputs), true_lora(*inputs)
    truths = [truth, *gradients(truth, learn)]
    results = []
    for function in (lora_linear_fused, lora_linear_torch):
        found = function(*inputs)
        results.append([found, *gradients(found, learn)])
    for mine, eager, wanted, like in zip(*results, truths, [inputs[0], *learn], strict=True):
        assert mine.dtype == like.dtype and mine.shape == wanted.shape
        budget = relative_error(eager, wanted) + ROUNDING[dtype] + 1e-6
        assert relative_error(mine, wanted) <= min(budget, 5 * ROUNDING[dtype] + 1e-6)


def test_gradcheck_of_the_fused_products():
    x, weight, updates = make_inputs(3, 4, 5, [2, 1], [True, True], True)
    factors = [f for a, b, _ in updates for f in (a, b)]

    def function(x, weight, *factors):
        pairs = zip(factors[::2], factors[1::2], [2.0, 0.3], strict=True)
        return lora_linear_fused(x, weight, tuple(pairs))
    assert torch.autograd.gradcheck(function, (x, weight, *factors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_of_zero_leaves_every_bit(dtype):
    # A new adapter's B is 0: before the first step policy and reference agree to the bit, since the
    # long product is the same call with and without the adapter, and comes first.
    x, weight, ((lora_A, lora_B, scaling),) = make_inputs(40, 64, 48, [8], [True], False, dtype)
    lora_B.data.zero_()
    found = lora_linear_fused(x, weight, ((lora_A, lora_B, scaling),))
    assert torch.equal(found, torch.nn.functional.linear(x, weight))


def saved_by(function, *inputs):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        function(*inputs)
    return saved


def test_only_x_and_the_products_with_a_are_kept():
    # [T, in] if an A is trained, [T, r] if its B is; and parameters, which exist anyway. In bf16 no
    # copy of A or B in another dtype.
    x, weight, updates = make_inputs(40, 64, 48, [8, 4], [False, True], False, torch.bfloat16)
    parameters = {t.data_ptr() for t in (weight, *updates[0][:2], *updates[1][:2])}
    saved = saved_by(lora_linear_fused, x, weight, updates)
    beside = [t for t in saved if t.data_ptr() not in parameters]
    assert [(t.shape, t.dtype) for t in beside] == [((40, 64), x.dtype), ((40, 4), x.dtype)]
    assert beside[0].data_ptr() == x.data_ptr()
    saved = saved_by(lora_linear_fused, x, weight, updates[:1])
    assert {t.data_ptr() for t in saved} <= parameters


def test_inputs_without_a_gradient_get_none():
    # The first layer's x: the embedding is frozen.
    x, weight, updates = make_inputs(7, 12, 10, [3], [True], False)
    learn = trained(x, weight, updates)[1:]
    found = gradients(lora_linear_fused(x.detach(), weight, updates), learn)
    for mine, wanted in zip(found, gradients(true_lora(x, weight, updates), learn), strict=True):
        assert_close(mine, wanted, rtol=0, atol=1e-12)
    assert not lora_linear_fused(x.detach(), weight, ()).requires_grad
    with torch.no_grad():
        assert not lora_linear_fused(x, weight, updates).requires_grad


def test_arguments_are_left_alone():
    # The sums are formed in place: in new tensors. A second backward gives the same bits.
    x, weight, updates = make_inputs(7, 12, 10, [2, 3], [True, True], True)
    learn = trained(x, weight, updates)
    before = [t.detach().clone() for t in learn]
    y = lora_linear_fused(x, weight, updates)
    upstream = torch.ones_like(y)
    first = torch.autograd.grad(y, learn, upstream, retain_graph=True)
    second = torch.autograd.grad(y, learn, upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, learn, strict=True))
    assert (upstream == 1).all()


@pytest.mark.parametrize("device, expected", [("cpu", "plain"), ("cuda", "fused")])
def test_a_gpu_adds_in_the_products_and_a_cpu_does_not(monkeypatch, device, expected):
    # On a CPU the specification's bits are those of runs made before. The tensors are fake.
    monkeypatch.setattr(lora_linear_file, "lora_linear_fused", lambda *arguments: "fused")
    monkeypatch.setattr(lora_linear_file, "lora_linear_torch", lambda *arguments: "plain")
    with FakeTensorMode():
        x, weight = torch.ones(3, 4, device=device), torch.ones(5, 4, device=device)
        assert lora_linear(x, weight, ()) == expected
