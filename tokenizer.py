"""The Vicuna template and the SentencePiece tokenizer of Llama-2: from a dialogue to token ids.

    prompt_ids, response_ids = encode_dialogue(Tokenizer("vicuna-7b-v1.5"),
                                               [("Human", "Hi!"), ("Assistant", "Hello.")])
"""
import os

import sentencepiece


class Tokenizer:
    """The SentencePiece model of Llama-2 and Vicuna: `tokenizer.model`, or a folder that has one."""

    def __init__(self, path: str):
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

    def encode(self, text: str, continues: bool = False) -> list[int]:
        """Token ids of text, without BOS and EOS.

        continues   the text goes on after other tokens: no space is put before it, as
                    transformers' LlamaTokenizer with legacy=False does after </s>
        """
        if not continues:
            return self.pieces.encode(text)
        # A byte piece never merges with its right neighbour, so what follows it stands alone.
        return self.pieces.encode("\n" + text)[len(self._newline):]

    def decode(self, ids: list[int]) -> str:
        return self.pieces.decode(ids)


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
    """
    turns, response_ids = list(turns), []
    if turns and turns[-1][0] == "Assistant":
        said = turns.pop()[1]
        response_ids = tokenizer.encode(" " + said, continues=True) if said else []
        response_ids = response_ids + [tokenizer.eos_id]
    prompt_ids = [tokenizer.bos_id]
    for number, text in enumerate(render_dialogue([*turns, ("Assistant", "")])):
        prompt_ids += [tokenizer.eos_id] * (number > 0)
        prompt_ids += tokenizer.encode(text, continues=number > 0)
    return prompt_ids, response_ids
