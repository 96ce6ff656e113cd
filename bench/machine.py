"""What a number depends on beside the code, and peak memory. Imports no torch unless on a GPU."""
import platform
import re
import resource
import sys
from pathlib import Path


def cpuinfo() -> str:
    """/proc/cpuinfo; "" where the system has none."""
    file = Path("/proc/cpuinfo")
    return file.read_text() if file.exists() else ""


def cpu_name() -> str:
    found = re.search(r"model name\s*: (.*)", cpuinfo())
    return found[1] if found else platform.processor()


def bf16_instructions() -> list[str]:
    """Those of this CPU; without any, torch multiplies bf16 matrices many times slower."""
    return sorted(set(re.findall(r"avx512_bf16|amx_bf16", cpuinfo())))


def peak_gb(device: str) -> float:
    """1e9 bytes: the most that tensors took on the GPU or, on a CPU, that this process had
    resident at any time, libraries and weights included."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024                   # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
