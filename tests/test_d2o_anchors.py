"""--anchors of D2O: completions that were sampled elsewhere, matched by prompt, tokenized once."""
import argparse
import contextlib
import io
import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT, finish, write_jsonl

import d2o
import train
from d2o import read_completions, read_given_anchors
from data import read_dataset
from files.cli import run_cli
from packing import make_trees, one_negative_per_tree
from tokenizer import Tokenizer, encode_dialogue

ROWS = [{"prompt": f"What is {n}?", "completion": f"Bad {n}.", "label": 0} for n in range(6)]
ROWS.append(ROWS[5] | {"completion": "Another bad one."})                  # two of one prompt
SIZES = dict(max_length=128, max_prompt_length=64, anchor_tokens=12)


def anchors_of(row, count=2, ended=True):
    """A row as an OpenAI-compatible server's answer, with the row's prompt beside it."""
    return {"prompt": row["prompt"], "choices": [
        {"index": k, "text": f" Good {k} for {row['prompt']}", "finish_reason":
         "stop" if ended else "length"} for k in range(count)]}


@pytest.fixture
def trees(tmp_path, tiny_model):
    records = read_dataset(write_jsonl(tmp_path / "bad.jsonl", ROWS))
    return one_negative_per_tree(make_trees(records, Tokenizer(tiny_model), "negative", 128, 64))


@pytest.fixture
def given(tmp_path, tiny_model, trees):
    """given(rows): the anchors of all trees in a file of these rows, two for each tree."""
    def read(rows, step=0, numbers=None):
        args = argparse.Namespace(anchors=write_jsonl(tmp_path / "given-0.jsonl", rows),
                                  num_anchors=2, output_dir="out", **SIZES)
        return read_given_anchors(args, trees, Tokenizer(tiny_model), step,
                                  list(range(len(trees))) if numbers is None else numbers)
    return read


# ---- rows ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("row, expected", [
    ({"completion": "a"}, [("a", True)]),
    ({"completion": "a", "ended": False, "seed": 1}, [("a", False)]),          # generate.py's
    ({"completions": ["a", "b"]}, [("a", True), ("b", True)]),
    ({"choices": [{"text": "a", "finish_reason": "stop"},
                  {"text": "b", "finish_reason": "length"}]}, [("a", True), ("b", False)]),
    ({"choices": [{"message": {"role": "assistant", "content": "a"}, "finish_reason": "stop"}]},
     [("a", True)]),
])
def test_completions_of_every_server_and_of_our_own_generator_are_read(row, expected):
    assert read_completions(row, "f:1") == expected


@pytest.mark.parametrize("row", [{"completion": 3}, {"completions": []}, {"choices": [{}]}, {},
                                 {"choices": [{"message": {"content": None}}]}, {"choices": ["a"]},
                                 {"choices": [{"message": "a"}]}])
def test_a_row_without_completions_is_named(row):
    with pytest.raises(ValueError, match="^f:1: "):
        read_completions(row, "f:1")


def test_anchors_are_matched_by_prompt_in_any_order(given, trees, tiny_model):
    # Ids are those of the text in the template, EOS last; two trees of one prompt share nothing.
    tokenizer = Tokenizer(tiny_model)
    rows = [anchors_of(row) for row in ROWS[:5]] + [anchors_of(ROWS[5], 4)]
    anchors, odd = given([*rows[::-1], anchors_of({"prompt": "Of another file?"})])
    assert odd == "2 of other prompts" and sorted(anchors) == list(range(7))
    for number, row in enumerate(ROWS):
        first = 2 if number == 6 else 0
        assert anchors[number] == [encode_dialogue(tokenizer, [
            ("Assistant", f"Good {k} for {row['prompt']}")])[1][:12] for k in (first, first + 1)]
    assert given(rows, numbers=[6])[0] == {6: anchors[5]}                      # a refresh's share
    messages = [row | {"prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    assert given(messages)[0] == anchors and given(messages, numbers=[0])[1].startswith("12 of oth")


def test_a_prompt_that_ends_on_an_assistants_turn_has_its_anchors_too(tmp_path, tiny_model):
    # Two Assistant turns in a row, as HH has them: the first belongs to the prompt.
    prompt = "\n\nHuman: Hi?\n\nAssistant: Wait."
    file = write_jsonl(tmp_path / "bad.jsonl", [{"chosen": f"{prompt}\n\nAssistant: Good.",
                                                 "rejected": f"{prompt}\n\nAssistant: Bad."}])
    given = write_jsonl(tmp_path / "given.jsonl", [anchors_of({"prompt": prompt})])
    (tmp_path / "sentences.txt").write_text("Be kind.")
    args = argparse.Namespace(anchors=given,
                              anchor_instructions=tmp_path / "sentences.txt", dataset=file,
                              num_anchors=2, output_dir="out", **SIZES)
    tokenizer = Tokenizer(tiny_model)
    trees = one_negative_per_tree(make_trees(read_dataset(file), tokenizer, "negative", 128, 64))
    assert len(read_given_anchors(args, trees, tokenizer, 0, [0])[0][0]) == 2
    prompt_ids = d2o.Instructions(args, tokenizer).prompt(trees[0].prompt_ids, 0)
    assert tokenizer.decode(prompt_ids).count("Wait.") == 1


def test_a_completion_that_did_not_end_has_no_eos(given, tiny_model):
    rows = [{"prompt": row["prompt"], "completion": "Hi", "ended": n % 2 > 0}
            for row in ROWS[:6] for n in range(4)]
    anchors, _ = given([*rows, {"prompt": ROWS[0]["prompt"], "completion": "", "ended": False}])
    ids = encode_dialogue(Tokenizer(tiny_model), [("Assistant", "Hi")])[1]
    assert anchors[0] == [ids[:-1], ids]


def test_prompts_without_enough_anchors_are_counted_and_refused(given):
    # Neither sampled here in their stead nor left out in silence.
    rows = [anchors_of(row) for row in ROWS[:6]]                               # 5 needs four
    with pytest.raises(ValueError, match=r"given-0.jsonl: 1 of 7 bad answers lack .* What is 5\?"):
        given(rows)
    with pytest.raises(ValueError, match="7 of 7 bad answers lack some of their 2 anchors"):
        given([anchors_of({"prompt": "What else?"})])


def test_longer_prompts_match_as_they_are_cut(tmp_path, tiny_model):
    row = {"prompt": "Why " * 200 + "so?", "completion": "Bad.", "label": 0}
    records = read_dataset(write_jsonl(tmp_path / "bad.jsonl", [row]))
    cut = one_negative_per_tree(make_trees(records, Tokenizer(tiny_model), "negative", 128, 64))
    args = argparse.Namespace(anchors=write_jsonl(tmp_path / "a.jsonl", [anchors_of(row)]),
                              num_anchors=2, output_dir="out", **SIZES)
    anchors, odd = read_given_anchors(args, cut, Tokenizer(tiny_model), 0, [0])
    assert len(cut[0].prompt_ids) == 64 and len(anchors[0]) == 2 and odd == ""


# ---- runs ---------------------------------------------------------------------------------------

def flags(tmp_path, tiny_model, *more):
    """A run of D2O on ROWS with two anchors each."""
    return ["--method", "d2o", "--model_name_or_path", tiny_model, "--dataset",
            write_jsonl(tmp_path / "bad.jsonl", ROWS), "--output_dir", str(tmp_path / "out"),
            "--num_anchors", "2", "--batch_size", "2", "--max_length", "128",
            "--max_prompt_length", "64", "--anchor_tokens", "12", *map(str, more)]


def test_a_run_trains_on_the_anchors_it_is_given(tmp_path, tiny_model, monkeypatch):
    # Nothing is sampled; log-probs under the references are computed as ever, and stored beside.
    monkeypatch.setattr(d2o, "generate", lambda *_: pytest.fail("sampled"))
    file = write_jsonl(tmp_path / "given.jsonl", [anchors_of(row, 4, False) for row in ROWS[:6]])
    shown = finish("train.py", *flags(tmp_path, tiny_model, "--anchors", file))
    assert "14 anchors, 14 of them cut at 12 tokens; left out: 10 more than needed" in shown
    rows = [json.loads(line) for line in open(tmp_path / "out/anchors-0.jsonl")]
    text = Tokenizer(tiny_model).decode(next(r for r in rows if r["tree"] == 3)["anchor_ids"][1])
    assert "Good 1 for What is 3?".startswith(text.strip()) and text.strip().startswith("Good 1")
    assert all(len(row["reference_logps"]) == 3 and max(row["reference_logps"]) < 0 for row in rows)
    assert (tmp_path / "out/final/adapter_model.safetensors").is_file()


def test_a_refresh_waits_for_the_file_of_its_step(tmp_path, tiny_model, capsys):
    # The run ends with its checkpoint saved and the name of the file; the same command goes on.
    rows = [anchors_of(row, 4) for row in ROWS[:6]]
    write_jsonl(tmp_path / "given-0.jsonl", rows)
    run = flags(tmp_path, tiny_model, "--anchors", tmp_path / "given-STEP.jsonl",
                "--refresh_anchors", 2, "--save_steps", 2)
    with pytest.raises(SystemExit) as left:
        run_cli(lambda: train.main(run))
    assert left.value.code == 2 and (tmp_path / "out/checkpoint-2").is_dir()
    sentence = capsys.readouterr().err
    assert f"{tmp_path}/given-2.jsonl: no such file: serve {tmp_path}/out/checkpoint-2" in sentence
    write_jsonl(tmp_path / "given-2.jsonl", rows[::-1])
    finish("train.py", *run)
    assert (tmp_path / "out/final").is_dir() and (tmp_path / "out/anchors-2.jsonl").is_file()


@pytest.mark.parametrize("more, words", [
    (["--anchors", "nothing.jsonl"], "--anchors: nothing.jsonl: no such file"),
    (["--anchors", "STEP.jsonl", "--refresh_anchors", "7", "--save_steps", "2"], "must divide 7"),
    (["--anchors", "one.jsonl", "--refresh_anchors", "2", "--save_steps", "2"], "write STEP in"),
])
def test_anchors_that_cannot_be_read_are_refused_before_anything_is(tmp_path, tiny_model, more,
                                                                    words, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "set_up", lambda *_: pytest.fail("went on to load the model"))
    with pytest.raises((ValueError, OSError), match=words):
        train.main(flags(tmp_path, tiny_model, *more))


# ---- the page that tells how --------------------------------------------------------------------

class Server(BaseHTTPRequestHandler):
    """Answers /v1/completions as vLLM does: as many choices as asked for, of the ids it gets."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/v1/completions" and all(type(i) is int for i in body["prompt"])
        answer = {"choices": [{"index": k, "text": f" Good {k}.", "finish_reason": "stop"}
                              for k in range(body["n"])]}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_):
        pass


def test_the_script_of_the_page_makes_a_file_that_a_run_reads(tmp_path, tiny_model):
    page = (ROOT / "docs/usage.md").read_text(encoding="utf-8")
    script = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1]
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    run = flags(tmp_path, tiny_model, "--anchors", tmp_path / "anchors-0.jsonl")
    for before, after in (("DIR", tiny_model), ("FILE", str(tmp_path / "bad.jsonl")),
                          ("http://localhost:8000", f"http://127.0.0.1:{server.server_port}"),
                          (", 11\n", ", 2\n"),
                          ("MAX_PROMPT_LENGTH = 1024, 512", "MAX_PROMPT_LENGTH = 128, 64")):
        script = script.replace(before, after)
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        exec(compile(script, "sample.py", "exec"), {"__name__": "__main__"})
    server.shutdown()
    (tmp_path / "anchors-0.jsonl").write_text(shown.getvalue())
    assert [len(json.loads(line)["choices"]) for line in shown.getvalue().splitlines()] == [
        2, 2, 2, 2, 2, 4]
    assert "14 anchors, 0 of them cut at 12 tokens\n" in finish("train.py", *run)


# ---- --anchor_instructions ----------------------------------------------------------------------

def test_an_anchor_is_sampled_under_a_sentence_that_is_never_trained_on(tmp_path, tiny_model,
                                                                        monkeypatch):
    # A stub for the sampler shows the prompts: the tree's dialogue with a system sentence, drawn by
    # each anchor's own seed. What is trained is the plain prompt.
    seen = []

    def stub(model, prompts, *_, generator, **__):
        seen.extend(zip(generator, prompts, strict=True))
        return [[7, 8]] * len(prompts)
    monkeypatch.setattr(d2o, "generate", stub)
    file, tokenizer = tmp_path / "instructions.txt", Tokenizer(tiny_model)
    sentences = ["Be kind.", "Harm nobody.", "Tell the truth."]
    file.write_text("Be kind.\n\n  Harm nobody. \nTell the truth.")
    run = flags(tmp_path, tiny_model, "--anchor_instructions", file, "--seed", 5,
                "--max_length", 256, "--max_prompt_length", 128)
    trained = []
    monkeypatch.setattr(train, "batch_counts", lambda trees: trained.extend(trees) or {
        "responses": 3 * len(trees), "positive": 2 * len(trees), "pairs": 2 * len(trees)})
    finish("train.py", *run)
    plain = [encode_dialogue(tokenizer, [("Human", row["prompt"])])[0] for row in ROWS]
    expected = []
    for number, row in enumerate(ROWS):
        for seed in d2o.anchor_seeds(5, 0, number, 2):
            turns = [("System", sentences[seed % 3]), ("Human", row["prompt"])]
            expected.append((seed, encode_dialogue(tokenizer, turns)[0]))
    assert sorted(seen) == sorted(expected) and len({tuple(ids) for _, ids in seen}) > len(ROWS)
    assert len(trained) == len(ROWS) and all(tree.prompt_ids in plain for tree in trained)

    # A killed run goes on with the anchors on disk; with another file it is another run.
    seen.clear()
    for folder in ("final", "checkpoint-2"):
        shutil.rmtree(tmp_path / "out" / folder, ignore_errors=True)
    finish("train.py", *run)
    assert not seen
    shutil.rmtree(tmp_path / "out/final")
    file.write_text("Be brief.")
    with pytest.raises(ValueError, match="instructions.txt has changed"):
        train.main(run)


def test_a_sentence_stands_before_the_dialogues_own_and_the_oldest_turns_make_room(tmp_path,
                                                                                  tiny_model):
    long = [("Human", "Why so? " * 20), ("Assistant", "Because."), ("Human", "And now?")]
    rows = [{"prompt": [{"role": "system", "content": "Own."}, {"role": "user", "content": "Hi"}],
             "completion": "Bad.", "label": 0},
            {"prompt": [{"role": {"Human": "user"}.get(role, "assistant"), "content": text}
                        for role, text in long], "completion": "Bad.", "label": 0},
            {"prompt": "Why so? " * 60, "completion": "Bad.", "label": 0}]
    (tmp_path / "instructions.txt").write_text("Be kind.")
    args = argparse.Namespace(anchor_instructions=str(tmp_path / "instructions.txt"),
                              dataset=write_jsonl(tmp_path / "bad.jsonl", rows), **SIZES)
    tokenizer = Tokenizer(tiny_model)
    instructions = d2o.Instructions(args, tokenizer)
    trees = make_trees(read_dataset(args.dataset), tokenizer, "negative", 128, 64)

    def ids(*turns):
        return encode_dialogue(tokenizer, turns)[0]
    made = [instructions.prompt(tree.prompt_ids, 3) for tree in trees]
    assert made[0] == ids(("System", "Be kind.\nOwn."), ("Human", "Hi"))
    assert made[1] == ids(("System", "Be kind."), long[2])
    assert made[2] == trees[2].prompt_ids


@pytest.mark.parametrize("text, more, words", [
    (None, [], "No such file .*file.txt"),
    (" \n\n", [], "file.txt holds no sentence"), ("\xcd", [], "file.txt: not UTF-8"),
    ("Be kind.", ["--anchors", "bad.jsonl"], "not for those of --anchors"),
])
def test_instructions_that_cannot_be_used_are_refused(tmp_path, tiny_model, text, more, words,
                                                      monkeypatch):
    monkeypatch.chdir(tmp_path)
    if text:
        (tmp_path / "file.txt").write_text(text, encoding="latin-1")
    with pytest.raises((ValueError, OSError), match=words):
        train.main(flags(tmp_path, tiny_model, "--anchor_instructions", tmp_path / "file.txt",
                         *more))
