"""Who sees whom in a stream, as one [T, T] mask: by the rule, and as found in dense segments; and
attention by that mask, in any precision."""
import torch
from torch import Tensor

from kernels.attention import DenseSegments


def rule_mask(tree_ids: list[int], branch_ids: list[int]) -> Tensor:
    """The rule at the top of kernels/attention.py, one pair of positions at a time."""
    size = len(tree_ids)
    mask = torch.zeros(size, size, dtype=torch.bool)
    for i in range(size):
        for j in range(i + 1):
            mask[i, j] = tree_ids[i] == tree_ids[j] and branch_ids[j] in (0, branch_ids[i])
    return mask


def whole_mask(segments: DenseSegments) -> Tensor:
    """The blocks and their strips put together; outside of them nothing is seen."""
    sizes = [strips[-1].shape[1] for strips in segments.blocks]
    whole, row, start = torch.zeros(sum(sizes), sum(sizes), dtype=torch.bool), 0, 0
    for strips, size in zip(segments.blocks, sizes, strict=True):
        for mask in strips:
            assert mask.dtype == torch.bool and start + mask.shape[1] == row + len(mask)
            whole[row:row + len(mask), start:start + mask.shape[1]] = mask
            row += len(mask)
        start += size
    return whole


def stream_ids(trees: list[tuple[int, list[int]]]) -> tuple[list[int], list[int]]:
    """tree_ids and branch_ids of trees given as (tokens of the prompt, tokens of each response)."""
    tree_ids, branch_ids = [], []
    for number, (prompt, responses) in enumerate(trees):
        for branch, size in enumerate([prompt, *responses]):
            branch_ids += [branch] * size
            tree_ids += [number] * size
    return tree_ids, branch_ids


def plain_attention(q: Tensor, k: Tensor, v: Tensor, upstream: Tensor, mask: Tensor,
                    dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Output, dq, dk and dv of attention written out, every step in `dtype`: float64 is the truth.

    mask  [T, T] bool, True = sees
    """
    q, k, v = (t.detach().to(dtype).requires_grad_() for t in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    scores = torch.einsum("ihd,jhd->hij", q, k.repeat_interleave(groups, 1)) * q.shape[2] ** -0.5
    weights = scores.masked_fill(~mask.to(q.device), -torch.inf).softmax(-1)     # [H, T, T]
    output = torch.einsum("hij,jhd->ihd", weights, v.repeat_interleave(groups, 1))
    return [output, *torch.autograd.grad(output, (q, k, v), upstream.to(dtype))]
