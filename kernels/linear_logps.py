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

`linear_logps` is what the loop calls; `linear_logps_torch` is its specification in plain torch.
"""
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

CHUNK_ROWS = 512      # rows of logits held at a time: 512 x 32000 float32 = 65 MB


class _LinearLogps(torch.autograd.Function):
    """Stacked rows [policy; reference] against a frozen head; u is formed in the forward."""

    @staticmethod
    def forward(ctx, policy_hidden, reference_hidden, weight, labels, chunk_rows):
        num_policy, num_rows = len(policy_hidden), len(labels)
        rows_dtype = policy_hidden.dtype
        # Half-precision rows: logits and log-sum-exp in float32. A CPU multiplies float32 here,
        # since without bf16 units torch's bf16 product is some 10 to 200 times slower.
        dtype = torch.promote_types(rows_dtype, torch.float32)
        on_cpu = weight.device.type == "cpu"
        head = weight.to(dtype) if on_cpu else weight                             # [V, D]
        logps = torch.empty(num_rows, dtype=dtype, device=weight.device)          # [N + M]
        u = torch.empty_like(policy_hidden)                                       # [N, D]
        buffer = torch.empty(min(chunk_rows, num_rows), len(weight), dtype=dtype,
                             device=weight.device)                                # [n, V]
        hidden = torch.cat([policy_hidden, reference_hidden])                     # [N + M, D]
        for start in range(0, num_rows, chunk_rows):
            rows = slice(start, min(start + chunk_rows, num_rows))
            label = labels[rows, None]                                            # [n, 1]
            logits = buffer[:len(label)]
            if on_cpu:
                torch.mm(hidden[rows].to(dtype), head.T, out=logits)              # [n, V]
            else:
                logits.copy_(hidden[rows] @ head.T)
            row_logps = torch.log_softmax(logits, -1, out=logits)                 # [n, V], in place
            logps[rows] = row_logps.gather(1, label)[:, 0]
            num_grad = min(len(label), num_policy - start)
            if num_grad > 0 and ctx.needs_input_grad[0]:
                # onehot - softmax before any rounding: where softmax is near 1 it would cancel
                error = row_logps[:num_grad].exp_().neg_()                        # [n, V]
                error.scatter_add_(1, label[:num_grad], torch.ones_like(logps[:num_grad, None]))
                u[start:start + num_grad] = error.to(head.dtype) @ head
        ctx.save_for_backward(u)
        policy_logps, reference_logps = logps.split([num_policy, num_rows - num_policy])
        ctx.mark_non_differentiable(reference_logps)
        return policy_logps, reference_logps                                      # [N], [M]

    @staticmethod
    @once_differentiable
    def backward(ctx, policy_grad, _):
        (u,) = ctx.saved_tensors
        return (policy_grad[:, None] * u).to(u.dtype), None, None, None, None     # [N, D]


def _token_logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))   # [n, V]
    return logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]                # [n]


def linear_logps_torch(policy_hidden: Tensor, reference_hidden: Tensor, weight: Tensor,
                       policy_labels: Tensor, reference_labels: Tensor,
                       chunk_rows: int = CHUNK_ROWS) -> tuple[Tensor, Tensor]:
    """Specification of `linear_logps`: log softmax(hidden Wᵀ)[label], in nats.

    policy_hidden     [N, D]        rows that need a gradient
    reference_hidden  [M, D]        rows that need none (M = 0 without a reference)
    weight            [V, D]        the head; frozen, or trained (then logits are recomputed)
    policy_labels     [N] int64     in [0, V)
    reference_labels  [M] int64
    chunk_rows        rows of logits in memory at a time
    returns           [N], [M]      float32 (float64 from float64 input)
    raises            ValueError    on shapes or dtypes that do not fit, labels outside [0, V)
    """
    _check(policy_hidden, reference_hidden, weight, policy_labels, reference_labels)
    if not weight.requires_grad:
        labels = torch.cat([policy_labels, reference_labels])                     # [N + M]
        return _LinearLogps.apply(policy_hidden, reference_hidden, weight, labels, chunk_rows)
    policy_logps = [checkpoint(_token_logps, hidden, weight, labels, use_reentrant=False)
                    for hidden, labels in zip(policy_hidden.split(chunk_rows),
                                              policy_labels.split(chunk_rows))]
    with torch.no_grad():
        reference_logps = [_token_logps(hidden, weight, labels)
                           for hidden, labels in zip(reference_hidden.split(chunk_rows),
                                                     reference_labels.split(chunk_rows))]
    return torch.cat(policy_logps), torch.cat(reference_logps)


def _check(policy_hidden, reference_hidden, weight, policy_labels, reference_labels):
    for name, hidden, labels in (("policy", policy_hidden, policy_labels),
                                 ("reference", reference_hidden, reference_labels)):
        if hidden.ndim != 2 or hidden.shape[1] != weight.shape[1]:
            raise ValueError(f"{name}_hidden is {list(hidden.shape)}; expected [rows, "
                             f"{weight.shape[1]}] to fit weight {list(weight.shape)}")
        if hidden.dtype != weight.dtype:
            raise ValueError(f"{name}_hidden is {hidden.dtype}, weight is {weight.dtype}; "
                             "they must be the same")
        if labels.shape != hidden.shape[:1] or labels.dtype != torch.int64:
            raise ValueError(f"{name}_labels is {list(labels.shape)} {labels.dtype}; expected "
                             f"[{len(hidden)}] int64")
        # on a GPU this look at the values would wait for the device: the tests do it there
        if labels.device.type == "cpu" and len(labels) and not (
                0 <= int(labels.min()) and int(labels.max()) < len(weight)):
            raise ValueError(f"{name}_labels span {int(labels.min())}..{int(labels.max())}; "
                             f"the head has {len(weight)} rows")


# The Triton kernel's place: under its specification, same signature, chosen here for CUDA tensors.
linear_logps = linear_logps_torch
