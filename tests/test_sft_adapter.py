"""Training from an SFT adapter: the reference is base + SFT, exactly, wherever it is used."""
import json
import math

import pytest
import torch
from conftest import write_jsonl

import train
from lora import add_lora, lora_layers, save_adapter, start_from_adapter
from model import load_llama
from tools import export
from training.checkpoint import load_run

ROW = [1, 5, 7, 30, 300, 7, 12, 3, 2]
PAIRS = [{"prompt": f"How do I fix {n}?", "chosen": "First ask.", "rejected": "No."}
         for n in range(8)]


@pytest.fixture
def sft(tmp_path, tiny_model):
    """Path of an SFT adapter, not zero, on layers of which the next adapter has only some."""
    model = add_lora(load_llama(tiny_model), 3, 7, 0.0, ["v_proj", "up_proj"])
    generator = torch.Generator().manual_seed(0)
    for layer in lora_layers(model).values():
        for p in (layer.lora_A, layer.lora_B):
            p.data = 0.2 * torch.randn(p.shape, generator=generator)
    save_adapter(model, str(tmp_path / "sft"))
    return str(tmp_path / "sft")


@pytest.fixture
def run(tmp_path, tiny_model, sft):
    def start(name, *flags):
        pairs = write_jsonl(tmp_path / "pairs.jsonl", PAIRS)
        out = tmp_path / name
        train.main(["--method", "dpo", "--model_name_or_path", tiny_model, "--dataset", pairs,
                    "--sft_adapter", sft, "--output_dir", str(out), "--max_steps", "3",
                    "--batch_size", "4", "--learning_rate", "1e-2", "--logging_steps", "1",
                    *flags])
        return str(out)
    return start


def logits(model):
    return export.logits_of(model, ROW)


@pytest.mark.parametrize("flags", [(), ("--bf16",), ("--lora_r", "0")])
def test_the_first_loss_is_log_2_and_the_reference_is_base_plus_sft(tmp_path, tiny_model, sft, run,
                                                                  capsys, flags):
    # Policy = reference to the bit before the first step: rewards 0, loss log 2. The classic fault
    # is a reference without the SFT adapter: rewards then start at beta times what SFT changed.
    out = run("run", *flags)
    line = json.loads(open(out + "/metrics.jsonl").readline())
    assert line["rewards/positive"] == line["rewards/negative"] == 0
    assert line["loss"] == pytest.approx(math.log(2), rel=1e-7)
    shown = capsys.readouterr().out
    assert f"reference: {tiny_model} + {sft} (" in shown
    assert json.load(open(out + "/args.json"))["reference"].startswith(f"{tiny_model} + {sft} (")

    finished = load_run(out)
    policy, policy_logits = finished.model, logits(finished.model)
    with finished.reference() as reference:
        reference_logits = logits(reference)
    dtype = policy.lm_head.weight.dtype
    start = start_from_adapter(load_llama(tiny_model, dtype), sft, merge="0" in flags)
    assert torch.equal(reference_logits, logits(start))
    assert (logits(load_llama(tiny_model, dtype)) - reference_logits).abs().max() > 0.02
    assert (policy_logits - reference_logits).abs().max() > 1e-3


def test_in_bfloat16_the_sft_adapter_loses_nothing(tiny_model, tmp_path):
    # An update of 1e-8, below bfloat16's resolution of W: merged it vanishes, beside W it counts.
    model = add_lora(load_llama(tiny_model, torch.bfloat16), 1, 1, 0.0, ["v_proj"])
    for layer in lora_layers(model).values():
        layer.lora_A.data.fill_(1e-2)
        layer.lora_B.data.fill_(1e-6)
    save_adapter(model, str(tmp_path))
    base, apart, merged = (load_llama(tiny_model, torch.bfloat16) for _ in range(3))
    start_from_adapter(apart, str(tmp_path))
    start_from_adapter(merged, str(tmp_path), merge=True)
    base, apart, merged = (m.model.layers[0].self_attn.v_proj for m in (base, apart, merged))
    assert torch.equal(merged.weight, base.weight)
    with torch.no_grad():
        apart.weight.zero_()                         # what is left is the update: 1e-2 · 1e-6 · 100
        y = apart(torch.eye(32)[:1].bfloat16() * 100)
    torch.testing.assert_close(y.float(), torch.full((1, 16), 1e-6), rtol=0.01, atol=0)


def test_export_merges_both_and_refuses_the_second_alone(tmp_path, tiny_model, sft, run):
    # The second adapter alone on the base is a model that never was: no tool would notice.
    out = run("run")
    final, merged = out + "/final", str(tmp_path / "merged")
    for adapters in ([final], [final, sft]):
        with pytest.raises(ValueError, match=f"pass --adapter {sft} {final}"):
            export.main(["--model", tiny_model, "--adapter", *adapters, "--out", merged])
    export.main(["--model", tiny_model, "--adapter", sft, final, "--out", merged])
    torch.testing.assert_close(logits(load_llama(merged)), logits(load_run(out).model), rtol=0,
                               atol=1e-5)
    config = json.load(open(final + "/adapter_config.json"))
    assert config["base_model_name_or_path"] == f"{tiny_model} + {sft}"      # on purpose no path


def test_chains_of_adapters_are_refused(tmp_path, sft, run):
    # A third adapter on two.
    final = run("run") + "/final"
    with pytest.raises(ValueError, match=f"is itself on top of {sft}; merge both with python -m "
                                         "tools.export"):
        run("next", "--sft_adapter", final)
    with pytest.raises(FileNotFoundError, match="adapter_config.json: no such file"):
        run("other", "--sft_adapter", str(tmp_path / "absent"))
    assert not (tmp_path / "next").exists() and not (tmp_path / "other").exists()
