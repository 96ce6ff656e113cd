"""bench/ against its peers, at its smallest size: TRL's losses and transformers' tokens."""
import json
import subprocess
import sys

import pytest
from conftest import ONE_THREAD, ROOT, need
from scripts import write_hh

for package in ("trl", "peft", "transformers"):
    need(package)


def run(script: str, *flags) -> None:
    """One script of bench/, with no other path than its own: transformers imports another package
    called kernels where it finds one."""
    environment = {key: value for key, value in ONE_THREAD.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, str(ROOT / "bench" / script), *map(str, flags)],
                          capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_trl_has_our_losses(tmp_path, tiny_tokenizer):
    out = tmp_path / "step.json"
    run("step.py", "--dataset", write_hh(tmp_path), "--tokenizer", tiny_tokenizer, "--size", "tiny",
        "--pairs", 2, "--repeats", 2, "--threads", 1, "--precision", "fp32",
        "--only", "ours-dpo", "trl", "trl-tuned", "--out", out)
    losses = [row["losses"] for row in json.loads(out.read_text())["results"]]
    assert len(losses) == 3 and losses[0][2] < losses[0][1] < losses[0][0]
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-4)


def test_transformers_generates_our_tokens(tmp_path):
    out = tmp_path / "generate.json"
    run("generate.py", "--vocab_size", 500, "--hidden_size", 64, "--intermediate_size", 128,
        "--layers", 2, "--heads", 4, "--kv_heads", 2, "--batch_size", 3, "--new_tokens", 8,
        "--repeats", 1, "--out", out)
    assert json.loads(out.read_text())["share_of_equal_tokens"] == 1.0
