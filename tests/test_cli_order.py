"""What can be refused cheaply is refused first: before data are read and weights are loaded."""
import functools
import json
import os

import pytest
from conftest import write_jsonl

import data
import eval as evaluate
import generate
import judge.__main__ as judge_command
import lora
import model
import train
from files import rows, weights
from files.cli import run_cli
from rlhf import ppo
from tools import export, heatmap


@pytest.fixture
def place(tmp_path, tiny_model, monkeypatch):
    """A working folder with a finished run, an unfinished one and a data file; nothing may be read
    of data or weights."""
    def too_late(*_):
        pytest.fail("data are read, or weights loaded")
    write_jsonl(tmp_path / "data.jsonl", [{"prompt": "a?", "completion": "b"}])
    flags = {"method": "ulma", "model_name_or_path": tiny_model, "bf16": False, "lora_r": 4,
             "dataset": "data.jsonl", "beta": 0.1, "held_out": 0.0, "max_length": 64,
             "max_prompt_length": 32}
    for name, entries in (("done", ["final"]), ("killed", ["checkpoint-20", "checkpoint-100"])):
        for entry in entries:
            os.makedirs(tmp_path / "runs" / name / entry)
        (tmp_path / "runs" / name / "args.json").write_text(json.dumps(flags))
    for module, name in ((rows, "read_lines"), (weights, "read_file"), (lora, "read_file"),
                         (model, "read_files")):
        monkeypatch.setattr(module, name, too_late)
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


UNFINISHED = ("runs/killed is an unfinished run, saved at step 100: the command that started it "
              "continues it")
GENERATE = "--model MODEL --dataset data.jsonl --out o.jsonl"
CASES = [
    (train.main, "--lerning_rate 1", "no flag --lerning_rate; did you mean --learning_rate?"),
    (train.main, "--model_name_or_path lmsys/vicuna-7b-v1.5 --dataset data.jsonl",
     "lmsys/vicuna-7b-v1.5: no such", "hf download lmsys/vicuna-7b-v1.5 --local-dir vicuna-7b-v"),
    (train.main, "--model_name_or_path runs/done --dataset data.jsonl",
     "runs/done is a run, and its result is runs/done/final"),
    (train.main, "--model_name_or_path MODEL --dataset data.jsonl --output_dir runs/done",
     "runs/done holds a run with other flags"),
    (train.main, "--model_name_or_path MODEL --dataset data.jsonl --sft_adapter runs/done",
     "runs/done/adapter_config.json: no such file", "its result is runs/done/final"),
    (train.main, "--model_name_or_path MODEL --dataset data.jsonl --sft_adapter runs/killed/final",
     UNFINISHED),
    (train.main, "--per_device_train_batch_size 4", "there is no flag --per_device_train_batch_size; "
     "--batch_size is a whole step's, over all ranks"),
    (train.main, "--model_name_or_path MODEL --dataset data.jsonl --lora_r 1000000000 --max_steps "
     "1 --seed 10000000000", "--seed 10000000000 must be a number in [-2147483648, 2147483647]"),
    (generate.main, f"{GENERATE} --adapter nothing", "there is no folder nothing"),
    (generate.main, f"{GENERATE} --adapter MODEL", "is a whole model"),
    (generate.main, f"{GENERATE} --adapter runs/killed", UNFINISHED),
    (generate.main, "--model MODEL --dataset data.jsonl --out data.jsonl",
     "data.jsonl exists and was not written by this command"),
    (generate.main, "--model MODEL --dataset data.jsonl --out runs", "runs is not a file"),
    (generate.main, "--model nothing", "nothing: no such tokenizer file", "no folder nothing"),
    (export.main, "--model MODEL --adapter runs/done --out merged", "result is runs/done/final"),
    (export.main, "--model MODEL --adapter nothing --out runs", "runs is there already"),
    (evaluate.main, "runs/killed", "runs/killed is not a finished run", UNFINISHED),
    (evaluate.main, "runs/done/final", "the run is runs/done"),
    (heatmap.main, "runs/killed", UNFINISHED),
    (ppo.main, "--reward_model runs/killed", UNFINISHED),
    (ppo.main, "--reward_modle runs/killed", "there is no flag --reward_modle; did you mean --rew"),
    (judge_command.main, "rewards q.jsonl --reward_model runs/done --out data.jsonl",
     "data.jsonl exists"),
    (judge_command.main, "ask q.jsonl --modle x", "no flag --modle; did you mean --model?"),
    (data.main, "--shwo 3", "there is no flag --shwo; did you mean --show?"),
]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_it_is_refused_by_one_sentence_that_says_what_to_do(place, tiny_model, case, capsys):
    main, flags, *words = CASES[case]
    before = sorted(place.rglob("*"))
    with pytest.raises(SystemExit) as left:
        run_cli(functools.partial(main, flags.replace("MODEL", tiny_model).split()))
    error = capsys.readouterr().err
    assert left.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert not [word for word in words if word not in error], error
    assert sorted(place.rglob("*")) == before


def test_a_plan_of_more_steps_than_memory_holds_is_refused():
    from packing import plan_batches
    for epochs, max_steps in ((1e9, -1), (1, 10 ** 12)):
        with pytest.raises(ValueError, match=r"steps are more than can be planned \(10,000,000\)"):
            plan_batches([1, 1], 2, epochs, max_steps, 0)
    assert len(plan_batches([1, 1], 2, 1e9, 3, 0)) == 3
