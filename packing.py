"""From token ids to packed streams: trees, streams, the order of the data.

A *tree* is a prompt with its responses (prefix sharing). A *stream* is a packed sequence: several
trees laid end to end, no padding.

    input_ids      x x x x x  a a a  b b b b   x x x  c c         [T]
    position_ids   0 1 2 3 4  5 6 7  5 6 7 8   0 1 2  3 4         [T]   responses continue x
    tree_ids       0 0 0 0 0  0 0 0  0 0 0 0   1 1 1  1 1         [T]
    branch_ids     0 0 0 0 0  1 1 1  2 2 2 2   0 0 0  1 1         [T]   0 = shared prompt

A response's last token (EOS) is predicted but predicts nothing, so it is a label only.
"""
import itertools
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from data import Record
from kernels.attention import DenseSegments, Segments, attention_segments, to_device
from tokenizer import Tokenizer, encode_dialogue, encode_prompt

MOST_STEPS = 10_000_000       # of a run
MAX_RESPONSES = 16      # in one tree; its attention cost is quadratic in its tokens


@dataclass(frozen=True)
class Tree:
    """One prompt and its responses as token ids.

    prompt_ids       BOS first
    response_ids     EOS last, unless the response was cut
    scores           z of each response
    pairs            (chosen, rejected) indices into the responses
    reference_logps  log π_ref of each response where it is cached (training/reference_cache.py),
                     nats; 0 for a response whose loss does not ask for it
    """
    prompt_ids: list[int]
    response_ids: list[list[int]]
    scores: list[float]
    pairs: list[tuple[int, int]]
    reference_logps: list[float] | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + sum(len(ids) - 1 for ids in self.response_ids)


def truncate(prompt_ids: list[int], response_ids: list[int], max_length: int,
             max_prompt_length: int) -> tuple[list[int], list[int]]:
    """Cut the prompt from the left (BOS stays), then the response from the right.

    The prompt's end, "ASSISTANT:", always survives. A cut response loses its EOS: running out of
    room is not the end of an answer.
    """
    if len(prompt_ids) > max_prompt_length:
        prompt_ids = prompt_ids[:1] + prompt_ids[len(prompt_ids) - max_prompt_length + 1:]
    return prompt_ids, response_ids[:max_length - len(prompt_ids)]


# ---- records -> trees ---------------------------------------------------------------------------

def score_pairs(scores: tuple[float, ...]) -> list[tuple[int, int]]:
    """Every (better, worse) of a prompt's responses."""
    numbers = range(len(scores))
    return [(i, j) for i in numbers for j in numbers if scores[i] > scores[j]]


def used_responses(scores: tuple[float, ...], trains_on: str) -> list[int]:
    """Which responses of a record an objective trains on; see `each_tree`."""
    if trains_on == "pairs":
        paired = {i for pair in score_pairs(scores) for i in pair}
        return [i for i in range(len(scores)) if i in paired]
    wanted = {"all": None, "positive": 1, "negative": 0}[trains_on]
    return [i for i, score in enumerate(scores) if wanted is None or score == wanted]


Points = dict[tuple, dict[str, set[float]]]       # prompt -> {response: its scores}


def add_point(points: Points, record: Record) -> None:
    """Add the response of a record that has only one."""
    if len(record.responses) == 1:
        found = points.setdefault(record.prompt, {})
        found.setdefault(record.responses[0], set()).update(record.scores)


def pair_points(records: Iterable[Record], counts: Counter,
                points: Points | None = None) -> Iterator[Record]:
    """The records, where single responses to one prompt become one record of up to MAX_RESPONSES.

    For methods that train on pairs: labelled rows of a prompt, wherever they stand, pair up where
    their scores differ. A text that was scored both ways is left out; other records stay.
    points   of all these records, see `add_point`; used up. None: made here, of a list of records
    """
    if points is None:
        points = {}
        for record in records:
            add_point(points, record)
    for record in records:
        if len(record.responses) > 1:
            yield record
            continue
        found = points.pop(record.prompt, {})
        judged = [(text, *scores) for text, scores in found.items() if len(scores) == 1]
        counts["responses left out: scored both ways"] += len(found) - len(judged)
        for i in range(0, len(judged), MAX_RESPONSES):
            texts, scores = zip(*judged[i:i + MAX_RESPONSES], strict=True)
            yield Record(record.prompt, texts, scores, record.where)
            counts["pairs made of rows that share a prompt"] += len(score_pairs(scores))


def group_records(records: Iterable[Record], trains_on: str,
                  counts: Counter) -> Iterator[list[tuple[Record, list[int]]]]:
    """The records of every tree, each with the responses that are used.

    Neighbouring records with the same prompt share a tree of up to MAX_RESPONSES responses.
    """
    group, size = [], 0
    for record in records:
        used = used_responses(record.scores, trains_on)
        counts["responses the objective does not use"] += len(record.scores) - len(used)
        if not used:
            continue
        if group and (group[0][0].prompt != record.prompt or size + len(used) > MAX_RESPONSES):
            yield group
            group, size = [], 0
        group.append((record, used))
        size += len(used)
    if group:
        yield group


def each_tree(records: Iterable[Record], tokenizer: Tokenizer, trains_on: str = "all",
              max_length: int = 1024, max_prompt_length: int = 512,
              counts: Counter | None = None) -> Iterator[Tree]:
    """Tokenize records one after another, keeping the responses an objective can use.

    trains_on  "all"; "positive" (z = 1); "negative" (z = 0); "pairs": every (better, worse) of a
               record, and only responses that are in a pair
    counts     updated with what was cut or left out; lengths as `truncate` takes them
    raises     ValueError for lengths that leave no room
    """
    if not 2 <= max_prompt_length < max_length:
        raise ValueError(f"max_prompt_length {max_prompt_length} must be at least 2 and less "
                         f"than max_length {max_length}")
    counts = Counter() if counts is None else counts
    for group in group_records(records, trains_on, counts):
        prompt = group[0][0].prompt
        try:
            whole_prompt = encode_prompt(tokenizer, prompt)
        except ValueError as error:                      # a chat template may refuse it
            raise ValueError(f"{group[0][0].where}: {error}") from None
        counts["prompts cut from the left"] += len(whole_prompt) > max_prompt_length
        prompt_ids, _ = truncate(whole_prompt, [], max_length, max_prompt_length)
        response_ids, scores, pairs = [], [], []
        for record, used in group:
            number = {i: len(scores) + n for n, i in enumerate(used)}            # in the tree
            pairs += [(number[i], number[j]) for i, j in score_pairs(record.scores)
                      if i in number and j in number]
            for i in used:
                _, whole = encode_dialogue(tokenizer, [("Assistant", record.responses[i])])
                _, ids = truncate(prompt_ids, whole, max_length, max_prompt_length)
                counts["responses cut from the right"] += len(ids) < len(whole)
                response_ids.append(ids)
                scores.append(record.scores[i])
        yield Tree(prompt_ids, response_ids, scores, pairs)


def make_trees(*args: Any, **kwargs: Any) -> list[Tree]:
    """All trees of `each_tree`."""
    return list(each_tree(*args, **kwargs))


def one_negative_per_tree(trees: list[Tree]) -> list[Tree]:
    """A prompt with n bad answers becomes n trees: each will have its own anchors."""
    return [Tree(tree.prompt_ids, [ids], [score], []) for tree in trees
            for ids, score in zip(tree.response_ids, tree.scores)]


def mismatched_trees(trees: list[Tree], max_length: int) -> list[Tree]:
    """Every prompt of a batch with another prompt's responses, for KTO; none if all are the same.

    A tree gets the responses of the tree before it, the first those of the last; where that one has
    the same prompt, of the one before that. They are cut where `truncate` cuts, unscored (z = 0).
    """
    made = []
    for number, tree in enumerate(trees):
        before = (trees[number - distance] for distance in range(1, len(trees)))
        other = next((one for one in before if one.prompt_ids != tree.prompt_ids), None)
        if other:
            responses = [truncate(tree.prompt_ids, ids, max_length, max_length)[1]
                         for ids in other.response_ids]
            made.append(Tree(tree.prompt_ids, responses, [0.0] * len(responses), []))
    return made


# ---- trees -> streams ---------------------------------------------------------------------------

@dataclass(frozen=True, kw_only=True)
class Stream:
    """Several trees as flat tensors: T tokens, N scored positions, R responses, P pairs."""
    input_ids: Tensor        # [T] int64
    position_ids: Tensor     # [T] int64
    tree_ids: Tensor         # [T] int64
    branch_ids: Tensor       # [T] int64
    segments: Segments       # who attends to whom, see kernels.attention.attention_segments
    rows: Tensor             # [S] int64   stream positions that predict anything, S <= N
    row_ids: Tensor          # [N] int64   which of these rows' hidden state predicts ...
    labels: Tensor           # [N] int64   ... this token ...
    response_ids: Tensor     # [N] int64   ... of this response
    scores: Tensor           # [R] float32
    pairs: Tensor            # [P, 2] int64   (chosen, rejected) responses
    reference_logps: Tensor | None = None     # [R] float64   where the trees have them cached

    @property
    def predict_from(self) -> Tensor:
        """[N] int64   the stream position that predicts each label"""
        return self.rows[self.row_ids]


def build_stream(trees: list[Tree], device: torch.device | str = "cpu",
                 wanted: Callable[[float], bool] | None = None,
                 attention: str = "dense") -> Stream:
    """Lay trees end to end.

    wanted     score -> bool: responses it refuses are left out of the tokens but keep their number,
               so that log-probs of two streams over the same trees line up; a prompt without a
               wanted response is left out too, so a stream may have no token at all
    attention  how it will be computed, one of kernels.attention.ATTENTIONS
    """
    input_ids, position_ids, tree_ids, branch_ids = [], [], [], []
    predict_from, labels, response_ids, scores, pairs = [], [], [], [], []
    for tree_number, tree in enumerate(trees):
        first_response, prompt_start = len(scores), len(input_ids)
        prompt_size = len(tree.prompt_ids)
        scores += tree.scores
        pairs += [(first_response + chosen, first_response + rejected)
                  for chosen, rejected in tree.pairs]
        branches = [(i, ids) for i, ids in enumerate(tree.response_ids)
                    if wanted is None or wanted(tree.scores[i])]
        if not branches:
            continue
        input_ids += tree.prompt_ids
        position_ids += range(prompt_size)
        branch_ids += [0] * prompt_size
        for i, ids in branches:
            start = len(input_ids)
            predict_from += [prompt_start + prompt_size - 1, *range(start, start + len(ids) - 1)]
            labels += ids
            response_ids += [first_response + i] * len(ids)
            input_ids += ids[:-1]
            position_ids += range(prompt_size, prompt_size + len(ids) - 1)
            branch_ids += [i + 1] * (len(ids) - 1)
        tree_ids += [tree_number] * (len(input_ids) - prompt_start)
    # The prompt's last position predicts the first token of every response; keep it once.
    row_number = {row: number for number, row in enumerate(dict.fromkeys(predict_from))}
    cached = None
    if trees and trees[0].reference_logps is not None:
        cached = to_device(torch.tensor([logp for tree in trees for logp in tree.reference_logps],
                                        dtype=torch.float64), device)

    def integers(values: list) -> Tensor:                     # an empty list too
        return to_device(torch.tensor(values, dtype=torch.int64), device)

    return Stream(
        input_ids=integers(input_ids), position_ids=integers(position_ids),
        tree_ids=integers(tree_ids), branch_ids=integers(branch_ids),
        segments=attention_segments(tree_ids, branch_ids, device, attention),
        rows=integers(list(row_number)), row_ids=integers([row_number[row] for row in predict_from]),
        labels=integers(labels), response_ids=integers(response_ids),
        scores=to_device(torch.tensor(scores, dtype=torch.float32), device),
        pairs=integers(pairs).view(-1, 2), reference_logps=cached)


def idle_stream(device: torch.device | str = "cpu") -> Stream:
    """A stream of one token and no response: a pass that only keeps sharded ranks in step."""
    token, nothing = (to_device(torch.zeros(size, dtype=torch.int64), device) for size in (1, 0))
    return Stream(
        input_ids=token, position_ids=token, tree_ids=token, branch_ids=token,
        segments=attention_segments([0], [0], device), rows=nothing, row_ids=nothing,
        labels=nothing, response_ids=nothing, scores=nothing.float(), pairs=nothing.view(-1, 2))


class PrefixStream(NamedTuple):
    """See `prefix_stream`: T tokens, the prompt's first."""
    input_ids: list[int]         # [T]
    position_ids: list[int]      # [T]
    segments: DenseSegments
    parents: list[int]           # [T]   the position of the token before; -1 before the first
    paths: list[list[int]]       # of every response the positions of its tokens, its last included


def prefix_stream(prompt_ids: list[int], responses: list[list[int]]) -> PrefixStream:
    """A prompt and many similar responses, where every prefix that neighbours share stands once.

    Token i attends to token j iff j <= i < end of j: tokens are in depth-first order of the prefix
    trie, and the end of j is the end of its subtree.
    """
    prompt_size = len(prompt_ids)
    input_ids, position_ids = list(prompt_ids), list(range(prompt_size))
    parents, ends = list(range(-1, prompt_size - 1)), [None] * prompt_size
    paths, path, previous = [], [], []
    for ids in responses:
        shared = len(os.path.commonprefix([ids, previous]))
        for position in path[shared:]:
            ends[position] = len(input_ids)
        path, previous = path[:shared], ids
        for token in ids[shared:]:
            parents.append(path[-1] if path else prompt_size - 1)
            position_ids.append(prompt_size + len(path))
            path.append(len(input_ids))
            input_ids.append(token)
            ends.append(None)
        paths.append(path)
    order = torch.arange(len(input_ids))                                         # [T]
    ends = torch.tensor([len(input_ids) if end is None else end for end in ends])
    mask = (order[None] <= order[:, None]) & (order[:, None] < ends[None])       # [T, T]
    return PrefixStream(input_ids, position_ids, DenseSegments([[mask]]), parents, paths)


# ---- packing ------------------------------------------------------------------------------------

Item = TypeVar("Item")


def group_by_size(items: Iterable[Item], size_of: Callable[[Item], int],
                  limit: int) -> list[list[Item]]:
    """Cut items, in order, into groups of at most `limit` (a larger item is a group of its own)."""
    groups, size = [], 0
    for item in items:
        if not groups or size + size_of(item) > limit:
            groups.append([])
            size = 0
        groups[-1].append(item)
        size += size_of(item)
    return groups


def pack(trees: list[Tree], micro_tokens: int) -> list[list[Tree]]:
    """The trees of every micro-batch: at most micro_tokens tokens each."""
    return group_by_size(trees, lambda tree: tree.num_tokens, micro_tokens)


def deal(trees: list[Tree], world_size: int) -> list[list[Tree]]:
    """Deal trees to ranks, longest first, each to the rank with the fewest tokens so far."""
    shards, loads = [[] for _ in range(world_size)], [0] * world_size
    for tree in sorted(trees, key=lambda tree: -tree.num_tokens):
        rank = loads.index(min(loads))
        shards[rank].append(tree)
        loads[rank] += tree.num_tokens
    return shards


# ---- the order of the data ----------------------------------------------------------------------

def derived_seed(seed: int, *numbers: int) -> int:
    """A seed for each (seed, numbers): other epochs, steps or trees draw other numbers."""
    for number in numbers:
        seed = seed * 1_000_003 + number
    return seed


def epoch_batches(sizes: list[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Indices of the trees of every batch of one epoch: a pure function of its arguments.

    sizes        what each tree counts: its responses, or its pairs
    batch_size   the most a batch may count (a larger tree is a batch of its own)
    returns      every index exactly once, in an order shuffled by (seed, epoch)
    """
    generator = torch.Generator().manual_seed(derived_seed(seed, epoch))
    order = torch.randperm(len(sizes), generator=generator).tolist()
    return group_by_size(order, lambda index: sizes[index], batch_size)


def plan_batches(sizes: list[int], batch_size: int, epochs: float, max_steps: int,
                 seed: int) -> list[list[int]]:
    """Tree indices of every step of a run: max_steps of them if that is above 0, else of `epochs`.

    sizes, batch_size   see `epoch_batches`
    raises              ValueError for more steps than MOST_STEPS
    """
    steps = max_steps if max_steps > 0 else epochs * sum(sizes) / batch_size
    if steps > MOST_STEPS:
        raise ValueError(f"{steps:,} steps are more than can be planned ({MOST_STEPS:,})")
    batches = []
    if max_steps > 0 and sizes:
        epochs = math.inf
    for epoch in itertools.count():
        if epoch >= epochs or len(batches) >= max_steps > 0:
            break
        batches += epoch_batches(sizes, batch_size, seed, epoch)
    if max_steps > 0:
        return batches[:max_steps]
    return batches[:round(len(batches) * epochs / max(1, math.ceil(epochs)))]
