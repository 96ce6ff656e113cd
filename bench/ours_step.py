"""This project's steps for bench/step.py: DPO, ULMA and D2O on the pairs that TRL gets.

    ours-dpo           DPO
    ours-ulma          ULMA on the same responses (no reference for the good ones)
    ours-d2o           D2O: a bad response and K = 11 anchors share their prompt in one tree
    ours-d2o-unshared  the very same step with a copy of the prompt for each of the 12

All run their reference in the step, as the first epoch does. Imports torch and the project, so only
workers import this file.
"""
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from breakdown import make_model, necessary_flops
from task import BETA, DTYPES, LEARNING_RATE, MAX_GRAD_NORM

from d2o import add_anchors
from kernels import choose_linear_logps
from kernels.attention import choose_attention, to_device
from lora import lora_disabled
from packing import Stream, Tree, build_stream, group_by_size
from step import METHODS, Compute, Objective, batch_counts, micro_batches
from train import accumulate_gradient


def read_trees(folder: Path, method: str) -> list[Tree]:
    """The trees of one step, from pairs.json or, for D2O, prompts.json."""
    if method == "d2o":
        return [add_anchors(Tree(tree["prompt"], [tree["negative"]], [0.0], []), tree["anchors"])
                for tree in json.loads((folder / "prompts.json").read_text())]
    return [Tree(pair["prompt"], [pair["chosen"], pair["rejected"]], [1.0, 0.0], [(0, 1)])
            for pair in json.loads((folder / "pairs.json").read_text())]


def unshared_tokens(tree: Tree) -> int:
    """Tokens of a tree whose every response has a prompt of its own."""
    return sum(len(tree.prompt_ids) + len(ids) - 1 for ids in tree.response_ids)


def unshared_batches(trees: list[Tree], compute: Compute) -> Iterator[tuple[Stream, Stream]]:
    """As step.micro_batches of an objective with reference "all", but every response has its own
    copy of the prompt.

    The responses keep their order and their pairs, so losses are those of the shared prompts.
    """
    for group in group_by_size(trees, unshared_tokens, compute.micro_tokens):
        single_trees, pairs = [], []
        for tree in group:
            first = len(single_trees)
            pairs += [(first + chosen, first + rejected) for chosen, rejected in tree.pairs]
            single_trees += [Tree(tree.prompt_ids, [ids], [score], [])
                             for ids, score in zip(tree.response_ids, tree.scores, strict=True)]
        stream = build_stream(single_trees, compute.device, None, compute.attention)
        stream = replace(stream, pairs=to_device(torch.tensor(pairs), compute.device))   # [P, 2]
        yield stream, stream


def ours_step(folder: Path, name: str, size: str, precision: str, device: str,
              micro_tokens: int) -> tuple[Callable[[], float], dict]:
    """This project's training step.

    folder        holds pairs.json and prompts.json
    name          a row of OURS
    precision     of the frozen weights; adapters stay float32, as with PEFT
    micro_tokens  train.py --micro_tokens
    returns       a function that takes one step and gives the loss it started from: mean over
                  pairs for DPO, over responses for ULMA, over prompts for D2O; and notes for the
                  result. The step ends with clipping to MAX_GRAD_NORM and
                  AdamW(lr=LEARNING_RATE, weight_decay=0), as TRL's does.
    """
    method = name.split("-")[1]
    trees = read_trees(folder, method)
    counts = batch_counts(trees)
    model = make_model(size, getattr(torch, DTYPES[precision]), device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    objective = Objective(METHODS[method], beta=BETA, alpha=BETA)
    compute = Compute(device, micro_tokens, choose_linear_logps("auto", device),
                      choose_attention("auto", device))
    notes = {"necessary_flops": necessary_flops(model, method, trees),
             "micro_tokens": micro_tokens, "kernels": compute.linear_logps.__name__,
             "attention": compute.attention}

    def step() -> float:
        streams = (unshared_batches(trees, compute) if name.endswith("-unshared") else
                   micro_batches(trees, objective.method, compute))
        totals = accumulate_gradient(model, partial(lora_disabled, model), streams, counts,
                                     objective, compute)
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(totals[0])
    return step, notes
