"""From files to records: a reader for every format; odd rows are counted, bad rows are errors.

    file -> Record (prompt turns, responses, scores)    token ids: tokenizer.py; trees: packing.py

    python data.py FILE --show 3          what a file holds: counts, and three examples

Formats, recognised by their keys: HH and Golden HH transcripts, QA-feedback, red-team-attempts,
and JSONL in the shapes of TRL and of instruction data; files/rows.py reads the files.

Two decisions on odd rows, both counted and printed. An empty response is dropped: nobody judged an
answer there. Two responses whose prompts differ become two points (unpaired data), not a pair.
"""
if __name__ == "__main__":
    from files.interrupt import catch_interrupts
    catch_interrupts()
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from files.cli import Parser, run_cli, visible
from files.rows import TEXT, data_files, get_score, get_texts, get_value, read_rows
# users import these names from here, too
from tokenizer import (VICUNA_SYSTEM, Tokenizer, dialogue_text,  # noqa: F401
                       encode_dialogue, encode_prompt, render_dialogue)

Turns = Sequence[tuple[str, str]]          # [(role, text), …], roles System, Human, Assistant


# ---- records: one prompt, its responses, their scores -------------------------------------------

@dataclass(frozen=True)
class Record:
    """One prompt with its judged responses, as text.

    prompt     ((role, text), …)  roles "Human", "Assistant" (and "System", first)
    responses  (text, …)          candidates for the next assistant turn
    scores     (z, …)             human score in [0, 1]: 1 good (or chosen), 0 bad (or rejected)
    where      "file:line" it came from
    """
    prompt: tuple
    responses: tuple
    scores: tuple
    where: str


def make_records(prompt: Turns, responses: Sequence[str], scores: Sequence[float],
                 where: str) -> tuple[list[Record], list[str]]:
    """The record of one row, without its empty responses; it may be left with none.

    returns   [record]; notes on what was dropped or is odd, which are counted
    """
    judged = [(text, score) for text, score in zip(responses, scores, strict=True)
              if text.strip()]
    notes = ["empty responses dropped"] * (len(responses) - len(judged))
    if len({text for text, _ in judged}) < len(judged):
        if len({score for _, score in judged}) > 1:
            judged, notes = [], [*notes, "rows skipped: the same response scored both ways"]
        judged = list(dict.fromkeys(judged))
    if len(judged) > 1:
        notes.append("prompts with several responses")
    return [Record(tuple(prompt), tuple(text for text, _ in judged),
                   tuple(score for _, score in judged), where)], notes


# ---- dialogues ----------------------------------------------------------------------------------

ROLES = {"system": "System", "user": "Human", "assistant": "Assistant"}
ROLE_INSIDE = "transcripts with a role name inside a turn (kept)"
STARTS_AS_TRANSCRIPT = re.compile(r"\s*(Human|Assistant):")
TEMPLATE = re.compile(r"USER:.*ASSISTANT:|\[INST\]|<\|(im_start|user)\|>|\n\n(Human|Assistant):|"
                      r"### ?(Human|User|Instruction|Assistant|Response):", re.DOTALL)


def split_transcript(text: str, where: str) -> list[tuple[str, str]]:
    """"\\n\\nHuman: a\\n\\nAssistant: b" -> [("Human", "a"), ("Assistant", "b")], texts stripped.

    A marker counts only after a blank line: in HH some turns contain "Human:" themselves.
    """
    pieces = re.split(r"(?:^|\r?\n\r?\n)(Human|Assistant):", text)
    if len(pieces) < 3 or pieces[0].strip():
        raise ValueError(f"{where}: a transcript starts with 'Human:' after a blank line; "
                         f"this one with {text[:60]!r}")
    return [(role, turn.strip()) for role, turn in zip(pieces[1::2], pieces[2::2], strict=True)]


def read_turns(value: str | list, where: str) -> list[tuple[str, str]]:
    """Prompt or transcript of a JSONL row: HH text, plain text, or [{role, content}, …]."""
    if isinstance(value, str):
        if not STARTS_AS_TRANSCRIPT.match(value) and not re.search(r"\n\s*Assistant:\s*$", value):
            return [("Human", value)]
        turns = split_transcript(value, where)
        if len(turns) == 1 and re.search(r"\n(Human|Assistant):", value.strip()):
            raise ValueError(f"{where}: a transcript whose turns no blank line separates: "
                             f"{value[:60]!r}; give it as a list of messages")
        return turns[:-1] if turns[-1] == ("Assistant", "") else turns
    for number, message in enumerate(value):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in list(ROLES) or not isinstance(message.get("content"), str) or (
                role == "system" and number > 0):
            raise ValueError(f"{where}: {str(message)[:60]!r} is not a message with 'role' "
                             "(user, assistant, or system at the start) and text 'content'")
    return [(ROLES[message["role"]], message["content"]) for message in value]


def read_dialogue(row: dict, key: str, where: str) -> tuple[Turns, str, list[str]]:
    """(prompt, response, notes): a transcript or list of messages, cut at its last answer.

    The prompt ends at the last "\\n\\nAssistant:", not where two texts begin to differ (that would
    put part of the answer into the prompt in a fifth of HH's rows).
    """
    value, notes = get_value(row, key, TEXT, where), []
    turns = split_transcript(value, where) if isinstance(value, str) else read_turns(value, where)
    roles = [role for role, _ in turns if role != "System"]
    if roles[-1:] != ["Assistant"]:
        raise ValueError(f"{where}: a transcript must end on an Assistant turn")
    if isinstance(value, list) and roles[-2:-1] != ["Human"]:
        raise ValueError(f"{where}: the last answer must follow a user message")
    if roles != ["Human", "Assistant"] * (len(roles) // 2):
        notes.append("transcripts whose roles do not alternate (kept)")
    if any(re.search(r"(Human|Assistant):", text) for _, text in turns):
        notes.append(ROLE_INSIDE)
    return turns[:-1], turns[-1][1].strip(), notes


def read_answer(row: dict, key: str, prompt: Turns, where: str) -> tuple[str, list[str]]:
    """(response, notes): a text, or one assistant message; the prompt before it is taken off."""
    value = get_value(row, key, TEXT, where)
    whole = value.strip() if isinstance(value, str) else None
    if whole is None:
        turns = read_turns(value, where)
    elif STARTS_AS_TRANSCRIPT.match(whole):
        turns = split_transcript(whole, where)
    else:
        turns = [("Assistant", whole)]
    *before, (role, text) = [(role, text.strip()) for role, text in turns] or [("", "")]
    prompt = [(role, text.strip()) for role, text in prompt]
    if role == "Assistant" and before in ([], prompt):
        if before or text != (whole or text):
            return text, ["responses that repeat the prompt (taken off)"]
        begins = bool(prompt[-1][1]) and text.startswith(prompt[-1][1])
        return text, ["responses that begin with the prompt's words (kept)"] * begins
    if whole is not None and prompt[-1] not in before:
        return whole, [ROLE_INSIDE]                      # a model that spoke for the user, too
    raise ValueError(f"{where}: {key!r} must be one assistant message, alone or after the turns of "
                     f"the row's prompt; it is {str(value)[:60]!r}")


# ---- formats: a row -> (records, notes) as from `make_records` ----------------------------------

def pair_records(row: dict, where: str) -> tuple[list[Record], list[str]]:
    """A row {"chosen", "rejected"} of two dialogues, as HH's: z = 1 and 0 for their last turns."""
    prompt, chosen, notes = read_dialogue(row, "chosen", where)
    other_prompt, rejected, more = read_dialogue(row, "rejected", where)
    notes += more
    if prompt == other_prompt:
        records, more = make_records(prompt, [chosen, rejected], [1.0, 0.0], where)
        return records, notes + more
    notes.append("rows whose two prompts differ (two points, no pair)")
    good, good_notes = make_records(prompt, [chosen], [1.0], where)
    bad, bad_notes = make_records(other_prompt, [rejected], [0.0], where)
    return good + bad, notes + good_notes + bad_notes


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


def red_team_records(row: dict, where: str) -> tuple[list[Record], list[str]]:
    """A row with the last assistant turn as response: z = 1 - rating / 4 (4: attack succeeded).

    The rating is for the whole transcript; here it is that of the last answer, given all before it.
    """
    turns, notes = split_transcript(get_value(row, "transcript", str, where), where), []
    humans = [turn for turn in turns if turn[0] == "Human"]
    while turns and turns[-1][0] != "Assistant":
        notes.append("trailing Human turns dropped")
        turns = turns[:-1]
    if row.get("rating") is None or len(turns) < 2:
        prompt = turns[:-1] or humans
        records = make_records(prompt, [], [], where)[0] if prompt else []
        return records, [*notes, "rows skipped: no rating, or no answer"]
    rating = get_value(row, "rating", (int, float), where)
    if not 0 <= rating <= 4:
        raise ValueError(f"{where}: rating {rating} is outside 0..4")
    records, more = make_records(turns[:-1], [turns[-1][1]], [1 - rating / 4], where)
    return records, notes + more


def read_prompt(row: dict, where: str) -> tuple[Turns, set[str]]:
    """(prompt, keys read) of {"prompt"}, or of {"instruction", "input", "history", "system"}."""
    if "prompt" in row or "instruction" not in row:
        turns, keys = read_turns(get_value(row, "prompt", TEXT, where), where), {"prompt"}
    else:
        keys = {"instruction", "input", "history", "system"}
        given = {key: get_value(row, key, list if key == "history" else str, where)
                 for key in keys if key == "instruction" or row.get(key) is not None}
        turns = [("System", given["system"])] if given.get("system") else []
        for pair in given.get("history", []):
            question, answer = get_texts({"history": pair}, "history", where, size=2)
            turns += [("Human", question), ("Assistant", answer)]
        texts = (given["instruction"], given.get("input"))
        turns.append(("Human", "\n".join(filter(None, texts))))
    if not turns or turns[-1][0] != "Human":
        raise ValueError(f"{where}: the prompt must end on a user message")
    return turns, keys


def jsonl_records(row: dict, where: str) -> tuple[list[Record], list[str]]:
    """A row in one of the shapes of docs/usage.md; texts may be lists of {role, content}."""
    pair = "chosen" in row or "rejected" in row
    if pair and not {"prompt", "instruction"} & row.keys():
        return pair_records(row, where)
    if "messages" in row and not pair and "completion" not in row:
        prompt, answer, notes = read_dialogue(row, "messages", where)
        answers, keys_read = [answer], {"messages"}
    else:
        prompt, keys_read = read_prompt(row, where)
        single = "completion" if "completion" in row or "prompt" in keys_read else "output"
        keys = ("chosen", "rejected") if pair else (single,)
        found = [read_answer(row, key, prompt, where) for key in keys]
        answers, notes = [text for text, _ in found], [note for _, some in found for note in some]
        keys_read |= set(keys)
        if len(prompt) == 1 and TEMPLATE.search(prompt[0][1]):
            notes.append("prompts that look like a chat template's text (kept)")
    scores = [1.0, 0.0]
    if not pair:
        score, more = get_score(row, where)
        scores, notes = [score], notes + more
        keys_read.add("label" if "label" in row else "score")
    notes += [f"rows with the key {key!r}, which is not read" for key in row.keys() - keys_read]
    records, more = make_records(prompt, answers, scores, where)
    return records, notes + more


def prompt_only(row: dict) -> dict:
    """The row without its answers, where these stand apart."""
    if "prompt" in row or "instruction" in row:
        return {key: row[key] for key in ("prompt", "instruction", "input", "history", "system")
                if key in row} | {"completion": ""}
    if isinstance(messages := row.get("messages"), list):
        if messages and isinstance(messages[-1], dict) and messages[-1].get("role") == "user":
            return {"prompt": messages, "completion": ""}
        return {"messages": messages}
    return row | ({"rating": None} if "transcript" in row else {"answer": [""]})


# ---- files --------------------------------------------------------------------------------------

RowReader = Callable[[dict, str], tuple[list[Record], list[str]]]     # (row, where) -> see above

def choose_reader(row: dict) -> RowReader:
    """The reader of a file's rows, by the keys of its first."""
    if "transcript" in row and "rating" in row:
        return red_team_records
    return qa_records if "passages" in row else jsonl_records


def read_files(dataset: str, counts: Counter, prompts_only: bool = False,
               reader: RowReader | None = None) -> Iterator[Record]:
    """The records of a dataset, see `read_dataset`, one at a time; with prompts_only one of every
    row, answered or not. Rows and notes are counted."""
    files = data_files(dataset)
    for path in files:
        read_row = reader
        for where, row in read_rows(path):
            read_row = read_row or choose_reader(row)
            records, notes = read_row(prompt_only(row) if prompts_only else row, where)
            counts.update(["rows", *notes])
            counts[f"rows of {path}"] += len(files) > 1
            counts["answers to nothing skipped"] += sum(not record.prompt for record in records)
            yield from (record for record in records
                        if record.prompt and (record.responses or prompts_only))


def read_dataset(dataset: str, counts: Counter | None = None,
                 reader: RowReader | None = None) -> list[Record]:
    """The records of a file of any format above, of a folder, or of files with commas between.

    counts   if given, rows and notes are counted in it
    reader   of one format (default: by the keys of each file's first row)
    raises   FileNotFoundError, or ValueError with file and line of a bad row
    """
    return list(read_files(dataset, Counter() if counts is None else counts, reader=reader))


read_hh = read_golden_hh = partial(read_dataset, reader=pair_records)
read_qa_feedback = partial(read_dataset, reader=qa_records)
read_red_team = partial(read_dataset, reader=red_team_records)
read_jsonl = partial(read_dataset, reader=jsonl_records)


def read_prompts(dataset: str, counts: Counter | None = None) -> list[Record]:
    """As `read_dataset`, for those who need prompts only: records without responses, also of rows
    whose own responses teach nothing."""
    found = Counter()
    records = [Record(record.prompt, (), (), record.where)
               for record in read_files(dataset, found, prompts_only=True)]
    if counts is not None:
        counts.update({note: found[note] for note in found if re.match("rows($| of )", note)})
    return records


def is_held_out(record: Record, held_out: float) -> bool:
    """Whether the record's prompt is among this share (0 to 1) of all; its SHA-256 decides."""
    digest = hashlib.sha256(repr(record.prompt).encode()).digest()
    return int.from_bytes(digest[:8], "big") < held_out * 2**64


def split_by_prompt(records: Iterable[Record],
                    held_out: float) -> tuple[list[Record], list[Record]]:
    """(training, held-out) records; a prompt is on one side only, see `is_held_out`."""
    sides = ([], [])
    for record in records:
        sides[is_held_out(record, held_out)].append(record)
    return sides


# ---- what a file holds --------------------------------------------------------------------------

def count_lines(counts: dict[str, int]) -> list[str]:
    """Every count above 0 but the number of rows, a line each."""
    return [f"  {note:58} {number:7}" for note, number in sorted(counts.items())
            if number and note != "rows"]


def describe_data(path: str, records: Iterable[Record], counts: Counter) -> str:
    """How many rows, records and responses there are, and what was odd about them.

    records   gone through once: `read_files` may be reading them, and filling `counts`
    """
    number, prompts, scores = 0, set(), Counter()
    for number, record in enumerate(records, 1):
        prompts.add(hash(record.prompt))                 # 64 bits of each, not the texts
        scores.update(record.scores)
    good, bad = scores.pop(1.0, 0), scores.pop(0.0, 0)
    responses = good + bad + scores.total()
    what = f"records with {responses} responses" if responses else "prompts"
    known = {"distinct prompts": len(prompts), "responses with z = 1 (good)": good,
             "responses with z = 0 (bad)": bad, "responses with z between": scores.total()}
    return "\n".join([f"{path}: {counts['rows']} rows, {number} {what}",
                      *count_lines(known), *count_lines(counts)])


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("file", help="data file, .gz or not; a folder, or several with commas")
    parser.add_argument("--show", type=int, default=0, help="print this many examples")
    parser.add_argument("--tokenizer", help="model folder: adds token counts, in its template")
    parser.add_argument("--chat_template", help="with --tokenizer, as in train.py")
    args = parser.parse_args(argv)
    if args.show < 0 or (args.chat_template and not args.tokenizer):
        raise ValueError(f"--show {args.show} must be at least 0" if args.show < 0 else
                         "--chat_template goes with --tokenizer")
    counts = Counter()
    records = read_dataset(args.file, counts)
    print(describe_data(args.file, records, counts))
    tokenizer = args.tokenizer and Tokenizer(args.tokenizer, chat_template=args.chat_template)
    for record in records[:args.show]:
        for i, score in enumerate(record.scores):
            turns, size = [*record.prompt, ("Assistant", record.responses[i])], ""
            prompt, response = (visible(text, "\n\t") for text in dialogue_text(tokenizer, turns))
            if tokenizer:
                size = ", {} + {} tokens".format(*map(len, encode_dialogue(tokenizer, turns)))
            if i == 0:
                print(f"\n--- {record.where}\n[prompt] {prompt}")
            print(f"[response, z = {score:g}{size}] {response}")


if __name__ == "__main__":
    run_cli(main)
