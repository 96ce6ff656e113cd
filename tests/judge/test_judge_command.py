"""python -m judge: files in, files and a table out, and bad files refused with their line."""
import json
import subprocess
import sys

import pytest
from conftest import ONE_THREAD, ROOT, write_jsonl

from files.lock import locked
from judge.__main__ import main
from judge.questions import read_questions


@pytest.fixture
def files(tmp_path):
    """Generations and a data file of three prompts, and their questions, through the command."""
    generations = write_jsonl(tmp_path / "mine.jsonl", [
        {"prompt": [["Human", f"{n}?"]], "completion": "yes" * n, "seed": 0, "where": f"f:{n}"}
        for n in range(3)])
    data = write_jsonl(tmp_path / "data.jsonl", [
        {"prompt": f"{n}?", "chosen": "no", "rejected": "well"} for n in range(3)])
    main(["prompts", generations, "--against", data, "--out", str(tmp_path / "questions.jsonl")])
    return tmp_path


def test_a_file_of_answers_is_scored(files, monkeypatch, capsys):
    questions = read_questions(str(files / "questions.jsonl"))
    answers = write_jsonl(files / "answers.jsonl", [
        {"id": name, "answer": "1>2 1=2" if row["order"] == "ab" else "1<2 1<2"}
        for name, row in questions.items()])
    monkeypatch.setattr(sys, "argv", ["judge", "score", "--questions",
                                      str(files / "questions.jsonl"), "--answers", answers,
                                      "--json", str(files / "table.json")])
    main()
    table = json.loads((files / "table.json").read_text())[answers]
    assert table["helpful"]["n"] == 3 and table["helpful"]["win"][0] == 1.0
    assert table["harmless"]["tie"][0] == 1.0 and table["harmless"]["orders disagree"][0] == 1.0
    assert "on 3 prompts, orders disagree on 3" in capsys.readouterr().out


def test_scoring_needs_no_torch(files):
    # Importing it takes longer than all else that `score` does. A fresh interpreter, files in.
    questions = read_questions(str(files / "questions.jsonl"))
    answers = write_jsonl(files / "answers.jsonl", [
        {"id": name, "answer": "1>2 1=2"} for name in questions])
    run = subprocess.run(
        [sys.executable, "-c", "import sys; from judge.__main__ import main; main(sys.argv[1:]); "
         "assert 'torch' not in sys.modules", "score", "--questions",
         str(files / "questions.jsonl"), "--answers", answers],
        cwd=ROOT, env=ONE_THREAD, capture_output=True, text=True)
    assert run.returncode == 0 and "orders disagree on 3" in run.stdout, run.stderr


@pytest.mark.parametrize("row, sentence", [
    ({"id": "9-ab", "answer": "1>2"}, "answers.jsonl:2: id '9-ab' is not among the 6 questions"),
    ({"answer": "1>2"}, "answers.jsonl:2: key 'id' is missing"),
    ("twice", "answers.jsonl:2: id .* was answered before, at .*answers.jsonl:1"),
    ("{", "answers.jsonl:2: bad JSON"),
    ({"id": None, "answer": 3}, "'answer' is '3'; expected str"),
    ({"id": None, "reward_a": 1.0}, "key 'reward_b' is missing")])
def test_answers_that_do_not_fit_are_refused_with_their_line(files, row, sentence):
    names = list(read_questions(str(files / "questions.jsonl")))
    first = {"id": names[1], "answer": "1>2 1=2"}
    row = first if row == "twice" else row
    if isinstance(row, dict) and row.get("id", 0) is None:
        row = row | {"id": names[0]}
    answers = write_jsonl(files / "answers.jsonl", [first, row])
    with pytest.raises(ValueError, match=sentence):
        main(["score", "--questions", str(files / "questions.jsonl"), "--answers", answers])


def test_nothing_is_overwritten_and_files_that_do_not_fit_are_refused(files):
    mine, questions = str(files / "mine.jsonl"), str(files / "questions.jsonl")
    with pytest.raises(FileExistsError, match="questions.jsonl exists"):
        main(["prompts", mine, "--against", mine, "--out", questions])
    other = write_jsonl(files / "other.jsonl", [{"prompt": "z?", "chosen": "a", "rejected": "b"}])
    with pytest.raises(ValueError, match="no prompt of .*mine.jsonl has an answer in"):
        main(["prompts", mine, "--against", other, "--out", str(files / "new.jsonl")])
    odd = write_jsonl(files / "odd.jsonl", [{"prompt": "text", "completion": "a"}])
    with pytest.raises(ValueError, match="odd.jsonl:1: 'prompt' is 'text'"):
        main(["prompts", odd, "--against", mine, "--out", str(files / "new.jsonl")])
    odd = write_jsonl(files / "odd.jsonl", [{"prompt": [["Human", 3]], "completion": "a"}])
    with pytest.raises(ValueError, match="odd.jsonl:1: .* is not a message"):
        main(["prompts", odd, "--against", mine, "--out", str(files / "new.jsonl")])
    with pytest.raises(ValueError, match="1 files of --questions but 2 of --answers"):
        main(["score", "--questions", questions, "--answers", mine, mine])
    with pytest.raises(FileExistsError, match="mine.jsonl exists"):
        main(["score", "--questions", questions, "--answers", mine, "--json", mine])
    assert not (files / "new.jsonl").exists()


@pytest.mark.parametrize("flag, value", [("workers", "0"), ("tries", "0"), ("timeout", "0")])
def test_flags_outside_their_range_are_named(tmp_path, flag, value):
    with pytest.raises(ValueError, match=f"--{flag} 0.* must be"):
        main(["ask", "q.jsonl", "--url", "http://127.0.0.1:9/v1", "--model", "m",
              "--out", str(tmp_path / "out.jsonl"), f"--{flag}", value])


def test_one_process_asks_for_a_file_of_answers(files):
    # Two would ask, and pay for, every question twice.
    out = str(files / "answers.jsonl")
    with locked(out + ".lock", out), pytest.raises(ValueError, match=f"{out} is in use by process"):
        main(["ask", str(files / "questions.jsonl"), "--url", "http://127.0.0.1:9", "--model", "m",
              "--out", out])
    assert not (files / "answers.jsonl").exists()
