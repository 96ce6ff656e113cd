"""Client of an OpenAI-compatible endpoint: several requests at a time, each retried if it helps.

Standard library only: openai and httpx have no deadline for a whole reply, no limit on its size.
"""
import json
import multiprocessing
import os
import time
from http.client import HTTPException
from multiprocessing.pool import ThreadPool
from urllib import request

from files.cli import show_progress
from files.text import append_text, json_value, whole_lines
from judge.questions import read_answers, read_questions

GIVE_UP_AFTER = 5       # failures in a row: then the cause is the endpoint, not the questions
REPLY_BYTES = 4 << 20   # that are read of a reply; an answer has a few thousand


def fetch(post: request.Request, timeout: float) -> tuple[int, str, bytes]:
    """(status, Retry-After, body) of a request; OSError or HTTPException if there is no reply."""
    opener = request.OpenerDirector()       # follows no redirect: it would take the key elsewhere
    for handler in (request.ProxyHandler, request.HTTPHandler, request.HTTPSHandler):
        opener.add_handler(handler())
    with opener.open(post, timeout=timeout) as response:
        return response.status, response.headers.get("Retry-After", ""), response.read(REPLY_BYTES)


def complete(url: str, key: str, body: dict, timeout: float, tries: int) -> tuple[str | None, str]:
    """(a chat completion's text, ""), or (None, why there is none, in a sentence without the key).

    timeout  seconds for a whole reply
    tries    in all; after 408, 429, 5xx, a timeout, a lost connection or a malformed completion.
             Between them as long as the server asks for, up to 600 s; else 1, 2, 4 … 60 s
    """
    post = request.Request(url.rstrip("/") + "/chat/completions", json.dumps(body).encode(),
                           {"Content-Type": "application/json"})
    if key:
        post.add_header("Authorization", f"Bearer {key}")
    for attempt in range(1, tries + 1):
        retry_after, failure = "", "no chat completion"
        try:
            with ThreadPool(1) as pool:                  # a thread that still reads is left behind
                status, retry_after, raw = pool.apply_async(fetch, (post, timeout)).get(timeout)
            failure = f"HTTP {status}: {raw[:10_000].decode('utf-8', 'replace')}"
            if status == 200:
                reply = json_value(raw)["choices"][0]["message"]["content"]
                if isinstance(reply, str):
                    return reply, ""
            elif status not in (408, 429) and status < 500:
                break
        except (OSError, HTTPException, multiprocessing.TimeoutError) as error:
            failure = f"{type(error).__name__} {error}"
        except UnicodeError as error:                    # of a host's name
            failure = f"{url}: {error}"
            break
        except (ValueError, LookupError, TypeError):
            pass                                         # not a completion: `failure` shows it
        if attempt < tries:
            time.sleep(min(600.0, float(retry_after)) if retry_after.isdecimal()
                       else min(60.0, 2.0**(attempt - 1)))
    failure = failure.replace(key, "***") if key else failure       # before the cut, as a whole
    return None, f"{' '.join(failure[:300].split())} (after {attempt} of {tries} tries)"


def model_of(line: bytes) -> object:
    """The model that an answer names; False of a line that a kill cut short."""
    try:
        row = json_value(line)
    except ValueError:
        return False
    return row.get("model") if isinstance(row, dict) else None


def end_last_line(path: str, model: str) -> None:
    """End a file of one model's answers with a whole line: what a kill left of one is cut, a missing
    end is added. Any other file is left for `read_answers` to refuse; if there is none, it is made."""
    kept = [line.encode() for line in whole_lines(path)]
    with open(path, "ab+") as file:
        file.seek(end := sum(map(len, kept)))
        rest = file.read()
        if all(model_of(line) == model for line in kept):
            if model_of(rest) == model:
                file.write(b"\n")
            elif model_of(rest) is False and b'{"id": "'.startswith(rest[:8]):
                file.truncate(end)


def ask_questions(path: str, url: str, model: str, out: str, workers: int, timeout: float,
                  tries: int) -> None:
    """Append {"id", "model", "answer"} to `out` for the questions of a file it does not answer yet.

    url     base of the endpoint, as "http://127.0.0.1:8000/v1"; its key: OPENAI_API_KEY
    raises  ValueError on a bad URL, key or file; ConnectionError if a question got no answer
    """
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"--url {url!r} does not start with http:// or https://")
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not key.isascii() or not key.isprintable():
        raise ValueError("OPENAI_API_KEY holds characters that no HTTP header can carry")
    questions = read_questions(path)
    end_last_line(out, model)
    answers = read_answers(out, questions) if os.path.getsize(out) else {}
    for where, row in answers.values():
        if row.get("model") != model:
            raise ValueError(f"{where}: answered by {row.get('model')!r}, not {model!r}; one file "
                             "holds the answers of one judge")
    todo = [row for name, row in questions.items() if name not in answers]
    print(f"{len(answers)} of {len(questions)} questions are answered in {out}; {len(todo)} to ask")

    def ask(question: dict) -> tuple[str, str | None, str]:
        body = {"model": model, "messages": [{"role": "user", "content": question["text"]}],
                "temperature": 0}
        return question["id"], *complete(url, key, body, timeout, tries)

    failures, in_a_row = [], 0
    with ThreadPool(workers) as pool:                    # on leaving, nothing more is asked
        replies = pool.imap_unordered(ask, todo)
        for name, answer, failure in show_progress(replies, "questions asked", len(todo)):
            if answer is None:
                failures.append(f"question {name}: {failure}")
            else:
                append_text(out, json.dumps({"id": name, "model": model, "answer": answer}) + "\n")
            in_a_row = in_a_row + 1 if answer is None else 0
            if in_a_row == GIVE_UP_AFTER:
                break
    if failures:
        after = f", {in_a_row} in a row at the end" * (in_a_row == GIVE_UP_AFTER)
        raise ConnectionError(f"{len(failures)} of {len(todo)} questions got no answer{after} (the "
                              f"same command asks them again); the last, {failures[-1]}")
    print(f"{len(todo)} answers added to {out}")
