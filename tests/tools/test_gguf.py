"""tools.gguf without the package gguf: tokenizers made of a file's keys, and what is refused."""
import sys

import pytest
import sentencepiece
from chat_templates import HARD_TEXTS

from files.vocabulary import SentencePieceVocabulary
from tools import gguf


class Keys:
    """The keys of a GGUF file, as tools.gguf.Metadata gives them."""

    def __init__(self, **keys):
        self.keys, self.tensors = keys, {}

    def get(self, key, default=None):
        return self.keys.get(key.rpartition(".")[2], default)

    need = get


def sentencepiece_keys(file: str) -> dict:
    """tokenizer.ggml.* as llama.cpp's converter writes them for a tokenizer.model."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=file)
    ids = range(pieces.vocab_size())

    def kind(i):
        return (2 if pieces.is_unknown(i) else 3 if pieces.is_control(i) else 5 if
                pieces.is_unused(i) else 6 if pieces.is_byte(i) else 1)
    return {"tokens": [pieces.id_to_piece(i) for i in ids],
            "scores": [pieces.get_score(i) for i in ids], "token_type": [kind(i) for i in ids],
            "unknown_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@pytest.mark.parametrize("which", ["tiny", "llama"])
def test_a_tokenizer_model_made_of_pieces_and_scores_is_the_same(which, tmp_path, request):
    file = request.getfixturevalue("tiny_tokenizer") if which == "tiny" else str(
        request.getfixturevalue("shared_data") / "llama2_tokenizer/tokenizer.model")
    (tmp_path / "tokenizer.model").write_bytes(
        gguf.sentencepiece_model(Keys(**sentencepiece_keys(file))))
    ours, made = (SentencePieceVocabulary(path, legacy=False)
                  for path in (file, str(tmp_path / "tokenizer.model")))
    assert made.ids == ours.ids and made.controls == ours.controls
    assert (made.bos_id, made.eos_id) == (1, 2)
    for text in [*HARD_TEXTS, "", " ", "  two  spaces", "How do I fix a flat tire?"]:
        assert made.encode(text) == ours.encode(text), text
        assert made.decode(made.encode(text)) == ours.decode(ours.encode(text)), text


def test_numbers_of_any_size_in_a_protocol_buffer():
    # Base 128, the lowest digits first; -1 as 2^64 - 1; the tag is field << 3 | kind.
    assert gguf.varint(0) == b"\0" and gguf.varint(300) == b"\xac\x02"
    assert gguf.protobuf(43, -1) == gguf.varint(43 << 3) + b"\xff" * 9 + b"\x01"
    assert gguf.protobuf(1, "é".encode()) == b"\x0a\x02\xc3\xa9"
    assert gguf.protobuf(2, 1.0) == b"\x15\0\0\x80\x3f"


def test_names_of_tensors():
    names = {"blk.11.attn_q.weight": "model.layers.11.self_attn.q_proj.weight",
             "blk.0.ffn_norm.weight": "model.layers.0.post_attention_layernorm.weight",
             "token_embd.weight": "model.embed_tokens.weight", "output.weight": "lm_head.weight",
             "output_norm.weight": "model.norm.weight", "blk.0.attn_q.bias": "",
             "blk.0.attn_q_norm.weight": "", "v.blk.0.attn_q.weight": "", "rope_freqs.weight": ""}
    assert {name: gguf.hugging_face_name(name) for name in names} == names


def test_what_is_missing_is_said_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)               # as if it were not installed
    with pytest.raises(ValueError, match="a.gguf is read by the package gguf: pip install gguf$"):
        gguf.main(["a.gguf", str(tmp_path / "out")])
    with pytest.raises(ValueError, match=f"{tmp_path} is there already; choose another OUT"):
        gguf.main(["a.gguf", str(tmp_path)])
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    (tmp_path / "tokenizer.json").write_text("{}")
    from tokenizer import Tokenizer
    with pytest.raises(ValueError, match="read by the package tokenizers: pip install tokenizers$"):
        Tokenizer(str(tmp_path))
