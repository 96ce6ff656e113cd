"""files/text.py: likely causes, JSON with a named error, files and folders whole or absent."""
import hashlib
import os
from pathlib import Path

import pytest
from conftest import tree_of

from files.text import (likely_cause, read_json, sha256, whole_lines, write_folder, write_json,
                        write_text)


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
    write_json(str(file), {"π": [1, 2.5, None]})
    assert read_json(str(file)) == {"π": [1, 2.5, None]} and file.read_text().endswith("}\n")
    for content, sentence in ((b"{", "not JSON"), (b"", "not JSON"), (b"\xff", "not JSON"),
                              (b"[]", "not a JSON object"), (b"null", "not a JSON object"),
                              (b"<html>", "this is a web page")):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"file.json: .*{sentence}"):
            read_json(str(file))


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
    assert file.read_text() == "old"
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
    assert not os.path.exists(path) and (tmp_path / ".tmp-final").is_dir()
    (tmp_path / ".tmp-final/rest").write_text("x")
    write_folder(path, write)
    assert tree_of(tmp_path) == {"final": None, "final/a": b"a", "final/b": b"b"}
    write_folder(path, lambda folder: pytest.fail("an existing folder stays"))
