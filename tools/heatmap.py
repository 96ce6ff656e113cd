"""Which tokens a run made more or less probable: colours on an HTML page.

    python -m tools.heatmap runs/hh-ulma --html heat.html

A token's value is beta (log π - log π_ref), nats; the values of a response sum to its implicit
reward. Blue: less probable under the policy than under its reference; orange: more. Shown are the
first records that a run held out, or those of --dataset; on the world, each prompt with the answers
of highest and lowest true reward. The page is one file without scripts; hold the pointer over a
token for its numbers.
"""
if __name__ == "__main__":
    from files.interrupt import catch_interrupts
    catch_interrupts()

import argparse

from files.cli import Help, Parser, check_ranges, parse_first, run_cli


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=Help)
    parser.add_argument("runs", nargs="+", help="output folders of train.py")
    parser.add_argument("--html", default="heat.html", help="the page to write")
    parser.add_argument("--dataset", help="show records of this file, not what the run held out")
    parser.add_argument("--beta", type=float, help="factor of the values; without, the run's own")
    parser.add_argument("--first", type=int, default=3, help="number of records to show")
    return parser


if __name__ == "__main__":
    parse_first(build_parser().parse_args)          # before torch, which takes seconds to import

import codecs
import html
import math
import os
from dataclasses import dataclass

import torch

from data import Record, Tokenizer
from files.cli import visible as escaped
from files.text import write_text
from model import Llama
from packing import Tree, build_stream, make_trees
from step import Reference, token_logps
from training.checkpoint import held_out_records, load_run, run_tokenizer
from world import answers, held_out_prompts, on_world, question

LESS, NEITHER, MORE = (90, 160, 230), (235, 235, 235), (245, 140, 50)    # red, green, blue


@dataclass(frozen=True)
class Token:
    """One coloured piece of text: a token, or the byte tokens that make up one character."""
    text: str
    policy_logp: float          # nats; the sum over joined byte tokens
    reference_logp: float
    value: float                # beta (policy - reference)


@dataclass(frozen=True)
class Response:
    """One response with its prompt."""
    prompt: str
    tokens: list[Token]
    score: float                # z
    reward: float               # implicit, nats: the sum of the tokens' values


# ---- text ---------------------------------------------------------------------------------------

def ends_inside(raw: bytes) -> bool:
    """Whether bytes end inside a character of UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(raw)
    return bool(decoder.getstate()[0])


def join_bytes(tokenizer: Tokenizer, ids: list[int]) -> list[tuple[str, int]]:
    """(text, number of ids) of every token; tokens that share a character are joined.

    Bytes that are no character become U+FFFD.
    """
    groups = []                                          # [bytes, number of ids]
    for token in ids:
        piece = tokenizer.token_bytes(token)
        goes_on = b"\x80" <= piece[:1] < b"\xc0"         # a character's second byte, or later
        if groups and goes_on and ends_inside(groups[-1][0]):
            groups[-1] = [groups[-1][0] + piece, groups[-1][1] + 1]
        else:
            groups.append([piece, 1])
    return [(raw.decode("utf-8", "replace"), count) for raw, count in groups]


def visible(text: str) -> str:
    """Text with line ends marked and unprintable characters escaped."""
    return escaped(text, "\n").replace("\n", "↵\n")


# ---- values -------------------------------------------------------------------------------------

def best_and_worst(prompts: list[tuple[str, str]]) -> list[Record]:
    """The world's prompts, each with the answers of the highest and of the lowest true reward."""
    records = []
    for prompt in prompts:
        by_reward = sorted(answers(*prompt), key=lambda answer: -answer[1])
        records.append(Record((("Human", question(*prompt)),),
                              (by_reward[0][0], by_reward[-1][0]), (1.0, 0.0), "world"))
    return records


@torch.no_grad()
def responses_of(model: Llama, reference: Reference, tokenizer: Tokenizer, tree: Tree,
                 beta: float) -> list[Response]:
    """The responses of a tree with the values of their tokens."""
    stream = build_stream([tree], model.lm_head.weight.device)
    policy_logps = token_logps(model, stream).double().cpu()                     # [N]
    with reference() as reference_model:
        reference_logps = token_logps(reference_model, stream).double().cpu()    # [N]
    prompt = "".join(text for text, _ in join_bytes(tokenizer, tree.prompt_ids))
    responses, start = [], 0
    for ids, score in zip(tree.response_ids, tree.scores):
        tokens = []
        for text, count in join_bytes(tokenizer, ids):
            policy_logp = float(policy_logps[start:start + count].sum())
            reference_logp = float(reference_logps[start:start + count].sum())
            tokens.append(Token(text, policy_logp, reference_logp,
                                beta * (policy_logp - reference_logp)))
            start += count
        responses.append(Response(prompt, tokens, score, sum(token.value for token in tokens)))
    return responses


def run_responses(path: str, dataset: str | None, beta: float | None,
                  first: int) -> tuple[float, list[Response]]:
    """(beta, responses of the first records) of a run; see `build_parser` for the flags.

    raises   ValueError for a reward model, and for a run that held out nothing
    """
    model, reference, flags = load_run(path)
    if reference is None:
        raise ValueError(f"{path} is a reward model; a heat map needs a policy")
    if on_world(flags, dataset):
        records = best_and_worst(held_out_prompts())
    else:
        _, records = held_out_records(path, flags, dataset)
    tokenizer = run_tokenizer(path, flags)
    trees = make_trees(records[:first], tokenizer, "all", flags["max_length"],
                       flags["max_prompt_length"])
    beta = flags["beta"] if beta is None else beta
    return beta, [response for tree in trees
                  for response in responses_of(model, reference, tokenizer, tree, beta)]


# ---- colours ------------------------------------------------------------------------------------

def colour_steps(responses: list[Response]) -> list[float]:
    """The values of the legend, from the strongest blue to the strongest orange: multiples of 1, 2
    or 5 times a power of ten, two to four on each side of 0. 95 % of the tokens are between them.
    """
    sizes = sorted(abs(token.value) for response in responses for token in response.tokens)
    limit = max(sizes[int(0.95 * (len(sizes) - 1))], 1e-9)
    power = 10.0 ** math.floor(math.log10(limit / 4))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= limit / 4 * 0.999)
    count = math.ceil(limit / step * 0.999)
    return [number * step for number in range(-count, count + 1)]


def colour(value: float, limit: float) -> tuple[int, int, int]:
    """(red, green, blue) in 0..255: from LESS at -limit over NEITHER at 0 to MORE at limit.

    Blue and orange differ in every common kind of colour blindness; black text is readable on all.
    """
    share = min(abs(value) / limit, 1.0)
    return tuple(round(start + share * (end - start))
                 for start, end in zip(NEITHER, LESS if value < 0 else MORE))


# ---- page ---------------------------------------------------------------------------------------

START = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>What the policy likes more than its reference</title>
"""
PAGE = """\
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 1rem/1.7 system-ui, sans-serif; max-width: 50rem; margin: auto; padding: 1rem; }}
h1, h2 {{ font-size: 1.5rem; line-height: 1.3; overflow-wrap: anywhere; }}
h2, .prompt:not(h2 + .prompt) {{ margin-top: 2.5rem; }}
sub {{ line-height: 0; }}
.prompt {{ color: #666; font-size: .85rem; border-left: 3px solid; padding-left: 1rem; }}
.score {{ margin-bottom: 0; }}
.response {{ margin-top: 0; }}
@media (prefers-color-scheme: dark) {{ .prompt {{ color: #aaa; }} }}
.prompt, .response {{ white-space: pre-wrap; overflow-wrap: anywhere; }}
.response span, .legend span {{ color: #000; padding: .1rem 0; border-radius: 2px; }}
.legend {{ position: sticky; top: 0; background: Canvas; padding: .3rem 0; }}
.legend span {{ display: inline-block; padding: 0 .5rem; }}
</style>
</head>
<body>
<h1>What the policy likes more than its reference</h1>
<p>Each token's value is &beta; (log &pi; &minus; log &pi;<sub>ref</sub>) in nats; the values of a
response sum to its implicit reward. Blue: the policy likes the token less than the reference does.
Orange: more. Hold the pointer over a token for its numbers.</p>
<p class="legend">{legend}<br>nats, {betas}</p>
{body}
</body>
</html>
"""


def span(text: str, tip: str, value: float, limit: float) -> str:
    """Text on the value's colour; it is escaped, so that no token can contain markup."""
    red, green, blue = colour(value, limit)
    return (f'<span style="background:#{red:02x}{green:02x}{blue:02x}" title="{html.escape(tip)}">'
            f"{html.escape(visible(text))}</span>")


def token_span(token: Token, limit: float) -> str:
    tip = (f"{visible(token.text)!r}: value {token.value:+.4f}, log pi {token.policy_logp:.4f}, "
           f"log pi_ref {token.reference_logp:.4f}")
    return span(token.text, tip, token.value, limit)


def page(runs: dict[str, tuple[float, list[Response]]]) -> str:
    """An HTML document of every run, {name: (beta, responses)}, on one colour scale."""
    steps = colour_steps([one for _, responses in runs.values() for one in responses])
    limit, parts = steps[-1], []
    for name, (beta, responses) in runs.items():
        parts.append(f"<h2>{html.escape(visible(name))}, &beta; = {beta:g}</h2>")
        for number, response in enumerate(responses):
            if not number or response.prompt != responses[number - 1].prompt:
                parts.append(f'<p class="prompt">{html.escape(visible(response.prompt))}</p>')
            parts.append(f'<p class="score">z = {response.score:g}, implicit reward '
                         f"{response.reward:+.3f} nats</p>")
            parts.append('<p class="response">' + "".join(
                token_span(token, limit) for token in response.tokens) + "</p>")
    ends = {steps[0]: "and below", limit: "and above"}
    legend = "\n".join(span(f"{step:+.10g} {ends.get(step, '')}".strip() if step else "0", "nats",
                            step, limit) for step in steps)
    betas = " and ".join(f"&beta; = {beta:g}" for beta in dict.fromkeys(
        beta for beta, _ in runs.values()))
    return START + PAGE.format(legend=legend, betas=betas, body="\n".join(parts))


def check_out(path: str) -> None:
    """Raise ValueError for a file that is not a page of ours: nothing else is overwritten."""
    if os.path.lexists(path):
        try:
            with open(path, encoding="utf-8") as file:
                ours = file.read(len(START)) == START
        except (OSError, ValueError):
            ours = False
        if not ours:
            raise ValueError(f"--html {path} exists and is not a heat map; choose another name")


# ---- the command --------------------------------------------------------------------------------

def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    check_ranges(args, ("first",), {} if args.beta is None else {"beta": (-math.inf, math.inf)})
    check_out(args.html)
    runs = {path: run_responses(path, args.dataset, args.beta, args.first) for path in args.runs}
    write_text(args.html, page(runs))
    print(f"wrote {args.html}")


if __name__ == "__main__":
    run_cli(main)
