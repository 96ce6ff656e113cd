"""Batched sampling with a KV cache, and three commands that use it.

    python generate.py --model DIR --adapter runs/ulma/final             chat; Ctrl-D ends it
    python generate.py --model DIR --prompt "How do I fix a lamp?"       one answer
    python generate.py --model DIR --dataset FILE --out answers.jsonl    one answer per record

--reference turns the last adapter off. A killed --dataset run continues when it is started again.

Distinct prompts go through the model once, packed without padding; then all rows decode together,
one token each, and a row that ends leaves the batch. A row depends on its prompt and its seed
alone: other rows change its logits by float rounding at most.
"""
if __name__ == "__main__":
    from files.interrupt import catch_interrupts
    catch_interrupts()

import argparse

from files.cli import (SEEDS, Help, Parser, check_ranges, parse_first, run_cli, time_left,
                       visible)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=Help)
    flag = parser.add_argument
    flag("--model", required=True, help="Hugging Face folder of a Llama, with its tokenizer")
    flag("--adapter", nargs="+", help="PEFT folders in training order, as RUN/final of train.py")
    flag("--reference", action="store_true", help="turn the last adapter off")
    flag("--chat_template", help="as in train.py (default: that of the run which made the model)")
    flag("--bf16", action="store_true", help="load weights in bf16, not float32")
    flag("--prompt", help="answer this one question and exit")
    flag("--dataset", help="answer every record's prompt of this file (see data.py)")
    flag("--out", help="file of JSON lines for --dataset")
    flag("--overwrite", action="store_true", help="replace --out")
    flag("--batch_size", type=int, default=16, help="prompts at a time with --dataset")
    flag("--max_new_tokens", type=int, default=512, help="longest answer, in tokens")
    flag("--temperature", type=float, help="divides the logits; 0: greedy (default: 0 with "
         "--prompt, else 0.7)")
    flag("--top_p", type=float, default=1.0, help="sample from the smallest set of this mass")
    flag("--seed", type=int, default=0, help="of the sampling; every row's seed is drawn from it")
    args = parser.parse_args(argv)
    if args.temperature is None:
        args.temperature = 0.7 if args.prompt is None else 0.0
    if args.reference and not args.adapter:
        raise ValueError("--reference turns off an --adapter, and none was given")
    if (args.dataset is None) != (args.out is None) or (args.dataset and args.prompt is not None):
        raise ValueError("--dataset and --out go together, and without --prompt")
    if args.prompt is not None and not args.prompt.strip():
        raise ValueError("--prompt is empty")
    check_ranges(args, ("batch_size",), {"seed": SEEDS})
    return args


if __name__ == "__main__":
    parse_first(parse_args)          # before torch, which takes seconds to import

import json
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from data import ROLES, Record, Tokenizer, encode_prompt, read_prompts
from files.text import append_text
from kernels.attention import attention_segments, exact_backends
from lora import load_adapter, lora_disabled, start_from_adapter
from model import Cache, Llama, LlamaConfig, linear, load_llama
from packing import Tree, group_by_size, truncate
from step import Compute, attention_for
from training import start_check
from training.checkpoint import check_order, tokenizer_after
from training.output import file_flags, own_file, rows_done

PREFILL_TOKENS = 8192      # prompts go through the model in streams of up to this size
HEAD_ROWS = 2000           # rows of the head per product: a CPU takes a fifth longer for 32,000
Seeds = list[int] | int | torch.Generator | None      # see row_seeds

# ---- prompts ------------------------------------------------------------------------------------

def prefill(model: Llama, prompts: list[list[int]], max_new_tokens: int) -> tuple[Cache, Tensor]:
    """Run every distinct prompt once: the cache of all rows, hidden [B, D] of their last tokens."""
    rows_of, weight = {}, model.lm_head.weight
    for row, ids in enumerate(prompts):
        rows_of.setdefault(tuple(ids), []).append(row)
    cache = Cache(model, [len(ids) for ids in prompts], max_new_tokens)
    last = weight.new_empty(len(prompts), weight.shape[1])                       # [B, D]
    for group in group_by_size(rows_of, len, PREFILL_TOKENS):
        input_ids, position_ids, tree_ids, places, ends = [], [], [], [], []
        for number, ids in enumerate(group):
            positions = range(len(input_ids), len(input_ids) + len(ids))
            input_ids += ids
            position_ids += range(len(ids))
            tree_ids += [number] * len(ids)
            for row in rows_of[ids]:
                places += [(row, cache.starts[row] + i, p) for i, p in enumerate(positions)]
                ends.append((row, positions[-1]))
        segments = attention_segments(tree_ids, [0] * len(tree_ids), weight.device,
                                      attention_for(model))
        input_ids, position_ids, places, ends = (
            torch.tensor(t, device=weight.device) for t in (input_ids, position_ids, places, ends))
        hidden = model(input_ids, position_ids, segments,
                       [partial(cache.fill, layer, places.T) for layer in range(len(cache.keys))])
        last[ends[:, 0]] = hidden[ends[:, 1]]
    return cache, last


# ---- sampling -----------------------------------------------------------------------------------

@dataclass(frozen=True)
class Sampling:
    """How to sample, as `generate` takes it: generate(model, prompts, **vars(sampling))."""
    max_new_tokens: int          # a row ends here, or after EOS
    temperature: float = 1.0     # divides the logits; 0 is greedy
    top_p: float = 1.0           # in (0, 1]: sample from the smallest set with this mass
    eos_id: int | Collection[int] | None = ...   # ends a row; left out: the model's; None: nothing
    unused_ids: Sequence[int] = ()               # never sampled: Tokenizer.unused_ids

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; expected at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; expected >= 0 (0 is greedy)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; expected a number in (0, 1]")

    def ends(self, config: LlamaConfig) -> frozenset[int]:
        """All ids that end a row."""
        ids = config.eos_token_id if self.eos_id is ... else self.eos_id
        return frozenset(() if ids is None else [ids] if isinstance(ids, int) else ids)


def nucleus(probs: Tensor, top_p: float) -> Tensor:
    """probs, 0 outside the smallest set of tokens whose mass is >= top_p: [B, V] -> [B, V].

    Of equally probable tokens those with lower ids come first.
    Source: arXiv:1904.09751, section 3.1.
    """
    size = probs.shape[-1]
    if probs.device.type == "cpu":
        # all tokens below (1 - p) / V have a mass of less than 1 - p together: sort only the others
        size = int((probs >= 0.5 * (1 - top_p) / size).sum(-1).max())
    largest = probs.topk(size).values                                            # [B, size]
    mass = largest.cumsum(-1, dtype=torch.float64)
    last = (mass < top_p).sum(-1, keepdim=True).clamp(max=size - 1)              # [B, 1]
    border = largest.gather(-1, last)
    num_ties = last + 1 - (largest > border).sum(-1, keepdim=True)               # [B, 1]
    tied = probs == border
    return probs * ((probs > border) | (tied & (tied.cumsum(-1) <= num_ties)))


def sample(logits: Tensor, noise: Tensor, temperature: float, top_p: float) -> Tensor:
    """One token id per row: the first whose cumulative probability exceeds the noise.

    logits    [B, V]
    noise     [B] float64   uniform in [0, 1)
    others    see `Sampling`
    returns   [B] int64
    """
    if temperature < 1e-6:                   # also where the quotient would overflow
        return logits.argmax(-1)
    wide = torch.promote_types(logits.dtype, torch.float32)
    probs = (logits.to(wide) / temperature).softmax(-1)
    if top_p < 1:
        probs = nucleus(probs, top_p)
    cumulative = probs.cumsum(-1, dtype=torch.float64)                           # [B, V]
    # right=True: strictly above the noise, so never a token of probability 0
    return torch.searchsorted(cumulative, noise[:, None] * cumulative[:, -1:], right=True)[:, 0]


def row_seeds(generator: Seeds, count: int) -> list[int]:
    """One seed per row; with a larger count, the seeds of a smaller one come first.

    generator   a list: the seeds themselves; an int: the seeds are drawn from this one; a
                torch.Generator (CPU) or None (torch's own): drawn from it, which advances it
    """
    if isinstance(generator, list):
        if len(generator) != count:
            raise ValueError(f"{len(generator)} seeds for {count} prompts; expected one for each")
        return generator
    if isinstance(generator, int):
        generator = torch.Generator().manual_seed(generator)
    return torch.randint(2 ** 32, (count,), generator=generator).tolist()


def check_prompts(config: LlamaConfig, prompts: list[list[int]], max_new_tokens: int) -> None:
    """Raise ValueError for a prompt that is empty, too long, or has ids outside the vocabulary."""
    largest, positions = config.vocab_size - 1, config.max_positions
    for number, ids in enumerate(prompts):
        if not ids:
            raise ValueError(f"prompt {number} is empty; expected at least one token, BOS")
        if min(ids) < 0 or max(ids) > largest:
            raise ValueError(f"prompt {number} has token ids {min(ids)}..{max(ids)}; expected "
                             f"0..{largest}")
        if len(ids) + max_new_tokens > positions:
            raise ValueError(f"prompt {number} has {len(ids)} tokens and asks for {max_new_tokens}"
                             f"; the model has {positions} positions")


def cache_slots(model: Llama, most: int) -> int:
    """How many tokens, prompts and answers of all rows together, to sample at a time: `most`, on a
    GPU no more than fill half of what the weights leave with keys and values."""
    config, weight = model.config, model.lm_head.weight
    if not weight.is_cuda:
        return most
    slot = (2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
            * weight.element_size())                                             # bytes
    memory = torch.cuda.get_device_properties(weight.device).total_memory
    return max(1, min(most, (memory - sum(p.nbytes for p in model.parameters())) // 2 // slot))


def next_logits(model: Llama, hidden: Tensor) -> Tensor:
    """Hidden states [B, D] -> logits [B, V]."""
    blocks = model.lm_head.weight.split(HEAD_ROWS if hidden.device.type == "cpu" else 2 ** 31)
    return torch.cat([linear(hidden, rows) for rows in blocks], -1)


@torch.inference_mode()
def generate_tokens(model: Llama, prompts: list[list[int]], sampling: Sampling,
                    generator: Seeds = None) -> Iterator[list[tuple[int, int]]]:
    """`generate`, one token at a time: yields [(row, token id)] of the rows that have not ended."""
    max_new_tokens = sampling.max_new_tokens
    check_prompts(model.config, prompts, max_new_tokens)
    seeds, rows = row_seeds(generator, len(prompts)), list(range(len(prompts)))
    if not rows:
        return
    device, was_training = model.lm_head.weight.device, model.training
    ends, unused = sampling.ends(model.config), torch.tensor(sampling.unused_ids, device=device)
    noise = torch.stack([
        torch.rand(max_new_tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(s))
        for s in seeds]).to(device)                                              # [B, new]
    position_ids = torch.tensor([len(ids) for ids in prompts], device=device)    # [B]
    model.eval()                                   # dropout would make a row depend on its batch
    try:
        cache, hidden = prefill(model, prompts, max_new_tokens)
        attend = [partial(cache.extend, layer) for layer in range(len(cache.keys))]
        for step in range(max_new_tokens):
            logits = next_logits(model, hidden)                                  # [B, V]
            if len(unused):
                logits[:, unused] = -torch.inf
            input_ids = sample(logits, noise[:, step], sampling.temperature, sampling.top_p)
            ids = input_ids.tolist()               # the only wait for the device in a step
            if max(ids) >= model.config.vocab_size:          # where a cumulative sum is NaN
                raise FloatingPointError(f"token {step + 1} has logits that are not finite")
            yield list(zip(rows, ids))
            alive = [place for place, token in enumerate(ids) if token not in ends]
            if not alive or step + 1 == max_new_tokens:
                return
            if len(alive) < len(rows):
                order = cache.compact(alive)
                rows, order = [rows[place] for place in order], torch.tensor(order, device=device)
                input_ids, position_ids, noise = input_ids[order], position_ids[order], noise[order]
            with exact_backends(device.type):
                hidden = model(input_ids, position_ids, None, attend)            # [B, D]
            cache.end += 1
            position_ids = position_ids + 1
    finally:
        model.train(was_training)


def generate(model: Llama, prompts: list[list[int]], max_new_tokens: int, temperature: float = 1.0,
             top_p: float = 1.0, eos_id: int | Collection[int] | None = ...,
             generator: Seeds = None, unused_ids: Sequence[int] = ()) -> list[list[int]]:
    """Sample one continuation of every prompt.

    prompts          [[int]]   token ids, BOS first; K equal prompts cost one prefill
    max_new_tokens, temperature, top_p, eos_id, unused_ids   see `Sampling`
    generator        see `row_seeds`: the noise of row i depends on (generator, i) alone, so a list
                     of seeds gives the same text however the prompts are cut into batches
    returns          [[int]]   new tokens only; EOS is the last one where it was sampled
    raises           ValueError for settings out of range, and see `check_prompts`
    Adapters are used if they are on (`lora.lora_disabled`: the reference); dropout is off.
    """
    rows = [[] for _ in prompts]
    sampling = Sampling(max_new_tokens, temperature, top_p, eos_id, unused_ids)
    for tokens in generate_tokens(model, prompts, sampling, generator):
        for row, token in tokens:
            rows[row].append(token)
    return rows


# ---- commands -----------------------------------------------------------------------------------

def prompt_ids_of(model: Llama, tokenizer: Tokenizer, turns: Sequence[tuple[str, str]],
                  max_new_tokens: int) -> list[int]:
    """Ids of a dialogue that an answer is to follow, cut from the left where the model has no room."""
    positions = model.config.max_positions
    if (room := positions - max_new_tokens) < 2:
        raise ValueError(f"--max_new_tokens {max_new_tokens} leaves no room for a prompt in "
                         f"{positions} positions")
    return truncate(encode_prompt(tokenizer, turns), [], room, room)[0]


def print_answer(tokenizer: Tokenizer, tokens: Iterable[list[tuple[int, int]]]) -> str:
    """Print an answer while `generate_tokens` gives its tokens; returns its text. Ctrl-C stops it.

    All ids are decoded each time: spaces, and characters made of several byte pieces, depend on
    their neighbours. An unfinished character (U+FFFD at the end) is printed when it is complete.
    """
    ids, printed = [], ""
    try:
        for ((_, token),) in tokens:
            ids.append(token)
            before, printed = printed, tokenizer.decode(ids).rstrip("\ufffd")
            print(visible(printed[len(before):], "\n\t"), end="", flush=True)
    except KeyboardInterrupt:
        pass
    text = tokenizer.decode(ids)
    print(visible(text[len(printed):], "\n\t"), flush=True)
    return text


def chat(answer: Callable[[list[tuple[str, str]]], str]) -> None:
    """Read questions until stdin ends; answer(turns) prints and returns the next answer's text."""
    turns = []
    while True:
        try:
            question = input("USER: ").strip()
        except (EOFError, KeyboardInterrupt):
            return print()
        if question:
            print("ASSISTANT: ", end="", flush=True)
            text = answer([*turns, ("Human", question)]).strip()
            if text:
                turns += [("Human", question), ("Assistant", text)]


def answer_file(model: Llama, tokenizer: Tokenizer, records: list[Record], out: str, done: int,
                batch_size: int, seed: int, sampling: Sampling) -> None:
    """Append a row for each record from number `done` on: prompt, completion, seed."""
    seeds, names = row_seeds(seed, len(records)), {name: role for role, name in ROLES.items()}
    start, num_tokens = time.perf_counter(), 0
    for first in range(done, len(records), batch_size):
        batch = slice(first, min(first + batch_size, len(records)))
        prompts = [prompt_ids_of(model, tokenizer, record.prompt, sampling.max_new_tokens)
                   for record in records[batch]]
        answers = generate(model, prompts, **vars(sampling), generator=seeds[batch])
        append_text(out, "".join(json.dumps({
            "prompt": [{"role": names[name], "content": text} for name, text in record.prompt],
            "completion": tokenizer.decode(ids).strip(), "seed": row_seed, "tokens": len(ids),
            "ended": ids[-1] in tokenizer.eos_ids}) + "\n"
            for record, ids, row_seed in zip(records[batch], answers, seeds[batch], strict=True)))
        num_tokens, seconds = num_tokens + sum(map(len, answers)), time.perf_counter() - start
        print(f"{batch.stop}/{len(records)} answers  {num_tokens / seconds:.0f} tokens/s  "
              f"{time_left(seconds, batch.stop - done, len(records) - done)}",
              file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    check_order(args.adapter or [])
    if args.dataset is not None:
        rows_done(args, file_flags(args))        # --out is this command's, before data are read
        records = read_prompts(args.dataset)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = tokenizer_after(args.model, args.adapter or [], args.chat_template)
    tokenizer.print_notes()
    model = load_llama(args.model, torch.bfloat16 if args.bf16 else torch.float32, device)
    for before in (args.adapter or [])[:-1]:
        start_from_adapter(model, before)
    if args.adapter:
        load_adapter(model, args.adapter[-1])
    if device in start_check.CHECKED_DEVICES:
        ids = prompt_ids_of(model, tokenizer, [("Human", __doc__)], args.max_new_tokens)
        start_check.check_start(model, [Tree(ids, [ids[1:]], [1.0], [])],
                                Compute(device, attention=attention_for(model)))
    sampling = Sampling(args.max_new_tokens, args.temperature, args.top_p, tokenizer.eos_ids,
                        tokenizer.unused_ids(model.config.vocab_size))
    generator = torch.Generator().manual_seed(args.seed)

    def answer(turns: list[tuple[str, str]]) -> str:
        ids = prompt_ids_of(model, tokenizer, turns, args.max_new_tokens)
        return print_answer(tokenizer, generate_tokens(model, [ids], sampling, generator))

    with lora_disabled(model) if args.reference else nullcontext():
        if args.prompt is not None:
            answer([("Human", args.prompt)])
        elif args.dataset is None:
            chat(answer)
        else:
            with own_file(args, len(records)) as done:
                answer_file(model, tokenizer, records, args.out, done, args.batch_size, args.seed,
                            sampling)


if __name__ == "__main__":
    run_cli(main)
