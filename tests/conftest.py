"""What several test files share: a tiny tokenizer and model made on the spot, and the real data.

Nothing is fetched. Files called test_oracle_* ask transformers, PEFT and TRL (`make oracles`); they
skip in an environment without them. Tests that read real data skip, saying so, where ../shared/data
is absent.
"""
import contextlib
import gzip
import importlib
import io
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import torch

from data import VICUNA_SYSTEM
from model import Llama, LlamaConfig, save_llama

ROOT = Path(__file__).parents[1]
torch.set_num_threads(1)        # two workers share the cores, and matrices are small
TINY_VOCAB = 448        # 3 specials, 256 bytes, the rest learned
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


# ---- commands -----------------------------------------------------------------------------------

def launch(command: str, *flags, ranks: int = 1) -> list[str]:
    """The command line of one of our commands: "train.py", or "rlhf.ppo" for python -m."""
    launcher = [sys.executable] if ranks == 1 else [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    script = [str(ROOT / command)] if command.endswith(".py") else ["-m", command]
    return [*launcher, *script, *map(str, flags)]


def finish(command: str, *flags, ranks: int = 1) -> str:
    """Run a command to its end and return what it printed; one rank runs in this process, on one
    thread as ONE_THREAD's do: importing torch anew costs seconds."""
    if ranks > 1:
        run = subprocess.run(launch(command, *flags, ranks=ranks), env=ONE_THREAD,
                             capture_output=True, text=True, timeout=180)
        assert run.returncode == 0, run.stderr
        return run.stdout
    threads, shown = torch.get_num_threads(), io.StringIO()
    torch.set_num_threads(1)
    try:
        with contextlib.redirect_stdout(shown):
            module = command.removesuffix(".py")
            if (ROOT / module).is_dir():                     # python -m judge
                module += ".__main__"
            importlib.import_module(module).main([str(flag) for flag in flags])
    finally:
        torch.set_num_threads(threads)
    return shown.getvalue()


def need(package: str):
    """Import a package that only oracles need; skip without it, but under `make oracles` fail."""
    if os.environ.get("ORACLES"):
        return importlib.import_module(package)
    return pytest.importorskip(package)


# ---- values -------------------------------------------------------------------------------------

def assert_gradient_is_central_differences(function, x: torch.Tensor, rtol: float) -> None:
    """(f(x + e) - f(x - e)) / 2e with e = 1e-5, x float64: truncation below 1e-11, rounding
    about 1e-10."""
    x = x.detach().requires_grad_()
    gradient, = torch.autograd.grad(function(x).sum(), x)
    for i in range(len(x)):
        step = torch.zeros_like(x)
        step[i] = 1e-5
        with torch.no_grad():
            difference = (function(x + step).sum() - function(x - step).sum()) / 2e-5
        torch.testing.assert_close(gradient[i], difference, rtol=rtol, atol=1e-9)


# ---- files --------------------------------------------------------------------------------------


def write_jsonl(path, rows) -> str:
    """Write rows as JSON lines (a str row goes in as it is); gzipped if the name ends in .gz."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    return write_bytes(path, ("\n".join(lines) + "\n").encode())


def write_bytes(path, raw: bytes) -> str:
    path = Path(path)
    path.write_bytes(gzip.compress(raw) if path.name.endswith(".gz") else raw)
    return str(path)


def tree_of(folder) -> dict:
    """Every path below a folder with its bytes: equal before and after = nothing was written."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
            for path in sorted(Path(folder).rglob("*"))}


def save_tiny_model(folder, tokenizer_file=None, seed: int = 0, **changes) -> str:
    """A Hugging Face folder: random Llama, D 32, L 2, H 4, kv 2, F 64, and its tokenizer."""
    torch.manual_seed(seed)
    shape = dict(vocab_size=TINY_VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048)
    save_llama(Llama(LlamaConfig(**(shape | changes))), str(folder))
    if tokenizer_file:
        shutil.copy(tokenizer_file, os.path.join(folder, "tokenizer.model"))
    return str(folder)


def make_tiny_tokenizer(folder: Path) -> str:
    """Path of a tokenizer.model of Llama's kind: BPE, byte fallback, identity normalisation."""
    folder.mkdir(exist_ok=True)
    who = ("my friend", "the teacher", "a neighbour", "nobody", "the old doctor", "our cat")
    does = ("paints", "sold", "will move", "wants to clean", "forgot", "cannot find")
    what = ("a red boat", "two lamps", "the garden door", "every letter", "42 bottles", "it")
    sentences = [f"{a.capitalize()} {b} {c}." for a, b, c in itertools.product(who, does, what)]
    sentences += [f"How do I fix {c}? First ask {a}, then wait." for a, c in
                  itertools.product(who, what)]
    sentences += [VICUNA_SYSTEM + " USER: ASSISTANT:"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_prefix=str(folder / "tokenizer"),
        model_type="bpe", vocab_size=TINY_VOCAB, byte_fallback=True, character_coverage=1.0,
        normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, num_threads=1, minloglevel=2)
    return str(folder / "tokenizer.model")


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory) -> str:
    return make_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, tiny_tokenizer) -> str:
    """Path of a Hugging Face folder; read only, make another with save_tiny_model to change it."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny-model"), tiny_tokenizer)


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory) -> Path:
    """A JSONL file of 120 short pairs."""
    rng = random.Random(0)
    words = "the a cat dog sat ran on under mat hill and then some more".split()

    def sentence(low: int, high: int) -> str:
        return " ".join(rng.choices(words, k=rng.randint(low, high)))

    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    write_jsonl(path, [{"prompt": sentence(2, 9), "chosen": sentence(1, 12) + " yes",
                        "rejected": sentence(1, 12) + " no"} for _ in range(120)])
    return path


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the repository: HH, QA-feedback, red-team, tokenizer."""
    folder = ROOT / "../shared/data"
    if not folder.is_dir():
        pytest.skip("real data not found: ../shared/data (HH harmless-base test, QA-feedback dev)")
    return folder


@pytest.fixture(scope="session")
def hh_file(shared_data) -> str:
    return str(shared_data / "hh_harmless_base_test/test.jsonl.gz")


@pytest.fixture(scope="session")
def llama_tokenizer(shared_data):
    from data import Tokenizer
    return Tokenizer(str(shared_data / "llama2_tokenizer"))
