"""D2O's anchors: K samples of the model itself for every prompt with a bad human answer.

    python train.py --method d2o                                       on the embedded world
    python train.py --method d2o --num_anchors 4 --refresh_anchors 50  anchors of a lagged policy

A tree of D2O is [negative, anchor 1 .. K]: 1 + K responses share one prompt. Anchors are samples of
the policy as it was at step 0, which is the base model; with --refresh_anchors n, of the policy at
step 0, n, 2n, ..., for the n steps that follow. Their log-probs under the two frozen references are
computed then. Both are written to OUT/anchors-STEP.jsonl, anchors as the ids that were sampled,
never as text that would be tokenized anew; a training step runs no reference.

Anchors of the policy of the very same step (--refresh_anchors 1) carry no signal: over y ~ π the
mean of grad log π(y) is 0, so that all they add is noise. They must come from another policy.

New anchors have a price of their own: they are not samples of π_r-, so log π/π_r- is large and
positive on them once the policy has moved, which makes the loss small without any step.

An anchor that reached --anchor_tokens before EOS stays as it is, without EOS, as a cut response
does: running out of room is not the end of an answer.
"""
import argparse
import json
import os
from dataclasses import dataclass, replace

from generate import Sampling, generate, row_seeds
from model import Llama
from packing import MAX_RESPONSES, Tree
from step import Compute, Reference, reference_logps
from training.ranks import Ranks
from training.reference_cache import write_rows

CACHE_TOKENS = 8      # of sampling, for each of --micro_tokens: in a backward pass one takes more

FLAGS = {             # name: type, default, help
    "num_anchors": (int, 11, f"self-generated responses per prompt, 1 to {MAX_RESPONSES - 1}"),
    "alpha": (float, None, "weight of the negative's log-ratio (default: --beta, as in the paper)"),
    "refresh_anchors": (int, 0, "steps after which new anchors are sampled from the policy; 0: "
                                "only from the base model. Warning: 1 makes anchors of the "
                                "current policy, whose expected gradient is zero: noise"),
    "anchor_tokens": (int, 256, "an anchor ends here, or after EOS"),
    "anchor_temperature": (float, 0.8, "divides the logits when anchors are sampled"),
    "anchor_top_p": (float, 0.9, "anchors are sampled from the smallest set of this mass"),
    "reference_plus": (str, None, "π_r+, under the negatives: PEFT folder (default: the base)"),
    "reference_minus": (str, None, "π_r-, under the anchors: PEFT folder (default: the base)"),
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    flag = parser.add_argument_group("d2o").add_argument
    for name, (kind, default, text) in FLAGS.items():
        flag(f"--{name}", type=kind, default=default, help=text)


def check_flags(args: argparse.Namespace) -> None:
    """Raise ValueError, naming the flag, for values out of range, and for flags without d2o."""
    if args.method != "d2o":
        given = [f"--{name}" for name, (_, default, _) in FLAGS.items()
                 if getattr(args, name) != default]
        if given:
            raise ValueError(f"{', '.join(given)}: only --method d2o reads this, not {args.method}")
        return
    if not 1 <= args.num_anchors < MAX_RESPONSES:
        raise ValueError(f"--num_anchors {args.num_anchors} must be in [1, {MAX_RESPONSES - 1}]: a "
                         f"tree holds {MAX_RESPONSES} responses, and one is the negative")
    if args.refresh_anchors < 0 or not 0 <= (args.alpha or 0) < float("inf"):
        raise ValueError(f"--refresh_anchors {args.refresh_anchors} and --alpha {args.alpha} must "
                         "be at least 0, and finite")
    if not (0 < args.anchor_temperature < float("inf") and 0 < args.anchor_top_p <= 1):
        raise ValueError(
            f"--anchor_temperature {args.anchor_temperature} must be above 0 (at 0 all anchors of "
            f"a prompt are equal), and --anchor_top_p {args.anchor_top_p} in (0, 1]")
    if not 1 <= args.anchor_tokens <= args.max_length - args.max_prompt_length:
        raise ValueError(f"--anchor_tokens {args.anchor_tokens} must be in [1, "
                         f"{args.max_length - args.max_prompt_length}], the room that --max_length "
                         f"{args.max_length} leaves after --max_prompt_length "
                         f"{args.max_prompt_length}")


@dataclass(frozen=True)
class AnchorSource:
    """All that D2O's anchors depend on."""
    output_dir: str
    model: Llama                    # the policy, which they are sampled from
    references: tuple[Reference, Reference]     # π_r+ of the negatives, π_r- of the anchors
    trees: list[Tree]               # one negative each, see `one_negative_per_tree`
    batches: list[list[int]]        # tree numbers of every step of the run
    refresh: int                    # steps between new anchors; 0: none
    num_anchors: int                # K
    sampling: Sampling
    seed: int
    mean_logps: bool                # length averages, see step.Objective
    compute: Compute
    ranks: Ranks


# ---- trees --------------------------------------------------------------------------------------

def add_anchors(tree: Tree, anchor_ids: list[list[int]],
                reference_logps: list[float] | None = None) -> Tree:
    """[negative] -> [negative, anchor 1 .. K]: K pairs; an anchor counts as z = 1 in metrics."""
    return replace(tree, response_ids=tree.response_ids + anchor_ids,
                   scores=tree.scores + [1.0] * len(anchor_ids),
                   pairs=[(k + 1, 0) for k in range(len(anchor_ids))],
                   reference_logps=reference_logps)


def anchor_seeds(seed: int, step: int, number: int, num_anchors: int) -> list[int]:
    """Seeds of the anchors of tree `number` from the policy of `step`: they depend on nothing
    else."""
    return row_seeds(((seed * 1_000_003 + step) * 1_000_003 + number) % 2 ** 63, num_anchors)


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

def read_anchors(file: str, trees: list[Tree], numbers: list[int]) -> dict[int, Tree]:
    """Tree number -> tree with anchors and reference_logps, for these numbers.

    raises  ValueError for a damaged line, and for a file that holds other trees than these
    """
    found = {}
    for line_number, line in enumerate(open(file, "rb") if os.path.isfile(file) else [], 1):
        try:
            row = json.loads(line)
            found[row["tree"]] = add_anchors(trees[row["tree"]], row["anchor_ids"],
                                             row["reference_logps"])
        except (ValueError, KeyError, TypeError, IndexError):
            raise ValueError(f"{file}:{line_number}: not anchors: {line[:60]!r}") from None
    if found.keys() != set(numbers):
        raise ValueError(f"{file} has anchors for {len(found)} trees, not for the {len(numbers)} "
                         "of these steps, and the policy they were sampled from is gone; start "
                         "again with --overwrite_output_dir")
    return found


# ---- sampling -----------------------------------------------------------------------------------

def anchor_rows(source: AnchorSource, step: int, numbers: list[int]) -> list[dict]:
    """Lines of a file of anchors: K samples for each of these trees, and the references' log-probs.

    step     whose policy the model is now
    numbers  of the trees
    """
    trees, count, sampling = source.trees, source.num_anchors, source.sampling
    prompts = [trees[number].prompt_ids for number in numbers for _ in range(count)]
    seeds = [seed for number in numbers
             for seed in anchor_seeds(source.seed, step, number, count)]
    anchor_ids = generate(source.model, prompts, sampling.max_new_tokens, sampling.temperature,
                          sampling.top_p, sampling.eos_id, seeds)
    anchored = [add_anchors(trees[number], anchor_ids[i * count:(i + 1) * count])
                for i, number in enumerate(numbers)]
    reference_plus, reference_minus = source.references
    negative_logps = reference_logps(reference_plus, anchored, lambda score: score == 0,
                                     source.mean_logps, source.compute)
    anchor_logps = reference_logps(reference_minus, anchored, lambda score: score == 1,
                                   source.mean_logps, source.compute)
    return [{"tree": number, "anchor_ids": tree.response_ids[1:],
             "reference_logps": negative[:1] + anchors[1:]}
            for number, tree, negative, anchors in zip(
                numbers, anchored, negative_logps, anchor_logps)]


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
        return read_anchors(file, source.trees, numbers)
    batches = sampling_batches(source.trees, numbers, source.num_anchors, max_new_tokens,
                               CACHE_TOKENS * source.compute.micro_tokens)
    write_rows(file, batches, lambda batch: anchor_rows(source, step, batch),
               lambda row: sum(map(len, row["anchor_ids"])), f"anchors of step {step}",
               source.ranks)
    anchored = read_anchors(file, source.trees, numbers)
    if source.ranks.is_first:
        ended = [ids[-1] == source.sampling.eos_id for tree in anchored.values()
                 for ids in tree.response_ids[1:]]
        print(f"{file}: {len(ended)} anchors, {ended.count(False)} of them cut at "
              f"{max_new_tokens} tokens")
    return anchored
