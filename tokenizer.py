"""The Vicuna template and the SentencePiece tokenizer of Llama-2: from a dialogue to token ids.

    prompt_ids, response_ids = encode_dialogue(Tokenizer("vicuna-7b-v1.5"),
                                               [("Human", "Hi!"), ("Assistant", "Hello.")])
"""
import os
import shutil
from collections.abc import Sequence

import sentencepiece

from files.text import likely_cause, read_json

# What transformers, vLLM and llama.cpp look for beside the weights.
TOKENIZER_FILES = ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
                   "added_tokens.json", "tokenizer.json")


def read_legacy(file: str) -> bool:
    """The switch `legacy` of a tokenizer_config.json; False without it, as in transformers 5."""
    legacy = read_json(file).get("legacy") if os.path.isfile(file) else False
    if legacy not in (None, False, True):
        raise ValueError(f"{file}: legacy is {legacy!r}; expected true or false")
    return bool(legacy)


class Tokenizer:
    """The SentencePiece model of Llama-2 and Vicuna.

    path     tokenizer.model, or the folder that holds it
    legacy   put a space before the text after </s>, as LlamaTokenizer(legacy=True) does: a second
             turn then starts with "\u2581US", "ER" instead of "USER". None: use the switch in
             tokenizer_config.json beside the file (Vicuna v1.5's: false)
    raises   FileNotFoundError without a file, ValueError if it is no Llama tokenizer
    """

    def __init__(self, path: str, legacy: bool | None = None):
        file = os.path.join(path, "tokenizer.model") if os.path.isdir(path) else path
        if not os.path.isfile(file):
            raise FileNotFoundError(f"{file}: no such tokenizer file")
        try:
            self.pieces = sentencepiece.SentencePieceProcessor(model_file=file)
        except RuntimeError as error:
            raise ValueError(f"{file}: not a SentencePiece model: {error}"
                             f"{likely_cause(file)}") from None
        self.file, self.vocab_size = file, self.pieces.vocab_size()
        self.bos_id, self.eos_id = self.pieces.bos_id(), self.pieces.eos_id()
        self._newline = self.pieces.encode("\n")
        if min(self.bos_id, self.eos_id) < 0 or not self._newline or not self.pieces.is_byte(
                self._newline[-1]):
            raise ValueError(f"{file}: not a Llama tokenizer: it needs BOS, EOS and byte fallback")
        self.legacy = legacy
        if legacy is None:
            self.legacy = read_legacy(os.path.join(os.path.dirname(file), "tokenizer_config.json"))

    def encode(self, text: str, continues: bool = False) -> list[int]:
        """Token ids of a text, without BOS and EOS.

        continues   the text follows other tokens: SentencePiece's usual space before it is left out
        """
        if not continues:
            return self.pieces.encode(text)
        # A byte piece never merges with what follows: encode after a newline, drop the newline.
        return self.pieces.encode("\n" + text)[len(self._newline):]

    def decode(self, ids: list[int]) -> str:
        """The text of token ids; BOS and EOS are left out."""
        return self.pieces.decode(ids)


def copy_tokenizer(tokenizer: Tokenizer, folder: str) -> None:
    """Copy tokenizer.model, and those of TOKENIZER_FILES that lie beside it."""
    source = os.path.dirname(tokenizer.file)
    shutil.copy(tokenizer.file, os.path.join(folder, "tokenizer.model"))
    for name in TOKENIZER_FILES[1:]:
        if os.path.isfile(os.path.join(source, name)):
            shutil.copy(os.path.join(source, name), folder)


VICUNA_SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. The "
                 "assistant gives helpful, detailed, and polite answers to the user's questions.")


def render_dialogue(turns: Sequence[tuple[str, str]]) -> list[str]:
    """The Vicuna v1.5 text of a dialogue, in parts that end after every answer.

    turns     [("System", text)?, ("Human", text), ("Assistant", text), …]; after a last Human turn,
              or ("Assistant", ""), the text ends on "ASSISTANT:", ready for the next answer
    returns   ["{system} USER: a ASSISTANT: b", "USER: c ASSISTANT:"], for "</s>".join
    raises    ValueError for an unknown role
    Source: FastChat conversation.py "vicuna_v1.1": an empty text prints its role only.
    """
    turns = list(turns)
    system = turns.pop(0)[1] if turns and turns[0][0] == "System" else VICUNA_SYSTEM
    texts = [system + " "]
    for role, text in turns:
        if role == "Human":
            texts[-1] += f"USER: {text} " if text else "USER:"
        elif role == "Assistant":
            texts[-1] += f"ASSISTANT: {text}" if text else "ASSISTANT:"
            if text:
                texts.append("")
        else:
            raise ValueError(f"unknown role {role!r}; expected Human or Assistant")
    if not turns or turns[-1][0] == "Human":
        texts[-1] += "ASSISTANT:"
    return texts


def encode_dialogue(tokenizer: Tokenizer,
                    turns: Sequence[tuple[str, str]]) -> tuple[list[int], list[int]]:
    """Token ids of a dialogue in the Vicuna template.

    turns     see `render_dialogue`
    returns   prompt ids, BOS first; response ids of a last Assistant turn, EOS last, else []
    Together they are the ids of the whole text encoded at once: a piece never crosses a space, and
    the response starts with one, after "ASSISTANT:". EOS is added as an id; "</s>" typed inside a
    text stays text.
    Source: ids equal transformers' LlamaTokenizer on FastChat's text, legacy or not.
    """
    turns, response_ids = list(turns), []
    if turns and turns[-1][0] == "Assistant":
        response = turns.pop()[1]
        if response:
            response_ids = tokenizer.encode(" " + response, continues=True)
        response_ids = [*response_ids, tokenizer.eos_id]
    prompt_ids = [tokenizer.bos_id]
    for number, text in enumerate(render_dialogue([*turns, ("Assistant", "")])):
        if number > 0:
            prompt_ids.append(tokenizer.eos_id)
        prompt_ids += tokenizer.encode(text, continues=number > 0 and not tokenizer.legacy)
    return prompt_ids, response_ids
