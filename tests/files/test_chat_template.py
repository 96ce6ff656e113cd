"""Chat templates: which one a folder gets, where answers end, what a message cannot say."""
import json
import shutil
from pathlib import Path

import pytest
from chat_templates import HARD_TEXTS, SENTENCEPIECE_TEMPLATES, TEMPLATES, dialogues_of_text

from data import Record
from files.chat_template import merge_neighbours
from packing import make_trees
from tokenizer import VICUNA_JINJA, VICUNA_STARTS, Tokenizer, dialogue_text, encode_dialogue

pytest.importorskip("jinja2")
CHATML = ("{% for m in messages %}{{ '<s>' + m['role'] + '\n' + m['content'] + '</s>\n' }}"
          "{% endfor %}{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}")


@pytest.fixture
def tokenizer_of(tmp_path, tiny_tokenizer):
    """tokenizer_of(template): the tiny tokenizer with a template in a file."""
    def make(template: str, **options) -> Tokenizer:
        (tmp_path / "given.jinja").write_text(template)
        return Tokenizer(tiny_tokenizer, chat_template=str(tmp_path / "given.jinja"), **options)
    return make


# ---- which template -----------------------------------------------------------------------------

@pytest.mark.parametrize("files, name, noted", [
    ({}, "vicuna", False),
    ({"chat_template.jinja": CHATML}, "model", False),
    # the way Llama-2's folders have it: as before, but it is said
    ({"tokenizer_config.json": {"chat_template": CHATML}}, "vicuna", True),
    ({"tokenizer_config.json": {"chat_template": None}}, "vicuna", False),
    # Vicuna's own in jinja, as save_tokenizer writes it, is rendered without jinja
    ({"chat_template.jinja": VICUNA_JINJA.replace("START", VICUNA_STARTS[2])}, "vicuna", False),
])
def test_the_default_template(files, name, noted, tmp_path, tiny_tokenizer):
    shutil.copy(tiny_tokenizer, tmp_path)
    for file, content in files.items():
        (tmp_path / file).write_text(content if isinstance(content, str) else json.dumps(content))
    tokenizer = Tokenizer(str(tmp_path))
    assert (tokenizer.chat_template, len(tokenizer.notes)) == (name, noted)
    assert (tokenizer.template is None) == (name == "vicuna")
    if noted:
        assert "has a chat template of its own; Vicuna's is used" in tokenizer.notes[0]
    assert not Tokenizer(str(tmp_path), chat_template="vicuna").notes


def test_the_folders_own_template_and_its_named_ones(tmp_path, tiny_tokenizer):
    shutil.copy(tiny_tokenizer, tmp_path)
    with pytest.raises(ValueError, match="--chat_template model: .* has none"):
        Tokenizer(str(tmp_path), chat_template="model")
    with pytest.raises(FileNotFoundError, match="--chat_template chatml: no such file; expected"):
        Tokenizer(str(tmp_path), chat_template="chatml")
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    text, _ = dialogue_text(Tokenizer(str(tmp_path), chat_template="model"), [("Human", "a")])
    assert text == "<s>user\na</s>\n<s>assistant\n"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": 5}))
    with pytest.raises(ValueError, match="chat_template is 5; expected a text"):
        Tokenizer(str(tmp_path))


# ---- answers ------------------------------------------------------------------------------------

def test_a_prompt_and_its_answer_by_hand(tokenizer_of):
    # The answer ends with the token that the template writes after it, not with the newline.
    tokenizer = tokenizer_of(CHATML)
    turns = [("System", "s"), ("Human", "a"), ("Assistant", "b"), ("Human", "c"),
             ("Assistant", "d")]
    assert dialogue_text(tokenizer, turns) == (
        "<s>system\ns</s>\n<s>user\na</s>\n<s>assistant\nb</s>\n<s>user\nc</s>\n<s>assistant\n",
        "d</s>")
    prompt_ids, response_ids = encode_dialogue(tokenizer, turns)
    assert prompt_ids.count(1) == 5 and prompt_ids.count(2) == 4 and response_ids[-1] == 2
    assert tokenizer.decode(response_ids) == "d"
    assert encode_dialogue(tokenizer, [*turns[:-1], ("Assistant", "")]) == (prompt_ids, [2])


def test_an_answer_that_ends_in_text_gets_eos(tokenizer_of):
    # Alpaca's way: what follows an answer belongs to the next turn.
    tokenizer = tokenizer_of(
        "{{ bos_token }}{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}"
        "{% if add_generation_prompt %}### assistant:\n{% endif %}")
    turns = [("Human", "a"), ("Assistant", "b"), ("Human", "c"), ("Assistant", "d\n\ne")]
    prompt, response = dialogue_text(tokenizer, turns)
    assert prompt == "<s>### user:\na\n\n### assistant:\nb\n\n### user:\nc\n\n### assistant:\n"
    assert response == "d\n\ne</s>" and tokenizer.eos_ids == (2,)


def test_the_answers_end_is_an_end_beside_the_tokenizers(tmp_path, tiny_tokenizer):
    # Llama-3: <|eot_id|> ends a turn, <|end_of_text|> is the tokenizer's EOS; both end an answer.
    shutil.copy(tiny_tokenizer, tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<|eot|>": 448, "<|eom|>": 449}')
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}<|eot|>{% endfor %}")
    (tmp_path / "config.json").write_text('{"eos_token_id": [2, 448, 449]}')
    tokenizer = Tokenizer(str(tmp_path))
    assert tokenizer.eos_ids == (448, 2, 449)
    assert encode_dialogue(tokenizer, [("Assistant", "a")])[1][-1] == 448


def test_a_space_that_a_template_takes_off_is_not_trained_on(tokenizer_of):
    tokenizer = tokenizer_of(TEMPLATES["Llama-2"])
    turns = [("System", "s"), ("Human", " a "), ("Assistant", " b ")]
    assert dialogue_text(tokenizer, turns) == (
        "<s>[INST] <<SYS>>\ns\n<</SYS>>\n\n a [/INST]", " b </s>")


def test_neighbours_of_one_role_are_merged_where_a_template_refuses_them(tokenizer_of):
    # HH has such rows; a template that takes them gets them as they are.
    turns = [("Human", "a"), ("Assistant", "b"), ("Assistant", "c"), ("Human", "d")]
    merged = [("Human", "a"), ("Assistant", "b\n\nc"), ("Human", "d")]
    assert merge_neighbours(turns) == merged
    strict, lenient = tokenizer_of(TEMPLATES["Llama-2"]), tokenizer_of(CHATML)
    assert encode_dialogue(strict, turns) == encode_dialogue(strict, merged)
    assert encode_dialogue(lenient, turns) != encode_dialogue(lenient, merged)
    for wrong in ([("Assistant", "a"), ("Human", "b")],
                  [("Human", "a"), ("Assistant", "b"), ("Assistant", "c")]):
        with pytest.raises(ValueError, match="given.jinja.*'a'"):
            encode_dialogue(strict, wrong)
    row = Record((("Assistant", "a"), ("Human", "b")), ("c",), (1.0,), "rows.jsonl:7")
    with pytest.raises(ValueError, match="rows.jsonl:7: .*given.jinja refuses a dialogue"):
        make_trees([row], strict)
    with pytest.raises(ValueError, match="unknown role 'Tool'"):
        encode_dialogue(lenient, [("Tool", "a")])


@pytest.mark.parametrize("template, words", [
    ("{% for %}", "given.jinja: not a jinja template: "),
    ("{{ nothing.at.all }}", "refuses a dialogue ('nothing' is undefined)"),
    ("{{ raise_exception('no') }}", "refuses a dialogue (no)"),
    ("{{ 1 / 0 }}", "refuses a dialogue (division by zero)"),
    ("{{ ''.__class__.__mro__ }}", "refuses a dialogue (access to attribute '__class__'"),
    ("{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}", "begins an answer with"),
    ("{% for m in messages %}{{ m.role }}{% endfor %}", "begins an answer with"),
    ("{% for m in messages %}{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}A:"
     "{% endif %}", "no longer begins as the prompt did"),
])
def test_a_template_that_cannot_be_trained_on_is_refused(template, words, tokenizer_of):
    # One without a generation prompt would teach the model to write control tokens.
    with pytest.raises(ValueError) as error:
        tokenizer_of(template)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_tags_and_blocks_as_transformers_has_them(tokenizer_of):
    # Its tag {% generation %}, blocks whose lines leave nothing, break; no date for a template.
    tokenizer = tokenizer_of(
        "{% for m in messages %}\n  {% if m.role == 'assistant' -%}\n"
        "A:{% generation %}{{ m.content }}</s>{% endgeneration %}\n  {% else %}\n"
        "U:{{ m.content }}\n  {% endif %}\n{% if loop.index > 8 %}{% break %}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
        "{% if strftime_now is defined or tools is not none %}{{ 1 / 0 }}{% endif %}")
    assert dialogue_text(tokenizer, [("Human", "a"), ("Assistant", "b"), ("Human", "c"),
                                     ("Assistant", "d")]) == ("U:a\nA:b</s>U:c\nA:", "d</s>")


@pytest.mark.parametrize("answer", ["(a) yes", "[1]", "plain"])
def test_the_prompts_ids_begin_the_dialogues_whatever_the_answer(answer, tmp_path, shared_data):
    # Mistral's "[/INST]" and an answer that starts with a bracket share a piece, "](": the model is
    # asked after "]", so that is what the answer follows in training, too.
    (tmp_path / "mistral.jinja").write_text(TEMPLATES["Mistral"])
    tokenizer = Tokenizer(str(shared_data / "llama2_tokenizer"),
                          chat_template=str(tmp_path / "mistral.jinja"))
    asked, _ = encode_dialogue(tokenizer, [("Human", "a")])
    prompt_ids, response_ids = encode_dialogue(tokenizer, [("Human", "a"), ("Assistant", answer)])
    assert prompt_ids == asked and tokenizer.decode(response_ids) == answer
    assert encode_dialogue(tokenizer, [("Assistant", answer)])[1] == response_ids
    joined = tokenizer.encode(f"[INST] a [/INST]{answer}", continues=True)
    assert ([1, *joined, 2] == prompt_ids + response_ids) == (answer == "plain")


# ---- what a message cannot say ------------------------------------------------------------------

@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", SENTENCEPIECE_TEMPLATES)
def test_control_tokens_in_a_message_are_text(name, legacy, tokenizer_of):
    # As many ids of BOS and EOS as for harmless texts of the same shape; every text comes back.
    tokenizer = tokenizer_of(TEMPLATES[name], legacy=legacy)
    for turns in dialogues_of_text(HARD_TEXTS):
        turns = turns[turns[0][0] == "System":]
        harmless = [(role, "a") for role, _ in turns]
        prompt_ids, response_ids = encode_dialogue(tokenizer, turns)
        expected = sum(encode_dialogue(tokenizer, harmless), [])
        assert [(prompt_ids + response_ids).count(number) for number in (0, 1, 2)] == [
            expected.count(number) for number in (0, 1, 2)], turns
        answer = turns[-1][1].replace("▁", " ")          # SentencePiece's space
        assert tokenizer.decode(response_ids).strip() == answer.strip(), turns
        assert encode_dialogue(tokenizer, turns[:-1]) == (prompt_ids, []), turns
        assert encode_dialogue(tokenizer, turns[-1:])[1] == response_ids, turns
        assert all(text.strip() in dialogue_text(tokenizer, turns)[0] for _, text in turns[:-1])


# ---- Vicuna's in jinja --------------------------------------------------------------------------

@pytest.mark.parametrize("legacy", [False, True])
def test_vicunas_template_in_jinja_has_the_same_ids(legacy, tmp_path, tokenizer_of, tiny_tokenizer):
    # What save_tokenizer writes for other programs: empty texts, system messages, hard text.
    from tokenizer import jinja_of
    ours = Tokenizer(tiny_tokenizer, legacy)
    jinja = tokenizer_of(jinja_of(ours) + "{# not ours by its text #}", legacy=legacy)
    assert jinja.template is not None
    texts = [*HARD_TEXTS, ""]
    for turns in [*dialogues_of_text(texts), [("Human", ""), ("Assistant", "a"), ("Human", "")],
                  [("Human", "a"), ("Assistant", ""), ("Human", "b")]]:
        asks = turns if turns[-1][0] == "Human" else turns[:-1]
        assert encode_dialogue(jinja, asks) == encode_dialogue(ours, asks), turns
        if turns[-1][0] == "Assistant" and turns[-1][1]:
            assert encode_dialogue(jinja, turns) == encode_dialogue(ours, turns), turns
    assert Path(jinja.chat_template).name == "given.jinja"
