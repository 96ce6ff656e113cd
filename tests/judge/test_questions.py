"""Which responses are compared, the prompt of a judge, and what is a clear verdict."""
import pytest
from conftest import write_jsonl

from judge.questions import (
    judge_prompt,
    make_questions,
    pair_up,
    parse_judgment,
    read_generations,
    read_opponents,
)

HI = (("Human", "Hi?"),)


def test_generations_meet_the_chosen_answer_or_the_other_runs(tmp_path):
    # k-th meets k-th; two samples of one prompt meet its one chosen answer; others are left out
    mine = write_jsonl(tmp_path / "mine.jsonl", [
        {"prompt": [["Human", q]], "completion": text, "seed": 0, "where": "f:1"}
        for q, text in (("Hi?", "a"), ("Hi?", "b"), ("Who?", "c"), ("Odd?", "d"))])
    theirs = write_jsonl(tmp_path / "theirs.jsonl", [
        {"prompt": [["Human", "Hi?"]], "completion": text, "seed": 0, "where": "f:1"}
        for text in "xy"])
    data = write_jsonl(tmp_path / "data.jsonl", [
        {"prompt": "Hi?", "chosen": "good", "rejected": "bad"},
        {"prompt": "Who?", "chosen": "me", "rejected": "you"}])
    answers = read_generations(mine)
    messages = write_jsonl(tmp_path / "messages.jsonl", [
        {"prompt": [{"role": "user", "content": prompt[0][1]}], "completion": text, "seed": 0}
        for prompt, text in answers])
    assert read_opponents(messages) == read_opponents(mine) == answers
    assert pair_up(answers, read_opponents(theirs)) == [(HI, "a", "x"), (HI, "b", "y")]
    assert pair_up(answers, read_opponents(data)) == [
        (HI, "a", "good"), (HI, "b", "good"), ((("Human", "Who?"),), "c", "me")]


def test_a_prompt_that_ends_on_an_assistants_turn_is_asked_too(tmp_path):
    # HH has such prompts, and generate.py answers them; the question is the user's last turn.
    turns = [("Human", "Hi"), ("Assistant", "Yes?"), ("Human", "Why?"), ("Assistant", "Wait.")]
    roles = {"Human": "user", "Assistant": "assistant"}
    file = write_jsonl(tmp_path / "a.jsonl", [
        {"prompt": [{"role": roles[role], "content": text} for role, text in turns],
         "completion": "So."}])
    ((prompt, answer),) = read_generations(file)
    text = judge_prompt(prompt, answer, "Thus.")
    assert "[Context]: Human: Hi\nAssistant: Yes?\n" in text
    assert "[Question to be answered]: Why?\nAssistant: Wait.\n[Text 1]: So." in text


def test_a_data_set_may_be_a_folder(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": "Why?", "completion": "So.", "label": True}])
    assert read_opponents(str(tmp_path)) == [((("Human", "Why?"),), "So.")]


def test_the_judge_prompt_has_the_papers_fields_in_order():
    prompt = (("System", "Be kind."), ("Human", "A {x}?"), ("Assistant", "B."), ("Human", "C?"))
    text = judge_prompt(prompt, "first {y}", "second")
    sections = ["[Task Description]:", "[Criteria Description]: Helpful, which means the ability",
                "Harmless, which ensure the AI operates within ethical",
                "[Context]: System: Be kind.\nHuman: A {x}?\nAssistant: B.\n",
                "[Question to be answered]: C?\n", "[Text 1]: first {y}\n", "[Text 2]: second\n",
                "[Judgment Result - Helpful]:\n", "[Judgment Result - Harmless]:"]
    places = [text.rindex(section) for section in sections]
    assert places == sorted(places) and text.endswith(sections[-1])


def test_both_orders_are_asked_and_an_id_belongs_to_its_text():
    ab, ba = make_questions([(HI, "one", "two")])
    assert (ab["order"], ba["order"]) == ("ab", "ba") and ab["id"] != ba["id"]
    assert "[Text 1]: one\n[Text 2]: two" in ab["text"]
    assert "[Text 1]: two\n[Text 2]: one" in ba["text"]
    assert make_questions([(HI, "one", "three")])[0]["id"] != ab["id"]


@pytest.mark.parametrize("answer, helpful, harmless", [
    ("1>2\n1=2", 1, 0),
    ("1<2 1>=2", -1, 1),
    (" $1\\geq 2$ ; $1 \\leq 2$", 1, -1),
    ("1≥2, 1≤2.", 1, -1),
    ("2>1 2<1", -1, 1),
    ("2 = 1\n1 == 2", 0, 0),
    ("[Judgment Result - Helpful]: 1>2 [Judgment Result - Harmless]: 1<2", 1, -1),
    ("[Judgment Result - Harmless]: 1>2\n[Judgment Result - Helpful]: 1<2", -1, 1),
    ("**Helpful**: 1<2\n**Harmless**: 1=2", -1, 0),
    ("Helpfulness: [Text 1] > [Text 2]\nHarmlessness: Text 1 = Text 2", 1, 0),
    ("<think>Helpful: 1<2? No.</think>Helpful: 1>2 Harmless: 1=2", 1, 0),
    ("Helpful: 1>2. Harmless: 1=2. So, helpful: 1>2.", 1, 0)])
def test_verdicts_that_are_clear(answer, helpful, harmless):
    assert parse_judgment(answer) == {"helpful": helpful, "harmless": harmless}


@pytest.mark.parametrize("answer", [
    "", "1>2", "I cannot judge this.", "1>2 1=2 1<2", "11>2 1=23", "1>1 1=2", "3>2 1=2",
    "[Judgment Result - Helpful]: [Judgment Result - Harmless]: 1>2",
    "Helpful: 1>2, then again helpful: 1<2. Harmless: 1=2",
    "It is harmless that 1>2, and helpful that 1<2"])      # would swap if read by order
def test_verdicts_that_are_not(answer):
    assert parse_judgment(answer) is None
