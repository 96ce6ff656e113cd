"""Who sees whom in a stream of trees: one rule, three ways to compute it.

    Position i sees position j iff j <= i, the same tree, and j is in the shared prompt or in i's
    own response.

    dense    blocks of a few trees, in strips of rows that have a mask each: the specification,
             and what a CPU runs
    varlen   every prompt and every response is a segment; a response's keys are its prompt and
             itself. No mask, nothing computed that is not seen (needs a GPU)
    flex     the rule itself, compiled over blocks of 128 x 128 positions (FlexAttention; needs a
             GPU)
"""
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, groupby, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:                     # torch before 2.10
    varlen_attn = None

ATTENTIONS = ("dense", "varlen", "flex")
BLOCK_TOKENS = 256      # small trees share one dense block up to this size
STRIP_TOKENS = 128      # on a CPU a larger block is cut into strips of so many rows: most of what
                        # its causal mask hides is never computed (not measured on a GPU)


def to_device(values, device) -> Tensor:
    """A tensor of host values, copied without waiting for what the device still computes."""
    tensor = torch.as_tensor(values)
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def choose_attention(name: str, device_type: str, bf16: bool) -> None:
    """Raise ValueError, one sentence, for a way of attention that cannot run here."""
    if name != "dense" and device_type != "cuda":
        raise ValueError(f"--attention {name} needs a GPU; dense runs everywhere")
    if name == "varlen" and not (bf16 and varlen_attn):
        raise ValueError("--attention varlen needs --bf16, and the torch of requirements.txt")


# ---- what is prepared once per stream, on the host (flex's block mask: on the device) ------------

def attention_segments(tree_ids: list[int], branch_ids: list[int], device="cpu",
                       how: str = "dense"):
    """What `attention` needs to know of a stream, on `device`.

    tree_ids, branch_ids  [T] int64   which tree; 0 = shared prompt, 1.. = response; host values
    how                   one of ATTENTIONS
    """
    if how == "varlen":
        return varlen_segments(tree_ids, branch_ids, device)
    tree_ids, branch_ids = torch.as_tensor(tree_ids), torch.as_tensor(branch_ids)
    if how == "flex":
        tree_ids, branch_ids = to_device(tree_ids, device), to_device(branch_ids, device)

        def sees(batch, head, i, j):
            same_branch = (branch_ids[j] == 0) | (branch_ids[i] == branch_ids[j])
            return (j <= i) & (tree_ids[i] == tree_ids[j]) & same_branch
        return create_block_mask(sees, None, None, len(tree_ids), len(tree_ids), device=device)
    in_strips = torch.device(device).type == "cpu"
    return DenseSegments(dense_blocks(tree_ids, branch_ids, in_strips)).to(device)


def dense_blocks(tree_ids: Tensor, branch_ids: Tensor, in_strips: bool) -> list[list[Tensor]]:
    """Cut a stream into blocks that do not see each other: a list of masks for each.

    in_strips  cut blocks beyond BLOCK_TOKENS into strips of STRIP_TOKENS rows
    returns    masks [n, m] bool, True = sees, of a block's strips: n rows, in order, and as keys
               the m positions from the block's start to the strip's end
    Whole trees, merged up to BLOCK_TOKENS: the cost stays linear in the number of trees.
    """
    _, sizes = tree_ids.unique_consecutive(return_counts=True)
    spans, start, end = [], 0, 0
    for size in sizes.tolist():
        if end > start and end + size - start > BLOCK_TOKENS:
            spans.append((start, end))
            start = end
        end += size
    spans.append((start, end))
    blocks = []
    for start, end in spans:
        tree, branch = tree_ids[start:end], branch_ids[start:end]                # [n]
        mask = tree[:, None] == tree[None]                                       # [n, n]
        mask &= (branch[None] == 0) | (branch[:, None] == branch[None])
        mask.tril_()
        blocks.append(strips(mask) if in_strips and len(mask) > BLOCK_TOKENS else [mask])
    return blocks


def strips(mask: Tensor) -> list[Tensor]:
    """Cut a causal mask, [n, n], into strips of STRIP_TOKENS rows, each as wide as it ends."""
    parts = mask.split(STRIP_TOKENS)
    return [part[:, :end] for part, end in zip(parts, accumulate(map(len, parts)))]


@dataclass(frozen=True)
class DenseSegments:
    """Masks as `dense_blocks` gives them; not a plain list: torch.compile would look into it."""
    blocks: list[list[Tensor]]

    def to(self, device) -> "DenseSegments":
        return DenseSegments([[to_device(mask, device) for mask in masks]
                              for masks in self.blocks])


@dataclass(frozen=True)
class VarlenSegments:
    """The prompts and responses of a stream as S segments of queries, each with its keys.

    The keys of all segments are gathered end to end, T' of them: a prompt's once for itself, and
    once for each of its responses.
    """
    queries_until: Tensor    # [S + 1] int32   where each segment's queries begin and end
    keys_until: Tensor       # [S + 1] int32   the same for its gathered keys
    max_queries: int
    max_keys: int
    key_rows: Tensor         # [T'] int64      stream position of every gathered key
    readers: list            # [(rows, places)]: the r-th copies; rows are at `places` of key_rows


def varlen_segments(tree_ids: list[int], branch_ids: list[int], device="cpu") -> VarlenSegments:
    """See VarlenSegments; everything is made on the host."""
    queries_until, keys_until, key_rows, prompt, start = [0], [0], [], range(0), 0
    places = [[] for _ in tree_ids]                    # of every stream position, in key_rows
    for (_, branch), group in groupby(zip(tree_ids, branch_ids)):
        own = range(start, start + len(list(group)))
        start = own.stop
        prompt = prompt if branch else own
        for row in [*(prompt if branch else ()), *own]:
            places[row].append(len(key_rows))
            key_rows.append(row)
        queries_until.append(start)
        keys_until.append(len(key_rows))
    longest = [max(b - a for a, b in pairwise(until)) for until in (queries_until, keys_until)]
    copies = [[(row, at[r]) for row, at in enumerate(places) if r < len(at)]
              for r in range(max(map(len, places)))]
    until = to_device(torch.tensor([queries_until, keys_until], dtype=torch.int32), device)
    return VarlenSegments(*until, *longest, to_device(key_rows, device),
                          [tuple(to_device(part, device) for part in zip(*copy))
                           for copy in copies])


# ---- what every layer runs ----------------------------------------------------------------------

class _GatherKeys(torch.autograd.Function):
    """x[key_rows]; the backward adds the copies of a row in order, in float32 or wider (on a GPU
    index_select's own adds them as they come, in x's precision)."""

    @staticmethod
    def forward(ctx, x, segments):
        ctx.segments = segments
        return x.index_select(0, segments.key_rows)

    @staticmethod
    def backward(ctx, grad):
        (_, places), *more = ctx.segments.readers              # every row has a first copy
        total = grad.index_select(0, places)                                     # [T, Hkv, Dh]
        total = total.to(torch.promote_types(grad.dtype, torch.float32))
        for rows, places in more:                              # rows are distinct: nothing races
            total.index_add_(0, rows, grad.index_select(0, places).to(total.dtype))
        return total.to(grad.dtype), None


@cache
def compiled_flex_attention():
    return torch.compile(flex_attention, dynamic=True)


def attention(q: Tensor, k: Tensor, v: Tensor, segments=None) -> Tensor:
    """softmax(q kᵀ / sqrt(Dh)) v under the rule: [T, H, Dh], [T, Hkv, Dh] -> [T, H, Dh].

    segments   from `attention_segments`; None = one plain causal sequence
    """
    groups = q.shape[1] // k.shape[1]          # grouped-query attention: one k, v for many q
    if isinstance(segments, VarlenSegments):
        k, v = _GatherKeys.apply(k, segments), _GatherKeys.apply(v, segments)    # [T', Hkv, Dh]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    if isinstance(segments, VarlenSegments):
        # (-1, 0) is causal from the bottom right: a response's last token sees its last key
        return varlen_attn(q, k, v, segments.queries_until, segments.keys_until,
                           segments.max_queries, segments.max_keys, window_size=(-1, 0))
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))                       # [1, H, T, Dh]
    if isinstance(segments, BlockMask):
        flex = compiled_flex_attention() if q.is_cuda else flex_attention
        return flex(q, k, v, block_mask=segments)[0].transpose(0, 1)
    if segments is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)[0].transpose(0, 1)
    sizes, outputs = [masks[-1].shape[1] for masks in segments.blocks], []
    # split, not slices, whose gradients are as large as the stream (a strip's keys: as its block)
    for masks, q_block, k_block, v_block in zip(segments.blocks,
                                                *(t.split(sizes, dim=2) for t in (q, k, v))):
        for mask, q_strip in zip(masks, q_block.split([len(mask) for mask in masks], dim=2)):
            keys = slice(mask.shape[1])
            outputs.append(F.scaled_dot_product_attention(
                q_strip, k_block[:, :, keys], v_block[:, :, keys], attn_mask=mask))
    return torch.cat(outputs, dim=2)[0].transpose(0, 1)                          # [T, H, Dh]
