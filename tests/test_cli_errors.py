"""Bad input ends with one sentence on stderr, exit code 2, and nothing written.

Commands run in this process (importing torch anew costs seconds); two run as a user runs them.
"""
import functools
import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, save_tiny_model, tree_of, write_bytes, write_jsonl
from safetensors.torch import load_file, save_file

import data
import eval as evaluate
import train
from files.cli import run_cli
from training.output import FREE_FLAGS, claim_output_dir

PAIRS = [{"prompt": f"Question {n}?", "chosen": "Yes.", "rejected": "No."} for n in range(8)]
POINTS = [{"prompt": f"Question {n}?", "completion": "Yes.", "label": True} for n in range(8)]


@pytest.fixture
def refused(tmp_path, tiny_model, monkeypatch, capsys):
    """refused(*flags): assert that train.py refuses them as promised; returns its sentence.

    Token ids may stay where what is wrong is found later: the command that is right takes them.
    Without these flags the command would be right: a model, pairs that fit it, an output_dir.
    `command` is run instead of train.py.
    """
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    pairs = write_jsonl(tmp_path / "pairs.jsonl", PAIRS)

    def run(*flags, model=tiny_model, dataset=pairs, command=None):
        argv = [*(["--model_name_or_path", str(model)] if model else []),
                *(["--dataset", str(dataset)] if dataset else []), "--output_dir", "out", *flags]
        before = tree_of(tmp_path)
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            run_cli(command or functools.partial(train.main, argv))
        error = capsys.readouterr().err
        assert left.value.code == 2, error
        assert error.startswith("error: ") and error.find("\n") == len(error) - 1, error
        after = {name: content for name, content in tree_of(tmp_path).items()
                 if name in before or not name.startswith("work/tokens-")}
        assert after == before, "something was written"
        return error
    return run


def has(sentence, *words) -> None:
    """Assert that an error's sentence has these words."""
    missing = [word for word in words if word not in sentence]
    assert not missing, f"{missing} not in {sentence!r}"


# ---- data ---------------------------------------------------------------------------------------

ROW = json.dumps(POINTS[0])
DATA = {      # bytes of a data file, words of the sentence
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
                    "git-lfs pointer", "git lfs pull"),
    "bad JSON": (f"{ROW}\n\n{ROW}\n{{'prompt'\n".encode(), ":4: bad JSON", "{'prompt'"),
    "missing key": (f'{ROW}\n{{"prompt": "a", "answer": "b"}}'.encode(), ":2: ",
                    "'completion' is missing; found 'prompt', 'answer'"),
    "label 2": (f'{ROW}\n{{"prompt": "a", "completion": "b", "label": 2}}'.encode(), ":2: ",
                "2 is outside [0, 1]"),
    "invalid UTF-8": (f'{ROW}\n{{"prompt": "'.encode() + b"\xff", ":2: ", "utf-8"),
    "no rows": (b"\n\n", "no rows"),
}


@pytest.mark.parametrize("fault", DATA)
def test_bad_data_is_refused(refused, tmp_path, fault):
    # By a sentence with the file, the line and what is wrong there.
    raw, *words = DATA[fault]
    path = write_bytes(tmp_path / "rows.jsonl", raw)
    has(refused(dataset=path), path, *words)


def test_missing_files_are_refused(refused, tmp_path):
    # A misspelt path, for the data and for the model.
    has(refused(dataset=tmp_path / "nothing.jsonl"), "nothing.jsonl", "no such data file")
    has(refused(model=tmp_path / "no-model"), "no-model", "no such tokenizer file")


def test_dataset_and_model_go_together(refused, monkeypatch):
    # With only one of them the other would silently be the embedded world's.
    monkeypatch.setattr(train, "ensure_world", lambda: pytest.fail("went on to build the world"))
    has(refused(model=None), "--dataset", "--model_name_or_path", "go together")
    has(refused(dataset=None), "--dataset", "--model_name_or_path", "go together")


def test_a_method_that_does_not_fit_the_data_names_those_that_do(refused, tmp_path):
    # Points have no pairs; where all are good, methods for bad responses have nothing to train on.
    mixed = write_jsonl(tmp_path / "mixed.jsonl", [*POINTS, POINTS[0] | {"label": False}])
    fit = ("ulma, ulma_mse, pointwise_dpo, pointwise_mse, bco, kto, sft, positive_dpo, "
           "unlearning, negative_dpo, d2o, unlikelihood, pointwise_reward_model, mse_reward_model\n")
    has(refused("--method", "dpo", dataset=mixed), "--method dpo", "no prompt has a better",
        "methods that fit: " + fit)
    good = write_jsonl(tmp_path / "good.jsonl", POINTS)
    for method in ("ulma", "ulma_mse", "pointwise_dpo", "pointwise_mse", "unlikelihood",
                   "pointwise_reward_model", "mse_reward_model"):
        has(refused("--method", method, dataset=good), f"--method {method}",
            "no response has z < 1", "methods that fit: sft, positive_dpo\n")
    for method in ("unlearning", "negative_dpo", "d2o"):
        has(refused("--method", method, dataset=good), "no response has z = 0", "fit: sft, pos")
    bad = write_jsonl(tmp_path / "bad.jsonl", [row | {"label": 0} for row in POINTS])
    for method in ("sft", "positive_dpo"):
        has(refused("--method", method, dataset=bad), "no response has z = 1", "fit: ulma, ulma_")
    fair = write_jsonl(tmp_path / "fair.jsonl", [row | {"label": 0.5} for row in POINTS])
    has(refused("--method", "unlearning", dataset=fair), "no response has z = 0",
        "fit: ulma, ulma_mse, pointwise_dpo, pointwise_mse, bco, kto, unlikelihood, "
        "pointwise_reward_model, mse_reward_model\n")


# ---- model --------------------------------------------------------------------------------------

CONFIG = {      # change to config.json, words of the sentence
    "unknown feature": ({"clip_qkv": 8.0}, "clip_qkv = 8.0"),
    "bias": ({"attention_bias": True}, "attention_bias = True (supported: False)"),
    "other model": ({"model_type": "qwen2"}, "model_type = 'qwen2' (supported: 'llama' or 'mi"),
    "yarn": ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "'yarn' (supported: default"),
    "head_dim": ({"head_dim": 16}, "k_proj.weight is [16, 32], expected [32, 32]"),
    "two at once": ({"model_type": "x", "qk_norm": 1}, "model_type = 'x'", "qk_norm = 1"),
    "odd heads": ({"num_attention_heads": 5}, "hidden_size 32", "num_attention_heads 5"),
    "kv heads": ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
    # values of the wrong type
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads"),
    "size is text": ({"hidden_size": "32"}, "hidden_size"),
    "eps is text": ({"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
    "rope is text": ({"rope_scaling": "yarn"}, "rope_scaling"),
}


def changed_model(tiny_model, folder, **config) -> str:
    shutil.copytree(tiny_model, folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return str(folder)


@pytest.mark.parametrize("case", CONFIG)
def test_an_unsupported_config_is_refused(refused, tmp_path, tiny_model, case):
    # Otherwise the model that is trained would not be the one in the folder.
    changes, *words = CONFIG[case]
    has(refused("--max_steps", "1", model=changed_model(tiny_model, tmp_path / "model", **changes)),
        *words)


@pytest.mark.parametrize("text", ["{", "[]", "null", ""])
def test_a_config_that_is_no_json_object_is_refused(refused, tmp_path, tiny_model, text):
    # A cut download, or a list: the sentence has the file's name.
    model = changed_model(tiny_model, tmp_path / "model")
    write_bytes(tmp_path / "model/config.json", text.encode())
    has(refused(model=model), os.path.join(model, "config.json"))


def test_every_tensor_that_does_not_fit_is_listed(refused, tmp_path, tiny_model):
    # Missing, unexpected and mis-shaped ones in one sentence: the user need not try again for each.
    model = changed_model(tiny_model, tmp_path / "model")
    tensors = load_file(os.path.join(model, "model.safetensors"))
    del tensors["model.norm.weight"], tensors["model.layers.0.mlp.up_proj.weight"]
    tensors["model.layers.1.mlp.down_proj.weight"] = torch.zeros(64, 32)
    tensors["model.layers.0.self_attn.k_proj.weight"] = torch.zeros(16)
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)
    save_file(tensors, os.path.join(model, "model.safetensors"))
    has(refused(model=model), model, "missing model.norm.weight [32]",
        "missing model.layers.0.mlp.up_proj.weight [64, 32]",
        "model.layers.1.mlp.down_proj.weight is [64, 32], expected [32, 64]",
        "model.layers.0.self_attn.k_proj.weight is [16], expected [16, 32]",
        "unexpected model.layers.0.self_attn.q_proj.bias [32]")


WEIGHTS = {      # what lies there as model.safetensors, words of the sentence
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull", "(43 bytes)"),
    "web page": (b"<!DOCTYPE html>", "not a readable safetensors file", "(15 bytes)"),
    "empty": (b"", "not a readable safetensors file", "(0 bytes)"),
    "cut": (None, "not a readable safetensors file"),
}


@pytest.mark.parametrize("fault", WEIGHTS)
def test_a_file_that_holds_no_weights_is_refused(refused, tmp_path, tiny_model, fault):
    # For a git-lfs pointer the error of safetensors is "header too large", which does not help.
    model, (raw, *words) = changed_model(tiny_model, tmp_path / "model"), WEIGHTS[fault]
    file = tmp_path / "model/model.safetensors"
    file.write_bytes(file.read_bytes()[:-9] if raw is None else raw)
    has(refused(model=model), str(file), *words)


def test_missing_and_unindexed_weights_are_refused(refused, tmp_path, tiny_model):
    # A shard that was not downloaded; then unreadable indexes, which must be named.
    model, index = changed_model(tiny_model, tmp_path / "model"), "model.safetensors.index.json"
    index_file = tmp_path / "model" / index
    (tmp_path / "model/model.safetensors").unlink()
    index_file.write_text(json.dumps({"weight_map": {"lm_head.weight": "model-00002.safetensors"}}))
    has(refused(model=model), "missing weight file(s) model-00002.safetensors")
    for text in ("{", "{}", "[]"):
        index_file.write_text(text)
        has(refused(model=model), index)


def test_a_tokenizer_larger_than_the_embedding_is_refused(refused, tmp_path, tiny_tokenizer):
    # An id outside the embedding is an IndexError, on a GPU an assertion without its cause.
    model = save_tiny_model(tmp_path / "model", tiny_tokenizer, vocab_size=400)
    has(refused(model=model), "448 pieces", "only 400 rows")


# ---- flags --------------------------------------------------------------------------------------

FLAGS = {      # flags, words of the sentence
    "batch 0": ("--batch_size 0", "--batch_size 0 must be at least 1"),
    "micro 0": ("--micro_tokens 0", "--micro_tokens 0 must be at least 1"),
    "logging 0": ("--logging_steps 0", "--logging_steps 0 must be"),
    "save 0": ("--save_steps 0", "--save_steps 0 must be"),
    "r -1": ("--lora_r -1", "r = -1 must be at least 1"),
    "prompt 1": ("--max_prompt_length 1", "max_prompt_length 1 must be at least 2"),
    "prompt = length": ("--max_length 512 --max_prompt_length 512", "max_prompt_length 512",
                        "less than max_length 512"),
    "too long": ("--max_length 2049", "--max_length 2049", "the model's 2048 positions"),
    "triton on a CPU": ("--kernels triton", "asked for and cannot run"),
    "bf16 of all weights": ("--bf16 --lora_r 0", "--bf16 with --lora_r 0"),
    "fsdp of all weights": ("--fsdp --lora_r 0", "--fsdp", "--lora_r 0"),
    "fsdp alone": ("--fsdp", "--fsdp needs two or more processes"),
    "targets": ("--lora_target_modules q_proj c_attn wte", "no linear layer is called c_attn, wte",
                "q_proj", "v_proj"),
    "all held out": ("--held_out 1", "does not fit the data"),
    # numbers that make no sense
    "epochs 0": ("--num_train_epochs 0", "num_train_epochs"),
    "epochs -1": ("--num_train_epochs -1", "num_train_epochs"),
    "epochs nan": ("--num_train_epochs nan", "num_train_epochs"),
    "epochs inf": ("--num_train_epochs inf", "num_train_epochs"),
    "no step": ("--num_train_epochs 0.01", "num_train_epochs"),
    "held out -0.1": ("--held_out -0.1", "held_out"),
    "held out 1.5": ("--held_out 1.5", "held_out"),
    "held out nan": ("--held_out nan", "held_out"),
    "lr -1": ("--learning_rate -1", "earning"),
    "beta nan": ("--beta nan", "beta"),
    # d2o
    "no anchor": ("--method d2o --num_anchors 0", "--num_anchors 0 must be in [1, 15]"),
    "16 anchors": ("--method d2o --num_anchors 16", "a tree holds 16 responses"),
    "refresh -1": ("--method d2o --refresh_anchors -1", "--refresh_anchors -1"),
    "alpha -1": ("--method d2o --alpha -1", "--alpha -1"),
    "long anchor": ("--method d2o --anchor_tokens 513", "--anchor_tokens 513", "[1, 512]"),
    "no adapter": ("--sft_adapter .", "./adapter_config.json: no such file"),
    "not d2o": ("--method ulma --num_anchors 3 --alpha 1", "--num_anchors, --alpha: only",
                "--method d2o", "not ulma"),
    # the step multiplies by lm_head.weight itself: an adapter there would have no effect
    "lm_head": ("--lora_target_modules q_proj lm_head", "lm_head"),
}


@pytest.mark.parametrize("case", FLAGS)
def test_impossible_flags_are_refused(refused, case):
    # Before anything is written: an output folder would stand in the way of the corrected command.
    flags, *words = FLAGS[case]
    has(refused(*flags.split()), *words)


def test_a_learning_rate_of_zero_stays_zero(tmp_path, tiny_model, monkeypatch, capsys):
    # `args.learning_rate or 1e-5` would turn a dry run into training.
    monkeypatch.chdir(tmp_path)
    train.main(["--model_name_or_path", tiny_model, "--output_dir", "out", "--max_steps", "1",
                "--dataset", write_jsonl("pairs.jsonl", PAIRS), "--learning_rate", "0"])
    assert json.loads((tmp_path / "out/args.json").read_text())["learning_rate"] == 0


# ---- the output folder --------------------------------------------------------------------------

def test_a_finished_run_is_neither_repeated_nor_changed(refused, tmp_path, tiny_model):
    # The same command again; with a flag that changes no number; with others, which are all named.
    argv = ["--max_steps", "1", "--seed", "3"]
    train.main(["--model_name_or_path", tiny_model, "--dataset", str(tmp_path / "pairs.jsonl"),
                "--output_dir", "out", *argv])
    has(refused(*argv), "out holds a finished run", "remove the folder")
    has(refused(*argv, "--logging_steps", "3"), "out holds a finished run")
    sentence = refused("--max_steps", "1", "--seed", "4", "--beta", "0.5")
    has(sentence, "(beta was 0.1, now 0.5; seed was 3, now 4)")


def test_a_changed_data_file_is_another_run(refused, tmp_path, tiny_model):
    # The same path, other bytes: a continued run would have been trained on two data sets.
    train.main(["--model_name_or_path", tiny_model, "--dataset", str(tmp_path / "pairs.jsonl"),
                "--output_dir", "out", "--max_steps", "1"])
    write_jsonl(tmp_path / "pairs.jsonl", PAIRS[1:])
    sentence = refused("--max_steps", "1")
    has(sentence, "dataset_sha256 was")
    assert sentence.count(" was ") == 1


def test_a_folder_that_holds_no_run_is_left_alone(refused, tmp_path):
    # Other people's files are never deleted.
    (tmp_path / "work/out").mkdir()
    write_bytes(tmp_path / "work/out/thesis.tex", b"ten years of work")
    has(refused(), "out is not empty and holds no run")


FREE = {"output_dir": "x", "logging_steps": 1, "save_steps": 2,
        "eval_steps": 4, "report_to": "none", "start_check": True}


def test_a_run_is_only_continued_with_the_same_flags(tmp_path):
    # A new or an empty folder is taken. Where all flags that change numbers are the same, the run
    # is continued and nothing is written.
    folder, flags = tmp_path / "new/run", {"seed": 1, "beta": 0.1} | FREE
    claim_output_dir(str(folder), flags)
    assert json.loads((folder / "args.json").read_text()) == flags
    assert set(FREE) == FREE_FLAGS
    before = tree_of(tmp_path)
    claim_output_dir(str(folder), flags | {"save_steps": 9, "output_dir": "y"})
    with pytest.raises(ValueError) as caught:
        claim_output_dir(str(folder), flags | {"beta": math.pi, "new": 1})
    has(str(caught.value), str(folder), "beta was 0.1, now 3.14", "new was None, now 1")
    assert "seed" not in str(caught.value) and tree_of(tmp_path) == before
    (folder / "final").mkdir()
    with pytest.raises(ValueError, match="holds a finished run"):
        claim_output_dir(str(folder), flags)
    (tmp_path / "empty").mkdir()
    claim_output_dir(str(tmp_path / "empty"), flags)


def test_what_is_no_run_is_not_taken_for_one(tmp_path):
    write_bytes(tmp_path / "file", b"x")
    with pytest.raises(ValueError, match="holds no run"):
        claim_output_dir(str(tmp_path), {"seed": 1})
    with pytest.raises(ValueError, match="file is a file"):
        claim_output_dir(str(tmp_path / "file"), {"seed": 1})
    assert list(tree_of(tmp_path)) == ["file"]


@pytest.mark.parametrize("text", ["{", "[]", "null", ""])
def test_a_damaged_args_json_is_named(tmp_path, text):
    # "Expecting value: line 1 column 1" without a file name would not help.
    write_bytes(tmp_path / "args.json", text.encode())
    with pytest.raises(ValueError, match=r"args\.json"):
        claim_output_dir(str(tmp_path), {"seed": 1})


# ---- the other commands -------------------------------------------------------------------------

def test_eval_refuses_what_is_no_finished_run(refused, tmp_path, tiny_model):
    # No folder; a model's; a run that was killed; one whose args.json holds no flags.
    killed, odd = tmp_path / "killed", tmp_path / "odd"
    claim_output_dir(str(killed), {"seed": 1})
    for folder in (tmp_path / "nothing", tiny_model, killed):
        sentence = refused(command=functools.partial(evaluate.main, [str(folder)]))
        has(sentence, f"{folder} is not a finished run of train.py")
    (odd / "final").mkdir(parents=True)
    for text in ("[]", "{}", "{"):
        write_bytes(odd / "args.json", text.encode())
        has(refused(command=functools.partial(evaluate.main, [str(odd)])), str(odd))
    for beta in ("0", "-1", "nan", "inf"):
        has(refused(command=functools.partial(evaluate.main, [tiny_model, "--beta", beta])),
            f"--beta {float(beta)} must be larger than 0, and finite")


def test_data_py_refuses_a_bad_file(refused, tmp_path):
    # The first command one tries on a new file.
    path = write_jsonl(tmp_path / "rows.jsonl", [POINTS[0], "{"])
    has(refused(command=functools.partial(data.main, [path])), f"{path}:2: bad JSON")


@pytest.mark.parametrize("command", ["train.py", "eval.py"])
def test_the_real_command_prints_one_sentence(tmp_path, tiny_model, command):
    # As a user runs it: no traceback, no warning from an import, code 2, nothing on disk.
    bad = write_jsonl(tmp_path / "bad.jsonl", [PAIRS[0], "{"])
    flags = (["--model_name_or_path", tiny_model, "--dataset", bad, "--output_dir", "out"]
             if command == "train.py" else [str(tmp_path)])
    run = subprocess.run([sys.executable, str(ROOT / command), *flags], cwd=tmp_path,
                         capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith("error: ") and run.stderr.count("\n") == 1, run.stderr
    has(run.stderr, f"{bad}:2: bad JSON" if command == "train.py" else "is not a finished run")
    assert list(tree_of(tmp_path)) == ["bad.jsonl"]
