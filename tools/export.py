"""Merge adapters into their model: a folder that transformers, vLLM and llama.cpp read as a Llama.

    python -m tools.export --model vicuna-7b-v1.5 --adapter runs/vicuna-ulma/final --out merged

W + Σ scaling · B A is formed in float32, layer by layer, and rounded once to --dtype. Memory: one
copy of the model in --dtype and one layer in float32, so 7 B weights in bfloat16 fit 24 GiB. The
written folder is loaded again, and its logits are compared with those of the model with adapters.
Its chat template is the one that the adapters were trained on, whatever the model's folder has.
"""
if __name__ == "__main__":
    from files.interrupt import catch_interrupts
    catch_interrupts()

import argparse

from files.cli import Help, Parser, parse_first, run_cli


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=Help)
    parser.add_argument("--model", required=True, help="Hugging Face Llama folder, with tokenizer")
    parser.add_argument("--adapter", required=True, nargs="+",
                        help="PEFT folders, in the order they were trained")
    parser.add_argument("--out", required=True, help="folder to write; new or empty")
    parser.add_argument("--chat_template", help="vicuna, model or a jinja file (default: what the "
                                                "adapters were trained on)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32",
                        help="of the weights written")
    return parser


if __name__ == "__main__":
    parse_first(build_parser().parse_args)          # before torch, which takes seconds to import

import math
import os

import torch
from torch import Tensor

from files.lock import locked
from files.text import write_folder
from lora import merge_lora, start_from_adapter, updated_layers, weight_update
from model import Llama, linear, load_llama, save_llama
from tokenizer import encode_dialogue, save_tokenizer
from training.checkpoint import check_order, tokenizer_after

PROBE = [("Human", "How do I fix a flat tire?")]
# Largest difference of logits, relative to the largest logit, that another order of sums explains.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


@torch.no_grad()
def logits_of(model: Llama, input_ids: list[int]) -> Tensor:
    """The logits of one sequence: [T, V] float32, on the CPU."""
    hidden = model.eval()(torch.tensor(input_ids, device=model.lm_head.weight.device))
    return linear(hidden, model.lm_head.weight).float().cpu()


@torch.no_grad()
def rounding_loss(model: Llama) -> tuple[float, float]:
    """What merging in the weights' own dtype will do to the update U = Σ scaling · B A.

    returns  |merged - W - U| / |U| over all layers, and the share of entries with U != 0 whose
             weight will not change
    """
    squared_error = squared_size = num_unchanged = num_updated = 0.0
    for layer in updated_layers(model).values():
        weight, update = layer.weight.float(), weight_update(layer)              # [out, in]
        rounded = (weight + update).to(layer.weight.dtype).float() - weight
        squared_error += float((rounded - update).square().sum(dtype=torch.float64))
        squared_size += float(update.square().sum(dtype=torch.float64))
        num_unchanged += float(((rounded == 0) & (update != 0)).sum())
        num_updated += float((update != 0).sum())
    if not num_updated:
        return 0.0, 0.0
    return math.sqrt(squared_error / squared_size), num_unchanged / num_updated


def check_logits(written: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Raise ValueError if logits [T, V] differ by more than the order of sums explains."""
    difference, limit = (written - expected).abs().max(), TOLERANCE[dtype] * expected.abs().max()
    if not difference <= limit:
        raise ValueError(f"the logits of what was written are off by {difference:.2g} (at most "
                         f"{limit:.2g} is rounding); the export was not finished")


def export(model_path: str, adapters: list[str], out: str, dtype: torch.dtype,
           chat_template: str | None = None) -> None:
    """Write `out`: the model of `model_path` with all adapters merged, in their order.

    chat_template   see `tokenizer.Tokenizer`; None: the one that the adapters were trained on
    raises  ValueError or OSError, one sentence, for input that does not fit; `out` is then not there,
            or empty
    """
    if os.path.isfile(out) or os.path.isdir(out) and os.listdir(out):
        raise ValueError(f"{out} is there already and not empty; choose another --out")
    check_order(adapters)
    tokenizer = tokenizer_after(model_path, adapters, chat_template)
    model = load_llama(model_path, dtype)
    unused = tokenizer.unused_ids(model.config.vocab_size)
    tokenizer.print_notes()
    input_ids, _ = encode_dialogue(tokenizer, PROBE)
    base = logits_of(model, input_ids)                                           # [T, V]
    for adapter in adapters:
        start_from_adapter(model, adapter)
    adapted = logits_of(model, input_ids)
    lost, unchanged = rounding_loss(model)
    merged = logits_of(merge_lora(model), input_ids)

    def write(folder: str) -> None:
        save_llama(model, folder)
        save_tokenizer(tokenizer, folder)
        model.to("meta")                    # frees its weights: never two copies
        written = logits_of(load_llama(folder, dtype), input_ids)
        # rounded weights are another model: expect what was merged in memory, rounded as well
        check_logits(written, adapted if dtype == torch.float32 else merged, dtype)
        # if rounding removes the whole update, they differ by as much as the adapters changed
        if (written - adapted).norm() > 1.5 * (adapted - base).norm() + 1e-3 * adapted.norm():
            raise ValueError("merged logits are further from the adapters' than those of the model "
                             "without them; the export was not finished")
        print(f"largest difference of merged to adapter logits: "
              f"{(written - adapted).abs().max():.2g} (the adapters move them by "
              f"{(adapted - base).abs().max():.2g}; {len(input_ids)} tokens)")

    out = os.path.abspath(out)
    if os.path.isdir(out):
        os.rmdir(out)                       # empty; write_folder keeps a folder that exists
    write_folder(out, write)
    if dtype != torch.float32:
        print(f"rounding to {str(dtype)[6:]} took {lost:.1%} of the update's norm and left "
              f"{unchanged:.1%} of the entries it changes as they were")
    if unused:
        print(f"note: {len(unused)} rows of the embedding have no piece in {tokenizer.file}; "
              "llama.cpp wants them named in added_tokens.json")
    print(f"chat template: {tokenizer.chat_template}; answers end in {list(tokenizer.eos_ids)}")
    print(f"done: {out}")


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    with locked(os.path.abspath(args.out) + ".lock", args.out):
        export(args.model, args.adapter, args.out, getattr(torch, args.dtype), args.chat_template)


if __name__ == "__main__":
    run_cli(main)
