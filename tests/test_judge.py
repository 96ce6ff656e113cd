"""Judges: who meets whom, what an answer says, what is asked how often, and the intervals."""
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter

import pytest
import torch
from conftest import ROOT, write_jsonl

import endpoint
import judge
from intervals import bootstrap, length_controlled_wins, seed_interval, t_quantile, wins
from judge import (judge_prompt, judged_pairs, make_questions, pair_up, parse_judgment,
                   read_generations, read_opponents, read_questions, report, reward_outcomes)

HI = (("Human", "Hi?"),)


# ---- intervals ----------------------------------------------------------------------------------

def test_t_quantiles_are_the_tabulated_ones():
    # two-sided 95 % of Student's t, from any printed table
    table = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 10: 2.228, 29: 2.045, 30: 2.042,
             120: 1.980}
    for degrees, t in table.items():
        assert t_quantile(degrees) == pytest.approx(t, abs=5e-4)


def test_three_seeds_by_hand():
    # 1, 2, 3: mean 2, s = 1, 4.303 / sqrt 3 = 2.484 (the notes' 2.48 times the sample s.d.)
    assert seed_interval([1.0, 2.0, 3.0]) == (2.0, pytest.approx(2.4841, abs=1e-4))
    with pytest.raises(ValueError, match="at least two runs; got 1"):
        seed_interval([1.0])


def test_bootstrap_draws_the_rows_of_a_prompt_together():
    # 50 prompts asked 8 times, always with the same outcome, tell no more than 50 rows: the
    # interval must be that of 50 rows; drawing 400 rows on their own would shrink it by sqrt 8.
    few = (torch.arange(50.0) % 2)[:, None]
    many = few.repeat_interleave(8, 0)
    prompts = torch.arange(50).repeat_interleave(8)
    _, low, high = bootstrap(lambda v: v.mean(), few)
    _, low_8, high_8 = bootstrap(lambda v: v.mean(), many, prompts=prompts)
    assert high_8 - low_8 == pytest.approx(high - low, rel=0.1)
    shuffled = torch.randperm(400, generator=torch.Generator().manual_seed(0))
    _, low_s, high_s = bootstrap(lambda v: v.mean(), many[shuffled], prompts=prompts[shuffled])
    assert (low_s, high_s) == (low_8, high_8)


# ---- length control -----------------------------------------------------------------------------

def test_without_a_length_effect_the_controlled_rate_is_the_raw_one():
    # Every outcome occurs with gap +d and -d: φ = 0 solves the equations, so θ = logit(raw).
    outcomes = torch.tensor([1, 1, 1, 0, -1, -1] * 10)
    gaps = torch.cat([torch.full((30,), 20.0), torch.full((30,), -20.0)])
    rate = length_controlled_wins(outcomes, 100 + gaps, torch.full((60,), 100.0))
    assert rate == pytest.approx(float(wins(outcomes)), abs=1e-5)
    assert float(wins(outcomes)) == pytest.approx(7 / 12)


def test_a_judge_that_only_looks_at_length_gives_one_half():
    # P(win) = σ(2 tanh(d / s)) and A is longer in 85 % of the pairs: raw rate 0.74, controlled 0.5.
    generator = torch.Generator().manual_seed(0)
    gaps = torch.randn(20000, generator=generator).double() + 1.0
    chance = torch.sigmoid(2 * torch.tanh(gaps / gaps.std()))
    outcomes = torch.where(torch.rand(20000, generator=generator) < chance, 1, -1)
    assert float(wins(outcomes)) > 0.7
    assert length_controlled_wins(outcomes, gaps + 5, torch.full((20000,), 5.0)) == pytest.approx(
        0.5, abs=0.015)
    # the longer always wins, as often either way: separable, and still 0.5
    sign = torch.tensor([1, -1] * 50)
    assert length_controlled_wins(sign, 10 + sign, torch.full((100,), 10)) == pytest.approx(0.5)


def test_the_regression_equals_another_optimiser():
    # The same penalised likelihood by LBFGS in float64, on skewed data with ties.
    generator = torch.Generator().manual_seed(1)
    lengths = torch.rand(3, 300, generator=generator).double() * 100
    gaps = lengths[0] - lengths[1]
    outcomes = (lengths[2] + 0.5 * gaps > 60).double() - (lengths[2] < 20).double()
    features = torch.tanh(gaps / gaps.std())
    weights = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=500, tolerance_grad=1e-12,
                                  tolerance_change=1e-15, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(
            weights[0] + weights[1] * features, (outcomes + 1) / 2) + (
            5e-7 * weights[0]**2 + 5e-5 * weights[1]**2)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert abs(float(weights[1].detach())) > 0.3             # there is an effect to control for
    assert length_controlled_wins(outcomes, lengths[0], lengths[1]) == pytest.approx(
        float(weights[0].detach().sigmoid()), abs=1e-7)


def test_length_control_at_the_edges():
    # nothing to control for; nothing but wins; one pair
    assert length_controlled_wins(torch.tensor([1, 1, 0]), torch.ones(3), torch.ones(3)) == \
        pytest.approx(5 / 6)
    assert length_controlled_wins(torch.ones(9), torch.arange(9), torch.ones(9)) > 0.999
    assert length_controlled_wins(torch.tensor([-1]), torch.ones(1), torch.zeros(1)) == 0.0


# ---- pairs --------------------------------------------------------------------------------------

def test_generations_meet_the_chosen_answer_or_the_other_runs(tmp_path):
    # k-th meets k-th; two samples of one prompt meet its one chosen answer; others are left out
    mine = write_jsonl(tmp_path / "mine.jsonl", [
        {"prompt": [["Human", q]], "completion": text, "seed": 0, "where": "f:1"}
        for q, text in (("Hi?", "a"), ("Hi?", "b"), ("Who?", "c"), ("Odd?", "d"))])
    theirs = write_jsonl(tmp_path / "theirs.jsonl", [
        {"prompt": [["Human", "Hi?"]], "completion": text, "seed": 0, "where": "f:1"}
        for text in "xy"])
    data = write_jsonl(tmp_path / "data.jsonl", [
        {"prompt": "Hi?", "chosen": "good", "rejected": "bad"},
        {"prompt": "Who?", "chosen": "me", "rejected": "you"}])
    answers = read_generations(mine)
    messages = write_jsonl(tmp_path / "messages.jsonl", [
        {"prompt": [{"role": "user", "content": prompt[0][1]}], "completion": text, "seed": 0}
        for prompt, text in answers])
    assert read_opponents(messages) == read_opponents(mine) == answers
    assert pair_up(answers, read_opponents(theirs)) == [(HI, "a", "x"), (HI, "b", "y")]
    assert pair_up(answers, read_opponents(data)) == [
        (HI, "a", "good"), (HI, "b", "good"), ((("Human", "Who?"),), "c", "me")]


def test_the_judge_prompt_has_the_papers_fields_in_order():
    prompt = (("System", "Be kind."), ("Human", "A {x}?"), ("Assistant", "B."), ("Human", "C?"))
    text = judge_prompt(prompt, "first {y}", "second")
    sections = ["[Task Description]:", "[Criteria Description]: Helpful, which means the ability",
                "Harmless, which ensure the AI operates within ethical",
                "[Context]: System: Be kind.\nHuman: A {x}?\nAssistant: B.\n",
                "[Question to be answered]: C?\n", "[Text 1]: first {y}\n", "[Text 2]: second\n",
                "[Judgment Result - Helpful]:\n", "[Judgment Result - Harmless]:"]
    places = [text.rindex(section) for section in sections]
    assert places == sorted(places) and text.endswith(sections[-1])


def test_both_orders_are_asked_and_an_id_belongs_to_its_text():
    ab, ba = make_questions([(HI, "one", "two")])
    assert (ab["order"], ba["order"]) == ("ab", "ba") and ab["id"] != ba["id"]
    assert "[Text 1]: one\n[Text 2]: two" in ab["text"]
    assert "[Text 1]: two\n[Text 2]: one" in ba["text"]
    assert make_questions([(HI, "one", "three")])[0]["id"] != ab["id"]


# ---- what an answer says ------------------------------------------------------------------------

@pytest.mark.parametrize("answer, helpful, harmless", [
    ("1>2\n1=2", 1, 0),
    ("1<2 1>=2", -1, 1),
    (" $1\\geq 2$ ; $1 \\leq 2$", 1, -1),
    ("1≥2, 1≤2.", 1, -1),
    ("2>1 2<1", -1, 1),
    ("2 = 1\n1 == 2", 0, 0),
    ("[Judgment Result - Helpful]: 1>2 [Judgment Result - Harmless]: 1<2", 1, -1),
    ("[Judgment Result - Harmless]: 1>2\n[Judgment Result - Helpful]: 1<2", -1, 1),
    ("**Helpful**: 1<2\n**Harmless**: 1=2", -1, 0),
    ("Helpfulness: [Text 1] > [Text 2]\nHarmlessness: Text 1 = Text 2", 1, 0),
    ("<think>Helpful: 1<2? No.</think>Helpful: 1>2 Harmless: 1=2", 1, 0),
    ("Helpful: 1>2. Harmless: 1=2. So, helpful: 1>2.", 1, 0)])
def test_verdicts_that_are_clear(answer, helpful, harmless):
    assert parse_judgment(answer) == {"helpful": helpful, "harmless": harmless}


@pytest.mark.parametrize("answer", [
    "", "1>2", "I cannot judge this.", "1>2 1=2 1<2", "11>2 1=23", "1>1 1=2", "3>2 1=2",
    "[Judgment Result - Helpful]: [Judgment Result - Harmless]: 1>2",
    "Helpful: 1>2, then again helpful: 1<2. Harmless: 1=2",
    "It is harmless that 1>2, and helpful that 1<2"])      # would swap if read by order
def test_verdicts_that_are_not(answer):
    assert parse_judgment(answer) is None


def said(questions, answers):
    return {row["id"]: (f"f:{number}", {"id": row["id"], "answer": answer})
            for number, (row, answer) in enumerate(zip(questions, answers), 1)}


def test_a_pair_wins_only_if_both_orders_say_so():
    # "ba" shows B first, so there 1<2 is a win of A. Pair 1 wins helpful; pair 2 always prefers the
    # first text; pair 3 has one tie; pair 4's second answer is unclear, pair 5's is missing.
    rows = make_questions([(HI, "A" * 10, "B" * 4)] * 5)
    questions = {row["id"]: row for row in rows}
    answers = said(rows, ["1>2 1=2", "1<2 1=2", "1>2 1>2", "1>2 1<2", "1<2 1=2", "1=2 1<2",
                          "1>2 1>2", "no", "1>2 1>2"])
    criteria, left_out = judged_pairs(questions, answers)
    helpful, prompts = criteria["helpful"]
    assert helpful.tolist() == [[1, 10, 4, 0], [0, 10, 4, 1], [0, 10, 4, 1]]
    assert criteria["harmless"][0][:, 0].tolist() == [0, 1, 0]
    assert criteria["harmless"][0][:, 3].tolist() == [0, 0, 1]
    assert prompts.tolist() == [0, 0, 0]
    assert left_out[0] == "f:8: no clear verdict in 'no'" and rows[9]["id"] in left_out[1]


def test_rewards_win_tie_and_lose():
    rewards_a, rewards_b = torch.tensor([1.0, 2.0, 0.0, 1.5]), torch.tensor([1.0, 1.0, 3.0, 1.0])
    assert reward_outcomes(rewards_a, rewards_b).tolist() == [0, 1, -1, 1]
    assert reward_outcomes(rewards_a, rewards_b, margin=0.5).tolist() == [0, 1, -1, 0]
    with pytest.raises(ValueError, match="finite"):
        reward_outcomes(torch.tensor([math.nan]), torch.tensor([0.0]))
    rows = make_questions([(HI, "a", "b"), (HI, "c", "d")])
    answers = {rows[0]["id"]: ("f:1", {"reward_a": 2, "reward_b": 1.0}),
               rows[2]["id"]: ("f:2", {"reward_a": -1.0, "reward_b": 1.0})}
    criteria, left_out = judged_pairs({row["id"]: row for row in rows}, answers)
    assert criteria["reward"][0][:, 0].tolist() == [1, -1] and not left_out


def test_a_reward_model_reads_every_pair_once_and_its_file_is_scored(tmp_path):
    questions = {row["id"]: row for row in make_questions([(HI, "long", "x"), (HI, "a", "bc")])}

    def lengths(records):                        # a reward model that likes length
        assert [record.prompt for record in records] == [HI, HI]
        return torch.tensor([float(len(text)) for record in records for text in record.responses])

    judge.write_rewards(questions, lengths, str(tmp_path / "rewards.jsonl"))
    answers = judge.read_answers(str(tmp_path / "rewards.jsonl"), questions)
    rows, _ = judged_pairs(questions, answers)[0]["reward"]
    assert rows.tolist() == [[1, 4, 1, 0], [-1, 1, 2, 0]]
    rows, _ = judged_pairs(questions, answers, margin=1.0)[0]["reward"]
    assert rows[:, 0].tolist() == [1, 0]


def test_the_report_by_hand(capsys):
    # 8 pairs on 8 prompts: 3 wins, 2 ties of which 1 by disagreement, 3 losses; two equal runs
    rows = make_questions([((("Human", f"{n}?"),), "aa", "b") for n in range(8)])
    texts = ["1>2 1=2", "1<2 1=2"] * 3 + ["1=2 1=2", "1=2 1=2", "1>2 1=2", "1>2 1=2"] + [
        "1<2 1=2", "1>2 1=2"] * 3
    run = ({row["id"]: row for row in rows}, said(rows, texts))
    table = report({"one": run, "two": run})
    values = {key: value[0] for key, value in table["one"]["helpful"].items() if key != "n"}
    assert values == {"win": 0.375, "tie": 0.25, "lose": 0.375, "win rate": 0.5,
                      "win & tie rate": 0.625, "length-controlled": 0.5, "length A": 2.0,
                      "length B": 1.0, "orders disagree": 0.125}
    value, low, high = table["one"]["helpful"]["win"]
    assert low < value < high                 # sd sqrt(.375 .625 / 8) = .17: about ± .33
    assert high - low == pytest.approx(0.67, abs=0.15)
    out = capsys.readouterr().out
    assert "over 2 runs" in out and "t_(0.975, 1) s / sqrt(2), t = 12.706" in out
    assert "win                   0.375 ± 0.000" in out
    assert "length-controlled is an extrapolation" in out      # A is longer in every pair


# ---- a real server ------------------------------------------------------------------------------

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
        judge.ask_questions(questions, f"{server[0]}/{kind}/v1/", model, str(run.out), workers,
                            timeout, tries)
        return [json.loads(line) for line in run.out.read_text().splitlines()]
    run.waits = waits
    return run


def test_a_server_that_answers_is_asked_once_a_question(ask, server, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\n")       # as `export KEY=$(cat file)` can be
    rows = ask("right", "abcdef")
    assert {row["id"]: row["answer"] for row in rows} == {f"q{t}": f"1>2 1=2 {t}" for t in "abcdef"}
    assert Counter(server[1]("right")) == {(t, "Bearer sk-secret"): 1 for t in "abcdef"}
    assert "6 of 6 asked, 0 failed, 0:00:00 left" in capsys.readouterr().err
    assert ask("right", "abcdefg")[-1]["id"] == "qg"         # resume: g is new
    assert len(server[1]("right")) == 7 and b"sk-secret" not in ask.out.read_bytes()
    with pytest.raises(ValueError, match="answered by 'm', not 'other'"):
        ask("right", "abcdefgh", model="other")


def test_a_server_that_fails_twice_is_asked_again_when_it_says(ask, server):
    rows = ask("flaky", "x", workers=1)
    assert [row["answer"] for row in rows] == ["1>2 1=2 x"]
    assert len(server[1]("flaky")) == 3
    first, second = ask.waits                              # 503: Retry-After 7; 429: our own 2 s
    assert first == 7 and 1 <= second <= 2
    with pytest.raises(ConnectionError, match="HTTP 503.*2 of 2 tries|HTTP 429.*2 of 2 tries"):
        ask("flaky", "y", tries=2, out="other.jsonl")


def test_a_refusal_is_not_repeated_and_its_message_reaches_the_user_without_the_key(
        ask, server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with pytest.raises(ConnectionError) as failed:
        ask("bad", "abcdefghij", workers=1)
    assert "5 questions in a row failed" in str(failed.value)
    assert "HTTP 400" in str(failed.value)
    assert "no such model: m, key Bearer ***" in str(failed.value)
    assert "sk-secret" not in str(failed.value) and "\n" not in str(failed.value)
    threading.Event().wait(0.3)
    assert 5 <= len(server[1]("bad")) <= 6 and not ask.waits   # at most one more was on its way


def test_refused_questions_do_not_stop_the_others(ask, server):
    # six refusals, never five in a row
    with pytest.raises(ConnectionError, match="6 of 12 questions got no answer.*q2: HTTP 400"):
        ask("picky", "123456789abc", workers=1)
    assert len(ask.out.read_text().splitlines()) == 6
    with pytest.raises(ConnectionError, match="5 questions in a row failed"):
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


def test_a_redirect_is_not_followed(ask, server):
    # urllib would repeat it as a GET, with the key, wherever the server points
    before = len(server[1]("right"))
    with pytest.raises(ConnectionError, match="HTTP 302"):
        ask("redirect", "a")
    assert len(server[1]("right")) == before


def test_nobody_listening_is_a_sentence(ask, tmp_path):
    with pytest.raises(ConnectionError, match="Connection refused.*3 of 3 tries"):
        endpoint.complete("http://127.0.0.1:9/v1", "", "m", "a", 1.0, 3)
    with pytest.raises(ValueError, match="does not start with http"):
        judge.ask_questions("q", "file:///etc/passwd", "m", "out", 1, 1.0, 1)


def test_retry_after_takes_seconds_and_dates():
    assert endpoint.seconds_to_wait("12", 0) == 12
    ahead = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 100))
    assert 90 < endpoint.seconds_to_wait(ahead, 0) <= 100
    assert endpoint.seconds_to_wait("Sun, 06 Nov 1994 08:49:37 GMT", 0) == 0
    for attempt, most in enumerate([1, 2, 4, 8, 16, 32, 60, 60]):
        assert most / 2 <= endpoint.seconds_to_wait(None, attempt) <= most
        assert most / 2 <= endpoint.seconds_to_wait("soon", attempt) <= most


def test_progress_tells_the_time_left():
    # 10 in 30 s: 3 s each, 20 to go
    assert endpoint.progress(10, 30, 1, 30.0) == "10 of 30 asked, 1 failed, 0:01:00 left"


def test_a_torn_last_line_is_asked_again_and_a_strange_file_is_left_alone(ask):
    ask("right", "AB", out="torn.jsonl", workers=1)
    whole = ask.out.read_bytes()
    ask.out.write_bytes(whole[:-9])
    assert len(ask("right", "AB", out="torn.jsonl")) == 2
    ask.out.write_bytes(b"my notes")
    with pytest.raises(ValueError, match="no answer in its last line"):
        ask("right", "AB", out="torn.jsonl")
    assert ask.out.read_bytes() == b"my notes"
    ask.out.write_bytes(b'{"id": "qA", "model": "m"}\nmy notes\n')
    with pytest.raises(ValueError, match="torn.jsonl:2: no answer of `ask`: b'my notes'"):
        ask("right", "AB", out="torn.jsonl")
    ask.out.write_bytes(b'{"id": "qZ", "model": "m"}\n')
    with pytest.raises(ValueError, match="answers 1 questions that are not in .*, as 'qZ'"):
        ask("right", "AB", out="torn.jsonl")


def test_a_killed_client_goes_on_and_asks_nothing_twice_but_what_was_on_its_way(server, tmp_path):
    texts = [str(number) for number in range(80)]
    questions = write_jsonl(tmp_path / "q.jsonl", [
        {"id": f"q{text}", "order": "ab", "prompt": [], "answer_a": "", "answer_b": "",
         "text": text} for text in texts])
    out = tmp_path / "out.jsonl"
    command = [sys.executable, str(ROOT / "judge.py"), "ask", questions, "--url",
               f"{server[0]}/slow/v1", "--model", "m", "--out", str(out), "--workers", "3"]
    environment = os.environ | {"NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    client = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL,
                              stdout=subprocess.DEVNULL)
    while not out.exists() or out.read_bytes().count(b"\n") < 20:
        assert client.poll() is None
        time.sleep(0.01)
    client.send_signal(signal.SIGKILL)
    client.wait()
    kept = {json.loads(line)["id"] for line in out.read_text().splitlines()}
    assert 20 <= len(kept) < 80
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert f"{len(kept)} of 80 questions are answered" in run.stdout
    ids = [json.loads(line)["id"] for line in out.read_text().splitlines()]
    assert sorted(ids) == sorted(f"q{text}" for text in texts)
    count = Counter(text for text, _ in server[1]("slow"))
    assert set(count) == set(texts) and sum(count.values()) <= 80 + 3
    assert all(count[name[1:]] == 1 for name in kept)


# ---- the command --------------------------------------------------------------------------------

@pytest.fixture
def files(tmp_path):
    """Generations and a data file of three prompts, and their questions, through the command."""
    generations = write_jsonl(tmp_path / "mine.jsonl", [
        {"prompt": [["Human", f"{n}?"]], "completion": "yes" * n, "seed": 0, "where": f"f:{n}"}
        for n in range(3)])
    data = write_jsonl(tmp_path / "data.jsonl", [
        {"prompt": f"{n}?", "chosen": "no", "rejected": "well"} for n in range(3)])
    judge.main(["prompts", generations, "--against", data, "--out", str(tmp_path / "asked.jsonl")])
    return tmp_path


def test_eval_py_reaches_the_judge_and_scores_a_file(files, monkeypatch, capsys):
    import eval as evaluate
    questions = read_questions(str(files / "asked.jsonl"))
    answers = write_jsonl(files / "said.jsonl", [
        {"id": name, "answer": "1>2 1=2" if row["order"] == "ab" else "1<2 1<2"}
        for name, row in questions.items()])
    monkeypatch.setattr(sys, "argv", ["eval.py", "judge", "score", "--questions",
                                      str(files / "asked.jsonl"), "--answers", answers,
                                      "--json", str(files / "table.json")])
    evaluate.main()
    table = json.loads((files / "table.json").read_text())[answers]
    assert table["helpful"]["n"] == 3 and table["helpful"]["win"][0] == 1.0
    assert table["harmless"]["tie"][0] == 1.0 and table["harmless"]["orders disagree"][0] == 1.0
    assert "on 3 prompts, orders disagree on 3" in capsys.readouterr().out


@pytest.mark.parametrize("row, sentence", [
    ({"id": "9-ab-0", "answer": "1>2"}, "said.jsonl:2: id '9-ab-0' is not among the 6 questions"),
    ({"answer": "1>2"}, "said.jsonl:2: key 'id' is missing"),
    ("twice", "said.jsonl:2: id .* was answered before, at .*said.jsonl:1"),
    ("{", "said.jsonl:2: bad JSON"),
    ({"id": None, "answer": 3}, "'answer' is '3'; expected str"),
    ({"id": None, "reward_a": 1.0}, "key 'reward_b' is missing")])
def test_answers_that_do_not_fit_are_refused_with_their_line(files, row, sentence):
    names = list(read_questions(str(files / "asked.jsonl")))
    first = {"id": names[1], "answer": "1>2 1=2"}
    row = first if row == "twice" else row
    if isinstance(row, dict) and row.get("id", 0) is None:
        row = row | {"id": names[0]}
    answers = write_jsonl(files / "said.jsonl", [first, row])
    with pytest.raises(ValueError, match=sentence):
        judge.main(["score", "--questions", str(files / "asked.jsonl"), "--answers", answers])


def test_nothing_is_overwritten_and_strangers_are_refused(files):
    mine, asked = str(files / "mine.jsonl"), str(files / "asked.jsonl")
    with pytest.raises(FileExistsError, match="asked.jsonl exists"):
        judge.main(["prompts", mine, "--against", mine, "--out", asked])
    other = write_jsonl(files / "other.jsonl", [{"prompt": "z?", "chosen": "a", "rejected": "b"}])
    with pytest.raises(ValueError, match="no prompt of .*mine.jsonl has an answer in"):
        judge.main(["prompts", mine, "--against", other, "--out", str(files / "new.jsonl")])
    odd = write_jsonl(files / "odd.jsonl", [{"prompt": "text", "completion": "a"}])
    with pytest.raises(ValueError, match="odd.jsonl:1: 'prompt' is 'text'"):
        judge.main(["prompts", odd, "--against", mine, "--out", str(files / "new.jsonl")])
    odd = write_jsonl(files / "odd.jsonl", [{"prompt": [["Human", 3]], "completion": "a"}])
    with pytest.raises(ValueError, match="odd.jsonl:1: .* is not a message"):
        judge.main(["prompts", odd, "--against", mine, "--out", str(files / "new.jsonl")])
    with pytest.raises(ValueError, match="1 files of --questions but 2 of --answers"):
        judge.main(["score", "--questions", asked, "--answers", mine, mine])
    assert not (files / "new.jsonl").exists()
