"""Text files: JSON read with a named error, files and folders written whole or not at all, hashes.

A file or folder is written under a temporary name, flushed to disk and renamed: the rename is the
commit, so what a killed process leaves is the old content or the new, never a part of either.
"""
import hashlib
import json
import os
import shutil
from collections.abc import Callable


def sha256(path: str) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- reading ------------------------------------------------------------------------------------

def likely_cause(path: str) -> str:
    """Suffix for an error message: why a file is not what it should be, if its start tells."""
    with open(path, "rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        return "; this is a git-lfs pointer, run `git lfs pull`"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "; this is a web page, not the file: download it again"
    return ""


def read_json(path: str) -> dict:
    """The JSON object in a file.

    raises  ValueError with the file's name for anything else
    """
    with open(path, encoding="utf-8") as file:
        try:
            value = json.load(file)
        except ValueError as error:
            raise ValueError(f"{path}: not JSON: {error}{likely_cause(path)}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object")
    return value


def whole_lines(path: str) -> list[str]:
    """The complete lines of a text file, with their ends; [] where there is no file.

    A line without its end is left out: a kill cut it short while it was appended.
    raises   ValueError, with the file's name, for what is not UTF-8
    """
    if not os.path.isfile(path):
        return []
    with open(path, "rb") as file:
        lines = [line for line in file if line.endswith(b"\n")]
    try:
        return [line.decode("utf-8") for line in lines]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error}") from None


# ---- writing ------------------------------------------------------------------------------------

def flush_to_disk(path: str) -> None:
    """fsync a file or folder: a rename is only safe once what it names is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def write_text(path: str, text: str) -> None:
    """Write a text file, or replace one, in one step."""
    temporary = f"{path}.{os.getpid()}.tmp"             # two processes may write the same file
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
    flush_to_disk(temporary)
    os.replace(temporary, path)


def write_json(path: str, value: dict) -> None:
    """`write_text` of indented JSON."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_folder(path: str, write: Callable[[str], None]) -> None:
    """Call write(temporary folder), then move it to `path` in one step; an existing one stays."""
    if os.path.isdir(path):
        return
    parent, name = os.path.split(path)
    temporary = os.path.join(parent, f".tmp-{name}")
    shutil.rmtree(temporary, ignore_errors=True)        # left by a killed run
    os.makedirs(temporary)
    write(temporary)
    for file in os.listdir(temporary):
        flush_to_disk(os.path.join(temporary, file))
    flush_to_disk(temporary)
    os.rename(temporary, path)
    flush_to_disk(parent)
