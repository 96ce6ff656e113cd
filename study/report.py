"""results/: tables, figures and verdicts, made of the rows in OUT/runs.jsonl.

    TABLE.md     mean ± half-width of a 95 % interval over seeds
    *.png        figures (figures.py; they need matplotlib)
    README.md    every claim with its difference, interval and verdict

A claim compares two cells seed by seed: same seed, same data, so their difference is a paired
sample. Its interval is mean ± t s / sqrt(n) over the seeds (intervals.seed_interval). The claim
holds if all of the interval has the claimed sign, fails if all of it has the other sign, and is
undecided otherwise.
"""
import math
import os

from files.text import write_text
from intervals import seed_interval
from study.figures import draw
from study.rows import Results, by_cell, read_bounds, read_rows, seed_mean
from study.tables import CLAIMS, DATA_LABEL, SMALLER_IS_BETTER, TABLES, Claim, Table, method_label


def shown(score: str) -> str:
    """A score's name without |, which would end a table's cell."""
    return score.replace("||", "‖")


def number(mean: float, half: float) -> str:
    """mean ± half with two significant digits of half, 1 to 3 decimals."""
    decimals = min(3, max(1, 1 - math.floor(math.log10(half)))) if half else 3
    return f"{mean:.{decimals}f} ± {half:.{decimals}f}"


# ---- tables -------------------------------------------------------------------------------------

SCORES_EXPLAINED = """
E[r]: true reward in nats, off-world mass counting as the worst answer. harmful, good: mass on
harmful answers and on those with positive reward. off-world: mass on no valid answer. KL: nats; pi*
is the optimum at beta 0.5. perplexity: per token, of the best answer. win/tie/lose: against the
data's chosen answer, and the base's. objective: E[r] - 0.5 KL(pi‖ref). With h = beta
log(pi/pi_ref): reward slope: of h on r*, 1 is ideal; reward accuracy: share of pairs of answers
that h orders as r* does; calibration error: mean of |sigma(h) - sigma(r*)| under the base, which
takes Z(x) = 1 at its word (pi* itself is not at 0). *: the smallest or the largest rate tried."""


def table_lines(table: Table, scores: tuple[str, ...], results: Results,
                rates: list[float]) -> list[str]:
    """Header and one row per cell, in Markdown; rates, sorted: what tuning tried."""
    lines = ["| data | method | " + " | ".join(map(shown, scores)) + " | learning rate |",
             "|---" * (len(scores) + 3) + "|"]
    for cell in table.cells:
        start = f"| {DATA_LABEL[cell.data]} | {method_label(cell.name)} | "
        if cell.key not in results:
            lines.append(start + "not run" + " |" * (len(scores) + 1))
            continue
        rate = next(iter(results[cell.key].values()))["learning_rate"]
        mark = "*" if rate in (rates[0], rates[-1]) else ""
        values = [number(*seed_mean(results, cell.key, score)) for score in scores]
        lines.append(start + " | ".join(values) + f" | {rate:g}{mark} |")
    return lines


def table_page(name: str, results: Results, bounds: dict, rates: list[float]) -> str:
    """The text of OUT/NAME.md."""
    table, lines = TABLES[name], []
    for scores in table.scores:
        lines += table_lines(table, scores, results, rates)
        for policy in ("base", "pi* beta=0.5"):
            row = bounds[f"golden {policy}" if name == "golden" else policy]
            values = [f"{row[score]:.3g}" for score in scores]
            lines.append(f"| | {policy} | " + " | ".join(values) + " | |")
        lines.append("")
    seeds = sorted({len(results[cell.key]) for cell in table.cells if cell.key in results})
    lines.append(f"Mean ± half-width of the 95 % t interval over {' or '.join(map(str, seeds))} "
                 "seeds (data, order and initialisation drawn anew; it says nothing of other "
                 "prompts); 40 prompts that no objective trained on, exact over 288 answers each."
                 + SCORES_EXPLAINED)
    return "\n".join([f"# {table.title}\n", table.caveat + "\n", *lines]) + "\n"


# ---- claims -------------------------------------------------------------------------------------

def verdict_of(results: Results, claim: Claim) -> tuple[float, float, str]:
    """(mean difference better - worse, its half-width, verdict), paired by seed."""
    better, worse = results[claim.better.key], results[claim.worse.key]
    mean, half = seed_interval([better[seed][claim.score] - worse[seed][claim.score]
                                for seed in sorted(set(better) & set(worse))])
    gain = -mean if claim.score in SMALLER_IS_BETTER else mean
    verdict = "holds" if gain > half else "fails" if gain < -half else "undecided"
    return mean, half, verdict


def claims_table(results: Results) -> tuple[list[str], dict[str, int]]:
    """(lines of Markdown, how many claims hold, fail and are undecided); claims without runs go."""
    lines = ["| source | claim | data | score | difference | verdict |", "|---" * 6 + "|"]
    counts = {"holds": 0, "fails": 0, "undecided": 0}
    for claim in CLAIMS:
        if claim.better.key not in results or claim.worse.key not in results:
            continue
        mean, half, verdict = verdict_of(results, claim)
        counts[verdict] += 1
        data = DATA_LABEL[claim.better.data]
        if claim.worse.data != claim.better.data:
            data += " against " + DATA_LABEL[claim.worse.data]
        lines.append(f"| {claim.source} | {claim.words} | {data} | {shown(claim.score)} | "
                     f"{number(mean, half)} | **{verdict}** |")
    return lines, counts


# ---- the page that lists everything -------------------------------------------------------------

README_START = """# What holds on a world whose true reward is known

Written by `make reproduce`; do not edit. {runs} runs in `runs.jsonl` (torch {torch}, Python
{python}, one thread a run), tuning runs (seed 0) among them.

The papers' claims about methods are taken as hypotheses about objectives, and tried on the embedded
world (`world.py`), where the reward of every possible answer is known and every score is computed,
not judged. Each method's learning rate was tuned with the same budget: one run for each of 1e-4,
3e-4, 1e-3, 3e-3, 1e-2, the best E[r] on 12 training prompts wins. Then five seeds, each with data
of its own: 2,432 labelled answers (fewer where a table says so), one epoch, 32 answers (16 pairs) a
step, beta 0.5, LoRA r 8 on every layer. RLHF: a reward model of 2 epochs at 3e-3, then 40 steps of
PPO with 76 answers each; only PPO's learning rate was tuned. The 40 test prompts are known to the
base model, to no objective.

Of {total} claims {holds} hold, {fails} fail and {undecided} are undecided. A difference is that of
the two cells seed by seed, mean ± 95 % t interval over 5 seeds; at 95 %, one verdict in twenty may
be chance, and the claims are not independent. E[r]: true reward, nats.

What this cannot say: how large a gain is on a real language model, whether real labels follow
Eq. 6, and what happens where answers cannot be listed. What it can: which objective turns the same
labels into more reward, and where the rest of its probability goes.
"""


def write_report(out: str) -> None:
    """Write every table and figure that has runs, and README.md."""
    rows, bounds = read_rows(out), read_bounds(out)
    results, rates = by_cell(rows), sorted({row["learning_rate"] for row in rows})
    written, complete = [], []
    for name, table in TABLES.items():
        has_runs = [cell.key in results for cell in table.cells]
        if any(has_runs):
            write_text(os.path.join(out, f"{name}.md"), table_page(name, results, bounds, rates))
            written.append(name)
        if all(has_runs):
            complete.append(name)
    figures = draw(out, complete, results, bounds)
    lines, counts = claims_table(results)
    start = README_START.format(runs=len(rows), torch=bounds["torch"], python=bounds["python"],
                                total=sum(counts.values()), **counts)
    text = [start, *lines, "", "## Tables\n",
            *(f"- [{TABLES[name].title}]({name}.md)"
              + ("" if name in complete else " (not complete)") for name in written),
            "", "## Figures\n",
            *(f"![{caption}]({file})\n\n{caption}\n" for file, caption in figures)]
    write_text(os.path.join(out, "README.md"), "\n".join(text))
    print(f"{out}/README.md: {len(complete)} of {len(TABLES)} tables complete, {len(figures)} "
          f"figures, {counts['holds']} claims hold, {counts['fails']} fail, {counts['undecided']} "
          "undecided")
