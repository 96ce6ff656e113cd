"""Attention over shared prompts: dense blocks, varlen segments, FlexAttention. Right, then fast.

    python bench/attention.py --dataset test.jsonl.gz --tokenizer tokenizer.model

On a GPU one layer's attention at 7B's shape (32 heads of 128, bf16) over --tokens of HH pairs and
one prompt with 12 responses, forward and backward. First every way's output and gradients against
dense float32: an error above twice that of dense bf16 ends the script. Then milliseconds, medians
of interleaved runs, and what the host takes to prepare a stream. On a CPU, a dry run at a small
size: dense, and FlexAttention's forward.
"""
import argparse
import json
import statistics
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from breakdown import ROOT, hh_trees, synchronize, where_and_how

from attention import ATTENTIONS, attention, attention_segments
from trees import build_stream, pack


def run(how: str, q, k, v, upstream, segments) -> list:
    """[output, dq, dk, dv]; without gradients (FlexAttention on a CPU) the output alone."""
    output = attention(q, k, v, segments)
    return [output, *(torch.autograd.grad(output, (q, k, v), upstream) if q.requires_grad else ())]


def relative_error(found, expected) -> float:
    return float((found.detach().float() - expected.detach()).norm() / expected.detach().norm())


def milliseconds(steps: dict, repeats: int, device: str) -> dict:
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
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", default=str(ROOT / "bench/results/attention.json"))
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    heads, width, dtype = (32, 128, torch.bfloat16) if device == "cuda" else (4, 16, torch.float32)
    trees = hh_trees(args.dataset, args.tokenizer, args.tokens // 128)
    said = [ids for tree in trees for ids in tree.response_ids][:12]     # as D2O's with K = 11
    trees[0] = replace(trees[0], response_ids=said, scores=[0.0] * len(said), pairs=[])
    stream = build_stream(pack(trees, args.tokens)[0])
    ids = stream.tree_ids.tolist(), stream.branch_ids.tolist()
    torch.manual_seed(0)
    wide = [torch.randn(len(ids[0]), heads, width, device=device).to(dtype).float()
            for _ in range(4)]
    prepare = {how: partial(attention_segments, *ids, device, how) for how in ATTENTIONS
               if device == "cuda" or how != "varlen"}
    segments = {how: make() for how, make in prepare.items()}

    def inputs(how, dtype):
        leaf = device == "cuda" or how == "dense"                    # FlexAttention on a CPU
        return [*(t.detach().to(dtype).requires_grad_(leaf) for t in wide[:3]), wide[3].to(dtype)]

    truth = run("dense", *inputs("dense", torch.float32), segments["dense"])
    narrow = {how: inputs(how, dtype) for how in segments}
    errors = {how: [relative_error(*pair) for pair in
                    zip(run(how, *narrow[how], segments[how]), truth)] for how in segments}
    for how, found in errors.items():
        print(f"{how:7} error of output, dq, dk, dv: {', '.join(f'{e:.1e}' for e in found)}")
        if any(e > 2 * dense + 1e-6 for e, dense in zip(found, errors["dense"])):
            raise SystemExit(f"bench/attention.py: {how} is wrong; times mean nothing")
    times = milliseconds({how: partial(run, how, *narrow[how], segments[how]) for how in segments},
                         args.repeats, device)
    host = milliseconds(prepare, 3, device)
    print(f"{len(ids[0])} tokens, {heads} heads of {width}, {dtype}, {device}")
    for how in segments:
        print(f"{how:7} {times[how]:8.2f} ms a layer, {host[how]:6.1f} ms to prepare a stream")
    result = {"tokens": len(ids[0]), "heads": heads, "head_dim": width, "dtype": str(dtype),
              "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
              "errors": errors, "ms_forward_backward": times, "ms_prepare": host}
    Path(args.out).write_text(json.dumps(result | where_and_how(), indent=1) + "\n")


if __name__ == "__main__":
    main()
