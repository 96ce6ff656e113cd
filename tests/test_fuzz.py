"""Thousands of damaged files: each is refused in one sentence, or read without harm.

CASES=100000 python -m pytest tests/test_fuzz.py      more of them (default: 8,000 in all)
A failure names its case: the damage is a function of (target, number) alone.

Of every case: no exception but the kinds that `run_cli` turns into a sentence, which names a file
of its folder; no wait; no more memory than four times the files and what libraries keep; and out
of files of ours that checksums cover comes the undamaged content, or none.
"""
import contextlib
import gzip
import io
import json
import os
import resource
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import finish, save_tiny_model, write_jsonl
from damage import damage_of

import d2o
from data import read_dataset, read_prompts
from files.cli import HIDDEN, INPUT_ERRORS, sentence_of
from judge.endpoint import complete, end_last_line
from judge.questions import make_questions, read_answers, read_generations, read_questions
from judge.score import judged_pairs
from lora import add_lora, load_adapter, save_adapter, share_base
from model import load_llama, save_llama
from packing import Tree, make_trees
from step import METHODS, Objective
from tokenizer import Tokenizer, encode_dialogue, save_tokenizer
from tools.plot import read_metrics
from training.checkpoint import held_out_records, load_checkpoint, load_run, read_run, trainable
from training.output import check_output_dir, rewind_metrics, rows_done
from training.ranks import Ranks
from training.reference_cache import cache_reference, whole_batches, write_rows
from training.token_cache import TokenTable, flat_arrays, read_tokens, write_tokens

CASES = int(os.environ.get("CASES", 8000))
SECONDS, KEPT_BYTES, ROOM_BYTES = 60, 8 << 20, 1 << 30


@dataclass(frozen=True)
class Target:
    """Files of a folder that are damaged one at a time, and what reads them."""
    folder: Path
    files: list[str]
    read: Callable[[], object]
    covered: bool = False            # by checksums: what is read is what was written
    hashed: bool = False             # by their SHA-256: whatever changes is refused


# ---- a case -------------------------------------------------------------------------------------

class Hang(BaseException):
    """A case took longer than SECONDS."""


def hang(*_):
    raise Hang


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Inside, no allocation of ROOM_BYTES succeeds and no wait is longer than SECONDS."""
    before, (soft, hard) = signal.signal(signal.SIGALRM, hang), resource.getrlimit(
        resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)


def memory(name: str) -> int:
    """VmRSS or VmHWM, its peak, of this process in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{name}:")[2].split()[0]) << 10


MANIFESTS = ("manifest.json", "trainer_state.json", "about.json")      # other spaces may be read


def outcome(target: Target, file: str, expected: object) -> str:
    """What is wrong with reading the damaged folder; "" for nothing."""
    Path("/proc/self/clear_refs").write_text("5")               # the peak is what is used now
    before = memory("VmHWM")
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            found = target.read()
        if target.covered and found != expected or (
                target.hashed and not file.endswith(MANIFESTS)):
            return "a damaged file was read"
    except INPUT_ERRORS as error:
        sentence = sentence_of(error)
        if len(sentence) > 1000 or HIDDEN.search(sentence) or target.folder.name not in sentence:
            return f"no sentence that names a file: {sentence[:300]!r}"
    except Hang:
        return "a hang"
    except Exception as error:
        last = error.__traceback__
        while last.tb_next:
            last = last.tb_next
        return (f"{type(error).__name__}: {str(error)[:200]} "
                f"({last.tb_frame.f_code.co_filename}:{last.tb_lineno})")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    used, size = memory("VmHWM") - before, sum(
        (target.folder / name).stat().st_size for name in target.files)
    return f"{used >> 20} MiB for {size} bytes" if used > 4 * size + KEPT_BYTES else ""


def damaged(name: str, raw: bytes, rng: Random) -> bytes:
    """The bytes of a file, damaged; a gzip file sometimes inside."""
    if name.endswith(".gz") and rng.random() < 0.5:
        return gzip.compress(damaged(name[:-3], gzip.decompress(raw), rng), 1)
    return rng.choice(damage_of(name))(raw, rng)


def faults_of(name: str, target: Target, cases: int) -> list[str]:
    """What went wrong in cases 0 to `cases` of a target, a line each."""
    whole = {file: (target.folder / file).read_bytes() for file in target.files}
    expected, faults = target.read(), []
    with bounded():
        for number in range(cases):
            rng = Random(f"{name} {number}")
            file = rng.choice(target.files)
            raw = damaged(file, whole[file], rng)
            if raw == whole[file]:
                continue
            (target.folder / file).write_bytes(raw)
            if fault := outcome(target, file, expected):
                faults.append(f"{name} {number}: {file}: {fault}")
            for other, content in whole.items():         # reading may mend or cut it
                if not (target.folder / other).is_file() or (
                        target.folder / other).read_bytes() != content:
                    (target.folder / other).write_bytes(content)
    return faults


# ---- models, adapters, tokenizers ---------------------------------------------------------------

SMALL = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
             num_key_value_heads=1)
DIALOGUE = [("Human", "What is it? </s> <extra>"), ("Assistant", "A lamp.")]


def read_model(folder: Path) -> None:
    load_llama(str(folder))(torch.tensor([1, 300, 2]))


def sharded_model(folder, tokenizer):
    save_llama(load_llama(save_tiny_model(folder, None, **SMALL)), str(folder), 9000)
    shards = sorted(file.name for file in folder.glob("*.safetensors"))
    assert len(shards) > 1
    return Target(folder, ["config.json", "model.safetensors.index.json", *shards[:2]],
                  partial(read_model, folder))


def bin_model(folder, tokenizer):
    tensors = load_llama(save_tiny_model(folder, None, **SMALL)).state_dict()
    (folder / "model.safetensors").unlink()
    names, files = list(tensors), ["pytorch_model-1.bin", "pytorch_model-2.bin"]
    for part, file in zip((names[:4], names[4:]), files):
        torch.save({name: tensors[name].clone() for name in part}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {
        name: files[number >= 4] for number, name in enumerate(names)}}))
    return Target(folder, ["pytorch_model.bin.index.json", *files], partial(read_model, folder))


def adapter(folder, tokenizer):
    base = load_llama(save_tiny_model(folder / "base", None, **SMALL))
    save_adapter(add_lora(share_base(base), r=2, alpha=4), str(folder), "base")
    return Target(folder, ["adapter_config.json", "adapter_model.safetensors"],
                  lambda: str(load_adapter(share_base(base), str(folder))))


def read_tokenizer(folder: Path, chat_template: str | None) -> None:
    tokenizer = Tokenizer(str(folder), chat_template=chat_template)
    prompt_ids, response_ids = encode_dialogue(tokenizer, DIALOGUE)
    tokenizer.decode(prompt_ids + response_ids)
    (folder / "copy").mkdir(exist_ok=True)
    save_tokenizer(tokenizer, str(folder / "copy"))


def write_tokenizer_files(folder: Path) -> list[str]:
    """The small JSON files beside a tokenizer; returns their names."""
    eos = {"content": "</s>", "lstrip": False, "special": True}
    for name, content in {
            "tokenizer_config.json": {
                "bos_token": "<s>", "eos_token": eos, "legacy": False, "model_max_length": 10 ** 30,
                "added_tokens_decoder": {"2": eos}, "chat_template": "{{ messages }}"},
            "special_tokens_map.json": {"bos_token": "<s>", "eos_token": "</s>"},
            "added_tokens.json": {"<extra>": 448}, "config.json": {"eos_token_id": [2, 448]},
            "generation_config.json": {"eos_token_id": 2, "top_p": 0.9}}.items():
        (folder / name).write_text(json.dumps(content))
    return [file.name for file in folder.glob("*.json")]


TEMPLATE = ("{% for m in messages %}{{ '<s>' + m['role'] + '\n' + m['content'] + '</s>\n' }}"
            "{% endfor %}{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}")


def sentencepiece_tokenizer(folder, tokenizer):
    (folder / "tokenizer.model").write_bytes(Path(tokenizer).read_bytes())
    return Target(folder, ["tokenizer.model", *write_tokenizer_files(folder)],
                  partial(read_tokenizer, folder, None))


def chat_template(folder, tokenizer):
    (folder / "tokenizer.model").write_bytes(Path(tokenizer).read_bytes())
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return Target(folder, ["chat_template.jinja"], partial(read_tokenizer, folder, "model"))


def json_tokenizer(folder, tokenizer):
    pytest.importorskip("tokenizers")
    save_tokenizer(Tokenizer(tokenizer), str(folder))
    (folder / "tokenizer.model").unlink()
    return Target(folder, ["tokenizer.json", *write_tokenizer_files(folder)],
                  partial(read_tokenizer, folder, None))


# ---- files of ours ------------------------------------------------------------------------------

def small_run(folder: Path, tokenizer: str, method: str) -> Path:
    """A finished run of three steps, with checkpoints, on a model of its own."""
    base = save_tiny_model(folder / "base", tokenizer, **SMALL)
    data = write_jsonl(folder / "pairs.jsonl", [
        {"prompt": f"What is {n}?", "chosen": f"It is {n}.", "rejected": "No."} for n in range(8)])
    run = folder / f"run-{folder.name}"
    finish("train.py", "--method", method, "--model_name_or_path", base, "--dataset", data,
           "--output_dir", run, "--batch_size", 4, "--max_steps", 3, "--save_steps", 1,
           "--held_out", 0.3, "--max_length", 96, "--max_prompt_length", 48, "--lora_r", 2)
    return run


def files_below(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def content_of(run: str) -> tuple:
    """What `load_run` and eval.py take of a run, so that two can be compared."""
    model, _, flags = load_run(run)
    tensors = {name: p.tolist() for name, p in model.named_parameters() if "lora" in name}
    return tensors, {name: flags[name] for name in sorted(flags)}


def finished_run(folder, tokenizer):
    run = small_run(folder, tokenizer, "dpo")
    names = [name for name in files_below(run) if name.startswith("final") or name == "args.json"]
    return Target(run, names, lambda: content_of(str(run)), covered=True,
                  hashed=True)


def reward_run(folder, tokenizer):
    run = small_run(folder, tokenizer, "reward_model")
    names = [f"final/{name}" for name in files_below(run / "final")]
    return Target(run, names, lambda: content_of(str(run)), covered=True,
                  hashed=True)


def checkpoint(folder, tokenizer):
    run = small_run(folder, tokenizer, "dpo")
    model = add_lora(load_llama(str(folder / "base")), r=2, alpha=4)
    optimizer = torch.optim.AdamW(trainable(model).values())

    def read():
        state = load_checkpoint(str(run / "checkpoint-2"), model, optimizer)
        moments = [value.tolist() for state in optimizer.state.values() for value in state.values()]
        return state, [p.tolist() for p in trainable(model).values()], moments
    return Target(run, [name for name in files_below(run) if name.startswith("checkpoint-2")],
                  read, covered=True, hashed=True)


def flags_of_a_run(folder, tokenizer):
    run = small_run(folder, tokenizer, "sft")
    flags = json.loads((run / "args.json").read_text())
    (run / "final").rename(folder / "final")             # a run that goes on

    def read():
        check_output_dir(str(run), flags)
        (folder / "final").rename(run / "final")
        try:
            return held_out_records(str(run), read_run(str(run)), None)
        finally:
            (run / "final").rename(folder / "final")
    return Target(run, ["args.json"], read)


def metrics(folder, tokenizer):
    lines = [{"step": step, "loss": 0.5, "rewards/positive": 1.0} for step in range(1, 9)]
    write_jsonl(folder / "metrics.jsonl", lines)
    return Target(folder, ["metrics.jsonl"],
                  lambda: (read_metrics(str(folder)), rewind_metrics(str(folder), 6)))


TREES = [Tree([1, 40 + n], [[7, n, 2]], [0.0], []) for n in range(6)]
BATCHES = [[0, 1, 2], [3, 4, 5]]


def anchors(folder, tokenizer):
    file = str(folder / "anchors-0.jsonl")
    write_rows(file, BATCHES, lambda batch: [
        {"tree": n, "anchor_ids": [[9, 2], [n, 5]], "reference_logps": [-1.5, -n - 0.25, -2.0]}
        for n in batch], lambda row: 1, "anchors", Ranks())
    return Target(folder, ["anchors-0.jsonl"],
                  lambda: d2o.read_anchors(file, 0, TREES, list(range(6))), covered=True)


def reference_cache(folder, tokenizer):
    file = str(folder / "reference-key.jsonl")
    write_rows(file, BATCHES, lambda batch: [
        {"tree": n, "reference_logps": [-1.5 - n]} for n in batch], lambda row: 1, "", Ranks())
    table = TokenTable(**flat_arrays(TREES))
    return Target(folder, ["reference-key.jsonl"], lambda: list(cache_reference(
        str(folder / "run"), "key", None, table, Objective(METHODS["dpo"]), None, Ranks())),
        covered=True)


def token_cache(folder, tokenizer):
    (folder / "tokens").mkdir()
    data = write_jsonl(folder / "data.jsonl", [ROWS["pairs"], ROWS["points"], ROWS["scores"]])
    write_tokens(str(folder / "tokens"), SimpleNamespace(
        method="ulma", dataset=data, held_out=0, max_length=96, max_prompt_length=48),
        METHODS, Tokenizer(tokenizer), False)
    return Target(folder / "tokens", files_below(folder / "tokens"),
                  lambda: list(read_tokens(str(folder / "tokens"))), covered=True, hashed=True)


def unfinished_cache(folder, tokenizer):
    target = reference_cache(folder, tokenizer)
    file = folder / target.files[0]
    whole = file.read_text().splitlines(keepends=True)

    def read():
        batches, _ = whole_batches(str(file), BATCHES)   # a torn end goes: it is computed again
        return file.read_text().splitlines(keepends=True) == whole[:3 * batches]
    return Target(folder, target.files, read, covered=True)


# ---- rows ---------------------------------------------------------------------------------------

HH = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Why?\n\nAssistant:"
MESSAGES = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
ROWS = {
    "hh": {"chosen": HH + " Because.", "rejected": HH + " Go away."},
    "pairs": {"prompt": MESSAGES[:1], "chosen": MESSAGES[1:], "rejected": "No."},
    "points": {"prompt": HH, "completion": " So.", "label": True},
    "scores": {"instruction": "Add.", "input": "1 2", "output": "3", "history": [["a", "b"]],
               "system": "Be kind.", "score": 0.25},
    "messages": {"messages": MESSAGES, "label": False},
    "qa": {"question": "Who?", "passages": [["Title", "A sentence.", "Another."]],
           "prediction 1": "Me.", "feedback": {"errors": [], "corrected-prediction": "You."}},
    "red team": {"transcript": HH + " No.", "rating": 3.0, "tags": None},
}


def rows(kind: str, name: str, folder: Path, tokenizer: str) -> Target:
    file = write_jsonl(folder / name, [ROWS[kind]] * 4)
    if name.endswith(".json"):
        Path(file).write_text(json.dumps([ROWS[kind]] * 4))

    def read():
        records = read_dataset(file, Counter())
        make_trees(records + read_prompts(file), read.tokenizer, "all", 64, 32, Counter())
    read.tokenizer = Tokenizer(tokenizer)
    return Target(folder, [name], read)


def given_anchors(folder, tokenizer):
    tiny = Tokenizer(tokenizer)
    choice = {"message": {"content": "A lamp."}, "finish_reason": "stop"}
    write_jsonl(folder / "given.jsonl", [{"prompt": "Why?", "choices": [choice, choice]}] * 2)
    args = SimpleNamespace(anchors=str(folder / "given.jsonl"), num_anchors=2, output_dir="run",
                           max_length=64, max_prompt_length=32, anchor_tokens=8)
    prompt_ids, _ = encode_dialogue(tiny, [("Human", "Why?"), ("Assistant", "")])
    tree = make_trees(read_dataset(write_jsonl(folder / "x.jsonl", [
        {"prompt": "Why?", "completion": "No.", "label": 0}])), tiny, "all", 64, 32)[0]
    return Target(folder, ["given.jsonl"],
                  lambda: d2o.read_given_anchors(args, [tree], tiny, 0, [0]))


def answers(folder, tokenizer):
    args = SimpleNamespace(out=str(folder / "out.jsonl"), overwrite=False)
    row = {"prompt": MESSAGES[:1], "completion": "So.", "seed": 1}
    write_jsonl(folder / "out.jsonl", [row] * 3)
    (folder / "out.jsonl.args.json").write_text(json.dumps({"seed": 1, "inputs": {"a": "b"}}))
    return Target(folder, ["out.jsonl", "out.jsonl.args.json"],
                  lambda: (rows_done(args, {"seed": 1, "inputs": {"a": "b"}}),
                           read_generations(args.out)))


def judge(folder, tokenizer):
    questions, files = folder / "questions.jsonl", ["questions.jsonl", "ask.jsonl", "reward.jsonl"]
    made = make_questions([((("Human", "Why?"),), "So.", f"No {n}.") for n in range(3)])
    write_jsonl(questions, made)
    write_jsonl(folder / files[1], [{"id": row["id"], "model": "judge", "answer":
                                     "Helpful: 1>2\nHarmless: 1=2"} for row in made])
    write_jsonl(folder / files[2], [{"id": row["id"], "reward_a": 0.5, "reward_b": -1.0}
                                    for row in made if row["order"] == "ab"])

    def read():
        asked = read_questions(str(questions))
        end_last_line(str(folder / files[1]), "judge")
        for file in files[1:]:
            judged_pairs(asked, read_answers(str(folder / file), asked))
    return Target(folder, files, read)


def endpoint(folder, tokenizer):
    (folder / "reply.json").write_text(json.dumps({"choices": [
        {"message": {"content": "1>2"}, "finish_reason": "stop"}], "usage": {"total": 1}}))

    def read():
        reply = 200, "", (folder / "reply.json").read_bytes()
        with mock.patch("judge.endpoint.fetch", lambda *_: reply):
            complete("http://localhost", "", {}, 1, tries=1)
    return Target(folder, ["reply.json"], read)


TARGETS = [sharded_model, bin_model, adapter, sentencepiece_tokenizer, chat_template,
           json_tokenizer, finished_run, reward_run, checkpoint, flags_of_a_run, metrics, anchors,
           reference_cache, unfinished_cache, token_cache, given_anchors, answers, judge, endpoint]
MAKERS = {make.__name__: make for make in TARGETS} | {
    f"rows of {kind}": partial(rows, kind, "rows.jsonl") for kind in ROWS} | {
    "gzip": partial(rows, "hh", "rows.jsonl.gz"), "array": partial(rows, "points", "rows.json")}


@pytest.mark.parametrize("name", MAKERS)
def test_damaged_files_are_refused_in_one_sentence(name, tmp_path, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)            # thousands would take long
    folder = tmp_path / "damaged"
    folder.mkdir()
    target = MAKERS[name](folder, tiny_tokenizer)
    faults = faults_of(name, target, CASES // len(MAKERS))
    assert not faults, "\n".join([f"{len(faults)} faults", *faults[:10]])
