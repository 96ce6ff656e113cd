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
from study.rows import Key, Study, read_rows, sort_rows
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
    method_label,
    shown,
)


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
    values, decimals = list(study.values(key, score).values()), 3 if score.startswith(SHARES) else 2
    if len(values) == 1:
        return plain(values[0], decimals)
    if study.diverged(key):
        return f"median {plain(median(values), decimals)} ({plain(min(values), decimals)} to " \
               f"{plain(max(values), decimals)})"
    mean, low, high = (plain(number, decimals) for number in clipped(values, score))
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
    golden = {cell.data for cell in table.cells} == {"golden"}
    for folder in bases:
        for name in ("base", "pi* beta=0.5"):
            row = study.bounds[folder]["golden " * golden + name]
            rows.append(["", name, *(f"{row[score]:.3g}" if score in row else "–"
                                     for score in scores), "", ""])
    return markdown(("data", "method", *map(escaped, scores), "rate", "seeds"), rows)


def optimum_shown(cell: Cell) -> str:
    """E[r] of the optimum of a cell's objective, at its beta, with infinite data."""
    data, beta = SAME_LIMIT.get(cell.data, cell.data), dict(cell.flags).get("beta", BETA)
    if cell.method not in OPTIMA or data not in OPTIMA[cell.method][0]:
        return "–"
    row = mean_optimum(data, cell.method, beta, after=cell.after and cell.after.method)
    return "none: unbounded" if row is None else plain(row["E[r]"])


def dial_rows(study: Study, show: Callable[[Key], str]) -> list[list[str]]:
    """A row for every method of the dial: what it reached for each kind of demonstrations, and, in
    brackets, its optimum."""
    rows = []
    for method, after in (("sft", None), ("kto", None), ("pointwise_dpo", None), ("ulma", None),
                          ("dpo", None), ("ulma", "sft"), ("dpo", "sft")):
        cells = [shown(how, method, after) for how in SHOWN]
        if any(study.has(cell.key) for cell in cells):
            rows.append([method_label(cells[0].name), *(
                f"{show(cell.key)} ({optimum_shown(cell)})"
                if study.has(cell.key) else "not run" for cell in cells)])
    return rows


def dial_table(study: Study) -> list[str]:
    return markdown(("E[r] reached (optimum)", *(DATA_LABEL[f"shown-{how}"] for how in SHOWN)),
                    dial_rows(study, lambda key: shown_score(study, key, "E[r]")))


def equal_kl_lines(study: Study) -> list[str]:
    """E[r] at the same KL, on the path from the base to the end of every run that gets so far."""
    levels, rows = (0.1, 0.25, 0.5, 1.0, 2.0), []
    for how in SHOWN:
        for cell in dial(how):
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
        lines += [*dial_table(study), *equal_kl_lines(study)]
    for scores in table.scores:
        lines += table_lines(table, scores, study)
    return "\n".join([*lines, SCORES_EXPLAINED])


# ---- claims -------------------------------------------------------------------------------------

Found = list[tuple[Claim, Comparison, float, str]]          # …, adjusted p, verdict


def try_claims(study: Study, claims: Sequence[Claim],
               adjust: Callable[[Sequence[float]], list[float]]) -> Found:
    """What came out of every claim whose cells have two seeds or more, all of one base model."""
    tried = [claim for claim in claims if study.has(*claim.keys)
             and min(len(study.results[key]) for key in claim.keys) > 1
             and len({row["runs"] for key in claim.keys
                      for row in study.results[key].values()}) == 1]
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
    decimals = 3 if claim.score.startswith(SHARES) else 2
    mean, low, high = (plain(value, decimals) for value in (found.mean, found.low, found.high))
    return f"{mean} [{low}, {high}]"


def claim_lines(found: Found, correction: str) -> list[str]:
    """A table of claims: difference, interval, p-values, verdict."""
    rows = [[claim.source, claim.words, escaped(claim.score), effect_shown(claim, comparison),
             str(len(comparison.differences)), p_shown(comparison.p), p_shown(p),
             p_shown(comparison.flip_p), f"**{word}**"]
            for claim, comparison, p, word in found]
    return markdown(("source", "claim", "score", "difference [95 %]", "n", "p", f"p, {correction}",
                     "p, sign-flip", "verdict"), rows)


def count_words(found: Found) -> str:
    counts = {word: sum(row[3] == word for row in found)
              for word in ("holds", "fails", "undecided")}
    return "{holds} hold, {fails} fail, {undecided} are undecided".format(**counts)


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
              *claim_lines(primary, "Holm"), START.format(runs=runs, margin=MARGIN),
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
