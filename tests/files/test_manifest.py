"""files/manifest.py: whatever changes in a saved folder is named, and what to do about it."""
import json

import pytest

from files.manifest import FINAL, check_final, read_manifest, write_manifest


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "weights").write_bytes(b"abc")
    (tmp_path / "config").write_bytes(b"{}")
    write_manifest(str(tmp_path / "state.json"), step=4, loop=[0.1, 1e-17], torch="2")
    return tmp_path


def read(folder):
    return read_manifest(str(folder / "state.json"), "do this")


def test_what_was_written_comes_back_and_other_files_may_come_to_it(folder):
    (folder / "README.md").write_text("mine")
    values = read(folder)
    assert values.pop("sha256").keys() == {"weights", "config"}
    assert values == {"step": 4, "loop": [0.1, 1e-17], "torch": "2"}


@pytest.mark.parametrize("key, value", [("step", 6), ("sha256", {}), ("loop", [0.2, 1e-17]),
                                        ("torch", None), ("more", 1), ("checksum", "0" * 64)])
def test_an_edited_value_is_refused(folder, key, value):
    # "step": 6 in checkpoint-4 would train on wrongly, "sha256": {} would switch checking off.
    file = folder / "state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(ValueError, match="state.json is damaged .*; do this"):
        read(folder)


@pytest.mark.parametrize("text, words", [
    ("{", "state.json: not JSON"), ("[]", "not a JSON object"), ("{}", "sha256 is missing"),
    ('{"sha256": 1}', "sha256 is 1"), ('{"sha256": {}}', "checksum is missing")])
def test_what_is_no_manifest_is_refused(folder, text, words):
    (folder / "state.json").write_text(text)
    with pytest.raises(ValueError, match=f"{words}.*; do this"):
        read(folder)


def test_a_file_that_is_damaged_or_missing_is_named(folder):
    (folder / "weights").write_bytes(b"abd")
    with pytest.raises(ValueError, match="weights is damaged .*; do this"):
        read(folder)
    (folder / "weights").unlink()
    with pytest.raises(ValueError, match="weights is missing; do this"):
        read(folder)
    (folder / "state.json").unlink()
    with pytest.raises(ValueError, match="No such file.*state.json.*; do this"):
        read(folder)


def test_a_folder_of_another_program_has_none(tmp_path):
    # Trainers of transformers write a trainer_state.json of their own beside an adapter.
    (tmp_path / "trainer_state.json").write_text('{"log_history": [NaN]}')
    assert check_final(str(tmp_path)) == {}
    write_manifest(str(tmp_path / FINAL), args_sha256="x")
    assert check_final(str(tmp_path))["args_sha256"] == "x"
