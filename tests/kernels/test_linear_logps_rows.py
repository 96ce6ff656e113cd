"""linear_logps: rows do not see each other, no [N, V] tensor, bad input is refused by name."""
import gc
import math

import pytest
import torch
from linear_logps_cases import (
    INTERPRETED,
    each_dtype,
    each_place,
    gradient_of,
    linear_logps,
    make_rows,
)
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.linear_logps import _default_chunk_rows, logp_rows_triton_

# numpy warns in the interpreter, about the columns that pad a row
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")


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
        logps, reference_logps, *_ = linear_logps(*rows, 16)
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
    clean = *clean, gradient_of(clean.policy_logps, rows[0], upstream)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        poisoned = linear_logps(*rows, 8, True, True)
        poisoned = *poisoned, gradient_of(poisoned.policy_logps, rows[0], upstream)
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
    logps, reference_logps, *_ = linear_logps(hidden, reference_hidden, weight, labels,
                                              reference_labels, 4)
    gradient = gradient_of(logps, hidden, upstream)
    logps_again = linear_logps(hidden, other[1], weight, labels, other[4], 4).policy_logps
    assert torch.equal(logps, logps_again)
    assert torch.equal(gradient, gradient_of(logps_again, hidden, upstream))
    reference_again = linear_logps(other[0], reference_hidden, weight, other[3],
                                   reference_labels, 4).reference_logps
    assert torch.equal(reference_logps, reference_again)


def test_gradient_reaches_the_rows_that_have_an_upstream_gradient():
    # g_n = 0 makes row n's gradient exactly 0 and leaves the others alone.
    rows = make_rows(6, 3, seed=9)
    rows[0].requires_grad_()
    upstream = torch.tensor([1.0, 0.0, -3.0, 0.0, 0.5, 0.0])
    logps = linear_logps(*rows, 4).policy_logps
    gradient = gradient_of(logps, rows[0], upstream)
    assert torch.equal(gradient.abs().sum(-1) == 0, upstream == 0)


@pytest.mark.parametrize("trained_head", [False, True])
def test_no_gradient_reaches_the_reference(trained_head):
    # The reference is a constant of every objective, even if its hidden states have a graph.
    hidden, reference_hidden, weight, labels, reference_labels = make_rows(5, 4, seed=10)
    hidden.requires_grad_()
    reference_hidden.requires_grad_()
    weight.requires_grad_(trained_head)
    logps, reference_logps, *_ = linear_logps(hidden, reference_hidden, weight, labels,
                                              reference_labels, 3)
    assert logps.requires_grad and not reference_logps.requires_grad
    (logps.sum() - reference_logps.sum()).backward()
    assert reference_hidden.grad is None


def test_without_a_gradient_the_logps_are_the_same():
    # Evaluation runs under no_grad, where u = (onehot - softmax) W is not formed.
    rows = make_rows(9, 5, seed=11)
    with torch.no_grad():
        without = linear_logps(*rows, 4)
    rows[0].requires_grad_()
    with_gradient = linear_logps(*rows, 4)
    assert not without.policy_logps.requires_grad and with_gradient.policy_logps.requires_grad
    assert torch.equal(without.policy_logps, with_gradient.policy_logps)
    assert torch.equal(without.reference_logps, with_gradient.reference_logps)


def test_arguments_are_left_alone():
    # The log-softmax works in place: on the buffer, not on the caller's tensors.
    rows = make_rows(9, 5, seed=12)
    before = [t.clone() for t in rows]
    rows[0].requires_grad_()
    logps = linear_logps(*rows, 4).policy_logps
    logps.sum().backward()
    assert all(torch.equal(a, b.detach()) for a, b in zip(before, rows, strict=True))


# ---- memory -------------------------------------------------------------------------------------

class Recorder(TorchDispatchMode):
    """Records every storage created inside: its bytes, and whether it is still allocated."""

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
    # 32 kB. Largest of all tensors in forward and backward: one chunk. Saved between the two:
    # u = (onehot - softmax) W, as large as the hidden states; nothing of the chunks, whose logits a
    # trained head computes again.
    n, vocab, width, chunk_rows = 600, 1008, 8, 50
    rows = make_rows(n, n, width=width, vocab=vocab, seed=14)
    rows[0].requires_grad_()
    rows[2].requires_grad_(trained_head)
    with Recorder(rows) as recorder:
        logps, reference_logps, *_ = linear_logps(*rows, chunk_rows)
    assert recorder.largest() == 4 * chunk_rows * vocab
    assert recorder.alive() <= 4 * n * width + 4 * 2 * n                  # u and log-probs
    with Recorder(rows) as recorder:
        (logps.sum() - reference_logps.sum()).backward()
    assert recorder.largest() <= 4 * chunk_rows * vocab


@pytest.mark.parametrize("vocab, chunk", [(768, 512), (16384, 512), (32000, 262), (10 ** 8, 1)])
def test_a_frozen_heads_chunk_on_a_cpu_is_34_mb_and_512_rows_at_most(vocab, chunk):
    weight = torch.empty(1, 1)
    assert _default_chunk_rows(weight.expand(vocab, 1)) == chunk
    assert _default_chunk_rows(weight.requires_grad_().expand(vocab, 1)) == 512


def test_one_buffer_serves_every_chunk():
    # Frozen head: [chunk, V] is created once, not per chunk, in float32 for plain torch and in the
    # rows' dtype for the kernel; plain torch's float32 copy of the head is freed with the forward.
    n, vocab, width, chunk_rows = 96, 512, 8, 16
    rows = make_rows(n, 0, width=width, vocab=vocab, dtype=torch.bfloat16, seed=15)
    rows[0].requires_grad_()
    with Recorder(rows) as recorder:
        logps = linear_logps(*rows, chunk_rows).policy_logps
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
    # KL needs both models at every position; a trained head computes log-probs only.
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
        found = linear_logps(*rows, entropy=True)
    assert found.entropy.shape == (3,) and found.kl is None


if INTERPRETED or torch.cuda.is_available():
    @pytest.mark.parametrize("device", ["cpu" if INTERPRETED else "cuda"])
    def test_the_kernel_returns_nan_for_a_label_outside_the_vocabulary(device):
        # On a GPU the labels are not checked first, that would wait for the device. The kernel must
        # not read another row's logit or memory that is not its own; the other rows stay right.
        logits = torch.zeros(4, 16, device=device)
        logps = torch.empty(4, device=device)
        labels = torch.tensor([3, -1, 16, 2 ** 40], device=device)
        logp_rows_triton_(logits, labels, 2, logps, None, None, True)
        assert logps.isnan().tolist() == [False, True, True, True]
        assert_close(logps[0].item(), -math.log(16))
        assert_close(logits[0, 3].item(), 15 / 16)
