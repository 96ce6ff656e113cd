"""From a dialogue to token ids: a chat template, Vicuna's or another, over a model's vocabulary.

    tokenizer = Tokenizer("vicuna-7b-v1.5")
    prompt_ids, response_ids = encode_dialogue(tokenizer, [("Human", "Hi!"), ("Assistant", "Ho.")])

What a message says stays text: "</s>" or "<|im_end|>" inside one never becomes the token that ends
an answer. The tokenizer knows its template and where an answer ends, so that training, sampling,
evaluation and export agree on both.
"""
import hashlib
import json
import os
import shutil
import sys

from files.chat_template import SAMPLE, ChatTemplate, Turns, folder_template, read_template
from files.cli import visible
from files.folders import what_it_is
from files.text import write_json, write_text
from files.vocabulary import (JsonVocabulary, Parts, SentencePieceVocabulary, piece_bytes,
                              read_settings, tokenizer_json)

VICUNA_SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. The "
                 "assistant gives helpful, detailed, and polite answers to the user's questions.")


# ---- Vicuna's template --------------------------------------------------------------------------

def render_dialogue(turns: Turns) -> list[str]:
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


# The same in jinja, for other programs; START is what comes first: BOS, and a space where the
# vocabulary puts none between BOS and a text.
VICUNA_STARTS = ("", "{{ bos_token }}", "{{ bos_token + ' ' }}")
VICUNA_JINJA = "".join((
    "{% if messages and messages[0]['role'] == 'system' %}",
    "{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}{% else %}",
    f'{{% set system = "{VICUNA_SYSTEM}" %}}{{% set turns = messages %}}{{% endif %}}',
    "START{{ system + ' ' }}{% for turn in turns %}{% set text = turn['content'] %}",
    "{% if turn['role'] == 'user' %}{{ 'USER: ' + text + ' ' if text else 'USER:' }}",
    "{% elif turn['role'] == 'assistant' %}",
    "{{ 'ASSISTANT: ' + text + eos_token if text else 'ASSISTANT:' }}{% else %}",
    "{{ raise_exception('unknown role ' + turn['role']) }}{% endif %}{% endfor %}",
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"))


# ---- the tokenizer ------------------------------------------------------------------------------

def read_legacy(file: str) -> bool:
    """The switch `legacy` of a tokenizer_config.json; False without it, as in transformers 5."""
    legacy = read_settings(file).get("legacy")
    if legacy not in (None, False, True):
        raise ValueError(f"{file}: legacy is {legacy!r}; expected true or false")
    return bool(legacy)


def reads_as_legacy(folder: str) -> bool:
    """Whether a text after a control token gets SentencePiece's space: as the folder's
    tokenizer.json does it, which transformers reads first, else as tokenizer_config.json says."""
    pipeline = read_settings(os.path.join(folder, "tokenizer.json"))
    if pipeline.get("model"):
        steps = str([pipeline.get("normalizer"), pipeline.get("pre_tokenizer")])
        always = "'always'" if "prepend_scheme" in steps else "'add_prefix_space': True"
        return "'Prepend'" in steps or always in steps
    return read_legacy(os.path.join(folder, "tokenizer_config.json"))


class Tokenizer:
    """A vocabulary, a chat template, and where an answer ends.

    path            a model's folder, or its tokenizer.model or tokenizer.json (the first of the two
                    is read where both are there)
    legacy          put a space before the text after </s>, as LlamaTokenizer(legacy=True) does: a
                    second turn then starts with "\u2581US", "ER" instead of "USER". None: as the
                    folder's files say (Vicuna v1.5's: false)
    chat_template   "vicuna"; "model", the folder's own; or a jinja file. None: the folder's own
                    chat_template.jinja; without tokenizer.model also that of tokenizer_config.json;
                    else Vicuna's
    raises          FileNotFoundError without a file, ValueError if it does not fit

    bos_id          int or None
    eos_id          the id that training puts at the end of an answer
    eos_ids         all ids that end one, eos_id first
    vocab_size      1 + the largest id
    notes           what a user should know, a sentence each
    """

    def __init__(self, path: str, legacy: bool | None = None, chat_template: str | None = None):
        names = ("tokenizer.model", "tokenizer.json")
        files = [os.path.join(path, name) for name in names] if os.path.isdir(path) else [path]
        self.file = next(filter(os.path.isfile, files), "")
        if not self.file:
            raise FileNotFoundError(f"{path}: no such tokenizer file ({' or '.join(names)})"
                                    f"{what_it_is(path, 'model')}")
        self.folder, self.notes = os.path.dirname(self.file), []
        self.template_text, where = self._find_template(chat_template)
        if self.file.endswith(".json"):
            self.vocabulary = JsonVocabulary(self.file, self.template_text or "")
        else:
            legacy = reads_as_legacy(self.folder) if legacy is None else legacy
            self.vocabulary = SentencePieceVocabulary(self.file, legacy, self.template_text or "")
        self.pieces, self.bos_id = self.vocabulary.pieces, self.vocabulary.bos_id
        self.legacy, self.vocab_size = self.vocabulary.legacy, 1 + max(self.vocabulary.names)
        self.encode, self.decode = self.vocabulary.encode, self.vocabulary.decode
        listed = self._listed_ends()
        if self.vocabulary.eos_id is None:
            self.vocabulary.name_eos(next((ids[0] for ids in listed.values() if ids), None))
        self.template = self.template_text and ChatTemplate(
            self.template_text, where, self.vocabulary.controls, self.vocabulary.tokens)
        self.eos_ids = self._find_ends(listed)
        self.eos_id = self.eos_ids[0]

    def _find_template(self, given: str | None) -> tuple[str | None, str]:
        """(text or None for Vicuna's, file); sets `chat_template`, its name."""
        own, where = folder_template(self.folder)
        if own in [VICUNA_JINJA.replace("START", start) for start in VICUNA_STARTS]:
            own, given = None, "vicuna" if given == "model" else given
        self.chat_template = given or ("model" if own else "vicuna")
        if not given and own and self.file.endswith(".model") and where.endswith(".json"):
            self.chat_template = "vicuna"
            self.notes.append(f"{where} has a chat template of its own; Vicuna's is used "
                              "(--chat_template model: its own)")
        if self.chat_template == "vicuna":
            return None, ""
        if self.chat_template == "model":
            if not own:
                raise ValueError(f"--chat_template model: {self.folder} has none (it would be in "
                                 "chat_template.jinja or tokenizer_config.json)")
            return own, where
        if not os.path.isfile(given):
            raise FileNotFoundError(f"--chat_template {given}: no such file; expected vicuna, "
                                    "model or a jinja file")
        return read_template(given), given

    def _listed_ends(self) -> dict[str, list[int]]:
        """The eos_token_id of generation_config.json and config.json: {file: ids with a piece}."""
        listed = {}
        for name in ("generation_config.json", "config.json"):
            file = os.path.join(self.folder, name)
            ids = read_settings(file).get("eos_token_id")
            listed[file] = [number for number in (ids if isinstance(ids, list) else [ids])
                            if type(number) is int and number in self.vocabulary.names]
        return listed

    def _find_ends(self, listed: dict[str, list[int]]) -> tuple[int, ...]:
        """Ids that end an answer: the template's, the tokenizer's, and those that a file lists
        beside one of them; a contradiction is noted."""
        ends = [self.template.end_id] if self.template else []
        ends = [number for number in [*ends, self.vocabulary.eos_id] if number is not None]
        for file, ids in listed.items():
            if set(ids) & set(ends):
                ends += ids
            elif ids:
                self.notes.append(f"{file}: eos_token_id is {ids}, but here answers end in {ends} "
                                  f"({self.vocabulary.names[ends[0]]!r}), by the tokenizer")
        return tuple(dict.fromkeys(ends))

    def print_notes(self) -> None:
        for note in self.notes:
            print(visible(f"note: {note}"), file=sys.stderr)

    def token_bytes(self, number: int) -> bytes:
        """The bytes of text that an id stands for: a part of a character, perhaps."""
        return piece_bytes(self.vocabulary.names.get(number, ""), self.vocabulary.alphabet)

    def unused_ids(self, rows: int) -> list[int]:
        """Ids below `rows`, of an embedding, that have no piece: they are never to be sampled.

        raises   ValueError if the embedding has no row for some piece
        """
        if rows < self.vocab_size:
            raise ValueError(f"{self.file} has {self.vocab_size} pieces, the model's embedding "
                             f"only {rows} rows")
        return [number for number in range(rows) if number not in self.vocabulary.names]


def recorded_template(path: str, chat_template: str | None) -> dict[str, str | None]:
    """What args.json stores of a chat template: its name, and the SHA-256 of its text."""
    tokenizer = Tokenizer(path, chat_template=chat_template)
    text = tokenizer.template_text
    return {"chat_template": tokenizer.chat_template,
            "chat_template_sha256": text and hashlib.sha256(text.encode()).hexdigest()}


# ---- dialogues ----------------------------------------------------------------------------------

def dialogue_parts(tokenizer: Tokenizer, turns: Turns) -> tuple[Parts, Parts]:
    """`encode_dialogue` before its texts are encoded: texts, and ids of control tokens."""
    turns, answer = list(turns), None
    if turns and turns[-1][0] == "Assistant":
        answer = turns.pop()[1]
    if tokenizer.template:
        turns = turns or [("Human", SAMPLE)]     # an answer alone is the same after any prompt
        prompt, response = tokenizer.template.parts(turns, answer or None)
    else:
        prompt = list(tokenizer.vocabulary.start)
        for text in render_dialogue([*turns, ("Assistant", "")]):
            prompt += [text, tokenizer.eos_id]
        prompt, response = prompt[:-1], [" " + answer] if answer else []
    if answer is not None and not isinstance((response or [""])[-1], int):
        response = [*response, tokenizer.eos_id]
    return prompt, response


def encode_dialogue(tokenizer: Tokenizer, turns: Turns) -> tuple[list[int], list[int]]:
    """Token ids of a dialogue in the tokenizer's template.

    turns     see `render_dialogue`; or one Assistant turn alone, for its ids after any prompt
    returns   prompt ids; response ids of a last Assistant turn, up to the token that ends it,
              else []
    Together they are the ids of the whole text encoded at once, wherever a prompt's ids are the
    beginning of those; else, the response is encoded as what follows the prompt that is sampled on.
    Source: ids equal transformers' LlamaTokenizer on FastChat's text, legacy or not, and its
    apply_chat_template.
    """
    prompt, response = dialogue_parts(tokenizer, turns)
    vocabulary = tokenizer.vocabulary
    if not tokenizer.template:
        start = len(vocabulary.start)            # SentencePiece's space stands before the text
        prompt_ids = vocabulary.start + vocabulary.encode_parts(prompt[start:])
    else:
        prompt_ids = vocabulary.encode_parts(prompt)
        joined = vocabulary.encode_parts(join_texts(prompt, response)) if response else []
        if joined[:len(prompt_ids)] == prompt_ids and response:
            return prompt_ids, joined[len(prompt_ids):]
    response_ids = []
    for part in response:
        response_ids += [part] if isinstance(part, int) else vocabulary.encode(part, continues=True)
    return prompt_ids, response_ids


def encode_prompt(tokenizer: Tokenizer, turns: Turns) -> list[int]:
    """Ids of a dialogue that an Assistant turn is to follow, whoever spoke last: in HH some prompts
    end on an Assistant's turn. What training, sampling and measuring give a model is this."""
    return encode_dialogue(tokenizer, [*turns, ("Assistant", "")])[0]


def join_texts(first: Parts, second: Parts) -> Parts:
    """Both, with the texts at the border as one."""
    if first and second and isinstance(first[-1], str) and isinstance(second[0], str):
        return [*first[:-1], first[-1] + second[0], *second[1:]]
    return [*first, *second]


def dialogue_text(tokenizer: Tokenizer | None, turns: Turns) -> tuple[str, str]:
    """`dialogue_parts` as texts, control tokens by their names; None: Vicuna's text, without BOS.

    turns   the last one is an Assistant's
    """
    if tokenizer is None:
        return "</s>".join(render_dialogue([*turns[:-1], ("Assistant", "")])), (
            f" {turns[-1][1]}</s>")
    prompt, response = (
        "".join(part if isinstance(part, str) else tokenizer.vocabulary.names[part]
                for part in parts) for parts in dialogue_parts(tokenizer, turns))
    return prompt, response


# ---- files for other programs -------------------------------------------------------------------

# Keys of tokenizer_config.json that go on to a new folder; the others are written anew, or are
# somebody else's: this folder may be published.
SETTINGS = ("added_tokens_decoder", "add_eos_token", "clean_up_tokenization_spaces",
            "model_max_length", "padding_side")


def jinja_of(tokenizer: Tokenizer) -> str:
    """The chat template as other programs take it."""
    if tokenizer.template:
        return tokenizer.template_text
    vocabulary = tokenizer.vocabulary
    eos_id, text = vocabulary.eos_id, VICUNA_SYSTEM
    start = VICUNA_STARTS[0]
    if vocabulary.start:
        after_control = vocabulary.encode_parts([eos_id, text])[1:]
        start = VICUNA_STARTS[1 if after_control == vocabulary.encode(text) else 2]
    return VICUNA_JINJA.replace("START", start)


def save_tokenizer(tokenizer: Tokenizer, folder: str) -> None:
    """Write what transformers, vLLM and llama.cpp look for beside weights: the vocabulary, the chat
    template that was trained on, and, beside a config.json, which ids end an answer."""
    vocabulary, source = tokenizer.vocabulary, tokenizer.folder
    config = read_settings(os.path.join(source, "tokenizer_config.json"))
    settings = {key: config[key] for key in SETTINGS if key in config}
    if isinstance(vocabulary, SentencePieceVocabulary):
        shutil.copyfile(tokenizer.file, os.path.join(folder, "tokenizer.model"))
        write_text(os.path.join(folder, "tokenizer.json"),
                   json.dumps(tokenizer_json(vocabulary), ensure_ascii=False))
        added = {text: number for text, number in vocabulary.ids.items()
                 if number >= vocabulary.pieces.vocab_size()}
        if added:
            write_json(os.path.join(folder, "added_tokens.json"), added)
        settings["legacy"] = vocabulary.legacy
    else:
        shutil.copyfile(tokenizer.file, os.path.join(folder, "tokenizer.json"))
    tokens = dict(vocabulary.tokens)
    for name, number in (("bos_token", vocabulary.bos_id), ("eos_token", vocabulary.eos_id)):
        if number is not None:
            tokens[name] = vocabulary.names[number]
    write_json(os.path.join(folder, "special_tokens_map.json"), tokens)
    # the class that takes tokenizer.json as it is: LlamaTokenizer makes its own of the pieces
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    write_json(os.path.join(folder, "tokenizer_config.json"), settings | tokens | {
        "add_bos_token": bool(vocabulary.start), "chat_template": jinja_of(tokenizer)})
    write_text(os.path.join(folder, "chat_template.jinja"), jinja_of(tokenizer))
    ends = list(tokenizer.eos_ids) if len(tokenizer.eos_ids) > 1 else tokenizer.eos_id
    ids = {"eos_token_id": ends}
    if tokenizer.bos_id is not None:
        ids["bos_token_id"] = tokenizer.bos_id
    if os.path.isfile(os.path.join(folder, "config.json")):
        for name, place in (("config.json", folder), ("generation_config.json", source)):
            values = read_settings(os.path.join(place, name))
            if place == source:                  # settings of sampling: numbers and switches
                values = {key: value for key, value in values.items()
                          if isinstance(value, int | float)}
            write_json(os.path.join(folder, name), values | ids)
