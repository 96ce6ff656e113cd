"""This project's steps for bench/step.py: DPO, ULMA and D2O on the pairs that TRL gets.

    ours-dpo           DPO
    ours-ulma          ULMA on the same responses (no reference for the good ones)
    ours-d2o           D2O: a bad response and K = 11 anchors share their prompt in one tree
    ours-d2o-unshared  the very same step with a copy of the prompt for each of the 12
    …-varlen, -flex    the same with that attention, see attention.py; on a GPU only
    …-compiled         the same with compiled layers

All run their reference in the step, as the first epoch does.
"""
import json
from collections.abc import Callable
from pathlib import Path

from task import BETA, DTYPES, LEARNING_RATE, MAX_GRAD_NORM

# name: arguments of backward_batch beside those below. The second word is the method.
OURS = {"ours-dpo": {}, "ours-dpo-compiled": {}, "ours-dpo-varlen": {"attention": "varlen"},
        "ours-dpo-flex": {"attention": "flex"},
        "ours-dpo-varlen-compiled": {"attention": "varlen"}, "ours-ulma": {},
        "ours-ulma-varlen-compiled": {"attention": "varlen"}, "ours-d2o": {},
        "ours-d2o-unshared": {}}


def trees_of(folder: Path, method: str) -> list:
    """The trees of one step, from pairs.json or, for D2O, prompts.json."""
    from anchors import add_anchors
    from trees import Tree

    if method == "d2o":
        return [add_anchors(Tree(tree["prompt"], [tree["negative"]], [0.0], []), tree["anchors"])
                for tree in json.loads((folder / "prompts.json").read_text())]
    return [Tree(pair["prompt"], [pair["chosen"], pair["rejected"]], [1.0, 0.0], [(0, 1)])
            for pair in json.loads((folder / "pairs.json").read_text())]


def copy_prompts(trees: list) -> list:
    """The same trees, laid out with a prompt per response from here on.

    `pack` and `build_stream` of the project's step.py are told so: a tree counts the tokens it
    then has, and a stream of it is that of as many trees of one response; which responses make
    a pair stays as it was. Losses therefore see the same log-probs in the same order.
    """
    from dataclasses import fields, replace

    import step
    from trees import Tree, build_stream

    class Unshared(Tree):
        @property
        def num_tokens(self) -> int:
            return sum(len(self.prompt_ids) + len(ids) - 1 for ids in self.response_ids)

    def unshared_stream(trees, *others):
        singles = [Tree(tree.prompt_ids, [ids], [score], []) for tree in trees
                   for ids, score in zip(tree.response_ids, tree.scores)]
        stream, pairs, first = build_stream(singles, *others), [], 0
        for tree in trees:
            pairs += [(first + chosen, first + rejected) for chosen, rejected in tree.pairs]
            first += len(tree.scores)
        return replace(stream, pairs=stream.pairs.new_tensor(pairs).view(-1, 2))

    step.build_stream = unshared_stream
    return [Unshared(*(getattr(tree, field.name) for field in fields(tree))) for tree in trees]


def ours_step(folder: Path, name: str, size: str, precision: str, device: str,
              micro_tokens: int) -> tuple[Callable[[], float], dict]:
    """This project's training step.

    folder        holds pairs.json and prompts.json
    name          a row of OURS
    precision     of the frozen weights; adapters stay float32, as PEFT keeps them
    micro_tokens  train.py --micro_tokens
    returns       a function that takes one step and gives the loss it started from: mean over
                  pairs for DPO, over responses for ULMA, over prompts for D2O; and what the
                  result should say about it. The step ends with clipping to MAX_GRAD_NORM and
                  AdamW(lr=LEARNING_RATE, weight_decay=0), as TRL's does.
    """
    from dataclasses import replace
    from functools import partial

    import torch
    from breakdown import make_model, necessary_flops
    from kernels import choose_linear_logps
    from model import compile_layers
    from step import METHODS, adapters_off, backward_batch, batch_counts

    method_name = name.split("-")[1]
    method, trees = METHODS[method_name], trees_of(folder, method_name)
    if method_name == "d2o":
        method = replace(method, loss=partial(method.loss, alpha=BETA))
    model = make_model(size, getattr(torch, DTYPES[precision]), device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    said = {"necessary_flops": necessary_flops(model, method_name, trees),
            "micro_tokens": micro_tokens, "kernels": choose_linear_logps("auto", device).__name__}
    if name.endswith("-compiled"):
        compile_layers(model)
    if name.endswith("-unshared"):
        trees = copy_prompts(trees)

    def step() -> float:
        loss, *_ = backward_batch(
            model, partial(adapters_off, model), method, trees, batch_counts(trees), beta=BETA,
            log_z=0.0, mean_logps=False, reduction="mean", micro_tokens=micro_tokens,
            device=device, **OURS[name])
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss)
    return step, said
