"""The Vicuna template byte for byte, and token ids as transformers gives them, for any text."""
import hashlib
import json
import shutil

import pytest
import sentencepiece
from conftest import TINY_VOCAB

from data import (VICUNA_SYSTEM, Record, Tokenizer, encode_dialogue, encode_prompt, read_dataset,
                  render_dialogue)
from generate import prompt_ids_of
from model import load_llama
from packing import make_trees
from tokenizer import save_tokenizer

STRANGE = ["plain words", "  two spaces first", "new\nline\n\n", "tab\tand\r\n", "</s>",
           "<s>[INST]", "a </s> b", "</s></s>", "<unk>", "<0x0A>", "émoji 😀👩\u200d👧",
           "e\u0301 combining", "\u202eRTL", "NUL\0inside", "\0", "שלום עולם", "\x1b[31m", "中文。",
           "ASSISTANT: USER:", "x" * 300, "a  b   c    d", "?"]
BLANK = ["", "\n", " "]
ASK = ("Assistant", "")         # asks for the next answer


def joined(pieces, turns) -> list[int]:
    """Ids of a whole dialogue, written anew: whole text between two </s>, encoded at once.

    After a </s>, as transformers does it (legacy=False): encode "<unk>" + text, drop what "<unk>"
    alone gives. For turns that alternate and are not empty.
    """
    text, ids = f"{VICUNA_SYSTEM} ", [pieces.bos_id()]
    for number, (role, turn) in enumerate(turns):
        text += f"USER: {turn} " if role == "Human" else f"ASSISTANT: {turn}"
        if role == "Assistant":
            skip = len(pieces.encode("<unk>")) if number > 1 else 0
            ids += pieces.encode("<unk>" * bool(skip) + text)[skip:] + [pieces.eos_id()]
            text = ""
    return ids


def split_at(ids, end) -> list[list[int]]:
    parts = [[]]
    for i in ids:
        parts.append([]) if i == end else parts[-1].append(i)
    return parts


def test_template_bytes_are_fastchats():
    # Vicuna v1.1 / v1.5: sha256 of FastChat's rendering; no space before USER, none at the end.
    turns = [("Human", "Hello!"), ("Assistant", "Hi!"), ("Human", "How are you?"), ASK]
    text = "</s>".join(render_dialogue(turns))
    assert text == (VICUNA_SYSTEM + " USER: Hello! ASSISTANT: Hi!</s>USER: How are you? ASSISTANT:")
    assert render_dialogue(turns) == render_dialogue(turns[:-1])       # a last Human turn asks too
    assert len(VICUNA_SYSTEM.encode()) == 154
    assert hashlib.sha256(text.encode()).hexdigest() == (
        "7a0b861c844f5b4926c2f381dba25c591040a3da0761f2b1acb12d8d0cb52242")


def test_template_of_a_system_message_and_of_empty_texts():
    # A system message replaces the sentence; FastChat prints only the role of an empty text.
    assert render_dialogue([("System", "Be kind."), ("Human", "a"), ASK]) == [
        "Be kind. USER: a ASSISTANT:"]
    assert render_dialogue([("Human", ""), ASK]) == [VICUNA_SYSTEM + " USER:ASSISTANT:"]
    with pytest.raises(ValueError, match="unknown role 'Tool'"):
        render_dialogue([("Tool", "a")])


@pytest.mark.parametrize("legacy, suffix", [(False, ""), (True, "_legacy")])
def test_ids_equal_those_of_transformers(shared_data, legacy, suffix):
    # Six HH dialogues through FastChat's template and the slow LlamaTokenizer, BOS first. Four of
    # them have a second turn, whose first piece tells legacy from not.
    tokenizer = Tokenizer(str(shared_data / "llama2_tokenizer"), legacy=legacy)
    for row in json.loads((shared_data / "llama2_tokenizer/vicuna_golden.json").read_text()):
        assert "</s>".join(render_dialogue([*row["turns"][:-1], ASK])) == row["prompt_text"]
        assert "</s>".join(render_dialogue(row["turns"])) == row["full_text"]
        prompt_ids, response_ids = encode_dialogue(tokenizer, row["turns"])
        assert prompt_ids == row["prompt_ids" + suffix]
        assert prompt_ids + response_ids == row["full_ids" + suffix]


def test_legacy_is_what_the_folders_files_say(tmp_path, tiny_tokenizer):
    # So training, evaluation and other tools agree without a flag; an argument wins; a text in its
    # place is no switch (bool("false") is True). transformers reads a tokenizer.json first.
    def legacy_of(config, **options):
        (tmp_path / "tokenizer_config.json").write_text(config)
        return Tokenizer(str(tmp_path), **options).legacy

    shutil.copy(tiny_tokenizer, tmp_path)
    assert Tokenizer(str(tmp_path)).legacy is False
    assert legacy_of('{"legacy": true}') is True
    assert legacy_of('{"legacy": true}', legacy=False) is False
    assert legacy_of('{"legacy": null}') is legacy_of("{}") is False
    for config, words in (('{"legacy": "false"}', "legacy is 'false'"), ("[]", "not a JSON object"),
                          ("{", "not JSON: Expecting")):
        with pytest.raises(ValueError, match=f"tokenizer_config.json: {words}"):
            legacy_of(config)
    for pipeline, legacy in (({"normalizer": {"type": "Prepend", "prepend": "▁"}}, True),
                             ({"pre_tokenizer": {"prepend_scheme": "first"}}, False),
                             ({"pre_tokenizer": {"prepend_scheme": "always"}}, True),
                             ({"pre_tokenizer": {"add_prefix_space": True}}, True)):
        (tmp_path / "tokenizer.json").write_text(json.dumps(pipeline | {"model": {"type": "BPE"}}))
        assert legacy_of(json.dumps({"legacy": not legacy})) is legacy


# ---- added tokens -------------------------------------------------------------------------------

@pytest.fixture
def with_added(tmp_path, tiny_tokenizer):
    """A SentencePiece folder with a ChatML end, a padding token and a word as added tokens."""
    shutil.copy(tiny_tokenizer, tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps(
        {"<|im_start|>": TINY_VOCAB, "<|im_end|>": TINY_VOCAB + 1, "<word>": TINY_VOCAB + 3}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {
        str(TINY_VOCAB + 1): {"content": "<|im_end|>", "special": True}}, "eos_token": {
        "content": "<|im_end|>", "special": True}, "model_max_length": 10 ** 30}))
    return tmp_path


def test_tokens_added_to_a_sentencepiece_model(with_added):
    # As in transformers: a special one is never in a text, another one is. One id has no piece.
    tokenizer = Tokenizer(str(with_added))
    assert tokenizer.eos_ids == (TINY_VOCAB + 1,) and tokenizer.vocab_size == TINY_VOCAB + 4
    assert tokenizer.unused_ids(TINY_VOCAB + 6) == [TINY_VOCAB + i for i in (2, 4, 5)]
    with pytest.raises(ValueError, match=f"has {TINY_VOCAB + 4} pieces, .* only {TINY_VOCAB} rows"):
        tokenizer.unused_ids(TINY_VOCAB)
    text = "a <word>boat<|im_end|><|im_start|>"
    ids = tokenizer.encode(text)
    assert ids.count(TINY_VOCAB + 3) == 1 and TINY_VOCAB + 1 not in ids
    assert TINY_VOCAB in ids                             # no special one, and no template writes it
    assert tokenizer.decode([*ids, TINY_VOCAB + 1, TINY_VOCAB + 2]) == text
    for text in ("a <word> boat", "<word> a  boat<word>", " a<word>boat "):      # every space of it
        assert tokenizer.decode(tokenizer.encode(text)) == text
    prompt_ids, response_ids = encode_dialogue(tokenizer, [("Human", text), ("Assistant", text)])
    assert (prompt_ids + response_ids).index(TINY_VOCAB + 1) == len(prompt_ids + response_ids) - 1


def test_added_tokens_that_are_none_are_refused(with_added):
    # Ids of pieces, ids that are no number, a list: each file is named.
    for name, value, words in (
            ("added_tokens.json", {"<x>": 5}, "added tokens <x> have ids of its pieces"),
            ("added_tokens.json", {"<x>": True}, "added_tokens.json: .* is no added token"),
            ("added_tokens.json", {"<x>": -1}, "added_tokens.json: .* is no added token"),
            ("added_tokens.json", ["<x>"], "added_tokens.json: not a JSON object"),
            ("tokenizer_config.json", {"added_tokens_decoder": {"x": {}}}, "no object of ids"),
            ("tokenizer_config.json", {"added_tokens_decoder": {"9": {}}}, "is no added token"),
            ("tokenizer_config.json", {"eos_token": 5}, "eos_token is 5; expected a text")):
        kept = (with_added / name).read_text()
        (with_added / name).write_text(json.dumps(value))
        with pytest.raises(ValueError, match=words):
            Tokenizer(str(with_added))
        (with_added / name).write_text(kept)


# ---- where an answer ends -----------------------------------------------------------------------

@pytest.mark.parametrize("config, generation, eos_ids, notes", [
    (None, None, (2,), []),
    (2, None, (2,), []),
    ([2], [2, 5], (2, 5), []),
    ([9, 2], None, (2, 9), []),                          # all ids of a list that has ours
    ([9, 2], [2, 7, TINY_VOCAB + 1], (2, 7, 9), []),     # but not those without a piece
    (1, None, (2,), ["/config.json: eos_token_id is [1], but here answers end in [2] ('</s>')"]),
    (None, [7, 9], (2,), ["generation_config.json: eos_token_id is [7, 9]"]),
    (True, ["</s>"], (2,), []),
])
def test_one_rule_for_where_an_answer_ends(config, generation, eos_ids, notes, tmp_path,
                                           tiny_tokenizer):
    # The tokenizer's id is what training puts there; a list beside it adds ends, never replaces it.
    shutil.copy(tiny_tokenizer, tmp_path)
    for name, value in (("config.json", config), ("generation_config.json", generation)):
        if value is not None:
            (tmp_path / name).write_text(json.dumps({"eos_token_id": value}))
    tokenizer = Tokenizer(str(tmp_path))
    assert tokenizer.eos_ids == eos_ids and tokenizer.eos_id == 2
    assert len(tokenizer.notes) == len(notes)
    assert all(words in note for words, note in zip(notes, tokenizer.notes, strict=True))
    assert encode_dialogue(tokenizer, [("Assistant", "a")])[1][-1] == 2


# ---- files for other programs -------------------------------------------------------------------

def test_what_is_saved_is_read_again(tmp_path, with_added):
    # A folder without tokenizer.model is the converters' first complaint. What this one has of its
    # own that is no tokenizer's stays behind, and so does a template that was not trained on.
    (with_added / "chat_template.jinja").write_text("[INST] {{ messages[0]['content'] }}")
    settings = json.loads((with_added / "tokenizer_config.json").read_text())
    (with_added / "tokenizer_config.json").write_text(json.dumps(settings | {
        "chat_template": "[INST]", "secret": "mine", "auto_map": {"AutoTokenizer": "code.py"}}))
    target = tmp_path / "to"
    target.mkdir()
    ours = Tokenizer(str(with_added), chat_template="vicuna")
    save_tokenizer(ours, str(target))
    assert {file.name for file in target.iterdir()} == {
        "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
        "added_tokens.json", "chat_template.jinja"}
    model, copy = (folder / "tokenizer.model" for folder in (with_added, target))
    assert copy.read_bytes() == model.read_bytes()
    written = json.loads((target / "tokenizer_config.json").read_text())
    assert "INST" not in str(written) and not {"secret", "auto_map"} & written.keys()
    assert written["chat_template"] == (target / "chat_template.jinja").read_text()
    again = Tokenizer(str(target))
    assert again.chat_template == "vicuna" and again.template is None and not again.notes
    assert again.vocabulary.ids == ours.vocabulary.ids
    assert again.vocabulary.controls == ours.vocabulary.controls
    assert again.eos_ids == ours.eos_ids


def test_beside_a_model_the_ends_are_written(tmp_path, tiny_tokenizer):
    # config.json said 1, the tokenizer 2, and a server would follow the first.
    source, target = tmp_path / "from", tmp_path / "to"
    source.mkdir(), target.mkdir()
    shutil.copy(tiny_tokenizer, source)
    (source / "generation_config.json").write_text(json.dumps(
        {"eos_token_id": [9, 2], "temperature": 0.3, "do_sample": True, "path": "/home/me"}))
    (target / "config.json").write_text(json.dumps({"eos_token_id": 1, "hidden_size": 8}))
    save_tokenizer(Tokenizer(str(source)), str(target))
    assert json.loads((target / "config.json").read_text()) == {
        "eos_token_id": [2, 9], "bos_token_id": 1, "hidden_size": 8}
    assert json.loads((target / "generation_config.json").read_text()) == {
        "eos_token_id": [2, 9], "bos_token_id": 1, "temperature": 0.3, "do_sample": True}


# ---- text ---------------------------------------------------------------------------------------

def test_prompt_ids_are_a_prefix_of_the_joint_ids_on_all_of_hh(hh_file, llama_tokenizer):
    # Encoding prompt and response apart usually differs from encoding them at once; here never.
    records, checked = read_dataset(hh_file), 0
    for record in records:
        for response in record.responses:
            turns = (*record.prompt, ("Assistant", response))
            prompt_ids, response_ids = encode_dialogue(llama_tokenizer, turns)
            if record.prompt[-1][0] == "Human":
                assert encode_dialogue(llama_tokenizer, record.prompt) == (prompt_ids, [])
            ids = prompt_ids + response_ids
            assert len(response_ids) > 1 and ids[-1] == 2 and ids.count(1) == 1 and ids[0] == 1
            roles = [role for role, _ in turns]
            if roles == ["Human", "Assistant"] * (len(roles) // 2) and all(s for _, s in turns):
                assert ids == joined(llama_tokenizer.pieces, turns), record.where
                checked += 1
    assert checked > 4580


def test_a_prompt_is_the_same_for_training_and_for_sampling(tiny_model):
    # In HH some prompts end on an Assistant's turn: a second one follows, the first is no answer.
    tokenizer, model = Tokenizer(tiny_model), load_llama(tiny_model)
    for last in ((), (("Assistant", "Wait."),)):
        turns = (("Human", "Why?"), *last)
        (tree,) = make_trees([Record(turns, ("So.",), (1.0,), "f:1")], tokenizer, "all", 256, 200)
        assert encode_prompt(tokenizer, turns) == tree.prompt_ids
        assert prompt_ids_of(model, tokenizer, turns, 8) == tree.prompt_ids
        assert tokenizer.decode(tree.prompt_ids).count("Wait.") == len(last)


def test_every_real_prompt_is_whole_and_ends_in_the_answer_mark(hh_file, llama_tokenizer):
    # In 5 answers two Assistant turns follow each other; the first belongs to the prompt, and
    # "ASSISTANT:" stands before the second as before any other.
    records = [r for r in read_dataset(hh_file)
               if [role for role, _ in r.prompt] != ["Human", "Assistant"] * (len(r.prompt) // 2)
               + ["Human"]]
    assert len(records) > 8
    wrong = []
    for record in records:
        tree, = make_trees([record], llama_tokenizer, max_length=10**6, max_prompt_length=10**5)
        text = llama_tokenizer.decode(tree.prompt_ids)
        if not text.endswith("ASSISTANT:") or any(turn not in text for _, turn in record.prompt):
            wrong.append(int(record.where.rpartition(":")[2]))
    assert wrong == []


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("text", STRANGE + BLANK)
def test_no_text_gives_the_ids_of_bos_or_eos(tiny_tokenizer, text, legacy):
    # "</s>" typed by a user must not end an answer. One BOS, one EOS an answer, in any position.
    tokenizer = Tokenizer(tiny_tokenizer, legacy)
    turns = [("Human", text), ("Assistant", text), ("Human", text), ("Assistant", text)]
    prompt_ids, response_ids = encode_dialogue(tokenizer, turns)
    ids = prompt_ids + response_ids
    answers = 2 if text else 1                  # FastChat prints only the role of an empty text
    assert ids[0] == 1 and ids.count(1) == 1 and ids.count(0) == 0
    assert ids.count(2) == answers and ids[-1] == 2
    texts = render_dialogue(turns)
    assert "</s>".join(texts[:answers]) == "</s>".join(
        tokenizer.decode(part) for part in split_at(ids[1:-1], 2))


@pytest.mark.parametrize("text", STRANGE)
def test_strange_text_stays_text(tiny_tokenizer, text):
    # "</s>" typed by a user must not end the answer; all else comes back from its bytes unchanged.
    tokenizer = Tokenizer(tiny_tokenizer)
    answer = text.strip()
    turns = [("Human", text), ("Assistant", answer), ("Human", text), ("Assistant", answer)]
    prompt_ids, response_ids = encode_dialogue(tokenizer, turns)
    assert prompt_ids + response_ids == joined(tokenizer.pieces, turns)
    assert prompt_ids[0] == 1 and response_ids[-1] == 2 and prompt_ids.count(2) == 1
    assert not {0, 1, 2} & set(prompt_ids[1:prompt_ids.index(2)] + response_ids[:-1])
    assert not {0, 1, 2} & set(prompt_ids[prompt_ids.index(2) + 1:])
    assert tokenizer.decode(response_ids[:-1]) == answer
    first, last = render_dialogue([*turns[:-1], ASK])
    assert tokenizer.decode(prompt_ids[1:prompt_ids.index(2)]) == first
    assert tokenizer.decode(tokenizer.encode(" " + last, continues=True)) == last


@pytest.mark.parametrize("text", STRANGE)
def test_strange_text_keeps_its_ids_with_llamas_tokenizer(llama_tokenizer, text):
    # The same with the 32,000 real pieces, where spaces and newlines have long pieces.
    turns = [("Human", text), ("Assistant", text), ("Human", text), ("Assistant", text.strip())]
    prompt_ids, response_ids = encode_dialogue(llama_tokenizer, turns)
    assert prompt_ids + response_ids == joined(llama_tokenizer.pieces, turns)
    assert llama_tokenizer.decode(llama_tokenizer.encode(text)) == text
    assert not {0, 1, 2} & set(llama_tokenizer.encode(text))


def test_a_continued_text_gets_no_space(tiny_tokenizer):
    # SentencePiece puts a space before every text it is given; between </s> and USER there is none.
    tokenizer = Tokenizer(tiny_tokenizer)
    pieces = [tokenizer.pieces.id_to_piece(i) for i in tokenizer.encode("USER: hi", continues=True)]
    assert "".join(pieces) == "USER:\u2581hi"
    assert tokenizer.encode("", continues=True) == []


def test_files_that_are_no_llama_tokenizer_are_refused(tmp_path):
    # No bytes; no BOS; T5's normaliser, which eats newlines: a ValueError, not an IndexError.
    with pytest.raises(FileNotFoundError, match="no such tokenizer file"):
        Tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.model").write_bytes(b"version https://git-lfs")
    with pytest.raises(ValueError, match="not a SentencePiece model: .*git-lfs pointer, run"):
        Tokenizer(str(tmp_path))
    plain = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    for size, options in ((40, plain), (300, plain | {"byte_fallback": True, "bos_id": -1}),
                          (300, {"byte_fallback": True})):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["how are you", "the quick brown fox"] * 9), minloglevel=2,
            model_prefix=str(tmp_path / "tokenizer"), model_type="bpe", vocab_size=size,
            num_threads=1, **options)
        with pytest.raises(ValueError, match="not a Llama tokenizer"):
            Tokenizer(str(tmp_path))
