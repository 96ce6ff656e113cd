"""Attention over shared prompts: our kernels, dense blocks, FlexAttention. Right, then fast.

    python bench/attention.py --dataset test.jsonl.gz --tokenizer tokenizer.model
    python bench/attention.py ... --responses 12 --out bench/results/attention-d2o.json

On a GPU one layer's attention at 7B's shape (32 heads of 128, bf16), forward and backward, over
--tokens of HH pairs and one prompt with 12 responses; with --responses, over prompts that have so
many each, as D2O's. First the output and gradients of each implementation are compared with dense
float32: an error above twice that of dense bf16 ends the script. Then milliseconds, medians of
interleaved runs, and the time the host takes to prepare a stream. On a CPU, a dry run at a small
size: dense, FlexAttention's forward, and our kernels where TRITON_INTERPRET=1 is set.

FlexAttention is compiled from the rule, over torch's own block mask.
"""
import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import torch
from breakdown import ROOT, environment, hh_trees, synchronize
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from kernels.attention import ATTENTIONS, attention, attention_segments
from kernels.tree_attention import tree_attention_problem, tree_blocks
from packing import Stream, build_stream, pack


def make_stream(dataset: str, tokenizer: str, tokens: int, responses: int) -> Stream:
    """HH pairs behind one prompt with 12 responses; or `responses` for every prompt."""
    trees = hh_trees(dataset, tokenizer, tokens // 128)
    answers = [ids for tree in trees for ids in tree.response_ids]
    numbers = [responses] * (len(answers) // responses) if responses else [12]
    for i, number in enumerate(numbers):
        taken, answers = answers[:number], answers[number:]
        trees[i] = replace(trees[i], response_ids=taken, scores=[0.0] * len(taken), pairs=[])
    if responses:
        trees = trees[:len(numbers)]
    return build_stream(pack(trees, tokens)[0])


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]      # q, k, v [T, H, Dh] -> [T, H, Dh]


@cache
def compiled_flex_attention() -> Callable:
    return torch.compile(flex_attention)


def prepare_flex(ids: tuple[list[int], list[int]], device: str) -> Attend:
    """FlexAttention over one stream."""
    tree_ids, branch_ids = (torch.tensor(part, device=device) for part in ids)

    def sees(batch, head, i, j):
        same_branch = (branch_ids[j] == 0) | (branch_ids[i] == branch_ids[j])
        return (j <= i) & (tree_ids[i] == tree_ids[j]) & same_branch
    mask = create_block_mask(sees, None, None, len(tree_ids), len(tree_ids), device=device)
    flex = compiled_flex_attention() if device == "cuda" else flex_attention

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))                   # [1, H, T, Dh]
        return flex(q, k, v, block_mask=mask)[0].transpose(0, 1)
    return attend


def prepare_ours(how: str, ids: tuple[list[int], list[int]], device: str) -> Attend:
    return partial(attention, segments=attention_segments(*ids, device, how))


def run(q: Tensor, k: Tensor, v: Tensor, upstream: Tensor, attend: Attend) -> list[Tensor]:
    """[output, dq, dk, dv]; without gradients (FlexAttention on a CPU) the output alone."""
    output = attend(q, k, v)
    if not q.requires_grad:
        return [output]
    return [output, *torch.autograd.grad(output, (q, k, v), upstream)]


def least_work(ids: tuple[list[int], list[int]], heads: int, width: int) -> tuple[float, float]:
    """Floating-point operations and bytes that forward and backward cannot avoid, in bf16.

    For each pair of positions that see each other 2 products of the forward, 5 of the backward; q,
    k, v, o read or written once by the forward, these and four gradients by the backward.
    """
    blocks = tree_blocks(*ids).long()
    rows, prompt = blocks[:, 1] - blocks[:, 0], blocks[:, 3] - blocks[:, 2]
    before = blocks[:, 0] - blocks[:, 4]         # of the own prompt or response, before the block
    pairs = int((rows * (prompt + before) + rows * (rows + 1) // 2).sum())
    return 7 * 2 * pairs * heads * width, (4 + 8) * len(ids[0]) * heads * width * 2


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().float() - expected.detach()).norm() / expected.detach().norm())


def check(errors: dict[str, list[float]]) -> None:
    """Print the errors; raises SystemExit for one above twice that of dense, or NaN."""
    for name, found in errors.items():
        print(f"{name:7} error of output, dq, dk, dv: {', '.join(f'{e:.1e}' for e in found)}")
        if not all(e <= 2 * dense + 1e-6 for e, dense in zip(found, errors["dense"], strict=False)):
            raise SystemExit(f"bench/attention.py: {name} is wrong; its times mean nothing")


def milliseconds(steps: dict[str, Callable], repeats: int, device: str) -> dict[str, float]:
    """Medians of interleaved runs, after one untimed round."""
    seconds = {name: [] for name in steps}
    for _ in range(1 + repeats):
        for name, step in steps.items():
            synchronize(device)
            start = time.perf_counter()
            step()
            synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(found[1:]) for name, found in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="HH file")
    parser.add_argument("--tokenizer", required=True, help="Llama's tokenizer.model")
    parser.add_argument("--tokens", type=int, default=8192, help="of the stream, at most")
    parser.add_argument("--responses", type=int, default=0,
                        help="of every prompt; 0: HH's pairs, and 12 of the first prompt")
    parser.add_argument("--repeats", type=int, default=20, help="timed runs, after one untimed")
    parser.add_argument("--out", default=str(ROOT / "bench/results/attention.json"))
    args = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    heads, width, dtype = (32, 128, torch.bfloat16) if on_gpu else (4, 16, torch.float32)
    stream = make_stream(args.dataset, args.tokenizer, args.tokens, args.responses)
    tokens, ids = len(stream.input_ids), (stream.tree_ids.tolist(), stream.branch_ids.tolist())
    torch.manual_seed(0)
    q, k, v, upstream = (torch.randn(tokens, heads, width, device=device).to(dtype).float()
                         for _ in range(4))

    def inputs(name: str, dtype: torch.dtype) -> list[Tensor]:
        needs_gradient = on_gpu or name != "flex"        # FlexAttention on a CPU has no backward
        return [*(t.to(dtype, copy=True).requires_grad_(needs_gradient) for t in (q, k, v)),
                upstream.to(dtype)]

    names = [name for name in ATTENTIONS if name != "tree" or not tree_attention_problem(device)]
    prepare = {name: partial(prepare_ours, name, ids, device) for name in names}
    prepare["flex"] = partial(prepare_flex, ids, device)
    names.append("flex")
    attends = {name: prepare[name]() for name in names}
    runs = {name: partial(run, *inputs(name, dtype), attends[name]) for name in names}
    expected = run(*inputs("dense", torch.float32), attends["dense"])
    errors = {name: [relative_error(*pair) for pair in zip(runs[name](), expected, strict=False)]
              for name in names}
    check(errors)
    times, host = milliseconds(runs, args.repeats, device), milliseconds(prepare, 3, device)
    operations, moved = least_work(ids, heads, width)
    print(f"{tokens} tokens, {heads} heads of {width}, {dtype}, {device}: at least "
          f"{operations / 1e9:.1f} GFLOP and {moved / 1e9:.2f} GB a layer")
    for name in names:
        print(f"{name:7} {times[name]:8.2f} ms a layer, {host[name]:6.1f} ms to prepare a stream")
    result = {"tokens": tokens, "responses": args.responses, "heads": heads, "head_dim": width,
              "dtype": str(dtype), "errors": errors,
              "device": torch.cuda.get_device_name() if on_gpu else "cpu",
              "least_flop": operations, "least_bytes": moved, "ms_forward_backward": times,
              "ms_prepare": host} | environment()
    Path(args.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
