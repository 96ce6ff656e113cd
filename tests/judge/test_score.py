"""Outcomes of pairs, and the table over runs."""
import math

import numpy as np
import pytest

from judge.questions import make_questions, read_answers, write_rewards
from judge.score import judged_pairs, report, reward_outcomes

HI = (("Human", "Hi?"),)


def answers_to(questions, answers):
    return {row["id"]: (f"f:{number}", {"id": row["id"], "answer": answer})
            for number, (row, answer) in enumerate(zip(questions, answers), 1)}


def test_a_pair_wins_only_if_both_orders_agree():
    # "ba" shows B first, so there 1<2 is a win of A. Pair 1 wins helpful; pair 2 always prefers the
    # first text; pair 3 has one tie; pair 4's second answer is unclear, pair 5's is missing.
    rows = make_questions([(HI, "A" * 10, "B" * 4)] * 5)
    questions = {row["id"]: row for row in rows}
    answers = answers_to(rows, ["1>2 1=2", "1<2 1=2", "1>2 1>2", "1>2 1<2", "1<2 1=2", "1=2 1<2",
                          "1>2 1>2", "no", "1>2 1>2"])
    criteria, left_out = judged_pairs(questions, answers)
    helpful, prompts = criteria["helpful"]
    assert helpful.tolist() == [[1, 10, 4, 0], [0, 10, 4, 1], [0, 10, 4, 1]]
    assert criteria["harmless"][0][:, 0].tolist() == [0, 1, 0]
    assert criteria["harmless"][0][:, 3].tolist() == [0, 0, 1]
    assert prompts.tolist() == [0, 0, 0]
    assert left_out[0] == "f:8: no clear verdict in 'no'" and rows[9]["id"] in left_out[1]


def test_rewards_win_tie_and_lose():
    rewards_a, rewards_b = np.array([1.0, 2.0, 0.0, 1.5]), np.array([1.0, 1.0, 3.0, 1.0])
    assert reward_outcomes(rewards_a, rewards_b).tolist() == [0, 1, -1, 1]
    assert reward_outcomes(rewards_a, rewards_b, margin=0.5).tolist() == [0, 1, -1, 0]
    with pytest.raises(ValueError, match="finite"):
        reward_outcomes(np.array([math.nan]), np.zeros(1))
    rows = make_questions([(HI, "a", "b"), (HI, "c", "d")])
    answers = {rows[0]["id"]: ("f:1", {"reward_a": 2, "reward_b": 1.0}),
               rows[2]["id"]: ("f:2", {"reward_a": -1.0, "reward_b": 1.0})}
    criteria, left_out = judged_pairs({row["id"]: row for row in rows}, answers)
    assert criteria["reward"][0][:, 0].tolist() == [1, -1] and not left_out


def test_a_reward_model_reads_every_pair_once_and_its_file_is_scored(tmp_path):
    questions = {row["id"]: row for row in make_questions([(HI, "long", "x"), (HI, "a", "bc")])}

    def lengths(records):                        # a reward model that likes length
        assert [record.prompt for record in records] == [HI, HI]
        return [float(len(text)) for record in records for text in record.responses]

    write_rewards(questions, lengths, str(tmp_path / "rewards.jsonl"))
    answers = read_answers(str(tmp_path / "rewards.jsonl"), questions)
    rows, _ = judged_pairs(questions, answers)[0]["reward"]
    assert rows.tolist() == [[1, 4, 1, 0], [-1, 1, 2, 0]]
    rows, _ = judged_pairs(questions, answers, margin=1.0)[0]["reward"]
    assert rows[:, 0].tolist() == [1, 0]


def test_the_report_by_hand(capsys):
    # 8 pairs on 8 prompts: 3 wins, 2 ties of which 1 by disagreement, 3 losses; two equal runs
    rows = make_questions([((("Human", f"{n}?"),), "aa", "b") for n in range(8)])
    texts = ["1>2 1=2", "1<2 1=2"] * 3 + ["1=2 1=2", "1=2 1=2", "1>2 1=2", "1>2 1=2"] + [
        "1<2 1=2", "1>2 1=2"] * 3
    run = ({row["id"]: row for row in rows}, answers_to(rows, texts))
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
