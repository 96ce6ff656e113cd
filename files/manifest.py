"""A JSON file beside what a run saved that tells what was saved, so that damage is found.

trainer_state.json lies in a checkpoint, manifest.json in a run's final/.
"""
import hashlib
import json
import os
from typing import Any

from files.text import check_keys, read_json, sha256, write_json

FINAL = "manifest.json"


def checksum(values: dict) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def write_manifest(file: str, **values: Any) -> None:
    """Write values, the SHA-256 of every file of the folder, and a checksum of both."""
    folder = os.path.dirname(file)
    values["sha256"] = {name: sha256(os.path.join(folder, name))
                        for name in sorted(os.listdir(folder))}
    write_json(file, values | {"checksum": checksum(values)})


def read_manifest(file: str, remedy: str) -> dict:
    """The values in a manifest, if all files that it names are as they were saved.

    remedy   what to do about damage, the end of the error's sentence
    raises   ValueError naming the file that is damaged or missing
    """
    try:
        values = read_json(file)
        check_keys(values, {"sha256": dict, "checksum": str}, file)
    except (OSError, ValueError) as error:
        raise ValueError(f"{error}; {remedy}") from None
    if values.pop("checksum") != checksum(values):
        raise ValueError(f"{file} is damaged (its checksum is not that of its content); {remedy}")
    for name, digest in values["sha256"].items():
        saved = os.path.join(os.path.dirname(file), name)
        if not os.path.isfile(saved):
            raise ValueError(f"{saved} is missing; {remedy}")
        if sha256(saved) != digest:
            raise ValueError(f"{saved} is damaged (its SHA-256 is not the one saved); {remedy}")
    return values


def check_final(folder: str) -> dict:
    """The manifest of a run's final/; {} for a folder without one, as other programs write."""
    file = os.path.join(folder, FINAL)
    if not os.path.isfile(file):
        return {}
    return read_manifest(file, f"train it again, or remove {file} if you changed it yourself")
