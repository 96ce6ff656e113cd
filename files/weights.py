"""Weight files of a Hugging Face folder: found, read tensor by tensor, checked, written.

    model.safetensors     or   model-00001-of-00003.safetensors, …   model.safetensors.index.json
    pytorch_model.bin     or   pytorch_model-00001-of-00003.bin, …   pytorch_model.bin.index.json

The first of these four that is there is read (transformers' order). Files are memory-mapped, one
open at a time: a tensor goes from disk straight into its final dtype and place, so loading takes
the memory of one model; values that are not finite are refused on the way. A tensor that is wanted
on the CPU in the file's own dtype stays the file's pages, copied on write. Nothing that a .bin
pickles is ever executed.
"""
import math
import os
import re
import sys
import time
from collections.abc import Callable, Collection, Iterator

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from files.cli import time_left
from files.folders import what_it_is
from files.text import likely_cause, read_json, write_json, writing

SHARD_BYTES = 5_000_000_000
PROGRESS_SECONDS = 5.0       # between two progress lines
NAMES = ["model.safetensors", "model.safetensors.index.json",
         "pytorch_model.bin", "pytorch_model.bin.index.json"]
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


# ---- reading ------------------------------------------------------------------------------------

def indexed_files(index: str) -> list[str]:
    """Names of the files of an index, sorted; only names of the index's own kind and folder."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: key 'weight_map' is missing, or no object that names files")
    kind = os.path.splitext(index.removesuffix(".index.json"))[1]
    names = sorted(set(map(str, weight_map.values())))
    outside = [name for name in names if re.search(r"[/\\\0]", name) or not name.endswith(kind)]
    if outside:
        raise ValueError(f"{index}: weight_map may only name {kind} files of its own folder, not "
                         f"{', '.join(map(repr, outside))}")
    return names


def weight_files(path: str) -> list[str]:
    """The weight files of a folder, safetensors before .bin; raises naming what is missing."""
    found = [name for name in NAMES if os.path.isfile(os.path.join(path, name))]
    if not found:
        raise FileNotFoundError(f"{path}: no weights; looked for {', '.join(NAMES)}"
                                f"{what_it_is(path, 'model')}")
    first = os.path.join(path, found[0])
    if not first.endswith(".index.json"):
        return [first]
    names = indexed_files(first)
    if missing := [name for name in names if not os.path.isfile(os.path.join(path, name))]:
        raise FileNotFoundError(f"{path}: missing weight file(s) {', '.join(missing)}")
    return [os.path.join(path, name) for name in names]


def unreadable(file: str, reason: str) -> ValueError:
    kind = os.path.splitext(file)[1].removeprefix(".")
    return ValueError(f"{file} ({os.path.getsize(file)} bytes) is not a readable {kind} file: "
                      f"{reason}{likely_cause(file)}")


def read_bin(file: str) -> dict[str, Tensor]:
    """The state dict that torch.save wrote, memory-mapped; raises ValueError, and runs no code."""
    with open(file, "rb") as stream:
        head = stream.read(2)
    if head[:1] == b"\x80":                     # a bare pickle
        raise ValueError(f"{file}: was saved as before torch 1.6 and cannot be memory-mapped; "
                         "rewrite it with torch.save(torch.load(FILE, weights_only=True), FILE)")
    if head != b"PK":
        raise unreadable(file, "not a zip archive")
    try:
        state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:                  # a damaged pickle can raise any of them
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(f"{file}: holds a Python object ({found[1]}) where only tensors may "
                             "be; it was not executed") from None
        reason = re.split(r"\. |\n", str(error))[0]       # what follows advises to run the code
        raise unreadable(file, f"{type(error).__name__}: {reason}") from None
    if not isinstance(state, dict):
        raise ValueError(f"{file}: not a state dict: holds a {type(state).__name__}")
    wrong = [f"{name!r} is a {type(value).__name__}" for name, value in state.items()
             if not (isinstance(name, str) and isinstance(value, Tensor)
                     and value.layout == torch.strided and value.device.type == "cpu"
                     and value.nbytes <= value.untyped_storage().nbytes())]  # else: one value, many
    if wrong:
        raise ValueError(f"{file}: not a state dict of plain tensors: {', '.join(wrong)}")
    return state


def read_file(file: str) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) for every tensor of a weight file, memory-mapped."""
    if file.endswith(".bin"):
        yield from read_bin(file).items()
        return
    try:
        weights = safe_open(file, framework="pt")
    except SafetensorError as error:
        raise unreadable(file, str(error)) from None
    with weights:
        for name in weights.keys():
            try:
                tensor = weights.get_tensor(name)
            except SafetensorError as error:
                raise unreadable(file, f"{name}: {error}") from None
            yield name, tensor


def check_finite(name: str, tensor: Tensor, file: str) -> None:
    """Raise ValueError for NaN or an infinity: one pass at the speed of memory, and no copy."""
    if tensor.dtype in DTYPES and tensor.numel():
        smallest, largest = map(float, tensor.detach().aminmax())            # NaN if there is one
        if not (math.isfinite(smallest) and math.isfinite(largest)):
            raise ValueError(f"{file}: {name} has values that are not finite (NaN or infinity); "
                             "the file is damaged, or its training failed")


def read_files(files: list[str]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) over all files; rank 0 reports the progress of a slow load on stderr.

    raises  ValueError, with the file's name, for a tensor whose values are not finite
    """
    total, done = sum(map(os.path.getsize, files)), 0                # bytes
    start = reported = time.monotonic()
    silent = dist.is_initialized() and dist.get_rank() > 0
    for file in files:
        for name, tensor in read_file(file):
            check_finite(name, tensor, file)
            yield name, tensor
            done += tensor.nbytes
            now = time.monotonic()
            if now - reported > PROGRESS_SECONDS and done and not silent:
                print(f"loading {file}: {done / 1e9:.1f} of {total / 1e9:.1f} GB, "
                      f"{time_left(now - start, done, total)}", file=sys.stderr, flush=True)
                reported = now


def misfits(files: list[str], expected: dict[str, tuple],
            optional: Collection[str] = ()) -> list[str]:
    """Every difference between the files and the `expected` tensors, a phrase each.

    expected   {name: shape}
    optional   names that may be there as well, of any shape
    """
    problems, missing = [], dict(expected)
    for name, tensor in (pair for file in files for pair in read_file(file)):
        shape = missing.pop(name, None)
        if name in optional:
            continue
        if shape is None:                        # never expected, or in two files
            problems.append(f"unexpected {name} {list(tensor.shape)}")
        elif tensor.shape != shape:
            problems.append(f"{name} is {list(tensor.shape)}, expected {list(shape)}")
        elif tensor.dtype not in DTYPES:
            problems.append(f"{name} is {str(tensor.dtype).removeprefix('torch.')}, expected "
                            "float16, bfloat16, float32 or float64")
    return problems + [f"missing {name} {list(shape)}" for name, shape in missing.items()]


# ---- writing ------------------------------------------------------------------------------------

def save_tensors(tensors: dict[str, Tensor], file: str,
                 metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file with the umask's permissions; safetensors' own is its owner's alone.

    raises   OSError with the file's name, as where the disk is full
    """
    with writing(file):
        open(file, "ab").close()     # its mode: safetensors makes files for their owner alone
        mode = os.stat(file).st_mode
        try:
            save_file(tensors, file, metadata)
        except SafetensorError as error:
            raise OSError(str(error).rpartition("I/O error: ")[2]) from None
        os.chmod(file, mode)


def write_weights(path: str, sizes: dict[str, int], tensor_of: Callable[[str], Tensor],
                  max_shard_bytes: int = SHARD_BYTES) -> None:
    """Write safetensors as transformers reads them, sharded past max_shard_bytes.

    sizes       {name: bytes}, in the order of the files
    tensor_of   name -> Tensor; called when its file is due, so one file is in memory at a time
    """
    shards, size = [[]], 0
    for name, count in sizes.items():
        if shards[-1] and size + count > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += count
    single, index = NAMES[:2]
    weight_map, stale = {}, index if len(shards) == 1 else single
    for number, shard in enumerate(shards, 1):
        file = single if len(shards) == 1 else (
            f"model-{number:05}-of-{len(shards):05}.safetensors")
        save_tensors({name: tensor_of(name).contiguous() for name in shard},
                     os.path.join(path, file), {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        write_json(os.path.join(path, index), {
            "metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})
    if os.path.isfile(os.path.join(path, stale)):
        os.remove(os.path.join(path, stale))     # an older model's; loaders would follow it
