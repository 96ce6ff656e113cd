"""Which tokens the policy likes more or less than its reference: colours in a terminal or a page.

    python eval.py --heatmap runs/hh-ulma --html heat.html

A token's value is beta (log π - log π_ref), nats. The values of a response sum to its implicit
reward. Blue: the policy likes the token less than the reference does; orange: more. The page is one
file without scripts; hold the pointer over a token for its numbers.
"""
import codecs
import html
import os
from dataclasses import dataclass

import torch

from data import Tokenizer
from model import Llama
from step import token_logps
from trees import Tree, build_stream

LESS, NEITHER, MORE = (90, 160, 230), (235, 235, 235), (245, 140, 50)    # red, green, blue
TRUECOLOUR = ("truecolor", "24bit")      # what $COLORTERM says where a terminal knows 24 bits


@dataclass(frozen=True)
class Token:
    """What is shown as one: a token, or the byte tokens that make up one character."""
    text: str
    policy_logp: float          # nats; summed where tokens are joined
    reference_logp: float
    value: float                # beta (policy - reference)


@dataclass(frozen=True)
class Response:
    """One response of a prompt, as it is shown."""
    prompt: str
    tokens: list
    score: float                # z
    reward: float               # implicit: the sum of the values


# ---- text ---------------------------------------------------------------------------------------

def join_bytes(tokenizer: Tokenizer, ids: list[int]) -> list[tuple[str, int]]:
    """(text, how many ids) of every token; byte tokens are joined until they make a character.

    What never makes one is shown as U+FFFD. "▁" is SentencePiece's space.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    shown, waiting = [], 0                               # byte tokens not shown yet
    for token in [*ids, None]:
        is_byte = token is not None and tokenizer.pieces.is_byte(token)
        piece = "" if token is None else tokenizer.pieces.id_to_piece(token)     # "<0x0A>", "▁the"
        text = decoder.decode(bytes([int(piece[1:-1], 16)]) if is_byte else b"", not is_byte)
        held = len(decoder.getstate()[0])                # bytes of a character that is not whole
        waiting += is_byte
        if text:
            shown.append((text, waiting - held))
            waiting = held
        if token is not None and not is_byte:
            shown.append((piece.replace("▁", " "), 1))
    return shown


def visible(text: str) -> str:
    """Text with line ends marked, and what is not seen or steers a terminal spelled out."""
    return "".join("↵\n" if char == "\n" else char if char.isprintable()
                   else char.encode("unicode_escape").decode() for char in text)


# ---- values -------------------------------------------------------------------------------------

@torch.no_grad()
def responses_of(model: Llama, reference, tokenizer: Tokenizer, tree: Tree,
                 beta: float) -> list[Response]:
    """The responses of a tree with their tokens' values.

    model, reference  see step.token_logps
    """
    stream = build_stream([tree], model.lm_head.weight.device)
    policy, frozen = (logps.double().cpu() for logps in
                      token_logps(model, reference, stream, stream))             # [N], [N]
    prompt = "".join(text for text, _ in join_bytes(tokenizer, tree.prompt_ids))
    shown, start = [], 0
    for ids, score in zip(tree.response_ids, tree.scores):
        tokens = []
        for text, count in join_bytes(tokenizer, ids):
            logps = [float(side[start:start + count].sum()) for side in (policy, frozen)]
            tokens.append(Token(text, *logps, beta * (logps[0] - logps[1])))
            start += count
        shown.append(Response(prompt, tokens, score, sum(token.value for token in tokens)))
    return shown


def colour_limit(responses: list[Response]) -> float:
    """The value at which colours are full: nineteen tokens of twenty are within ± it."""
    sizes = sorted(abs(token.value) for response in responses for token in response.tokens)
    return max(sizes[int(0.95 * (len(sizes) - 1))], 1e-9)


def colour(value: float, limit: float) -> tuple[int, int, int]:
    """(red, green, blue) in 0..255: NEITHER at 0, LESS up to -limit, MORE from limit on.

    Blue and orange differ in every common kind of colour blindness; black text is readable on all.
    """
    share = min(abs(value) / limit, 1.0)
    return tuple(round(start + share * (end - start))
                 for start, end in zip(NEITHER, LESS if value < 0 else MORE))


# ---- terminal -----------------------------------------------------------------------------------

def ansi(text: str, value: float, limit: float, truecolour: bool) -> str:
    """Black text on the value's colour: of 24 bits, or the nearest of the 6 x 6 x 6 cube."""
    red, green, blue = colour(value, limit)
    if truecolour:
        code = f"\033[38;2;0;0;0;48;2;{red};{green};{blue}m"
    else:
        # its levels are 0, 95, 135, 175, 215, 255
        r, g, b = (max(part > 47, round((part - 55) / 40)) for part in (red, green, blue))
        code = f"\033[38;5;16;48;5;{16 + 36 * r + 6 * g + b}m"
    return "\n".join(f"{code}{line}\033[0m" if line else "" for line in text.split("\n"))


def print_responses(responses: list[Response], colours: bool) -> None:
    """Coloured text; without colours one row per token: value, log π, log π_ref, text."""
    limit, truecolour = colour_limit(responses), os.environ.get("COLORTERM") in TRUECOLOUR
    grey, plain = ("\033[90m", "\033[0m") if colours else ("", "")
    for number, response in enumerate(responses):
        if not number or response.prompt != responses[number - 1].prompt:
            print(f"\n{grey}{visible(response.prompt)}{plain}")
        print(f"\n[z = {response.score:g}, implicit reward {response.reward:+.3f} nats]")
        if not colours:
            print("    value     log pi log pi_ref  token")
        for token in response.tokens:
            text = visible(token.text)
            if colours:
                print(ansi(text, token.value, limit, truecolour), end="")
            else:
                print(f"{token.value:+9.4f} {token.policy_logp:10.4f} "
                      f"{token.reference_logp:10.4f}  {text.replace(chr(10), '')}")
        print()
    if colours:
        steps = [limit * step / 4 for step in range(-4, 5)]
        print("\nbeta (log pi - log pi_ref), nats: " + "".join(
            ansi(f" {step:+.2f} ", step, limit, truecolour) for step in steps))


# ---- page ---------------------------------------------------------------------------------------

PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>What the policy likes more than its reference</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 1rem/1.7 system-ui, sans-serif; max-width: 50rem; margin: auto; padding: 1rem; }}
.prompt {{ color: #666; font-size: .85rem; border-left: 3px solid; padding-left: 1rem; }}
@media (prefers-color-scheme: dark) {{ .prompt {{ color: #aaa; }} }}
.prompt, .response {{ white-space: pre-wrap; overflow-wrap: anywhere; }}
.response span, .legend span {{ color: #000; padding: .1rem 0; border-radius: 2px; }}
.legend span {{ padding: .1rem .5rem; }}
</style>
</head>
<body>
<h1>What the policy likes more than its reference</h1>
<p>Each token's value is &beta; (log &pi; &minus; log &pi;<sub>ref</sub>) in nats; the values of a
response sum to its implicit reward. Blue: the policy likes the token less than the reference does.
Orange: more. Hold the pointer over a token for its numbers.</p>
<p class="legend">{legend}</p>
{body}
</body>
</html>
"""


def span(text: str, tip: str, value: float, limit: float) -> str:
    """Text on the value's colour; all of it is escaped, so no token can bring markup of its own."""
    red, green, blue = colour(value, limit)
    return (f'<span style="background:#{red:02x}{green:02x}{blue:02x}" title="{html.escape(tip)}">'
            f"{html.escape(visible(text))}</span>")


def token_span(token: Token, limit: float) -> str:
    tip = (f"{visible(token.text)!r}: value {token.value:+.4f}, log pi {token.policy_logp:.4f}, "
           f"log pi_ref {token.reference_logp:.4f}")
    return span(token.text, tip, token.value, limit)


def page(runs: dict[str, list[Response]]) -> str:
    """A whole HTML document of the responses of every run, one colour scale for all."""
    limit = colour_limit([response for responses in runs.values() for response in responses])
    parts = []
    for name, responses in runs.items():
        parts.append(f"<h2>{html.escape(name)}</h2>")
        for number, response in enumerate(responses):
            if not number or response.prompt != responses[number - 1].prompt:
                parts.append(f'<p class="prompt">{html.escape(visible(response.prompt))}</p>')
            parts.append(f"<p>z = {response.score:g}, implicit reward {response.reward:+.3f} "
                         "nats</p>")
            parts.append('<p class="response">' + "".join(
                token_span(token, limit) for token in response.tokens) + "</p>")
    steps = [limit * step / 4 for step in range(-4, 5)]
    legend = "".join(span(f"{step:+.2f}", "nats", step, limit) for step in steps)
    return PAGE.format(legend=legend, body="\n".join(parts))
