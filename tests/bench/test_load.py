"""bench/load.py: on a tiny model, and with ULMA_TEST_7B=1 on 7B (14 GB of disk, minutes)."""
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT
from scripts import load_script

from files.config import LlamaConfig

linux = pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")
TINY = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                   num_attention_heads=4)


@linux
@pytest.mark.parametrize("source", ["safetensors", "bin"])
def test_every_stage_is_measured_and_nothing_is_left(source, tmp_path):
    # One ULMA step where policy and reference are equal: two positives and two negatives of 9
    # tokens, log-probs near -9 ln 64 each, so the loss is about (2 · 9 ln 64 + 2 ln 2) / 4 = 19.1.
    report = load_script("load").measure(TINY, source, "cpu", str(tmp_path), False,
                                         shard_bytes=10_000)
    assert [stage["stage"] for stage in report["stages"]] == ["import", "load", "forward", "step"]
    assert len(report["files"]) > 3 and not os.listdir(tmp_path)
    assert all(("pytorch_model-" in file) == (source == "bin")
               for file in report["files"] if file.startswith(("model-", "pytorch_model-")))
    _, load, forward, step = report["stages"]
    assert load["parameters"] == report["weights_gb"] * 1e9 / 2
    assert forward["finite"] and 18.8 < step["loss"] < 19.4 and step["grad_norm"] > 0
    assert 0.05 < report["peak_anonymous_gb"] < report["peak_resident_gb"] < 3


@linux
def test_a_run_that_would_exhaust_the_machine_is_stopped(tmp_path, monkeypatch):
    # At 7B the run takes up to 22 GiB. The folder is removed here too.
    module = load_script("load")
    monkeypatch.setattr(module, "MIN_AVAILABLE", 2 ** 60)
    with pytest.raises(RuntimeError, match="ended with code -9 .* were available at the least"):
        module.measure(TINY, "safetensors", "cpu", str(tmp_path), False)
    assert not os.listdir(tmp_path)


@linux
@pytest.mark.skipif(os.environ.get("ULMA_TEST_7B") != "1", reason="ULMA_TEST_7B=1 runs it: minutes")
@pytest.mark.parametrize("source", ["safetensors", "bin"])
def test_7b_fits(source, tmp_path):
    # 6.74e9 weights of 2 bytes: 13.5 GB. Loading needs less than 15 GB of memory that is not the
    # files' pages, a LoRA step less than 18; a second copy, or one in float32, would pass 27 GB.
    out = tmp_path / "report.json"
    subprocess.run([sys.executable, str(ROOT / "bench/load.py"), "--source", source, "--out",
                    str(out), "--tmp", str(tmp_path)], check=True)
    report = json.loads(out.read_text())
    load = next(stage for stage in report["stages"] if stage["stage"] == "load")
    assert load["parameters"] == 6_738_415_616 and load["peak_anonymous_gb"] < 15
    assert report["peak_anonymous_gb"] < 18
