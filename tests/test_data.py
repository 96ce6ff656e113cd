"""Readers: on the real files where they lie beside the repository, and by hand; the split."""
import argparse
import json
import os
import subprocess
import sys
from collections import Counter

import pytest
from conftest import ROOT, finish, write_jsonl

import data
from data import read_dataset, read_prompts, split_by_prompt, split_transcript
from files.rows import read_rows
from packing import make_trees
from tokenizer import Tokenizer, encode_dialogue

ASK, YES, NO = "\n\nHuman: Why?", "\n\nAssistant: Because.", "\n\nAssistant: No idea."
ROW = {"prompt": "Why?", "completion": "Because.", "label": True}


def read(path):
    counts = Counter()
    return read_dataset(str(path), counts), counts


# ---- real files ---------------------------------------------------------------------------------

def test_hh_harmless_base_test_has_the_known_counts(hh_file):
    # 2312 rows; 4 answers are empty; in 5 rows the prompts differ, which makes no pair of two.
    records, counts = read(hh_file)
    pairs = [record for record in records if len(record.responses) == 2]
    assert (counts["rows"], len(pairs), len({r.prompt for r in pairs})) == (2312, 2303, 2301)
    assert counts["prompts with several responses"] == 2303
    assert counts["empty responses dropped"] == 4
    assert counts["rows whose two prompts differ (two points, no pair)"] == 5
    assert counts["transcripts whose roles do not alternate (kept)"] == 13
    assert counts["transcripts with a role name inside a turn (kept)"] == 73
    assert len(records) == 2303 + 4 + 2 * 5
    assert Counter(z for r in records for z in r.scores) == {1.0: 2308, 0.0: 2312}
    assert all(r.scores == (1.0, 0.0) for r in pairs)
    chosen = [split_transcript(row["chosen"], where)[:-1] for where, row in read_rows(hh_file)]
    assert len(set(map(tuple, chosen))) == 2310


def test_hh_answers_are_what_the_official_parse_finds(hh_file):
    # The dataset's own loaders: text after the last "\n\nAssistant: " (13 characters), stripped.
    def last_turn(text):
        return text[text.rfind("\n\nAssistant: ") + 13:].strip()

    expected = Counter()
    for _, row in read_rows(hh_file):
        expected.update((last_turn(row[key]), z) for key, z in (("chosen", 1.0), ("rejected", 0.0))
                        if last_turn(row[key]))
    records, _ = read(hh_file)
    found = Counter((text, z) for r in records
                    for text, z in zip(r.responses, r.scores, strict=True))
    assert found == expected


def test_hh_rows_are_named_by_file_and_line(hh_file):
    # 0-based rows 86, 516, 925, 1103 have an empty chosen: only the rejected answer is left.
    records, _ = read(hh_file)
    single = [int(r.where.rpartition(":")[2]) - 1 for r in records if len(r.responses) == 1]
    differing = [1254, 1688, 1950, 1952, 2036]
    assert sorted(single) == sorted([86, 516, 925, 1103] + 2 * differing)
    assert all(r.where.startswith(hh_file) for r in records)


def test_qa_feedback_pairs_wrong_answers_with_their_corrections(shared_data):
    # 500 questions: 13 corrections are empty, 6 predictions have no error, so 481 pairs.
    file = shared_data / "qa_feedback_dev/dev_feedback.json"
    records, counts = read(file)
    pairs = [r for r in records if len(r.responses) == 2]
    assert (counts["rows"], len(records), len(pairs)) == (500, 500, 481)
    assert counts["empty responses dropped"] == 13
    assert counts["predictions without an error (a positive, no pair)"] == 6
    for row, record in zip(json.loads(file.read_text()), records, strict=True):
        responses = dict(zip(record.scores, record.responses, strict=True))
        right, wrong = row["feedback"]["corrected-prediction"].strip(), row["prediction 1"].strip()
        assert responses.get(1.0, "") == right
        assert responses.get(0.0, right) == wrong


def test_qa_feedback_prompts_are_those_of_the_demonstrations(shared_data):
    # dev.json gives the same 500 questions as ready text, its passages separated by " | "; the
    # policy must see one format in both files (white space inside a passage differs in 55 rows).
    folder = shared_data / "qa_feedback_dev"
    texts = {row["question"]: row["text"] for row in json.loads((folder / "dev.json").read_text())}
    rows = json.loads((folder / "dev_feedback.json").read_text())
    records, _ = read(folder / "dev_feedback.json")
    same = sum("".join(record.prompt[0][1].split()) == "".join(texts[row["question"]].split())
               for row, record in zip(rows, records, strict=True))
    assert same == 500


def test_qa_files_without_feedback_are_demonstrations(shared_data):
    # dev.json: text and a list of answers, each z = 1.
    file = shared_data / "qa_feedback_dev/dev.json"
    records, _ = read(file)
    for row, record in zip(json.loads(file.read_text()), records, strict=True):
        assert record.prompt == (("Human", row["text"]),)
        assert [text.strip() for text in record.responses] == [a.strip() for a in row["answer"]]
        assert set(record.scores) == {1.0}


def test_red_team_score_is_one_minus_a_quarter_of_the_rating(shared_data):
    # rating 0: the attack failed, a good model, z = 1. The sample rates 0,0,0,2,2,3,4,4,4,4.
    file = shared_data / "red_team_attempts_sample/red_team_attempts.sample.jsonl"
    ratings = [row["rating"] for _, row in read_rows(str(file))]
    assert sorted(ratings) == [0, 0, 0, 2, 2, 3, 4, 4, 4, 4]
    records, _ = read(file)
    assert [r.scores for r in records] == [(1 - rating / 4,) for rating in ratings]


# ---- readers, by hand ---------------------------------------------------------------------------

def test_hh_splits_at_the_last_marker_not_where_the_texts_differ(tmp_path):
    # Both answers begin "I think": a common prefix would move those words into the prompt.
    path = write_jsonl(tmp_path / "hh.jsonl", [{"chosen": ASK + "\n\nAssistant: I think so.",
                                                "rejected": ASK + "\n\nAssistant: I think not."}])
    (record,), _ = read(path)
    assert record.prompt == (("Human", "Why?"),)
    assert (record.responses, record.scores) == (("I think so.", "I think not."), (1.0, 0.0))


def test_hh_prompt_markers_count_only_after_a_blank_line(tmp_path):
    # "Human:" after two spaces is a model's invention inside one turn, and is counted.
    path = write_jsonl(tmp_path / "hh.jsonl", [{"chosen": ASK + "\n\nAssistant: A  Human: B",
                                                "rejected": ASK + NO}])
    (record,), counts = read(path)
    assert record.responses == ("A  Human: B", "No idea.")
    assert counts["transcripts with a role name inside a turn (kept)"] == 1


def test_hh_rows_with_two_prompts_give_two_points_and_no_pair(tmp_path):
    # Taking the chosen's prompt for both, as the authors do, judges an answer to another prompt.
    path = write_jsonl(tmp_path / "hh.jsonl", [
        {"chosen": ASK + YES, "rejected": "\n\nHuman: How?" + NO}])
    records, _ = read(path)
    assert [(r.prompt[0][1], r.responses, r.scores) for r in records] == [
        ("Why?", ("Because.",), (1.0,)), ("How?", ("No idea.",), (0.0,))]


USER = [{"role": "user", "content": "Why?"}]
ANSWER = [{"role": "assistant", "content": "Because."}]
HUMAN = (("Human", "Why?"),)
SHAPES = {
    "unpaired": (ROW, HUMAN, ("Because.",), (1.0,)),
    "unpaired bad": (ROW | {"label": False}, HUMAN, ("Because.",), (0.0,)),
    "label 0": (ROW | {"label": 0}, HUMAN, ("Because.",), (0.0,)),
    "score": ({"prompt": "Why?", "completion": " Because.\n", "score": 0.25}, HUMAN, ("Because.",),
              (0.25,)),
    "demonstration": ({"prompt": "Why?", "completion": "Because."}, HUMAN, ("Because.",), (1.0,)),
    "pair": ({"prompt": "Why?", "chosen": "Because.", "rejected": "No."}, HUMAN,
             ("Because.", "No."), (1.0, 0.0)),
    "lists": ({"prompt": USER, "completion": ANSWER, "label": True}, HUMAN, ("Because.",), (1.0,)),
    "list pair": ({"prompt": USER, "chosen": ANSWER, "rejected": "No."}, HUMAN, ("Because.", "No."),
                  (1.0, 0.0)),
    "system": ({"prompt": [{"role": "system", "content": "Be kind."}, *USER], "completion": ANSWER},
               (("System", "Be kind."), *HUMAN), ("Because.",), (1.0,)),
    "dialogue": ({"prompt": [*USER, *ANSWER, *USER], "completion": "So."},
                 (*HUMAN, ("Assistant", "Because."), *HUMAN), ("So.",), (1.0,)),
    "HH prompt": ({"prompt": ASK + YES + ASK + "\n\nAssistant:", "completion": "So."},
                  (*HUMAN, ("Assistant", "Because."), *HUMAN), ("So.",), (1.0,)),
    "HH prompt, no answer mark": ({"prompt": "Human: Why?", "completion": "So."}, HUMAN, ("So.",),
                                  (1.0,)),
    "empty prompt": ({"prompt": "", "completion": "So."}, (("Human", ""),), ("So.",), (1.0,)),
    "messages": ({"messages": [*USER, *ANSWER]}, HUMAN, ("Because.",), (1.0,)),
    "messages, labelled": ({"messages": [*USER, *ANSWER, *USER, *ANSWER], "label": False},
                           (*HUMAN, ("Assistant", "Because."), *HUMAN), ("Because.",), (0.0,)),
    "messages of UltraChat": ({"prompt": "Why?", "prompt_id": "7", "messages": [*USER, *ANSWER]},
                              HUMAN, ("Because.",), (1.0,)),
    "chosen repeats the turns": ({"prompt": "Why?", "chosen": [*USER, *ANSWER], "rejected": [
        *USER, {"role": "assistant", "content": "No."}]}, HUMAN, ("Because.", "No."), (1.0, 0.0)),
    "pair without a prompt": ({"chosen": [*USER, *ANSWER, *USER, *ANSWER], "rejected": [
        *USER, *ANSWER, *USER, {"role": "assistant", "content": "No."}]},
        (*HUMAN, ("Assistant", "Because."), *HUMAN), ("Because.", "No."), (1.0, 0.0)),
    "instruction": ({"instruction": "Why?", "input": "", "output": "Because."}, HUMAN,
                    ("Because.",), (1.0,)),
    "instruction, all keys": (
        {"instruction": "Add.", "input": "1 2", "output": "3", "system": "Be kind.",
         "history": [["Why?", "Because."]], "score": 0.5},
        (("System", "Be kind."), *HUMAN, ("Assistant", "Because."), ("Human", "Add.\n1 2")), ("3",),
        (0.5,)),
    "instruction pair": ({"instruction": "Why?", "input": None, "chosen": "Because.",
                          "rejected": "No."}, HUMAN, ("Because.", "No."), (1.0, 0.0)),
    "CRLF transcript": ({"prompt": (ASK + YES + ASK + "\n\nAssistant:").replace("\n", "\r\n"),
                         "completion": "So."}, (*HUMAN, ("Assistant", "Because."), *HUMAN),
                        ("So.",), (1.0,)),
    "answers that repeat the prompt": (
        {"prompt": ASK + "\n\nAssistant:", "chosen": ASK + YES, "rejected": ASK + NO}, HUMAN,
        ("Because.", "No idea."), (1.0, 0.0)),
    "answer with its mark": ({"prompt": ASK, "completion": "Assistant: Because."}, HUMAN,
                             ("Because.",), (1.0,)),
    "answer for the user, too": (
        {"prompt": "Why?", "completion": "Human: no.\n\nAssistant: So.", "label": 0}, HUMAN,
        ("Human: no.\n\nAssistant: So.",), (0.0,)),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_jsonl_shape_reads(tmp_path, shape):
    # TRL's unpaired, paired, prompt-completion and conversational rows, HH-style prompts, scores.
    row, prompt, responses, scores = SHAPES[shape]
    (record,), _ = read(write_jsonl(tmp_path / "rows.jsonl", [row]))
    assert (record.prompt, record.responses, record.scores) == (prompt, responses, scores)


def test_empty_and_twice_scored_answers_are_left_out_and_counted(tmp_path):
    # White space is no answer; one text that is both chosen and rejected teaches nothing.
    rows = [{"prompt": "a", "chosen": " \n", "rejected": "No."},
            {"prompt": "b", "chosen": "No.", "rejected": "No. "}, ROW | {"completion": ""}, ROW]
    records, counts = read(write_jsonl(tmp_path / "rows.jsonl", rows))
    assert [(r.responses, r.scores) for r in records] == [
        (("No.",), (0.0,)), (("Because.",), (1.0,))]
    assert counts["empty responses dropped"] == 2
    assert counts["rows skipped: the same response scored both ways"] == 1
    row = {"passages": [], "text": "a", "answer": [" ", "b"]}
    (record,), counts = read(write_jsonl(tmp_path / "qa.jsonl", [row]))
    assert (record.responses, counts["empty responses dropped"]) == (("b",), 1)


def test_what_is_odd_about_a_row_is_counted(tmp_path):
    # Each of these was read in silence: keys that nobody reads, rows without a label among labelled
    # ones, prompts that another template has rendered, answers that begin with the question.
    rows = [ROW, {"prompt": "Why?", "completion": "Why? Why not.", "id": 3, "source": "x"},
            {"prompt": "[INST] Why? [/INST]", "chosen": "So.", "rejected": "No.", "label": 1},
            {"prompt": ASK + "\n\nAssistant:", "chosen": ASK + YES, "rejected": "Assistant: No."},
            {"prompt": "Why?", "completion": "Human: so.", "label": 0}]
    records, counts = read(write_jsonl(tmp_path / "rows.jsonl", rows))
    assert len(records) == 5 and records[3].responses == ("Because.", "No.")
    assert counts == {
        "rows": 5, "demonstrations: no label or score, so z = 1": 1,
        "responses that begin with the prompt's words (kept)": 1,
        "rows with the key 'id', which is not read": 1,
        "rows with the key 'source', which is not read": 1,
        "rows with the key 'label', which is not read": 1,
        "prompts that look like a chat template's text (kept)": 1,
        "prompts with several responses": 2, "responses that repeat the prompt (taken off)": 2,
        "transcripts with a role name inside a turn (kept)": 1} | {
        key: number for key, number in counts.items() if not number}


def test_dialogues_that_differ_before_the_answer_are_two_points(tmp_path):
    # As in HH: one prompt for both would judge an answer to another question.
    row = {"chosen": [*USER, *ANSWER], "rejected": [{"role": "user", "content": "How?"}, *ANSWER]}
    records, counts = read(write_jsonl(tmp_path / "rows.jsonl", [row]))
    assert [(r.prompt[0][1], r.scores) for r in records] == [("Why?", (1.0,)), ("How?", (0.0,))]
    assert counts["rows whose two prompts differ (two points, no pair)"] == 1


# ---- prompts ------------------------------------------------------------------------------------

PROMPTS = {      # rows that nothing can be learned from, and the prompts that they have
    "no completion": ([{"prompt": "Why?"}, {"prompt": "How?", "completion": ""}], ["Why?", "How?"]),
    "other keys": ([{"prompt": "Why?", "labels": 3, "answer": "x"}], ["Why?"]),
    "equal answers": ([{"prompt": "Why?", "chosen": "a", "rejected": "a"}], ["Why?"]),
    "no rating": ([{"transcript": ASK + YES, "rating": None}], ["Why?"]),
    "no answer": ([{"transcript": ASK, "rating": 1}], ["Why?"]),
    "equal transcripts": ([{"chosen": ASK + YES, "rejected": ASK + YES}], ["Why?"]),
    "empty transcripts": ([{"chosen": ASK + "\n\nAssistant:", "rejected": ASK + NO}], ["Why?"]),
    "two prompts": ([{"chosen": ASK + YES, "rejected": "\n\nHuman: How?" + NO}], ["Why?", "How?"]),
    "messages": ([{"messages": USER}, {"messages": [*USER, *ANSWER]}], ["Why?", "Why?"]),
    "instruction": ([{"instruction": "Why?"}], ["Why?"]),
    "QA without answers": ([{"passages": [], "text": "Why?"}], ["Why?"]),
}


@pytest.mark.parametrize("shape", PROMPTS)
def test_prompts_are_read_of_rows_that_nothing_can_be_learned_from(tmp_path, shape):
    # generate.py and rlhf/ppo.py need prompts alone: 3 prompts gave 1 answer, and nothing was said.
    rows, prompts = PROMPTS[shape]
    counts = Counter()
    records = read_prompts(write_jsonl(tmp_path / "rows.jsonl", rows), counts)
    assert [record.prompt[-1][1] for record in records] == prompts
    assert {record.responses for record in records} == {()} and counts["rows"] == len(rows)


def test_prompts_are_those_of_the_records_where_all_can_be_learned_from(hh_file):
    prompts = {record.prompt for record in read_dataset(hh_file)}
    assert {record.prompt for record in read_prompts(hh_file)} == prompts


def test_every_prompt_is_answered_and_trained_on_by_ppo(tmp_path, tiny_model):
    from rlhf.ppo import tokenize_prompts
    from training.ranks import Ranks
    path = write_jsonl(tmp_path / "rows.jsonl", [
        {"prompt": f"What is {n}?", "completion": "2" * (n == 2)} for n in (1, 2, 3)])
    finish("generate.py", "--model", tiny_model, "--dataset", path, "--out", tmp_path / "out.jsonl",
           "--max_new_tokens", 2)
    answered = [row["prompt"][0]["content"] for _, row in read_rows(str(tmp_path / "out.jsonl"))]
    assert answered == ["What is 1?", "What is 2?", "What is 3?"]
    args = argparse.Namespace(dataset=path, held_out=0.0, max_length=64, max_prompt_length=60)
    assert len(tokenize_prompts(args, Tokenizer(tiny_model), Ranks())) == 3


# ---- odd rows of the formats --------------------------------------------------------------------

def test_red_team_null_ratings_and_trailing_human_turns_are_counted(tmp_path):
    # `float(rating or 0)` would turn a missing rating into the best one.
    rows = [{"transcript": ASK + YES, "rating": None},
            {"transcript": ASK + YES + ASK + NO + ASK, "rating": 3.0},
            {"transcript": ASK, "rating": 1}]
    records, counts = read(write_jsonl(tmp_path / "red.jsonl", rows))
    assert [(r.responses, r.scores) for r in records] == [(("No idea.",), (0.25,))]
    assert [role for role, _ in records[0].prompt] == ["Human", "Assistant", "Human"]
    assert counts["rows skipped: no rating, or no answer"] == 2
    assert counts["trailing Human turns dropped"] == 2


# ---- every fault names the file and the line ----------------------------------------------------

PAIR = {"chosen": ASK + YES, "rejected": ASK + NO}
RED = {"transcript": ASK + YES, "rating": 2.0}
QA = {"question": "Why?", "passages": [["T", "s."]], "prediction 1": "No.",
      "feedback": {"corrected-prediction": "Because."}}
FAULTS = {      # good first row, bad third row, words of the message
    "not JSON": (ROW, '{"prompt": "a", ', "bad JSON"),
    "two objects": (ROW, "{} {}", "bad JSON"),
    "no object": (ROW, "[1]", "expected an object"),
    "NaN": (ROW, '{"prompt": "a", "completion": "b", "label": NaN}', "NaN"),
    "Infinity": (ROW, '{"prompt": "a", "completion": "b", "score": -Infinity}', "Infinity"),
    "1e999": (ROW, '{"prompt": "a", "completion": "b", "score": 1e999}', "inf"),
    "lone surrogate": (ROW, '{"prompt": "\\ud83d", "completion": "b"}', "surrogates"),
    "no prompt": (ROW, {"completion": "b"}, "'prompt' is missing; found 'completion'"),
    "no completion": (ROW, {"prompt": "a"}, "'completion' is missing"),
    "no rejected": (ROW, {"prompt": "a", "chosen": "b"}, "'rejected' is missing"),
    "prompt is a number": (ROW, ROW | {"prompt": 3}, "'prompt' is '3'"),
    "label 1.5": (ROW, ROW | {"label": 1.5}, "1.5 is outside"),
    "label -1": (ROW, ROW | {"label": -1}, "-1 is outside"),
    "label text": (ROW, ROW | {"label": "true"}, "'true' is outside"),
    "label null": (ROW, ROW | {"label": None}, "None is outside"),
    "unknown role": (ROW, {"prompt": [{"role": "tool", "content": "a"}], "completion": "b"},
                     "tool"),
    "content is a list": (ROW, {"prompt": [{"role": "user", "content": ["a"]}], "completion": "b"},
                          "is not a message"),
    "prompt ends on assistant": (ROW, {"prompt": [*USER, *ANSWER], "completion": "b"},
                                 "user message"),
    "completion is from user": (ROW, {"prompt": USER, "completion": USER}, "one assistant message"),
    "HH without marker": (PAIR, PAIR | {"chosen": "Why? Because."}, "Why? Because."),
    "HH ends on Human": (PAIR, PAIR | {"rejected": ASK + NO + ASK}, "end on an Assistant turn"),
    "HH without rejected": (PAIR, {"chosen": ASK + YES}, "'rejected' is missing"),
    "HH text is a number": (PAIR, PAIR | {"chosen": 3}, "expected text or a list"),
    "HH list ends on the user": (PAIR, PAIR | {"chosen": USER}, "end on an Assistant turn"),
    "rating 5": (RED, RED | {"rating": 5}, "rating 5 is outside 0..4"),
    "rating below 0": (RED, RED | {"rating": -0.5}, "outside 0..4"),
    "rating is text": (RED, RED | {"rating": "2"}, "'rating' is '2'"),
    "no transcript": (RED, {"rating": 2.0}, "'transcript' is missing"),
    "single line ends": (ROW, ROW | {"prompt": "Human: Hi\nAssistant: Yo\nHuman: So?\nAssistant:"},
                         "no blank line separates"),
    "text before a transcript": (ROW, ROW | {"prompt": "Be kind.\n\nHuman: Hi\n\nAssistant:"},
                                 "this one with 'Be kind."),
    "chosen has another system": (ROW, {"prompt": "Why?", "rejected": "No.", "chosen": [
        {"role": "system", "content": "s"}, *USER, *ANSWER]}, "'chosen' must be one assistant"),
    "chosen has more turns": (ROW, {"prompt": "Why?", "chosen": "\n\nHuman: Hi" + YES + ASK + YES,
                                    "rejected": "No."}, "'chosen' must be one assistant message"),
    "completion is an empty list": (ROW, ROW | {"completion": []}, "one assistant message"),
    "labels": (ROW, {"prompt": "a", "completion": "b", "labels": 0}, "'labels'"),
    "Label": (ROW, {"prompt": "a", "completion": "b", "Label": False}, "'Label'"),
    "rating": (ROW, {"prompt": "a", "completion": "b", "rating": 1}, "'rating': call it 'label'"),
    "kto_tag": (ROW, {"instruction": "a", "output": "b", "kto_tag": False}, "'kto_tag'"),
    "messages end on the user": (ROW, {"messages": USER}, "end on an Assistant turn"),
    "messages without a user": (ROW, {"messages": ANSWER}, "must follow a user message"),
    "history of one": (ROW, {"instruction": "a", "output": "b", "history": [["a"]]},
                       "expected a list of 2 texts"),
    "instruction is null": (ROW, {"instruction": None, "output": "b"}, "'instruction' is"),
    "role is a list": (ROW, {"prompt": [{"role": ["user"], "content": "a"}], "completion": "b"},
                       "is not a message"),
    "system comes later": (ROW, {"prompt": [*USER, {"role": "system", "content": "s"}, *USER],
                                 "completion": "b"}, "ystem"),
    "feedback null": (QA, QA | {"feedback": None}, "feedback"),
    "empty passage": (QA, QA | {"passages": [[]]}, "passage"),
    "passage of numbers": (QA, QA | {"passages": [[1, 2]]}, "passage"),
    "answer of numbers": (QA, {"passages": [], "text": "Why?", "answer": [3]}, "answer"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, tiny_tokenizer, fault):
    # The bad row is on line 3: the message must say so and say what is wrong.
    good, bad, words = FAULTS[fault]
    path = write_jsonl(tmp_path / "rows.jsonl", [good, good, bad])
    with pytest.raises(ValueError) as caught:
        make_trees(read_dataset(path), Tokenizer(tiny_tokenizer))
    assert f"{path}:3: " in str(caught.value) and words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("row, wanted", [(RED | {"rating": "2"}, "number"),
                                         (ROW | {"prompt": 3}, "text or a list")])
def test_a_wrong_type_is_told_the_right_one(tmp_path, row, wanted):
    # "rating" is a number, so "expected text or a list of messages" misleads.
    with pytest.raises(ValueError, match=f"expected .*{wanted}"):
        read(write_jsonl(tmp_path / "rows.jsonl", [row]))


# ---- split and command --------------------------------------------------------------------------

def test_a_prompt_is_on_one_side_of_the_split(tmp_path):
    # 1000 prompts twice: the two rows of a prompt stay together, about a fifth is held out
    # (0.2 ± 5 standard deviations of 0.013), and neither order nor the other rows matter.
    rows = [ROW | {"prompt": f"Question {n}?", "label": z} for z in (True, False)
            for n in range(1000)]
    records, _ = read(write_jsonl(tmp_path / "rows.jsonl", rows))
    train, held_out = split_by_prompt(records, 0.2)
    assert len(train) + len(held_out) == 2000
    assert not {r.prompt for r in train} & {r.prompt for r in held_out}
    assert abs(len(held_out) / 2000 - 0.2) < 0.065
    assert [r for r in records if r in held_out] == held_out             # the file's order
    assert split_by_prompt(records[::-1], 0.2)[1] == held_out[::-1]
    assert split_by_prompt(records[:300], 0.2)[1] == [r for r in records[:300] if r in held_out]
    assert set(held_out) <= set(split_by_prompt(records, 0.3)[1])        # a larger share adds only
    assert split_by_prompt(records, 0.0) == (records, [])
    assert split_by_prompt(records, 1.0) == ([], records)


def test_the_command_lets_no_text_move_the_terminals_cursor(tmp_path):
    row = {"prompt": "a\x1b[2Jb", "completion": "\x07c"}
    path = write_jsonl(tmp_path / "rows.jsonl", [row])
    shown = finish("data.py", path, "--show", 1)
    assert "a\\x1b[2Jb ASSISTANT:" in shown and "\\x07c" in shown and "\x1b" not in shown


def test_the_command_refuses_flags_that_do_nothing(tmp_path):
    file = write_jsonl(tmp_path / "rows.jsonl", [ROW])
    for flags, words in ((["--show", "-1"], "--show -1"),
                         (["--chat_template", "model"], "goes with --tokenizer")):
        with pytest.raises(ValueError, match=words):
            data.main([file, *flags])


def test_the_command_shows_prompt_response_and_eos(tmp_path, tiny_tokenizer):
    # What a reader runs first; scores, token counts and where each row comes from. In the last row
    # shown two Assistant turns follow each other: "ASSISTANT:" stands before the second, too.
    twice = {"chosen": ASK + YES + YES, "rejected": ASK + YES + NO}
    path = write_jsonl(tmp_path / "rows.jsonl", [PAIR, PAIR, twice, PAIR, PAIR])
    run = subprocess.run([sys.executable, "data.py", path, "--show", "3", "--tokenizer",
                          tiny_tokenizer], cwd=ROOT, capture_output=True, text=True,
                         env=os.environ | {"PYTHONIOENCODING": "utf-8"})
    assert (run.returncode, run.stderr) == (0, "")
    assert f"{path}: 5 rows, 5 records with 10 responses" in run.stdout
    assert run.stdout.count("USER: Why? ASSISTANT:\n") == 2
    assert run.stdout.count("USER: Why? ASSISTANT: Because.</s>ASSISTANT:\n") == 1
    assert run.stdout.count("]  Because.</s>\n") == run.stdout.count("]  No idea.</s>\n") == 3
    prompt_ids, response_ids = encode_dialogue(
        Tokenizer(tiny_tokenizer), [("Human", "Why?"), ("Assistant", "Because.")])
    assert f"[response, z = 1, {len(prompt_ids)} + {len(response_ids)} tokens]" in run.stdout
    assert f"--- {path}:3\n" in run.stdout and f"--- {path}:4\n" not in run.stdout


def test_dpo_trains_on_labelled_rows_that_share_a_prompt(tmp_path, tiny_model):
    # 4 prompts with a good answer and two bad ones each, good ones first: 8 pairs, said so.
    path = write_jsonl(tmp_path / "points.jsonl", [
        {"prompt": f"What is {n}?", "completion": text, "label": z}
        for text, z in (("Good.", 1), ("Bad.", 0), ("Worse.", 0)) for n in range(4)])
    shown = finish("train.py", "--method", "dpo", "--model_name_or_path", tiny_model, "--dataset",
                   path, "--output_dir", tmp_path / "out", "--max_steps", 1, "--max_length", 128,
                   "--max_prompt_length", 64)
    line = next(line for line in shown.splitlines() if "rows that share a prompt" in line)
    assert line.split()[-1] == "8" and "training on 4 prompts" in shown


def test_the_reader_of_one_format_reads_what_the_keys_would_choose(hh_file, shared_data):
    # The names that users import; the last two formats have files in the project's real data.
    assert data.read_hh(hh_file) == data.read_golden_hh(hh_file) == read_dataset(hh_file)
    for reader, name in ((data.read_qa_feedback, "qa_feedback_dev"),
                         (data.read_red_team, "red_team_attempts_sample")):
        file = next(str(path) for path in sorted((shared_data / name).iterdir())
                    if "json" in path.name)
        assert reader(file) == read_dataset(file)


def test_every_shape_trains(tmp_path, tiny_model, hh_file, shared_data):
    # All of them in a folder: rows of JSONL, HH, QA-feedback and red-team; one step of ULMA.
    folder = tmp_path / "data"
    folder.mkdir()
    jsonl = [row for row, *_ in SHAPES.values() if "chosen" not in row or "prompt" in row]
    write_jsonl(folder / "rows.jsonl", jsonl)
    write_jsonl(folder / "chats.jsonl", [SHAPES["pair without a prompt"][0]])
    for name, file in (("hh", hh_file), *(
            (name, next(str(path) for path in sorted((shared_data / name).iterdir())
                        if "json" in path.name))
            for name in ("qa_feedback_dev", "red_team_attempts_sample"))):
        write_jsonl(folder / f"{name}.jsonl", [row for _, row in list(read_rows(file))[:4]])
    records = read_dataset(str(folder))
    shown = finish("train.py", "--model_name_or_path", tiny_model, "--dataset", folder,
                   "--output_dir", tmp_path / "out", "--max_steps", 1, "--max_length", 128,
                   "--max_prompt_length", 64, "--batch_size", 512)
    assert f"{len(records)} records" in shown and "step 1/1" in shown
    assert f"{sum(len(r.responses) for r in records)} responses (" in shown
    assert len(records) >= len(jsonl) + 8


def test_an_answer_to_nothing_is_left_out_and_counted(tmp_path):
    rows = [{"chosen": "\n\nAssistant: a", "rejected": "\n\nAssistant: b"},
            {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}]
    counts, file = Counter(), write_jsonl(tmp_path / "rows.jsonl", rows)
    (record,) = read_dataset(file, counts)
    assert record.prompt == (("Human", "q"),) and counts["answers to nothing skipped"] == 1
    assert [record.prompt for record in read_prompts(file)] == [(("Human", "q"),)]
