"""The scripts of bench/ as modules of this process, and a data file for them."""
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch
from conftest import ROOT, write_jsonl


def write_hh(folder: Path) -> str:
    """An HH file of 64 pairs, each with a prompt of its own."""
    rows = [{key: f"\n\nHuman: How do I fix {n} lamps?\n\nAssistant: {answer}" for key, answer in (
        ("chosen", "First ask our cat, then wait." if n % 2 else "Ask nobody."),
        ("rejected", "The old doctor forgot it."))} for n in range(64)]
    return write_jsonl(folder / "hh.jsonl.gz", rows)


def load_script(name: str) -> ModuleType:
    """bench/NAME.py, as bench_NAME: its `step` is not the project's."""
    if str(ROOT / "bench") not in sys.path:
        sys.path.append(str(ROOT / "bench"))             # last, for the same reason
    spec = importlib.util.spec_from_file_location(f"bench_{name}", ROOT / f"bench/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_script(module: ModuleType, monkeypatch, *flags) -> None:
    """Its main with these flags."""
    monkeypatch.setattr(sys, "argv", [Path(module.__file__).name, *map(str, flags)])
    threads = torch.get_num_threads()
    try:
        module.main()
    finally:
        torch.set_num_threads(threads)
