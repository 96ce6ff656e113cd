"""tree_attention without a GPU: its blocks, its kernels interpreted and compiled, its refusals."""
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from attention_rule import rule_mask, stream_ids
from test_kernel_code import amd_resources, cuda_resources

import kernels.tree_attention as tree_file
from kernels.tree_attention import (
    BLOCK,
    TreeSegments,
    tile_sizes,
    tree_attention,
    tree_attention_problem,
    tree_blocks,
)

ROOT = Path(__file__).parents[2]
triton = pytest.importorskip("triton")


def version(module):
    return tuple(int(number) for number in module.__version__.split(".")[:2])


@pytest.mark.skipif(version(triton) < (3, 7) and version(numpy) >= (2, 4),
                    reason="this Triton's interpreter cannot loop with this numpy (triton #9171)")
def test_every_test_of_the_kernels_passes_in_the_interpreter():
    # The interpreter must be chosen before the kernels are defined, hence another process.
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider",
               str(ROOT / "tests/kernels/test_tree_attention.py")]
    run = subprocess.run(command, cwd=ROOT, text=True, capture_output=True,
                         env=os.environ | {"TRITON_INTERPRET": "1"})
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"= \d+ passed", run.stdout) and "skipped" not in run.stdout, run.stdout


# ---- blocks -------------------------------------------------------------------------------------

def test_blocks_by_hand():
    # Two trees, x = 70 tokens with responses of 3 and 65, then x = 1 with one of 1. A block is
    # first position, end; prompt seen before the own tokens; own start; end of what sees it.
    blocks = tree_blocks(*stream_ids([(70, [3, 65]), (1, [1])]))
    assert blocks.dtype == torch.int32
    assert blocks.tolist() == [
        [0, 64, 0, 0, 0, 138], [64, 70, 0, 0, 0, 138],
        [70, 73, 0, 70, 70, 73],
        [73, 137, 0, 70, 73, 138], [137, 138, 0, 70, 73, 138],
        [138, 139, 138, 138, 138, 140],
        [139, 140, 138, 139, 139, 140]]


@pytest.mark.parametrize("seed", range(4))
def test_blocks_are_the_rule_for_rows_and_for_keys(seed):
    # Every position is in one block; what the kernels read off the table is the rule's mask, once
    # from the side of the rows (o, dq) and once from that of the keys (dk, dv).
    rng = random.Random(seed)
    ids = stream_ids([(rng.choice([1, 5, 63, 64, 65, 130]),
                       [rng.choice([1, 9, 64, 70]) for _ in range(rng.randint(0, 4))])
                      for _ in range(2)])
    size = len(ids[0])
    of_rows, of_keys = torch.zeros(2, size, size, dtype=torch.bool)
    positions = []
    for start, end, prompt_start, prompt_end, own_start, seen_until in tree_blocks(*ids).tolist():
        assert 0 < end - start <= BLOCK
        positions += range(start, end)
        for i in range(start, end):
            of_rows[i, prompt_start:prompt_end] = True
            of_rows[i, own_start:i + 1] = True
            of_keys[i:seen_until, i] = True
    assert positions == list(range(size))
    assert torch.equal(of_rows, rule_mask(*ids)) and torch.equal(of_keys, rule_mask(*ids))


@pytest.mark.parametrize("branch_ids, message", [
    ([0, 1, 0], "tree 7: branch 0 begins again at position 4; expected the prompt, then response"),
    ([0, 1, 2, 1], "tree 7: branch 1 begins again at position 5"),
    ([1, 0], "tree 7: branch 0 begins again at position 3"),
])
def test_trees_that_are_no_prompt_and_then_responses_are_refused(branch_ids, message):
    # The rule could be computed for them, two ranges per row could not describe it.
    with pytest.raises(ValueError, match=message):
        tree_blocks([6, 6, *[7] * len(branch_ids)], [0, 1, *branch_ids])


# ---- compiled ahead of time ---------------------------------------------------------------------

def compile_kernel(name, target, dtype, heads, kv_heads, head_dim):
    """A kernel as `_launch` would launch it, on aligned tensors."""
    from triton.compiler import ASTSource
    kernel = getattr(tree_file, name)
    order = [p.name for p in kernel.params]
    sizes = tile_sizes(dtype, name == "_backward_kv", target.backend == "hip")
    constants = {"H": heads, "HKV": kv_heads, "DH": head_dim, "SCALE": head_dim ** -0.5,
                 "WIDTH": triton.next_power_of_2(head_dim), "UPCAST": False,
                 "PARTS": BLOCK // sizes["ROWS"], "ROWS": sizes["ROWS"], "STEP": sizes["STEP"]}
    pointer = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}[dtype]
    types = {"lse": "*fp32", "delta": "*fp32", "blocks": "*i32", "T": "i32"}
    signature = {name: "constexpr" if name in constants else types.get(name, pointer)
                 for name in order}
    aligned = {(order.index(name),): [["tt.divisibility", 16]] for name in order
               if name not in constants and name != "T"}
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=target, options={
        name: sizes[name] for name in ("num_warps", "num_stages")}), sizes["num_warps"]


SHAPES = {                       # dtype, heads, key heads, Dh
    "bf16, Dh 128": (torch.bfloat16, 32, 32, 128),
    "bf16, Dh 128, grouped": (torch.bfloat16, 32, 8, 128),
    "bf16, Dh 96": (torch.bfloat16, 32, 32, 96),
    "fp32, Dh 128": (torch.float32, 32, 32, 128),
}


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("shape", SHAPES)
def test_compiled_kernels_have_no_spills(shape, arch, tmp_path, monkeypatch, capsys):
    # What an A100, an H100 and an MI300 would run, from Triton's own compiler and assembler.
    from triton.backends.compiler import GPUTarget
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    on_amd = arch == "gfx942"
    target = GPUTarget("hip", arch, 64) if on_amd else GPUTarget("cuda", int(arch[3:]), 32)
    for name in ("_forward", "_backward_q", "_backward_kv"):
        compiled, warps = compile_kernel(name, target, *SHAPES[shape])
        found = amd_resources(compiled) if on_amd else cuda_resources(compiled, tmp_path)
        with capsys.disabled():
            print(f"\n{arch:6} {shape:22} {name:12}",
                  ", ".join(f"{key} {value}" for key, value in found.items()), end="")
        # (in float32 the assembler of some versions gives 8 bytes for one more program at a time)
        assert found["spilled"] <= (8 if SHAPES[shape][0] == torch.float32 else 0)
        assert found["wide loads"] > 0
        # Rounded to bf16 are p and ds, which enter products, and what is stored: no sum is.
        rounded = {"_forward": 2, "_backward_q": 2, "_backward_kv": 4}[name]
        assert compiled.asm["ttir"].count("arith.truncf") == (
            rounded if SHAPES[shape][0] == torch.bfloat16 else 0)
        if on_amd:              # 512 registers a lane, 64 KB
            assert found["registers"] <= 512 and found["shared"] <= 64 * 1024
        else:
            # Two programs fit a multiprocessor of 65,536 registers, given out by eights, and 164 KB
            # of shared memory (an A100's). Consumers' cards have 99 KB.
            programs = 65536 // (32 * warps * -(-found["registers"] // 8) * 8)
            assert programs >= 2
            assert found["shared"] <= 99 * 1024 and 2 * (found["shared"] + 1024) <= 164 * 1024


# ---- refusals -----------------------------------------------------------------------------------

@pytest.fixture
def anywhere(monkeypatch):
    """As if the kernels could run here: what is wrong with the tensors is found before."""
    monkeypatch.setattr(tree_file, "INTERPRETED", True)


def test_a_cpu_is_refused():
    assert "a cpu, Triton needs a GPU (or TRITON_INTERPRET=1)" in tree_attention_problem("cpu")
    assert tree_attention_problem("cuda") == ""
    q = torch.zeros(1, 2, 16)
    with pytest.raises(ValueError, match="tree_attention cannot run: .* Triton needs a GPU"):
        tree_attention(q, q, q, TreeSegments(tree_blocks([0], [0]), 1))


REFUSALS = {                      # shapes and dtypes of q, k and v, tokens, and the error's words
    "a matrix": ([(3, 16), (3, 2, 16), (3, 2, 16)], {}, 3,
                 r"q is \[3, 16\], k \[3, 2, 16\], v \[3, 2, 16\]; expected \[T, H, Dh\] and"),
    "k is not as v": ([(3, 2, 16), (3, 2, 16), (3, 1, 16)], {}, 3, r"v \[3, 1, 16\]; expected"),
    "width": ([(3, 2, 16), (3, 2, 32), (3, 2, 32)], {}, 3, r"k \[3, 2, 32\], v .*; expected"),
    "rows": ([(3, 2, 16), (4, 2, 16), (4, 2, 16)], {}, 3, r"k \[4, 2, 16\], v .*; expected"),
    "heads": ([(3, 4, 16), (3, 3, 16), (3, 3, 16)], {}, 3, "expected a multiple of k's heads"),
    "too wide": ([(3, 2, 129)] * 3, {}, 3, "and heads of at most 128 .train.py --kernels torch takes"),
    "float64": ([(3, 2, 16)] * 3, {0: torch.float64, 1: torch.float64, 2: torch.float64}, 3,
                "q is torch.float64, .* expected all float32 or all bfloat16"),
    "mixed": ([(3, 2, 16)] * 3, {2: torch.bfloat16}, 3, "v torch.bfloat16; expected all float32"),
    "another stream": ([(3, 2, 16)] * 3, {}, 4, "q has 3 rows, the segments are of 4 tokens"),
}


@pytest.mark.parametrize("shapes, dtypes, tokens, message", REFUSALS.values(), ids=REFUSALS)
def test_bad_input_is_refused_by_name(anywhere, shapes, dtypes, tokens, message):
    q, k, v = (torch.zeros(shape, dtype=dtypes.get(i)) for i, shape in enumerate(shapes))
    segments = TreeSegments(tree_blocks([0] * tokens, [0] * tokens), tokens)
    with pytest.raises(ValueError, match=message):
        tree_attention(q, k, v, segments)


def test_tensors_on_several_devices_are_refused(anywhere):
    q = torch.zeros(3, 2, 16)
    segments = TreeSegments(tree_blocks([0] * 3, [0] * 3).to("meta"), 3)
    with pytest.raises(ValueError, match="q is on cpu, k on cpu, v on cpu, the segments on meta"):
        tree_attention(q, q, q, segments)


def test_without_triton_the_other_ways_still_work(tmp_path):
    # A machine without Triton (macOS): the import succeeds, and the error gives the reason.
    (tmp_path / "triton.py").write_text("raise ImportError('no wheel for this machine')\n")
    code = ("from kernels.attention import choose_attention\n"
            "print(choose_attention('auto', 'cpu'))\n"
            "try:\n    choose_attention('tree', 'cuda')\n"
            "except ValueError as error:\n    print(error)\n")
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                         env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"})
    assert run.stdout.splitlines() == [
        "dense", "tree attention cannot run: Triton cannot be imported (ImportError: no wheel "
        "for this machine); train.py --kernels torch runs everywhere"], run.stderr
