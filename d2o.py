"""D2O's anchors: K samples of the model itself for every prompt with a bad human answer.

    python train.py --method d2o                                       on the embedded world
    python train.py --method d2o --num_anchors 4 --refresh_anchors 50  anchors of a lagged policy
    python train.py --method d2o --anchors FILE ...                    made elsewhere, docs/usage.md

A tree of D2O is [negative, anchor 1 .. K]: 1 + K responses share one prompt. Anchors are samples of
the policy as it was at step 0, which is the base model; with --refresh_anchors n, of the policy at
step 0, n, 2n, ..., for the n steps that follow. Their log-probs under the frozen reference are
computed then. Both are written to OUT/anchors-STEP.jsonl, anchors as the ids that were sampled,
never as text that would be tokenized anew; a training step runs no reference.

Anchors of the policy of the very same step (--refresh_anchors 1) carry no signal: over y ~ π the
mean of grad log π(y) is 0, so that all they add is noise. They must come from another policy.

New anchors have a drawback: they are not samples of π_r, so once the policy has moved log π/π_r
is large on them, and the loss is small although nothing was learned from them.

With --anchor_instructions an anchor is sampled under a system sentence, drawn by its seed, which
the trained tree does not hold: the paper's way to diverse, harmless anchors.

An anchor that reached --anchor_tokens before EOS stays as it is, without EOS, as a cut response
does: running out of room is not the end of an answer.
"""
import argparse
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

from data import Tokenizer, encode_dialogue, encode_prompt, read_dataset, read_turns
from files.rows import TEXT, get_texts, get_value
from files.rows import read_rows as read_data
from files.text import stripped_lines
from generate import Sampling, cache_slots, generate, row_seeds
from model import Llama
from packing import Tree, derived_seed, truncate
from step import Compute, Reference, tree_logps
from training.ranks import Ranks
from training.reference_cache import read_rows, write_rows

CACHE_TOKENS = 8      # KV-cache tokens per --micro_tokens: one of a backward pass takes about 6
TEMPERATURE, TOP_P = 0.8, 0.9      # of the samples; for others see --anchors


@dataclass(frozen=True)
class AnchorSource:
    """All that D2O's anchors depend on."""
    output_dir: str
    model: Llama                    # the policy, which they are sampled from
    reference: Reference            # the paper's π_r+ and π_r-, which are one in its experiments
    trees: list[Tree]               # one negative each, see `one_negative_per_tree`
    batches: list[list[int]]        # tree numbers of every step of the run
    refresh: int                    # steps between new anchors; 0: none
    num_anchors: int                # K
    sampling: Sampling
    seed: int
    mean_logps: bool                # length averages, see step.Objective
    compute: Compute
    ranks: Ranks
    given: Callable[[int, list[int]], "GivenAnchors"] | None = None      # see `read_given_anchors`
    instruct: Callable[[list[int], int], list[int]] | None = None    # see `Instructions.prompt`


# ---- trees --------------------------------------------------------------------------------------

def add_anchors(tree: Tree, anchor_ids: list[list[int]],
                reference_logps: list[float] | None = None) -> Tree:
    """[negative] -> [negative, anchor 1 .. K]: K pairs; an anchor counts as z = 1 in metrics."""
    return replace(tree, response_ids=tree.response_ids + anchor_ids,
                   scores=tree.scores + [1.0] * len(anchor_ids),
                   pairs=[(k + 1, 0) for k in range(len(anchor_ids))],
                   reference_logps=reference_logps)


def anchor_seeds(seed: int, step: int, number: int, num_anchors: int) -> list[int]:
    """Seeds of the anchors of a tree: a function of (seed, step, number) only."""
    return row_seeds(derived_seed(seed, step, number) % 2 ** 63, num_anchors)


def sampling_batches(trees: list[Tree], numbers: list[int], num_anchors: int,
                     max_new_tokens: int, cache_tokens: int) -> list[list[int]]:
    """Tree numbers of every batch: prompts of similar length together, within the cache's room."""
    batches = []
    for number in sorted(numbers, key=lambda n: (len(trees[n].prompt_ids), trees[n].prompt_ids)):
        size = num_anchors * (len(trees[number].prompt_ids) + max_new_tokens)    # longest so far
        if not batches or (len(batches[-1]) + 1) * size > cache_tokens:
            batches.append([])
        batches[-1].append(number)
    return batches


# ---- files --------------------------------------------------------------------------------------

def read_anchors(file: str, step: int, trees: list[Tree], numbers: list[int]) -> dict[int, Tree]:
    """Tree number -> tree with anchors and reference_logps, for these numbers.

    step    whose policy they are samples of
    raises  ValueError for a damaged line, and for a file that holds other trees than these
    """
    remedy = (f"remove it and all checkpoints after step {step}, and the same command samples them "
              "again")
    found = {}
    for line_number, row in enumerate(read_rows(file, remedy), 1):
        try:
            found[row["tree"]] = add_anchors(trees[row["tree"]], row["anchor_ids"],
                                             row["reference_logps"])
        except (KeyError, TypeError, IndexError):
            raise ValueError(f"{file}:{line_number}: not anchors of this data; {remedy}") from None
    if found.keys() != set(numbers):
        raise ValueError(f"{file} has anchors for {len(found)} trees, not for the {len(numbers)} "
                         f"of these steps, and the policy they were sampled from is gone; {remedy}")
    return found


# ---- anchors made elsewhere ---------------------------------------------------------------------

GivenAnchors = tuple[dict[int, list[list[int]]], str]     # (tree number -> anchors, what was odd)


def read_completions(row: dict, where: str) -> list[tuple[str, bool]]:
    """(text, whether it ended by itself) of every completion of a row.

    {"completion", "ended"?} of generate.py, {"completions"}, or {"choices"} as an OpenAI-compatible
    server answers, whose finish_reason is "stop" where a text ended.
    """
    if "completion" in row:
        return [(get_value(row, "completion", str, where), row.get("ended", True) is True)]
    if "completions" in row:
        return [(text, True) for text in get_texts(row, "completions", where)]
    found = []
    for choice in get_value(row, "choices", list, where):
        message = choice.get("message", choice) if isinstance(choice, dict) else {}
        text = message.get("content", message.get("text")) if isinstance(message, dict) else None
        if not isinstance(text, str):
            raise ValueError(f"{where}: {str(choice)[:60]!r} is no choice with a text")
        found.append((text, choice.get("finish_reason", "stop") == "stop"))
    return found


def read_given_anchors(args: argparse.Namespace, trees: list[Tree], tokenizer: Tokenizer, step: int,
                       numbers: list[int]) -> GivenAnchors:
    """The anchors in the file --anchors of a step, for the trees of these numbers.

    A row's prompt is compared as token ids, cut as the data's are. The k-th of these trees with one
    prompt takes its k-th --num_anchors completions.
    raises   FileNotFoundError, or ValueError where a tree lacks some: none is sampled here
    """
    file, count = args.anchors.replace("STEP", str(step)), args.num_anchors
    if not os.path.isfile(file):
        raise FileNotFoundError(f"{file}: no such file: serve {args.output_dir}/checkpoint-{step}, "
                                "write its samples there, and the same command continues")
    wanted = {tuple(trees[number].prompt_ids): [] for number in numbers}
    notes, anchors = Counter(), {}
    for where, row in read_data(file):
        turns = read_turns(get_value(row, "prompt", TEXT, where), where)
        prompt_ids, _ = truncate(encode_prompt(tokenizer, turns), [], args.max_length,
                                 args.max_prompt_length)
        found, completions = wanted.get(tuple(prompt_ids)), read_completions(row, where)
        notes["of other prompts"] += len(completions) if found is None else 0
        for text, ended in completions if found is not None else ():
            _, ids = encode_dialogue(tokenizer, [("Assistant", text.strip())])
            ids = ids[:len(ids) if ended else -1][:args.anchor_tokens]
            notes["empty and cut"] += not ids
            found += [ids] if ids else []
    for number in numbers:
        found = wanted[tuple(trees[number].prompt_ids)]
        anchors[number], found[:count] = found[:count], []
    if missing := [number for number in numbers if len(anchors[number]) < count]:
        start = tokenizer.decode(trees[missing[0]].prompt_ids)[-80:]
        raise ValueError(f"{file}: {len(missing)} of {len(numbers)} bad answers lack some of their "
                         f"{count} anchors, the first the one to a prompt that ends in {start!r}: "
                         "add completions, or lower --num_anchors")
    notes["more than needed"] = sum(map(len, wanted.values()))
    return anchors, ", ".join(f"{number} {note}" for note, number in notes.items() if number)


# ---- sampling -----------------------------------------------------------------------------------

class Instructions:
    """--anchor_instructions: prompts to sample from, under a system sentence that diversifies.

    Source: arXiv:2403.03419, which samples anchors under moral instructions.
    """

    def __init__(self, args: argparse.Namespace, tokenizer: Tokenizer):
        self.sentences = stripped_lines(args.anchor_instructions)
        self.tokenizer, self.max_prompt_length = tokenizer, args.max_prompt_length
        self.dialogues = {}          # ids of a tree's prompt, cut as the data's are -> its turns
        for record in read_dataset(args.dataset):
            prompt_ids, _ = truncate(encode_prompt(tokenizer, record.prompt), [],
                                     args.max_length, args.max_prompt_length)
            self.dialogues.setdefault(tuple(prompt_ids), record.prompt)

    def prompt(self, prompt_ids: list[int], seed: int) -> list[int]:
        """Ids of a tree's dialogue under the sentence that an anchor's seed draws.

        The sentence stands before the dialogue's own system text. Where there is no room for both,
        the oldest turns go; where the last turn alone is too long, the sentence goes.
        """
        sentence = self.sentences[seed % len(self.sentences)]
        turns = list(self.dialogues[tuple(prompt_ids)])
        if turns[0][0] == "System":
            sentence += "\n" + turns.pop(0)[1]
        room = self.max_prompt_length + len(self.tokenizer.encode(sentence))
        while turns:
            ids = encode_prompt(self.tokenizer, [("System", sentence), *turns])
            if len(ids) <= room:
                return ids
            starts = [i for i, (role, _) in enumerate(turns) if role == "Human" and i]
            turns = turns[starts[0]:] if starts else []
        return prompt_ids


def anchor_rows(source: AnchorSource, step: int, numbers: list[int],
                given: dict[int, list[list[int]]] | None = None) -> list[dict]:
    """Lines of a file of anchors: K samples for each of these trees, and the reference's log-probs.

    step     the current step, whose policy the model is
    numbers  of the trees
    given    their anchors, if they were made elsewhere
    """
    trees, count, sampling = source.trees, source.num_anchors, source.sampling
    seeds = [seed for number in numbers
             for seed in anchor_seeds(source.seed, step, number, count)]
    prompts = [trees[number].prompt_ids for number in numbers for _ in range(count)]
    if source.instruct:
        prompts = list(map(source.instruct, prompts, seeds))
    if given:
        anchor_ids = [ids for number in numbers for ids in given[number]]
    else:
        anchor_ids = generate(source.model, prompts, **vars(sampling), generator=seeds)
    anchored = [add_anchors(trees[number], anchor_ids[i * count:(i + 1) * count])
                for i, number in enumerate(numbers)]
    negatives, anchors = (                   # apart: together would be another order of sums
        tree_logps(source.reference, anchored, lambda score, z=z: score == z,
                   source.mean_logps, source.compute) for z in (0, 1))
    return [{"tree": number, "anchor_ids": tree.response_ids[1:],
             "reference_logps": of_negative[:1] + of_anchors[1:]}
            for number, tree, of_negative, of_anchors in zip(
                numbers, anchored, negatives, anchors, strict=True)]


def anchored_trees(source: AnchorSource, step: int) -> dict[int, Tree]:
    """The trees of `step` and those that follow until the next refresh, by number, with anchors.

    Where `step` refreshes, the anchors that its file does not have yet are sampled.
    """
    every, max_new_tokens = source.refresh, source.sampling.max_new_tokens
    refreshed_at = step - step % every if every else 0
    steps = source.batches[refreshed_at:refreshed_at + every] if every else source.batches
    numbers = sorted({number for batch in steps for number in batch})
    file = os.path.join(source.output_dir, f"anchors-{refreshed_at}.jsonl")
    if step > refreshed_at:
        return read_anchors(file, refreshed_at, source.trees, numbers)
    batches = sampling_batches(source.trees, numbers, source.num_anchors, max_new_tokens,
                               cache_slots(source.model,
                                           CACHE_TOKENS * source.compute.micro_tokens))
    given, odd = source.given(step, numbers) if source.given else (None, "")
    write_rows(file, batches, lambda batch: anchor_rows(source, step, batch, given),
               lambda row: sum(map(len, row["anchor_ids"])), f"anchors of step {step}",
               source.ranks)
    anchored = read_anchors(file, refreshed_at, source.trees, numbers)
    if source.ranks.is_first:
        ends = source.sampling.ends(source.model.config)
        ended = [ids[-1] in ends for tree in anchored.values()
                 for ids in tree.response_ids[1:]]
        print(f"{file}: {len(ended)} anchors, {ended.count(False)} of them cut at "
              f"{max_new_tokens} tokens" + (f"; left out: {odd}" if odd else ""))
    return anchored
