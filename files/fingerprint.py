"""Fingerprints of what a run reads: they tell whether it is the same when the run goes on."""
import hashlib
import os
from functools import cache

from files.text import sha256
from files.weights import weight_files

BLOCK_BYTES, BLOCKS = 2 ** 16, 2 ** 10
MODEL_FILES = ("config.json", "tokenizer.model", "tokenizer.json", "tokenizer_config.json",
               "added_tokens.json", "special_tokens_map.json", "chat_template.jinja",
               "generation_config.json")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def fingerprint(file: str) -> str:
    """SHA-256 of a file; above 64 MiB of its size, its safetensors header and 1,024 blocks of it.

    The blocks are spread evenly, from the first to the last; each matrix of a 7B model holds some.
    What changes between all of them is not seen: 13 GB are not read whole at every start.
    """
    size = os.path.getsize(file)
    if size <= BLOCK_BYTES * BLOCKS:
        return sha256(file)
    digest = hashlib.sha256(str(size).encode())
    with open(file, "rb") as content:
        if file.endswith(".safetensors"):
            header_bytes = int.from_bytes(content.read(8), "little")
            digest.update(content.read(min(header_bytes, 10 ** 8)))      # safetensors' own limit
        for number in range(BLOCKS):
            content.seek(number * (size - BLOCK_BYTES) // (BLOCKS - 1))
            digest.update(content.read(BLOCK_BYTES))
    return digest.hexdigest()


def fingerprints(model: str, *others: str | None) -> dict[str, str]:
    """{file: fingerprint} of all that is read of a model folder, and of others.

    others   PEFT folders, single files or None
    What is missing is left out: loading names it.
    """
    small = [os.path.join(model, name) for name in MODEL_FILES]
    for path in filter(None, others):
        small += [path] + [os.path.join(path, name) for name in ADAPTER_FILES]
    try:
        weights = weight_files(model)
    except (OSError, ValueError):
        weights = []
    return ({file: sha256(file) for file in small if os.path.isfile(file)}
            | {file: fingerprint(file) for file in weights})


@cache
def weights_of(model: str) -> list[str]:
    """The fingerprints of a model folder's safetensors files: what tells its weights from others',
    whatever words its config.json has."""
    return sorted(digest for name, digest in fingerprints(model).items()
                  if name.endswith(".safetensors"))
