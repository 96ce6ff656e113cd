"""From token ids to streams: trees, packing, the order of the data.

A *tree* is one prompt with its responses; a *stream* is several trees laid end to end, no padding:

    input_ids      x x x x x  a a a  b b b b   x x x  c c         [T]
    position_ids   0 1 2 3 4  5 6 7  5 6 7 8   0 1 2  3 4         [T]   responses continue x
    tree_ids       0 0 0 0 0  0 0 0  0 0 0 0   1 1 1  1 1         [T]
    branch_ids     0 0 0 0 0  1 1 1  2 2 2 2   0 0 0  1 1         [T]   0 = shared prompt

A response's last token (EOS) is predicted but predicts nothing, so it is a label only.
"""
import os
from collections import Counter
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from attention import DenseSegments, attention_segments, to_device
from tokenizer import encode_dialogue

MAX_RESPONSES = 16      # in one tree; its attention cost is quadratic in its tokens


@dataclass(frozen=True)
class Tree:
    """One prompt and its responses as token ids.

    prompt_ids    [int]            BOS first
    response_ids  [[int]]          EOS last, unless the response was cut
    scores        [float]          z of each response
    pairs         [(int, int)]     (chosen, rejected) indices into the responses
    reference_logps  [float]       log π_ref of each response where it is kept (kept.py), nats
    """
    prompt_ids: list
    response_ids: list
    scores: list
    pairs: list
    reference_logps: list | None = None

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


def make_trees(records, tokenizer, uses: str = "all", max_length: int = 1024,
               max_prompt_length: int = 512, counts_: Counter | None = None) -> list[Tree]:
    """Tokenize records, keeping the responses an objective can use.

    Neighbouring records with the same prompt share one tree of up to MAX_RESPONSES responses;
    pairs are formed within a record only.

    uses      "all"; "positive" (z = 1); "negative" (z = 0); "pairs": every (better, worse) of a
              prompt, and only responses that are in a pair
    counts_   Counter that is told what was cut or left out
    """
    if not 2 <= max_prompt_length < max_length:
        raise ValueError(f"max_prompt_length {max_prompt_length} must be at least 2 and less "
                         f"than max_length {max_length}")
    counts_, trees, last_prompt = Counter() if counts_ is None else counts_, [], None
    for record in records:
        scores = list(record.scores)
        pairs = [(i, j) for i in range(len(scores)) for j in range(len(scores))
                 if scores[i] > scores[j]]
        in_pair = {i for pair in pairs for i in pair}
        kept = [i for i in range(len(scores)) if
                {"all": True, "positive": scores[i] == 1, "negative": scores[i] == 0,
                 "pairs": i in in_pair}[uses]]
        counts_["responses the objective does not use"] += len(scores) - len(kept)
        if not kept:
            continue
        if record.prompt != last_prompt or len(trees[-1].scores) + len(kept) > MAX_RESPONSES:
            prompt_ids, _ = encode_dialogue(tokenizer, [*record.prompt, ("Assistant", "")])
            counts_["prompts cut from the left"] += len(prompt_ids) > max_prompt_length
            prompt_ids, _ = truncate(prompt_ids, [], max_length, max_prompt_length)
            trees.append(Tree(prompt_ids, [], [], []))
            last_prompt = record.prompt
        tree = trees[-1]
        number = {i: len(tree.scores) + n for n, i in enumerate(kept)}           # in the tree
        tree.pairs.extend((number[i], number[j]) for i, j in pairs if i in number and j in number)
        for i in kept:
            _, ids = encode_dialogue(tokenizer, [("Assistant", record.responses[i])])
            _, cut = truncate(tree.prompt_ids, ids, max_length, max_prompt_length)
            counts_["responses cut from the right"] += len(cut) < len(ids)
            tree.response_ids.append(cut)
            tree.scores.append(scores[i])
    return trees


# ---- streams ------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Stream:
    """Several trees as flat tensors: T tokens, N scored positions, R responses, P pairs."""
    input_ids: Tensor        # [T] int64
    position_ids: Tensor     # [T] int64
    tree_ids: Tensor         # [T] int64
    branch_ids: Tensor       # [T] int64
    segments: object         # who sees whom, see attention.attention_segments
    rows: Tensor             # [S] int64   stream positions that predict anything, S <= N
    row_ids: Tensor          # [N] int64   which of these rows' hidden state predicts ...
    labels: Tensor           # [N] int64   ... this token ...
    response_ids: Tensor     # [N] int64   ... of this response
    scores: Tensor           # [R] float32
    pairs: Tensor            # [P, 2] int64   (chosen, rejected) responses

    @property
    def predict_from(self) -> Tensor:
        """[N] int64   the stream position that predicts each label"""
        return self.rows[self.row_ids]


def build_stream(trees: list[Tree], device="cpu", wanted=None,
                 attention: str = "dense") -> Stream | None:
    """Lay trees end to end; None if nothing is wanted.

    wanted     score -> bool: responses it refuses are left out of the tokens but keep their number,
               so that log-probs of two streams over the same trees line up
    attention  how it will be computed, one of attention.ATTENTIONS
    """
    input_ids, position_ids, tree_ids, branch_ids = [], [], [], []
    predict_from, labels, owners, scores, pairs = [], [], [], [], []
    for number, tree in enumerate(trees):
        first, start, size = len(scores), len(input_ids), len(tree.prompt_ids)
        scores += tree.scores
        pairs += [(first + chosen, first + rejected) for chosen, rejected in tree.pairs]
        branches = [(i, ids) for i, ids in enumerate(tree.response_ids)
                    if wanted is None or wanted(tree.scores[i])]
        if not branches:
            continue
        input_ids += tree.prompt_ids
        position_ids += range(size)
        branch_ids += [0] * size
        for i, ids in branches:
            first_token = len(input_ids)
            predict_from += [start + size - 1, *range(first_token, first_token + len(ids) - 1)]
            labels += ids
            owners += [first + i] * len(ids)
            input_ids += ids[:-1]
            position_ids += range(size, size + len(ids) - 1)
            branch_ids += [i + 1] * (len(ids) - 1)
        tree_ids += [number] * (len(input_ids) - start)
    if not input_ids:
        return None
    rows = list(dict.fromkeys(predict_from))            # of several responses the prompt's end once
    number_of = {row: number for number, row in enumerate(rows)}
    put = partial(to_device, device=device)
    return Stream(
        put(input_ids), put(position_ids), put(tree_ids), put(branch_ids),
        attention_segments(tree_ids, branch_ids, device, attention),
        put(rows), put([number_of[row] for row in predict_from]), put(labels),
        put(owners), put(torch.tensor(scores, dtype=torch.float32)),
        put(torch.tensor(pairs, dtype=torch.int64).view(-1, 2)))


def prefix_stream(prompt_ids: list[int], responses: list[list[int]]):
    """A prompt and many like responses, where every prefix that neighbours share stands once.

    Token i sees token j iff j <= i < end of j: the tokens are in the order of a walk through the
    tree of prefixes, and the end of j is where the walk leaves what follows j.
    returns   (input_ids [T], position_ids [T], segments, parents [T], paths): parents, the token
              before; paths, of every response the stream positions of its tokens (its last token
              is fed, too)
    """
    size = len(prompt_ids)
    input_ids, position_ids = list(prompt_ids), list(range(size))
    parents, ends = list(range(-1, size - 1)), [None] * size
    paths, path, last = [], [], []
    for ids in responses:
        shared = len(os.path.commonprefix([ids, last]))
        for position in path[shared:]:
            ends[position] = len(input_ids)
        path, last = path[:shared], ids
        for token in ids[shared:]:
            parents.append(path[-1] if path else size - 1)
            position_ids.append(size + len(path))
            path.append(len(input_ids))
            input_ids.append(token)
            ends.append(None)
        paths.append(path)
    order = torch.arange(len(input_ids))                                         # [T]
    ends = torch.tensor([len(input_ids) if end is None else end for end in ends])
    mask = (order[None] <= order[:, None]) & (order[:, None] < ends[None])       # [T, T]
    return input_ids, position_ids, DenseSegments([[mask]]), parents, paths


def pack(trees: list[Tree], micro_tokens: int) -> list[list[Tree]]:
    """Cut a list of trees into micro-batches of at most micro_tokens (a longer tree goes alone)."""
    packs, size = [], 0
    for tree in trees:
        if not packs or size + tree.num_tokens > micro_tokens:
            packs.append([])
            size = 0
        packs[-1].append(tree)
        size += tree.num_tokens
    return packs


def shard(trees: list[Tree], world_size: int) -> list[list[Tree]]:
    """Deal trees to ranks, longest first, each to the rank with the fewest tokens so far."""
    shards, loads = [[] for _ in range(world_size)], [0] * world_size
    for tree in sorted(trees, key=lambda tree: -tree.num_tokens):
        rank = loads.index(min(loads))
        shards[rank].append(tree)
        loads[rank] += tree.num_tokens
    return shards


# ---- order --------------------------------------------------------------------------------------

def epoch_batches(sizes: list[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Indices of the trees of every batch of one epoch: a pure function of its arguments.

    sizes        what each tree counts: its responses, or its pairs
    batch_size   the most a batch may count (a larger tree is a batch of its own)
    returns      every index exactly once, in an order shuffled by (seed, epoch)
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    batches, count = [], 0
    for index in torch.randperm(len(sizes), generator=generator).tolist():
        if not batches or count + sizes[index] > batch_size:
            batches.append([])
            count = 0
        batches[-1].append(index)
        count += sizes[index]
    return batches
