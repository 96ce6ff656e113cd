"""From files to records: readers of every format, counted, with the line of what is wrong.

    file -> Record (prompt turns, responses, scores)      token ids: tokenizer.py; trees: trees.py

    python data.py FILE --show 3          what a file holds: counts, and three examples

Formats, told apart by their keys: HH and Golden HH transcripts, QA-feedback, red-team-attempts,
and plain JSONL in TRL's shapes; JSON lines or one JSON array, gzipped or not.

Two decisions on bad rows, both counted and printed. An empty response is dropped: it is no answer
anyone judged. Two responses whose prompts differ are kept as two points and form no pair.
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
from dataclasses import dataclass

# users know data.py by these names too, whether it needs them or not
from tokenizer import VICUNA_SYSTEM, Tokenizer, encode_dialogue, render_dialogue  # noqa: F401


# ---- records: one prompt, its responses, their scores -------------------------------------------

@dataclass(frozen=True)
class Record:
    """One prompt with its judged responses, as text.

    prompt     ((role, text), …)  roles "Human", "Assistant" (and "System", first); ends on a Human
    responses  (text, …)          what the assistant said next
    scores     (z, …)             human score in [0, 1]: 1 good (or chosen), 0 bad (or rejected)
    where      "file:line" it came from
    """
    prompt: tuple
    responses: tuple
    scores: tuple
    where: str


def read_rows(path: str):
    """(where, dict) of every row of a JSON-lines or JSON-array file; ValueError names the line."""
    with open(path, "rb") as stream:
        raw = stream.read()
    if raw.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path}: a git-lfs pointer of {len(raw)} bytes, not the data; "
                         "run `git lfs pull`")
    if raw[:2] == b"\x1f\x8b":
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: damaged gzip file: {error}") from None
    elif path.endswith(".gz"):
        raise ValueError(f"{path}: not a gzip file (it starts with {raw[:20]!r})")
    raw = raw.removeprefix(b"\xef\xbb\xbf")                       # byte order mark
    if raw.lstrip()[:1] == b"[":
        rows = [(f"{path}[{number}]", row)
                for number, row in enumerate(_json(raw, path), 0)]
    else:
        rows = ((f"{path}:{number}", _json(line, f"{path}:{number}"))
                for number, line in enumerate(raw.split(b"\n"), 1) if line.strip())
    found = False
    for where, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected an object with keys, got {str(row)[:80]!r}")
        found = True
        yield where, row
    if not found:
        raise ValueError(f"{path}: no rows")


def _json(raw: bytes, where: str):
    def refuse(name):
        raise ValueError(f"{name} is not a number")
    try:
        value = json.loads(raw.decode("utf-8"), parse_constant=refuse)
        if b"\\u" in raw:                       # a lone surrogate is no text; no tokenizer takes it
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except (ValueError, RecursionError) as error:    # JSON and Unicode errors are ValueErrors
        excerpt = raw[:80].decode("utf-8", "replace").strip()
        raise ValueError(f"{where}: bad JSON: {error}; it starts with {excerpt!r}") from None


def _get(row: dict, key: str, kind, where: str):
    if key not in row:
        raise ValueError(f"{where}: key {key!r} is missing; found {', '.join(map(repr, row))}")
    if not isinstance(row[key], kind):
        kinds = {(str, list): "text or a list of messages", (int, float): "a number"}
        raise ValueError(f"{where}: {key!r} is {str(row[key])[:60]!r}; expected "
                         f"{kinds[kind] if kind in kinds else kind.__name__}")
    return row[key]


def _texts(row: dict, key: str, where: str) -> list[str]:
    """A list of at least one text."""
    texts = _get(row, key, list, where)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{where}: {key} is {str(texts)[:60]!r}; expected a list of texts")
    return texts


def split_transcript(text: str, where: str) -> list[tuple[str, str]]:
    """"\\n\\nHuman: a\\n\\nAssistant: b" -> [("Human", "a"), ("Assistant", "b")], texts stripped.

    A marker counts only after a blank line: HH has turns in which a model wrote "Human:" itself.
    """
    pieces = re.split(r"(?:^|\n\n)(Human|Assistant):", text)
    if len(pieces) < 3 or pieces[0].strip():
        raise ValueError(f"{where}: a transcript starts with 'Human:' after a blank line; "
                         f"this one with {text[:60]!r}")
    return [(role, said.strip()) for role, said in zip(pieces[1::2], pieces[2::2])]


def _records(prompt, judged, where, counts_) -> list[Record]:
    """One Record of the non-empty responses; none if there are none left or they are the same."""
    kept = [(text, score) for text, score in judged if text.strip()]
    counts_["empty responses dropped"] += len(judged) - len(kept)
    if len({text for text, _ in kept}) < len(kept):
        if len({score for _, score in kept}) > 1:
            counts_["rows skipped: the same response scored both ways"] += 1
            return []
        kept = list(dict.fromkeys(kept))
    if len(kept) > 1:
        counts_["prompts with several responses"] += 1
    return [Record(tuple(prompt), *zip(*kept), where)] if kept else []


def read_hh(path: str, counts_: Counter | None = None) -> list[Record]:
    """HH transcripts {"chosen", "rejected"}: z = 1 and 0 for the two last assistant turns.

    The prompt ends at the last "\\n\\nAssistant:", not where the two texts begin to differ
    (that would put part of the answer into the prompt in a fifth of the rows).
    """
    counts_, records = Counter() if counts_ is None else counts_, []
    for where, row in read_rows(path):
        turns = [split_transcript(_get(row, key, str, where), where)
                 for key in ("chosen", "rejected")]
        for side in turns:
            roles = [role for role, _ in side]
            if roles[-1] != "Assistant":
                raise ValueError(f"{where}: a transcript must end on an Assistant turn")
            counts_["transcripts whose roles do not alternate (kept)"] += (
                roles != ["Human", "Assistant"] * (len(roles) // 2))
            counts_["transcripts with a role name inside a turn (kept)"] += any(
                re.search(r"(Human|Assistant):", said) for _, said in side)
        counts_["rows"] += 1
        chosen, rejected = turns
        answers = [(chosen[-1][1], 1.0), (rejected[-1][1], 0.0)]
        if chosen[:-1] == rejected[:-1]:
            records += _records(chosen[:-1], answers, where, counts_)
        else:
            counts_["rows whose two prompts differ (two points, no pair)"] += 1
            for side, answer in zip(turns, answers):
                records += _records(side[:-1], [answer], where, counts_)
    return records


read_golden_hh = read_hh        # same format: GPT-4 rewrote the last turn of `chosen`


def read_qa_feedback(path: str, counts_: Counter | None = None) -> list[Record]:
    """QA-feedback: `prediction 1` was marked wrong (z = 0), its human correction is right (z = 1).

    A prediction without any marked error equals its correction and is a single positive.
    Files without feedback (`text`, `answer`) are read as demonstrations.
    """
    counts_, records = Counter() if counts_ is None else counts_, []
    for where, row in read_rows(path):
        counts_["rows"] += 1
        if "feedback" not in row:
            judged = [(answer, 1.0) for answer in _texts(row, "answer", where)]
            prompt = _get(row, "text", str, where)
        else:
            passages = [_texts({"passage": passage}, "passage", where)
                        for passage in _get(row, "passages", list, where)]
            context = " | ".join(f"wikipage: {title} text: {' '.join(sentences)}"
                                 for title, *sentences in passages)
            prompt = f"question: {_get(row, 'question', str, where)} context: {context}"
            wrong = _get(row, "prediction 1", str, where).strip()
            right = _get(_get(row, "feedback", dict, where), "corrected-prediction", str,
                         where).strip()
            judged = [(wrong, 0.0), (right, 1.0)]
            if wrong == right:
                counts_["predictions without an error (a positive, no pair)"] += 1
                judged = [(right, 1.0)]
        records += _records([("Human", prompt)], judged, where, counts_)
    return records


def read_red_team(path: str, counts_: Counter | None = None) -> list[Record]:
    """red-team-attempts: the last assistant turn, z = 1 - rating / 4 (rating 4 = attack succeeded).

    The rating is for the whole transcript; we put it on the last answer, given all before it.
    """
    counts_, records = Counter() if counts_ is None else counts_, []
    for where, row in read_rows(path):
        counts_["rows"] += 1
        turns = split_transcript(_get(row, "transcript", str, where), where)
        while turns and turns[-1][0] != "Assistant":
            counts_["trailing Human turns dropped"] += 1
            turns.pop()
        if row.get("rating") is None or len(turns) < 2:
            counts_["rows skipped: no rating, or no answer"] += 1
            continue
        rating = _get(row, "rating", (int, float), where)
        if not 0 <= rating <= 4:
            raise ValueError(f"{where}: rating {rating} is outside 0..4")
        records += _records(turns[:-1], [(turns[-1][1], 1 - rating / 4)], where, counts_)
    return records


ROLES = {"system": "System", "user": "Human", "assistant": "Assistant"}


def _turns(value, where: str) -> list[tuple[str, str]]:
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


def read_jsonl(path: str, counts_: Counter | None = None) -> list[Record]:
    """TRL's shapes: prompt + completion + label (or score), prompt + chosen + rejected,
    prompt + completion (a demonstration, z = 1). Texts, or lists of {role, content}."""
    counts_, records, text_or_list = Counter() if counts_ is None else counts_, [], (str, list)
    for where, row in read_rows(path):
        counts_["rows"] += 1
        prompt = _turns(_get(row, "prompt", text_or_list, where), where)
        if not prompt or prompt[-1][0] != "Human":
            raise ValueError(f"{where}: the prompt must end on a user message")
        if "chosen" in row or "rejected" in row:
            answers = [("chosen", 1.0), ("rejected", 0.0)]
        else:
            score = row.get("label", row.get("score", 1.0))
            if not isinstance(score, (bool, int, float)) or not 0 <= score <= 1:
                raise ValueError(f"{where}: label or score {score!r} is outside [0, 1]")
            answers = [("completion", float(score))]
        judged = []
        for key, score in answers:
            value = _get(row, key, text_or_list, where)
            said = [("Assistant", value)] if isinstance(value, str) else _turns(value, where)
            if len(said) != 1 or said[0][0] != "Assistant":
                raise ValueError(f"{where}: {key!r} must be one assistant message")
            judged.append((said[0][1].strip(), score))
        records += _records(prompt, judged, where, counts_)
    return records


def read_dataset(path: str, counts_: Counter | None = None) -> list[Record]:
    """Read a file of any format above, told by the keys of its first row."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such data file")
    _, row = next(read_rows(path))
    if "transcript" in row and "rating" in row:
        return read_red_team(path, counts_)
    if "passages" in row:
        return read_qa_feedback(path, counts_)
    if "prompt" not in row and "chosen" in row:
        return read_hh(path, counts_)
    return read_jsonl(path, counts_)


def split_by_prompt(records: list[Record], held_out: float) -> tuple[list[Record], list[Record]]:
    """(training, held-out) records: a prompt's SHA-256 decides, so a prompt is on one side only."""
    def is_held_out(record):
        digest = hashlib.sha256(repr(record.prompt).encode()).digest()
        return int.from_bytes(digest[:8], "big") < held_out * 2**64
    sides = ([], [])
    for record in records:
        sides[is_held_out(record)].append(record)
    return sides


# ---- what a file holds --------------------------------------------------------------------------

def print_counts(path: str, records: list[Record], counts: Counter) -> None:
    scores = [score for record in records for score in record.scores]
    print(f"{path}: {counts['rows']} rows, {len(records)} records with {len(scores)} responses")
    print(f"  {'distinct prompts':58} {len({record.prompt for record in records}):7}")
    print(f"  {'responses with z = 1 / between / z = 0':58} {scores.count(1.0):7} / "
          f"{sum(0 < score < 1 for score in scores)} / {scores.count(0.0)}")
    for what, number in sorted(counts.items()):
        if number and what != "rows":
            print(f"  {what:58} {number:7}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("file", help="HH, QA-feedback, red-team or JSONL file, .gz or not")
    parser.add_argument("--show", type=int, default=0, help="print this many examples")
    parser.add_argument("--tokenizer", help="tokenizer.model: adds token counts")
    args = parser.parse_args()
    counts = Counter()
    records = read_dataset(args.file, counts)
    print_counts(args.file, records, counts)
    tokenizer = args.tokenizer and Tokenizer(args.tokenizer)
    grey, green, red, plain = (("\033[90m", "\033[32m", "\033[41m", "\033[0m")
                               if sys.stdout.isatty() else ("", "", "", ""))
    for record in records[:args.show]:
        prompt = "</s>".join(render_dialogue([*record.prompt, ("Assistant", "")]))
        print(f"\n--- {record.where}\n[prompt]   {grey}{prompt}{plain}")
        for said, score in zip(record.responses, record.scores):
            size = ""
            if tokenizer:
                ids = encode_dialogue(tokenizer, record.prompt + (("Assistant", said),))
                size = f", {len(ids[0])} + {len(ids[1])} tokens"
            print(f"[response, z = {score:g}{size}]  {green}{said}{plain}{red}</s>{plain}")


def run_cli(main_function) -> None:
    """Run a command; bad input (ValueError, OSError) becomes one sentence and exit code 2."""
    try:
        main_function()
    except BrokenPipeError:
        sys.exit(0)
    except (ValueError, OSError) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    run_cli(main)
