"""Ask an OpenAI-compatible endpoint: several questions at a time, retries, answers kept at once.

A judge is asked with this (judge.py); standard library only. What is killed loses the questions
that were on their way, nothing else: the caller asks what the file does not hold yet.
"""
import collections
import email.utils
import http.client
import json
import os
import queue
import random
import sys
import threading
import time
import urllib.error
import urllib.request
from datetime import UTC, datetime

GIVE_UP_AFTER = 5       # questions in a row without an answer: then it is not about the questions


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Following one would turn the POST into a GET and carry the key to another host."""

    def redirect_request(self, *_):
        return None


def post(url: str, key: str, body: dict, timeout: float):
    """(status, headers, bytes) of the reply to a JSON body, whatever its status, or OSError."""
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    try:
        reply = urllib.request.build_opener(_NoRedirect).open(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        reply = error
    with reply:
        return reply.status, reply.headers, reply.read()


def seconds_to_wait(retry_after: str | None, attempt: int) -> float:
    """What Retry-After says (seconds, or a date), at most 600 s; without it 1, 2, 4 … 60 s.

    retry_after   the header's value
    attempt       0, 1, 2 … wait 1, 2, 4 … seconds
    Those are cut by a random part of up to half: what failed together shall not return together.
    """
    if retry_after and retry_after.strip().isdecimal():
        return min(600.0, float(retry_after))
    try:
        date = email.utils.parsedate_to_datetime(retry_after or "")
        return min(600.0, max(0.0, (date - datetime.now(UTC)).total_seconds()))
    except (ValueError, TypeError):
        return min(60.0, 2.0**attempt) * random.uniform(0.5, 1.0)


def completion_text(raw: bytes) -> str | None:
    """The reply's text in the JSON of a chat completion; None if it is none."""
    try:
        text = json.loads(raw)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        return None
    return text if isinstance(text, str) else None


def complete(url: str, key: str, model: str, text: str, timeout: float, tries: int) -> str:
    """The model's reply to one user message, at temperature 0.

    url      base of an OpenAI-compatible endpoint, as "http://127.0.0.1:8000/v1"
    key      bearer token, "" for none
    timeout  seconds without a byte from the server
    tries    in all, on 408, 429, 5xx, timeouts, lost connections and replies that are no completion
    raises   ConnectionError, in one sentence that does not hold the key
    """
    body = {"model": model, "messages": [{"role": "user", "content": text}], "temperature": 0}
    for attempt in range(1, tries + 1):
        retry_after, will_help = None, True
        try:
            status, headers, raw = post(url.rstrip("/") + "/chat/completions", key, body, timeout)
            reply = completion_text(raw) if status == 200 else None
            if reply is not None:
                return reply
            text = raw.decode("utf-8", "replace")
            failure = f"HTTP {status}: {(text.replace(key, '***') if key else text)[:300]}"
            will_help = status in (200, 408, 429) or status >= 500
            retry_after = headers["Retry-After"]
        except (OSError, http.client.HTTPException) as error:
            failure = f"{type(error).__name__}: {error}"
        if attempt == tries or not will_help:
            failure = " ".join(failure.split())
            raise ConnectionError(f"{failure.replace(key, '***') if key else failure} "
                                  f"(after {attempt} of {tries} tries)")
        time.sleep(seconds_to_wait(retry_after, attempt - 1))


def answered(path: str, model: str) -> set[str]:
    """Ids that an answers file of `ask_all` holds; a torn last line is cut off the file.

    raises  ValueError on a line that is no answer, or one of another model
    """
    if not os.path.exists(path):
        return set()
    ids = set()
    with open(path, "rb+") as stream:
        *lines, torn = stream.read().split(b"\n")
        if not b'{"id": "'.startswith(torn[:8]):
            raise ValueError(f"{path}: no answer in its last line, which has no end: {torn[:60]!r}")
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                ids.add(row["id"])
                judge = row["model"]
            except (ValueError, LookupError, TypeError):
                raise ValueError(f"{path}:{number}: no answer of `ask`: {line[:60]!r}") from None
            if judge != model:
                raise ValueError(f"{path}:{number}: answered by {judge!r}, not {model!r}; one file "
                                 "holds the answers of one judge")
        stream.truncate(sum(map(len, lines)) + len(lines))
    return ids


def progress(done: int, total: int, failed: int, seconds: float) -> str:
    """"12 of 40 asked, 1 failed, 0:01:03 left", from the seconds the first `done` took."""
    left = round(seconds / done * (total - done))
    return (f"{done} of {total} asked, {failed} failed, "
            f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left")


def ask_all(questions: list[dict], ask, path: str, model: str, workers: int) -> list[str]:
    """Append {"id", "model", "answer"} to a file as answers come; returns a sentence per failure.

    questions  [{"id", "text"}]
    ask        text -> answer; raises ConnectionError
    model      written beside every answer
    workers    questions asked at a time
    raises     ConnectionError when GIVE_UP_AFTER questions in a row failed
    """
    waiting, results = collections.deque(questions), queue.Queue()

    def work():
        while True:
            try:
                row = waiting.popleft()
            except IndexError:
                return
            try:
                results.put((row, ask(row["text"]), None))
            except Exception as error:                   # raised again by the main thread
                results.put((row, None, error))

    for _ in range(workers):                             # daemons: Ctrl-C does not wait for them
        threading.Thread(target=work, daemon=True).start()
    failures, in_a_row, started, shown = [], 0, time.monotonic(), 0.0
    try:
        with open(path, "a", encoding="utf-8") as stream:
            for number in range(1, len(questions) + 1):
                row, answer, error = results.get()
                if error is None:
                    line = {"id": row["id"], "model": model, "answer": answer}
                    stream.write(json.dumps(line) + "\n")
                    stream.flush()
                    in_a_row = 0
                elif isinstance(error, ConnectionError):
                    failures.append(f"question {row['id']}: {error}")
                    in_a_row += 1
                    if in_a_row == GIVE_UP_AFTER:
                        raise ConnectionError(f"{in_a_row} questions in a row failed; the last, "
                                              f"{failures[-1]}")
                else:
                    raise error
                now = time.monotonic()
                if now - shown > (0.1 if sys.stderr.isatty() else 10) or number == len(questions):
                    line_end = "\r" if sys.stderr.isatty() and number < len(questions) else "\n"
                    print(progress(number, len(questions), len(failures), now - started),
                          end=line_end, file=sys.stderr, flush=True)
                    shown = now
    finally:
        waiting.clear()                                  # nothing more is asked after an error
    return failures
