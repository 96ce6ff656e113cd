"""linear_logps: log-probs, gradient, entropy and KL are as exact as their dtype allows."""
import math

import pytest
import torch
from linear_logps_cases import (
    SHAPES,
    each_dtype,
    each_place,
    eager_logps,
    gradient_of,
    linear_logps,
    make_rows,
    rounds_logits,
    row_errors,
    true_gradient,
    true_logps,
)
from torch.testing import assert_close

# numpy warns in the interpreter, about the columns that pad a row
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")


# ---- error budget -------------------------------------------------------------------------------

@each_place
@each_dtype
@pytest.mark.parametrize("n, m, chunk_rows", SHAPES.values(), ids=SHAPES)
def test_logps_and_gradient_for_every_chunking(linear_logps, n, m, chunk_rows, dtype, device):
    # float32: 1e-5 absolute, and 1e-5 of the gradient's length row by row, whatever its sign
    # upstream. bfloat16: no further from the truth than eager torch (+ 1e-5); the gradient g u,
    # u = (onehot - softmax) W, is rounded twice, as u and as g u, by up to 2^-8 = 4e-3 and some
    # 2e-3 of a row's length: 6e-3.
    hidden, reference_hidden, weight, labels, reference_labels = make_rows(
        n, m, dtype=dtype, device=device, seed=n, scale=3.0)
    hidden.requires_grad_()
    logps, reference_logps, *_ = linear_logps(hidden, reference_hidden, weight, labels,
                                              reference_labels, chunk_rows)
    assert logps.shape == (n,) and reference_logps.shape == (m,)
    assert logps.dtype == reference_logps.dtype == torch.float32
    assert not reference_logps.requires_grad
    for ours, rows, row_labels in ((logps, hidden, labels),
                                   (reference_logps, reference_hidden, reference_labels)):
        truth = true_logps(rows, weight, row_labels)
        allowed = 1e-5
        if dtype == torch.bfloat16 and len(rows):
            eager = eager_logps(rows.detach(), weight, row_labels)
            allowed += (eager.double() - truth).abs().max().item()
        assert ((ours.double() - truth).abs() <= allowed).all()
    upstream = torch.randn(n, generator=torch.Generator().manual_seed(1)).to(device)   # both signs
    gradient = gradient_of(logps, hidden, upstream)
    assert gradient.dtype == dtype and gradient.shape == hidden.shape
    truth = true_gradient(hidden, weight, labels, upstream)
    allowed = torch.full((n,), 1e-5 if dtype == torch.float32 else 6e-3, device=device)
    if rounds_logits(linear_logps, device):           # the softmax of rounded logits: as eager's
        eager = gradient_of(eager_logps(hidden, weight, labels), hidden, upstream)
        allowed = allowed + row_errors(eager, truth)
    assert (row_errors(gradient, truth) <= allowed).all()


@each_place
@each_dtype
def test_logps_at_llama_vocabulary_and_large_logits(linear_logps, dtype, device):
    # V = 32000 and logits of spread 30, where eager bfloat16 is off by up to half a nat: its logits
    # are rounded to 8 bits. Ours must keep float32 logits: 1e-2 of that error at most on a CPU.
    n, m = 13, 6
    hidden, reference_hidden, weight, labels, reference_labels = make_rows(
        n, m, width=48, vocab=32000, dtype=dtype, device=device, seed=2, scale=30.0)
    hidden.requires_grad_()
    logps, reference_logps, *_ = linear_logps(hidden, reference_hidden, weight, labels,
                                              reference_labels, 8)
    ours = torch.cat([logps, reference_logps]).detach().double()
    rows = torch.cat([hidden.detach(), reference_hidden])
    all_labels = torch.cat([labels, reference_labels])
    truth = true_logps(rows, weight, all_labels)
    error = (ours - truth).abs().max().item()
    eager_error = (eager_logps(rows, weight, all_labels).double() - truth).abs().max().item()
    # float32 itself rounds logits of 100 by 100 · 2^-24 · sqrt(48) terms: a few 1e-5
    assert error <= eager_error + 5e-5
    if dtype == torch.bfloat16 and not rounds_logits(linear_logps, device):
        assert eager_error > 0.05 and error < 1e-2 * eager_error
    upstream = torch.linspace(-1, 1, n, device=device)
    upstream[n // 2] = 0.5
    gradient = gradient_of(logps, hidden, upstream)
    truth = true_gradient(hidden, weight, labels, upstream)
    allowed = 5e-5 if dtype == torch.float32 else 6e-3
    if rounds_logits(linear_logps, device):
        eager = gradient_of(eager_logps(hidden, weight, labels), hidden, upstream)
        allowed += row_errors(eager, truth).max().item()
    assert (row_errors(gradient, truth) <= allowed).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_extreme_logits_by_hand(dtype):
    # One-hot rows make the logits a row of the head, exactly (2^14 is a bfloat16, 1e4 is not).
    # (16384, -16384, 0): log-probs 0, -32768, -16384, since exp(-16384) = 0. All three -16384:
    # -ln 3 (without subtracting the maximum: log 0). Two on top: -ln 2 and -32768 - ln 2.
    top = 16384.0
    cases = [([top, -top, 0], [0, -2 * top, -top]),
             ([-top] * 3, [-math.log(3)] * 3),
             ([top] * 3, [-math.log(3)] * 3),
             ([top, top, -top], [-math.log(2), -math.log(2), -2 * top - math.log(2)])]
    weight = torch.tensor([logits for logits, _ in cases]).T.to(dtype).contiguous()       # [3, 4]
    hidden = torch.eye(4).repeat_interleave(3, 0).to(dtype).requires_grad_()              # [12, 4]
    labels = torch.arange(3).repeat(4)
    expected = torch.tensor([value for _, values in cases for value in values],
                            dtype=torch.float64)
    found = linear_logps(hidden, hidden.detach(), weight, labels, labels, chunk_rows=5)
    for logps in (found.policy_logps, found.reference_logps):
        assert_close(logps.double(), expected, rtol=1e-7, atol=1e-6)
    gradient = gradient_of(found.policy_logps, hidden, torch.ones(12))
    assert gradient.isfinite().all()
    # A certain label has no gradient; the second of case 1: W_1 - W_0 = -32768 in column 0.
    assert gradient[0].abs().max() == 0
    assert gradient[1, 0].item() == -2 * top


@each_place
@each_dtype
def test_gradient_of_confident_rows_does_not_cancel(linear_logps, dtype, device):
    # p(label) = 1 - q with q about 1e-3: u = (onehot - softmax) W = q W_label - ... is small. With
    # softmax rounded to bfloat16 first, 1 - p is 1 - 1 = 0 or 1 - 0.996: off by 100 % and more.
    width = 16
    weight = torch.eye(width).to(device, dtype)
    hidden = torch.zeros(width, width)
    hidden.fill_diagonal_(10.0)                       # q = 15 / (e^10 + 15) = 6.8e-4
    hidden = hidden.to(device, dtype).requires_grad_()
    labels = torch.arange(width, device=device)
    logps = linear_logps(hidden, hidden[:0].detach(), weight, labels, labels[:0]).policy_logps
    gradient = gradient_of(logps, hidden, torch.ones(width, device=device))
    truth = true_gradient(hidden, weight, labels, torch.ones(width, device=device))
    assert_close(truth[0, 0].item(), 15 / (math.e ** 10 + 15), rtol=1e-9, atol=0)
    # in float32 1 - p has 2^-24 of error over q = 6.8e-4: 1e-4
    assert (row_errors(gradient, truth) <= (2e-4 if dtype == torch.float32 else 6e-3)).all()


@each_place
@pytest.mark.parametrize("vocab", [1, 16, 33, 4095, 4096, 4097, 8200])
def test_first_and_last_label(linear_logps, vocab, device):
    # An off-by-one at either end of the vocabulary reads a neighbour's logit or out of bounds; so
    # may the end of a block of 4096 columns, or the columns that pad a row to a multiple of 16.
    hidden, reference_hidden, weight, _, _ = make_rows(4, 2, vocab=vocab, device=device, seed=3)
    hidden.requires_grad_()
    labels = torch.tensor([0, vocab - 1, 0, vocab - 1], device=device)
    logps, reference_logps, *_ = linear_logps(hidden, reference_hidden, weight, labels,
                                              labels[:2], 3)
    assert_close(logps.double(), true_logps(hidden, weight, labels), rtol=0, atol=1e-5)
    assert_close(reference_logps.double(), true_logps(reference_hidden, weight, labels[:2]),
                 rtol=0, atol=1e-5)
    upstream = torch.tensor([1.0, -1.0, -2.0, 2.0], device=device)
    truth = true_gradient(hidden, weight, labels, upstream)
    gradient = gradient_of(logps, hidden, upstream)
    if vocab == 1:
        assert gradient.abs().max() == 0                    # the only label is certain
    else:
        assert (row_errors(gradient, truth) <= 1e-5).all()


@each_place
def test_bfloat16_gradient_adds_rounding_only(linear_logps, device):
    # Logits that bfloat16 holds exactly: one-hot rows read columns of W, multiples of 1/8 below 8.
    # What is left is the rounding of onehot - softmax, of u = (onehot - softmax) W and of the
    # gradient g u, 2^-9 each: 6e-3 in all.
    generator = torch.Generator().manual_seed(17)
    weight = (torch.randint(-63, 64, (1000, 32), generator=generator) / 8).to(device,
                                                                              torch.bfloat16)
    hidden = torch.eye(32).to(device, torch.bfloat16).requires_grad_()
    labels = torch.randint(1000, (32,), generator=generator).to(device)
    logps = linear_logps(hidden, hidden[:0].detach(), weight, labels, labels[:0], 10).policy_logps
    assert ((logps.double() - true_logps(hidden, weight, labels)).abs() <= 1e-5).all()
    upstream = torch.randn(32, generator=generator).to(device)
    truth = true_gradient(hidden, weight, labels, upstream)
    assert (row_errors(gradient_of(logps, hidden, upstream), truth) <= 6e-3).all()


def test_gradcheck():
    # Central differences in float64 of every entry of hidden, chunks of two over five rows.
    hidden, reference_hidden, weight, labels, reference_labels = make_rows(
        5, 2, width=4, vocab=7, dtype=torch.float64, seed=4)
    hidden.requires_grad_()

    def policy_logps(hidden):
        return linear_logps(hidden, reference_hidden, weight, labels, reference_labels,
                            2).policy_logps

    assert policy_logps(hidden).dtype == torch.float64
    assert torch.autograd.gradcheck(policy_logps, hidden, eps=1e-6, atol=1e-9, rtol=1e-7)


def test_second_derivatives_are_refused_or_right():
    # The backward multiplies by u = (onehot - softmax) W, saved as a constant: a derivative of the
    # gradient would lack du/dh, and a gradient penalty's own gradient would be off by up to three
    # times its size. Eager torch is the truth here.
    hidden, reference_hidden, weight, labels, reference_labels = make_rows(
        3, 0, width=4, vocab=7, dtype=torch.float64, seed=0)
    hidden.requires_grad_()

    def penalty_gradient(logps):
        gradient, = torch.autograd.grad((logps ** 2).sum(), hidden, create_graph=True)
        return torch.autograd.grad((gradient ** 2).sum(), hidden)[0]

    expected = penalty_gradient(eager_logps(hidden, weight, labels))
    try:
        ours = penalty_gradient(linear_logps(hidden, reference_hidden, weight, labels,
                                             reference_labels).policy_logps)
    except RuntimeError:
        return                                              # once_differentiable refuses
    assert_close(ours, expected, rtol=1e-6, atol=0)


# ---- entropy and exact KL -----------------------------------------------------------------------

def test_entropy_and_kl_by_hand():
    # The head is the identity, so rows are logits. p = (1/2, 1/4, 1/4), q = (1/4, 1/2, 1/4):
    # H(p) = 1.5 ln 2, KL(p || q) = 1/2 ln 2 - 1/4 ln 2 = 1/4 ln 2. Uniform: H = ln 3. Logits of
    # +-1e4: p is certain, H = 0, and KL(p || uniform) = ln 3. Equal rows: KL = 0 exactly.
    p = torch.tensor([[0.5, 0.25, 0.25], [1 / 3] * 3, [1 / 3] * 3]).log()
    q = torch.tensor([[0.25, 0.5, 0.25], [1 / 3] * 3, [0.2, 0.3, 0.5]]).log()
    sure = torch.tensor([[1e4, -1e4, 0.0]])
    p, q = torch.cat([p + 7, sure, sure]), torch.cat([q - 5, torch.zeros(1, 3), sure])
    labels, weight = torch.zeros(5, dtype=torch.int64), torch.eye(3)
    for chunk_rows in (1, 4, 100):
        _, _, entropy, kl = linear_logps(p, q, weight, labels, labels, chunk_rows, entropy=True,
                                         kl=True)
        assert_close(entropy, torch.tensor([1.5 * math.log(2), math.log(3), math.log(3), 0, 0]),
                     rtol=0, atol=1e-6)
        uniform_to_q = -sum(math.log(3 * value) for value in (0.2, 0.3, 0.5)) / 3
        assert_close(kl, torch.tensor([0.25 * math.log(2), 0, uniform_to_q, math.log(3), 0]),
                     rtol=0, atol=1e-6)
        assert kl[4] == 0


@each_place
@each_dtype
@pytest.mark.parametrize("wanted", [{"entropy": True}, {"kl": True},
                                    {"entropy": True, "kl": True}], ids="-".join)
def test_entropy_and_kl_against_float64(linear_logps, wanted, dtype, device):
    # 11 rows and their references, chunks of 4 + 4 rows, 4105 columns. Asking for them changes
    # neither the log-probs nor the gradient. bfloat16 logits of up to 12 are off by 2^-5 each, the
    # entropy and the KL of nearby policies, averages over the vocabulary, by far less.
    hidden, _, weight, labels, _ = make_rows(11, 0, vocab=4105, dtype=dtype, device=device,
                                             seed=30, scale=3.0)
    near = (hidden.float() + 0.1 * torch.randn(
        hidden.shape, generator=torch.Generator().manual_seed(31)).to(device)).to(dtype)
    weight[-1] = near[0] / 10                # row 0 has its largest logit in the second block
    hidden.requires_grad_()
    found = linear_logps(hidden, near, weight, labels, labels, 8, **wanted)
    assert all((getattr(found, name) is not None) == (name in wanted) for name in ("entropy", "kl"))
    assert not any(getattr(found, name).requires_grad for name in wanted)
    log_p, log_q = ((rows.detach().double() @ weight.double().T).log_softmax(-1)
                    for rows in (hidden, near))
    truths = {"entropy": -(log_p.exp() * log_p).sum(-1),
              "kl": (log_p.exp() * (log_p - log_q)).sum(-1)}
    for name in wanted:
        ours = getattr(found, name)
        assert ours.shape == (11,) and ours.dtype == torch.float32
        allowed = {"entropy": 0.02, "kl": 2e-3} if rounds_logits(linear_logps, device) and (
            dtype == torch.bfloat16) else {"entropy": 1e-5, "kl": 1e-5}
        assert ((ours.double() - truths[name]).abs() <= allowed[name]).all()
    # (to the last bits: kl cuts other chunks, and a product's sums depend on its shape)
    plain = linear_logps(hidden, near, weight, labels, labels, 8)
    assert plain.entropy is None and plain.kl is None
    assert_close(plain[:2], found[:2], rtol=0, atol=1e-5)
    ones = torch.ones(11, device=device)
    errors = row_errors(gradient_of(plain.policy_logps, hidden, ones),
                        gradient_of(found.policy_logps, hidden, ones).double())
    assert (errors <= (1e-5 if dtype == torch.float32 else 6e-3)).all()


# ---- a head that is trained ---------------------------------------------------------------------

@pytest.mark.parametrize("n, m, chunk_rows", SHAPES.values(), ids=SHAPES)
def test_trainable_head_equals_eager(n, m, chunk_rows):
    # Full fine-tuning trains the head too: the same log-probs, and both gradients, as a product
    # over the whole vocabulary gives.
    hidden, reference_hidden, weight, labels, reference_labels = make_rows(
        n, m, dtype=torch.float64, seed=20 + n)
    hidden.requires_grad_()
    weight.requires_grad_()
    logps, reference_logps, *_ = linear_logps(hidden, reference_hidden, weight, labels,
                                              reference_labels, chunk_rows)
    eager = eager_logps(hidden, weight, labels)
    assert_close(logps, eager, rtol=0, atol=1e-12)
    assert_close(reference_logps, eager_logps(reference_hidden, weight, reference_labels).detach(),
                 rtol=0, atol=1e-12)
    upstream = torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    ours = torch.autograd.grad((logps * upstream).sum(), (hidden, weight))
    theirs = torch.autograd.grad((eager * upstream).sum(), (hidden, weight))
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b, rtol=0, atol=1e-12)


@each_dtype
def test_frozen_and_trainable_heads_agree(dtype):
    # Two code paths, one result: within what rounding logits to the inputs' dtype costs.
    hidden, reference_hidden, weight, labels, reference_labels = make_rows(
        9, 5, dtype=dtype, seed=13)
    hidden.requires_grad_()
    frozen = linear_logps(hidden, reference_hidden, weight, labels, reference_labels, 4)
    gradient = gradient_of(frozen.policy_logps, hidden, torch.ones(9))
    weight.requires_grad_()
    trained = linear_logps(hidden, reference_hidden, weight, labels, reference_labels, 4)
    atol = 1e-5 if dtype == torch.float32 else 0.02           # logits up to 4: 4 · 2^-8
    assert frozen[2:] == trained[2:] == (None, None)
    for a, b in zip(frozen[:2], trained[:2], strict=True):
        assert b.dtype == torch.float32
        assert_close(a, b, rtol=0, atol=atol)
    errors = row_errors(gradient_of(trained.policy_logps, hidden, torch.ones(9)),
                        gradient.double())
    assert (errors <= (1e-5 if dtype == torch.float32 else 2e-2)).all()
