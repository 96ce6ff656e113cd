"""Client of an OpenAI-compatible endpoint: several requests at a time, each retried if it helps.

Answers are appended to a file as they come, and the next run asks only what the file lacks.
"""
import email.utils
import http.client
import json
import os
import queue
import random
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from urllib import request

from files.cli import time_left
from files.text import append_text, json_value, whole_lines
from judge.questions import read_answers, read_questions

GIVE_UP_AFTER = 5       # failures in a row: then the cause is the endpoint, not the questions
REPLY_BYTES = 4 << 20   # of a reply; an answer has a few thousand


def seconds_to_wait(retry_after: str | None, attempt: int) -> float:
    """Seconds until the next attempt: what the server asks for, else 1, 2, 4 … 60 with jitter.

    retry_after  value of the Retry-After header: seconds or a date; at most 600 s are waited
    attempt      attempts that failed before this one: 0, 1, 2 …
    The jitter takes off up to half, so that clients do not retry in lockstep.
    """
    if retry_after and retry_after.strip().isdecimal():
        return min(600.0, float(retry_after))
    try:
        date = email.utils.parsedate_to_datetime(retry_after or "")
        return min(600.0, max(0.0, (date - datetime.now(UTC)).total_seconds()))
    except (ValueError, TypeError):
        return min(60.0, 2.0**attempt) * random.uniform(0.5, 1.0)


def completion_text(content: bytes) -> str | None:
    """The text in the JSON of a chat completion; None if the content is something else."""
    try:
        text = json_value(content)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        return None
    return text if isinstance(text, str) else None


def fetch(opener: request.OpenerDirector, post: request.Request,
          timeout: float) -> tuple[int, str | None, bytes]:
    """(status, Retry-After, body) of a request.

    raises   OSError or HTTPException, for a body of more than REPLY_BYTES too, and for a reply that
             is not whole after `timeout` seconds, however it comes: byte by byte, or not at all
    """
    results = queue.Queue()

    def work():
        try:
            with opener.open(post, timeout=timeout) as response:
                body = response.read(REPLY_BYTES + 1)
            if len(body) > REPLY_BYTES:
                raise http.client.HTTPException(f"a reply of more than {REPLY_BYTES >> 20} MiB")
            results.put((response.status, response.headers["Retry-After"], body))
        except Exception as error:                       # raised again by the caller's thread
            results.put(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        result = results.get(timeout=timeout)
    except queue.Empty:
        raise TimeoutError(f"no whole reply within {timeout:g} seconds") from None
    if isinstance(result, Exception):
        raise result
    return result


def complete(url: str, key: str, model: str, text: str, timeout: float, tries: int) -> str:
    """The model's reply to one user message, at temperature 0.

    url      base of an OpenAI-compatible endpoint, as "http://127.0.0.1:8000/v1"
    key      bearer token, "" for none
    timeout  seconds for a whole reply
    tries    in all; after 408, 429, 5xx, a timeout, a lost connection or a malformed completion
    raises   ConnectionError, one sentence without the key
    """
    body = {"model": model, "messages": [{"role": "user", "content": text}], "temperature": 0}
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    opener = request.OpenerDirector()       # follows no redirect: it would take the key elsewhere
    for handler in (request.ProxyHandler, request.HTTPHandler, request.HTTPSHandler):
        opener.add_handler(handler())
    for attempt in range(tries):
        retry_after, worth_retrying = None, True
        post = request.Request(url.rstrip("/") + "/chat/completions", json.dumps(body).encode(),
                               headers)
        try:
            status, retry_after, content = fetch(opener, post, timeout)
            reply = completion_text(content) if status == 200 else None
            if reply is not None:
                return reply
            failure = f"HTTP {status}: {content[:10_000].decode('utf-8', 'replace')}"
            worth_retrying = status in (200, 408, 429) or status >= 500
        except (OSError, http.client.HTTPException) as error:
            failure = f"{type(error).__name__}: {error}"
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
    waiting, results = questions[::-1], queue.Queue()     # workers take the last one

    def work():
        while True:
            try:
                question = waiting.pop()
            except IndexError:
                return
            try:
                results.put((question["id"], ask(question["text"]), None))
            except Exception as error:                    # raised again by the main thread
                results.put((question["id"], None, error))

    for _ in range(workers):                              # daemons: Ctrl-C does not wait for them
        threading.Thread(target=work, daemon=True).start()
    failures, in_a_row, started, shown = [], 0, time.monotonic(), 0.0
    terminal = sys.stderr.isatty()
    try:
        append_text(path, "")                              # even if nobody answers
        for number in range(1, len(questions) + 1):
            name, answer, error = results.get()
            if error is None:
                append_text(path, json.dumps({"id": name, "model": model, "answer": answer}) + "\n")
                in_a_row = 0
            elif isinstance(error, ConnectionError):
                failures.append(f"question {name}: {error}")
                in_a_row += 1
                if in_a_row == GIVE_UP_AFTER:
                    raise ConnectionError(f"{in_a_row} questions in a row failed; the last, "
                                          f"{failures[-1]}")
            else:
                raise error
            now, last = time.monotonic(), number == len(questions)
            if last or now - shown > (0.1 if terminal else 10):
                print(f"{number} of {len(questions)} asked, {len(failures)} failed, "
                      f"{time_left(now - started, number, len(questions))}",
                      end="\r" if terminal and not last else "\n", file=sys.stderr, flush=True)
                shown = now
    finally:
        waiting.clear()                                   # after an error nothing more is asked
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
