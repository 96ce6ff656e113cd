"""results/: tables, figures and verdicts, made of the rows in OUT/runs.jsonl alone.

    README.md      the hypotheses, every claim of the papers, the rest
    TABLE.md       a table's cells; exact.md: optima (exact.py)
    *.png, *.svg   figures (figures.py; they need matplotlib)
"""
import math
import os
from collections.abc import Callable, Sequence
from statistics import median

from files.text import write_text
from study.claims import PAPER_CLAIMS, PRIMARY, QUESTIONS, UNTESTED
from study.optima import OPTIMA, ceiling, mean_optimum
from study.pages import SCORES_EXPLAINED, START, headline, not_run
from study.figures import draw
from study.rows import Key, Study, mean_rewards, read_rows, sort_rows
from study.statistics import (
    MARGIN,
    SHARES,
    Claim,
    Comparison,
    benjamini_hochberg,
    clipped,
    compare,
    holm,
    on_path,
    verdict,
)
from study.runs import BETA, Cell
from study.tables import (
    DATA_LABEL,
    SAME_LIMIT,
    SHOWN,
    TABLES,
    Table,
    dial,
    dial_rows,
    method_label,
    shown,
    tuned_second_step,
)
from study.tuning import plateau


def escaped(score: str) -> str:
    """A score's name without |, which would end a table's cell."""
    return score.replace("||", "‖")


def plain(value: float, decimals: int = 2) -> str:
    """A number without the sign of a rounded zero.

    Rounded to 9 decimals first: the last bits, which differ between processors, decide no digit.
    """
    if value == math.inf:
        return "∞"
    return f"{round(round(value, 9), decimals) + 0.0:.{decimals}f}"


def of_score(score: str, value: float) -> str:
    """A value of a score: a share with three decimals, anything else with two."""
    return plain(value, 3 if score.startswith(SHARES) else 2)


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table, and an empty one."""
    return ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|",
            *("| " + " | ".join(row) + " |" for row in rows), ""]


# ---- tables -------------------------------------------------------------------------------------

def shown_score(study: Study, key: Key, score: str) -> str:
    """mean [95 % t interval] over seeds; of a cell that diverged the median (smallest to largest).
    """
    if any(score not in row for row in study.results[key].values()):
        return "–"                                       # not kept when these runs were made
    values = list(study.values(key, score).values())
    if len(values) == 1:
        return of_score(score, values[0])
    if study.diverged(key):
        return f"median {of_score(score, median(values))} ({of_score(score, min(values))} to " \
               f"{of_score(score, max(values))})"
    mean, low, high = (of_score(score, number) for number in clipped(values, score))
    return f"{mean} [{low}, {high}]"


def table_lines(table: Table, scores: Sequence[str], study: Study) -> list[str]:
    """One row per cell, then base and pi* of every base model that the cells started from."""
    rows, bases = [], {}                         # dict: every base once, in the order of the rows
    for cell in table.cells:
        start = [DATA_LABEL[cell.data], method_label(cell.name)]
        if not study.has(cell.key):
            rows.append([*start, "not run", *[""] * (len(scores) + 1)])
            continue
        results = study.results[cell.key].values()
        bases |= dict.fromkeys(row["runs"] for row in results)
        rates = sorted({row["learning_rate"] for row in results})
        rows.append([*start, *(optimum_shown(cell) if score == "optimum" else
                               shown_score(study, cell.key, score) for score in scores),
                     ", ".join(f"{rate:g}" for rate in rates), str(len(results))])
    data = {cell.data for cell in table.cells}
    golden, chosen = data == {"golden"}, len(data) == 1          # whose chosen answers
    for folder in bases:
        for name in ("base", "pi* beta=0.5"):
            row = study.bounds[folder]["golden " * golden + name]
            rows.append(["", name, *(
                f"{0 if abs(row[score]) < 1e-12 else row[score]:.3g}"
                if score in row and (chosen or not score.endswith("/chosen")) else "–"
                for score in scores), "", ""])
    return markdown(("data", "method", *map(escaped, scores), "rate", "seeds"), rows)


def optimum_shown(cell: Cell) -> str:
    """E[r] of the optimum of a cell's objective, at its beta, with infinite data."""
    data, beta = SAME_LIMIT.get(cell.data, cell.data), dict(cell.flags).get("beta", BETA)
    if cell.method not in OPTIMA or data not in OPTIMA[cell.method][0]:
        return "–"
    row = mean_optimum(data, cell.method, beta, after=cell.after and cell.after.method)
    return "none: unbounded" if row is None else plain(row["E[r]"])


def dial_lines(study: Study, show: Callable[[Key], str]) -> list[list[str]]:
    """A row for every method of the dial: what it reached for each kind of demonstrations, and, in
    brackets, its optimum."""
    rows = []
    for cells in dial_rows():
        if any(study.has(cell.key) for cell in cells):
            rows.append([method_label(cells[0].name), *(
                f"{show(cell.key)} ({optimum_shown(cell)})"
                if study.has(cell.key) else "not run" for cell in cells)])
    return rows


def dial_table(study: Study) -> list[str]:
    return markdown(("E[r] reached (optimum)", *(DATA_LABEL[data] for data in SHOWN)),
                    dial_lines(study, lambda key: shown_score(study, key, "E[r]")))


def rate_lines(study: Study) -> list[str]:
    """The dial's rates, which were written down, beside those that tuning takes now."""
    rows = []
    for cell in [cell for cell in TABLES["dial"].cells if cell.key in study.tuning]:
        rewards = mean_rewards(study, cell.key)
        tuned = plateau(rewards)
        written = [f"{cell.rate:g}", plain(rewards[cell.rate])] if cell.rate else ["–", "–"]
        rows.append([DATA_LABEL[cell.data], method_label(cell.name), *written, f"{tuned:g}",
                     plain(rewards[tuned]),
                     f"{min(rewards):g} to {max(rewards):g}"])
    heads = ("data", "method", "rate written down", "E[r] there", "rate tuning takes",
             "E[r] there", "tried")
    return ["## Learning rates\n", *markdown(heads, rows), "E[r] on 24 training prompts, mean of "
            "two tuning runs; test runs use the rate that was written down, where one was.\n"]


def equal_kl_lines(study: Study) -> list[str]:
    """E[r] at the same KL, on the path from the base to the end of every run that gets so far."""
    levels, rows = (0.1, 0.25, 0.5, 1.0, 2.0), []
    for data in SHOWN:
        for cell in dial(data):
            runs = study.results.get(cell.key, {}).values()
            row = [DATA_LABEL[cell.data], method_label(cell.name)]
            for level in levels:
                rewards = [on_path(run["path"], level) for run in runs
                           if run["path"][-1][0] >= level]
                mean = plain(sum(rewards) / len(rewards)) if rewards else "–"
                row.append(mean + (f" (n {len(rewards)})" if 0 < len(rewards) < len(runs) else ""))
            rows.append(row)
    rows.append(["", "pi*, from the habits", *(plain(ceiling(level)) for level in levels)])
    return ["## E[r] at equal KL(pi‖ref)\n", *markdown(
        ("data", "method", *(f"{level:g} nats" for level in levels)), rows),
        "On the policies pi_ref^(1-a) pi^a between the base and a run's end. –: no run gets so "
        "far; n: as many of the runs do.\n"]


def table_page(name: str, study: Study) -> str:
    """The text of OUT/NAME.md."""
    table = TABLES[name]
    lines = [f"# {table.title}\n", table.caveat + "\n"]
    if name == "dial":
        lines += [*dial_table(study), *equal_kl_lines(study), *rate_lines(study)]
    for scores in table.scores:
        lines += table_lines(table, scores, study)
    return "\n".join([*lines, SCORES_EXPLAINED])


# ---- claims -------------------------------------------------------------------------------------

Found = list[tuple[Claim, Comparison, float, str]]          # …, adjusted p, verdict


def try_claims(study: Study, claims: Sequence[Claim],
               adjust: Callable[[Sequence[float]], list[float]]) -> Found:
    """What came out of every claim whose cells have two seeds or more, all of one base model."""
    def can_be_tried(claim: Claim) -> bool:
        if not study.has(*claim.keys):
            return False
        parts = [study.results[key].values() for key in claim.keys]
        rows = [row for part in parts for row in part]
        return (min(map(len, parts)) > 1 and len({row["runs"] for row in rows}) == 1
                and all(claim.score in row or claim.score == "instability" for row in rows))

    tried = [claim for claim in claims if can_be_tried(claim)]
    found = [compare(study, claim) for claim in tried]
    adjusted = adjust([comparison.p for comparison in found])
    return [(claim, comparison, p, verdict(claim, comparison, p))
            for claim, comparison, p in zip(tried, found, adjusted, strict=True)]


def exploratory(study: Study) -> Found:
    """All but the primary hypotheses: one family of Benjamini and Hochberg."""
    return try_claims(study, PAPER_CLAIMS + QUESTIONS, benjamini_hochberg)


def p_shown(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def effect_shown(claim: Claim, found: Comparison) -> str:
    mean, low, high = (of_score(claim.score, value)
                       for value in (found.mean, found.low, found.high))
    return f"{mean} [{low}, {high}]"


def over_verbs_shown(claim: Claim, found: Comparison) -> str:
    if found.over_verbs is None:
        return "–"
    low, high = (of_score(claim.score, value) for value in found.over_verbs)
    return f"[{low}, {high}]"


def claim_lines(found: Found, correction: str) -> list[str]:
    """A table of claims: difference, interval, p-values, verdict."""
    rows = [[claim.source, claim.words, escaped(claim.score), effect_shown(claim, comparison),
             over_verbs_shown(claim, comparison), str(len(comparison.differences)),
             p_shown(comparison.p), p_shown(p),
             p_shown(comparison.flip_p), f"**{word}**"]
            for claim, comparison, p, word in found]
    return markdown(("source", "claim", "score", "difference [95 %]", "over seeds and verbs", "n",
                     "p", f"p, {correction}", "p, sign-flip", "verdict"), rows)


def count_words(found: Found) -> str:
    counts = {word: sum(row[3] == word for row in found)
              for word in ("holds", "fails", "undecided")}
    return "{holds} hold, {fails} fail, {undecided} are undecided".format(**counts)


def second_step_lines(study: Study, found: Found) -> list[str]:
    """What becomes of primary 5 where DPO's rate after SFT is tuned; no line before that is run."""
    written, tuned = shown("shown-16", "dpo", "sft"), tuned_second_step("shown-16")
    keys = [shown("shown-16", "ulma").key, tuned.key]
    for claim, comparison, *_ in found:
        if claim.keys == keys:
            rate = next(iter(study.results[tuned.key].values()))["learning_rate"]
            return [f"Primary 5 is about DPO at the rate that was written down, {written.rate:g}: "
                    "the one of DPO without SFT. At the rate that tuning takes after SFT, "
                    f"{rate:g}, the difference is {effect_shown(claim, comparison)} "
                    "(exploratory).\n"]
    return []


# ---- the page that lists everything -------------------------------------------------------------

def readme(study: Study, runs: int, written: Sequence[str],
           figures: Sequence[tuple[str, str]]) -> str:
    """The text of OUT/README.md."""
    primary = try_claims(study, PRIMARY, holm)
    rest = exploratory(study)
    papers = [row for row in rest if row[0] in PAPER_CLAIMS]
    own = [row for row in rest if row[0] in QUESTIONS]
    captions = dict(figures)
    lines = ["# What holds on a world whose true reward is known\n",
             headline(study, count_words(papers))]
    if "dial.png" in captions:
        lines += ["![" + captions["dial.png"] + "](dial.png)\n", captions["dial.png"] + "\n"]
    lines += ["## Primary hypotheses, written down before their runs\n",
              *claim_lines(primary, "Holm"), *second_step_lines(study, rest),
              START.format(runs=runs, margin=MARGIN),
              "## Where each objective ends with infinite data, and where its runs ended\n",
              *dial_table(study), "All optima, over beta and labels: [exact.md](exact.md).\n",
              f"## Every claim of the two papers (exploratory): {count_words(papers)}\n",
              *claim_lines(papers, "BH"),
              *markdown(("source", "claim", "not tested here, because"), UNTESTED),
              f"## Questions of our own (exploratory): {count_words(own)}\n",
              *claim_lines(own, "BH"), not_run(study), "## Tables\n",
              "- [What each objective wants](exact.md)",
              *(f"- [{TABLES[name].title}]({name}.md)" for name in written), "", "## Figures\n",
              *(f"![{caption}]({file})\n\n{caption}\n" for file, caption in figures
                if file != "dial.png")]
    return "\n".join(lines).rstrip() + "\n"


def write_report(out: str) -> None:
    """Write every table and figure that has runs, and README.md."""
    rows = read_rows(out)
    if not rows:
        raise FileNotFoundError(f"{out}/runs.jsonl: no run to report")
    study = sort_rows(rows)
    has_runs = {name: [study.has(cell.key) for cell in table.cells]
                for name, table in TABLES.items()}
    started = [name for name, cells in has_runs.items() if any(cells)]
    written = [name for name in started if all(has_runs[name])]
    for name in started:
        write_text(os.path.join(out, f"{name}.md"), table_page(name, study))
    figures = draw(out, study, try_claims(study, PRIMARY, holm) + exploratory(study))
    runs = sum(row["data"] != "bounds" for row in rows)
    write_text(os.path.join(out, "README.md"), readme(study, runs, started, figures))
    print(f"{out}/README.md: {len(written)} of {len(TABLES)} tables complete, {len(figures)} "
          "figures")
