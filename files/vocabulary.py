"""Tokenizer files behind one interface: SentencePiece's tokenizer.model, or tokenizer.json.

Text and control tokens are apart: `encode` never gives the id of a control token, whatever the text
says; they are put in by id, in a list of parts: ["Hi", 2, "USER: a"].
"""
import os
import re
import secrets
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import sentencepiece

from files.text import json_value, likely_cause

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token",
                 "mask_token")
Parts = Sequence[str | int]          # texts, and ids of control tokens between them


class Added(NamedTuple):
    """A token that stands beside the vocabulary, matched in a text before anything else."""
    id: int
    special: bool = False            # never matched in a text here
    flags: dict = {}                 # lstrip, rstrip, single_word


# ---- small files --------------------------------------------------------------------------------

def read_settings(file: str) -> dict:
    """A JSON object beside a tokenizer, {} without the file.

    Not `files.text.read_json`: a published model_max_length is 10^30, a tokenizer.json 20 MB.
    """
    if not os.path.isfile(file):
        return {}
    with open(file, "rb") as raw:
        try:
            value = json_value(raw.read())
        except ValueError as error:
            raise ValueError(f"{file}: not JSON: {error}{likely_cause(file)}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file}: not a JSON object")
    return value


def special_tokens(folder: str) -> dict[str, str]:
    """{"bos_token": "<s>", …} of tokenizer_config.json, else of special_tokens_map.json."""
    found = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        file = os.path.join(folder, name)
        settings = read_settings(file)
        for key in SPECIAL_NAMES:
            token = settings.get(key)
            token = token.get("content") if isinstance(token, dict) else token
            if not isinstance(token, str | None):
                raise ValueError(f"{file}: {key} is {token!r:.60}; expected a text")
            if token:
                found[key] = token
    return found


def read_added(entries: object, file: str) -> dict[str, Added]:
    """{text: Added} of a list of {id, content, special, lstrip, rstrip, single_word}."""
    added = {}
    for entry in entries if isinstance(entries, list) else [entries]:
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), str) or (
                type(entry.get("id")) is not int or not 0 <= entry["id"] < 2 ** 31):
            raise ValueError(f"{file}: {entry!r:.80} is no added token: it has no id or no content")
        if entry["content"]:
            flags = {key: entry.get(key) is True for key in ("lstrip", "rstrip", "single_word")}
            added[entry["content"]] = Added(entry["id"], entry.get("special") is True, flags)
    return added


def added_beside(folder: str) -> dict[str, Added]:
    """Added tokens of added_tokens.json and of tokenizer_config.json's added_tokens_decoder."""
    file, config = (os.path.join(folder, name)
                    for name in ("added_tokens.json", "tokenizer_config.json"))
    entries = [{"content": text, "id": number} for text, number in read_settings(file).items()]
    decoder = read_settings(config).get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict) or not all(
            key.isdecimal() and isinstance(value, dict) for key, value in decoder.items()):
        raise ValueError(f"{config}: added_tokens_decoder is no object of ids and tokens")
    more = [value | {"id": int(key)} for key, value in decoder.items()]
    return read_added(entries, file) | read_added(more, config)


# ---- bytes of a token ---------------------------------------------------------------------------

def byte_level_alphabet() -> dict[str, int]:
    """The character that byte-level BPE writes for each byte, as GPT-2 does, to the byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {
        chr(256 + number): byte for number, byte in enumerate(others)}


def piece_bytes(piece: str, alphabet: dict[str, int] | None) -> bytes:
    """The bytes of text that a piece of the vocabulary stands for.

    alphabet   of byte-level BPE; None: SentencePiece's way, "▁the" and "<0x0A>"
    """
    if alphabet:
        return b"".join(bytes([alphabet[char]]) if char in alphabet else char.encode()
                        for char in piece)
    if re.fullmatch("<0x[0-9A-F]{2}>", piece):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("▁", " ").encode()


# ---- tokenizer.model ----------------------------------------------------------------------------

class SentencePieceVocabulary:
    """The SentencePiece model of Llama-2, Vicuna, TinyLlama, Mistral, and tokens added to it.

    legacy     put a space before a text after a control token, as LlamaTokenizer(legacy=True) does
    template   a chat template: added tokens that it writes are control tokens, special or not
    """

    def __init__(self, file: str, legacy: bool, template: str = ""):
        folder, self.file, self.legacy = os.path.dirname(file), file, legacy
        try:
            self.pieces = pieces = sentencepiece.SentencePieceProcessor(model_file=file)
            self.ids = {pieces.id_to_piece(number): number for number in range(len(pieces))}
        except (RuntimeError, UnicodeDecodeError) as error:
            raise ValueError(f"{file}: not a SentencePiece model: {error}"
                             f"{likely_cause(file)}") from None
        self._newline = pieces.encode("\n")
        if min(pieces.bos_id(), pieces.eos_id()) < 0 or not self._newline or not pieces.is_byte(
                self._newline[-1]):
            raise ValueError(f"{file}: not a Llama tokenizer: it needs BOS, EOS and byte fallback")
        own, named = range(pieces.vocab_size()), special_tokens(folder)
        self.controls = {piece: number for piece, number in self.ids.items()
                         if pieces.is_control(number) or pieces.is_unknown(number)}
        added = {text: token for text, token in added_beside(folder).items()
                 if text not in self.ids}
        if clash := [text for text, token in added.items() if token.id in own]:
            raise ValueError(f"{file}: added tokens {', '.join(clash)[:80]} have ids of its pieces")
        self.ids |= {text: token.id for text, token in added.items()}
        self.controls |= {text: token.id for text, token in added.items()
                          if token.special or (text in template and not text.isspace())}
        self.names = {number: text for text, number in self.ids.items()}
        in_text = sorted((text for text in added if text not in self.controls), key=len)
        self._in_text = re.compile(f"({'|'.join(map(re.escape, in_text[::-1])) or '(?!)'})")
        self.bos_id = self.ids.get(named.get("bos_token"), pieces.bos_id())
        self.eos_id = self.ids.get(named.get("eos_token"), pieces.eos_id())
        self.tokens = {"unk_token": pieces.id_to_piece(pieces.unk_id())} | named | {
            "bos_token": self.names[self.bos_id], "eos_token": self.names[self.eos_id]}
        self.controls |= {self.names[number]: number for number in (self.bos_id, self.eos_id)}
        self.start, self.alphabet = [self.bos_id], None

    def _encode(self, text: str, continues: bool) -> list[int]:
        if not continues:
            return self.pieces.encode(text)
        # A byte piece never merges with what follows: encode after a newline, drop the newline.
        return self.pieces.encode("\n" + text)[len(self._newline):]

    def encode(self, text: str, continues: bool = False) -> list[int]:
        """Ids of a text; continues: without the space that SentencePiece puts before it."""
        ids = []
        for number, part in enumerate(self._in_text.split(text)):        # added tokens at odd ones
            ids += [self.ids[part]] if number % 2 else self._encode(
                part, not self.legacy if number else continues)
        return ids

    def encode_parts(self, parts: Parts) -> list[int]:
        """Ids of texts and control tokens."""
        ids = []
        for number, part in enumerate(parts):
            ids += [part] if isinstance(part, int) else self.encode(
                part, continues=number > 0 and not self.legacy)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without control tokens and ids that have no piece."""
        known = [number for number in ids
                 if number in self.names and self.names[number] not in self.controls]
        text = ""
        for own, run in groupby(known, key=lambda number: number < self.pieces.vocab_size()):
            run = list(run)
            # SentencePiece takes a first space off, which after an added token is the text's own
            space = " " if text and not self.legacy and self.names[run[0]].startswith("▁") else ""
            text += space + self.pieces.decode(run) if own else "".join(map(self.names.get, run))
        return text


# ---- tokenizer.json -----------------------------------------------------------------------------

class JsonVocabulary:
    """A tokenizer.json, by the package tokenizers: Llama-3's, SmolLM2's and other BPE.

    Control tokens stand in a text as names that nobody can write (a random number, new in every
    process), so that text and control tokens are encoded in one pass, as transformers does it:
    what stands between control tokens, and what an added token takes from its neighbours, is the
    same.

    template   a chat template: added tokens that it writes are control tokens, special or not
    """

    def __init__(self, file: str, template: str = ""):
        try:
            import tokenizers
        except ImportError:
            raise ValueError(f"{file} is read by the package tokenizers: pip install tokenizers"
                             ) from None
        folder, self.file, self.legacy = os.path.dirname(file), file, False
        raw = read_settings(file)
        added = read_added(raw.get("added_tokens") or [], file)
        try:
            self.pieces = tokenizers.Tokenizer.from_file(file)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:           # it raises nothing more specific, and panics
            raise ValueError(f"{file}: not a tokenizer: {str(error)[:200]}") from None
        self.pieces.no_truncation()
        self.pieces.no_padding()
        self.tokens = special_tokens(folder)
        added |= {text: token for text, token in added_beside(folder).items()
                  if self.pieces.token_to_id(text) in (token.id, None)}
        self.controls = {text: token.id for text, token in added.items()
                         if token.special or (text in template and not text.isspace())}
        self.controls |= {text: number for text in self.tokens.values()
                          if (number := self.pieces.token_to_id(text)) is not None}
        known = self.pieces.get_vocab()
        self.ids = known | self.controls
        self.names = {number: text for text, number in self.ids.items()}
        # all controls are special: `encode_special_tokens` then reads their names as text
        self.pieces.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False)
                                        for text in self.controls if text in known])
        self.pieces.encode_special_tokens = True
        secret, plain = secrets.token_hex(8), Added(0)
        self._stand_ins = {number: f"\ue000{secret}:{number}\ue001"
                           for number in self.controls.values()}
        self.pieces.add_tokens([
            tokenizers.AddedToken(self._stand_ins[number], special=False, normalized=False,
                                  **added.get(text, plain).flags)
            for text, number in self.controls.items()])
        self._meaning = {self.pieces.token_to_id(name): number
                         for number, name in self._stand_ins.items()}
        self.bos_id = self.ids.get(self.tokens.get("bos_token"))
        self.eos_id = self.ids.get(self.tokens.get("eos_token"))
        add_bos = read_settings(os.path.join(folder, "tokenizer_config.json")).get("add_bos_token")
        if not isinstance(add_bos, bool):
            add_bos = self.bos_id in self.pieces.encode("").ids          # its post-processor's
        self.start = [self.bos_id] if add_bos and self.bos_id is not None else []
        parts = [raw.get("decoder"), raw.get("pre_tokenizer")]
        self.alphabet = byte_level_alphabet() if "'ByteLevel'" in str(parts) else None

    def name_eos(self, number: int | None) -> None:
        """Take the end of config.json, where tokenizer_config.json names none; raises without."""
        if number is None:
            raise ValueError(f"{self.file}: no token ends an answer: tokenizer_config.json beside "
                             "it has no eos_token, config.json no eos_token_id")
        self.eos_id = number
        self.tokens["eos_token"] = self.names[number]

    def encode(self, text: str, continues: bool = False) -> list[int]:
        """Ids of a text; continues: without the space that some put before it."""
        if continues:
            # as transformers does: after a newline, if that is a token of its own
            newline, ids = self.encode("\n"), self.encode("\n" + text)
            if ids[:len(newline)] == newline:
                return ids[len(newline):]
        return self.encode_parts([text])

    def encode_parts(self, parts: Parts) -> list[int]:
        """Ids of texts and control tokens."""
        text = "".join(self._stand_ins[part] if isinstance(part, int) else part for part in parts)
        ids = self.pieces.encode(text, add_special_tokens=False).ids
        return [self._meaning.get(number, number) for number in ids]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without control tokens and ids that have no piece."""
        return self.pieces.decode([number for number in ids if number in self.names],
                                  skip_special_tokens=True)


# ---- tokenizer.model as tokenizer.json ----------------------------------------------------------

def tokenizer_json(vocabulary: SentencePieceVocabulary) -> dict:
    """The tokenizer.json that gives a SentencePiece model's ids in the package tokenizers.

    transformers 5 reads a bare tokenizer.model otherwise: no space before the text, and other
    pieces for double spaces. Merges: every split of a piece into two pieces, the best score first.
    """
    pieces, ids = vocabulary.pieces, vocabulary.ids
    own = {pieces.id_to_piece(number): number for number in range(pieces.vocab_size())}
    merges = [(-pieces.get_score(number), own[piece[:cut]], own[piece[cut:]], piece[:cut],
               piece[cut:]) for piece, number in own.items() if piece not in vocabulary.controls
              for cut in range(1, len(piece)) if piece[:cut] in own and piece[cut:] in own]
    legacy = vocabulary.legacy
    bos = vocabulary.names[vocabulary.bos_id]
    unknown = pieces.id_to_piece(pieces.unk_id())
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    single = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [
            {"id": number, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": text in vocabulary.controls}
            for text, number in sorted(ids.items(), key=lambda item: item[1])
            if text in vocabulary.controls or text not in own],
        # Legacy: "▁" before every text. Else before the first only, whether or not it starts with
        # a space; Metaspace would leave it out there, so it gets a space for the real ones' "▁".
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"}, space]} if legacy else space,
        "pre_tokenizer": None if legacy else {"type": "Sequence", "pretokenizers": [
            {"type": "Metaspace", "replacement": " ", "prepend_scheme": "first", "split": False},
            {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": False}]},
        "post_processor": {
            "type": "TemplateProcessing", "single": single,
            "pair": single + [{"SpecialToken": {"id": bos, "type_id": 1}},
                              {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {bos: {"id": bos, "ids": [vocabulary.bos_id], "tokens": [bos]}}},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": None, "unk_token": unknown,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": True,
                  "byte_fallback": True, "ignore_merges": False, "vocab": own,
                  "merges": [[left, right] for *_, left, right in sorted(merges)]}}
