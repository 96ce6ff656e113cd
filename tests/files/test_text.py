"""files/text.py: likely causes, JSON with a named error, files and folders whole or absent."""
import hashlib
import os
import shutil
from pathlib import Path

import pytest
from conftest import tree_of

from files.text import (append_text, likely_cause, read_json, remove_folder, sha256, whole_lines,
                        write_folder, write_json, write_text)


@pytest.mark.parametrize("content, cause", [
    (b"version https://git-lfs.github.com/spec/v1\n", "; this is a git-lfs pointer"),
    (b"\n <!DOCTYPE html>", "; this is a web page"), (b"<HTML>", "; this is a web page"),
    (b"", ""), (b"{}", ""), (b"\xff\xfe\x00", "")])
def test_the_start_of_a_file_gives_its_likely_cause(tmp_path, content, cause):
    (tmp_path / "file").write_bytes(content)
    found = likely_cause(str(tmp_path / "file"))
    assert found.startswith(cause) and bool(found) == bool(cause)


def test_json_comes_back_and_anything_else_is_refused_by_file_name(tmp_path):
    file = tmp_path / "file.json"
    write_json(str(file), {"π": [1, 2.5, None, 1e30, -1e-300]})           # --log_z 1e30
    assert read_json(str(file)) == {"π": [1, 2.5, None, 1e30, -1e-300]} and file.read_text().endswith("}\n")
    for content, sentence in ((b"{", "not JSON"), (b"", "not JSON"), (b"\xff", "not JSON"),
                              (b"[]", "not a JSON object"), (b"null", "not a JSON object"),
                              (b"<html>", "this is a web page")):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"file.json: .*{sentence}"):
            read_json(str(file))


@pytest.mark.parametrize("raw, sentence", [
    (b"[" * 100_000, "nested too deeply"), (b'{"a":' * 100_000, "nested too deeply"),
    (b'{"a":' + b"[" * 60 + b"]" * 60 + b"}", "nested deeper than 50 levels"),
    (b'{"a": Infinity}', "Infinity is not a number"), (b'{"a": NaN}', "NaN is not a number"),
    (b'{"a": 1e400}', "1e400 is too large a number"),
    (b'{"a": 1' + b"0" * 400 + b"}", "10{29} is too large a number"),
    (b'{"a": 1' + b"0" * 5000 + b"}", "Exceeds the limit"),
    (b'{"a": "\\ud800"}', "surrogates not allowed"), (b" " * (64 << 20) + b"{}", "64 MiB")],
    ids=range(10))
def test_json_that_python_reads_and_nothing_here_writes_is_refused(tmp_path, raw, sentence):
    # Each ended in a traceback: of json itself, or of the first to print or to convert the value.
    (tmp_path / "file.json").write_bytes(raw)
    with pytest.raises(ValueError, match=f"file.json: not JSON: .*{sentence}"):
        read_json(str(tmp_path / "file.json"))


def test_json_holds_the_keys_that_it_must(tmp_path):
    file, keys = tmp_path / "file.json", {"step": int, "beta": float, "name": str | None}
    good = {"step": 3, "beta": 1, "name": None, "more": [1]}
    for value in (good, good | {"beta": 0.5, "name": "a"}, {"step": 3, "beta": 2.0}):
        write_json(str(file), value)
        assert read_json(str(file), keys) == value
    for change, sentence in (({"step": True}, "step is True; expected a whole number"),
                             ({"step": 3.0}, "step is 3.0; expected a whole number"),
                             ({"step": "x" * 99}, "step is 'xxx.{56}; expected a whole number"),
                             ({"beta": False}, "beta is False; expected a number"),
                             ({"beta": None}, "beta is None; expected a number"),
                             ({"name": {}}, "name is {}; expected text or null")):
        write_json(str(file), good | change)
        with pytest.raises(ValueError, match=f"file.json: {sentence}$"):
            read_json(str(file), keys)
    write_json(str(file), {"beta": 1})
    with pytest.raises(ValueError, match="step is missing; expected a whole number"):
        read_json(str(file), keys)


def test_a_line_without_its_end_is_left_out(tmp_path):
    # What a kill left of the last line, cut inside a character too.
    file = tmp_path / "rows.jsonl"
    assert whole_lines(str(file)) == []
    for raw, lines in ((b"", []), (b"a", []), (b"a\nb\n", ["a\n", "b\n"]),
                       (b"a\nb\n\xc3", ["a\n", "b\n"]), ("ä\n\nb".encode(), ["ä\n", "\n"])):
        file.write_bytes(raw)
        assert whole_lines(str(file)) == lines


def test_a_hash_is_that_of_the_bytes(tmp_path):
    content = os.urandom(300_000)
    (tmp_path / "file").write_bytes(content)
    assert sha256(str(tmp_path / "file")) == hashlib.sha256(content).hexdigest()


def test_a_file_is_replaced_in_one_step(tmp_path, monkeypatch):
    # A kill before the rename leaves the old content; the rename comes after the flush to disk.
    file, flushed = tmp_path / "file", []
    write_text(str(file), "old")

    def kill(*_):
        assert flushed, "renamed before it was on the disk"
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", flushed.append)
    monkeypatch.setattr(os, "replace", kill)
    with pytest.raises(KeyboardInterrupt):
        write_text(str(file), "new")
    assert tree_of(tmp_path) == {"file": b"old"}
    monkeypatch.undo()
    write_text(str(file), "new")
    assert file.read_text() == "new"


def test_a_folder_is_whole_or_absent(tmp_path):
    # What a killed run left under the temporary name does not end up in the folder.
    def write(folder, kill=False):
        Path(folder, "a").write_text("a")
        if kill:
            raise KeyboardInterrupt
        Path(folder, "b").write_text("b")

    path = str(tmp_path / "final")
    with pytest.raises(KeyboardInterrupt):
        write_folder(path, lambda folder: write(folder, kill=True))
    assert tree_of(tmp_path) == {}                           # an error leaves nothing
    (tmp_path / ".tmp-final").mkdir()                        # a kill may
    (tmp_path / ".tmp-final/rest").write_text("x")
    write_folder(path, write)
    assert tree_of(tmp_path) == {"final": None, "final/a": b"a", "final/b": b"b"}
    write_folder(path, lambda folder: pytest.fail("an existing folder stays"))


def test_a_folder_that_is_removed_is_whole_or_gone(tmp_path, monkeypatch):
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3/a").write_text("a")
    (tmp_path / ".tmp-checkpoint-3").mkdir()                 # of a kill in a removal
    (tmp_path / ".tmp-checkpoint-3/b").write_text("b")
    rmtree = shutil.rmtree

    def kill(path, **options):
        if options:
            return rmtree(path, **options)
        raise KeyboardInterrupt
    monkeypatch.setattr(shutil, "rmtree", kill)
    with pytest.raises(KeyboardInterrupt):
        remove_folder(str(tmp_path / "checkpoint-3"))
    assert tree_of(tmp_path) == {".tmp-checkpoint-3": None, ".tmp-checkpoint-3/a": b"a"}


def test_a_file_that_cannot_be_written_is_named():
    # The system's error for a full disk is "[Errno 28] No space left on device", without the file.
    with pytest.raises(OSError, match="^/dev/full cannot be written: No space left on device$"):
        append_text("/dev/full", "x")
    with pytest.raises(OSError, match="^/nowhere/file cannot be written: No such file or direct"):
        write_text("/nowhere/file", "x")
