"""Chat, one answer, a whole file: the commands of generate.py against its sampling."""
import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, TINY_VOCAB, save_tiny_model, tree_of, write_jsonl
from test_generate import make_adapter

import data
import generate as generate_file
from files.cli import run_cli, visible
from generate import generate, row_seeds
from lora import add_lora, load_adapter, lora_layers, save_adapter, start_from_adapter
from model import load_llama, save_llama


@pytest.fixture
def command(monkeypatch, capsys, tiny_model, tmp_path):
    """command(*flags, stdin=…): run generate.py in this process; (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*flags, stdin=(), model=tiny_model):
        lines = iter(stdin)

        def reads(prompt=""):
            print(prompt, end="")
            try:
                return next(lines)
            except StopIteration:
                raise EOFError from None
        monkeypatch.setattr("builtins.input", reads)
        capsys.readouterr()
        code = 0
        try:
            run_cli(lambda: generate_file.main(["--model", model, *map(str, flags)]))
        except SystemExit as left:
            code = left.code
        return (code, *capsys.readouterr())
    return run


def expected_text(folder, turns, seed, new, **options):
    model, tokenizer = load_llama(folder), data.Tokenizer(folder)
    ids, _ = data.encode_dialogue(tokenizer, turns)
    return tokenizer.decode(generate(model, [ids], new, generator=seed, **options)[0])


def shown(text):
    """As an answer is printed: what could steer the terminal is escaped."""
    return visible(text, "\n\t")


def test_prompt_prints_one_answer(command, tiny_model):
    code, out, _ = command("--prompt", "How do I fix it?", "--max_new_tokens", 30, "--seed", 4,
                           "--temperature", 1, "--top_p", 0.8)
    text = expected_text(tiny_model, [("Human", "How do I fix it?")], 4, 30, top_p=0.8)
    assert (code, out) == (0, shown(text) + "\n") and len(text) > 10


def test_chat_keeps_the_dialogue(command, tiny_model):
    code, out, _ = command("--max_new_tokens", 20, "--temperature", 0, stdin=["Hello", " ", "Why?"])
    first = expected_text(tiny_model, [("Human", "Hello")], 0, 20, temperature=0)
    turns = [("Human", "Hello"), ("Assistant", first.strip()), ("Human", "Why?")]
    second = expected_text(tiny_model, turns, 0, 20, temperature=0)
    assert code == 0 and first.strip()
    assert out == (f"USER: ASSISTANT: {shown(first)}\n"
                   f"USER: USER: ASSISTANT: {shown(second)}\nUSER: \n")


def test_pieces_are_printed_as_the_whole_text_decodes(tiny_tokenizer, capsys):
    # The emoji is four byte pieces: one at a time they would print four U+FFFD.
    tokenizer = data.Tokenizer(tiny_tokenizer)
    text = "the  red boat 🙂 é\n two"
    ids = tokenizer.encode(text)
    assert sum(tokenizer.pieces.is_byte(i) for i in ids) >= 6
    written = []
    original, sys.stdout.write = sys.stdout.write, lambda s: written.append(s)
    try:
        answer = generate_file.print_answer(
            tokenizer, ([(0, token)] for token in [*ids, tokenizer.eos_id]))
    finally:
        sys.stdout.write = original
    assert answer == text and "".join(written) == text + "\n"
    assert not any("\ufffd" in piece for piece in written) and len(written) > 10
    # an answer cut inside a character ends with what decoding gives
    broken = ids[:next(n for n, i in enumerate(ids) if tokenizer.pieces.is_byte(i)) + 2]
    capsys.readouterr()
    answer = generate_file.print_answer(tokenizer, ([(0, i)] for i in broken))
    assert answer == tokenizer.decode(broken)
    assert capsys.readouterr().out == tokenizer.decode(broken) + "\n"


def test_ctrl_c_stops_the_answer_and_keeps_it(tiny_tokenizer, capsys):
    tokenizer = data.Tokenizer(tiny_tokenizer)
    ids = tokenizer.encode("the red boat")

    def interrupted():
        for token in ids:
            yield [(0, token)]
        raise KeyboardInterrupt
    assert generate_file.print_answer(tokenizer, interrupted()) == "the red boat"
    assert capsys.readouterr().out == "the red boat\n"


ROWS = [{"prompt": f"{'Please. ' * (n % 5)}How do I fix number {n}?", "completion": "No."}
        for n in range(11)]


def test_dataset_answers_every_record(command, tiny_model, tmp_path):
    file = write_jsonl(tmp_path / "prompts.jsonl", ROWS)
    flags = ("--dataset", file, "--out", "out.jsonl", "--max_new_tokens", 12, "--batch_size", 4,
             "--temperature", 1, "--seed", 9)
    code, out, error = command(*flags)
    assert (code, out) == (0, "") and "4/11" in error and "11/11" in error
    assert error.endswith("tokens/s  0:00 left\n")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["seed"] for row in rows] == row_seeds(9, 11)
    for given, row in zip(ROWS, rows):
        assert row["prompt"] == [{"role": "user", "content": given["prompt"]}]
        text = expected_text(tiny_model, [("Human", given["prompt"])], [row["seed"]], 12)
        assert row["completion"] == text.strip()
        assert row["tokens"] <= 12 and (row["tokens"] == 12 or row["ended"])
    read = data.read_dataset("out.jsonl")            # our own reader takes what we write
    assert [record.prompt for record in read] == [
        (("Human", row["prompt"]),) for row, out in zip(ROWS, rows) if out["completion"]]


def test_a_cut_file_is_continued_to_the_same_bytes_and_no_other_is_touched(command, tmp_path):
    file, out = write_jsonl(tmp_path / "prompts.jsonl", ROWS), tmp_path / "out.jsonl"
    flags = ["--dataset", file, "--out", "out.jsonl", "--max_new_tokens", 12, "--batch_size", 4]
    assert command(*flags)[0] == 0
    whole = out.read_bytes()
    ends = [n + 1 for n, byte in enumerate(whole) if byte == ord("\n")]
    for size in (0, 5, ends[2], ends[3], ends[3] + 1, ends[9] - 1, len(whole) - 1, len(whole)):
        out.write_bytes(whole[:size])
        code, _, error = command(*flags)
        assert code == 0 and out.read_bytes() == whole, size
        # the same batches as before, so the same rounding
        assert {line.split("/")[0] for line in error.splitlines()} <= {"4", "8", "11"}, error
    # other flags, another data file, a file that another program wrote
    before = tree_of(tmp_path)
    code, _, error = command(*flags, "--temperature", 0.1)
    assert code == 2 and "temperature was 0.7, now 0.1" in error and "--overwrite" in error
    assert tree_of(tmp_path) == before
    write_jsonl(file, ROWS[:5])
    assert "dataset_sha256" in command(*flags)[2]
    (tmp_path / "mine.txt").write_text("mine")
    code, _, error = command(*flags[:2], "--out", "mine.txt")
    assert code == 2 and "mine.txt exists" in error
    assert (tmp_path / "mine.txt").read_text() == "mine"
    assert command(*flags, "--overwrite")[0] == 0 and len(out.read_text().splitlines()) == 5


def test_a_killed_run_is_continued_to_the_same_bytes(tiny_model, tmp_path):
    file = write_jsonl(tmp_path / "prompts.jsonl", ROWS * 8)
    flags = ["--model", tiny_model, "--dataset", file, "--max_new_tokens", "40",
             "--batch_size", "3", "--temperature", "1"]
    run = [sys.executable, str(ROOT / "generate.py"), *flags, "--out"]
    out = tmp_path / "out.jsonl"
    with subprocess.Popen([*run, str(out)], stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not (out.exists() and out.stat().st_size):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert 0 < len(out.read_text().splitlines()) < len(ROWS * 8)
    for name in ("out.jsonl", "other.jsonl"):
        generate_file.main([*flags, "--out", str(tmp_path / name)])
    assert out.read_bytes() == (tmp_path / "other.jsonl").read_bytes()


def test_adapter_and_reference_flags(command, tiny_model, tmp_path):
    model = load_llama(tiny_model)
    save_adapter(make_adapter(model), str(tmp_path / "adapter"))
    flags = ["--prompt", "How?", "--max_new_tokens", 20, "--temperature", 0]
    base, adapted = command(*flags)[1], command(*flags, "--adapter", "adapter")[1]
    assert command(*flags, "--adapter", "adapter", "--reference")[1] == base != adapted
    with_adapter = load_adapter(load_llama(tiny_model), str(tmp_path / "adapter"))
    tokenizer = data.Tokenizer(tiny_model)
    ids, _ = data.encode_dialogue(tokenizer, [("Human", "How?")])
    answer = tokenizer.decode(generate(with_adapter, [ids], 20, temperature=0)[0])
    assert visible(answer, "\n\t") + "\n" == adapted


def test_a_long_dialogue_loses_its_beginning(command, tmp_path, tiny_tokenizer):
    # 200 positions, 20 for the answer: BOS and the last 179 tokens of the prompt are left.
    folder = save_tiny_model(tmp_path / "short", tiny_tokenizer, max_position_embeddings=200)
    model, tokenizer = load_llama(folder), data.Tokenizer(folder)
    ids, _ = data.encode_dialogue(tokenizer, [("Human", "a red boat " * 100)])
    text = shown(tokenizer.decode(generate(model, [ids[:1] + ids[-179:]], 20, temperature=0)[0]))
    assert command("--prompt", "a red boat " * 100, "--max_new_tokens", 20, "--temperature", 0,
                   model=folder)[1] == text + "\n"


@pytest.mark.parametrize("flags, words", [
    (["--reference", "--prompt", "a"], ["--reference", "--adapter"]),
    (["--dataset", "a"], ["--dataset", "--out"]),
    (["--dataset", "a", "--out", "b", "--prompt", "c"], ["--prompt"]),
    (["--prompt", " "], ["--prompt", "empty"]),
    (["--prompt", "a", "--top_p", "0"], ["top_p"]),
    (["--prompt", "a", "--max_new_tokens", "2047"], ["2047", "2048"]),
    (["--dataset", "a", "--out", "b", "--batch_size", "0"], ["batch_size", "0"]),
    (["--dataset", "missing", "--out", "b"], ["missing"]),
    (["--prompt", "a", "--adapter", "missing"], ["missing"])])
def test_commands_refuse_in_one_sentence_and_write_nothing(command, tmp_path, flags, words):
    code, out, error = command(*flags)
    assert code == 2 and not out and error.startswith("error: ") and error.count("\n") == 1
    assert all(word in error for word in words) and tree_of(tmp_path) == {}


def test_a_padded_embedding_answers_in_text_alone(command, tmp_path, tiny_tokenizer):
    # 64 rows without a piece, one of them the likeliest by far; too few rows are refused.
    folder = save_tiny_model(tmp_path / "wide", tiny_tokenizer, vocab_size=TINY_VOCAB + 64)
    model = load_llama(folder)
    ids, _ = data.encode_dialogue(data.Tokenizer(folder), [("Human", "a")])
    with torch.no_grad():
        model.lm_head.weight[TINY_VOCAB + 9] = 50 * model(torch.tensor(ids))[-1]
    save_llama(model, folder)
    assert generate(model, [ids], 1, temperature=0)[0] == [TINY_VOCAB + 9]
    code, out, _ = command("--prompt", "a", "--max_new_tokens", 8, model=folder)
    unused = range(TINY_VOCAB, TINY_VOCAB + 64)
    answer = generate(model, [ids], 8, temperature=0, unused_ids=unused)[0]
    assert (code, out) == (0, shown(data.Tokenizer(folder).decode(answer)) + "\n")
    small = save_tiny_model(tmp_path / "small", tiny_tokenizer, vocab_size=TINY_VOCAB - 8)
    code, _, error = command("--prompt", "a", model=small)
    assert code == 2 and f"has {TINY_VOCAB} pieces, " in error and str(TINY_VOCAB - 8) in error


def test_every_id_of_a_list_ends_an_answer(command, tmp_path, tiny_tokenizer):
    # config.json names the tokenizer's 2 and another: an answer that ends in either has ended.
    folder = save_tiny_model(tmp_path / "ends", tiny_tokenizer, eos_token_id=(30, 2))
    model, tokenizer = load_llama(folder), data.Tokenizer(folder)
    model.lm_head.weight.data[30] = 0
    with torch.no_grad():
        ids, _ = data.encode_dialogue(tokenizer, [("Human", "a")])
        model.lm_head.weight[30] = 50 * model(torch.tensor(ids))[-1]
    save_llama(model, folder)
    file = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "a"}])
    flags = "--dataset", file, "--out", "out.jsonl", "--temperature", 0
    assert command(*flags, model=folder)[0] == 0
    row = json.loads((tmp_path / "out.jsonl").read_text())
    assert row["ended"] is True and row["tokens"] == 1


def test_an_adapters_run_decides_on_the_chat_template(command, tiny_model, tmp_path):
    # RUN/args.json names it, RUN/final has its text; another one that is asked for is noted.
    pytest.importorskip("jinja2")
    model = add_lora(load_llama(tiny_model), r=2, alpha=4, dropout=0.0)
    final = tmp_path / "run/final"
    save_adapter(model, str(final), tiny_model)
    (tmp_path / "run/args.json").write_text('{"chat_template": "some/file.jinja"}')
    (final / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ ('Q ' if loop.first) ~ m.content }}{% if loop.first %} A"
        "{% endif %}{% endfor %}")
    seen = []
    original = generate_file.encode_prompt

    def encode(tokenizer, turns):
        seen.append(tokenizer.decode(original(tokenizer, turns)))
        return original(tokenizer, turns)

    generate_file.encode_prompt = encode
    try:
        flags = ["--prompt", "how", "--max_new_tokens", 2, "--adapter", final]
        assert command(*flags)[0] == 0
        code, _, error = command(*flags, "--chat_template", "vicuna")
    finally:
        generate_file.encode_prompt = original
    assert seen[0] == "Q how A" and seen[1].endswith("USER: how ASSISTANT:")
    assert code == 0 and "--chat_template vicuna is another one than" in error


def test_an_adapter_on_top_of_another_is_generated_with_both(command, tiny_model, tmp_path):
    # The second adapter alone would be a model nobody trained; the reference has the first.
    folders = []
    for seed in (1, 2):
        model = add_lora(load_llama(tiny_model), r=4, alpha=8, dropout=0.0)
        generator = torch.Generator().manual_seed(seed)
        for layer in lora_layers(model).values():
            layer.lora_B.data = 0.3 * torch.randn(layer.lora_B.shape, generator=generator)
        folders.append(str(tmp_path / f"run{seed}/final"))
        save_adapter(model, folders[-1], tiny_model)
    (tmp_path / "run2/args.json").write_text(json.dumps({"sft_adapter": folders[0]}))
    flags = ("--prompt", "How?", "--temperature", "0", "--max_new_tokens", "20")
    code, _, error = command(*flags, "--adapter", folders[1])
    assert code == 2 and f"{folders[1]} was trained on top of {folders[0]}" in error
    _, both, _ = command(*flags, "--adapter", *folders)
    _, reference, _ = command(*flags, "--adapter", *folders, "--reference")
    model = start_from_adapter(load_llama(tiny_model), folders[0])
    tokenizer = data.Tokenizer(tiny_model)
    ids, _ = data.encode_dialogue(tokenizer, [("Human", "How?")])
    assert reference == tokenizer.decode(generate(model, [ids], 20, temperature=0)[0]) + "\n"
    second = load_adapter(model, folders[1])
    assert both != reference
    assert both == tokenizer.decode(generate(second, [ids], 20, temperature=0)[0]) + "\n"
