"""Token ids on disk: the trees as they were, made once, never trusted where they are not whole."""
import json
import os
import signal
import threading
from argparse import Namespace
from collections import Counter

import pytest
from conftest import write_jsonl
from helpers import adapter_hash, finish, make_trees

from data import read_dataset, split_by_prompt
from files.cli import show_progress
from files.lock import locked
from packing import make_trees as trees_of
from packing import one_negative_per_tree, pair_points
from step import METHODS
from tokenizer import Tokenizer
from training import token_cache
from training.ranks import Ranks
from training.token_cache import TokenTable, flat_arrays, token_table, tokens_key

ROWS = [{"prompt": f"Why {n % 7} boats?", "completion": f"Nobody {n} paints.", "label": n % 3 == 0}
        for n in range(24)] + [
    {"prompt": f"Who {n}?", "chosen": "A red lamp.", "rejected": f"No, {n} doors."}
    for n in range(9)] + [{"prompt": "Cut " + "long " * 90, "completion": "It.", "label": 0.25}]


@pytest.fixture
def args(tmp_path, tiny_model):
    """Flags of a small data set of points and pairs, of two files."""
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data/a.jsonl", ROWS[:20])
    write_jsonl(tmp_path / "data/b.jsonl", ROWS[20:])
    return Namespace(method="ulma", dataset=str(tmp_path / "data"), model_name_or_path=tiny_model,
                     held_out=0.3, max_length=64, max_prompt_length=32,
                     output_dir=str(tmp_path / "runs/one"))


def make_table(args):
    return token_table(args, METHODS, Tokenizer(args.model_name_or_path), Ranks())


def folders(args):
    parent = os.path.dirname(args.output_dir)
    return sorted(os.listdir(parent)) if os.path.isdir(parent) else []


def test_a_table_gives_back_the_trees_it_was_made_of():
    trees = make_trees(40)
    table = TokenTable(**flat_arrays(trees))
    assert list(table) == trees and len(table) == 40
    assert table.num_tokens == [tree.num_tokens for tree in trees]
    assert flat_arrays(trees)["ids"].nbytes == 4 * table.shapes[:, 0].sum()
    with pytest.raises(IndexError):
        table[40]
    none = TokenTable(**flat_arrays([]))
    assert len(none) == 0 and list(none) == []


@pytest.mark.parametrize("method, trains_on", [("ulma", "all"), ("dpo", "pairs"),
                                               ("sft", "positive"), ("d2o", "negative")])
def test_the_trees_are_those_of_the_records_in_their_order(args, capsys, monkeypatch, method,
                                                           trains_on):
    # As if all records were held in memory and tokenized at once; also in chunks, and mapped.
    monkeypatch.setattr(token_cache, "TREES_AT_ONCE", 4)
    args.method, counts = method, Counter()
    records, held_out = split_by_prompt(read_dataset(args.dataset), args.held_out)
    if trains_on == "pairs":
        records = pair_points(records, counts)
    trees = trees_of(records, Tokenizer(args.model_name_or_path), trains_on, 64, 32, counts)
    expected = one_negative_per_tree(trees) if method == "d2o" else trees
    made = make_table(args)
    assert list(made) == expected and len(expected) > 4
    assert f"held out: {len(held_out)} records" in made.notes and held_out
    for note, number in counts.items():
        assert not number or f"{note:58} {number:7}" in made.notes
    assert "32 rows" not in made.notes and "34 rows" in made.notes
    read = make_table(args)
    assert list(read) == expected and read.notes == made.notes
    assert "token ids: those of " in capsys.readouterr().out and len(folders(args)) == 1


def test_every_input_has_a_folder_of_its_own(args, tiny_model, tmp_path, monkeypatch):
    def key():
        return tokens_key(args, METHODS[args.method].trains_on,
                          Tokenizer(args.model_name_or_path, chat_template=template))
    template, keys = None, []
    keys.append(key())
    for name, value in (("method", "dpo"), ("held_out", 0.2), ("max_length", 65),
                        ("max_prompt_length", 31)):
        before = getattr(args, name)
        setattr(args, name, value)
        keys.append(key())
        setattr(args, name, before)
    args.method = "pointwise_dpo"                        # trains on the same responses
    assert key() == keys[0]
    (tmp_path / "t.jinja").write_text("{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}"
                                      "{{ eos_token if m['role'] == 'assistant' }}{% endfor %}"
                                      "{% if add_generation_prompt %}[assistant]{% endif %}")
    pytest.importorskip("jinja2")
    template = str(tmp_path / "t.jinja")
    keys.append(key())
    template = None
    with open(os.path.join(args.dataset, "b.jsonl"), "a") as file:
        file.write(json.dumps(ROWS[0]) + "\n")
    keys.append(key())
    monkeypatch.setattr(token_cache, "SOURCES", ("data.py",))            # as if code had changed
    keys.append(key())
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("name", ["ids.bin", "sizes.bin", "scores.bin", "shapes.bin", "about.json"])
def test_a_damaged_folder_is_named(args, name):
    make_table(args)
    file = os.path.join(os.path.dirname(args.output_dir), *folders(args), name)
    with open(file, "rb") as stream:
        raw = stream.read()
    flipped = bytes([raw[0] ^ 1]) + raw[1:]
    for damaged in (flipped, raw[:-3], b""):
        with open(file, "wb") as stream:
            stream.write(damaged)
        with pytest.raises(ValueError, match=f"{name}.*; remove .*tokens-.*makes it again"):
            make_table(args)
    os.remove(file)
    with pytest.raises(ValueError, match=f"{name}.*; remove .*tokens-.*makes it again"):
        make_table(args)


def test_data_that_fail_leave_nothing(args):
    for row, sentence in (({"prompt": "Why?"}, r"b.jsonl:15: key 'completion'"),
                          (None, "no prompt has a better and a worse response")):
        args.method, args.held_out = "dpo", 0.0
        rows = [*ROWS[20:], row] if row else [ROWS[0], ROWS[0] | {"label": False}]
        write_jsonl(os.path.join(args.dataset, "b.jsonl"), rows)
        write_jsonl(os.path.join(args.dataset, "a.jsonl"), rows[:1])
        with pytest.raises(ValueError, match=sentence):
            make_table(args)
        assert folders(args) == []


def test_a_killed_process_leaves_nothing_that_is_trusted(args, tiny_model, monkeypatch):
    # Killed while its second chunk is written: the next run starts over and gets the same trees.
    monkeypatch.setattr(token_cache, "TREES_AT_ONCE", 4)
    made = []

    def kill_at_the_second(trees):
        made.append(trees)
        if len(made) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return flat_arrays(trees)
    process = os.fork()
    if not process:
        monkeypatch.setattr(token_cache, "flat_arrays", kill_at_the_second)
        try:
            make_table(args)
        finally:
            os._exit(0)
    assert os.waitpid(process, 0)[1] == signal.SIGKILL
    assert any(name.startswith(".tmp-tokens-") for name in folders(args))
    table = make_table(args)
    whole = trees_of(split_by_prompt(read_dataset(args.dataset), 0.3)[0], Tokenizer(tiny_model),
                     "all", 64, 32)
    assert list(table) == whole and len(folders(args)) == 1


def test_others_wait_for_the_one_that_makes_it(args, capsys, monkeypatch):
    # Another run has the lock, as if it were tokenizing; then the other ranks of a machine.
    tokenizer, made = Tokenizer(args.model_name_or_path), []
    folder = os.path.join(os.path.dirname(args.output_dir),
                          f"tokens-{tokens_key(args, 'all', tokenizer)}")
    write = token_cache.write_tokens
    monkeypatch.setattr(token_cache, "write_tokens", lambda *a, **k: made.append(write(*a, **k)))
    monkeypatch.setattr(Ranks, "is_first_here", property(lambda self: self.rank == 0))

    def run(rank):
        tables[rank] = token_table(args, METHODS, tokenizer, Ranks(rank, 3))
    tables, threads = {}, [threading.Thread(target=run, args=(rank,)) for rank in range(3)]
    with locked(folder + ".lock", folder):
        for thread in threads:
            thread.start()
        threads[0].join(0.5)
        assert all(thread.is_alive() for thread in threads) and not made
    for thread in threads:
        thread.join(60)
    assert len(made) == 1 and list(tables[0]) == list(tables[1]) == list(tables[2])
    assert capsys.readouterr().err.count("waiting: ") == 1


def test_a_run_on_tokens_that_were_there_has_the_same_bits(tmp_path, tiny_model, pairs_file):
    flags = ("--method", "dpo", "--max_steps", "3", "--held_out", "0.2")
    first = finish(tiny_model, pairs_file, tmp_path / "a", *flags)
    second = finish(tiny_model, pairs_file, tmp_path / "b", *flags)
    assert "token ids: those of" in second and "token ids: those of" not in first
    assert [line for line in first.splitlines() if "training on" in line or "prompts" in line] == [
        line for line in second.splitlines() if "training on" in line or "prompts" in line]
    assert adapter_hash(tmp_path / "a") == adapter_hash(tmp_path / "b")
    assert len(list(tmp_path.glob("tokens-*"))) == 1


def test_long_work_shows_how_far_it_is(capsys, monkeypatch):
    seconds = iter(range(0, 100, 2))
    monkeypatch.setattr("files.cli.time.monotonic", lambda: next(seconds))
    assert list(show_progress("abcdefg", "records", 7)) == list("abcdefg")
    assert capsys.readouterr().out.splitlines() == ["records: 3 of 7  0:08 left",
                                                    "records: 6 of 7  0:02 left"]
    assert list(show_progress("abcd", "records")) == list("abcd")
    assert list(show_progress("abcdefg", "records", shown=False)) == list("abcdefg")
    assert capsys.readouterr().out == "records: 3\n"
