"""files/folders.py: what lies where something else was expected, and what to do about it."""
import pytest
from conftest import write_bytes

from files.folders import what_it_is


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A model, an adapter, a finished run and two unfinished ones, in the working folder."""
    for file, text in (("model/config.json", "{}"), ("runs/done/args.json", "{}"),
                       ("runs/done/final/adapter_config.json",
                        '{"base_model_name_or_path": "vicuna"}'),
                       ("runs/new/args.json", "{}"), ("runs/killed/args.json", "{}"),
                       ("runs/killed/checkpoint-100/x", ""), ("runs/killed/checkpoint-20/x", ""),
                       ("file", ""), ("empty/x", "")):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        write_bytes(tmp_path / file, text.encode())
    monkeypatch.chdir(tmp_path)


FETCH = ("; there is no folder lmsys/vicuna-7b-v1.5; if it is on the Hugging Face Hub, fetch it: "
         "pip install huggingface_hub && hf download lmsys/vicuna-7b-v1.5 --local-dir "
         "vicuna-7b-v1.5; then give vicuna-7b-v1.5")
UNFINISHED = "is an unfinished run{}: the command that started it continues it"


@pytest.mark.parametrize("path, wanted, hint", [
    ("lmsys/vicuna-7b-v1.5", "model", FETCH), ("lmsys/vicuna-7b-v1.5/", "adapter", FETCH),
    ("nothing", "model", "; there is no folder nothing"),
    ("runs/mine", "run", "; there is no folder runs/mine"),      # runs/ is here: no name of the Hub
    ("file", "model", "; file is a file, and the folder is expected"),
    ("runs/done", "adapter", "; runs/done is a run, and its result is runs/done/final"),
    ("runs/done", "model", "; runs/done is a run, and its result is runs/done/final"),
    ("runs/done", "run", ""), ("runs/done/final/", "run", "; the run is runs/done"),
    ("runs/done/final", "adapter", ""),
    ("runs/done/final", "model", "; runs/done/final is an adapter, of the model vicuna"),
    ("runs/killed", "run", "; runs/killed " + UNFINISHED.format(", saved at step 100")),
    ("runs/killed/final", "adapter", "; runs/killed " + UNFINISHED.format(", saved at step 100")),
    ("runs/new", "model", "; runs/new " + UNFINISHED.format("")),
    ("model", "model", ""), ("model", "adapter", "; model is a whole model"), ("empty", "run", "")])
def test_what_lies_there_instead_is_named(folders, path, wanted, hint):
    assert what_it_is(path, wanted) == hint
