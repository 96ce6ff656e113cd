"""Attention over a stream of trees: exact, no mask in memory, no hidden pair of blocks computed.

A stream lays a tree's prompt first and its responses behind it. What a row sees is then at most two
ranges of keys, and what sees a key is one range of rows:

    a row of a prompt sees      [prompt start, the row]
    a row of a response sees    the whole prompt, and [response start, the row]
    a key of a prompt           is seen by [the key, tree end)
    a key of a response         is seen by [the key, response end)

Forward. Of row i with the keys j that it sees, and scale = 1 / sqrt(Dh):

    s_ij  = scale q_i·k_j
    lse_i = log Σ_j exp(s_ij)
    p_ij  = exp(s_ij - lse_i)
    o_i   = Σ_j p_ij v_j

Neither s nor p is ever in memory: a program holds one tile of keys at a time and corrects its sums
when a larger score turns up (online softmax). Kept for the backward are o and lse.

Backward. With do = dL/do, p computed again from lse:

    dv_j    = Σ_i p_ij do_i
    dp_ij   = do_i·v_j
    ds_ij   = p_ij (dp_ij - Σ_l p_il dp_il)         derivative of the softmax
            = p_ij (dp_ij - delta_i)                delta_i = Σ_l p_il (do_i·v_l) = do_i·o_i
    dq_i    = scale Σ_j ds_ij k_j                   a sum over the keys that row i sees
    dk_j    = scale Σ_i ds_ij q_i                   a sum over the rows that see key j, as is dv_j

Each of the three kernels (o; dq; dk and dv) has one program per block of rows or keys and head, and
only that program writes its block: no atomics, every sum in one order, the same bits twice. The
price is that s and dp are computed in two kernels, 7 products of tiles in the backward and not 5.
Grouped-query attention reads the k and v of a group in place and sums its dk and dv in registers.

Sources: FlashAttention-2, arXiv:2307.08691, algorithms 1 and 2; online softmax, arXiv:1805.02867.
"""
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
    IMPORT_ERROR = None
except Exception as error:              # missing or broken: `tree_attention_problem` says which
    triton, IMPORT_ERROR = None, error

BLOCK = 64          # positions of a block, at most
MAX_HEAD_DIM = 128  # beyond, tiles no longer fit the registers


# ---- prepared once per stream, on the host ------------------------------------------------------

@dataclass(frozen=True)
class TreeSegments:
    """The prompts and responses of a stream, cut into blocks.

    blocks      [B, 6] int32   see `tree_blocks`
    num_tokens  int            T of the stream
    """
    blocks: Tensor
    num_tokens: int


def tree_blocks(tree_ids: list[int], branch_ids: list[int]) -> Tensor:
    """Cut a stream into blocks of at most BLOCK positions that lie in one prompt or one response.

    tree_ids    [T] int        which tree
    branch_ids  [T] int        0 = shared prompt, 1.. = response
    returns     [B, 6] int32   of each block
                0, 1   its first position, and the one behind its last
                2, 3   the prompt before its response, likewise; nothing (2 = 3) for a prompt
                4      the first position of its own prompt or response
                5      where the rows that see it as keys end
    raises      ValueError if a tree is not its prompt and then its responses, each in one piece
    """
    blocks = []
    for tree, positions in groupby(range(len(tree_ids)), tree_ids.__getitem__):
        positions = list(positions)
        tree_start, tree_end = positions[0], positions[-1] + 1
        prompt_end, branches = tree_start, []
        for branch, own in groupby(positions, branch_ids.__getitem__):
            own = list(own)
            own_start, own_end = own[0], own[-1] + 1
            if branch in branches or (branch == 0 and branches):
                raise ValueError(f"tree {tree}: branch {branch} begins again at position "
                                 f"{own_start}; expected the prompt, then response by response")
            branches.append(branch)
            if branch == 0:
                prompt_end = own_end
                prompt_seen, seen_until = (own_start, own_start), tree_end
            else:
                prompt_seen, seen_until = (tree_start, prompt_end), own_end
            for start in range(own_start, own_end, BLOCK):
                end = min(start + BLOCK, own_end)
                blocks.append((start, end, *prompt_seen, own_start, seen_until))
    return torch.tensor(blocks, dtype=torch.int32).view(-1, 6)


# ---- kernels ------------------------------------------------------------------------------------
# A GPU has exponentials and logarithms of base 2: scores and lse are kept times log2 e = 1.4427,
# so that e^s is 2 to the score. Pointers are to [T, heads, Dh]; a tile has ROWS or STEP of its rows
# for one head, and WIDTH columns: Dh, padded with zeros to a power of two.

if triton is not None:
    @triton.jit
    def _read_block(blocks, number, PARTS: tl.constexpr, ROWS: tl.constexpr):
        """Block number // PARTS, of whose positions a program takes ROWS; columns as in the table.
        Parts behind the end of a short block are empty: start >= end."""
        row = blocks + number // PARTS * 6
        start = tl.load(row) + number % PARTS * ROWS
        end = tl.minimum(tl.load(row + 1), start + ROWS)
        return start, end, tl.load(row + 2), tl.load(row + 3), tl.load(row + 4), tl.load(row + 5)

    @triton.jit
    def _tile(x, first, end, head, HEADS: tl.constexpr, DH: tl.constexpr, WIDTH: tl.constexpr,
              COUNT: tl.constexpr):
        """Where rows first, first + 1, .. of a head lie, and which of the tile's places are real:
        rows before `end`, columns before DH."""
        row, column = tl.arange(0, COUNT)[:, None], tl.arange(0, WIDTH)[None]
        start = x + (first.to(tl.int64) * HEADS + head) * DH        # past 2**31 at 0.5 M tokens
        real = first + row < end
        if DH < WIDTH:
            real = real & (column < DH)
        return start + row * (HEADS * DH) + column, real                         # [COUNT, WIDTH]

    @triton.jit
    def _load(x, first, end, head, HEADS: tl.constexpr, DH: tl.constexpr, WIDTH: tl.constexpr,
              COUNT: tl.constexpr):
        place, real = _tile(x, first, end, head, HEADS, DH, WIDTH, COUNT)
        return tl.load(place, mask=real, other=0.0)                              # [COUNT, WIDTH]

    @triton.jit
    def _store(x, values, first, end, head, HEADS: tl.constexpr, DH: tl.constexpr,
               WIDTH: tl.constexpr, COUNT: tl.constexpr):
        place, real = _tile(x, first, end, head, HEADS, DH, WIDTH, COUNT)
        tl.store(place, values.to(x.dtype.element_ty), mask=real)

    @triton.jit
    def _product(a, b, UPCAST: tl.constexpr):
        """a b with float32 sums; float32 operands are not rounded to the tensor cores' TF32."""
        if UPCAST:              # Triton's interpreter multiplies bf16 wrongly (its issue #11584)
            a, b = a.to(tl.float32), b.to(tl.float32)
        return tl.dot(a, b, input_precision="ieee")

    @triton.jit(do_not_specialize=["T"])      # else compiled once more for T divisible by 16
    def _forward(q, k, v, o, lse, blocks, T, H: tl.constexpr, HKV: tl.constexpr, DH: tl.constexpr,
                 SCALE: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr,
                 STEP: tl.constexpr, UPCAST: tl.constexpr):
        # Grid (B * PARTS * H,), heads first: programs that run together read neighbouring memory.
        # A program reads its rows of q once, k and v of what they see, and writes o and lse.
        head = tl.program_id(0) % H
        start, end, prompt_start, prompt_end, own_start, _ = _read_block(
            blocks, tl.program_id(0) // H, PARTS, ROWS)
        if start >= end:
            return
        row = start + tl.arange(0, ROWS)                                         # [ROWS]
        q_tile = _load(q, start, end, head, H, DH, WIDTH, ROWS)                  # [ROWS, WIDTH]
        m = tl.full([ROWS], -float("inf"), tl.float32)     # the largest score so far
        total = tl.zeros([ROWS], tl.float32)               # Σ 2^(s - m)
        acc = tl.zeros([ROWS, WIDTH], tl.float32)          # Σ 2^(s - m) v
        # One loop over both ranges of keys: tiles of the prompt, then of the block's own segment.
        prompt_tiles = tl.cdiv(prompt_end - prompt_start, STEP)
        for i in range(0, prompt_tiles + tl.cdiv(end - own_start, STEP)):
            in_prompt = i < prompt_tiles
            first = tl.where(in_prompt, prompt_start + i * STEP,
                             own_start + (i - prompt_tiles) * STEP)
            last = tl.where(in_prompt, prompt_end, end)
            k_tile = _load(k, first, last, head // (H // HKV), HKV, DH, WIDTH, STEP)
            v_tile = _load(v, first, last, head // (H // HKV), HKV, DH, WIDTH, STEP)
            key = first + tl.arange(0, STEP)                                     # [STEP]
            s = _product(q_tile, tl.trans(k_tile), UPCAST) * (SCALE * 1.4426950408889634)
            s = tl.where(key[None] < tl.minimum(row + 1, last)[:, None], s, -float("inf"))
            # Finite from the first tile on, whose first key every row sees: no inf - inf below.
            m_new = tl.maximum(m, tl.max(s, 1))
            p = tl.exp2(s - m_new[:, None])                                      # [ROWS, STEP]
            shrink = tl.exp2(m - m_new)
            total = total * shrink + tl.sum(p, 1)
            acc = acc * shrink[:, None] + _product(p.to(v_tile.dtype), v_tile, UPCAST)
            m = m_new
        _store(o, acc / total[:, None], start, end, head, H, DH, WIDTH, ROWS)
        tl.store(lse + head * T + row, m + tl.log2(total), mask=row < end)

    @triton.jit(do_not_specialize=["T"])
    def _backward_q(q, k, v, o, do, lse, delta, dq, blocks, T, H: tl.constexpr, HKV: tl.constexpr,
                    DH: tl.constexpr, SCALE: tl.constexpr, WIDTH: tl.constexpr,
                    PARTS: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
                    UPCAST: tl.constexpr):
        # Grid and loop of the forward. Reads q, o, do once, k and v of what its rows see; writes dq
        # and, for the next kernel, delta.
        head = tl.program_id(0) % H
        start, end, prompt_start, prompt_end, own_start, _ = _read_block(
            blocks, tl.program_id(0) // H, PARTS, ROWS)
        if start >= end:
            return
        row = start + tl.arange(0, ROWS)                                         # [ROWS]
        do_tile = _load(do, start, end, head, H, DH, WIDTH, ROWS)                # [ROWS, WIDTH]
        o_tile = _load(o, start, end, head, H, DH, WIDTH, ROWS)
        row_delta = tl.sum(o_tile.to(tl.float32) * do_tile.to(tl.float32), 1)    # [ROWS]
        tl.store(delta + head * T + row, row_delta, mask=row < end)
        q_tile = _load(q, start, end, head, H, DH, WIDTH, ROWS)
        row_lse = tl.load(lse + head * T + row, mask=row < end, other=0.0)
        acc = tl.zeros([ROWS, WIDTH], tl.float32)
        prompt_tiles = tl.cdiv(prompt_end - prompt_start, STEP)
        for i in range(0, prompt_tiles + tl.cdiv(end - own_start, STEP)):
            in_prompt = i < prompt_tiles
            first = tl.where(in_prompt, prompt_start + i * STEP,
                             own_start + (i - prompt_tiles) * STEP)
            last = tl.where(in_prompt, prompt_end, end)
            k_tile = _load(k, first, last, head // (H // HKV), HKV, DH, WIDTH, STEP)
            v_tile = _load(v, first, last, head // (H // HKV), HKV, DH, WIDTH, STEP)
            key = first + tl.arange(0, STEP)                                     # [STEP]
            s = _product(q_tile, tl.trans(k_tile), UPCAST) * (SCALE * 1.4426950408889634)
            # a hidden score may lie far above lse: select after 2^, never multiply by 0
            p = tl.where(key[None] < tl.minimum(row + 1, last)[:, None],
                         tl.exp2(s - row_lse[:, None]), 0.0)                     # [ROWS, STEP]
            dp = _product(do_tile, tl.trans(v_tile), UPCAST)
            ds = p * (dp - row_delta[:, None])
            acc += _product(ds.to(k_tile.dtype), k_tile, UPCAST)
        _store(dq, acc * SCALE, start, end, head, H, DH, WIDTH, ROWS)

    @triton.jit(do_not_specialize=["T"])
    def _backward_kv(q, k, v, do, lse, delta, dk, dv, blocks, T, H: tl.constexpr,
                     HKV: tl.constexpr, DH: tl.constexpr, SCALE: tl.constexpr, WIDTH: tl.constexpr,
                     PARTS: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
                     UPCAST: tl.constexpr):
        # Grid (B * PARTS * HKV,): the block's positions are keys now. Reads k and v once, q and do
        # of what sees them, for every query head of the group; writes dk and dv. Scores are
        # transposed, keys down: pᵀ and dsᵀ go from registers into the products.
        key_head = tl.program_id(0) % HKV
        start, end, _prompt_start, _prompt_end, _own_start, seen_until = _read_block(
            blocks, tl.program_id(0) // HKV, PARTS, ROWS)
        if start >= end:
            return
        key = start + tl.arange(0, ROWS)                                         # [ROWS]
        k_tile = _load(k, start, end, key_head, HKV, DH, WIDTH, ROWS)            # [ROWS, WIDTH]
        v_tile = _load(v, start, end, key_head, HKV, DH, WIDTH, ROWS)
        dk_acc = tl.zeros([ROWS, WIDTH], tl.float32)
        dv_acc = tl.zeros([ROWS, WIDTH], tl.float32)
        for head in range(key_head * (H // HKV), (key_head + 1) * (H // HKV)):
            for i in range(0, tl.cdiv(seen_until - start, STEP)):
                first = start + i * STEP
                # Behind `seen_until` q, do, lse and delta are read as 0: such rows add 0 to the
                # sums. Places behind `end` are of keys read as 0; they are not stored.
                q_tile = _load(q, first, seen_until, head, H, DH, WIDTH, STEP)   # [STEP, WIDTH]
                do_tile = _load(do, first, seen_until, head, H, DH, WIDTH, STEP)
                row = first + tl.arange(0, STEP)                                 # [STEP]
                row_lse = tl.load(lse + head * T + row, mask=row < seen_until, other=0.0)
                row_delta = tl.load(delta + head * T + row, mask=row < seen_until, other=0.0)
                s = _product(k_tile, tl.trans(q_tile), UPCAST) * (SCALE * 1.4426950408889634)
                p = tl.where(key[:, None] <= row[None], tl.exp2(s - row_lse[None]), 0.0)
                dv_acc += _product(p.to(do_tile.dtype), do_tile, UPCAST)         # p: [ROWS, STEP]
                dp = _product(v_tile, tl.trans(do_tile), UPCAST)
                ds = p * (dp - row_delta[None])
                dk_acc += _product(ds.to(q_tile.dtype), q_tile, UPCAST)
        _store(dk, dk_acc * SCALE, start, end, key_head, HKV, DH, WIDTH, ROWS)
        _store(dv, dv_acc, start, end, key_head, HKV, DH, WIDTH, ROWS)

    INTERPRETED = not isinstance(_forward, triton.runtime.JITFunction)


def tile_sizes(dtype: torch.dtype, two_sums: bool, on_amd: bool) -> dict[str, int]:
    """Rows and steps of tiles, and the launch options with which no register spills.

    two_sums  whether the kernel holds two tiles of sums, as that of dk and dv does

    Of the sizes that do not spill (tests/kernels/test_tree_attention_code.py compiles these and
    looks), they were fastest on an H100 within 2 % (bench/README.md).
    """
    # Short steps: responses are short (45 tokens in HH), and several programs then fit a
    # multiprocessor. float32 tiles are smaller, because a product without tensor cores holds whole
    # rows in registers.
    rows, step = (32, 16) if dtype == torch.float32 else (64, 32)
    if on_amd:          # warps of 64 lanes; loading a step ahead takes registers that are not there
        return {"ROWS": rows, "STEP": step, "num_warps": 4, "num_stages": 1}
    if dtype == torch.float32:
        return {"ROWS": rows, "STEP": step, "num_warps": 8, "num_stages": 2}
    return {"ROWS": rows, "STEP": step, "num_warps": 4, "num_stages": 1 if two_sums else 3}


def _launch(kernel, heads: int, q: Tensor, k: Tensor, segments: TreeSegments, *tensors: Tensor,
            two_sums: bool = False) -> None:
    num_tokens, num_heads, head_dim = q.shape
    sizes = tile_sizes(q.dtype, two_sums, torch.version.hip is not None)
    parts = BLOCK // sizes["ROWS"]
    programs = len(segments.blocks) * parts * heads
    if programs:
        with torch.cuda.device_of(q):           # Triton launches on the current device
            kernel[(programs,)](
                *tensors, segments.blocks, num_tokens, H=num_heads, HKV=k.shape[1], DH=head_dim,
                SCALE=head_dim ** -0.5, WIDTH=max(16, triton.next_power_of_2(head_dim)),
                PARTS=parts, UPCAST=INTERPRETED, **sizes)


# ---- the function -------------------------------------------------------------------------------

class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, segments):
        o = torch.empty_like(q)                                                  # [T, H, Dh]
        lse = torch.empty(q.shape[1], len(q), dtype=torch.float32, device=q.device)    # [H, T]
        _launch(_forward, q.shape[1], q, k, segments, q, k, v, o, lse)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.segments = segments
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        q, k, v, o, lse = ctx.saved_tensors
        do = do.contiguous()                      # the gradient of a sum is one number, expanded
        delta = torch.empty_like(lse)                                            # [H, T]
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        _launch(_backward_q, q.shape[1], q, k, ctx.segments, q, k, v, o, do, lse, delta, dq)
        _launch(_backward_kv, k.shape[1], q, k, ctx.segments, q, k, v, do, lse, delta, dk, dv,
                two_sums=True)
        return dq, dk, dv, None


def tree_attention_problem(device_type: str) -> str:
    """Why `tree_attention` cannot run on a type of device; "" if nothing is known against it."""
    if triton is None:
        first_line = f"{type(IMPORT_ERROR).__name__}: {IMPORT_ERROR}".splitlines()[0]
        return f"Triton cannot be imported ({first_line})"
    if device_type != "cuda" and not INTERPRETED:
        return f"the tensors are on a {device_type}, Triton needs a GPU (or TRITON_INTERPRET=1)"
    return ""


def _check(q, k, v, segments):
    if problem := tree_attention_problem(q.device.type):
        raise ValueError(f"tree_attention cannot run: {problem}")
    if q.ndim != 3 or k.ndim != 3 or k.shape != v.shape or q.shape[::2] != k.shape[::2]:
        raise ValueError(f"q is {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}; expected "
                         "[T, H, Dh] and twice [T, Hkv, Dh]")
    if q.shape[1] % k.shape[1] or q.shape[2] > MAX_HEAD_DIM:
        raise ValueError(f"q is {list(q.shape)}, k {list(k.shape)}; expected a multiple of k's "
                         f"heads, and heads of at most {MAX_HEAD_DIM} (train.py --kernels torch "
                         "takes any)")
    if q.dtype not in (torch.float32, torch.bfloat16) or {k.dtype, v.dtype} != {q.dtype}:
        raise ValueError(f"q is {q.dtype}, k {k.dtype}, v {v.dtype}; expected all float32 or all "
                         "bfloat16")
    if {k.device, v.device, segments.blocks.device} != {q.device}:
        raise ValueError(f"q is on {q.device}, k on {k.device}, v on {v.device}, the segments on "
                         f"{segments.blocks.device}; expected one device")
    if segments.num_tokens != len(q):
        raise ValueError(f"q has {len(q)} rows, the segments are of {segments.num_tokens} tokens")


def tree_attention(q: Tensor, k: Tensor, v: Tensor, segments: TreeSegments) -> Tensor:
    """softmax(q kᵀ / sqrt(Dh)) v over the positions that each position of a stream sees.

    q         [T, H, Dh]     float32 or bfloat16; Dh at most 128, other than a power of two padded
    k, v      [T, Hkv, Dh]   H a multiple of Hkv: grouped-query attention
    segments  TreeSegments   of `tree_blocks`
    returns   [T, H, Dh]     all sums are float32; layouts other than contiguous are copied first
    raises    ValueError     where Triton cannot run, and on what does not fit
    """
    _check(q, k, v, segments)
    return _TreeAttention.apply(q.contiguous(), k.contiguous(), v.contiguous(), segments)
