"""Token ids of whole dialogues against transformers' LlamaTokenizer, for real and strange text."""
import pytest
import sentencepiece
from conftest import need
from test_tokenizer import STRANGE

from data import read_dataset
from tokenizer import Tokenizer, encode_dialogue, render_dialogue

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
