"""Client of an OpenAI-compatible endpoint: several requests at a time, each retried if it helps.

Answers are appended to a file as they come, and the next run asks only what the file lacks. Python's
own client, because openai and httpx know no deadline for a whole reply, and no largest one.
"""
import http.client
import json
import multiprocessing
import os
import random
import time
from collections.abc import Callable
from multiprocessing.pool import ThreadPool
from urllib import request

from files.cli import show_progress
from files.text import append_text, json_value, whole_lines
from judge.questions import read_answers, read_questions

GIVE_UP_AFTER = 5       # failures in a row: then the cause is the endpoint, not the questions
REPLY_BYTES = 4 << 20   # of a reply; an answer has a few thousand


def seconds_to_wait(retry_after: str | None, attempt: int) -> float:
    """Seconds until the next attempt: those that the server asks for, up to 600; else 1, 2, 4 … 60,
    less up to half of it, so that clients do not retry in lockstep."""
    if retry_after and retry_after.strip().isdecimal():
        return min(600.0, float(retry_after))
    return min(60.0, 2.0**attempt) * random.uniform(0.5, 1.0)


def fetch(post: request.Request, timeout: float) -> tuple[int, str | None, bytes]:
    """(status, Retry-After, body) of a request.

    raises   OSError or HTTPException, for a body of more than REPLY_BYTES too, and for a reply that
             is not whole after `timeout` seconds, however it comes: byte by byte, or not at all
    """
    opener = request.OpenerDirector()       # follows no redirect: it would take the key elsewhere
    for handler in (request.ProxyHandler, request.HTTPHandler, request.HTTPSHandler):
        opener.add_handler(handler())

    def read() -> tuple[int, str | None, bytes]:
        with opener.open(post, timeout=timeout) as response:
            body = response.read(REPLY_BYTES + 1)
        if len(body) > REPLY_BYTES:
            raise http.client.HTTPException(f"a reply of more than {REPLY_BYTES >> 20} MiB")
        return response.status, response.headers["Retry-After"], body

    try:
        with ThreadPool(1) as pool:         # a thread that still reads is left behind
            return pool.apply_async(read).get(timeout)
    except multiprocessing.TimeoutError:
        raise TimeoutError(f"no whole reply within {timeout:g} seconds") from None


def complete(url: str, key: str, model: str, text: str, timeout: float, tries: int) -> str:
    """The model's reply to one user message, at temperature 0.

    url      base of an OpenAI-compatible endpoint, as "http://127.0.0.1:8000/v1"
    key      bearer token, "" for none
    timeout  seconds for a whole reply
    tries    in all; after 408, 429, 5xx, a timeout, a lost connection or a malformed completion
    raises   ConnectionError, one sentence without the key
    """
    body = {"model": model, "messages": [{"role": "user", "content": text}], "temperature": 0}
    headers = {"Content-Type": "application/json"} | (
        {"Authorization": f"Bearer {key}"} if key else {})
    for attempt in range(tries):
        retry_after, worth_retrying = None, True
        try:
            status, retry_after, content = fetch(request.Request(
                url.rstrip("/") + "/chat/completions", json.dumps(body).encode(), headers), timeout)
            failure = f"HTTP {status}: {content[:10_000].decode('utf-8', 'replace')}"
            worth_retrying = status in (200, 408, 429) or status >= 500
            if status == 200:
                reply = json_value(content)["choices"][0]["message"]["content"]
                if isinstance(reply, str):
                    return reply
        except (OSError, http.client.HTTPException) as error:
            failure = f"{type(error).__name__}: {error}"
        except (ValueError, LookupError, TypeError):
            pass                                         # not a completion
        if attempt + 1 == tries or not worth_retrying:
            break
        time.sleep(seconds_to_wait(retry_after, attempt))
    failure = failure.replace(key, "***") if key else failure       # before the cut, as a whole
    failure = " ".join(failure[:300].split())
    raise ConnectionError(f"{failure} (after {attempt + 1} of {tries} tries)")


def cut_torn_line(path: str) -> None:
    """Remove the last line of an answers file if a kill left it without an end.

    raises  ValueError if that line is not the start of an answer
    """
    end = len("".join(whole_lines(path)).encode())
    with open(path, "rb+") as file:
        file.seek(end)
        rest = file.read()
        if not b'{"id": "'.startswith(rest[:8]):
            raise ValueError(f"{path}: no answer in its last line, which has no end: {rest[:60]!r}")
        file.truncate(end)


def ask_all(questions: list[dict], ask: Callable[[str], str], path: str, model: str,
            workers: int) -> list[str]:
    """Append {"id", "model", "answer"} to a file as answers come; returns a sentence per failure.

    questions  [{"id", "text"}]; `workers` of them are asked at a time
    ask        text -> answer; raises ConnectionError
    raises     ConnectionError when GIVE_UP_AFTER questions in a row failed
    """
    def work(question: dict) -> tuple[str, str | None, ConnectionError | None]:
        try:
            return question["id"], ask(question["text"]), None
        except ConnectionError as error:
            return question["id"], None, error

    failures, in_a_row = [], 0
    append_text(path, "")                                # even if nobody answers
    with ThreadPool(workers) as pool:                    # on leaving, nothing more is asked
        replies = pool.imap_unordered(work, questions)
        for name, answer, error in show_progress(replies, "questions asked", len(questions)):
            if error is None:
                append_text(path, json.dumps({"id": name, "model": model, "answer": answer}) + "\n")
                in_a_row = 0
                continue
            failures.append(f"question {name}: {error}")
            in_a_row += 1
            if in_a_row == GIVE_UP_AFTER:
                raise ConnectionError(f"{in_a_row} questions in a row failed; the last, "
                                      f"{failures[-1]}")
    print(f"{len(questions)} questions asked, {len(failures)} failed")
    return failures


def ask_questions(path: str, url: str, model: str, out: str, workers: int, timeout: float,
                  tries: int) -> None:
    """Ask an endpoint every question in the file `path` that has no answer in the file `out` yet.

    The key, if any, is taken from the variable OPENAI_API_KEY.
    raises  ValueError on a bad URL, key or file; ConnectionError if a question got no answer
    """
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"--url {url!r} does not start with http:// or https://")
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not key.isascii() or not key.isprintable():
        raise ValueError("OPENAI_API_KEY holds characters that no HTTP header can carry")
    questions, answers = read_questions(path), {}
    if os.path.exists(out):
        cut_torn_line(out)
        answers = read_answers(out, questions) if os.path.getsize(out) else {}
    for where, row in answers.values():
        if row.get("model") != model:
            raise ValueError(f"{where}: answered by {row.get('model')!r}, not {model!r}; one file "
                             "holds the answers of one judge")
    todo = [row for name, row in questions.items() if name not in answers]
    print(f"{len(answers)} of {len(questions)} questions are answered in {out}")
    failures = ask_all(todo, lambda text: complete(url, key, model, text, timeout, tries), out,
                       model, workers)
    if failures:
        raise ConnectionError(f"{len(failures)} of {len(todo)} questions got no answer (the same "
                              f"command asks them again); the first, {failures[0]}")
