"""Token ids of whole dialogues against transformers' LlamaTokenizer, for real and strange text."""
import json

import pytest
import sentencepiece
from chat_templates import (BYTE_LEVEL_TEMPLATES, HARD_TEXTS, dialogues_of_text, messages_of,
                            write_byte_level)
from conftest import need
from test_tokenizer import STRANGE

from data import read_dataset
from tokenizer import Tokenizer, encode_dialogue, render_dialogue, save_tokenizer

transformers = need("transformers")


def llama_tokenizer_of(file, legacy):
    """transformers' tokenizer of a tokenizer.model; its own reader needs the package protobuf."""
    from transformers.convert_slow_tokenizer import generate_merges

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(file))
    vocab = {pieces.id_to_piece(i): i for i in range(pieces.vocab_size())}
    scores = [(piece, pieces.get_score(i)) for piece, i in vocab.items()]
    return transformers.LlamaTokenizer(vocab=vocab, merges=generate_merges(vocab, scores),
                                       legacy=legacy, add_bos_token=True)


def ids_at_once(theirs, turns) -> list[int]:
    """Ids of FastChat's text, encoded in one call, "</s>" included."""
    return theirs("</s>".join(render_dialogue(turns))).input_ids


@pytest.mark.parametrize("legacy", [False, True])
def test_strange_text_has_transformers_ids(tiny_tokenizer, legacy):
    # Theirs does not tell the end of a turn from "</s>" in a user's text: such texts are left out.
    ours, theirs = Tokenizer(tiny_tokenizer, legacy), llama_tokenizer_of(tiny_tokenizer, legacy)
    assert ids_at_once(theirs, [("Human", "</s>")]).count(2) == 1
    for text in STRANGE:
        if any(mark in text for mark in ("<s>", "</s>", "<unk>")):
            continue
        turns = [("Human", text), ("Assistant", text), ("Human", text), ("Assistant", text)]
        prompt_ids, response_ids = encode_dialogue(ours, turns)
        assert prompt_ids + response_ids == ids_at_once(theirs, turns), text
        assert prompt_ids == ids_at_once(theirs, [*turns[:-1], ("Assistant", "")]), text


@pytest.mark.parametrize("legacy", [False, True])
def test_hh_dialogues_have_transformers_ids(shared_data, hh_file, legacy):
    # 32,000 pieces, every twentieth dialogue of HH's harmless test set.
    file = shared_data / "llama2_tokenizer/tokenizer.model"
    ours, theirs = Tokenizer(str(file), legacy), llama_tokenizer_of(file, legacy)
    several = 0
    for record in read_dataset(hh_file)[::20]:
        turns = [*record.prompt, ("Assistant", record.responses[0])]
        prompt_ids, response_ids = encode_dialogue(ours, turns)
        assert prompt_ids + response_ids == ids_at_once(theirs, turns), record.where
        several += len(turns) > 2
    assert several > 50                                  # in one turn `legacy` changes nothing


# ---- the files that we save ---------------------------------------------------------------------

def saved_pair(folder, file, legacy):
    """Our tokenizer of a tokenizer.model, and transformers' of what we save of it."""
    ours = Tokenizer(str(file), legacy)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    save_tokenizer(ours, str(folder))
    return ours, transformers.AutoTokenizer.from_pretrained(str(folder))


@pytest.mark.parametrize("legacy", [False, True])
def test_a_saved_sentencepiece_folder_has_our_ids(legacy, tmp_path, shared_data, hh_file):
    # From a bare tokenizer.model transformers 5.23 makes other ids for 129 of 299 answers of HH:
    # no space before the text, other pieces for two spaces.
    ours, theirs = saved_pair(tmp_path, shared_data / "llama2_tokenizer/tokenizer.model", legacy)
    answers = [text for record in read_dataset(hh_file)[::16] for text in record.responses]
    assert any("  " in text for text in answers) and len(answers) > 280
    for text in [*answers, *HARD_TEXTS, " one space", "   three", "", " ", "▁"]:
        ids = theirs(text, split_special_tokens=True).input_ids
        assert ids == [1, *ours.encode(text)], text
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids), text


@pytest.mark.parametrize("legacy", [False, True])
def test_a_saved_folder_serves_vicunas_template(legacy, tmp_path, shared_data, hh_file):
    # apply_chat_template of the folder gives the ids that were trained on, for every prompt.
    ours, theirs = saved_pair(tmp_path, shared_data / "llama2_tokenizer/tokenizer.model", legacy)
    harmless = [text for text in HARD_TEXTS
                if not any(mark in text for mark in ("<s>", "</s>", "<unk>"))]
    dialogues = [record.prompt for record in read_dataset(hh_file)[::16]]
    dialogues += [turns[:-1] for turns in dialogues_of_text(harmless)]
    for turns in dialogues:
        ids = theirs.apply_chat_template(messages_of(turns), add_generation_prompt=True,
                                         return_dict=False)
        assert ids == encode_dialogue(ours, [*turns, ("Assistant", "")])[0], turns


@pytest.mark.parametrize("kind", BYTE_LEVEL_TEMPLATES)
@pytest.mark.parametrize("template", ["vicuna", "model"])
def test_a_saved_byte_level_folder_is_the_same(kind, template, tmp_path):
    # Vicuna's template on a byte-level tokenizer: no space after BOS, or no BOS at all.
    source, target = tmp_path / "from", tmp_path / "to"
    source.mkdir(), target.mkdir()
    ours = Tokenizer(write_byte_level(source, kind), chat_template=template)
    save_tokenizer(ours, str(target))
    theirs, again = (transformers.AutoTokenizer.from_pretrained(str(target)),
                     Tokenizer(str(target)))
    assert again.chat_template == template and again.eos_ids == ours.eos_ids
    for turns in dialogues_of_text(HARD_TEXTS):
        prompt_ids, response_ids = encode_dialogue(ours, turns)
        assert encode_dialogue(again, turns) == (prompt_ids, response_ids)
        names = theirs.get_added_vocab()
        if not any(name in text for name in names for _, text in turns):
            assert prompt_ids == theirs.apply_chat_template(
                messages_of(turns[:-1]), add_generation_prompt=True, return_dict=False), turns


# ---- tokenizer.json -----------------------------------------------------------------------------

@pytest.mark.parametrize("kind", BYTE_LEVEL_TEMPLATES)
def test_byte_level_ids_and_texts_equal_transformers(kind, tmp_path, hh_file):
    # Added tokens that are no special ones are matched, special ones are text.
    ours = Tokenizer(write_byte_level(tmp_path, kind))
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    answers = [text for record in read_dataset(hh_file)[::16] for text in record.responses]
    for text in [*answers, *HARD_TEXTS, "a <tool> b", "", " "]:
        ids = theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == theirs.decode(ids) == text
        assert b"".join(map(ours.token_bytes, ids)).decode() == text
    assert ours.encode("<tool>") == [theirs.convert_tokens_to_ids("<tool>")]
    assert ours.bos_id == theirs.bos_token_id and ours.eos_id == theirs.eos_token_id
    assert ours.vocabulary.start == theirs("").input_ids
    assert ours.vocab_size == len(theirs) and ours.unused_ids(len(theirs) + 2) == [
        len(theirs), len(theirs) + 1]
    assert ours.decode([ours.eos_id, *ours.encode("a"), len(theirs) + 1]) == "a"


def test_files_that_are_no_tokenizer_are_refused_in_one_sentence(tmp_path):
    for content, words in (("{", "tokenizer.json: not JSON"), ("[]", "not a JSON object"),
                           ("{}", "tokenizer.json: not a tokenizer: "),
                           ('{"added_tokens": [{"id": "x"}]}', "is no added token"),
                           ('{"added_tokens": 5, "model": {"type": "BPE"}}', "is no added token")):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(ValueError) as error:
            Tokenizer(str(tmp_path))
        assert words in str(error.value) and "\n" not in str(error.value)
    write_byte_level(tmp_path, "Llama-3")
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="no token ends an answer: tokenizer_config.json"):
        Tokenizer(str(tmp_path))
    (tmp_path / "config.json").write_text('{"eos_token_id": [4, 3]}')
    tokenizer, target = Tokenizer(str(tmp_path)), tmp_path / "to"
    assert tokenizer.eos_ids == (4, 3)
    target.mkdir()
    save_tokenizer(tokenizer, str(target))               # other programs learn of the end, too
    assert json.loads((target / "tokenizer_config.json").read_text())["eos_token"] == "<|eot_id|>"
