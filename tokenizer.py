"""The Vicuna template and the SentencePiece tokenizer of Llama-2: from a dialogue to token ids.

    prompt_ids, response_ids = encode_dialogue(Tokenizer("vicuna-7b-v1.5"),
                                               [("Human", "Hi!"), ("Assistant", "Hello.")])
"""
import json
import os
import shutil

import sentencepiece

# What transformers, vLLM and llama.cpp look for beside the weights.
TOKENIZER_FILES = ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
                   "added_tokens.json", "tokenizer.json")


def read_legacy(file: str) -> bool:
    """The switch `legacy` of a tokenizer_config.json; False without it, as in transformers 5."""
    if not os.path.isfile(file):
        return False
    with open(file, encoding="utf-8") as stream:
        try:
            legacy = json.load(stream).get("legacy")
        except (ValueError, AttributeError):
            raise ValueError(f"{file}: not a JSON object") from None
    if legacy not in (None, False, True):
        raise ValueError(f"{file}: legacy is {legacy!r}; expected true or false")
    return bool(legacy)


class Tokenizer:
    """The SentencePiece model of Llama-2 and Vicuna: `tokenizer.model`, or a folder that has one.

    legacy   put a space before the text after </s>, as LlamaTokenizer(legacy=True) does: a second
             turn then starts "\u2581US", "ER"; without, "USER". None: what tokenizer_config.json
             beside the file says (Vicuna v1.5's: false)
    """

    def __init__(self, path: str, legacy: bool | None = None):
        file = os.path.join(path, "tokenizer.model") if os.path.isdir(path) else path
        if not os.path.isfile(file):
            raise FileNotFoundError(f"{file}: no such tokenizer file")
        try:
            self.pieces = sentencepiece.SentencePieceProcessor(model_file=file)
        except RuntimeError as error:
            raise ValueError(f"{file}: not a SentencePiece model: {error}") from None
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
        """Token ids of text, without BOS and EOS.

        continues   the text goes on after other tokens: no space is put before it
        """
        if not continues:
            return self.pieces.encode(text)
        # A byte piece never merges with its right neighbour, so what follows it stands alone.
        return self.pieces.encode("\n" + text)[len(self._newline):]

    def decode(self, ids: list[int]) -> str:
        return self.pieces.decode(ids)


def copy_tokenizer(tokenizer: Tokenizer, folder: str) -> None:
    """Copy tokenizer.model and whatever of TOKENIZER_FILES lies beside it."""
    source = os.path.dirname(tokenizer.file)
    shutil.copy(tokenizer.file, os.path.join(folder, "tokenizer.model"))
    for name in TOKENIZER_FILES[1:]:
        if os.path.isfile(os.path.join(source, name)):
            shutil.copy(os.path.join(source, name), folder)


VICUNA_SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. The "
                 "assistant gives helpful, detailed, and polite answers to the user's questions.")


def render_dialogue(turns) -> list[str]:
    """The Vicuna v1.5 text of a dialogue, cut after every answer; "</s>".join gives all of it.

    turns     [("System", text)?, ("Human", text), ("Assistant", text), …]; a last Human turn, or
              ("Assistant", ""), asks for the next answer
    returns   ["{system} USER: a ASSISTANT: b", "USER: c ASSISTANT:"]; the last is open
    Source: FastChat conversation.py "vicuna_v1.1": an empty text prints its role only.
    """
    turns = list(turns)
    system = turns.pop(0)[1] if turns and turns[0][0] == "System" else VICUNA_SYSTEM
    texts = [system + " "]
    for role, said in turns:
        if role == "Human":
            texts[-1] += f"USER: {said} " if said else "USER:"
        elif role == "Assistant":
            texts[-1] += f"ASSISTANT: {said}" if said else "ASSISTANT:"
            texts += [""] if said else []
        else:
            raise ValueError(f"unknown role {role!r}; expected Human or Assistant")
    if not turns or turns[-1][0] == "Human":
        texts[-1] += "ASSISTANT:"
    return texts


def encode_dialogue(tokenizer: Tokenizer, turns) -> tuple[list[int], list[int]]:
    """Prompt ids (BOS first) and, if the assistant spoke last, response ids (EOS last), else [].

    Ids equal those of the whole text encoded at once, so prompt ids are a strict prefix of them:
    pieces never cross a space, and the response continues the prompt after "ASSISTANT:".
    EOS is put by id; "</s>" inside a text stays text.
    Source: ids equal transformers' LlamaTokenizer on FastChat's text, legacy or not.
    """
    turns, response_ids = list(turns), []
    if turns and turns[-1][0] == "Assistant":
        said = turns.pop()[1]
        response_ids = tokenizer.encode(" " + said, continues=True) if said else []
        response_ids = response_ids + [tokenizer.eos_id]
    prompt_ids = [tokenizer.bos_id]
    for number, text in enumerate(render_dialogue([*turns, ("Assistant", "")])):
        prompt_ids += [tokenizer.eos_id] * (number > 0)
        prompt_ids += tokenizer.encode(text, continues=number > 0 and not tokenizer.legacy)
    return prompt_ids, response_ids
