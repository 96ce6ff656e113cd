"""log π(label | hidden) for policy and reference rows, without ever holding [N, V] logits.

Of a row h [D] with the label y, against a head W [V, D]:

    log π = log softmax(h Wᵀ)_y
    error = onehot(y) - softmax(h Wᵀ)     [V]   the log-softmax error: d log π / d logits
    u     = error W                       [D]   d log π / dh, the direction of the row's gradient

Three facts make this cheap when a model is aligned with adapters:
1. W is frozen: it needs no gradient.
2. A loss L reaches a log-prob as one number per row, g = dL / d log π, so dL/dh = g u, and u does
   not depend on the loss. The forward computes u while the logits of a chunk of rows are in memory;
   the backward multiplies each row by its g. Two matrix products in all; computing the logits again
   in the backward would take three.
3. Reference rows need no gradient, so no u. Policy and reference rows are stacked and go through
   the vocabulary in one pass, chunk by chunk, in one reused buffer.

    linear_logps_torch    the specification, in plain torch; what a CPU runs
    linear_logps_triton   the same with one Triton program per row of a chunk; what a GPU runs
    linear_logps          the one of the two that fits the tensors' device

The matrix products of a chunk are cuBLAS's. Fusing a product with the row pass would save writing
and reading the logits, 9 % of a product at D = 4096, and lose more to a slower product.
"""
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

try:
    import triton
    import triton.language as tl
    IMPORT_ERROR = None
except Exception as error:              # missing or broken: `triton_problem` says which
    triton, IMPORT_ERROR = None, error

BLOCK_V = 4096      # logits a program reads at a time, with 8 warps: few registers, no spill


class LinearLogps(NamedTuple):
    """What `linear_logps` returns: nats, float32 (float64 from float64 input)."""
    policy_logps: Tensor              # [N]
    reference_logps: Tensor           # [M]   without gradient, as the next two
    entropy: Tensor | None = None     # [N]   of the policy, -Σ_v p_v log p_v; if asked for
    kl: Tensor | None = None          # [N]   exact KL(policy || reference); if asked for


# ---- one chunk of logits: specification, then kernel --------------------------------------------
# As torch's own, functions whose names end in _ write into their arguments.

def logp_rows_torch_(logits: Tensor, labels: Tensor, num_policy: int, logps: Tensor,
                     entropy: Tensor | None, kl: Tensor | None, want_error: bool) -> None:
    """Log-prob of every row's label; the logits of policy rows become onehot - softmax, in place.

    logits      [n, V] float     policy rows first; overwritten
    labels      [n] int64        in [0, V)
    num_policy  int              rows of the policy; with kl, row num_policy + i is the reference's
                                 row for the position of row i
    logps       [n] float32      written (float64 for float64 logits), as are the next two
    entropy     [num_policy]     or None; -Σ_v p_v log p_v, nats
    kl          [num_policy]     or None; Σ_v p_v (log p_v - log q_v) with q the reference's, nats
    want_error  bool             write onehot - softmax; else the logits' content is undefined
    """
    # In and out of memory, float32: log_softmax 8 bytes a logit, exp 8: 16 in all.
    labels = labels[:, None]                                                     # [n, 1]
    row_logps = torch.log_softmax(logits, -1, out=logits)                        # [n, V], in place
    logps.copy_(row_logps.gather(1, labels)[:, 0])
    policy = row_logps[:num_policy]
    if entropy is not None:
        entropy.copy_(-(policy.exp() * policy).sum(-1))
    if kl is not None:
        kl.copy_((policy.exp() * (policy - row_logps[num_policy:])).sum(-1))
    if want_error:
        # in the logits' full precision: where softmax is near 1, a rounded one would cancel
        error = policy.exp_().neg_()                                             # [num_policy, V]
        error.scatter_add_(1, labels[:num_policy], torch.ones_like(logps[:num_policy, None]))


if triton is not None:
    @triton.jit(do_not_specialize=["num_policy"])      # else compiled anew for 1, and for 16, 32, …
    def _logp_rows(logits, labels, logps, entropy, kl, num_policy, row_stride,
                   V: tl.constexpr, PADDED_V: tl.constexpr, BLOCK_V: tl.constexpr,
                   WANT_ERROR: tl.constexpr, WANT_ENTROPY: tl.constexpr, WANT_KL: tl.constexpr):
        # Grid (n,): program r reads row r once for the log-sum-exp. If it is a policy row, it reads
        # it again, from cache, and overwrites it. bf16: 2 bytes a logit in, 2 out: 4 in all.
        # Rows are PADDED_V apart, a multiple of 16, so that loads are 128 bits wide for every V;
        # the columns from V on may hold anything and do not count.
        r = tl.program_id(0).to(tl.int64)      # int64: r * row_stride passes 2**31 at row 67109
        wide = logps.dtype.element_ty          # of all sums: float32, float64 for float64 logits
        row = logits + r * row_stride
        label = tl.load(labels + r)
        # a label outside the vocabulary must not read outside the row: its log-prob is NaN
        label_logit = tl.load(row + label, mask=(label >= 0) & (label < V),
                              other=float("nan")).to(wide)
        m, s = label_logit, label_logit * 0    # online: m = running max, s = Σ exp(x - m)
        if WANT_KL:                            # the same position's logits under the reference
            # (a reference row takes itself: no row below it to compare with)
            other_row = logits + tl.where(r < num_policy, r + num_policy, r) * row_stride
            m_q = tl.load(other_row).to(wide)
            s_q = m_q * 0
        for start in range(0, V, BLOCK_V):
            v = start + tl.arange(0, BLOCK_V)                                    # [BLOCK_V]
            x = tl.load(row + v, mask=v < PADDED_V, other=0.0).to(wide)
            x = tl.where(v < V, x, -float("inf"))
            m_new = tl.maximum(m, tl.max(x, 0))
            s = s * tl.exp(m - m_new) + tl.sum(tl.exp(x - m_new), 0)             # rescale, then add
            m = m_new
            if WANT_KL:
                x = tl.load(other_row + v, mask=v < PADDED_V, other=0.0).to(wide)
                x = tl.where(v < V, x, -float("inf"))
                m_new = tl.maximum(m_q, tl.max(x, 0))
                s_q = s_q * tl.exp(m_q - m_new) + tl.sum(tl.exp(x - m_new), 0)
                m_q = m_new
        # not as label_logit - (m + log s): at logits of 1e4 that sum would be rounded to 1e-3
        tl.store(logps + r, label_logit - m - tl.log(s))
        if r < num_policy:
            if WANT_ERROR or WANT_ENTROPY or WANT_KL:
                minus_entropy = tl.zeros([BLOCK_V], wide)
                divergence = tl.zeros([BLOCK_V], wide)
                for start in range(0, V, BLOCK_V):
                    v = start + tl.arange(0, BLOCK_V)
                    x = tl.load(row + v, mask=v < PADDED_V, other=0.0).to(wide)
                    p = tl.exp(x - m) * (1 / s)
                    log_p = x - m - tl.log(s)
                    if WANT_ENTROPY:
                        minus_entropy += tl.where(v < V, p * log_p, 0.0)
                    if WANT_KL:
                        x = tl.load(other_row + v, mask=v < PADDED_V, other=0.0).to(wide)
                        log_q = x - m_q - tl.log(s_q)
                        divergence += tl.where(v < V, p * (log_p - log_q), 0.0)
                    if WANT_ERROR:
                        error = tl.where(v == label, 1.0, 0.0) - p               # onehot - softmax
                        tl.store(row + v, error.to(logits.dtype.element_ty), mask=v < PADDED_V)
                if WANT_ENTROPY:
                    tl.store(entropy + r, -tl.sum(minus_entropy, 0))
                if WANT_KL:
                    tl.store(kl + r, tl.sum(divergence, 0))


def logp_rows_triton_(logits: Tensor, labels: Tensor, num_policy: int, logps: Tensor,
                      entropy: Tensor | None, kl: Tensor | None, want_error: bool) -> None:
    """`logp_rows_torch_` as one kernel launch; logits may be bf16, all sums are float32.

    logits may be a [n, V] view of a wider buffer; the columns up to its row stride belong to it.
    """
    with torch.cuda.device_of(logits):          # Triton launches on the current device
        _logp_rows[(len(logits),)](
            logits, labels, logps, entropy, kl, num_policy, logits.stride(0),
            V=logits.shape[1], PADDED_V=logits.stride(0), BLOCK_V=BLOCK_V, WANT_ERROR=want_error,
            WANT_ENTROPY=entropy is not None, WANT_KL=kl is not None, num_warps=8)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


@functools.cache
def triton_problem(device_type: str) -> str:
    """Why the Triton kernel cannot run on a type of device, found by trying it; "" if it can."""
    if triton is None:
        return f"Triton cannot be imported ({_first_line(IMPORT_ERROR)})"
    if device_type != "cuda" and isinstance(_logp_rows, triton.runtime.JITFunction):
        return f"the tensors are on a {device_type}, Triton needs a GPU (or TRITON_INTERPRET=1)"
    try:
        logits = torch.zeros(1, 16, device=device_type)
        label = torch.zeros(1, dtype=torch.int64, device=device_type)
        logps = torch.empty(1, device=device_type)
        logp_rows_triton_(logits, label, 1, logps, None, None, True)
        if abs(float(logps) + 2.772588722) > 1e-5:               # log 16
            return f"a trial of 16 equal logits gave {float(logps)}, not -log 16"
    except Exception as error:
        return f"a trial launch failed ({_first_line(error)})"
    return ""


# ---- all rows -----------------------------------------------------------------------------------

def _chunks(num_policy: int, num_reference: int, chunk_rows: int,
            paired: bool) -> Iterator[tuple[slice, slice]]:
    """Yield (policy rows, reference rows) of every chunk: one stack of rows, policy first.

    paired   a chunk holds policy rows and, below them, the reference rows of the same positions
    """
    if paired:
        half = max(1, chunk_rows // 2)
        for start in range(0, num_policy, half):
            rows = slice(start, min(start + half, num_policy))
            yield rows, rows
        return
    for start in range(0, num_policy + num_reference, chunk_rows):
        end = min(start + chunk_rows, num_policy + num_reference)
        yield (slice(min(start, num_policy), min(end, num_policy)),
               slice(max(start - num_policy, 0), max(end - num_policy, 0)))


def _default_chunk_rows(weight: Tensor) -> int:
    """A CPU's chunk stays near its caches (262 x 32000 float32: 34 MB), a GPU's keeps it busy."""
    if weight.device.type == "cpu":            # a trained head adds a whole dW per chunk
        return 512 if weight.requires_grad else max(1, min(512, 2 ** 23 // len(weight)))
    return max(256, 2 ** 28 // (len(weight) * weight.itemsize) // 256 * 256)     # 4096 at V = 32000


def _product_(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out <- a @ b, computed in b's precision."""
    if out.dtype == b.dtype:
        torch.mm(a.to(b.dtype), b, out=out)
    else:
        out.copy_(a.to(b.dtype) @ b)


class _FrozenHead(torch.autograd.Function):
    """Log-probs against a head without gradient; u = (onehot - softmax) W is formed in the forward.

    returns  the fields of LinearLogps
    """

    @staticmethod
    def forward(ctx, policy_hidden, reference_hidden, weight, policy_labels, reference_labels,
                chunk_rows, want_entropy, want_kl, logp_rows_):
        num_policy, num_reference, vocab = len(policy_hidden), len(reference_hidden), len(weight)
        want_u = ctx.needs_input_grad[0]
        wide = torch.promote_types(policy_hidden.dtype, torch.float32)     # of sums and results
        if logp_rows_ is logp_rows_triton_:     # which takes rows padded to a multiple of 16
            head, logits_dtype, columns = weight, weight.dtype, -(-vocab // 16) * 16
        else:
            # Plain torch needs wide logits. On a CPU the product is wide, too: without bf16 units
            # torch's own bf16 product is some 10 to 200 times slower.
            head, logits_dtype, columns = weight, wide, vocab
            if not weight.is_cuda:
                head = weight.to(wide)
        empty = functools.partial(torch.empty, dtype=wide, device=weight.device)
        policy_logps, reference_logps = empty(num_policy), empty(num_reference)
        entropy = empty(num_policy) if want_entropy else None
        kl = empty(num_policy) if want_kl else None
        u = torch.empty_like(policy_hidden) if want_u else None                  # [N, D]
        chunks = list(_chunks(num_policy, num_reference, chunk_rows, want_kl))
        most_rows = max((p.stop - p.start + r.stop - r.start for p, r in chunks), default=0)
        buffer = empty(most_rows, columns, dtype=logits_dtype)
        for policy, reference in chunks:
            n, m = policy.stop - policy.start, reference.stop - reference.start
            logits, logps = buffer[:n + m, :vocab], empty(n + m)                 # [n + m, V]
            _product_(policy_hidden[policy], head.T, logits[:n])
            _product_(reference_hidden[reference], head.T, logits[n:])
            logp_rows_(logits, torch.cat([policy_labels[policy], reference_labels[reference]]), n,
                       logps, entropy[policy] if want_entropy else None,
                       kl[policy] if want_kl else None, want_u)
            policy_logps[policy], reference_logps[reference] = logps[:n], logps[n:]
            if want_u:
                _product_(logits[:n], head, u[policy])            # u = (onehot - softmax) W
        ctx.save_for_backward(u)
        constants = [t for t in (reference_logps, entropy, kl) if t is not None]
        ctx.mark_non_differentiable(*constants)
        return policy_logps, reference_logps, entropy, kl

    @staticmethod
    @once_differentiable
    def backward(ctx, policy_grad, *_):
        """dL/dh = g u of every row: g = policy_grad, u = (onehot - softmax) W."""
        (u,) = ctx.saved_tensors
        # a float32 product, rounded once, and (on a GPU) never a float32 [N, D]
        grad = torch.mul(u, policy_grad[:, None], out=torch.empty_like(u))       # [N, D]
        return grad, *[None] * 8               # no other argument of forward has a gradient


def _token_logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))   # [n, V]
    return logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]                # [n]


def _trained_head(policy_hidden: Tensor, reference_hidden: Tensor, weight: Tensor,
                  policy_labels: Tensor, reference_labels: Tensor, chunk_rows: int) -> LinearLogps:
    """A trained head needs dW: the backward computes each chunk's logits a second time."""
    policy_logps, reference_logps = [], []
    for hidden, labels in zip(policy_hidden.split(chunk_rows), policy_labels.split(chunk_rows),
                              strict=True):
        policy_logps.append(checkpoint(_token_logps, hidden, weight, labels, use_reentrant=False))
    with torch.no_grad():
        for hidden, labels in zip(reference_hidden.split(chunk_rows),
                                  reference_labels.split(chunk_rows), strict=True):
            reference_logps.append(_token_logps(hidden, weight, labels))
    return LinearLogps(torch.cat(policy_logps), torch.cat(reference_logps))


def _check(policy_hidden, reference_hidden, weight, policy_labels, reference_labels, chunk_rows,
           kl):
    if not weight.is_contiguous() or weight.ndim != 2:
        raise ValueError(f"weight is {list(weight.shape)} with strides {list(weight.stride())}; "
                         "expected a contiguous [V, D]")
    for name, hidden, labels in (("policy", policy_hidden, policy_labels),
                                 ("reference", reference_hidden, reference_labels)):
        if hidden.ndim != 2 or hidden.shape[1] != weight.shape[1]:
            raise ValueError(f"{name}_hidden is {list(hidden.shape)}; expected [rows, "
                             f"{weight.shape[1]}] to fit weight {list(weight.shape)}")
        if hidden.dtype != weight.dtype or not weight.is_floating_point():
            raise ValueError(f"{name}_hidden is {hidden.dtype}, weight is {weight.dtype}; "
                             "they must be the same floating-point type")
        if labels.shape != hidden.shape[:1] or labels.dtype != torch.int64:
            raise ValueError(f"{name}_labels is {list(labels.shape)} {labels.dtype}; expected "
                             f"[{len(hidden)}] int64")
        if {hidden.device, labels.device} != {weight.device}:
            raise ValueError(f"{name}_hidden is on {hidden.device}, {name}_labels on "
                             f"{labels.device}, weight on {weight.device}; expected one device")
        # On a GPU reading the values would wait for the device; there the kernel returns NaN.
        if labels.device.type == "cpu" and len(labels) and not (
                0 <= int(labels.min()) and int(labels.max()) < len(weight)):
            raise ValueError(f"{name}_labels span {int(labels.min())}..{int(labels.max())}; "
                             f"the head has {len(weight)} rows")
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows is {chunk_rows}; expected at least 1")
    if kl and len(policy_hidden) != len(reference_hidden):
        raise ValueError(f"kl compares row by row: policy_hidden has {len(policy_hidden)} rows, "
                         f"reference_hidden {len(reference_hidden)}")


def _linear_logps(logp_rows_, policy_hidden, reference_hidden, weight, policy_labels,
                  reference_labels, chunk_rows, entropy, kl) -> LinearLogps:
    if chunk_rows is None:
        chunk_rows = _default_chunk_rows(weight)
    tensors = policy_hidden, reference_hidden, weight, policy_labels, reference_labels
    _check(*tensors, chunk_rows, kl)
    if weight.requires_grad and torch.is_grad_enabled():
        if entropy or kl:
            raise ValueError("entropy and kl need a frozen weight, or torch.no_grad()")
        return _trained_head(*tensors, chunk_rows)
    if not torch.is_grad_enabled():
        policy_hidden = policy_hidden.detach()         # needs no gradient: the forward skips u
    return LinearLogps(*_FrozenHead.apply(
        policy_hidden, reference_hidden.detach(), weight, policy_labels, reference_labels,
        chunk_rows, entropy, kl, logp_rows_))


def linear_logps_torch(policy_hidden: Tensor, reference_hidden: Tensor, weight: Tensor,
                       policy_labels: Tensor, reference_labels: Tensor,
                       chunk_rows: int | None = None, entropy: bool = False,
                       kl: bool = False) -> LinearLogps:
    """Specification of `linear_logps`: log softmax(hidden Wᵀ)[label], in nats.

    policy_hidden     [N, D]        rows that need a gradient
    reference_hidden  [M, D]        rows that need none (M = 0 without a reference)
    weight            [V, D]        the head W; frozen, or trained (then logits are computed twice)
    policy_labels     [N] int64     in [0, V)
    reference_labels  [M] int64     in [0, V)
    chunk_rows        int           rows of logits in memory at a time; None: what suits the device
    entropy           bool          return the policy's entropy, too; needs a frozen head
    kl                bool          return the exact KL, too: M = N, and row n of both is one
                                    position; needs a frozen head
    returns           LinearLogps   entropy and kl are None unless asked for
    raises            ValueError    on shapes, dtypes, devices or layout that do not fit, and on
                                    labels outside [0, V); on a GPU these are not checked: the
                                    kernel returns NaN, plain torch ends in a device assertion
    """
    return _linear_logps(logp_rows_torch_, policy_hidden, reference_hidden, weight, policy_labels,
                         reference_labels, chunk_rows, entropy, kl)


def linear_logps_triton(policy_hidden: Tensor, reference_hidden: Tensor, weight: Tensor,
                        policy_labels: Tensor, reference_labels: Tensor,
                        chunk_rows: int | None = None, entropy: bool = False,
                        kl: bool = False) -> LinearLogps:
    """`linear_logps_torch` by the Triton kernel; raises ValueError where Triton does not work."""
    if problem := triton_problem(weight.device.type):
        raise ValueError(f"linear_logps_triton cannot run: {problem}")
    return _linear_logps(logp_rows_triton_, policy_hidden, reference_hidden, weight, policy_labels,
                         reference_labels, chunk_rows, entropy, kl)


# ---- which one ----------------------------------------------------------------------------------

def choose_linear_logps(kernels: str, device_type: str) -> Callable[..., LinearLogps]:
    """The function for --kernels "triton", "torch" or "auto": Triton on a GPU, torch elsewhere.

    raises  ValueError where Triton would be used and does not work: nothing falls back to torch
    """
    if kernels == "torch" or (kernels == "auto" and device_type != "cuda"):
        return linear_logps_torch
    if problem := triton_problem(device_type):
        why = "was asked for" if kernels == "triton" else "is the default on a GPU"
        raise ValueError(f"the Triton kernel {why} and cannot run: {problem}"
                         + ("; --kernels torch works without it" if device_type == "cuda" else ""))
    return linear_logps_triton


def linear_logps(policy_hidden: Tensor, reference_hidden: Tensor, weight: Tensor,
                 policy_labels: Tensor, reference_labels: Tensor, chunk_rows: int | None = None,
                 entropy: bool = False, kl: bool = False) -> LinearLogps:
    """`linear_logps_torch`, on a GPU by the Triton kernel; ValueError there if it does not work."""
    chosen = choose_linear_logps("auto", weight.device.type)
    return chosen(policy_hidden, reference_hidden, weight, policy_labels, reference_labels,
                  chunk_rows, entropy, kl)
