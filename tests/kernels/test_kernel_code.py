"""The Triton kernel without a GPU: run by the interpreter, compiled for GPUs, missing or broken."""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels import choose_linear_logps, linear_logps_torch, linear_logps_triton
from kernels import linear_logps as linear_logps_default

kernel_file = sys.modules["kernels.linear_logps"]
ROOT = Path(__file__).parents[2]
triton = pytest.importorskip("triton")


def test_every_kernel_test_passes_in_the_interpreter():
    # The tests of linear_logps once more, with the Triton kernel's function: the interpreter must
    # be chosen before the kernel is defined, hence another process.
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider",
               *sorted(map(str, (ROOT / "tests/kernels").glob("test_linear_logps*.py")))]
    run = subprocess.run(command, cwd=ROOT, text=True, capture_output=True,
                         env=os.environ | {"TRITON_INTERPRET": "1"})
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"= \d+ passed in", run.stdout), run.stdout               # and none skipped


# ---- compiled ahead of time ---------------------------------------------------------------------

def compile_kernel(target, dtype, vocab, error, extras):
    """The compiled kernel as the wrapper would launch it: aligned pointers and row stride."""
    from triton.compiler import ASTSource
    kernel = kernel_file._logp_rows
    padded = -(-vocab // 16) * 16
    signature = {"logits": f"*{dtype}", "labels": "*i64", "logps": "*fp32", "entropy": "*fp32",
                 "kl": "*fp32", "num_policy": "i32", "row_stride": "i32"}
    constants = {"V": vocab, "PADDED_V": padded, "BLOCK_V": kernel_file.BLOCK_V,
                 "WANT_ERROR": error, "WANT_ENTROPY": extras, "WANT_KL": extras}
    if not extras:
        constants |= {"entropy": None, "kl": None}
    order = [p.name for p in kernel.params]
    signature = {name: "constexpr" if name in constants else signature[name] for name in order}
    aligned = {(order.index(name),): [["tt.divisibility", 16]] for name in order
               if name not in constants and name != "num_policy"}
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=target, options={"num_warps": 8})


def cuda_resources(compiled, tmp_path) -> dict:
    """Registers, spilled bytes, shared memory and 128-bit accesses of a cubin."""
    file = tmp_path / "kernel.cubin"
    file.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage, code = (subprocess.run([tool, flag, file], capture_output=True, text=True,
                                  check=True).stdout for flag in ("-res-usage", "-sass"))
    numbers = {key: int(re.search(rf"{key}:(\d+)", usage)[1])
               for key in ("REG", "STACK", "LOCAL", "SHARED")}
    return {"registers": numbers["REG"], "spilled": numbers["STACK"] + numbers["LOCAL"],
            "shared": max(numbers["SHARED"], compiled.metadata.shared),
            "spill code": len(re.findall(r"\b(?:STL|LDL)\b", code)),
            "wide loads": code.count("LDG.E.128"), "wide stores": code.count("STG.E.128")}


def amd_resources(compiled) -> dict:
    code = compiled.asm["amdgcn"]
    numbers = {key: int(re.search(rf"\.{key}:\s*(\d+)", code)[1])
               for key in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count")}
    return {"registers": numbers["vgpr_count"],
            "spilled": numbers["vgpr_spill_count"] + numbers["sgpr_spill_count"],
            "shared": compiled.metadata.shared, "spill code": len(re.findall("scratch_", code)),
            "wide loads": len(re.findall(r"(?:global|buffer)_load_dwordx4", code)),
            "wide stores": len(re.findall(r"(?:global|buffer)_store_dwordx4", code))}


# 8 warps share 65,536 registers with their neighbours: five programs fit an SM up to 51 of them,
# three up to 80. Rows of 32001 (a model with an added token) must be read as fast as rows of 32000.
KERNELS = {                       # dtype, V, onehot - softmax?, entropy and KL?, registers at most
    "training, bf16": ("bf16", 32000, True, False, 51),
    "training, bf16, odd V": ("bf16", 32001, True, False, 51),
    "training, fp32": ("fp32", 32000, True, False, 51),
    "reference, bf16": ("bf16", 32000, False, False, 51),
    "evaluation, bf16": ("bf16", 32000, False, True, 80),
}


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("name", KERNELS)
def test_compiled_kernel_has_no_spills_and_wide_accesses(name, arch, tmp_path, monkeypatch,
                                                         capsys):
    # What an A100, an H100 and an MI300 would run, from Triton's own compiler and assembler.
    from triton.backends.compiler import GPUTarget
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    dtype, vocab, error, extras, registers = KERNELS[name]
    on_amd = arch == "gfx942"
    target = GPUTarget("hip", arch, 64) if on_amd else GPUTarget("cuda", int(arch[3:]), 32)
    compiled = compile_kernel(target, dtype, vocab, error, extras)
    found = amd_resources(compiled) if on_amd else cuda_resources(compiled, tmp_path)
    with capsys.disabled():
        print(f"\n{arch:6} {name:22}", ", ".join(f"{key} {value}" for key, value in found.items()),
              end="")
    assert found["spilled"] == found["spill code"] == 0
    # (an AMD program's waves are limited by 512 registers a lane: eight fit up to 64 of them)
    assert found["registers"] <= (64 if on_amd else registers)
    assert found["shared"] <= 2048
    # one row read for the log-sum-exp, one for the rest (two for KL's second model)
    assert found["wide loads"] >= (1 + (error or extras)) * (2 if extras else 1)
    assert (found["wide stores"] > 0) == error


# ---- missing, broken, or asked for where it cannot run ------------------------------------------

def small_rows():
    return (torch.ones(2, 4), torch.ones(1, 4), torch.eye(5, 4), torch.tensor([0, 4]),
            torch.tensor([3]))


def test_a_cpu_gets_plain_torch_and_prints_nothing(capsys):
    # On a CPU the default is the specification.
    assert choose_linear_logps("auto", "cpu") is linear_logps_torch
    assert choose_linear_logps("torch", "cuda") is linear_logps_torch
    ours, expected = linear_logps_default(*small_rows()), linear_logps_torch(*small_rows())
    assert torch.equal(ours.policy_logps, expected.policy_logps)
    assert torch.equal(ours.reference_logps, expected.reference_logps)
    assert ours[2:] == expected[2:] == (None, None)
    assert capsys.readouterr().out == ""


def test_triton_asked_for_on_a_cpu_is_refused():
    # It would end deep in a driver: "0 active drivers".
    with pytest.raises(ValueError, match="Triton needs a GPU"):
        linear_logps_triton(*small_rows())
    with pytest.raises(ValueError, match="asked for and cannot run: .* Triton needs a GPU"):
        choose_linear_logps("triton", "cpu")


def test_a_broken_triton_is_an_error_on_a_gpu_and_not_a_slower_run(monkeypatch):
    # The trial launch fails (no compiler, no driver, another numpy): one sentence with the reason,
    # for the default too. The rows are fake CUDA tensors: they need no GPU.
    def broken(*arguments):
        raise OSError("ptxas: not found\nand more")
    monkeypatch.setattr(kernel_file, "logp_rows_triton_", broken)
    monkeypatch.setattr(kernel_file, "_logp_rows", object())           # as if it could run here
    kernel_file.triton_problem.cache_clear()
    reason = "a trial launch failed (OSError: ptxas: not found)"
    assert kernel_file.triton_problem("cpu") == reason
    kernel_file.triton_problem.cache_clear()
    monkeypatch.setattr(kernel_file, "triton_problem", lambda device_type: reason)
    advice = "--kernels torch works without it"
    with pytest.raises(ValueError, match="the default on a GPU and cannot run: ") as default:
        choose_linear_logps("auto", "cuda")
    assert str(default.value).endswith(f"{reason}; {advice}")
    with pytest.raises(ValueError, match="asked for and cannot run: ") as asked:
        choose_linear_logps("triton", "cuda")
    assert str(asked.value).endswith(f"{reason}; {advice}")
    assert choose_linear_logps("torch", "cuda") is linear_logps_torch
    with FakeTensorMode():
        rows = [torch.ones(t.shape, dtype=t.dtype, device="cuda") for t in small_rows()]
        for function in (linear_logps_default, linear_logps_triton):
            with pytest.raises(ValueError, match="cannot run: a trial launch failed"):
                function(*rows)


def test_a_kernel_that_gives_wrong_numbers_is_not_used(monkeypatch):
    # The trial's result is known, -log 16: a launch that does nothing does not pass.
    monkeypatch.setattr(kernel_file, "logp_rows_triton_",
                        lambda logits, labels, num_policy, logps, *rest: logps.fill_(-1))
    monkeypatch.setattr(kernel_file, "_logp_rows", object())
    kernel_file.triton_problem.cache_clear()
    try:
        assert kernel_file.triton_problem("cpu") == (
            "a trial of 16 equal logits gave -1.0, not -log 16")
    finally:
        kernel_file.triton_problem.cache_clear()


def test_without_triton_the_module_still_works(tmp_path):
    # A machine without Triton (macOS): the import succeeds, torch runs, the error gives the reason.
    (tmp_path / "triton.py").write_text("raise ImportError('no wheel for this machine')\n")
    code = ("import torch; from kernels import linear_logps, linear_logps_triton\n"
            "rows = (torch.ones(2, 4), torch.ones(1, 4), torch.eye(5, 4), torch.tensor([0, 4]),\n"
            "        torch.tensor([3]))\n"
            "print(linear_logps(*rows).policy_logps.shape)\n"
            "try:\n    linear_logps_triton(*rows)\n"
            "except ValueError as error:\n    print(error)\n")
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                         env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"})
    assert run.stdout.splitlines() == [
        "torch.Size([2])", "linear_logps_triton cannot run: Triton cannot be imported "
        "(ImportError: no wheel for this machine)"], run.stderr
