"""A real server that is slow, fails, hangs or lies: what is asked how often, and what is saved."""
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter

import pytest
from conftest import ROOT, write_jsonl

import judge.endpoint as endpoint
from files.cli import run_cli

SERVER = '''
import collections, http.server, json, sys, threading, time
seen, lock, log = collections.Counter(), threading.Lock(), open(sys.argv[1], "a")

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text, kind = body["messages"][0]["content"], self.path.split("/")[1]
        assert body["temperature"] == 0 and self.path.endswith("/v1/chat/completions")
        with lock:
            seen[kind, text] += 1
            count = seen[kind, text]
            log.write(json.dumps([kind, text, self.headers["Authorization"]]) + "\\n")
            log.flush()
        good = {"choices": [{"message": {"role": "assistant", "content": "1>2 1=2 " + text}}]}
        if kind == "slow":
            time.sleep(0.05)
        if kind == "hang" and count == 1:
            time.sleep(30)
        if kind == "drip" and count == 1:                # a header, byte by byte, for ever
            for _ in range(400):
                self.wfile.write(b"H")
                self.wfile.flush()
                time.sleep(0.05)
            return
        if kind == "flood" or kind == "huge" and count == 1:
            return self.reply(200, b" " * (5 << 20) + json.dumps(good).encode())
        if kind == "nested":
            return self.reply(200, b"[" * 100_000)
        if kind == "escape":
            return self.reply(400, b"\\x1b[2Jgone\\x07")
        if kind == "flaky" and count < 3:
            return self.reply((503, 429)[count - 1], {"error": "busy"}, {1: "7"}.get(count))
        if kind == "bad" or (kind == "picky" and text in "2468ac"):
            return self.reply(400, {"error": {"message": f"no such model: {body['model']}, key "
                                              f"{self.headers['Authorization']}"}})
        if kind == "malformed":
            return self.reply(200, b'{"choices": [')
        if kind == "redirect":
            return self.reply(302, b"", location="/right/v1/chat/completions")
        self.reply(200, good)

    def reply(self, status, body, retry_after=None, location=None):
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw)))
        if retry_after:
            self.send_header("Retry-After", retry_after)
        if location:
            self.send_header("Location", location)
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_):
        pass

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
server.daemon_threads = True
print(server.server_address[1], flush=True)
server.serve_forever()
'''


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(base URL without the kind, function kind -> [(text, Authorization)] of what was asked)."""
    folder = tmp_path_factory.mktemp("server")
    log = folder / "log.jsonl"
    (folder / "server.py").write_text(SERVER)
    process = subprocess.Popen([sys.executable, str(folder / "server.py"), str(log)],
                               stdout=subprocess.PIPE, text=True)
    port = int(process.stdout.readline())

    def asked(kind):
        lines = map(json.loads, log.read_text().splitlines()) if log.exists() else ()
        return [(text, key) for name, text, key in lines if name == kind]

    yield f"http://127.0.0.1:{port}", asked
    process.kill()
    process.wait()


@pytest.fixture
def ask(server, tmp_path, monkeypatch):
    """ask(kind, texts, …): runs `judge ask` in this process; returns rows of the answers file."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    waits = []
    monkeypatch.setattr(endpoint.time, "sleep", waits.append)

    def run(kind, texts, workers=2, timeout=20, tries=3, model="m", out="out.jsonl"):
        waits.clear()
        questions = write_jsonl(tmp_path / f"{kind}.jsonl", [
            {"id": f"q{text}", "order": "ab", "prompt": [], "answer_a": "", "answer_b": "",
             "text": text} for text in texts])
        run.out = tmp_path / out
        endpoint.ask_questions(questions, f"{server[0]}/{kind}/v1/", model, str(run.out), workers,
                               timeout, tries)
        return [json.loads(line) for line in run.out.read_text().splitlines()]
    run.waits = waits
    return run


def test_a_server_that_answers_is_asked_once_a_question(ask, server, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\n")       # as `export KEY=$(cat file)` can be
    rows = ask("right", "abcdef")
    assert {row["id"]: row["answer"] for row in rows} == {f"q{t}": f"1>2 1=2 {t}" for t in "abcdef"}
    assert Counter(server[1]("right")) == {(t, "Bearer sk-secret"): 1 for t in "abcdef"}
    assert "0 of 6 questions are answered" in capsys.readouterr().out
    assert ask("right", "abcdefg")[-1]["id"] == "qg"         # resume: g is new
    assert len(server[1]("right")) == 7 and b"sk-secret" not in ask.out.read_bytes()
    with pytest.raises(ValueError, match="answered by 'm', not 'other'"):
        ask("right", "abcdefgh", model="other")


def test_a_server_that_fails_twice_is_asked_again_when_it_says(ask, server):
    rows = ask("flaky", "x", workers=1)
    assert [row["answer"] for row in rows] == ["1>2 1=2 x"]
    assert len(server[1]("flaky")) == 3
    first, second = ask.waits                              # 503: Retry-After 7; 429: our own 2 s
    assert (first, second) == (7, 2)
    with pytest.raises(ConnectionError, match="HTTP 503.*2 of 2 tries|HTTP 429.*2 of 2 tries"):
        ask("flaky", "y", tries=2, out="other.jsonl")


def test_a_refusal_is_not_repeated_and_its_message_reaches_the_user_without_the_key(
        ask, server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with pytest.raises(ConnectionError) as failed:
        ask("bad", "abcdefghij", workers=1)
    assert "5 of 10 questions got no answer, 5 in a row at the end" in str(failed.value)
    assert "HTTP 400" in str(failed.value)
    assert "no such model: m, key Bearer ***" in str(failed.value)
    assert "sk-secret" not in str(failed.value) and "\n" not in str(failed.value)
    threading.Event().wait(0.3)
    assert 5 <= len(server[1]("bad")) <= 6 and not ask.waits   # at most one more was on its way


def test_refused_questions_do_not_stop_the_others(ask, server):
    # six refusals, never five in a row
    with pytest.raises(ConnectionError, match=r"6 of 12 questions got no answer \(.*qc: HTTP 400"):
        ask("picky", "123456789abc", workers=1)
    assert len(ask.out.read_text().splitlines()) == 6
    with pytest.raises(ConnectionError, match="5 of 6 questions got no answer, 5 in a row"):
        ask("picky", "123456789abc", workers=1)
    count = Counter(text for text, _ in server[1]("picky"))
    assert all(count[text] == 1 for text in "13579b") and count["2"] == 2


def test_malformed_replies_are_retried_then_named(ask, server):
    with pytest.raises(ConnectionError, match=r'200: \{"choices": \[ \(after 3 of 3 tries\)'):
        ask("malformed", "a")
    assert len(server[1]("malformed")) == 3 and len(ask.waits) == 2
    assert ask.out.read_text() == ""


def test_a_hanging_server_is_left_after_the_timeout_and_asked_again(ask, server):
    started = time.monotonic()
    assert [row["answer"] for row in ask("hang", "a", timeout=0.3)] == ["1>2 1=2 a"]
    assert time.monotonic() - started < 20 and len(server[1]("hang")) == 2


@pytest.mark.parametrize("kind", ["drip", "huge"])
def test_a_reply_without_end_is_left_and_asked_again(ask, server, kind):
    # One byte every now and then kept a worker for ever; 200 MB were read into memory.
    started = time.monotonic()
    assert [row["answer"] for row in ask(kind, "a", timeout=2)] == ["1>2 1=2 a"]
    assert time.monotonic() - started < 15 and len(server[1](kind)) == 2


def test_hostile_replies_end_in_one_sentence_without_control_characters(ask, capsys):
    for kind, sentence in (("nested", "200: [[["), ("flood", "HTTP 200: (after 3 of 3 tries)"),
                           ("escape", r"HTTP 400: \x1b[2Jgone\x07 (after")):
        with pytest.raises(SystemExit) as left:
            run_cli(lambda kind=kind: ask(kind, "a"))
        error = capsys.readouterr().err.splitlines()[-1]
        assert left.value.code == 2 and error.isprintable() and sentence in error


def test_a_redirect_is_not_followed(ask, server):
    # urllib would repeat it as a GET, with the key, wherever the server points
    before = len(server[1]("right"))
    with pytest.raises(ConnectionError, match="HTTP 302"):
        ask("redirect", "a")
    assert len(server[1]("right")) == before


def test_nobody_listening_is_a_sentence(ask, tmp_path):
    reply, failure = endpoint.complete("http://127.0.0.1:9/v1", "", {}, 1.0, 3)
    assert reply is None and re.search(r"Connection refused.*\(after 3 of 3 tries\)", failure)
    with pytest.raises(ValueError, match="does not start with http"):
        endpoint.ask_questions("q", "file:///etc/passwd", "m", "out", 1, 1.0, 1)


def test_a_url_that_cannot_be_one_is_a_sentence():
    # No second try, and no traceback: http.client cannot encode such a host's name.
    for host in ("a..b", "x" * 64 + ".com"):
        reply, failure = endpoint.complete(f"http://{host}/v1", "", {}, 1.0, 3)
        assert reply is None and failure.startswith(f"http://{host}/v1: ") and "1 of 3" in failure


def test_the_wait_is_what_the_server_asks_for_or_doubles(monkeypatch):
    asked, waits = iter(["12", "9999", "soon", "Sun, 06 Nov 1994 08:49:37 GMT", *[""] * 5]), []
    monkeypatch.setattr(endpoint, "fetch", lambda *_: (503, next(asked), b"busy"))
    monkeypatch.setattr(endpoint.time, "sleep", waits.append)
    assert endpoint.complete("http://h/v1", "", {}, 1.0, 9) == (
        None, "HTTP 503: busy (after 9 of 9 tries)")
    assert waits == [12, 600, 4, 8, 16, 32, 60, 60]


def test_a_torn_last_line_is_asked_again_and_a_foreign_file_is_left_alone(ask):
    ask("right", "AB", out="torn.jsonl", workers=1)
    whole = ask.out.read_bytes()
    ask.out.write_bytes(whole[:-9])
    assert len(ask("right", "AB", out="torn.jsonl")) == 2
    ask.out.write_bytes(b"my notes")
    with pytest.raises(ValueError, match="torn.jsonl:1: bad JSON.*'my notes'"):
        ask("right", "AB", out="torn.jsonl")
    assert ask.out.read_bytes() == b"my notes"
    ask.out.write_bytes(b'{"id": "qA", "model": "m"}\nmy notes\n')
    with pytest.raises(ValueError, match="torn.jsonl:2: bad JSON.*starts with 'my notes'"):
        ask("right", "AB", out="torn.jsonl")
    ask.out.write_bytes(b'{"id": "qZ", "model": "m"}\n')
    with pytest.raises(ValueError, match="torn.jsonl:1: id 'qZ' is not among the 2 questions"):
        ask("right", "AB", out="torn.jsonl")
    # another program's, without an end: it gets one; and a torn one of another model is not cut
    compact = b'{"model":"m","id":"qA","answer":"A"}'
    ask.out.write_bytes(compact)
    assert len(ask("right", "AB", out="torn.jsonl")) == 2
    assert ask.out.read_bytes().startswith(compact + b"\n")
    for other in (b'{"id": "qA", "model": "other", "answer": "A"}\n{"id": "qB", "mo',
                  b'{"id": "qA", "order": "ab"}'):                  # a file of questions
        ask.out.write_bytes(other)
        with pytest.raises(ValueError):
            ask("right", "AB", out="torn.jsonl")
        assert ask.out.read_bytes() == other


def test_a_killed_client_goes_on_and_asks_nothing_twice_but_what_was_on_its_way(server, tmp_path):
    texts = [str(number) for number in range(80)]
    questions = write_jsonl(tmp_path / "q.jsonl", [
        {"id": f"q{text}", "order": "ab", "prompt": [], "answer_a": "", "answer_b": "",
         "text": text} for text in texts])
    out = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "judge", "ask", questions, "--url",
               f"{server[0]}/slow/v1", "--model", "m", "--out", str(out), "--workers", "3"]
    environment = os.environ | {"NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    client = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL,
                              stdout=subprocess.DEVNULL)
    while not out.exists() or out.read_bytes().count(b"\n") < 20:
        assert client.poll() is None
        time.sleep(0.01)
    client.send_signal(signal.SIGKILL)
    client.wait()
    saved = {json.loads(line)["id"] for line in out.read_text().splitlines()}
    assert 20 <= len(saved) < 80
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True,
                         timeout=60)
    assert run.returncode == 0, run.stderr
    assert f"{len(saved)} of 80 questions are answered" in run.stdout
    ids = [json.loads(line)["id"] for line in out.read_text().splitlines()]
    assert sorted(ids) == sorted(f"q{text}" for text in texts)
    count = Counter(text for text, _ in server[1]("slow"))
    assert set(count) == set(texts) and sum(count.values()) <= 80 + 3
    assert all(count[name[1:]] == 1 for name in saved)
