"""Win, tie or lose: one run's generations against a data set's good responses or another run.

    python -m judge prompts mine.jsonl --against FILE --out questions.jsonl
        mine.jsonl: rows {"prompt", "completion", "seed"} of generate.py; a prompt is a list of
        [role, text] or of {"role", "content"}. FILE: a data set, or another run's generations
    python -m judge ask questions.jsonl --url URL --model NAME --out answers.jsonl
        any OpenAI-compatible endpoint; its key, if it needs one, in the variable OPENAI_API_KEY.
        The same command again asks only what is missing
    python -m judge rewards questions.jsonl --reward_model runs/reward_model --out answers.jsonl
        a reward model of train.py answers, instead of `ask`
    python -m judge score --questions questions.jsonl … --answers answers.jsonl …
        one pair of files per run; several runs (training seeds) add intervals over seeds

answers.jsonl may come from any other program: rows {"id", "answer"} of a judge that was given
`text` of questions.jsonl, or {"id", "reward_a", "reward_b"} of a reward model that was given
`prompt`, `answer_a`, `answer_b` of the rows whose `order` is "ab". A judge sees every pair in both
orders, because judges favour a position; where the two orders disagree, the pair is a tie.
"""
if __name__ == "__main__":
    from files.interrupt import catch_interrupts
    catch_interrupts()

import argparse

from files.cli import Parser, check_ranges, parse_first, run_cli


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m judge", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("prompts", help="write the judge's prompts: every pair, both orders")
    add.add_argument("generations", help="this run's generations, the A of every pair")
    add.add_argument("--against", required=True, help="data set, or another run's generations")
    add.add_argument("--out", required=True, help="JSON lines to write; must not exist")
    add = commands.add_parser("ask", help="ask an endpoint the questions without an answer")
    add.add_argument("questions", help="file that `prompts` wrote")
    add.add_argument("--url", required=True, help="base URL, as http://127.0.0.1:8000/v1")
    add.add_argument("--model", required=True, help="the judge's name at the endpoint")
    add.add_argument("--out", required=True, help="JSON lines the answers are appended to")
    add.add_argument("--workers", type=int, default=4, help="questions asked at a time (4)")
    add.add_argument("--timeout", type=float, default=120, help="seconds for a whole reply (120)")
    add.add_argument("--tries", type=int, default=6, help="attempts per question (6)")
    add = commands.add_parser("rewards", help="let a reward model answer")
    add.add_argument("questions", help="file that `prompts` wrote")
    add.add_argument("--reward_model", required=True, help="finished run of train.py")
    add.add_argument("--out", required=True, help="JSON lines to write; must not exist")
    add = commands.add_parser("score", help="win, tie, lose with intervals")
    add.add_argument("--questions", nargs="+", required=True, help="one file per run")
    add.add_argument("--answers", nargs="+", required=True, help="one file per run, same order")
    add.add_argument("--margin", type=float, default=0.0, help="a reward gap up to it is a tie (0)")
    add.add_argument("--json", help="also write the table here")
    return parser


if __name__ == "__main__":
    parse_first(build_parser().parse_args)          # before numpy is imported

import os

from files.lock import locked
from files.text import write_json
from judge.endpoint import ask_questions
from judge.questions import read_answers, read_questions, write_questions, write_rewards
from judge.score import report


def ask_reward_model(path: str, run: str, out: str) -> None:
    """Write the rewards that the reward model of `run` gives the responses in a questions file."""
    from packing import make_trees       # here: what imports torch, the other commands do without
    from step import tree_rewards
    from training.checkpoint import load_run, run_tokenizer
    if os.path.exists(out):
        raise FileExistsError(f"{out} exists: remove it or name another")
    model, reference, flags = load_run(run)
    if reference is not None:
        raise ValueError(f"{run} is a run of --method {flags['method']}, not of a reward model")
    tokenizer = run_tokenizer(run, flags)
    write_rewards(read_questions(path), lambda records: tree_rewards(model, make_trees(
        records, tokenizer, "all", flags["max_length"], flags["max_prompt_length"])).tolist(), out)


def score_runs(question_files: list[str], answer_files: list[str], margin: float,
               json_file: str | None) -> None:
    """Print the table of several runs, one file of questions and one of answers each."""
    if len(question_files) != len(answer_files):
        raise ValueError(f"{len(question_files)} files of --questions but {len(answer_files)} of "
                         "--answers; give one of each per run")
    if json_file and os.path.exists(json_file):
        raise FileExistsError(f"{json_file} exists: remove it or name another")
    if len(set(answer_files)) < len(answer_files):
        raise ValueError("--answers names a file twice; give every run's once")
    questions = [read_questions(file) for file in question_files]
    table = report({file: (rows, read_answers(file, rows))
                    for file, rows in zip(answer_files, questions)}, margin)
    if json_file:
        write_json(json_file, table)


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    if args.command == "prompts":
        write_questions(args.generations, args.against, args.out)
    elif args.command == "ask":
        check_ranges(args, ("workers", "tries"), {"timeout": (0.001, 86400)})
        with locked(args.out + ".lock", args.out):
            ask_questions(args.questions, args.url, args.model, args.out, args.workers,
                          args.timeout, args.tries)
    elif args.command == "rewards":
        ask_reward_model(args.questions, args.reward_model, args.out)
    else:
        score_runs(args.questions, args.answers, args.margin, args.json)


if __name__ == "__main__":
    run_cli(main)
