"""What the tests of linear_logps share: the function under test, rows, and the float64 truth."""
import os

import pytest
import torch

from kernels import linear_logps_torch, linear_logps_triton

# Triton's interpreter runs the kernel on a CPU. It must be chosen before the kernel is defined, so
# test_kernel_code.py runs the tests of linear_logps once more with TRITON_INTERPRET=1.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
linear_logps = linear_logps_triton if INTERPRETED else linear_logps_torch
PLACES = [(linear_logps, "cpu")]
if torch.cuda.is_available():
    PLACES += [(linear_logps_torch, "cuda")]
    PLACES += [(linear_logps_triton, "cuda")] if not INTERPRETED else []
each_place = pytest.mark.parametrize("linear_logps, device", PLACES,
                                     ids=[f"{f.__name__}-{device}" for f, device in PLACES])
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
    """log softmax(hidden Wᵀ)[label] in float64, of the inputs as they are, rounded."""
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
    """The usual way: the whole product in the inputs' dtype, then float32."""
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
