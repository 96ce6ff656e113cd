"""The kernels of layers.py without a GPU: run by the interpreter, compiled for GPUs, refused."""
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from test_kernel_code import amd_resources, cuda_resources
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels import layers
from kernels.layers import (
    rms_norm,
    rms_norm_torch,
    rms_norm_triton,
    rotary,
    rotary_torch,
    rotary_triton,
    swiglu,
    swiglu_torch,
    swiglu_triton,
)

triton = pytest.importorskip("triton")
tl = triton.language


def test_every_layer_test_passes_in_the_interpreter():
    # The interpreter must be chosen before the kernels are defined, hence another process.
    files = [str(ROOT / "tests/kernels" / name) for name in ("test_layers.py",
                                                             "test_layers_model.py")]
    run = subprocess.run([sys.executable, "-m", "pytest", "-o", "addopts=", "-p",
                          "no:cacheprovider", *files], cwd=ROOT, text=True, capture_output=True,
                         env=os.environ | {"TRITON_INTERPRET": "1"})
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"= \d+ passed in", run.stdout), run.stdout               # and none skipped


# ---- compiled ahead of time ---------------------------------------------------------------------

def compile_kernel(kernel, target, dtype, constants, num_warps):
    """The kernel as its wrapper would launch it: aligned pointers and strides."""
    from triton.compiler import ASTSource
    order = [p.name for p in kernel.params]
    types = {"scale": "*fp32", "grad_weight": "*fp32", "num_rows": "i32", "num_elements": "i32"}
    types |= {name: "i32" for name in order if "_stride_" in name}
    signature = {name: "constexpr" if name in constants else types.get(name, f"*{dtype}")
                 for name in order}
    aligned = {(order.index(name),): [["tt.divisibility", 16]] for name in order
               if name not in (*constants, "num_rows")}
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=target, options={"num_warps": num_warps})


def norm(width, **constants):
    block = layers._row_block(width)
    return {"D": width, "BLOCK_D": block["BLOCK_D"], **constants}, block["num_warps"]


def heads(h, h_kv, head_dim):
    block_h, block_kv, block_half = map(triton.next_power_of_2, (h, h_kv, head_dim // 2))
    return {"WIDE": tl.float32, "H": h, "BLOCK_H": block_h, "H_KV": h_kv, "BLOCK_KV": block_kv,
            "HALF": head_dim // 2, "BLOCK_HALF": block_half, "BACKWARD": True
            }, min(8, max(1, block_h * block_half // 256))


ELEMENTS = {"WIDE": tl.float32, "BLOCK": layers.SWIGLU_BLOCK}, 8
FROZEN = {"ROWS": 1, "grad_weight": None}
TRAINED = {"ROWS": layers.NORM_ROWS}
# kernel, dtype, (constants, warps), 128-bit loads and stores at least, registers at most. Of 40, 64
# and 128 registers an SM's 65,536 hold six, four and two programs of eight warps.
KERNELS = {
    "norm, forward": ("_rms_norm_forward", "bf16", norm(4096, EPS=1e-5), 6, 4, 40),
    "norm, forward, D = 8192": ("_rms_norm_forward", "bf16", norm(8192, EPS=1e-5), 6, 4, 40),
    "norm, backward": ("_rms_norm_backward", "bf16", norm(4096, **FROZEN), 8, 2, 64),
    "norm, backward, trained": ("_rms_norm_backward", "bf16", norm(8192, **TRAINED), 8, 6, 128),
    "norm, backward, trained, fp32": ("_rms_norm_backward", "fp32", norm(8192, **TRAINED), 16, 8,
                                      128),
    "rotary": ("_rotary", "bf16", heads(32, 32, 128), 6, 4, 48),
    "rotary, grouped": ("_rotary", "bf16", heads(64, 8, 128), 6, 4, 64),
    "rotary, Dh = 96": ("_rotary", "bf16", heads(32, 32, 96), 6, 4, 64),
    "swiglu, forward": ("_swiglu_forward", "bf16", ELEMENTS, 2, 1, 40),
    "swiglu, backward": ("_swiglu_backward", "bf16", ELEMENTS, 3, 2, 40),
}


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("name", KERNELS)
def test_compiled_kernel_has_no_spills_and_wide_accesses(name, arch, tmp_path, monkeypatch,
                                                         capsys):
    # What an A100, an H100 and an MI300 would run, from Triton's own compiler and assembler.
    from triton.backends.compiler import GPUTarget
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    kernel, dtype, (constants, num_warps), loads, stores, registers = KERNELS[name]
    on_amd = arch == "gfx942"
    target = GPUTarget("hip", arch, 64) if on_amd else GPUTarget("cuda", int(arch[3:]), 32)
    compiled = compile_kernel(getattr(layers, kernel), target, dtype, constants, num_warps)
    found = amd_resources(compiled) if on_amd else cuda_resources(compiled, tmp_path)
    with capsys.disabled():
        print(f"\n{arch:6} {name:29}", ", ".join(f"{key} {value}" for key, value in found.items()),
              end="")
    assert found["spilled"] == found["spill code"] == 0
    assert found["registers"] <= registers
    assert found["shared"] <= 32768             # of 160 kB and more; of AMD's 64 kB a half
    if not on_amd:                              # whose 64 lanes a warp need 64 bits each
        assert found["wide loads"] >= loads and found["wide stores"] >= stores


# ---- which one runs; missing, broken, misused ---------------------------------------------------

def small_inputs(device="cpu"):
    """A call of each function: its name, plain torch's, and arguments."""
    x, weight = torch.ones(3, 8, device=device), torch.ones(8, device=device)
    q, cos = torch.ones(3, 2, 4, device=device), torch.ones(3, 1, 2, device=device)
    return [(rms_norm, rms_norm_torch, rms_norm_triton, (x, weight, 1e-5, x)),
            (rotary, rotary_torch, rotary_triton, (q, q, cos, cos)),
            (swiglu, swiglu_torch, swiglu_triton, (x, x))]


def test_a_cpu_runs_plain_torch(monkeypatch):
    # Not a kernel, and not a check of Triton.
    monkeypatch.setattr(layers, "triton_problem", None)
    for function, by_torch, _, arguments in small_inputs():
        found, expected = function(*arguments), by_torch(*arguments)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_kernels_on_a_cpu_are_refused():
    # They would end deep in a driver: "0 active drivers".
    for _, _, by_triton, arguments in small_inputs():
        with pytest.raises(ValueError, match=f"{by_triton.__name__} cannot run: .* needs a GPU"):
            by_triton(*arguments)


def test_a_broken_triton_is_an_error_on_a_gpu_and_not_a_slower_run(monkeypatch):
    # The tensors are fake CUDA tensors: they need no GPU.
    monkeypatch.setattr(layers, "triton_problem", lambda device_type: f"{device_type}: no ptxas")
    with FakeTensorMode():
        for function, _, by_triton, arguments in small_inputs("cuda"):
            with pytest.raises(ValueError, match=f"^{by_triton.__name__} cannot run: cuda: no ptx"):
                function(*arguments)


def test_where_triton_is_not_installed_a_gpu_runs_plain_torch(monkeypatch):
    # `--kernels torch` promises it; that the default needs Triton, the log-probs' kernel says.
    monkeypatch.setattr(layers, "triton", None)
    with FakeTensorMode():
        for function, by_torch, _, arguments in small_inputs("cuda"):
            assert [t.shape for t in function(*arguments)] == [
                t.shape for t in by_torch(*arguments)]


def test_without_triton_the_module_still_works(tmp_path):
    # A machine without Triton (macOS): the import succeeds, torch runs, the error gives the reason.
    (tmp_path / "triton.py").write_text("raise ImportError('no wheel for this machine')\n")
    code = ("import torch; from kernels.layers import swiglu, swiglu_triton\n"
            "print(swiglu(torch.zeros(2), torch.ones(2)).tolist())\n"
            "try:\n    swiglu_triton(torch.zeros(2), torch.ones(2))\n"
            "except ValueError as error:\n    print(error)\n")
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                         env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"})
    assert run.stdout.splitlines() == [
        "[0.0, 0.0]", "swiglu_triton cannot run: Triton cannot be imported (ImportError: no wheel "
        "for this machine)"], run.stderr


x, q, angles = torch.ones(3, 8), torch.ones(3, 2, 4), torch.ones(3, 1, 2)
REFUSALS = {                      # a call, the error's words
    "a weight of another width": (rms_norm_triton, (x, torch.ones(7), 1e-5),
                                  r"x is \[3, 8\], weight \[7\], added None; expected \[T, D\], "),
    "no matrix": (rms_norm_triton, (torch.ones(8), torch.ones(8), 1e-5), r"x is \[8\], weight"),
    "a branch of another shape": (rms_norm_triton, (x, torch.ones(8), 1e-5, torch.ones(2, 8)),
                                  r"added \[2, 8\]; expected"),
    "a row too wide": (rms_norm_triton, (torch.ones(1, 8193), torch.ones(8193), 1e-5),
                       "with D at most 8192"),
    "a weight of another dtype": (rms_norm_triton, (x.bfloat16(), torch.ones(8), 1e-5),
                                  "x is torch.bfloat16 on cpu, weight is torch.float32 on cpu;"),
    "integers": (swiglu_triton, (x.long(), x.long()), "gate is torch.int64 on cpu"),
    "another device": (swiglu_triton, (x, x.to("meta")), "up is torch.float32 on meta; expected"),
    "unlike halves": (swiglu_triton, (x, x[:2]), r"gate is \[3, 8\], up \[2, 8\]; expected the"),
    "k of another length": (rotary_triton, (q, q[:2], angles, angles),
                            r"q is \[3, 2, 4\], k \[2, 2, 4\], cos"),
    "k of another head size": (rotary_triton, (q, torch.ones(3, 2, 6), angles, angles),
                               r"k \[3, 2, 6\], cos"),
    "angles of all heads": (rotary_triton, (q, q, torch.ones(3, 2, 2), angles), r"cos \[3, 2, 2\]"),
    "angles of another size": (rotary_triton, (q, q, angles, torch.ones(3, 1, 4)),
                               r"sin \[3, 1, 4\]; expected"),
    "an odd head": (rotary_triton, (torch.ones(3, 2, 5), torch.ones(3, 2, 5), angles, angles),
                    "with Dh even"),
    "flat heads": (rotary_triton, (torch.ones(3, 4), torch.ones(3, 4), angles, angles), "expected"),
}


@pytest.mark.parametrize("function, arguments, message", REFUSALS.values(), ids=REFUSALS)
def test_bad_input_is_refused_by_name(monkeypatch, function, arguments, message):
    # A kernel would read outside its tensors.
    monkeypatch.setattr(layers, "triton_problem", lambda device_type: "")
    with pytest.raises(ValueError, match=message):
        function(*arguments)
