"""Anchors of D2O: K answers that the model itself gives to every prompt with a bad human answer.

    python train.py --method d2o                                       on the embedded world
    python train.py --method d2o --num_anchors 4 --refresh_anchors 50  anchors of a lagged policy

A tree of D2O is [negative, anchor 1 .. K]: 1 + K responses share one prompt. Anchors are samples of
the policy as it was at step 0, which is the base model; with --refresh_anchors n, of the policy at
step 0, n, 2n, ..., for the n steps that follow. Then the two frozen references say how probable
they find each response. Both are written to OUT/anchors-STEP.jsonl, anchors as the ids that were
sampled, never as text that would be tokenized anew; a training step runs no reference.

Anchors of the policy of the very same step (--refresh_anchors 1) hold nothing: over y ~ π the mean
of grad log π(y) is 0, so that all they add is noise. They must come from another policy.

New anchors have a price of their own: π_r- did not say them, so log π/π_r- is large and positive
on them once the policy has moved, which makes the loss small without any step.

An anchor that reached --anchor_tokens before EOS stays as it is, without EOS, as a cut response
does: running out of room is not the end of an answer.
"""
import json
import os
from dataclasses import replace

from generate import generate, row_seeds
from kept import write_rows
from step import reference_logps
from trees import MAX_RESPONSES, Tree

CACHE_TOKENS = 8      # of sampling, for each of --micro_tokens: in a backward pass one takes more

FLAGS = {             # name: type, default, help
    "num_anchors": (int, 11, f"self-generated responses per prompt, 1 to {MAX_RESPONSES - 1}"),
    "alpha": (float, None, "weight of the negative's log-ratio (default: --beta, as in the paper)"),
    "refresh_anchors": (int, 0, "steps after which the policy says new anchors; 0: only the base "
                                "model does. Warning: 1 makes anchors of the current policy, whose "
                                "expected gradient is zero: noise that holds nothing"),
    "anchor_tokens": (int, 256, "an anchor ends here, or after EOS"),
    "anchor_temperature": (float, 0.8, "divides the logits when anchors are sampled"),
    "anchor_top_p": (float, 0.9, "anchors are sampled from the smallest set of this mass"),
    "reference_plus": (str, None, "π_r+, under the negatives: PEFT folder (default: the base)"),
    "reference_minus": (str, None, "π_r-, under the anchors: PEFT folder (default: the base)"),
}


def add_flags(parser) -> None:
    flag = parser.add_argument_group("d2o").add_argument
    for name, (kind, default, text) in FLAGS.items():
        flag(f"--{name}", type=kind, default=default, help=text)


def check_flags(args) -> None:
    """Raise ValueError, naming the flag, for what d2o cannot mean, and for its flags without it."""
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


# ---- trees --------------------------------------------------------------------------------------

def one_negative_per_tree(trees: list[Tree]) -> list[Tree]:
    """A prompt with several bad answers becomes as many trees: each will have its own anchors."""
    return [Tree(tree.prompt_ids, [ids], [score], []) for tree in trees
            for ids, score in zip(tree.response_ids, tree.scores)]


def add_anchors(tree: Tree, anchor_ids: list[list[int]]) -> Tree:
    """[negative] -> [negative, anchor 1 .. K]: K pairs; an anchor counts as z = 1 in metrics."""
    return replace(tree, response_ids=tree.response_ids + anchor_ids,
                   scores=tree.scores + [1.0] * len(anchor_ids),
                   pairs=[(k + 1, 0) for k in range(len(anchor_ids))])


def anchor_seeds(seed: int, step: int, number: int, num_anchors: int) -> list[int]:
    """Seeds of the anchors that the policy of `step` says to tree `number`: of nothing else."""
    return row_seeds(((seed * 1_000_003 + step) * 1_000_003 + number) % 2 ** 63, num_anchors)


def sampling_batches(trees: list[Tree], numbers: list[int], num_anchors: int,
                     max_new_tokens: int, cache_tokens: int) -> list[list[int]]:
    """Tree numbers of every batch: prompts of like length together, within the cache's room."""
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
    made = {}
    for line_number, line in enumerate(open(file, "rb") if os.path.isfile(file) else [], 1):
        try:
            row = json.loads(line)
            tree = add_anchors(trees[row["tree"]], row["anchor_ids"])
            made[row["tree"]] = replace(tree, reference_logps=row["reference_logps"])
        except (ValueError, KeyError, TypeError, IndexError):
            raise ValueError(f"{file}:{line_number}: not anchors: {line[:60]!r}") from None
    if made.keys() != set(numbers):
        raise ValueError(f"{file} has anchors for {len(made)} trees, not for the {len(numbers)} of "
                         "these steps, and the policy that said them is gone; start again with "
                         "--overwrite_output_dir")
    return made


# ---- making them --------------------------------------------------------------------------------

def anchor_rows(model, references, trees: list[Tree], numbers: list[int], seeds: list[int],
                sampling: tuple, mean_logps: bool, micro_tokens: int, linear_logps) -> list[dict]:
    """Lines of a file of anchors: sample K for each of these trees, and ask the references.

    references  (π_r+, π_r-), context managers: of the negatives, and of the anchors
    seeds       K for each of `numbers`
    sampling    max_new_tokens, temperature, top_p, eos_id, as generate.generate takes them
    """
    count = len(seeds) // max(1, len(numbers))
    anchor_ids = generate(model, [trees[n].prompt_ids for n in numbers for _ in range(count)],
                          *sampling, seeds)
    anchored = [add_anchors(trees[n], anchor_ids[i * count:(i + 1) * count])
                for i, n in enumerate(numbers)]
    plus, minus = (reference_logps(reference, anchored, wanted, mean_logps, micro_tokens,
                                   linear_logps)
                   for reference, wanted in zip(references, (lambda z: z == 0, lambda z: z == 1)))
    return [{"tree": n, "anchor_ids": tree.response_ids[1:],
             "reference_logps": negative[:1] + anchors[1:]}
            for n, tree, negative, anchors in zip(numbers, anchored, plus, minus)]


def anchored_trees(step: int, output_dir: str, model, references, trees: list[Tree],
                   batches: list[list[int]], *, every: int, seed: int, num_anchors: int,
                   sampling: tuple, mean_logps: bool, micro_tokens: int, linear_logps, rank: int,
                   world_size: int, stop) -> dict[int, Tree]:
    """The trees of `step` and those that follow until the next refresh, by number, with anchors.

    model    the policy; if `step` refreshes, it says the anchors that its file does not have yet
    batches  tree numbers of every step of the run
    every    steps between refreshes; 0: none
    others   see `anchor_rows`, kept.write_rows, step.backward_batch
    """
    said_at = step - step % every if every else 0
    steps = batches[said_at:said_at + every] if every else batches
    numbers = sorted({number for batch in steps for number in batch})
    file = os.path.join(output_dir, f"anchors-{said_at}.jsonl")
    if step > said_at:
        return read_anchors(file, trees, numbers)
    packs = sampling_batches(trees, numbers, num_anchors, sampling[0], CACHE_TOKENS * micro_tokens)

    def rows_of(batch):
        seeds = [s for n in batch for s in anchor_seeds(seed, step, n, num_anchors)]
        return anchor_rows(model, references, trees, batch, seeds, sampling, mean_logps,
                           micro_tokens, linear_logps)

    write_rows(file, packs, rows_of, lambda row: sum(map(len, row["anchor_ids"])),
               f"anchors of step {step}", rank, world_size, stop)
    made = read_anchors(file, trees, numbers)
    if rank == 0:
        ended = [ids[-1] == sampling[3] for tree in made.values() for ids in tree.response_ids[1:]]
        print(f"{file}: {len(ended)} anchors, {ended.count(False)} of them cut at {sampling[0]} "
              "tokens")
    return made
