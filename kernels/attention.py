"""Attention over a stream of trees: one rule for who sees whom, two ways to compute it.

    Position i sees position j iff j <= i, both are in the same tree, and j is in the tree's prompt
    or in i's own response.

    dense    blocks of a few trees with explicit masks: the specification, and what a CPU runs
    tree     our own kernels, in tree_attention.py: no mask, and no hidden block is computed; what a
             GPU runs
"""
import contextlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .tree_attention import (
    MAX_HEAD_DIM,
    TreeSegments,
    tree_attention,
    tree_attention_problem,
    tree_blocks,
)

ATTENTIONS = ("dense", "tree")
BLOCK_TOKENS = 256      # small trees share one dense block up to this size
STRIP_TOKENS = 128      # on a CPU a larger block is cut into strips of so many rows, which skips
                        # most of what its causal mask hides (not measured on a GPU)


def to_device(values: Tensor | list, device: torch.device | str) -> Tensor:
    """Values of the host as a tensor on `device`; copying to a GPU does not wait for the GPU."""
    tensor = torch.as_tensor(values)
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def choose_attention(name: str, device_type: str, head_dim: int = MAX_HEAD_DIM) -> str:
    """The attention of this name: "dense", "tree", or "auto".

    name         "auto": tree on a GPU, where it takes heads of that width; else dense
    device_type  as of a torch.device
    head_dim     Dh, where it is known
    raises       ValueError, in one sentence, if it cannot run here
    """
    if name == "auto":
        name = "tree" if device_type == "cuda" and head_dim <= MAX_HEAD_DIM else "dense"
    if name == "tree" and (problem := tree_attention_problem(device_type)):
        raise ValueError(f"tree attention cannot run: {problem}; train.py --kernels torch runs "
                         "everywhere")
    return name


# ---- prepared once per stream, on the host ------------------------------------------------------

@dataclass(frozen=True)
class DenseSegments:
    """The masks of `dense_blocks`."""
    blocks: list[list[Tensor]]

    def to(self, device: torch.device | str) -> "DenseSegments":
        return DenseSegments([[to_device(mask, device) for mask in strips]
                              for strips in self.blocks])


def dense_blocks(tree_ids: Tensor, branch_ids: Tensor, in_strips: bool) -> list[list[Tensor]]:
    """Cut a stream into blocks of whole trees that do not see each other.

    tree_ids    [T] int64   which tree
    branch_ids  [T] int64   0 = shared prompt, 1.. = response
    in_strips   cut blocks beyond BLOCK_TOKENS into strips of STRIP_TOKENS rows
    returns     for each block the masks of its strips, [n, m] bool, True = sees: the strip's n
                rows, and as keys the m positions from the block's start to the strip's end

    Trees are merged up to BLOCK_TOKENS, so the cost is linear in the number of trees.
    """
    _, sizes = tree_ids.unique_consecutive(return_counts=True)
    spans, start, end = [], 0, 0
    for size in sizes.tolist():
        if end > start and end + size - start > BLOCK_TOKENS:
            spans.append((start, end))
            start = end
        end += size
    spans.append((start, end))                  # of an empty stream: one block of no rows
    blocks = []
    for start, end in spans:
        tree, branch = tree_ids[start:end], branch_ids[start:end]                # [n]
        mask = tree[:, None] == tree[None]                                       # [n, n]
        mask &= (branch[None] == 0) | (branch[:, None] == branch[None])
        mask.tril_()
        cut = in_strips and len(mask) > BLOCK_TOKENS
        blocks.append(causal_strips(mask) if cut else [mask])
    return blocks


def causal_strips(mask: Tensor) -> list[Tensor]:
    """Cut a causal mask, [n, n], into strips of STRIP_TOKENS rows, without the keys after each."""
    strips, end = [], 0
    for rows in mask.split(STRIP_TOKENS):
        end += len(rows)
        strips.append(rows[:, :end])
    return strips


Segments = DenseSegments | TreeSegments


def attention_segments(tree_ids: list[int], branch_ids: list[int],
                       device: torch.device | str = "cpu", how: str = "dense") -> Segments:
    """Who sees whom in a stream, in the form that `attention` takes, on `device`.

    tree_ids    [T] int   which tree, on the host; an empty stream (T = 0) gets dense segments
    branch_ids  [T] int   0 = shared prompt, 1.. = response; on the host
    how         one of ATTENTIONS
    raises      ValueError for another `how`, and for "tree" on what `tree_blocks` refuses
    """
    if how not in ATTENTIONS:
        raise ValueError(f"attention is {how!r}; expected one of {', '.join(ATTENTIONS)}")
    if how == "tree" and len(tree_ids):
        blocks = tree_blocks(tree_ids, branch_ids)
        return TreeSegments(to_device(blocks, device), len(tree_ids))
    tree_ids, branch_ids = torch.as_tensor(tree_ids), torch.as_tensor(branch_ids)
    in_strips = torch.device(device).type == "cpu"
    return DenseSegments(dense_blocks(tree_ids, branch_ids, in_strips)).to(device)


# ---- run by every layer -------------------------------------------------------------------------

def _dense_attention(q: Tensor, k: Tensor, v: Tensor, blocks: list[list[Tensor]]) -> Tensor:
    """[1, H, T, Dh] each -> [1, H, T, Dh], one call of torch's attention per strip."""
    # split, not slices: a slice's gradient is as large as the stream, here only as its block
    sizes = [strips[-1].shape[1] for strips in blocks]
    q_blocks, k_blocks, v_blocks = q.split(sizes, 2), k.split(sizes, 2), v.split(sizes, 2)
    outputs = []
    for strips, q_block, k_block, v_block in zip(blocks, q_blocks, k_blocks, v_blocks, strict=True):
        q_strips = q_block.split([len(mask) for mask in strips], 2)
        for mask, q_strip in zip(strips, q_strips, strict=True):
            end = mask.shape[1]                # keys after the strip are seen by none of its rows
            outputs.append(F.scaled_dot_product_attention(
                q_strip, k_block[:, :, :end], v_block[:, :, :end], attn_mask=mask))
    return torch.cat(outputs, dim=2)


def exact_backends(device_type: str) -> contextlib.AbstractContextManager:
    """On a GPU, torch's memory-efficient and plain attention, and no other; on a CPU, any.

    torch prefers cuDNN's where it can, and that is wrong with a mask: in a block of n positions, n
    % 128 == 64, dq is NaN for a row whose log-sum-exp is below -88.7 (pytorch#196678: torch 2.11
    to 2.13 on an H100), and for some shapes it does not run ("mha_graph.execute ... false",
    pytorch#190321).
    """
    if device_type != "cuda":
        return contextlib.nullcontext()
    return sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments | None = None) -> Tensor:
    """softmax(q kᵀ / sqrt(Dh)) v over the positions that the rule lets each position see.

    q         [T, H, Dh]
    k, v      [T, Hkv, Dh]   H a multiple of Hkv: grouped-query attention
    segments  from `attention_segments`; None = one plain causal sequence
    returns   [T, H, Dh]
    """
    if isinstance(segments, TreeSegments):
        return tree_attention(q, k, v, segments)
    groups = q.shape[1] // k.shape[1]          # query heads per key head
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))                       # [1, H, T, Dh]
    with exact_backends(q.device.type):
        if segments is None:
            output = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            output = _dense_attention(q, k, v, segments.blocks)
    return output[0].transpose(0, 1)                                             # [T, H, Dh]
