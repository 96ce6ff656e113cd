"""Ids of dialogues in five published chat templates against transformers' apply_chat_template."""
import re

import pytest
from chat_templates import (BYTE_LEVEL_TEMPLATES, HARD_TEXTS, SENTENCEPIECE_TEMPLATES, TEMPLATES,
                            dialogues_of_text, messages_of, write_byte_level)
from conftest import need
from test_oracle_tokenizer import llama_tokenizer_of

from data import read_dataset
from tokenizer import Tokenizer, encode_dialogue

transformers = need("transformers")


@pytest.fixture(scope="module")
def hh_dialogues(hh_file):
    """300 dialogues of HH's harmless test set."""
    return [[*record.prompt, ("Assistant", response)]
            for record in read_dataset(hh_file)[::16] for response in record.responses[:2]][:300]


def byte_level_pair(folder, kind):
    ours = Tokenizer(write_byte_level(folder, kind), chat_template="model")
    return ours, transformers.AutoTokenizer.from_pretrained(str(folder))


def sentencepiece_pair(folder, name, file, legacy):
    template = folder / "template.jinja"
    template.write_text(TEMPLATES[name])
    theirs = llama_tokenizer_of(file, legacy)
    theirs.chat_template = TEMPLATES[name]
    return Tokenizer(str(file), legacy, str(template)), theirs


def their_ids(theirs, turns, ask, **options):
    return theirs.apply_chat_template(messages_of(turns), add_generation_prompt=ask,
                                      return_dict=False, **options)


def assert_same_ids(ours, theirs, dialogues, refused=0):
    """Prompt and whole dialogue; the response alone, after any prompt, has the same ids."""
    checked = 0
    for turns in dialogues:
        try:
            prompt_ids, response_ids = encode_dialogue(ours, turns)
        except ValueError as error:
            assert "refuses a dialogue" in str(error) or "no longer begins" in str(error)
            refused -= 1
            continue
        alternates = [role for role, _ in turns if role != "System"] == (
            ["Human", "Assistant"] * len(turns))[:len(turns) - (turns[0][0] == "System")]
        if alternates:
            assert prompt_ids == their_ids(theirs, turns[:-1], True), turns
            whole = their_ids(theirs, turns, False)
            assert (prompt_ids + response_ids) == whole[:len(prompt_ids + response_ids)], turns
            assert not theirs.decode(whole[len(prompt_ids + response_ids):]).strip()
            checked += 1
        assert response_ids[-1] == ours.eos_id and ours.eos_id not in response_ids[:-1]
        assert encode_dialogue(ours, turns[:-1]) == (prompt_ids, [])
        assert encode_dialogue(ours, turns[-1:])[1] == response_ids
    assert refused >= 0 and checked > 0.97 * len(dialogues), (refused, checked)


@pytest.mark.parametrize("kind", BYTE_LEVEL_TEMPLATES)
def test_hh_dialogues_by_byte_level_tokenizers(kind, tmp_path, hh_dialogues):
    ours, theirs = byte_level_pair(tmp_path, kind)
    assert_same_ids(ours, theirs, hh_dialogues)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", SENTENCEPIECE_TEMPLATES)
def test_hh_dialogues_by_llamas_tokenizer(name, legacy, tmp_path, shared_data, hh_dialogues):
    # Templates that refuse roles which do not alternate get neighbours of one role merged; a
    # prompt that ends with an answer cannot be merged (6 of HH's 2,312).
    file = shared_data / "llama2_tokenizer/tokenizer.model"
    ours, theirs = sentencepiece_pair(tmp_path, name, file, legacy)
    assert_same_ids(ours, theirs, hh_dialogues, refused=2)


# ---- hard text ----------------------------------------------------------------------------------

def ids_by_segments(theirs, turns, ask) -> list[int]:
    """Ids of theirs where messages may spell control tokens out: their rendering, with a mark in
    those names, cut at the others; what stands between is encoded without looking for tokens."""
    names = sorted(theirs.get_added_vocab(), key=len, reverse=True)
    special = [name for name in names if name != "<tool>"]
    pattern = re.compile("|".join(map(re.escape, special)))
    marked = [(role, pattern.sub(lambda found: found[0][0] + "\uf123" + found[0][1:], text))
              for role, text in turns]
    rendered = theirs.apply_chat_template(messages_of(marked), add_generation_prompt=ask,
                                          tokenize=False)
    ids, end = [], 0
    newline = theirs("\n", add_special_tokens=False).input_ids
    for found in [*pattern.finditer(rendered), None]:
        text = rendered[end:found.start() if found else None].replace("\uf123", "")
        first = end == 0
        if text and (first or getattr(theirs, "legacy", False) or len(newline) == 1):
            ids += theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids
        elif text:                               # no space before it, where LlamaTokenizer puts one
            ids += theirs("\n" + text, add_special_tokens=False,
                          split_special_tokens=True).input_ids[len(newline):]
        if found:
            ids.append(theirs.convert_tokens_to_ids(found[0]))
            end = found.end()
    return ids


def assert_same_ids_of_hard_text(ours, theirs, texts, system=True, glued=0):
    """glued: answers whose first character shares a piece with the end of the prompt."""
    names = [name for name in theirs.get_added_vocab() if name != "<tool>"]
    dialogues = [turns[0 if system else turns[0][0] == "System":]
                 for turns in dialogues_of_text(texts)]
    spelled = 0
    for turns in dialogues:
        prompt_ids, response_ids = encode_dialogue(ours, turns)
        ids, whole = prompt_ids + response_ids, ids_by_segments(theirs, turns, False)
        assert prompt_ids == ids_by_segments(theirs, turns[:-1], True), turns
        if whole[:len(prompt_ids)] != prompt_ids:
            glued -= 1                           # what is sampled follows the prompt's own ids
            assert ours.decode(ids) == ours.decode(whole)
            continue
        assert ids == whole[:len(ids)], turns
        if any(name in text for name in names for _, text in turns):
            spelled += 1
            continue
        assert prompt_ids == their_ids(theirs, turns[:-1], True), turns
        assert ids == their_ids(theirs, turns, False)[:len(ids)], turns
    assert spelled > 0 and glued == 0


@pytest.mark.parametrize("kind", BYTE_LEVEL_TEMPLATES)
def test_hard_text_by_byte_level_tokenizers(kind, tmp_path):
    ours, theirs = byte_level_pair(tmp_path, kind)
    assert_same_ids_of_hard_text(ours, theirs, [*HARD_TEXTS, "a <tool> b<tool>"])


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", SENTENCEPIECE_TEMPLATES)
def test_hard_text_by_llamas_tokenizer(name, legacy, tmp_path, shared_data):
    # Mistral's template takes no system message; its "[/INST]" and an answer "(a)" share a piece.
    file = shared_data / "llama2_tokenizer/tokenizer.model"
    ours, theirs = sentencepiece_pair(tmp_path, name, file, legacy)
    assert_same_ids_of_hard_text(ours, theirs, HARD_TEXTS, system=name != "Mistral",
                                 glued=3 if name == "Mistral" else 0)
