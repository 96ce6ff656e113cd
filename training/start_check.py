"""Before the first step on a GPU: does every kernel compute there what plain torch computes?

The kernels were right where they were tested. Another GPU, driver, torch or Triton may break one,
and a wrong gradient does not stop a run: it makes a bad model. So the run's model reads its first
micro-batch once, and what is not plain torch is compared with plain torch in higher precision,
outputs and gradients (for a random upstream gradient):

    attention    finite of every layer, output and gradients; compared of the first, middle and last,
                 with keys less their mean
    RMSNorm, rotary embedding, SwiGLU, LoRA     of the first layer, some rows
    log-probs    of the head, some rows

Allowed is twice the error of plain torch in the run's own dtype plus FLOOR, at most MOST. At 7B's size
it takes 0.4 s on an H100, beside compiling the kernels, for which the first step would wait otherwise.
generate.py is checked on a prompt. What is torch's own there, the attention of decoding, is not checked.
"""
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kernels.attention import attention
from kernels.layers import rms_norm, rms_norm_torch, rotary, rotary_torch, swiglu, swiglu_torch
from kernels.lora_linear import lora_linear, lora_linear_torch
from lora import LoRALinear
from model import Layer, Llama, rotary_angles
from packing import Stream, Tree, build_stream, pack
from step import Compute

CHECKED_DEVICES = ("cuda",)          # elsewhere plain torch is what runs
WIDER = {torch.bfloat16: torch.float32, torch.float32: torch.float64}        # of the truth
# float32: torch's own attention on a GPU takes three TF32 products, off by 2e-5 (one: by 4e-4);
# bfloat16: a rounding and a half
FLOOR = {torch.bfloat16: 6e-3, torch.float32: 5e-5}
MOST = 0.1
LAYER_ROWS, HEAD_ROWS = 1024, 512
SCORES = 2 ** 28         # of plain attention, 1 GB in float32; longer trees are checked in part


def plain_attention(q: Tensor, k: Tensor, v: Tensor, stream: Stream) -> Tensor:
    """softmax(q kᵀ / sqrt(Dh)) v by the rule of kernels/attention.py, written out tree by tree."""
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    sizes, outputs = stream.tree_ids.unique_consecutive(return_counts=True)[1].tolist(), []
    for q_tree, k_tree, v_tree, branch in zip(*(t.split(sizes) for t in (
            q, k, v, stream.branch_ids)), strict=True):
        sees = ((branch == 0) | (branch[:, None] == branch)).tril()              # [t, t]
        scores = torch.einsum("ihd,jhd->hij", q_tree, k_tree) * q.shape[2] ** -0.5
        weights = scores.masked_fill(~sees, -torch.inf).softmax(-1)              # [H, t, t]
        outputs.append(torch.einsum("hij,jhd->ihd", weights, v_tree))
    return torch.cat(outputs)


# ---- one function -------------------------------------------------------------------------------

def results(function: Callable, inputs: Sequence[Tensor],
            dtype: torch.dtype | None = None) -> list[Tensor]:
    """Outputs, then gradients of all inputs; the inputs are cast to `dtype` if one is given."""
    cast = [t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]
    with torch.enable_grad():
        outputs = function(*cast)
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        generator = torch.Generator(cast[0].device).manual_seed(0)
        upstream = [torch.randn(out.shape, generator=generator, device=out.device)
                    .to(inputs[0].dtype).to(out) for out in outputs if out.requires_grad]
        gradients = torch.autograd.grad([out for out in outputs if out.requires_grad], cast,
                                        upstream)
    return [*(out.detach() for out in outputs), *gradients]


def compare(name: str, function: Callable, plain: Callable, inputs: Sequence[Tensor]) -> float:
    """The largest error, ‖found - truth‖ / ‖truth‖, of outputs and gradients; `plain` is the same
    in plain torch. Raises ValueError, with the figures, for one beyond what is allowed, or NaN."""
    dtype, worst = inputs[0].dtype, 0.0
    truths = results(plain, inputs, WIDER[dtype])
    for i, (truth, *found) in enumerate(zip(truths, results(function, inputs),
                                            results(plain, inputs), strict=True)):
        size = float(truth.norm()) or 1.0
        error, usual = (float((t.to(truth.dtype) - truth).norm()) / size for t in found)
        allowed = min(2 * usual + FLOOR[dtype], MOST)
        if not error <= allowed:
            first = len(truths) - len(inputs)
            part = f"output {i + 1}" if i < first else f"the gradient of input {i + 1 - first}"
            raise ValueError(
                f"{name} is wrong on this device: {part} is off by {error:.1e}, allowed are "
                f"{allowed:.1e} ({dtype}, torch {torch.__version__}); nothing was run. Try "
                "another torch or Triton; train.py --kernels torch runs attention and log-probs "
                "without our kernels")
        worst = max(worst, error)
    return worst


def shortened(tree: Tree, most: int) -> Tree:
    """The beginning of a tree, of at most so many tokens, of which its prompt gets half."""
    prompt_ids, response_ids = tree.prompt_ids[:max(1, most // 2)], []
    for ids in tree.response_ids:
        room = most - len(prompt_ids) - sum(map(len, response_ids))
        response_ids += [ids[:room]] if room > 0 else []
    return Tree(prompt_ids, response_ids, tree.scores[:len(response_ids)], [])


# ---- all of them --------------------------------------------------------------------------------

def layer_errors(layer: Layer, x: Tensor, cos: Tensor, sin: Tensor, q: Tensor,
                 k: Tensor) -> dict[str, float]:
    """Errors of what a layer computes between its products, and of an adapter, for x [n, D]."""
    norm, generator = layer.input_layernorm, torch.Generator(x.device).manual_seed(1)
    normed = rms_norm_torch(x, norm.weight, norm.eps)[1]
    gate, up = layer.mlp.gate_proj(normed), layer.mlp.up_proj(normed)
    errors = {
        "RMSNorm": compare("RMSNorm", lambda x, w, added: rms_norm(x, w, norm.eps, added),
                           lambda x, w, added: rms_norm_torch(x, w, norm.eps, added),
                           (x, norm.weight, x.flip(0))),
        "rotary": compare("the rotary embedding", lambda q, k: rotary(q, k, cos, sin),
                          lambda q, k: rotary_torch(q, k, cos.to(q), sin.to(q)), (q, k)),
        "SwiGLU": compare("SwiGLU", swiglu, swiglu_torch, (gate, up))}
    if adapted := next((m for m in layer.modules() if isinstance(m, LoRALinear)), None):
        rows, lora_B = (torch.randn(shape, generator=generator, device=x.device) for shape in (
            (len(x), adapted.weight.shape[1]), adapted.lora_B.shape))      # its own B starts as 0
        errors["LoRA"] = compare("LoRA", *(
            lambda x, weight, A, B, function=function: function(
                x, weight, ((A, B, adapted.scaling),)) for function in (
                    lora_linear, lora_linear_torch)),
            (rows.to(x), adapted.weight, adapted.lora_A, 0.02 * lora_B.to(adapted.lora_A)))
    return errors


@torch.no_grad()
def check_start(model: Llama, trees: list[Tree], compute: Compute) -> dict[str, float]:
    """The largest relative error of every function, on the first micro-batch of `trees`; raises
    ValueError, one sentence with the figures, for an error beyond what is allowed.

    model   a policy; or a reward model, of which the vocabulary's head is not checked
    """
    group, config = pack(trees, compute.micro_tokens)[0], model.config
    groups = config.num_attention_heads // config.num_key_value_heads
    if groups * sum(tree.num_tokens ** 2 for tree in group) > SCORES:    # even for one KV head
        group = [shortened(group[0], math.isqrt(SCORES // groups))]
    stream = build_stream(group, compute.device, None, compute.attention)
    layers, errors = model.model.layers, {}
    x = model.model.embed_tokens(stream.input_ids)                               # [T, D]
    cos, sin = (t.to(x)[:, None] for t in rotary_angles(
        stream.position_ids, config.head_dim, config.rope_theta, config.rope_factor,
        config.rope_llama3))
    some = max(1, SCORES // (groups * sum(tree.num_tokens ** 2 for tree in group)))   # kv heads

    def attend(number: int, q: Tensor, k: Tensor, v: Tensor, segments: object) -> Tensor:
        name = f"attention ({compute.attention}, layer {number + 1})"
        if number == 0:                     # here --fsdp has all weights of the layer
            errors.update(layer_errors(layers[0], *(t[:LAYER_ROWS] for t in (x, cos, sin, q, k))))
        if number in (0, len(layers) // 2, len(layers) - 1):
            # Softmax does not see what all keys have in common, but a backward that reads its rounded
            # output has an error of that size: it is not what is looked for here.
            apart = (k.float() - k.float().mean(0)).to(k)
            error = compare(
                name, lambda q, k, v: attention(q, k, v, segments)[:, :groups * some],
                lambda q, k, v: plain_attention(
                    q[:, :groups * some], k[:, :some], v[:, :some], stream), (q, apart, v))
            errors["attention"] = max(errors.get("attention", 0.0), error)
        if not all(t.isfinite().all() for t in results(
                lambda q, k, v: attention(q, k, v, segments), (q, k, v))):
            raise ValueError(f"{name} is wrong on this device: its output or a gradient is not "
                             "finite; nothing was run. Try another torch or Triton, or "
                             "train.py --kernels torch")
        return attention(q, k, v, segments)

    hidden = model(stream.input_ids, stream.position_ids, stream.segments, [
        lambda *tensors, number=i: attend(number, *tensors[:4]) for i in range(len(layers))])
    if not hasattr(model, "score"):
        hidden, labels = hidden[stream.predict_from], stream.labels              # [N, D]
        rows = torch.linspace(0, len(labels) - 1, min(HEAD_ROWS, len(labels))).long().to(x.device)

        def plain(hidden: Tensor) -> tuple[Tensor, Tensor]:
            logits = hidden[rows] @ model.lm_head.weight.to(hidden).T            # [n, V]
            logps = -torch.nn.functional.cross_entropy(
                logits.to(WIDER[x.dtype]), labels[rows], reduction="none")
            return logps, logps.detach()

        errors["log-probs"] = compare("log-probs of the head", lambda hidden: [
            logps[rows] for logps in compute.linear_logps(
                hidden, hidden.detach(), model.lm_head.weight, labels, labels)[:2]], plain,
            (hidden,))
    return errors


def checked(model: Llama, trees: list[Tree], compute: Compute, show: bool) -> dict[str, dict]:
    """`check_start` where something else than plain torch runs; for args.json, and on the screen.

    show    print what was checked
    """
    if torch.device(compute.device).type not in CHECKED_DEVICES:
        return {}
    if show:
        print("compiling the kernels, and checking them on the first micro-batch", flush=True)
    errors = check_start(model, trees, compute)
    if show:
        print("checked against plain torch, relative errors:", ", ".join(
            f"{name} {error:.1e}" for name, error in errors.items()))
    return {"start_check": errors}
