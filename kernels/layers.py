"""What a Llama layer computes between its matrix products: RMSNorm, rotary embedding, SwiGLU.

    rms_norm    x + added and its RMS norm, in one pass
    rotary      q and k rotated by their positions, in one launch
    swiglu      silu(gate) · up

All three are bound by memory. A kernel reads every input once and writes every output once; in
between it computes in float32 whatever the inputs are (float64 for float64). Kept for the backward
is what cannot be computed again: x + added and one number per row; cos and sin; gate and up.

    NAME_torch     the specification, in plain torch; what a CPU runs
    NAME_triton    the same by Triton kernels, forward and backward; what a GPU runs
    NAME           the one of the two that fits the tensors' device
"""
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .linear_logps import triton_problem

try:
    import triton
    import triton.language as tl
except Exception:                       # missing or broken: `triton_problem` says which
    triton = None

NORM_ROWS = 16          # rows of one program where the norm's weight is trained
SWIGLU_BLOCK = 2048     # elements of one program: with 8 warps one load of 128 bits per thread
MAX_WIDTH = 8192        # of a row, which one program holds in registers without a spill


def _check(function: str, **tensors: Tensor | None) -> None:
    """Raise ValueError unless Triton works and all tensors have one float dtype and one device."""
    kinds = {name: (t.dtype, t.device) for name, t in tensors.items() if t is not None}
    dtype, device = next(iter(kinds.values()))
    if problem := triton_problem(device.type):
        raise ValueError(f"{function}_triton cannot run: {problem}")
    if len(set(kinds.values())) > 1 or not dtype.is_floating_point:
        raise ValueError(f"{function}: " + ", ".join(
            f"{name} is {dtype} on {device}" for name, (dtype, device) in kinds.items())
            + "; expected one floating-point type and one device")


# ---- RMSNorm ------------------------------------------------------------------------------------

def rms_norm_torch(x: Tensor, weight: Tensor, eps: float,
                   added: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Specification of `rms_norm`: x' = x + added, y = x' / sqrt(mean(x'²) + eps) · weight.

    x        [T, D]
    weight   [D]         frozen or trained
    eps      float
    added    [T, D]      what a residual branch adds to x; None: nothing, x' is x
    returns  (x', y)     [T, D] each
    Source: arXiv:1910.07467, Eq. 4; the mean and the root in float32.
    """
    # bytes in and out of memory per element, bf16: sum 6, to float32 6, square 8, mean 4, product
    # 8, to bf16 6, weight 4: 42 in all; the backward, which torch derives, about 90
    x = x if added is None else x + added
    wide = x.to(torch.promote_types(x.dtype, torch.float32))                     # [T, D]
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return x, weight * normed.to(x.dtype)


if triton is not None:
    @triton.jit
    def _rms_norm_forward(x, added, weight, total, y, scale,
                          EPS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
        # Grid (T,): program t reads row t once. bf16: x 2 bytes an element, y 2; with `added` also
        # 2 for it and 2 for the sum, `total`: 4 or 8 in all.
        t = tl.program_id(0).to(tl.int64)      # int64: t * D passes 2**31 at row 524288
        wide = scale.dtype.element_ty          # float32, float64 for float64 rows
        d = tl.arange(0, BLOCK_D)                                                # [BLOCK_D]
        place = t * D + d
        row = tl.load(x + place, mask=d < D, other=0.0).to(wide)
        if added is not None:
            row += tl.load(added + place, mask=d < D, other=0.0).to(wide)
            rounded = row.to(total.dtype.element_ty)
            tl.store(total + place, rounded, mask=d < D)
            row = rounded.to(wide)             # the norm of what was stored: the backward reads it
        r = tl.rsqrt(tl.sum(row * row, 0) / D + EPS)
        tl.store(scale + t, r)
        w = tl.load(weight + d, mask=d < D, other=0.0).to(wide)
        tl.store(y + place, (row * r * w).to(y.dtype.element_ty), mask=d < D)

    @triton.jit(do_not_specialize=["num_rows"])
    def _rms_norm_backward(x, weight, scale, grad_y, grad_total, grad_x, grad_weight, num_rows,
                           D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr):
        # Grid (ceil(T / ROWS),): program p takes ROWS rows, one after the other. bf16: x and grad_y
        # 2 bytes an element each, grad_x 2, with grad_total 2 more: 6 or 8 in all; a trained
        # weight 8 / ROWS more, for the programs' sums.
        # With n = x r and g = grad_y · weight: y = n · weight, dr/dx = -r³ x / D, so
        # grad_x = r g - x r³ mean(g x) = r (g - n mean(g n)).
        p = tl.program_id(0).to(tl.int64)
        wide = scale.dtype.element_ty
        d = tl.arange(0, BLOCK_D)                                                # [BLOCK_D]
        w = tl.load(weight + d, mask=d < D, other=0.0).to(wide)
        weight_sum = tl.zeros([BLOCK_D], wide)
        for i in range(ROWS):
            t = p * ROWS + i
            inside = (d < D) & (t < num_rows)
            place = t * D + d
            r = tl.load(scale + t, mask=t < num_rows, other=0.0)
            n = tl.load(x + place, mask=inside, other=0.0).to(wide) * r
            upstream = tl.load(grad_y + place, mask=inside, other=0.0).to(wide)
            g = upstream * w
            grad = r * (g - n * (tl.sum(g * n, 0) / D))
            if grad_total is not None:         # x' also goes on beside the norm
                grad += tl.load(grad_total + place, mask=inside, other=0.0).to(wide)
            tl.store(grad_x + place, grad.to(grad_x.dtype.element_ty), mask=inside)
            if grad_weight is not None:
                weight_sum += upstream * n
        if grad_weight is not None:            # one row per program: no atomics, one order of sums
            tl.store(grad_weight + p * D + d, weight_sum, mask=d < D)


def _row_block(width: int) -> dict[str, int]:
    """A row in registers: its columns, padded to a power of two, 16 per thread."""
    block = triton.next_power_of_2(width)
    return {"BLOCK_D": block, "num_warps": min(16, max(1, block // 512))}


class _RMSNorm(torch.autograd.Function):
    """Keeps x' (x itself without `added`) and 1 / sqrt(mean(x'²) + eps) of every row."""

    @staticmethod
    def forward(ctx, x, weight, eps, added):
        x = x.contiguous()
        num_rows, width = x.shape
        total = x if added is None else torch.empty_like(x)                      # x'
        scale = x.new_empty(num_rows, dtype=torch.promote_types(x.dtype, torch.float32))
        y = torch.empty_like(x)
        with torch.cuda.device_of(x):          # Triton launches on the current device
            _rms_norm_forward[(num_rows,)](    # (no row: nothing is launched)
                x, None if added is None else added.contiguous(), weight.contiguous(),
                None if added is None else total, y, scale, EPS=eps, D=width, **_row_block(width))
        ctx.save_for_backward(total, weight, scale)
        ctx.set_materialize_grads(False)       # no zeros where x' or y is not used
        return total, y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total, grad_y):
        x, weight, scale = ctx.saved_tensors
        _, want_weight, _, want_added = ctx.needs_input_grad
        if grad_y is None:
            return grad_total, None, None, grad_total if want_added else None
        num_rows, width = x.shape
        rows = NORM_ROWS if want_weight else 1
        programs = -(-num_rows // rows)
        grad_x = torch.empty_like(x)
        grad_weight = scale.new_empty(programs, width) if want_weight else None
        with torch.cuda.device_of(x):
            _rms_norm_backward[(programs,)](
                x, weight.contiguous(), scale, grad_y.contiguous(),
                None if grad_total is None else grad_total.contiguous(), grad_x, grad_weight,
                num_rows, D=width, ROWS=rows, **_row_block(width))
        if want_weight:
            grad_weight = grad_weight.sum(0).to(weight.dtype)                    # [D]
        return grad_x, grad_weight, None, grad_x if want_added else None


def rms_norm_triton(x: Tensor, weight: Tensor, eps: float,
                    added: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`rms_norm_torch` by the Triton kernels; y is rounded once, at its end.

    raises  ValueError where Triton does not work, and on shapes, dtypes or devices that do not fit
    """
    _check("rms_norm", x=x, weight=weight, added=added)
    if x.ndim != 2 or weight.shape != x.shape[1:] or not 0 < x.shape[1] <= MAX_WIDTH or (
            added is not None and added.shape != x.shape):
        raise ValueError(f"rms_norm: x is {list(x.shape)}, weight {list(weight.shape)}, added "
                         f"{None if added is None else list(added.shape)}; expected [T, D], [D], "
                         f"[T, D], with D at most {MAX_WIDTH}")
    return _RMSNorm.apply(x, weight, eps, added)


def rms_norm(x: Tensor, weight: Tensor, eps: float,
             added: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`rms_norm_torch`; on a GPU with Triton by the kernels, ValueError if they do not work."""
    return (rms_norm_triton if x.is_cuda and triton else rms_norm_torch)(x, weight, eps, added)


# ---- rotary embedding ---------------------------------------------------------------------------

def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_{i + Dh/2}): [T, H, Dh] with cos, sin [T, 1, Dh/2].

    Differs from the paper (and Meta's weights), which pair neighbours: the half-split pairing is
    that of Hugging Face checkpoints, whose q and k rows are permuted to fit it.
    """
    # bytes per element, bf16: four products 8, two sums 6, cat 4: 18 in all; the backward 20
    first, second = x.chunk(2, dim=-1)                                           # [T, H, Dh/2]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def rotary_torch(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Specification of `rotary`: q and k, each head rotated by its position's angles.

    q          [T, H, Dh]
    k          [T, Hkv, Dh]
    cos, sin   [T, 1, Dh/2]     constants
    returns    (q, k)           rotated, of the same shapes
    Source: arXiv:2104.09864, section 3.2.
    """
    return rotate(q, cos, sin), rotate(k, cos, sin)


if triton is not None:
    @triton.jit
    def _rotate_heads(x, out, c, s, t, stride_t, stride_h, H: tl.constexpr, BLOCK_H: tl.constexpr,
                      HALF: tl.constexpr, BLOCK_HALF: tl.constexpr):
        # Row t of x [T, H, 2 HALF], with any strides of t and h, to the contiguous `out`.
        h = tl.arange(0, BLOCK_H)[:, None]                                       # [BLOCK_H, 1]
        i = tl.arange(0, BLOCK_HALF)[None]                                       # [1, BLOCK_HALF]
        inside = (h < H) & (i < HALF)
        place = x + t * stride_t + h * stride_h + i
        first = tl.load(place, mask=inside, other=0.0).to(c.dtype)
        second = tl.load(place + HALF, mask=inside, other=0.0).to(c.dtype)
        out += (t * H + h) * 2 * HALF + i
        tl.store(out, (first * c - second * s).to(out.dtype.element_ty), mask=inside)
        tl.store(out + HALF, (second * c + first * s).to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def _rotary(q, k, cos, sin, q_out, k_out, q_stride_t, q_stride_h, k_stride_t, k_stride_h,
                WIDE: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr, H_KV: tl.constexpr,
                BLOCK_KV: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr,
                BACKWARD: tl.constexpr):
        # Grid (T,): program t rotates all heads of position t. bf16: 2 bytes an element in, 2 out.
        # A rotation's transpose is the rotation by the negative angle: so is the backward.
        t = tl.program_id(0).to(tl.int64)
        i = tl.arange(0, BLOCK_HALF)
        c = tl.load(cos + t * HALF + i, mask=i < HALF, other=0.0).to(WIDE)[None]
        s = tl.load(sin + t * HALF + i, mask=i < HALF, other=0.0).to(WIDE)[None]
        if BACKWARD:
            s = -s
        _rotate_heads(q, q_out, c, s, t, q_stride_t, q_stride_h, H, BLOCK_H, HALF, BLOCK_HALF)
        if k is not None:
            _rotate_heads(k, k_out, c, s, t, k_stride_t, k_stride_h, H_KV, BLOCK_KV, HALF,
                          BLOCK_HALF)


def _rotate_by_triton(xs: list[Tensor], cos: Tensor, sin: Tensor, backward: bool) -> list[Tensor]:
    """One or two tensors [T, H, Dh], each rotated into a new one, in one launch."""
    xs = [x if x.stride(2) == 1 else x.contiguous() for x in xs]
    outs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in xs]
    (q, q_out), (k, k_out) = (list(zip(xs, outs, strict=True)) + [(None, None)])[:2]
    heads, half = (q.shape[1], 0 if k is None else k.shape[1]), q.shape[2] // 2
    block_h, block_kv, block_half = (triton.next_power_of_2(n) for n in (*heads, half))
    with torch.cuda.device_of(q):
        _rotary[(len(q),)](
            q, k, cos, sin, q_out, k_out, *q.stride()[:2],
            *((0, 0) if k is None else k.stride()[:2]),
            WIDE=tl.float64 if q.dtype == torch.float64 else tl.float32,
            H=heads[0], BLOCK_H=block_h, H_KV=heads[1], BLOCK_KV=block_kv, HALF=half,
            BLOCK_HALF=block_half, BACKWARD=backward,
            num_warps=min(8, max(1, block_h * block_half // 256)))
    return outs


class _Rotary(torch.autograd.Function):
    """Keeps cos and sin."""

    @staticmethod
    def forward(ctx, q, k, cos, sin):
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        ctx.set_materialize_grads(False)
        q_out, k_out = _rotate_by_triton([q, k], cos, sin, backward=False)
        ctx.mark_non_differentiable(*(out for out, needed in zip(
            (q_out, k_out), ctx.needs_input_grad[:2], strict=True) if not needed))
        return q_out, k_out

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        given = [grad for grad in grads if grad is not None]
        rotated = iter(_rotate_by_triton(given, *ctx.saved_tensors, backward=True) if given else [])
        return *(None if grad is None else next(rotated) for grad in grads), None, None


def rotary_triton(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`rotary_torch` by one Triton kernel; q and k may have any strides but the last, 1.

    raises  ValueError where Triton does not work, and on shapes, dtypes or devices that do not fit
    """
    _check("rotary", q=q, k=k, cos=cos, sin=sin)
    angles = (len(q), 1, q.shape[-1] // 2)
    if q.ndim != 3 or k.ndim != 3 or k.shape[::2] != q.shape[::2] or q.shape[2] % 2 or (
            cos.shape != angles or sin.shape != angles):
        raise ValueError(f"rotary: q is {list(q.shape)}, k {list(k.shape)}, cos {list(cos.shape)}, "
                         f"sin {list(sin.shape)}; expected [T, H, Dh], [T, Hkv, Dh] and twice "
                         "[T, 1, Dh/2], with Dh even")
    return _Rotary.apply(q, k, cos, sin)


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`rotary_torch`; on a GPU with Triton by the kernel, ValueError if it does not work."""
    return (rotary_triton if q.is_cuda and triton else rotary_torch)(q, k, cos, sin)


# ---- SwiGLU -------------------------------------------------------------------------------------

class _SwiGLUTorch(torch.autograd.Function):
    """Bit for bit what autograd gives, but only gate and up are kept: silu(gate) is computed again.
    """
    # bytes per element, bf16: silu 4, product 6; backward: two products 12, two silus 10

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


def swiglu_torch(gate: Tensor, up: Tensor) -> Tensor:
    """Specification of `swiglu`: gate σ(gate) · up.

    gate, up   [T, F]
    returns    [T, F]
    Source: arXiv:2002.05202, Eq. 6.
    """
    return _SwiGLUTorch.apply(gate, up)


if triton is not None:
    @triton.jit
    def _swiglu_forward(gate, up, out, num_elements, WIDE: tl.constexpr, BLOCK: tl.constexpr):
        # Grid (ceil(T F / BLOCK),). bf16: gate and up 2 bytes an element each, out 2: 6 in all.
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = place < num_elements
        a = tl.load(gate + place, mask=inside, other=0.0).to(WIDE)
        b = tl.load(up + place, mask=inside, other=0.0).to(WIDE)
        tl.store(out + place, (a / (1 + tl.exp(-a)) * b).to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def _swiglu_backward(gate, up, grad, grad_gate, grad_up, num_elements, WIDE: tl.constexpr,
                         BLOCK: tl.constexpr):
        # Grid as above. bf16: three tensors in, two out: 10 bytes an element.
        # silu(a) = a σ(a) is computed again; silu'(a) = σ(a) (1 + a (1 - σ(a))).
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = place < num_elements
        a = tl.load(gate + place, mask=inside, other=0.0).to(WIDE)
        b = tl.load(up + place, mask=inside, other=0.0).to(WIDE)
        g = tl.load(grad + place, mask=inside, other=0.0).to(WIDE)
        sigma = 1 / (1 + tl.exp(-a))
        gate_grad = g * b * sigma * (1 + a * (1 - sigma))
        tl.store(grad_gate + place, gate_grad.to(grad_gate.dtype.element_ty), mask=inside)
        tl.store(grad_up + place, (g * a * sigma).to(grad_up.dtype.element_ty), mask=inside)


def _launch_swiglu(kernel, *tensors: Tensor) -> None:
    size = tensors[0].numel()
    with torch.cuda.device_of(tensors[0]):
        kernel[(-(-size // SWIGLU_BLOCK),)](
            *tensors, size, BLOCK=SWIGLU_BLOCK, num_warps=8,
            WIDE=tl.float64 if tensors[0].dtype == torch.float64 else tl.float32)


class _SwiGLUTriton(torch.autograd.Function):
    """Keeps gate and up."""

    @staticmethod
    def forward(ctx, gate, up):
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        out = torch.empty_like(gate)
        _launch_swiglu(_swiglu_forward, gate, up, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        _launch_swiglu(_swiglu_backward, gate, up, grad.contiguous(), grad_gate, grad_up)
        return grad_gate, grad_up


def swiglu_triton(gate: Tensor, up: Tensor) -> Tensor:
    """`swiglu_torch` by the Triton kernels; the result is rounded once.

    raises  ValueError where Triton does not work, and on shapes, dtypes or devices that do not fit
    """
    _check("swiglu", gate=gate, up=up)
    if gate.shape != up.shape:
        raise ValueError(f"swiglu: gate is {list(gate.shape)}, up {list(up.shape)}; expected the "
                         "same shape twice")
    return _SwiGLUTriton.apply(gate, up)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`swiglu_torch`; on a GPU with Triton by the kernels, ValueError if they do not work."""
    return (swiglu_triton if gate.is_cuda and triton else swiglu_torch)(gate, up)
