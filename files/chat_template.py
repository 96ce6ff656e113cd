"""Chat templates in jinja, as model folders carry them, rendered as transformers renders them."""
import json
import os
import re
from collections.abc import Sequence
from typing import Any

from files.vocabulary import Parts, read_settings

JINJA_ROLES = {"System": "system", "Human": "user", "Assistant": "assistant"}
SAMPLE = "Hello"            # a question, and an answer, that a template is tried with
Turns = Sequence[tuple[str, str]]


def merge_neighbours(turns: Turns) -> list[tuple[str, str]]:
    """Neighbouring turns of one role as one turn, with a blank line between their texts."""
    merged = []
    for role, text in turns:
        if merged and merged[-1][0] == role:
            text = f"{merged.pop()[1]}\n\n{text}"
        merged.append((role, text))
    return merged


def compile_jinja(source: str, where: str) -> Any:
    """The jinja template of a text, in a sandbox, as transformers makes it."""
    try:
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise ValueError(f"{where} is read by the package jinja2: pip install jinja2") from None

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=["jinja2.ext.loopcontrols"])
    environment.globals["raise_exception"] = raise_exception
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(
        value, ensure_ascii=False, indent=indent)        # jinja's own escapes < and >
    # transformers' tag around what an assistant says, which writes nothing
    source = re.sub(r"({%[-+]?\s*)generation(\s*[-+]?%})", r"\1if true\2", source)
    source = re.sub(r"({%[-+]?\s*)endgeneration(\s*[-+]?%})", r"\1endif\2", source)
    try:
        return environment.from_string(source)
    except (jinja2.TemplateError, RecursionError) as error:
        raise ValueError(f"{where}: not a jinja template: {error}") from None


class ChatTemplate:
    """A jinja template, and where its answers end.

    source      its text
    where       its file, for messages
    controls    {text: id} of the tokens that only a template may write
    variables   bos_token, eos_token, …
    raises      ValueError for a template that this code cannot train on
    Unlike in transformers strftime_now is not defined, so that no text depends on the day:
    templates that test for it have a date of their own. A dialogue that is refused is tried once
    more, with neighbouring turns of one role merged.
    """

    def __init__(self, source: str, where: str, controls: dict[str, int],
                 variables: dict[str, str]):
        self.where, self.controls, self.variables = where, controls, variables
        longest_first = sorted(filter(str.strip, controls), key=len, reverse=True)
        self._control = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
        self._template = compile_jinja(source, where)
        self.end_id, self._after = None, ""      # what follows an answer: a token, or only a text
        parts = self.parts([("Human", SAMPLE)], SAMPLE)[1]
        if not parts or not isinstance(parts[0], str) or SAMPLE not in parts[0]:
            raise ValueError(f"{where}: begins an answer with a control token that its "
                             "add_generation_prompt leaves out")
        if isinstance(parts[-1], int):
            self.end_id = parts[-1]
        else:
            self._after = parts[0].rpartition(SAMPLE)[2]

    def _render(self, turns: Turns, mark: str, ask: bool) -> str:
        """Its text; `mark` stands inside every control token that a message spells out."""
        if unknown := {role for role, _ in turns} - JINJA_ROLES.keys():
            raise ValueError(f"unknown role {min(unknown)!r}; expected Human or Assistant")
        for given in (turns, merge_neighbours(turns)):
            messages = [{"role": JINJA_ROLES[role], "content": self._control.sub(
                lambda found: found[0][0] + mark + found[0][1:], text)} for role, text in given]
            try:
                return self._template.render(messages=messages, add_generation_prompt=ask,
                                             tools=None, documents=None, **self.variables)
            except Exception as error:           # a template is a program: it may raise anything
                reason = str(error)[:200]
        raise ValueError(f"{self.where} refuses a dialogue ({reason}) that starts with "
                         f"{turns[0][1][:60] if turns else ''!r}")

    def parts(self, turns: Turns, answer: str | None = None) -> tuple[Parts, Parts]:
        """What the template writes up to the next answer, and of the answer to its end."""
        texts = [text for _, text in turns] + [answer or ""]
        mark = next(chr(code) for code in range(0xE000, 0xF900)          # private use
                    if not any(chr(code) in text for text in texts))

        def split(text: str) -> Parts:
            return [self.controls[part] if i % 2 else part.replace(mark, "")
                    for i, part in enumerate(self._control.split(text)) if part]

        prompt = self._render(turns, mark, True)
        if answer is None:
            return split(prompt), []
        whole = self._render([*turns, ("Assistant", answer)], mark, False)
        if not whole.startswith(prompt):
            raise ValueError(f"{self.where}: with an answer, a dialogue no longer begins as the "
                             f"prompt did: {turns[0][1][:60]!r}")
        parts = split(whole[len(prompt):].removesuffix(self._after))
        ends = [i for i, part in enumerate(parts) if isinstance(part, int)]
        return split(prompt), parts[:ends[0] + 1] if ends else parts


def folder_template(folder: str) -> tuple[str | None, str]:
    """(text, file) of a model folder's own chat template; (None, …) without one."""
    file = os.path.join(folder, "chat_template.jinja")
    if os.path.isfile(file):
        return read_template(file), file
    file = os.path.join(folder, "tokenizer_config.json")
    found = read_settings(file).get("chat_template")
    if isinstance(found, list):                  # several, with names
        found = next((entry.get("template") for entry in found
                      if isinstance(entry, dict) and entry.get("name") == "default"), None)
    if not isinstance(found, str | None):
        raise ValueError(f"{file}: chat_template is {found!r:.60}; expected a text")
    return found, file


def read_template(file: str) -> str:
    with open(file, encoding="utf-8") as text:
        try:
            return text.read(10 ** 6)
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: not UTF-8: {error}") from None
