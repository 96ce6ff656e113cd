"""Linear layers without bias, x Wᵀ, and with low-rank updates, x Wᵀ + Σ scaling · x Aᵀ Bᵀ.

    linear              x Wᵀ
    lora_linear_torch   the specification: one product after the other; what a CPU runs
    lora_linear_fused   the updates are added by their products' own epilogues; what a GPU runs
    lora_linear         the one of the two that fits the tensors' device

Bytes of [T, out] in and out of memory per element, bf16, for one update: the specification writes
both products and reads them to write their sum, 10; here the second product adds to the first, 6.
Of [T, in] in the backward 10 and 6. All products are cuBLAS's: no Triton here.
"""
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Update = tuple[Tensor, Tensor, float]      # lora_A [r, in], lora_B [out, r], scaling


# ---- x Wᵀ ---------------------------------------------------------------------------------------

def cpu_multiplies_bf16() -> bool:
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


class _UpcastLinear(torch.autograd.Function):
    """x Wᵀ of bf16 tensors through a float32 product; keeps no float32 copy for the backward.

    Same result as a bf16 product with float32 accumulation. For CPUs without bf16 units, where
    torch's own bf16 product is 10 (forward) to 80 (backward) times slower.
    """

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return (x.float() @ weight.float().T).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad = grad.float()
        grad_x = (grad @ weight.float()).to(weight.dtype) if ctx.needs_input_grad[0] else None
        grad_w = (grad.T @ x.float()).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return grad_x, grad_w


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ: [T, in], [out, in] -> [T, out] in x's dtype."""
    if x.dtype == torch.bfloat16 and x.device.type == "cpu" and not cpu_multiplies_bf16():
        return _UpcastLinear.apply(x, weight)
    return F.linear(x, weight)


# ---- x Wᵀ + Σ scaling · x Aᵀ Bᵀ -----------------------------------------------------------------

def lora_linear_torch(x: Tensor, weight: Tensor, updates: tuple[Update, ...]) -> Tensor:
    """Specification of `lora_linear`: x Wᵀ + Σ scaling · x Aᵀ Bᵀ.

    x        [T, in]
    weight   [out, in]    W, in x's dtype
    updates  ((A [r, in], B [out, r], scaling), …)      used in x's dtype; frozen or trained
    returns  [T, out]
    Source: arXiv:2106.09685, Eq. 3.
    """
    y = linear(x, weight)                                                        # [T, out]
    for lora_A, lora_B, scaling in updates:
        low = scaling * linear(x, lora_A.to(x.dtype))                            # [T, r]
        y = y + linear(low, lora_B.to(x.dtype))
    return y


class _LoRALinear(torch.autograd.Function):
    """Keeps x, where A or W is trained, and the [T, r] products with A, where B is."""

    @staticmethod
    def forward(ctx, x, weight, scalings, *factors):
        """factors   A_1, B_1, A_2, B_2, …, a scaling for each pair"""
        # x Wᵀ first, as without an update: an update of zero leaves its bits as they are
        y, lows = F.linear(x, weight), []                                        # [T, out]
        for scaling, lora_A, lora_B in zip(scalings, factors[::2], factors[1::2], strict=True):
            low = x @ (scaling * lora_A).to(x.dtype).T                           # [T, r]
            y.addmm_(low, lora_B.to(x.dtype).T)
            lows.append(low)
        _, want_weight, _, *want = ctx.needs_input_grad
        ctx.scalings = scalings
        ctx.save_for_backward(x if want_weight or any(want[::2]) else None, weight, *factors,
                              *(low if wanted else None
                                for low, wanted in zip(lows, want[1::2], strict=True)))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        """dx = Σ (g B) (scaling A) + g W, dA = scaling (g B)ᵀ x, dB = gᵀ low."""
        x, weight, *saved = ctx.saved_tensors
        want_x, want_weight, _, *want = ctx.needs_input_grad
        grad_x, grads, count = None, [], len(ctx.scalings)
        for i, (scaling, low) in enumerate(zip(ctx.scalings, saved[2 * count:], strict=True)):
            lora_A, lora_B = saved[2 * i:2 * i + 2]
            want_A, want_B = want[2 * i:2 * i + 2]
            grad_low = grad @ lora_B.to(grad.dtype)                              # [T, r]
            grads += [(grad_low.T @ x).to(lora_A.dtype) * scaling if want_A else None,
                      (grad.T @ low).to(lora_B.dtype) if want_B else None]
            if want_x:
                scaled_A = (scaling * lora_A).to(grad.dtype)
                grad_x = (grad_low @ scaled_A if grad_x is None
                          else grad_x.addmm_(grad_low, scaled_A))                # [T, in]
        if want_x:            # last: the sum is read inside the long product, and rounded after it
            grad_x.addmm_(grad, weight)
        return grad_x, grad.T @ x if want_weight else None, None, *grads


def lora_linear_fused(x: Tensor, weight: Tensor, updates: tuple[Update, ...]) -> Tensor:
    """`lora_linear_torch` without a pass over [T, out] but the products' own."""
    if not updates:
        return linear(x, weight)
    factors = [factor for lora_A, lora_B, _ in updates for factor in (lora_A, lora_B)]
    return _LoRALinear.apply(x, weight, [scaling for *_, scaling in updates], *factors)


def lora_linear(x: Tensor, weight: Tensor, updates: tuple[Update, ...]) -> Tensor:
    """`lora_linear_torch`, on a GPU as `lora_linear_fused`."""
    return (lora_linear_fused if x.is_cuda else lora_linear_torch)(x, weight, updates)
