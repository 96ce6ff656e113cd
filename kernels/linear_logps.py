"""log π(label | hidden) for policy and reference rows, without ever holding [N, V] logits.

Three facts make this cheap when a model is aligned with adapters:
1. The head's weight W [V, D] is frozen: no gradient for it.
2. The loss reaches a log-prob as one number per row, g_n = dL/d(log-prob_n), and so
       dL/dh_n = g_n u_n,   u_n = Σ_v (1[v = label_n] - softmax(h_n Wᵀ)_v) W_v .
   u_n does not depend on the loss. The forward forms it while the chunk's logits are still there;
   the backward is one multiplication per row. Two matrix products in all; recomputing the logits
   in the backward needs three.
3. Reference rows need no u. Policy and reference rows are stacked and go through the vocabulary
   in one pass, chunk by chunk, in one reused buffer.

    linear_logps_torch    the specification, in plain torch; what a CPU runs
    linear_logps_triton   the same with one Triton program per row of a chunk; what a GPU runs
    linear_logps          the one of the two that fits the tensors' device

Per chunk the matrix products are cuBLAS's. A product fused into the row pass would save writing and
reading the logits, 9 % of a product at D = 4096, and lose more to a slower product.
"""
import functools

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

try:
    import triton
    import triton.language as tl
    IMPORT_ERROR = None
except Exception as error:              # absent, or broken: linear_logps_triton says which
    triton, IMPORT_ERROR = None, error

BLOCK_V = 4096      # logits a program reads at a time, with 8 warps: few registers, no spill


# ---- one chunk of logits: specification, then kernel --------------------------------------------

def logp_rows_torch_(logits: Tensor, labels: Tensor, num_policy: int, logps: Tensor,
                     entropy: Tensor | None, kl: Tensor | None, want_error: bool) -> None:
    """Log-prob of the label of every row; policy logits become onehot - softmax, in place.

    logits      [n, V] float     policy rows first; overwritten
    labels      [n] int64        in [0, V)
    num_policy  rows that are the policy's; with kl, row num_policy + i is row i's reference
    logps       [n] float32      out (float64 for float64 logits), as are the next two
    entropy     [num_policy]     out: -Σ_v p_v log p_v, nats; or None
    kl          [num_policy]     out: Σ_v p_v (log p_v - log q_v), q the reference's; or None
    want_error  form onehot - softmax; without it the logits are left in no particular state
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
        # in the logits' full precision: where softmax is near 1 a rounded one would cancel
        error = policy.exp_().neg_()                                             # [num_policy, V]
        error.scatter_add_(1, labels[:num_policy], torch.ones_like(logps[:num_policy, None]))


if triton is not None:
    @triton.jit
    def _logp_rows(logits, labels, logps, entropy, kl, num_policy, row_stride,
                   V: tl.constexpr, PADDED_V: tl.constexpr, BLOCK_V: tl.constexpr,
                   WANT_ERROR: tl.constexpr, WANT_ENTROPY: tl.constexpr, WANT_KL: tl.constexpr):
        # Grid (n,): program r owns row r, reads it once for the log-sum-exp; a policy row is read
        # again, from cache, and overwritten. bf16: 2 bytes a logit in, 2 out: 4 in all.
        # Rows are PADDED_V apart, a multiple of 16, so that loads are 128 bits wide whatever V is;
        # columns from V on hold anything and count for nothing.
        r = tl.program_id(0).to(tl.int64)      # int64: r * row_stride passes 2**31 at row 67109
        real = logps.dtype.element_ty          # float32; float64 where the logits are
        z = logits + r * row_stride
        label = tl.load(labels + r)
        # a label outside the vocabulary must not read outside the row: its log-prob is NaN
        z_label = tl.load(z + label, mask=(label >= 0) & (label < V), other=float("nan")).to(real)
        m, s = z_label, z_label * 0            # online: m = running max, s = Σ exp(x - m)
        if WANT_KL:                            # q: the same position under the reference
            # (a reference row looks at itself: there is nothing below it to compare with)
            q = logits + tl.where(r < num_policy, r + num_policy, r) * row_stride
            m_q = tl.load(q).to(real)
            s_q = m_q * 0
        for start in range(0, V, BLOCK_V):
            v = start + tl.arange(0, BLOCK_V)                                    # [BLOCK_V]
            x = tl.load(z + v, mask=v < PADDED_V, other=0.0).to(real)
            x = tl.where(v < V, x, -float("inf"))
            m_new = tl.maximum(m, tl.max(x, 0))
            s = s * tl.exp(m - m_new) + tl.sum(tl.exp(x - m_new), 0)             # rescale, then add
            m = m_new
            if WANT_KL:
                x = tl.load(q + v, mask=v < PADDED_V, other=0.0).to(real)
                x = tl.where(v < V, x, -float("inf"))
                m_new = tl.maximum(m_q, tl.max(x, 0))
                s_q = s_q * tl.exp(m_q - m_new) + tl.sum(tl.exp(x - m_new), 0)
                m_q = m_new
        # never through lse = m + log s: at logits of 1e4 it would be rounded to 1e-3
        tl.store(logps + r, z_label - m - tl.log(s))
        if r < num_policy:
            if WANT_ERROR or WANT_ENTROPY or WANT_KL:
                minus_entropy = tl.zeros([BLOCK_V], real)
                divergence = tl.zeros([BLOCK_V], real)
                for start in range(0, V, BLOCK_V):
                    v = start + tl.arange(0, BLOCK_V)
                    x = tl.load(z + v, mask=v < PADDED_V, other=0.0).to(real)
                    p = tl.exp(x - m) * (1 / s)
                    log_p = x - m - tl.log(s)
                    if WANT_ENTROPY:
                        minus_entropy += tl.where(v < V, p * log_p, 0.0)
                    if WANT_KL:
                        x = tl.load(q + v, mask=v < PADDED_V, other=0.0).to(real)
                        log_q = x - m_q - tl.log(s_q)
                        divergence += tl.where(v < V, p * (log_p - log_q), 0.0)
                    if WANT_ERROR:
                        error = tl.where(v == label, 1.0, 0.0) - p
                        tl.store(z + v, error.to(logits.dtype.element_ty), mask=v < PADDED_V)
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


# ---- all rows -----------------------------------------------------------------------------------

def _blocks(num_policy: int, num_reference: int, chunk_rows: int, paired: bool):
    """Yield (policy slice, reference slice) of every chunk: one stack of rows, policy first.

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
    """A CPU's chunk stays near its caches (262 x 32000 float32: 34 MB), a GPU's fills the card."""
    if weight.device.type == "cpu":            # of a trained head every chunk adds a whole dW
        return 512 if weight.requires_grad else max(1, min(512, 2 ** 23 // len(weight)))
    return max(256, 2 ** 28 // (len(weight) * weight.itemsize) // 256 * 256)     # 4096 at V = 32000


def _product_(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out <- a @ b, in b's precision."""
    if out.dtype == b.dtype:
        torch.mm(a.to(b.dtype), b, out=out)
    else:
        out.copy_(a.to(b.dtype) @ b)


class _LinearLogps(torch.autograd.Function):
    """Rows of policy and reference against a frozen head; u is formed in the forward.

    returns  logps [N], logps [M], entropy [N], kl [N]; the last two are empty unless wanted
    """

    @staticmethod
    def forward(ctx, policy_hidden, reference_hidden, weight, policy_labels, reference_labels,
                chunk_rows, want_entropy, want_kl, logp_rows_):
        num_policy, num_reference = len(policy_hidden), len(reference_hidden)
        real = torch.promote_types(policy_hidden.dtype, torch.float32)
        with_kernel = logp_rows_ is logp_rows_triton_
        # The twin wants float32 logits. On a CPU it multiplies in float32 too: without bf16 units
        # torch's own bf16 product is some 10 to 200 times slower.
        head = weight if with_kernel or weight.is_cuda else weight.to(real)      # [V, D]
        policy_logps, reference_logps, entropy, kl = (
            torch.empty(n, dtype=real, device=weight.device) for n in
            (num_policy, num_reference, num_policy * want_entropy, num_policy * want_kl))
        want_error = ctx.needs_input_grad[0]
        u = torch.empty_like(policy_hidden) if want_error else None              # [N, D]
        blocks = list(_blocks(num_policy, num_reference, chunk_rows, want_kl))
        vocab = len(weight)
        most = max((p.stop - p.start + r.stop - r.start for p, r in blocks), default=0)
        buffer = torch.empty(most, -(-vocab // 16) * 16 if with_kernel else vocab,
                             dtype=weight.dtype if with_kernel else real, device=weight.device)
        for policy, reference in blocks:
            n, m = policy.stop - policy.start, reference.stop - reference.start
            logits = buffer[:n + m, :vocab]                                      # [n + m, V]
            _product_(policy_hidden[policy], head.T, logits[:n])
            _product_(reference_hidden[reference], head.T, logits[n:])
            logps = torch.empty(n + m, dtype=real, device=weight.device)
            logp_rows_(logits, torch.cat([policy_labels[policy], reference_labels[reference]]), n,
                       logps, entropy[policy] if want_entropy else None,
                       kl[policy] if want_kl else None, want_error)
            policy_logps[policy], reference_logps[reference] = logps[:n], logps[n:]
            if want_error:
                _product_(logits[:n], head, u[policy])
        ctx.save_for_backward(u)
        ctx.mark_non_differentiable(reference_logps, entropy, kl)
        return policy_logps, reference_logps, entropy, kl

    @staticmethod
    @once_differentiable
    def backward(ctx, policy_grad, *_):
        (u,) = ctx.saved_tensors
        # float32 product, rounded once, and (on a GPU) never a float32 [N, D]
        grad = torch.mul(u, policy_grad[:, None], out=torch.empty_like(u))       # [N, D]
        return grad, *[None] * 8


def _token_logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))   # [n, V]
    return logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]                # [n]


def _trained_head(policy_hidden, reference_hidden, weight, policy_labels, reference_labels,
                  chunk_rows):
    """A head that is trained needs dW: each chunk's logits are formed again in the backward."""
    policy_logps = [checkpoint(_token_logps, hidden, weight, labels, use_reentrant=False)
                    for hidden, labels in zip(policy_hidden.split(chunk_rows),
                                              policy_labels.split(chunk_rows))]
    with torch.no_grad():
        reference_logps = [_token_logps(hidden, weight, labels)
                           for hidden, labels in zip(reference_hidden.split(chunk_rows),
                                                     reference_labels.split(chunk_rows))]
    return torch.cat(policy_logps), torch.cat(reference_logps)


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
        # On a GPU a look at the values would wait for the device: there the kernel answers NaN.
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
                  reference_labels, chunk_rows, entropy, kl):
    chunk_rows = _default_chunk_rows(weight) if chunk_rows is None else chunk_rows
    tensors = policy_hidden, reference_hidden, weight, policy_labels, reference_labels
    _check(*tensors, chunk_rows, kl)
    if weight.requires_grad and torch.is_grad_enabled():
        if entropy or kl:
            raise ValueError("entropy and kl need a frozen weight, or torch.no_grad()")
        return _trained_head(*tensors, chunk_rows)
    if not torch.is_grad_enabled():
        policy_hidden = policy_hidden.detach()                    # no gradient is asked for: no u
    policy_logps, reference_logps, *extras = _LinearLogps.apply(
        policy_hidden, reference_hidden.detach(), weight, policy_labels, reference_labels,
        chunk_rows, entropy, kl, logp_rows_)
    return policy_logps, reference_logps, *extras[:entropy], *extras[1:1 + kl]


def linear_logps_torch(policy_hidden: Tensor, reference_hidden: Tensor, weight: Tensor,
                       policy_labels: Tensor, reference_labels: Tensor,
                       chunk_rows: int | None = None, entropy: bool = False,
                       kl: bool = False) -> tuple[Tensor, ...]:
    """Specification of `linear_logps`: log softmax(hidden Wᵀ)[label], in nats.

    policy_hidden     [N, D]        rows that need a gradient
    reference_hidden  [M, D]        rows that need none (M = 0 without a reference)
    weight            [V, D]        the head; frozen, or trained (then logits are recomputed)
    policy_labels     [N] int64     in [0, V)
    reference_labels  [M] int64
    chunk_rows        rows of logits in memory at a time; None: what suits the device
    entropy           also return the policy's entropy -Σ_v p log p at every row, [N]
    kl                also return the exact KL(policy || reference) at every row, [N]: M = N, and
                      row n of both is one position. Both extras carry no gradient
    returns           [N], [M], and [N] for every extra asked for, entropy first; nats, float32
                      (float64 from float64 input)
    raises            ValueError    on shapes, dtypes, devices or layout that do not fit, and on
                                    labels outside [0, V), which on a GPU nobody looks at: the
                                    kernel answers NaN, plain torch ends in a device assertion
    """
    return _linear_logps(logp_rows_torch_, policy_hidden, reference_hidden, weight, policy_labels,
                         reference_labels, chunk_rows, entropy, kl)


def linear_logps_triton(policy_hidden: Tensor, reference_hidden: Tensor, weight: Tensor,
                        policy_labels: Tensor, reference_labels: Tensor,
                        chunk_rows: int | None = None, entropy: bool = False,
                        kl: bool = False) -> tuple[Tensor, ...]:
    """`linear_logps_torch` by the Triton kernel; raises ValueError where Triton does not work."""
    if problem := triton_problem(weight.device.type):
        raise ValueError(f"linear_logps_triton cannot run: {problem}")
    return _linear_logps(logp_rows_triton_, policy_hidden, reference_hidden, weight, policy_labels,
                         reference_labels, chunk_rows, entropy, kl)


# ---- which one ----------------------------------------------------------------------------------

@functools.cache
def triton_problem(device_type: str) -> str:
    """Why the Triton kernel cannot run on a kind of device, found by trying it; "" if it can."""
    if triton is None:
        return f"Triton cannot be imported ({type(IMPORT_ERROR).__name__}: {IMPORT_ERROR})"
    if device_type != "cuda" and isinstance(_logp_rows, triton.runtime.JITFunction):
        return f"the tensors are on a {device_type}, Triton needs a GPU (or TRITON_INTERPRET=1)"
    try:
        logps = torch.empty(1, device=device_type)
        logp_rows_triton_(torch.zeros(1, 16, device=device_type), torch.zeros(
            1, dtype=torch.int64, device=device_type), 1, logps, None, None, True)
        if abs(float(logps) + 2.772588722) > 1e-5:               # log 16
            return f"a trial of 16 equal logits gave {float(logps)}, not -log 16"
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        return f"a trial launch failed ({type(error).__name__}: {first})"
    return ""


@functools.cache
def choose_linear_logps(kernels: str, device_type: str):
    """The function for --kernels "triton", "torch" or "auto": Triton on a GPU, torch elsewhere.

    raises  ValueError if Triton is asked for and does not work; "auto" prints one line instead
    """
    if kernels == "torch" or (kernels == "auto" and device_type != "cuda"):
        return linear_logps_torch
    if not (problem := triton_problem(device_type)):
        return linear_logps_triton
    if kernels == "triton":
        raise ValueError(f"the Triton kernel was asked for and cannot run: {problem}")
    print(f"log-probs by plain torch, the slower way: {problem}", flush=True)
    return linear_logps_torch


def linear_logps(policy_hidden: Tensor, reference_hidden: Tensor, weight: Tensor,
                 policy_labels: Tensor, reference_labels: Tensor, chunk_rows: int | None = None,
                 entropy: bool = False, kl: bool = False) -> tuple[Tensor, ...]:
    """`linear_logps_torch`, by the Triton kernel for CUDA tensors if Triton works."""
    return choose_linear_logps("auto", weight.device.type)(
        policy_hidden, reference_hidden, weight, policy_labels, reference_labels, chunk_rows,
        entropy, kl)
