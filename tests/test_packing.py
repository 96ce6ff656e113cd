"""Truncation, trees, streams, packing and order: by hand, and by brute force."""
from collections import Counter

import pytest
import torch
from attention_rule import whole_mask

from data import Record
from packing import (MAX_RESPONSES, Tree, build_stream, deal, epoch_batches, idle_stream,
                     make_trees, one_negative_per_tree, pack, pair_points, plan_batches,
                     prefix_stream, truncate)
from tokenizer import Tokenizer, encode_dialogue


def record(prompt, *judged, where="here:1"):
    return Record((("Human", prompt),), *zip(*judged), where)


def random_trees(count=40, seed=0, scores=(0.0, 0.25, 1.0)):
    """Trees of 1 to 5 responses of 1 to 12 tokens; every id is used once, so ids name places."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda low, high: int(torch.randint(low, high, (1,), generator=generator))  # noqa: E731
    next_id, trees = 3, []

    def ids(size):
        nonlocal next_id
        next_id += size
        return list(range(next_id - size, next_id))

    for _ in range(count):
        responses = [ids(draw(1, 13)) for _ in range(draw(1, 6))]
        judged = [scores[draw(0, len(scores))] for _ in responses]
        pairs = [(i, j) for i in range(len(judged)) for j in range(len(judged))
                 if judged[i] > judged[j]]
        trees.append(Tree(ids(draw(2, 20)), responses, judged, pairs))
    return trees


# ---- truncation ---------------------------------------------------------------------------------

P, R = [1, 10, 11, 12, 13], [20, 21, 22, 2]       # BOS first; EOS last
CUTS = {      # (max_length, max_prompt_length): prompt, response
    (9, 5): (P, R),                                           # fits to the last token
    (8, 5): (P, [20, 21, 22]),                                # EOS goes first
    (6, 5): (P, [20]),
    (100, 4): ([1, 11, 12, 13], R),                           # the oldest word goes, BOS stays
    (7, 3): ([1, 12, 13], R),
    (5, 3): ([1, 12, 13], [20, 21]),
    (100, 2): ([1, 13], R),                                   # BOS and the colon of "ASSISTANT:"
    (3, 2): ([1, 13], [20]),
}


@pytest.mark.parametrize("sizes", CUTS)
def test_truncation_keeps_bos_the_prompts_end_and_the_responses_start(sizes):
    # Prompt from the left: its end asks for the answer. Response from the right, losing EOS.
    assert truncate(list(P), list(R), *sizes) == CUTS[sizes]


def test_truncation_always_leaves_a_response_and_the_last_prompt_token():
    # Every size up to 12 against a restatement: the room for a response is what the prompt leaves.
    for n in range(1, 12):
        for m in range(1, 6):
            prompt, response = [1, *range(100, 99 + n)], [*range(200, 199 + m), 2]
            for max_prompt in range(2, 12):
                for max_length in range(max_prompt + 1, 15):
                    left, right = truncate(prompt, response, max_length, max_prompt)
                    assert len(left) == min(n, max_prompt) and left[0] == 1
                    assert left[1:] == prompt[n - len(left) + 1:]
                    assert right == response[:max_length - len(left)] and right
                    assert left[-1] == prompt[-1]
                    assert (2 in right) == (len(left) + m <= max_length)


def test_impossible_lengths_are_refused(tiny_tokenizer):
    # With max_prompt_length >= max_length a response could have no token at all.
    for max_length, max_prompt_length in ((10, 10), (10, 11), (10, 1), (10, -1), (2, 2)):
        with pytest.raises(ValueError, match=f"max_prompt_length {max_prompt_length} .*max_length"):
            make_trees([], Tokenizer(tiny_tokenizer), "all", max_length, max_prompt_length)


# ---- trees --------------------------------------------------------------------------------------

JUDGED = (("Good.", 1.0), ("Bad.", 0.0), ("Fair.", 0.5), ("Fine.", 1.0))
TRAINS_ON = {      # which of JUDGED are used, and the pairs among them
    "all": ([0, 1, 2, 3], {(0, 1), (0, 2), (2, 1), (3, 1), (3, 2)}),
    "positive": ([0, 3], set()),
    "negative": ([1], set()),
    "pairs": ([0, 1, 2, 3], {(0, 1), (0, 2), (2, 1), (3, 1), (3, 2)}),
}


@pytest.mark.parametrize("trains_on", TRAINS_ON)
def test_trees_hold_what_the_objective_trains_on(tiny_tokenizer, trains_on):
    # Four responses of one prompt; the ids must be those of the response that has the score.
    tokenizer, counts = Tokenizer(tiny_tokenizer), Counter()
    used, pairs = TRAINS_ON[trains_on]
    tree, = make_trees([record("Why?", *JUDGED)], tokenizer, trains_on, counts=counts)
    for i, ids in zip(used, tree.response_ids, strict=True):
        expected = encode_dialogue(tokenizer, [("Human", "Why?"), ("Assistant", JUDGED[i][0])])
        assert (tree.prompt_ids, ids) == expected
    assert tree.scores == [JUDGED[i][1] for i in used]
    assert set(tree.pairs) == pairs and len(tree.pairs) == len(pairs)
    assert counts["responses the objective does not use"] == 4 - len(used)
    assert tree.num_tokens == len(tree.prompt_ids) + sum(len(ids) - 1 for ids in tree.response_ids)


def test_pairs_leave_out_what_is_in_no_pair(tiny_tokenizer):
    # Two prompts without a better and a worse answer, one with: only its answers are trained on.
    records = [record("a", ("x", 1.0)), record("b", ("x", 1.0), ("y", 1.0)),
               record("c", ("x", 0.0), ("y", 0.75))]
    counts = Counter()
    tree, = make_trees(records, Tokenizer(tiny_tokenizer), "pairs", counts=counts)
    assert (tree.scores, tree.pairs) == ([0.0, 0.75], [(1, 0)])
    assert counts["responses the objective does not use"] == 3


def test_neighbours_with_one_prompt_share_a_tree_but_no_pair(tiny_tokenizer):
    # Points of one prompt lie next to each other: one prompt is computed, not four. A pair is two
    # responses of one record; two records make none. A prompt that comes back is a new tree.
    records = [record("a", ("x", 1.0)), record("a", ("y", 0.0)),
               record("a", ("good", 1.0), ("bad", 0.0)), record("b", ("z", 0.0)),
               record("a", ("w", 1.0))]
    trees = make_trees(records, Tokenizer(tiny_tokenizer))
    assert [tree.scores for tree in trees] == [[1.0, 0.0, 1.0, 0.0], [0.0], [1.0]]
    assert [tree.pairs for tree in trees] == [[(2, 3)], [], []]
    assert trees[0].prompt_ids == trees[2].prompt_ids != trees[1].prompt_ids


def test_points_of_a_prompt_make_pairs_where_their_scores_differ():
    # For methods that train on pairs, wherever the rows stand: 2 good x 1 bad. A text that was
    # scored both ways makes none, nor does one scored alike twice; records of two stay as they are.
    records = [record("a", ("x", 1.0)), record("b", ("good", 1.0), ("bad", 0.0)),
               record("a", ("y", 0.0)), record("c", ("z", 1.0)), record("a", ("both", 1.0)),
               record("a", ("w", 0.5)), record("a", ("x", 1.0)), record("a", ("both", 0.0)),
               record("d", ("only", 1.0)), record("d", ("only", 0.0))]
    counts = Counter()
    merged = pair_points(records, counts)                  # reads the records as they are needed
    assert [(r.prompt[0][1], r.responses, r.scores) for r in merged] == [
        ("a", ("x", "y", "w"), (1.0, 0.0, 0.5)), ("b", ("good", "bad"), (1.0, 0.0)),
        ("c", ("z",), (1.0,))]
    assert counts["pairs made of rows that share a prompt"] == 3
    assert counts["responses left out: scored both ways"] == 2
    many = [record("a", (f"answer {n}", float(n % 2))) for n in range(37)]
    assert [len(r.responses) for r in pair_points(many, counts)] == [MAX_RESPONSES, MAX_RESPONSES, 5]
    pairs = [record("a", (f"good {n}", 1.0), (f"bad {n}", 0.0)) for n in range(3)]
    assert list(pair_points(pairs, counts)) == pairs                     # explicit pairs: nothing changes


def test_an_unused_record_between_two_does_not_split_their_tree(tiny_tokenizer):
    # "positive" skips the middle record; the numbering of pairs must not count it either.
    records = [record("a", ("x", 1.0)), record("b", ("y", 0.0)), record("a", ("z", 1.0))]
    tree, = make_trees(records, Tokenizer(tiny_tokenizer), "positive")
    assert tree.scores == [1.0, 1.0]


def test_a_tree_has_at_most_max_responses(tiny_tokenizer):
    # Attention in a tree is quadratic in its tokens, so 37 rows of one prompt are 16 + 16 + 5.
    records = [record("a", (f"answer {n}", float(n % 2))) for n in range(37)]
    trees = make_trees(records, Tokenizer(tiny_tokenizer))
    assert [len(tree.scores) for tree in trees] == [MAX_RESPONSES, MAX_RESPONSES, 5]
    assert sum((tree.scores for tree in trees), []) == [float(n % 2) for n in range(37)]
    pairs = [record("a", (f"good {n}", 1.0), (f"bad {n}", 0.0)) for n in range(12)]
    trees = make_trees(pairs, Tokenizer(tiny_tokenizer), "pairs")
    assert [tree.pairs for tree in trees] == [
        [(2 * n, 2 * n + 1) for n in range(size)] for size in (8, 4)]


def test_cuts_are_counted_and_made(tiny_tokenizer):
    # 5 tokens of prompt, 3 of response: BOS and the prompt's end stay, EOS goes with the cut.
    tokenizer, counts = Tokenizer(tiny_tokenizer), Counter()
    answer = "A long answer about the garden."
    tree, = make_trees([record("Why?", (answer, 1.0), ("", 0.0))], tokenizer, "all", 8, 5, counts)
    prompt_ids, long_ids = encode_dialogue(tokenizer, [("Human", "Why?"), ("Assistant", answer)])
    assert tree.prompt_ids == [1] + prompt_ids[-4:]
    assert tree.response_ids == [long_ids[:3], [2]]
    assert counts["prompts cut from the left"] == 1
    assert counts["responses cut from the right"] == 1


def test_nothing_is_cut_at_the_exact_length(tiny_tokenizer):
    # Off by one here would cost every longest answer its EOS.
    tokenizer, counts = Tokenizer(tiny_tokenizer), Counter()
    prompt_ids, ids = encode_dialogue(tokenizer, [("Human", "Why?"), ("Assistant", "Because.")])
    tree, = make_trees([record("Why?", ("Because.", 1.0))], tokenizer, "all",
                       len(prompt_ids) + len(ids), len(prompt_ids), counts)
    assert (tree.prompt_ids, tree.response_ids) == (prompt_ids, [ids])
    assert counts["prompts cut from the left"] == counts["responses cut from the right"] == 0


def test_every_negative_of_a_prompt_becomes_a_tree():
    # D2O: each will have its own anchors. Cut by hand: two negatives, then one.
    trees = [Tree([1, 5], [[6, 2], [7, 2]], [0.0, 0.0], []), Tree([1, 9], [[2]], [0.0], [])]
    assert one_negative_per_tree(trees) == [Tree([1, 5], [[6, 2]], [0.0], []),
                                            Tree([1, 5], [[7, 2]], [0.0], []), trees[1]]


# ---- streams ------------------------------------------------------------------------------------

def test_stream_by_hand():
    # Two trees, written out: the last token of a response is a label only.
    trees = [Tree([1, 5], [[6, 7, 2], [8, 2]], [1.0, 0.0], [(0, 1)]),
             Tree([1, 9], [[2]], [0.5], [])]
    stream = build_stream(trees)
    assert stream.input_ids.tolist() == [1, 5, 6, 7, 8, 1, 9]
    assert stream.position_ids.tolist() == [0, 1, 2, 3, 2, 0, 1]
    assert stream.tree_ids.tolist() == [0, 0, 0, 0, 0, 1, 1]
    assert stream.branch_ids.tolist() == [0, 0, 1, 1, 2, 0, 0]
    assert stream.labels.tolist() == [6, 7, 2, 8, 2, 2]
    assert stream.predict_from.tolist() == [1, 2, 3, 1, 4, 6]
    assert stream.response_ids.tolist() == [0, 0, 0, 1, 1, 2]
    assert stream.scores.tolist() == [1.0, 0.0, 0.5] and stream.pairs.tolist() == [[0, 1]]
    assert sum(tree.num_tokens for tree in trees) == len(stream.input_ids)


def seen_by(stream, position) -> list[int]:
    """Input ids that a position sees, by the segments' masks."""
    return stream.input_ids[whole_mask(stream.segments)[position]].tolist()


WANTED = {"all": None, "bad": lambda score: score < 1, "good": lambda score: score == 1}


@pytest.mark.parametrize("which", WANTED)
def test_every_label_is_predicted_from_exactly_its_own_past(which):
    # Brute force: for response y of prompt x, token t is predicted by the position that sees
    # x + y[:t], no more, no less, at position |x| + t - 1. Every id is unique, so ids name places.
    trees, wanted = random_trees(), WANTED[which]
    stream, response, expected = build_stream(trees, wanted=wanted), 0, []
    for tree in trees:
        for ids, score in zip(tree.response_ids, tree.scores):
            if wanted is None or wanted(score):
                expected += [(response, label, tree.prompt_ids + ids[:t])
                             for t, label in enumerate(ids)]
            response += 1
    found = [(owner, label, seen_by(stream, place)) for owner, label, place in zip(
        stream.response_ids.tolist(), stream.labels.tolist(), stream.predict_from.tolist())]
    assert found == expected
    assert [stream.position_ids[place] for place in stream.predict_from.tolist()] == [
        len(past) - 1 for *_, past in expected]
    assert len(set(stream.input_ids.tolist())) == len(stream.input_ids)      # nothing twice


def test_wanted_leaves_responses_and_pairs_their_numbers():
    # The reference reads the bad responses only; its log-probs are subtracted by number.
    trees = random_trees(seed=3)
    whole, some = build_stream(trees), build_stream(trees, wanted=lambda score: score < 1)
    scores = [score for tree in trees for score in tree.scores]
    for stream in (whole, some):
        assert stream.scores.tolist() == scores and stream.scores.dtype == torch.float32
        assert stream.pairs.tolist() == whole.pairs.tolist()
    scored = sorted(set(some.response_ids.tolist()))
    assert scored == [number for number, score in enumerate(scores) if score < 1]
    for chosen, rejected in whole.pairs.tolist():
        assert scores[chosen] > scores[rejected]
    assert len(whole.pairs) == sum(len(tree.pairs) for tree in trees) > 0


def test_no_wanted_response_means_no_token():
    # An all-good batch under ULMA needs no reference pass; its prompts must not be computed either.
    trees = [Tree([1, 5], [[6, 2]], [1.0], []), Tree([1, 7], [[8, 2]], [0.0], [])]
    for stream in (build_stream(trees[:1], wanted=lambda score: score < 1), build_stream([])):
        for name in ("input_ids", "position_ids", "tree_ids", "branch_ids", "rows", "labels",
                     "predict_from", "response_ids"):
            assert getattr(stream, name).shape == (0,)
            assert getattr(stream, name).dtype == torch.int64
    assert build_stream(trees[:1], wanted=lambda score: score < 1).scores.tolist() == [1.0]
    assert build_stream([]).scores.shape == (0,) and build_stream([]).pairs.shape == (0, 2)
    stream = build_stream(trees, wanted=lambda score: score < 1)
    assert stream.input_ids.tolist() == [1, 7, 8]
    assert stream.response_ids.tolist() == [1, 1]


def test_an_idle_stream_has_a_token_and_no_response():
    # What a rank runs through sharded layers while others have work left.
    stream = idle_stream()
    assert len(stream.input_ids) == 1 and whole_mask(stream.segments).tolist() == [[True]]
    assert len(stream.labels) == len(stream.rows) == len(stream.scores) == len(stream.pairs) == 0


def test_cached_log_probs_travel_with_their_responses():
    # In the order of the responses, float64, also of those that are not wanted.
    trees = [Tree([1, 5], [[6, 7, 2], [8, 2]], [1.0, 0.0], [(0, 1)], [-1.25, -2.5]),
             Tree([1, 9], [[2]], [0.5], [], [-1e-17 - 3])]
    for wanted in (None, lambda score: score < 1):
        cached = build_stream(trees, wanted=wanted).reference_logps
        assert cached.tolist() == [-1.25, -2.5, -1e-17 - 3] and cached.dtype == torch.float64


def test_responses_that_are_only_eos_cost_no_token():
    # EOS is predicted from the prompt's last position; several such responses share it.
    stream = build_stream([Tree([1, 5, 6], [[2], [7, 2], [2]], [1.0, 0.0, 0.0], [])])
    assert stream.input_ids.tolist() == [1, 5, 6, 7]
    assert stream.predict_from.tolist() == [2, 2, 3, 2]
    assert stream.labels.tolist() == [2, 7, 2, 2]
    assert stream.response_ids.tolist() == [0, 1, 1, 2]
    assert stream.pairs.shape == (0, 2)


# ---- packing, ranks, order ----------------------------------------------------------------------

def test_packs_hold_every_tree_once_in_order_and_within_the_budget():
    # Brute force: concatenation is the input; each pack fits, or is one tree; none could take the
    # first tree of the next (first fit, no waste).
    trees = random_trees(60, seed=1)
    size = lambda group: sum(tree.num_tokens for tree in group)                  # noqa: E731
    for budget in (1, 30, 64, 200, 10**6):
        packs = pack(trees, budget)
        assert [tree for group in packs for tree in group] == trees
        assert all(group and (size(group) <= budget or len(group) == 1) for group in packs)
        assert all(size(group) + after[0].num_tokens > budget
                   for group, after in zip(packs, packs[1:]))
    assert len(pack(trees, 1)) == 60 and len(pack(trees, 10**6)) == 1 and pack([], 5) == []
    exact = size(trees[:3])
    assert len(pack(trees[:3], exact)) == 1 and len(pack(trees[:3], exact - 1)) == 2


def test_shards_deal_every_tree_to_one_rank_evenly():
    # Longest first, to the least loaded: loads differ by at most one tree. Ranks call it on their
    # own, so it must be a pure function of the batch.
    trees = random_trees(50, seed=2)
    for world_size in (1, 2, 3, 8, 64):
        shards = deal(trees, world_size)
        assert len(shards) == world_size
        assert Counter(id(tree) for part in shards for tree in part) == Counter(map(id, trees))
        loads = [sum(tree.num_tokens for tree in part) for part in shards]
        assert max(loads) - min(loads) <= max(tree.num_tokens for tree in trees)
        assert deal(trees, world_size) == shards
    trees = [Tree([1] * size, [[2]], [1.0], []) for size in (3, 3, 4, 10)]        # by hand: 10 | 10
    assert [[tree.num_tokens for tree in part] for part in deal(trees, 2)] == [[10], [4, 3, 3]]


def test_an_epoch_has_every_index_once_in_batches_of_the_size_asked_for():
    # A batch is full when the next tree would pass batch_size; the last one may be smaller.
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 6, (101,), generator=generator).tolist() + [50]
    for batch_size in (1, 7, 16, 1000):
        batches = epoch_batches(sizes, batch_size, seed=3, epoch=0)
        assert sorted(sum(batches, [])) == list(range(102))
        counts = [sum(sizes[index] for index in batch) for batch in batches]
        assert all(count <= batch_size or len(batch) == 1 for count, batch in zip(counts, batches))
        assert all(count + sizes[after[0]] > batch_size
                   for count, after in zip(counts, batches[1:]))
    assert [len(batch) for batch in epoch_batches([1] * 10, 4, 0, 0)] == [4, 4, 2]
    assert [len(batch) for batch in epoch_batches([2] * 3, 4, 0, 0)] == [2, 1]


def test_order_is_a_pure_function_of_seed_and_epoch():
    # A resumed run recomputes it; the global generator must be neither read nor moved.
    sizes = [1] * 50
    first = epoch_batches(sizes, 8, seed=42, epoch=1)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    assert epoch_batches(sizes, 8, seed=42, epoch=1) == first
    assert torch.equal(torch.rand(3), expected)
    orders = [str(epoch_batches(sizes, 8, seed, epoch)) for seed in range(5) for epoch in range(5)]
    assert len(set(orders)) == 25
    assert sum(first, []) != list(range(50))


def test_a_plan_is_whole_epochs_then_a_fraction():
    sizes = [1] * 10
    plan = plan_batches(sizes, 4, 2.0, -1, seed=0)
    assert [len(batch) for batch in plan] == [4, 4, 2, 4, 4, 2]
    assert sorted(sum(plan[:3], [])) == list(range(10)) and plan[:3] != plan[3:]
    assert len(plan_batches(sizes, 4, 1.5, -1, seed=0)) == 4     # half of six steps is 4.5
    assert plan_batches(sizes, 4, 1.0, 5, seed=0) == plan[:5]    # max_steps goes on
    assert plan_batches([], 4, 1.0, 5, seed=0) == []


# ---- prefixes -----------------------------------------------------------------------------------

def test_a_prefix_stream_holds_every_shared_prefix_once_and_sees_its_ancestors_only():
    # "ab", "abc", "ad", then "ab" again: the walk has left it, so it stands a second time.
    input_ids, position_ids, segments, parents, paths = prefix_stream(
        [7, 8], [[1, 2], [1, 2, 3], [1, 4], [1, 2]])
    assert input_ids == [7, 8, 1, 2, 3, 4, 2] and position_ids == [0, 1, 2, 3, 4, 3, 3]
    assert parents == [-1, 0, 1, 2, 3, 2, 2] and paths == [[2, 3], [2, 3, 4], [2, 5], [2, 6]]
    mask = whole_mask(segments)
    assert mask.shape == (7, 7)
    for i in range(len(input_ids)):
        ancestors, at = set(), i
        while at >= 0:
            ancestors, at = ancestors | {at}, parents[at]
        assert set(mask[i].nonzero().flatten().tolist()) == ancestors
