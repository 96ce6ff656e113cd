"""Whose output it is: the same flags and inputs continue it, others are refused by name."""
import argparse
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from conftest import tree_of
from helpers import adapter_hash, logged, train_flags

import train
from files.cli import run_cli
from files.text import remove_leftovers
from lora import add_lora, save_adapter
from model import load_llama
from step import METHODS, Method
from training.output import claim_output_dir, own_file, own_output_dir, rewind_metrics
from training.ranks import Ranks
from ulma import sft_loss


def stop_after(steps):
    """Methods with one more, "stopping": SFT that gets a SIGTERM in its `steps`-th step."""
    seen = []

    def loss(policy_logps, reference_logps, stream, objective):
        seen.append(stream)
        if len(seen) == steps:
            signal.raise_signal(signal.SIGTERM)
        return sft_loss(policy_logps)
    return METHODS | {"stopping": Method(loss, "positive", "none")}


def stopped(steps, *args):
    """A run of 6 steps that is stopped in one of them; its arguments for train.main."""
    _, *argv = map(str, train_flags(*args, "--method", "stopping", "--max_steps", "6",
                                    "--micro_tokens", "8192"))
    with pytest.raises(SystemExit):
        train.main(argv, stop_after(steps))
    return argv


# ---- inputs -------------------------------------------------------------------------------------

@pytest.fixture
def inputs(tmp_path, tiny_model, pairs_file):
    """(model, data) of their own, to change."""
    shutil.copytree(tiny_model, tmp_path / "base")
    shutil.copy(pairs_file, tmp_path / "data.jsonl")
    return tmp_path / "base", tmp_path / "data.jsonl"


def flip(file, place):
    raw = bytearray(file.read_bytes())
    raw[place] ^= 1
    file.write_bytes(raw)


def test_a_run_goes_on_with_the_inputs_it_began_with_alone(tmp_path, inputs, capsys):
    base, data = inputs
    argv = stopped(3, base, data, tmp_path / "run")
    before = tree_of(tmp_path / "run")
    for change, words in (
            (lambda: flip(base / "model.safetensors", -3), "base/model.safetensors has changed"),
            (lambda: flip(base / "tokenizer.model", 4000), "base/tokenizer.model has changed"),
            (lambda: (base / "config.json").write_text((base / "config.json").read_text() + " "),
             "base/config.json has changed"),
            (lambda: (base / "tokenizer_config.json").write_text('{"legacy": true}'),
             "base/tokenizer_config.json has changed"),
            (lambda: data.write_text(data.read_text() + "\n"), "dataset_sha256 was")):
        shutil.copytree(base, tmp_path / "copy")
        shutil.copy(data, tmp_path / "data.copy")
        change()
        with pytest.raises(SystemExit) as left:
            run_cli(lambda: train.main(argv, stop_after(0)))
        error = capsys.readouterr().err
        assert left.value.code == 2 and words in error and error.count("changed") <= 1, error
        assert tree_of(tmp_path / "run") == before
        shutil.rmtree(base)
        (tmp_path / "copy").rename(base)
        (tmp_path / "data.copy").rename(data)
    train.main(argv, stop_after(0))
    assert "continuing after step 3" in capsys.readouterr().out


def test_adapters_that_a_run_reads_are_inputs_too(tmp_path, tiny_model, pairs_file):
    save_adapter(add_lora(load_llama(tiny_model), 4, 8, 0.0), str(tmp_path / "sft"))
    argv = stopped(2, tiny_model, pairs_file, tmp_path / "run", "--sft_adapter", tmp_path / "sft")
    file = tmp_path / "sft/adapter_model.safetensors"
    flip(file, -1)
    with pytest.raises(ValueError, match=f"{file} has changed"):
        train.main(argv, stop_after(0))


def test_what_changes_rounding_alone_is_said_and_the_run_goes_on(tmp_path, tiny_model, pairs_file,
                                                                capsys):
    argv = stopped(3, tiny_model, pairs_file, tmp_path / "run")
    file = tmp_path / "run/args.json"
    flags = json.loads(file.read_text())
    file.write_text(json.dumps(flags | {"world_size": 2, "torch": "1.0", "device": "H100"}))
    train.main([*argv, "--micro_tokens", "512"], stop_after(0))
    line, = [line for line in capsys.readouterr().out.splitlines()
             if line.startswith("continuing with")]
    assert line.startswith("continuing with other rounding (device was 'H100', now 'cpu")
    assert "micro_tokens was 8192, now 512; torch was '1.0', now" in line
    assert "world_size was 2, now 1" in line


# ---- the run folder -----------------------------------------------------------------------------

def test_a_run_that_was_killed_in_its_first_write_starts_again(tmp_path):
    for leftovers in (["args.json.123.tmp"], [".lock"], [".lock", "args.json.7.tmp"]):
        folder = tmp_path / "-".join(leftovers)
        folder.mkdir()
        for name in leftovers:
            (folder / name).write_text("{")
        with own_output_dir(str(folder), {"seed": 1}, Ranks()):
            claim_output_dir(str(folder), {"seed": 1})
        assert [path.name for path in folder.iterdir()] == ["args.json"]
        (folder / "args.json").unlink()
        (folder / "args.json.txt").write_text("notes")                   # somebody's
        with pytest.raises(ValueError, match="holds no run"):
            claim_output_dir(str(folder), {"seed": 1})


def test_what_killed_processes_were_writing_goes_and_nothing_else_does(tmp_path):
    kept = ("metrics.jsonl", "my.tmp", "tmp-final", ".tmprc", "a.12.tmp.txt", "checkpoint-3")
    for name in (*kept, ".tmp-checkpoint-6", "metrics.jsonl.77.tmp", "args.json.8.tmp"):
        (tmp_path / name).mkdir() if "checkpoint" in name else (tmp_path / name).write_text("x")
    remove_leftovers(str(tmp_path), ["args.json"])
    assert len(list(tmp_path.iterdir())) == len(kept) + 2
    remove_leftovers(str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


def test_the_same_command_twice_at_once_is_refused_before_it_reads_or_writes(
        tmp_path, tiny_model, pairs_file):
    argv, inside = [], []

    def loss(policy_logps, reference_logps, stream, objective):
        before = tree_of(tmp_path / "run")
        with pytest.raises(ValueError, match=f"run is in use by process {os.getpid()} on "):
            train.main(argv, methods)
        assert tree_of(tmp_path / "run") == before
        inside.append(stream)
        return sft_loss(policy_logps)
    methods = METHODS | {"stopping": Method(loss, "positive", "none")}
    _, *argv = map(str, train_flags(tiny_model, pairs_file, tmp_path / "run", "--method",
                                    "stopping", "--max_steps", "2", "--micro_tokens", "8192"))
    train.main(argv, methods)
    assert len(inside) == 2 and len(logged(tmp_path / "run")) == 2
    assert not (tmp_path / "run/.lock").exists()


# ---- metrics ------------------------------------------------------------------------------------

@pytest.mark.parametrize("line, number", [
    ('{"step": 2, "lo', 2), ("[]", 2), ('{"loss": 1}', 2), ('{"step": "2"}', 2),
    ('{"step": 1}', 2), ('{"step": 9}', 3), ("[" * 9999, 2), ('{"step": NaN}', 2)])
def test_a_damaged_line_of_metrics_is_named(tmp_path, line, number):
    # Among others a line that another process wrote between: its step is not the next.
    rows = ['{"step": 1}', line, '{"step": 3}']
    file = tmp_path / "metrics.jsonl"
    file.write_text("\n".join(rows) + "\n")
    with pytest.raises(ValueError, match=rf"metrics.jsonl:{number}: damaged: .* remove the line"):
        rewind_metrics(str(tmp_path), 2)
    assert file.read_text() == "\n".join(rows) + "\n"
    file.write_text('{"step": 1}\n{"step": 3}\n{"step": 4}\n{"st')
    rewind_metrics(str(tmp_path), 3)
    assert file.read_text() == '{"step": 1}\n{"step": 3}\n'


@pytest.mark.parametrize("steps", [1, 3, 4, 5])
def test_lines_after_a_resume_average_the_steps_since_the_last_line(tmp_path, tiny_model,
                                                                   pairs_file, steps):
    # A line every 4 steps; stopped between two, on one, and after one.
    flags = (tiny_model, pairs_file, tmp_path / "run", "--logging_steps", "4")
    argv = stopped(steps, *flags)
    train.main(argv, stop_after(0))
    whole = [str(tmp_path / "whole") if flag == str(tmp_path / "run") else flag for flag in argv]
    train.main(whole, stop_after(0))
    assert [line["step"] for line in logged(tmp_path / "run")] == [4, 6]
    assert logged(tmp_path / "run") == logged(tmp_path / "whole")
    assert adapter_hash(tmp_path / "run") == adapter_hash(tmp_path / "whole")


# ---- the folder while a run writes to it --------------------------------------------------------

def test_a_folder_that_is_deleted_during_a_run_is_an_error(tmp_path, tiny_model, pairs_file,
                                                          capsys):
    # Before, the next checkpoint made it anew, without args.json, and the run ended with code 0.
    for logging_steps in ("1", "100"):
        steps = []

        def loss(policy_logps, reference_logps, stream, objective, steps=steps):
            steps.append(stream)
            if len(steps) == 2:
                shutil.rmtree(tmp_path / "run")
            return sft_loss(policy_logps)
        _, *argv = map(str, train_flags(
            tiny_model, pairs_file, tmp_path / "run", "--method", "stopping", "--max_steps", "4",
            "--logging_steps", logging_steps, "--save_steps", "1", "--micro_tokens", "8192"))
        with pytest.raises(SystemExit) as left:
            run_cli(lambda: train.main(argv, METHODS | {"stopping": Method(
                loss, "positive", "none")}))
        error = capsys.readouterr().err
        assert left.value.code == 2 and str(tmp_path / "run") in error, error
        assert error.count("\n") == 1 and not (tmp_path / "run").exists()


# ---- a file of answers --------------------------------------------------------------------------

@pytest.fixture
def answers(tmp_path, tiny_model, pairs_file):
    """answers(**changes): flags of a generate.py command."""
    def flags(**changes):
        return argparse.Namespace(**dict(
            model=tiny_model, adapter=None, dataset=str(pairs_file), batch_size=2,
            chat_template=None,
            out=str(tmp_path / "out.jsonl"), overwrite=False, seed=0) | changes)
    return flags


def test_a_file_of_answers_goes_on_after_a_kill_between_its_first_writes(tmp_path, answers,
                                                                        monkeypatch):
    out = tmp_path / "out.jsonl"
    for text in (None, "", "1\n2\n3\n"):
        for kill_at in (1, 2):
            if text is not None:
                out.write_text(text)
            calls, replace = [], os.replace

            def killed(*args):
                calls.append(args)
                if len(calls) == kill_at:
                    raise KeyboardInterrupt
                replace(*args)
            monkeypatch.setattr(os, "replace", killed)
            with pytest.raises(KeyboardInterrupt), own_file(answers(overwrite=True), 9):
                pass
            monkeypatch.undo()
            with own_file(answers(overwrite=kill_at == 1), 9) as done:
                assert done == 0 and out.read_text() == ""
            assert sorted(path.name for path in tmp_path.iterdir()) == [
                "out.jsonl", "out.jsonl.args.json"]
            for path in tmp_path.iterdir():
                path.unlink()


def test_a_file_of_answers_belongs_to_one_process_one_command_and_its_inputs(tmp_path, answers,
                                                                            tiny_model):
    (tmp_path / "out.jsonl.55.tmp").write_text("x")
    (tmp_path / "out.jsonl2.55.tmp").write_text("x")
    with own_file(answers(), 9) as done:
        assert done == 0
        (tmp_path / "out.jsonl").write_text("1\n2\n3\n4")
        with pytest.raises(ValueError, match=f"out.jsonl is in use by process {os.getpid()} on"):
            with own_file(answers(), 9):
                pytest.fail("two are inside")
    assert not (tmp_path / "out.jsonl.lock").exists()
    assert [path.name for path in tmp_path.glob("*.tmp")] == ["out.jsonl2.55.tmp"]
    with pytest.raises(ValueError, match="seed was 0, now 1"), own_file(answers(seed=1), 9):
        pass
    shutil.copytree(tiny_model, tmp_path / "model")
    flags = answers(model=str(tmp_path / "model"), out=str(tmp_path / "b"))
    with own_file(flags, 9):
        Path(flags.out).write_text("1\n2\n")
    flip(tmp_path / "model/model.safetensors", -1)
    with pytest.raises(ValueError, match="model/model.safetensors has changed"):
        with own_file(flags, 9):
            pass
    template = tmp_path / "given.jinja"
    template.write_text("a")
    flags = answers(chat_template=str(template), out=str(tmp_path / "c"))
    with own_file(flags, 9):
        Path(flags.out).write_text("1\n2\n")
    template.write_text("b")
    with pytest.raises(ValueError, match="given.jinja has changed"), own_file(flags, 9):
        pass
    with own_file(answers(), 9) as done:
        assert done == 2 and (tmp_path / "out.jsonl").read_text() == "1\n2\n"
    with pytest.raises(ValueError, match="is not a file"), own_file(answers(out="/dev/null"), 9):
        pass
