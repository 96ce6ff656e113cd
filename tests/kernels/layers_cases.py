"""What the tests of kernels/layers.py share: functions under test, inputs, the float64 truth."""
import os
from types import SimpleNamespace

import pytest
import torch

from kernels import layers

# Triton's interpreter runs the kernels on a CPU. It must be chosen before they are defined, so
# test_layers_code.py runs these tests once more with TRITON_INTERPRET=1.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TORCH = SimpleNamespace(rms_norm=layers.rms_norm_torch, rotary=layers.rotary_torch,
                        swiglu=layers.swiglu_torch, is_kernel=False)
TRITON = SimpleNamespace(rms_norm=layers.rms_norm_triton, rotary=layers.rotary_triton,
                         swiglu=layers.swiglu_triton, is_kernel=True)
PLACES = {"triton-cpu": (TRITON, "cpu")} if INTERPRETED else {"torch-cpu": (TORCH, "cpu")}
if torch.cuda.is_available():
    PLACES["torch-cuda"] = TORCH, "cuda"
    PLACES |= {} if INTERPRETED else {"triton-cuda": (TRITON, "cuda")}
each_place = pytest.mark.parametrize("ours, device", PLACES.values(), ids=PLACES)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])

EPS = 1e-5
# Half the distance to the next number, relative: what rounding once costs at most. (The interpreter
# cuts bfloat16 off where a GPU rounds it: a whole distance.)
ROUNDING = {torch.float64: 2 ** -53, torch.float32: 2 ** -24, torch.float16: 2 ** -11,
            torch.bfloat16: 2 ** -7 if INTERPRETED else 2 ** -8}


def normal(*shape, dtype=torch.float32, device="cpu", seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(device, dtype)


# ---- inputs -------------------------------------------------------------------------------------

NORMS = {                       # T, D, `added` given?, weight trained?
    "one number": (1, 1, False, True),
    "one row": (1, 64, True, False),
    "D no power of two": (3, 100, True, False),
    "D odd, trained, not one program's rows": (35, 33, True, True),
    "one program's rows": (16, 24, False, True),
    "two warps": (2, 1025, True, True),
    "as Llama 7B": (1, 4096, True, False),
    "nothing is added": (4, 48, False, False),
    "no row": (0, 8, True, True),
}
HEADS = {                       # T, H, Hkv, Dh
    "one pair": (1, 1, 1, 2),
    "multi-head": (4, 4, 4, 8),
    "grouped-query": (3, 4, 2, 8),
    "no power of two": (2, 12, 3, 6),
    "Dh = 96": (1, 5, 1, 96),
    "as Llama 7B": (1, 32, 32, 128),
    "no row": (0, 4, 2, 8),
}
SIZES = {                       # T, F
    "one number": (1, 1),
    "a row": (3, 40),
    "one block": (2, 1024),
    "one element more": (1, 2049),
    "one less": (23, 89),
    "no row": (0, 8),
}


def norm_inputs(t, width, added, trained, dtype, device, seed=0):
    """x, weight and what is added (or None), with the gradients that are asked for."""
    x = normal(t, width, dtype=dtype, device=device, seed=seed, scale=3.0).requires_grad_()
    weight = 1 + normal(width, dtype=dtype, device=device, seed=seed + 1, scale=0.3)
    branch = normal(t, width, dtype=dtype, device=device, seed=seed + 2).requires_grad_()
    return x, weight.requires_grad_(trained), branch if added else None


def rotary_inputs(t, heads, kv_heads, head_dim, dtype, device, seed=0):
    """q, k, cos, sin; angles of any size, rounded to dtype as the model does."""
    q = normal(t, heads, head_dim, dtype=dtype, device=device, seed=seed).requires_grad_()
    k = normal(t, kv_heads, head_dim, dtype=dtype, device=device, seed=seed + 1).requires_grad_()
    angles = normal(t, 1, head_dim // 2, dtype=torch.float64, device=device, seed=seed + 2,
                    scale=50.0)
    return q, k, angles.cos().to(dtype), angles.sin().to(dtype)


def swiglu_inputs(t, width, dtype, device, seed=0):
    return [normal(t, width, dtype=dtype, device=device, seed=seed + i, scale=4.0).requires_grad_()
            for i in range(2)]


# ---- the truth: float64, of the inputs as they are, rounded; no line of kernels/layers.py --------

def true_norm(x, weight, eps, added=None, stored=None):
    """x + added and its norm; of a sum `stored` in x's dtype its norm, and gradients pass the
    rounding unchanged."""
    total = x.double() if added is None else x.double() + added.double()
    if stored is not None:
        total = total + (stored.double() - total).detach()
    square = (total * total).sum(-1, keepdim=True) / total.shape[-1]
    return total, total / (square + eps) ** 0.5 * weight.double()


def true_rotary(q, k, cos, sin):
    """x_j + i x_{j + Dh/2}, times cos + i sin."""
    turn = torch.complex(cos.double(), sin.double())
    results = []
    for x in (q, k):
        half = x.shape[-1] // 2
        turned = torch.complex(x[..., :half].double(), x[..., half:].double()) * turn
        results.append(torch.cat([turned.real, turned.imag], -1))
    return tuple(results)


def true_swiglu(gate, up):
    return gate.double() / (1 + torch.exp(-gate.double())) * up.double()


# ---- comparisons --------------------------------------------------------------------------------

def gradients(outputs, inputs, seed=50):
    """Of a sum of the outputs with random weights that the output's dtype holds exactly."""
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream = [normal(*out.shape, dtype=torch.bfloat16, seed=seed + i).to(out)
                for i, out in enumerate(outputs)]
    return torch.autograd.grad(outputs, inputs, upstream)


def relative_error(value, truth):
    """‖value - truth‖ / ‖truth‖; 0 / 0 is 0."""
    error = (value.double() - truth).norm().item()
    return error / truth.norm().item() if error else 0.0
