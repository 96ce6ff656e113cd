"""From files to records: a reader for every format; odd rows are counted, bad rows are errors.

    file -> Record (prompt turns, responses, scores)    token ids: tokenizer.py; trees: packing.py

    python data.py FILE --show 3          what a file holds: counts, and three examples

Formats, recognised by their keys: HH and Golden HH transcripts, QA-feedback, red-team-attempts,
and plain JSONL in TRL's shapes; JSON lines or one JSON array, gzipped or not.

Two decisions on odd rows, both counted and printed. An empty response is dropped: nobody judged an
answer there. Two responses whose prompts differ become two points (unpaired data), not a pair.
"""
import argparse
import gzip
import hashlib
import json
import os
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from files.cli import run_cli
from files.text import likely_cause

# users import these names from here, too, whether this file needs them or not
from tokenizer import VICUNA_SYSTEM, Tokenizer, encode_dialogue, render_dialogue  # noqa: F401

# ---- records: one prompt, its responses, their scores -------------------------------------------

@dataclass(frozen=True)
class Record:
    """One prompt with its judged responses, as text.

    prompt     ((role, text), …)  roles "Human", "Assistant" (and "System", first); ends on a Human
    responses  (text, …)          candidates for the next assistant turn
    scores     (z, …)             human score in [0, 1]: 1 good (or chosen), 0 bad (or rejected)
    where      "file:line" it came from
    """
    prompt: tuple
    responses: tuple
    scores: tuple
    where: str


def make_records(prompt: Sequence[tuple[str, str]], responses: Sequence[str],
                 scores: Sequence[float], where: str) -> tuple[list[Record], list[str]]:
    """The record of one row, without its empty responses; none if nothing is left to learn from.

    returns   [record] or []; notes on what was dropped or is odd, which `print_counts` counts
    """
    judged = [(text, score) for text, score in zip(responses, scores) if text.strip()]
    notes = ["empty responses dropped"] * (len(responses) - len(judged))
    if len({text for text, _ in judged}) < len(judged):
        if len({score for _, score in judged}) > 1:
            return [], [*notes, "rows skipped: the same response scored both ways"]
        judged = list(dict.fromkeys(judged))
    if not judged:
        return [], notes
    if len(judged) > 1:
        notes.append("prompts with several responses")
    return [Record(tuple(prompt), *zip(*judged), where)], notes


# ---- rows of a file -----------------------------------------------------------------------------

def read_rows(path: str) -> Iterator[tuple[str, dict]]:
    """(where, row) of every row of a JSON-lines or JSON-array file; ValueError names the line."""
    if cause := likely_cause(path):
        raise ValueError(f"{path}: not a data file{cause}")
    with open(path, "rb") as file:
        raw = file.read()
    if raw[:2] == b"\x1f\x8b":
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: damaged gzip file: {error}") from None
    elif path.endswith(".gz"):
        raise ValueError(f"{path}: not a gzip file (it starts with {raw[:20]!r})")
    raw = raw.removeprefix(b"\xef\xbb\xbf")                       # byte order mark
    if raw.lstrip()[:1] == b"[":
        rows = [(f"{path}[{number}]", row) for number, row in enumerate(parse_json(raw, path))]
    else:
        rows = ((f"{path}:{number}", parse_json(line, f"{path}:{number}"))
                for number, line in enumerate(raw.split(b"\n"), 1) if line.strip())
    found = False
    for where, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected an object with keys, got {str(row)[:80]!r}")
        found = True
        yield where, row
    if not found:
        raise ValueError(f"{path}: no rows")


def parse_json(raw: bytes, where: str):
    """The JSON value of some bytes; ValueError for NaN, infinities and text that is not Unicode."""
    def refuse(name):
        raise ValueError(f"{name} is not a number")
    try:
        value = json.loads(raw.decode("utf-8"), parse_constant=refuse)
        if b"\\u" in raw:                   # a lone surrogate: no tokenizer can encode it
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except (ValueError, RecursionError) as error:    # JSON and Unicode errors are ValueErrors
        excerpt = raw[:80].decode("utf-8", "replace").strip()
        raise ValueError(f"{where}: bad JSON: {error}; it starts with {excerpt!r}") from None


def get_value(row: dict, key: str, kind: type | tuple[type, ...], where: str):
    """row[key], which must be of a kind, as isinstance takes it; ValueError names row and key."""
    if key not in row:
        raise ValueError(f"{where}: key {key!r} is missing; found {', '.join(map(repr, row))}")
    if not isinstance(row[key], kind):
        kinds = {(str, list): "text or a list of messages", (int, float): "a number"}
        raise ValueError(f"{where}: {key!r} is {str(row[key])[:60]!r}; expected "
                         f"{kinds[kind] if kind in kinds else kind.__name__}")
    return row[key]


def get_texts(row: dict, key: str, where: str) -> list[str]:
    """row[key], which must be a list of at least one text."""
    texts = get_value(row, key, list, where)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{where}: {key} is {str(texts)[:60]!r}; expected a list of texts")
    return texts


def read_records(path: str, counts: Counter | None, read_row: Callable) -> list[Record]:
    """The records of all rows of a file.

    counts     if given, rows and notes are counted in it
    read_row   (row, where) -> (records, notes) as from `make_records`
    """
    counts, records = Counter() if counts is None else counts, []
    for where, row in read_rows(path):
        found, notes = read_row(row, where)
        records += found
        counts["rows"] += 1
        counts.update(notes)
    return records


# ---- formats ------------------------------------------------------------------------------------

def split_transcript(text: str, where: str) -> list[tuple[str, str]]:
    """"\\n\\nHuman: a\\n\\nAssistant: b" -> [("Human", "a"), ("Assistant", "b")], texts stripped.

    A marker counts only after a blank line: in HH some turns contain "Human:" themselves.
    """
    pieces = re.split(r"(?:^|\n\n)(Human|Assistant):", text)
    if len(pieces) < 3 or pieces[0].strip():
        raise ValueError(f"{where}: a transcript starts with 'Human:' after a blank line; "
                         f"this one with {text[:60]!r}")
    return [(role, turn.strip()) for role, turn in zip(pieces[1::2], pieces[2::2])]


def hh_records(row: dict, where: str) -> tuple[list[Record], list[str]]:
    """A row {"chosen", "rejected"}: z = 1 and 0 for the last assistant turns of two transcripts.

    The prompt ends at the last "\\n\\nAssistant:", not where the two texts begin to differ
    (that would put part of the answer into the prompt in a fifth of the rows).
    """
    turns, notes = [], []
    for key in ("chosen", "rejected"):
        side = split_transcript(get_value(row, key, str, where), where)
        roles = [role for role, _ in side]
        if roles[-1] != "Assistant":
            raise ValueError(f"{where}: a transcript must end on an Assistant turn")
        if roles != ["Human", "Assistant"] * (len(roles) // 2):
            notes.append("transcripts whose roles do not alternate (kept)")
        if any(re.search(r"(Human|Assistant):", text) for _, text in side):
            notes.append("transcripts with a role name inside a turn (kept)")
        turns.append(side)
    (*prompt, (_, chosen)), (*other_prompt, (_, rejected)) = turns
    if prompt == other_prompt:
        records, more = make_records(prompt, [chosen, rejected], [1.0, 0.0], where)
        return records, notes + more
    notes.append("rows whose two prompts differ (two points, no pair)")
    good, good_notes = make_records(prompt, [chosen], [1.0], where)
    bad, bad_notes = make_records(other_prompt, [rejected], [0.0], where)
    return good + bad, notes + good_notes + bad_notes


def read_hh(path: str, counts: Counter | None = None) -> list[Record]:
    """HH transcripts, see `hh_records`; for `counts`, which all readers take, `read_records`."""
    return read_records(path, counts, hh_records)


read_golden_hh = read_hh        # same format: GPT-4 rewrote the last turn of `chosen`


def qa_records(row: dict, where: str) -> tuple[list[Record], list[str]]:
    """A row whose `prediction 1` was marked wrong (z = 0) and corrected by a human (z = 1).

    A prediction without any marked error equals its correction: a single positive. A row without
    feedback (`text`, `answer`) holds demonstrations.
    """
    if "feedback" not in row:
        answers = get_texts(row, "answer", where)
        prompt = get_value(row, "text", str, where)
        return make_records([("Human", prompt)], answers, [1.0] * len(answers), where)
    passages = [get_texts({"passage": passage}, "passage", where)
                for passage in get_value(row, "passages", list, where)]
    context = " | ".join(f"wikipage: {title} text: {' '.join(sentences)}"
                         for title, *sentences in passages)
    prompt = f"question: {get_value(row, 'question', str, where)} context: {context}"
    wrong = get_value(row, "prediction 1", str, where).strip()
    feedback = get_value(row, "feedback", dict, where)
    right = get_value(feedback, "corrected-prediction", str, where).strip()
    if wrong == right:
        records, notes = make_records([("Human", prompt)], [right], [1.0], where)
        return records, [*notes, "predictions without an error (a positive, no pair)"]
    return make_records([("Human", prompt)], [wrong, right], [0.0, 1.0], where)


def read_qa_feedback(path: str, counts: Counter | None = None) -> list[Record]:
    """QA-feedback, see `qa_records`."""
    return read_records(path, counts, qa_records)


def red_team_records(row: dict, where: str) -> tuple[list[Record], list[str]]:
    """A row with the last assistant turn as response: z = 1 - rating / 4 (4: attack succeeded).

    The rating is for the whole transcript; here it is that of the last answer, given all before it.
    """
    turns, notes = split_transcript(get_value(row, "transcript", str, where), where), []
    while turns and turns[-1][0] != "Assistant":
        notes.append("trailing Human turns dropped")
        turns.pop()
    if row.get("rating") is None or len(turns) < 2:
        return [], [*notes, "rows skipped: no rating, or no answer"]
    rating = get_value(row, "rating", (int, float), where)
    if not 0 <= rating <= 4:
        raise ValueError(f"{where}: rating {rating} is outside 0..4")
    records, more = make_records(turns[:-1], [turns[-1][1]], [1 - rating / 4], where)
    return records, notes + more


def read_red_team(path: str, counts: Counter | None = None) -> list[Record]:
    """red-team-attempts, see `red_team_records`."""
    return read_records(path, counts, red_team_records)


ROLES = {"system": "System", "user": "Human", "assistant": "Assistant"}


def read_turns(value: str | list, where: str) -> list[tuple[str, str]]:
    """Prompt or transcript of a JSONL row: HH text, plain text, or [{role, content}, …]."""
    if isinstance(value, str):
        if re.match(r"\s*(Human|Assistant):", value):
            turns = split_transcript(value, where)
            return turns[:-1] if turns[-1] == ("Assistant", "") else turns
        return [("Human", value)]
    for number, message in enumerate(value):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in list(ROLES) or not isinstance(message.get("content"), str) or (
                role == "system" and number > 0):
            raise ValueError(f"{where}: {str(message)[:60]!r} is not a message with 'role' "
                             "(user, assistant, or system at the start) and text 'content'")
    return [(ROLES[message["role"]], message["content"]) for message in value]


def jsonl_records(row: dict, where: str) -> tuple[list[Record], list[str]]:
    """A row in one of TRL's shapes; prompt and responses are texts, or lists of {role, content}.

    prompt + completion + label (or score)   a point: z is the label
    prompt + chosen + rejected               a pair: z = 1 and 0
    prompt + completion                      a demonstration: z = 1
    """
    text_or_list = (str, list)
    prompt = read_turns(get_value(row, "prompt", text_or_list, where), where)
    if not prompt or prompt[-1][0] != "Human":
        raise ValueError(f"{where}: the prompt must end on a user message")
    if "chosen" in row or "rejected" in row:
        keys, scores = ("chosen", "rejected"), (1.0, 0.0)
    else:
        score = row.get("label", row.get("score", 1.0))
        if not isinstance(score, (bool, int, float)) or not 0 <= score <= 1:
            raise ValueError(f"{where}: label or score {score!r} is outside [0, 1]")
        keys, scores = ("completion",), (float(score),)
    responses = []
    for key in keys:
        value = get_value(row, key, text_or_list, where)
        turns = [("Assistant", value)] if isinstance(value, str) else read_turns(value, where)
        if [role for role, _ in turns] != ["Assistant"]:
            raise ValueError(f"{where}: {key!r} must be one assistant message")
        responses.append(turns[0][1].strip())
    return make_records(prompt, responses, scores, where)


def read_jsonl(path: str, counts: Counter | None = None) -> list[Record]:
    """JSONL in TRL's shapes, see `jsonl_records`."""
    return read_records(path, counts, jsonl_records)


def read_dataset(path: str, counts: Counter | None = None) -> list[Record]:
    """Read a file of any format above, recognised by the keys of its first row.

    raises   FileNotFoundError, or ValueError with file and line of a bad row
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such data file")
    _, row = next(read_rows(path))
    if "transcript" in row and "rating" in row:
        return read_red_team(path, counts)
    if "passages" in row:
        return read_qa_feedback(path, counts)
    if "prompt" not in row and "chosen" in row:
        return read_hh(path, counts)
    return read_jsonl(path, counts)


def split_by_prompt(records: list[Record], held_out: float) -> tuple[list[Record], list[Record]]:
    """(training, held-out) records; a prompt is on one side only, as its SHA-256 decides.

    held_out   share of the prompts, 0 to 1
    """
    def is_held_out(record: Record) -> bool:
        digest = hashlib.sha256(repr(record.prompt).encode()).digest()
        return int.from_bytes(digest[:8], "big") < held_out * 2**64
    sides = ([], [])
    for record in records:
        sides[is_held_out(record)].append(record)
    return sides


# ---- what a file holds --------------------------------------------------------------------------

def print_counts(path: str, records: list[Record], counts: Counter) -> None:
    """Print how many rows, records and responses a file has, and what was odd about them."""
    scores = [score for record in records for score in record.scores]
    print(f"{path}: {counts['rows']} rows, {len(records)} records with {len(scores)} responses")
    print(f"  {'distinct prompts':58} {len({record.prompt for record in records}):7}")
    print(f"  {'responses with z = 1 / between / z = 0':58} {scores.count(1.0):7} / "
          f"{sum(0 < score < 1 for score in scores)} / {scores.count(0.0)}")
    for note, number in sorted(counts.items()):
        if number and note != "rows":
            print(f"  {note:58} {number:7}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("file", help="HH, QA-feedback, red-team or JSONL file, .gz or not")
    parser.add_argument("--show", type=int, default=0, help="print this many examples")
    parser.add_argument("--tokenizer", help="tokenizer.model: adds token counts")
    args = parser.parse_args(argv)
    counts = Counter()
    records = read_dataset(args.file, counts)
    print_counts(args.file, records, counts)
    tokenizer = args.tokenizer and Tokenizer(args.tokenizer)
    grey, green, red, plain = (("\033[90m", "\033[32m", "\033[41m", "\033[0m")
                               if sys.stdout.isatty() else ("", "", "", ""))
    for record in records[:args.show]:
        prompt = "</s>".join(render_dialogue([*record.prompt, ("Assistant", "")]))
        print(f"\n--- {record.where}\n[prompt]   {grey}{prompt}{plain}")
        for response, score in zip(record.responses, record.scores):
            size = ""
            if tokenizer:
                prompt_ids, response_ids = encode_dialogue(
                    tokenizer, [*record.prompt, ("Assistant", response)])
                size = f", {len(prompt_ids)} + {len(response_ids)} tokens"
            print(f"[response, z = {score:g}{size}]  {green}{response}{plain}{red}</s>{plain}")


if __name__ == "__main__":
    run_cli(main)
