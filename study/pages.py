"""The words of results/ that are no table. Every measured number in them is computed."""
from textwrap import fill

from study.optima import mean_optimum
from study.rows import Study
from study.tables import NEGATIVE_DPO, SHOWN, TABLES, UNLEARNING, d2o, shown

SCORES_EXPLAINED = """Mean [95 % t interval over seeds, cut at what the score can be]; where a run
left the world (off-world above one half) the median (smallest to largest). Seeds draw data, order
and initialisation anew; intervals say nothing of other prompts. 40 prompts that no objective
trained on, exact over 288 answers each. –: has none.

E[r]: true reward in nats, off-world mass counting as the worst answer; unseen, seen, harmless: over
a part of the prompts; optimum: E[r] of the objective's optimum with infinite data; E[r] inside: of
valid answers only. harmful, good: mass on harmful answers and on those with positive reward.
off-world: mass on no valid answer. refusal: mass on openings that refuse. KL: nats; pi* is the
optimum at beta 0.5. entropy: of the answers, nats. perplexity: per token, of the best answer.
length: tokens of a valid answer, mean. win/tie/lose: against the data's chosen answer, and the base's.
objective: E[r] - 0.5 KL(pi‖ref). With h = beta log(pi/pi_ref): reward slope: of h on r*, 1 is
ideal; reward accuracy: share of pairs of answers that h orders as r* does; calibration error: mean
of |sigma(h) - sigma(r*)| under the base, which takes Z(x) = 1 at its word (pi* itself is not at 0).
"""

START = """A difference is better - worse, seed by seed, with its 95 % t interval; over seeds and
verbs: the same where the verbs of the 40 test prompts could have been others, too (–: no scores of
single prompts). p: Student's t, two-sided; one-sided where the claim is that at most {margin} nats
are lost, two one-sided tests where it is that less lies between. sign-flip: exact over all signs,
at least 2 / 2^n (one-sided 1 / 2^n). The hypotheses and their rates were committed before the first
of their runs; five runs of ULMA, SFT and DPO on HH-like pairs from an older base were known by
then, so that 1 and 2 are repetitions. Eight seeds were planned, n is what was run. Everything below
them is exploratory: one family of Benjamini and Hochberg at 5 %, in which verdicts are by the
adjusted p.

The world (`world.py`): 288 answers to each prompt with known reward, so that every score is
computed, not judged. {runs} runs in `runs.jsonl`, one thread each; `python -m study --check 20` in
a fresh clone makes 20 of them again, drawn at random, and compares every number. A run: 2,432
labelled answers (fewer or more where a table says so), one epoch, 76 steps of 32 answers or 16
pairs, beta 0.5, LoRA r 8 on every layer. Learning rates: in factors of 2, two tuning seeds (0 and
100), E[r] on 24 training prompts, half of them harmful requests, the middle of the plateau within
0.25 nats of the best. The dial's rates were written down before its runs ([dial.md](dial.md) shows
what tuning says of them); mixture, reward models, centred ratings and large have a fixed one.

What this cannot say: how large a gain is on a real language model, whether real labels follow
Eq. 6, and what happens where answers cannot be listed. What it can: which objective turns the same
labels into more reward, and where the rest of its probability goes.
"""


def listed(values: list[float]) -> str:
    """1.00, 2.00 and 3.00"""
    words = [f"{value:.2f}" for value in values]
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def optima(method: str) -> str:
    return listed([mean_optimum(data, method)["E[r]"] for data in SHOWN])


def reached(study: Study, method: str) -> str:
    """E[r] of the dial's cells that were run, over seeds."""
    cells = [shown(data, method).key for data in SHOWN]
    means = [study.middle(key, "E[r]") for key in cells if study.has(key)]
    return listed(means) if means else "nothing yet"


def from_bad_answers(study: Study) -> str:
    """A sentence about D2O and its rivals; nothing before they are run."""
    cells = (d2o(11), d2o(4), d2o(1), UNLEARNING, NEGATIVE_DPO)
    if not study.has(*(cell.key for cell in cells)):
        return ""
    words = [f"{study.middle(cell.key, 'E[r]'):.2f}" for cell in cells]
    return ("From 608 bad answers alone D2O reached {} with 11 anchors, {} with 4 and {} with 1, "
            "unlearning {} and negative DPO {}, each at a rate that two tuning seeds survived. "
            ).format(*words)


def headline(study: Study, papers: str) -> str:
    """Four sentences; papers: how many of the papers' claims hold, fail, are undecided."""
    return fill(
        "ULMA is worth what its demonstrations are worth: with infinite data it ends at "
        f"{optima('ulma')} nats where the chosen answers are Bradley-Terry winners, the best of 4, "
        "the best of 16 or one of the 16 best of 288, SFT on the same data at "
        f"{optima('sft')}, DPO at {optima('dpo')}, pi* at {mean_optimum('hh', 'pi*')['E[r]']:.2f}. "
        f"Runs of 76 steps reached {reached(study, 'ulma')} with ULMA, {reached(study, 'sft')} "
        f"with SFT and {reached(study, 'dpo')} with DPO. {from_bad_answers(study)}"
        f"Of the papers' claims {papers}; where "
        "every method compared has an optimum, the optima predict most verdicts "
        "([exact.md](exact.md)).", 100) + "\n"


NOT_BUILT = (
    "Not built: a second set of answers whose good ones are longer (a new base model; `lengths` "
    "selects pairs by length instead).")


def not_run(study: Study) -> str:
    """What is missing, and what it would cost."""
    cells = {cell for table in TABLES.values() for cell in table.cells}
    missing = {cell: max(0, cell.seeds - len(study.results.get(cell.key, ()))) for cell in cells}
    by_table = {name: sum(missing[cell] for cell in table.cells) for name, table in TABLES.items()}
    where = ", ".join(f"{name} {count}" for name, count in by_table.items() if count) or "none"
    return "## Not run, and what it would cost\n\n" + fill(
        f"{sum(missing.values())} of the "
        f"{sum(cell.seeds for cell in cells)} test runs that the tables ask for ({where}); a run "
        "takes some 12 seconds on one idle core (PPO some minutes), and `make reproduce` does what "
        "is missing. " + NOT_BUILT, 100) + "\n"
