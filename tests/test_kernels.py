"""linear_logps: as exact as its dtype allows, no [N, V] tensor, bad input refused by name."""
import gc
import math
import os

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import linear_logps_torch, linear_logps_triton
from kernels.linear_logps import _default_chunk_rows, logp_rows_triton_

# Triton's interpreter runs the kernel on a CPU. It must be chosen before the kernel is defined, so
# test_kernel_code.py runs this whole file once more with TRITON_INTERPRET=1.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
linear_logps = linear_logps_triton if INTERPRETED else linear_logps_torch
PLACES = [(linear_logps, "cpu")]
if torch.cuda.is_available():
    PLACES += [(linear_logps_torch, "cuda")]
    PLACES += [(linear_logps_triton, "cuda")] if not INTERPRETED else []
each_place = pytest.mark.parametrize("linear_logps, device", PLACES,
                                     ids=[f"{f.__name__}-{device}" for f, device in PLACES])
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # numpy, padding
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def make_rows(n, m, width=24, vocab=301, dtype=torch.float32, device="cpu", seed=0, scale=1.0):
    """policy_hidden, reference_hidden, weight, policy_labels, reference_labels; logits ~ scale."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    labels = torch.randint(vocab, (n + m,), generator=generator).to(device)
    return (scale * normal(n, width), normal(m, width) * scale, normal(vocab, width) / width ** 0.5,
            labels[:n], labels[n:])


def true_logps(hidden, weight, labels):
    """log softmax(hidden Wᵀ)[label] in float64, of the very numbers the rounded inputs hold."""
    logits = hidden.detach().double() @ weight.detach().double().T
    top = logits.max(-1).values if logits.numel() else logits.sum(-1)
    lse = top + (logits - top[:, None]).exp().sum(-1).log()
    return logits.gather(1, labels[:, None])[:, 0] - lse


def true_gradient(hidden, weight, labels, upstream):
    """Σ_v (1[v = label] - softmax_v) W_v times the upstream gradient of each row, float64."""
    weight = weight.detach().double()
    logits = hidden.detach().double() @ weight.T
    rows = torch.arange(len(labels), device=labels.device)
    error = -(logits - logits.max(-1, keepdim=True).values).exp()
    error /= -error.sum(-1, keepdim=True)
    # 1 - softmax as a sum over the others: 1 - p loses every digit where p is near 1
    others = error.clone()
    others[rows, labels] = 0
    error[rows, labels] = -others.sum(-1)
    return upstream.double()[:, None] * (error @ weight)


def eager_logps(hidden, weight, labels):
    """What everyone writes: the whole product in the inputs' dtype, then float32."""
    logits = hidden @ weight.T
    logits = logits.float() if logits.dtype == torch.bfloat16 else logits
    return logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]


def gradient_of(logps, hidden, upstream):
    return torch.autograd.grad((logps * upstream).sum(), hidden)[0]


def row_errors(values, truth):
    """‖value - truth‖ / ‖truth‖ of every row."""
    return (values.double() - truth).norm(dim=-1) / truth.norm(dim=-1)


def rounds_logits(linear_logps, device):
    """bfloat16 rows: whether logits are rounded to bfloat16, as a GPU's product does."""
    return linear_logps is linear_logps_triton or device != "cpu"


# ---- error budget -------------------------------------------------------------------------------

SHAPES = {                        # N, M, chunk_rows
    "chunk larger than N + M": (7, 5, 512),
    "chunk divides N + M": (8, 4, 4),
    "chunk divides neither, straddles both": (11, 6, 4),
    "chunk of one row": (3, 2, 1),
    "one row": (1, 0, 512),
    "one row of each, one chunk": (1, 1, 2),
    "no reference rows": (9, 0, 4),
    "only reference rows": (0, 9, 4),
    "nothing": (0, 0, 4),
}


@each_place
@each_dtype
@pytest.mark.parametrize("n, m, chunk_rows", SHAPES.values(), ids=SHAPES)
def test_logps_and_gradient_for_every_chunking(linear_logps, n, m, chunk_rows, dtype, device):
    # float32: 1e-5 absolute, and 1e-5 of the gradient's length row by row, whatever its sign
    # upstream. bfloat16: no further from the truth than eager torch (+ 1e-5); the gradient is
    # rounded twice, as u and as g u, by up to 2^-8 = 4e-3 and some 2e-3 of a row's length: 6e-3.
    hidden, reference_hidden, weight, labels, reference_labels = make_rows(
        n, m, dtype=dtype, device=device, seed=n, scale=3.0)
    hidden.requires_grad_()
    logps, reference_logps = linear_logps(hidden, reference_hidden, weight, labels,
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
    logps, reference_logps = linear_logps(hidden, reference_hidden, weight, labels,
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
    policy_logps, reference_logps = linear_logps(hidden, hidden.detach(), weight, labels, labels,
                                                 chunk_rows=5)
    for logps in (policy_logps, reference_logps):
        assert_close(logps.double(), expected, rtol=1e-7, atol=1e-6)
    gradient = gradient_of(policy_logps, hidden, torch.ones(12))
    assert gradient.isfinite().all()
    # A sure label has no gradient; the second of case 1 pulls W_1 - W_0 = -32768 in column 0.
    assert gradient[0].abs().max() == 0
    assert gradient[1, 0].item() == -2 * top


@each_place
@each_dtype
def test_gradient_of_confident_rows_does_not_cancel(linear_logps, dtype, device):
    # p(label) = 1 - q with q about 1e-3: u = q W_label - ..., a small difference. Rounding softmax
    # to bfloat16 before onehot - softmax leaves 1 - 1 = 0 or 1 - 0.996: off by 100 % and more.
    width = 16
    weight = torch.eye(width).to(device, dtype)
    hidden = torch.zeros(width, width)
    hidden.fill_diagonal_(10.0)                       # q = 15 / (e^10 + 15) = 6.8e-4
    hidden = hidden.to(device, dtype).requires_grad_()
    labels = torch.arange(width, device=device)
    logps, _ = linear_logps(hidden, hidden[:0].detach(), weight, labels, labels[:0])
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
    logps, reference_logps = linear_logps(hidden, reference_hidden, weight, labels, labels[:2], 3)
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
    # What is left is the rounding of onehot - softmax, of u and of g u, 2^-9 each: 6e-3 in all.
    generator = torch.Generator().manual_seed(17)
    weight = (torch.randint(-63, 64, (1000, 32), generator=generator) / 8).to(device,
                                                                              torch.bfloat16)
    hidden = torch.eye(32).to(device, torch.bfloat16).requires_grad_()
    labels = torch.randint(1000, (32,), generator=generator).to(device)
    logps, _ = linear_logps(hidden, hidden[:0].detach(), weight, labels, labels[:0], 10)
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
        return linear_logps(hidden, reference_hidden, weight, labels, reference_labels, 2)[0]

    assert policy_logps(hidden).dtype == torch.float64
    assert torch.autograd.gradcheck(policy_logps, hidden, eps=1e-6, atol=1e-9, rtol=1e-7)


def test_second_derivatives_are_refused_or_right():
    # u is kept as a constant, so a derivative of the gradient lacks du/dh: a gradient penalty's own
    # gradient is off by up to three times its size. Eager torch is the truth here.
    hidden, reference_hidden, weight, labels, reference_labels = make_rows(
        3, 0, width=4, vocab=7, dtype=torch.float64, seed=0)
    hidden.requires_grad_()

    def penalty_gradient(logps):
        gradient, = torch.autograd.grad((logps ** 2).sum(), hidden, create_graph=True)
        return torch.autograd.grad((gradient ** 2).sum(), hidden)[0]

    expected = penalty_gradient(eager_logps(hidden, weight, labels))
    try:
        ours = penalty_gradient(linear_logps(hidden, reference_hidden, weight, labels,
                                             reference_labels)[0])
    except RuntimeError:
        return                                              # once_differentiable says so
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
    # 11 rows and their references, chunks of 4 + 4 rows, 4105 columns. They change neither the
    # log-probs nor the gradient. bfloat16 logits of up to 12 are off by 2^-5 each: the entropy
    # and the KL of nearby policies by far less, as each is flat where p is where it is.
    hidden, _, weight, labels, _ = make_rows(11, 0, vocab=4105, dtype=dtype, device=device,
                                             seed=30, scale=3.0)
    near = (hidden.float() + 0.1 * torch.randn(
        hidden.shape, generator=torch.Generator().manual_seed(31)).to(device)).to(dtype)
    weight[-1] = near[0] / 10                # row 0 has its largest logit in the second block
    hidden.requires_grad_()
    logps, reference_logps, *extras = linear_logps(hidden, near, weight, labels, labels, 8,
                                                   **wanted)
    assert len(extras) == len(wanted) and not any(t.requires_grad for t in extras)
    log_p, log_q = ((rows.detach().double() @ weight.double().T).log_softmax(-1)
                    for rows in (hidden, near))
    truths = {"entropy": -(log_p.exp() * log_p).sum(-1),
              "kl": (log_p.exp() * (log_p - log_q)).sum(-1)}
    for name, ours in zip(wanted, extras, strict=True):
        assert ours.shape == (11,) and ours.dtype == torch.float32
        allowed = {"entropy": 0.02, "kl": 2e-3} if rounds_logits(linear_logps, device) and (
            dtype == torch.bfloat16) else {"entropy": 1e-5, "kl": 1e-5}
        assert ((ours.double() - truths[name]).abs() <= allowed[name]).all()
    # (to the last bits: kl cuts other chunks, and a product's sums depend on its shape)
    plain = linear_logps(hidden, near, weight, labels, labels, 8)
    assert_close(plain, (logps, reference_logps), rtol=0, atol=1e-5)
    ones = torch.ones(11, device=device)
    errors = row_errors(gradient_of(plain[0], hidden, ones),
                        gradient_of(logps, hidden, ones).double())
    assert (errors <= (1e-5 if dtype == torch.float32 else 6e-3)).all()


# ---- rows do not see each other -----------------------------------------------------------------

@each_place
@each_dtype
def test_same_bits_twice(linear_logps, dtype, device):
    # Nothing left over in the reused buffer, no sum whose order varies.
    rows = make_rows(37, 20, dtype=dtype, device=device, seed=5)
    rows[0].requires_grad_()
    upstream = torch.randn(37, generator=torch.Generator().manual_seed(6)).to(device)
    first, second = [], []
    for results in (first, second):
        logps, reference_logps = linear_logps(*rows, 16)
        results += [logps, reference_logps, gradient_of(logps, rows[0], upstream)]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@each_place
@each_dtype
def test_no_result_depends_on_what_memory_held(linear_logps, dtype, device):
    # Outputs and buffers are allocated without being cleared. Filled with NaN first (which torch
    # does in its deterministic mode), every number must come out as before: 301 columns leave
    # padding in a row of 304, 17 rows leave part of the buffer unused.
    rows = make_rows(17, 17, dtype=dtype, device=device, seed=16)
    rows[0].requires_grad_()
    upstream = torch.ones(17, device=device)
    clean = linear_logps(*rows, 8, True, True)
    clean = *clean, gradient_of(clean[0], rows[0], upstream)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        poisoned = linear_logps(*rows, 8, True, True)
        poisoned = *poisoned, gradient_of(poisoned[0], rows[0], upstream)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(clean, poisoned, strict=True))


@each_place
def test_policy_and_reference_rows_are_independent(linear_logps, device):
    # 11 + 6 rows in chunks of 4: rows 8..11 share a chunk. Other rows' hidden states and labels
    # must not move a bit of a row's log-prob or gradient.
    hidden, reference_hidden, weight, labels, reference_labels = make_rows(
        11, 6, device=device, seed=7)
    other = make_rows(11, 6, device=device, seed=8)
    hidden.requires_grad_()
    upstream = torch.ones(11, device=device)
    logps, reference_logps = linear_logps(hidden, reference_hidden, weight, labels,
                                          reference_labels, 4)
    gradient = gradient_of(logps, hidden, upstream)
    logps_again, _ = linear_logps(hidden, other[1], weight, labels, other[4], 4)
    assert torch.equal(logps, logps_again)
    assert torch.equal(gradient, gradient_of(logps_again, hidden, upstream))
    _, reference_again = linear_logps(other[0], reference_hidden, weight, other[3],
                                      reference_labels, 4)
    assert torch.equal(reference_logps, reference_again)


def test_gradient_reaches_the_rows_that_have_an_upstream_gradient():
    # g_n = 0 makes row n's gradient exactly 0 and leaves the others alone.
    rows = make_rows(6, 3, seed=9)
    rows[0].requires_grad_()
    upstream = torch.tensor([1.0, 0.0, -3.0, 0.0, 0.5, 0.0])
    logps, _ = linear_logps(*rows, 4)
    gradient = gradient_of(logps, rows[0], upstream)
    assert torch.equal(gradient.abs().sum(-1) == 0, upstream == 0)


@pytest.mark.parametrize("trained_head", [False, True])
def test_no_gradient_reaches_the_reference(trained_head):
    # The reference is a constant of every objective, even if its hidden states have a graph.
    hidden, reference_hidden, weight, labels, reference_labels = make_rows(5, 4, seed=10)
    hidden.requires_grad_()
    reference_hidden.requires_grad_()
    weight.requires_grad_(trained_head)
    logps, reference_logps = linear_logps(hidden, reference_hidden, weight, labels,
                                          reference_labels, 3)
    assert logps.requires_grad and not reference_logps.requires_grad
    (logps.sum() - reference_logps.sum()).backward()
    assert reference_hidden.grad is None


def test_without_a_gradient_the_logps_are_the_same():
    # Evaluation runs under no_grad, where no u is formed.
    rows = make_rows(9, 5, seed=11)
    with torch.no_grad():
        quiet = linear_logps(*rows, 4)
    rows[0].requires_grad_()
    loud = linear_logps(*rows, 4)
    assert not quiet[0].requires_grad and loud[0].requires_grad
    assert torch.equal(quiet[0], loud[0]) and torch.equal(quiet[1], loud[1])


def test_arguments_are_left_alone():
    # The log-softmax works in place: on the buffer, not on the caller's tensors.
    rows = make_rows(9, 5, seed=12)
    before = [t.clone() for t in rows]
    rows[0].requires_grad_()
    logps, _ = linear_logps(*rows, 4)
    logps.sum().backward()
    assert all(torch.equal(a, b.detach()) for a, b in zip(before, rows, strict=True))


# ---- a head that is trained ---------------------------------------------------------------------

@pytest.mark.parametrize("n, m, chunk_rows", SHAPES.values(), ids=SHAPES)
def test_trainable_head_equals_eager(n, m, chunk_rows):
    # Full fine-tuning trains the head too: the same log-probs, and both gradients, as a product
    # over the whole vocabulary gives.
    hidden, reference_hidden, weight, labels, reference_labels = make_rows(
        n, m, dtype=torch.float64, seed=20 + n)
    hidden.requires_grad_()
    weight.requires_grad_()
    logps, reference_logps = linear_logps(hidden, reference_hidden, weight, labels,
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
    # Two code paths, one answer: within what rounding logits to the inputs' dtype costs.
    hidden, reference_hidden, weight, labels, reference_labels = make_rows(
        9, 5, dtype=dtype, seed=13)
    hidden.requires_grad_()
    frozen = linear_logps(hidden, reference_hidden, weight, labels, reference_labels, 4)
    gradient = gradient_of(frozen[0], hidden, torch.ones(9))
    weight.requires_grad_()
    trained = linear_logps(hidden, reference_hidden, weight, labels, reference_labels, 4)
    atol = 1e-5 if dtype == torch.float32 else 0.02           # logits up to 4: 4 · 2^-8
    for a, b in zip(frozen, trained, strict=True):
        assert b.dtype == torch.float32
        assert_close(a, b, rtol=0, atol=atol)
    errors = row_errors(gradient_of(trained[0], hidden, torch.ones(9)), gradient.double())
    assert (errors <= (1e-5 if dtype == torch.float32 else 2e-2)).all()


# ---- memory -------------------------------------------------------------------------------------

class Recorder(TorchDispatchMode):
    """Remembers every storage created inside: its bytes, and whether it still lives."""

    def __init__(self, inputs):
        super().__init__()
        self.given, self.storages = {t.untyped_storage()._cdata for t in inputs}, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                if storage._cdata not in self.given:                # else a view of an input
                    self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result

    def largest(self):
        return max(size for _, size in self.storages.values())

    def alive(self):
        gc.collect()                       # Triton's interpreter leaves its arguments in a cycle
        return sum(size for reference, size in self.storages.values() if not reference.expired())


@pytest.mark.parametrize("trained_head", [False, True])
def test_logits_of_all_rows_never_exist(trained_head):
    # N = M = 600, V = 1008: [N, V] in float32 is 2.4 MB, a chunk of 50 rows 0.2 MB, the head
    # 32 kB. Largest of all tensors in forward and backward: one chunk. Kept between the two: u, as
    # large as the hidden states; nothing of the chunks, whose logits a trained head forms again.
    n, vocab, width, chunk_rows = 600, 1008, 8, 50
    rows = make_rows(n, n, width=width, vocab=vocab, seed=14)
    rows[0].requires_grad_()
    rows[2].requires_grad_(trained_head)
    with Recorder(rows) as recorder:
        logps, reference_logps = linear_logps(*rows, chunk_rows)
    assert recorder.largest() == 4 * chunk_rows * vocab
    assert recorder.alive() <= 4 * n * width + 4 * 2 * n                  # u and the log-probs
    with Recorder(rows) as recorder:
        (logps.sum() - reference_logps.sum()).backward()
    assert recorder.largest() <= 4 * chunk_rows * vocab


@pytest.mark.parametrize("vocab, chunk", [(768, 512), (16384, 512), (32000, 262), (10 ** 8, 1)])
def test_a_frozen_heads_chunk_on_a_cpu_is_34_mb_and_512_rows_at_most(vocab, chunk):
    weight = torch.empty(1, 1)
    assert _default_chunk_rows(weight.expand(vocab, 1)) == chunk
    assert _default_chunk_rows(weight.requires_grad_().expand(vocab, 1)) == 512


def test_one_buffer_serves_every_chunk():
    # Frozen head: [chunk, V] is created once, not per chunk, in float32 by the twin and in the
    # rows' type for the kernel; the twin's float32 copy of the head does not outlive the forward.
    n, vocab, width, chunk_rows = 96, 512, 8, 16
    rows = make_rows(n, 0, width=width, vocab=vocab, dtype=torch.bfloat16, seed=15)
    rows[0].requires_grad_()
    with Recorder(rows) as recorder:
        logps, _ = linear_logps(*rows, chunk_rows)
    sizes = [size for _, size in recorder.storages.values()]
    itemsize = 2 if INTERPRETED else 4
    assert sizes.count(itemsize * chunk_rows * vocab) == 1
    assert max(sizes) == itemsize * chunk_rows * vocab
    assert recorder.alive() <= 2 * n * width + 4 * n                      # u and the log-probs
    assert logps.requires_grad


# ---- refusals -----------------------------------------------------------------------------------

REFUSALS = {                      # which argument becomes what, and the error's words
    "policy width": (0, torch.zeros(3, 5), r"policy_hidden is \[3, 5\]; expected \[rows, 4\] to "
                                           r"fit weight \[7, 4\]"),
    "reference width": (1, torch.zeros(2, 5), r"reference_hidden is \[2, 5\]; expected \[rows, "),
    "policy not a matrix": (0, torch.zeros(3, 1, 4), r"policy_hidden is \[3, 1, 4\]; expected"),
    "reference not a matrix": (1, torch.zeros(4), r"reference_hidden is \[4\]; expected"),
    "policy dtype": (0, torch.zeros(3, 4, dtype=torch.bfloat16),
                     "policy_hidden is torch.bfloat16, weight is torch.float32"),
    "reference dtype": (1, torch.zeros(2, 4, dtype=torch.float64),
                        "reference_hidden is torch.float64, weight is torch.float32"),
    "too few policy labels": (3, torch.zeros(2, dtype=torch.int64),
                              r"policy_labels is \[2\] torch.int64; expected \[3\] int64"),
    "too many reference labels": (4, torch.zeros(3, dtype=torch.int64),
                                  r"reference_labels is \[3\] torch.int64; expected \[2\] int64"),
    "labels of another dtype": (3, torch.zeros(3, dtype=torch.int32),
                                r"policy_labels is \[3\] torch.int32; expected \[3\] int64"),
    "labels not a vector": (3, torch.zeros(3, 1, dtype=torch.int64), r"policy_labels is \[3, 1\]"),
    "transposed weight": (2, torch.zeros(4, 7).T, r"weight is \[7, 4\] with strides \[1, 7\]; "
                                                  r"expected a contiguous \[V, D\]"),
    "label past the vocabulary": (3, torch.tensor([0, 6, 7]),
                                  r"policy_labels span 0\.\.7; the head has 7 rows"),
    "ignored label": (4, torch.tensor([-100, 6]), r"reference_labels span -100\.\.6; the head has"),
}


@pytest.mark.parametrize("position, value, message", REFUSALS.values(), ids=REFUSALS)
def test_bad_input_is_refused_by_name(position, value, message):
    # 3 policy rows, 2 reference rows, D = 4, V = 7; one argument wrong at a time. A label of -100
    # would otherwise gather from the end of the row or crash without a name.
    arguments = [torch.zeros(3, 4), torch.zeros(2, 4), torch.zeros(7, 4),
                 torch.tensor([0, 6, 3]), torch.tensor([6, 0])]
    linear_logps(*arguments)                                   # fits as it is
    arguments[position] = value
    with pytest.raises(ValueError, match=message):
        linear_logps(*arguments)
    arguments[2] = arguments[2].clone().requires_grad_()       # nor does a trained head take it
    with pytest.raises(ValueError, match=message):
        linear_logps(*arguments)


def test_options_that_do_not_fit_are_refused_by_name():
    # KL needs both models at every position; a trained head forms its logits elsewhere.
    rows = [torch.zeros(3, 4), torch.zeros(2, 4), torch.zeros(7, 4),
            torch.tensor([0, 6, 3]), torch.tensor([6, 0])]
    with pytest.raises(ValueError, match="kl compares row by row: policy_hidden has 3 rows, "
                                         "reference_hidden 2"):
        linear_logps(*rows, kl=True)
    with pytest.raises(ValueError, match="chunk_rows is 0; expected at least 1"):
        linear_logps(*rows, 0)
    integers = [t.long() for t in rows]
    with pytest.raises(ValueError, match="weight is torch.int64; they must be the same floating"):
        linear_logps(*integers)
    rows[2].requires_grad_()
    with pytest.raises(ValueError, match="entropy and kl need a frozen weight"):
        linear_logps(*rows, entropy=True)
    with torch.no_grad():
        assert len(linear_logps(*rows, entropy=True)) == 3


if INTERPRETED or torch.cuda.is_available():
    @pytest.mark.parametrize("device", ["cpu" if INTERPRETED else "cuda"])
    def test_the_kernel_answers_nan_to_a_label_outside_the_vocabulary(device):
        # On a GPU nobody looks at the labels first, that would wait for the device. The kernel must
        # not read a neighbour's logit or foreign memory; its neighbours' rows stay right.
        logits = torch.zeros(4, 16, device=device)
        logps = torch.empty(4, device=device)
        labels = torch.tensor([3, -1, 16, 2 ** 40], device=device)
        logp_rows_triton_(logits, labels, 2, logps, None, None, True)
        assert logps.isnan().tolist() == [False, True, True, True]
        assert_close(logps[0].item(), -math.log(16))
        assert_close(logits[0, 3].item(), 15 / 16)
