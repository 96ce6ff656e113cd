"""Outcomes and tables: win, tie and lose from the answers of a judge or a reward model."""
import json

import numpy as np
from numpy import ndarray

from data import get_value
from intervals import bootstrap, length_controlled_wins, seed_interval, t_quantile, wins
from judge.questions import CRITERIA, parse_judgment

OUTCOME, LENGTH_A, LENGTH_B, DISAGREE = range(4)        # columns of the rows of `judged_pairs`

STATISTICS = {     # name: (rows -> number, what it is)
    "win": (lambda v: (v[:, OUTCOME] > 0).mean(), "share of pairs in which A is better"),
    "tie": (lambda v: (v[:, OUTCOME] == 0).mean(), "... neither, or the orders disagree"),
    "lose": (lambda v: (v[:, OUTCOME] < 0).mean(), "... B is better"),
    "win rate": (lambda v: wins(v[:, OUTCOME]), "win + tie / 2"),
    "win & tie rate": (lambda v: (v[:, OUTCOME] >= 0).mean(), "win + tie (the paper's)"),
    "length-controlled": (lambda v: length_controlled_wins(*v[:, :DISAGREE].T),
                          "win rate at equal length (logistic regression, after AlpacaEval 2)"),
    "length A": (lambda v: v[:, LENGTH_A].mean(), "mean characters of this run's responses"),
    "length B": (lambda v: v[:, LENGTH_B].mean(), "mean characters of the opponent's responses"),
    "orders disagree": (lambda v: v[:, DISAGREE].mean(), "share of pairs; they count as ties"),
}


def reward_outcomes(rewards_a: ndarray, rewards_b: ndarray, margin: float = 0.0) -> ndarray:
    """+1, 0, -1 where reward A is larger, within the margin, smaller: [n], [n] -> [n] float64.

    raises  ValueError on a reward that is not finite, or a negative margin
    """
    gaps = np.asarray(rewards_a, float) - np.asarray(rewards_b, float)           # [n]
    if not np.isfinite(gaps).all() or not margin >= 0:
        raise ValueError(f"rewards must be finite and the margin at least 0; got margin {margin} "
                         f"and {int((~np.isfinite(gaps)).sum())} pairs that are not finite")
    return np.where(np.abs(gaps) <= margin, 0.0, np.sign(gaps))


def outcomes_of_pair(ids: dict[str, str], answers: dict[str, tuple[str, dict]],
                     margin: float) -> tuple[dict[str, list[int]] | None, str]:
    """({criterion: outcomes of A, one per order}, "") of one pair, or (None, why there are none).

    ids  {"ab": id, "ba": id}; a reward model answers "ab" only
    """
    where, row = answers.get(ids.get("ab"), ("", {}))
    if "reward_a" in row or "reward_b" in row:
        rewards = (get_value(row, key, (int, float), where) for key in ("reward_a", "reward_b"))
        return {"reward": [int(reward_outcomes(*rewards, margin))]}, ""
    outcomes = {criterion: [] for criterion in CRITERIA}
    for order, sign in (("ab", 1), ("ba", -1)):          # in "ba", Text 1 is response B
        if ids.get(order) not in answers:
            return None, f"no answer to {ids.get(order, 'its question in order ' + order)}"
        where, row = answers[ids[order]]
        verdict = parse_judgment(get_value(row, "answer", str, where))
        if verdict is None:
            return None, f"{where}: no clear verdict in {row['answer'][:60]!r}"
        for criterion in CRITERIA:
            outcomes[criterion].append(sign * verdict[criterion])
    return outcomes, ""


def judged_pairs(questions: dict[str, dict], answers: dict[str, tuple[str, dict]],
                 margin: float = 0.0) -> tuple[dict[str, tuple[ndarray, ndarray]], list[str]]:
    """({criterion: (rows, prompts)}, left_out) of one run's questions and answers.

    rows      [n, 4] float64   outcome of A (+1, 0, -1); length A, length B in characters; 1 if the
                               two orders disagreed (then the outcome is 0)
    prompts   [n] int64        number of the prompt: its rows are not independent
    left_out  [sentence]       a pair without a clear verdict in both orders, on both criteria
    """
    pairs, numbers, rows, prompts, left_out = {}, {}, {}, {}, []
    for row in questions.values():
        pairs.setdefault(row["id"].partition("-")[0], {})[row["order"]] = row["id"]
    for ids in pairs.values():
        outcomes, reason = outcomes_of_pair(ids, answers, margin)
        if outcomes is None:
            left_out.append(reason)
            continue
        question = questions[next(iter(ids.values()))]
        lengths = [len(question["answer_a"]), len(question["answer_b"])]
        prompt = numbers.setdefault(json.dumps(question["prompt"]), len(numbers))
        for criterion, signs in outcomes.items():
            disagree = len(set(signs)) > 1
            rows.setdefault(criterion, []).append([0 if disagree else signs[0], *lengths, disagree])
            prompts.setdefault(criterion, []).append(prompt)
    return {criterion: (np.array(rows[criterion], float), np.array(prompts[criterion]))
            for criterion in rows}, left_out


def report(runs: dict[str, tuple[dict, dict]], margin: float = 0.0) -> dict:
    """Print STATISTICS per run and over runs; returns {run: {criterion: {statistic: …}}}.

    runs    {name: (questions, answers)}, see `read_questions` and `read_answers`
    raises  ValueError for a run without a judged pair, or runs with different criteria
    """
    table = {}
    for run, (questions, answers) in runs.items():
        judged, left_out = judged_pairs(questions, answers, margin)
        if left_out:
            print(f"{run}: {len(left_out)} pairs left out; the first: {left_out[0]}")
        if not judged:
            raise ValueError(f"{run}: no pair is judged; the first: {left_out[0]}")
        table[run] = {}
        for criterion, (rows, prompts) in judged.items():
            print(f"{run}, {criterion}: {len(rows)} pairs on {len(set(prompts.tolist()))} prompts, "
                  f"orders disagree on {int(rows[:, DISAGREE].sum())} "
                  "[95 % bootstrap interval over prompts]")
            table[run][criterion] = {"n": len(rows)}
            for name, (statistic, meaning) in STATISTICS.items():
                value, low, high = bootstrap(statistic, rows, prompts=prompts)
                table[run][criterion][name] = [value, low, high]
                print(f"  {name:18} {value:8.3f} [{low:.3f}, {high:.3f}]   {meaning}")
            gaps = rows[:, LENGTH_A] - rows[:, LENGTH_B]
            if not gaps.min() < 0 < gaps.max():
                print("  one side is never the shorter: length-controlled is an extrapolation")
    criteria = {tuple(row) for row in table.values()}
    if len(criteria) > 1:
        raise ValueError("the runs were judged by different judges: "
                         + "; ".join(f"{run}: {', '.join(row)}" for run, row in table.items()))
    number = len(table)
    for criterion in criteria.pop() if number > 1 else ():
        print(f"{criterion} over {number} runs [95 % interval over training seeds: mean ± "
              f"t_(0.975, {number - 1}) s / sqrt({number}), t = {t_quantile(number - 1):.3f}]")
        for name in STATISTICS:
            mean, half = seed_interval([row[criterion][name][0] for row in table.values()])
            print(f"  {name:18} {mean:8.3f} ± {half:.3f}")
    return table
