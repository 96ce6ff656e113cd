"""From a path to rows: containers, folders, what is no data file, files that never end."""
import gzip
import json
import re
import tracemalloc
from collections import Counter

import pytest
from conftest import write_bytes, write_jsonl

from data import read_dataset
from files import rows
from files.rows import data_files, dataset_sha256, read_rows
from files.text import sha256

ROW = {"prompt": "Why?", "completion": "Because.", "label": True}


def read(path):
    counts = Counter()
    return read_dataset(str(path), counts), counts


def test_every_container_gives_the_same_rows(tmp_path):
    # JSON lines, CRLF, byte order mark, blank lines, one array, gzip under any name.
    rows = [ROW, ROW | {"prompt": "Ünï 😀"}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    plain, array = "\n".join(lines), json.dumps(rows, indent=1)
    files = {"plain.jsonl": plain, "end.jsonl": plain + "\n",
             "crlf.jsonl": "\r\n".join(lines) + "\r\n", "bom.jsonl": "\ufeff" + plain,
             "blank.jsonl": "\n \r\n" + "\n\n\n".join(lines), "array.json": "\n " + array,
             "bom.json": "\ufeff" + array, "rows.jsonl.gz": plain, "array.json.gz": array}
    paths = [write_bytes(tmp_path / name, text.encode()) for name, text in files.items()]
    (tmp_path / "named.jsonl").write_bytes(gzip.compress(plain.encode()))
    for path in [*paths, str(tmp_path / "named.jsonl")]:
        records, counts = read(path)
        assert counts["rows"] == 2, path
        assert [(r.prompt[0][1], r.responses, r.scores) for r in records] == [
            ("Why?", ("Because.",), (1.0,)), ("Ünï 😀", ("Because.",), (1.0,))], path


def test_line_numbers_count_blank_lines(tmp_path):
    # An editor shows the bad row at line 5; counting rows only would say 3.
    path = write_jsonl(tmp_path / "rows.jsonl", ["", ROW, "", ROW, "{"])
    with pytest.raises(ValueError, match=r"rows\.jsonl:5: "):
        read(path)


def test_several_files_and_a_folder_are_one_data_set(tmp_path):
    # Each is recognised by its own rows; what a folder holds beside JSON is left alone.
    folder = tmp_path / "data"
    (folder / "old").mkdir(parents=True)
    pair = {key: f"\n\nHuman: Hi\n\nAssistant: {key}" for key in ("chosen", "rejected")}
    files = [write_jsonl(folder / "a.jsonl", [ROW, ROW]),
             write_jsonl(folder / "b.jsonl.gz", [pair]),
             write_bytes(folder / "c.json", json.dumps([ROW | {"prompt": "How?"}]).encode())]
    (folder / "README.md").write_text("About.")
    write_jsonl(folder / "old/d.jsonl", [ROW])
    assert data_files(str(folder)) == files
    records, counts = read(folder)
    assert [record.prompt[0][1] for record in records] == ["Why?", "Why?", "Hi", "How?"]
    assert [counts[f"rows of {file}"] for file in files] == [2, 1, 1] and counts["rows"] == 4
    assert read(f"{files[2]}, {files[0]}")[0] == [records[3], *records[:2]]
    comma = write_jsonl(tmp_path / "a,b.jsonl", [ROW])                  # a file's name comes first
    assert data_files(comma) == [comma]
    assert dataset_sha256(files[0]) == sha256(files[0])
    digests = {dataset_sha256(str(folder)), dataset_sha256(",".join(files[:2]))}
    write_jsonl(folder / "a.jsonl", [ROW])
    assert len(digests | {dataset_sha256(str(folder))}) == 3


# ---- what is no data file -----------------------------------------------------------------------

GOOD = (json.dumps(ROW) + "\n").encode()
DAMAGED = bytearray(gzip.compress(GOOD * 500))
DAMAGED[15:18] = b"\xff\xff\xff"                       # inside the deflate stream: zlib.error
FILES = {      # name, bytes as they lie on disk, words of the message
    "lfs pointer": ("a.jsonl.gz", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
                    "git-lfs pointer"),
    "web page": ("a.jsonl", b"<!DOCTYPE html>\n<title>Not found</title>\n", "web page"),
    "not gzip": ("a.jsonl.gz", GOOD, "not a gzip file"),
    "cut gzip": ("a.jsonl.gz", gzip.compress(GOOD * 99)[:-9], "damaged gzip"),
    "junk after gzip": ("a.jsonl.gz", gzip.compress(GOOD) + b"junk", "damaged gzip"),
    "broken gzip": ("a.jsonl.gz", bytes(DAMAGED), "damaged gzip"),
    "invalid UTF-8": ("a.jsonl", GOOD + b'{"prompt": "\xff\xfe"}\n',
                      "a.jsonl:2: bad JSON: 'utf-8'"),
    "UTF-16": ("a.jsonl", GOOD.decode().encode("utf-16"), "a.jsonl:1: bad JSON"),
    "empty": ("a.jsonl", b"", "no rows"),
    "blank": ("a.jsonl", b"\n \r\n\n", "no rows"),
    "empty array": ("a.json", b" [ ]", "no rows"),
    "bad array": ("a.json", b"[{},\n{]", "bad JSON"),
    "array of numbers": ("a.json", b"[1]", "a.json[0]: expected an object"),
    "nested without end": ("a.json", b"[" * 100_000, "bad JSON"),
}


@pytest.mark.parametrize("fault", FILES)
def test_a_bad_file_is_named(tmp_path, fault):
    # One ValueError with the file's name, whatever lies on disk; anything else is a traceback.
    name, raw, words = FILES[fault]
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(ValueError) as caught:
        read(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value) and words in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    # A folder without any is no data file either.
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"{path}: no such data file"):
            read(path)


def test_the_folder_of_a_model_or_a_run_is_no_data(tmp_path):
    # Bug this catches: bad JSON in line 1 of its config.json.
    for name in ("config.json", "args.json"):
        (tmp_path / name).write_text("{\n}")
        with pytest.raises(ValueError, match=f"^{tmp_path} holds {name}: it is the folder of a mod"):
            read(str(tmp_path))
        (tmp_path / name).unlink()


def test_hub_names_and_tables_are_told_how_to_be_converted(tmp_path, monkeypatch):
    # Each was "no such data file", or bad JSON of a file's first bytes.
    monkeypatch.chdir(tmp_path)
    commands = {"Anthropic/hh-rlhf": "datasets.load_dataset('Anthropic/hh-rlhf', split='train')"
                                     ".to_json('hh-rlhf.jsonl')"}
    for name, how in (("a.csv", "pandas.read_csv('a.csv')"),
                      ("b.tsv", r"read_csv('b.tsv', sep='\t')"),
                      ("c.csv.gz", "pandas.read_csv('c.csv.gz')"),
                      ("data/d.parquet", "pandas.read_parquet('data/d.parquet')")):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"PAR1 or prompt,completion")
        stem = name.removesuffix(".gz").rpartition(".")[0]
        commands[name] = f"{how}.to_json('{stem}.jsonl', orient='records', lines=True)"
    commands["data"] = commands["data/d.parquet"]                        # a folder of such files
    for path, command in commands.items():
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            read(path)
        sentence = str(caught.value)
        script = re.search('python -c "(.*)"', sentence)[1]
        compile(script, path, "exec")
        assert command in script and sentence.startswith(path) and "\n" not in sentence


def test_text_that_is_not_utf_8_is_told_how_to_become_it(tmp_path):
    for encoding, name in (("latin-1", "latin1"), ("utf-16", "utf-16")):
        path = tmp_path / f"{encoding}.jsonl"
        path.write_bytes(json.dumps(ROW | {"prompt": "é"}, ensure_ascii=False).encode(encoding))
        with pytest.raises(ValueError, match=f"{path.name}:1: .*iconv -f {name} -t utf-8"):
            read(path)


# ---- size ---------------------------------------------------------------------------------------

def test_a_small_file_that_unpacks_to_much_more_is_refused_on_the_way(tmp_path, monkeypatch):
    # A gzip bomb, as one line and as many: 16 MiB of a 16 kB file would be 16 GiB of 16 MB.
    monkeypatch.setattr(rows, "UNPACKED_FREE", 1 << 18)
    for name, raw in (("zeros", b"0" * (16 << 20)), ("lines", (b" " * 1000 + b"\n") * 16_000)):
        path = tmp_path / f"{name}.jsonl.gz"
        path.write_bytes(gzip.compress(raw))
        tracemalloc.start()
        with pytest.raises(ValueError, match=f"{name}.jsonl.gz: unpacks to more than 100 times"):
            read(path)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
        tracemalloc.stop()


def test_a_file_with_many_equal_rows_is_no_bomb(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl.gz", [ROW] * 20_000)
    assert (tmp_path / "rows.jsonl.gz").stat().st_size < 20_000 * 60 / 100
    assert sum(1 for _ in read_rows(path)) == 20_000


def test_rows_are_read_one_at_a_time(tmp_path):
    # What stands behind a row is not read before it is asked for: neither damage nor a gigabyte.
    path = write_jsonl(tmp_path / "rows.jsonl.gz", [ROW, "{"])
    found = read_rows(path)
    assert next(found) == (f"{path}:1", ROW)
    with pytest.raises(ValueError, match=":2: bad JSON"):
        next(found)
