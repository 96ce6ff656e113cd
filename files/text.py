"""Text files: JSON read with a named error, files and folders written whole or not at all, hashes.

A file or folder is written under a temporary name, flushed to disk and renamed: the rename is the
commit, so what a killed process leaves is the old content or the new, never a part of either.
"""
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from typing import Any, get_args

JSON_BYTES, JSON_DEPTH = 64 << 20, 50         # larger files and deeper values are refused
JSON_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false",
              dict: "an object", list: "a list", type(None): "null"}


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


def bounded(text: str) -> int | float:
    """A number of a file of ours, or of a model's: one that 64 bits can hold."""
    value = float(text) if set(text) & set(".eE") else int(text)
    if not (abs(value) < math.inf if isinstance(value, float) else -2**63 <= value < 2**64):
        raise ValueError(f"{text[:30]} is too large a number")
    return value


def json_value(raw: bytes, number: Callable | None = None) -> Any:
    """The JSON value of some bytes; `number` makes its numbers, of their texts.

    raises  ValueError for NaN and infinities, for text that is not Unicode, and for a value that is
            nested deeper than any here: Python can print and walk what it returns
    """
    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not a number")
    try:
        value = json.loads(raw.decode("utf-8"), parse_constant=refuse, parse_int=number,
                           parse_float=number)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level = [value]
    for _ in range(JSON_DEPTH):
        level = [inner for outer in level if isinstance(outer, (dict, list))
                 for inner in (outer.values() if isinstance(outer, dict) else outer)]
    if level:
        raise ValueError(f"nested deeper than {JSON_DEPTH} levels")
    if b"\\u" in raw:                       # a lone surrogate: it cannot be written again
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


def check_keys(value: Any, keys: dict[str, Any], where: str) -> None:
    """Raise ValueError, naming the key, unless a value is an object with these keys.

    keys   {name: type, or union of types}: with None among them the key may be missing; int takes
           no bool, float takes an int as well
    """
    if not isinstance(value, dict):
        raise ValueError(f"{where}: not a JSON object")
    for key, kinds in keys.items():
        kinds = get_args(kinds) or (kinds,)
        found = type(value.get(key))
        if found not in kinds and not (found is int and float in kinds):
            given = repr(value[key])[:60] if key in value else "missing"
            raise ValueError(f"{where}: {key} is {given}; expected "
                             + " or ".join(JSON_NAMES[kind] for kind in kinds))


def read_json(path: str, keys: dict[str, Any] | None = None) -> dict:
    """The JSON object in a file, which must hold these keys, see `check_keys`.

    raises  ValueError with the file's name for anything else
    """
    with open(path, "rb") as file:
        raw = file.read(JSON_BYTES + 1)
    try:
        if len(raw) > JSON_BYTES:
            raise ValueError(f"more than {JSON_BYTES >> 20} MiB")
        value = json_value(raw, bounded)
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}{likely_cause(path)}") from None
    check_keys(value, keys or {}, path)
    return value


def stripped_lines(path: str) -> list[str]:
    """The lines of a text file, stripped, without empty ones.

    raises   OSError, or ValueError with the file's name for what is not UTF-8
    """
    with open(path, "rb") as file:
        content = file.read()
    try:
        lines = content.decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error}") from None
    return [line.strip() for line in lines if line.strip()]


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


@contextmanager
def writing(path: str) -> Iterator[None]:
    """Name the file in an error of writing; where a disk is full, the system's error does not."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}") from None


def write_text(path: str, text: str) -> None:
    """Write a text file, or replace one, in one step."""
    temporary = f"{path}.{os.getpid()}.tmp"             # two processes may write the same file
    try:
        with writing(path):
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(text)
            flush_to_disk(temporary)
            os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.remove(temporary)
        raise


def append_text(path: str, text: str) -> None:
    """Append to a text file; a kill, or a full disk, may cut the last line short."""
    with writing(path), open(path, "a", encoding="utf-8") as file:
        file.write(text)


def write_json(path: str, value: dict) -> None:
    """`write_text` of indented JSON."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def temporary_folder(path: str) -> str:
    """The name that a folder has before it is whole, and while it is removed."""
    parent, name = os.path.split(path)
    return os.path.join(parent, f".tmp-{name}")


def write_folder(path: str, write: Callable[[str], None]) -> None:
    """Call write(temporary folder), then move it to `path` in one step; an existing one stays."""
    if os.path.isdir(path):
        return
    temporary = temporary_folder(path)
    shutil.rmtree(temporary, ignore_errors=True)        # left by a killed run
    try:
        os.makedirs(temporary)
        write(temporary)
        with writing(path):
            for file in os.listdir(temporary):
                flush_to_disk(os.path.join(temporary, file))
            flush_to_disk(temporary)
            os.rename(temporary, path)
            flush_to_disk(os.path.dirname(path) or ".")
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)    # the disk may be full
        raise


# ---- removing -----------------------------------------------------------------------------------

def remove_folder(path: str) -> None:
    """Remove a folder; a kill leaves all of it, or nothing under this name."""
    temporary = temporary_folder(path)
    shutil.rmtree(temporary, ignore_errors=True)
    os.rename(path, temporary)
    shutil.rmtree(temporary)


def remove_leftovers(folder: str, names: Collection[str] | None = None) -> None:
    """Remove what killed processes were writing in a folder; its lock must be held.

    names   of the files and folders whose leftovers go; None: of all
    """
    for name in os.listdir(folder):
        found = re.fullmatch(r"\.tmp-(.+)|(.+)\.\d+\.tmp", name)
        if found and (names is None or (found[1] or found[2]) in names):
            path = os.path.join(folder, name)
            shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
