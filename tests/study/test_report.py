"""study/report.py and rows.py: verdicts by hand, rows replaced, tables of what is done."""
import json

import pytest
import torch

from study.report import verdict_of, write_report
from study.rows import by_cell, read_rows, save_rows
from study.runs import Cell
from study.tables import CLAIMS, TABLES, Claim


def rows_of(cells: dict) -> list[dict]:
    """Rows from {(data, method): [E[r] of seeds 1, 2, ...]}; other scores are the same number."""
    scores = {score for table in TABLES.values() for group in table.scores for score in group}
    scores |= {claim.score for claim in CLAIMS}
    return [{"data": data, "method": method, "seed": seed, "learning_rate": 1e-3, "runs": "w"}
            | dict.fromkeys(sorted(scores), value) for (data, method), values in cells.items()
            for seed, value in enumerate(values, 1)]


def test_verdicts_by_hand():
    # Differences 1 2 3: mean 2, s = 1, t_2 = 4.303, so 2 ± 2.484: undecided. 2 2 2.1: holds.
    # Paired: the seeds differ by far more than the methods.
    results = by_cell(rows_of({("hh", "a"): [11, 102, 1003], ("hh", "b"): [10, 100, 1000],
                               ("hh", "c"): [9, 100, 1000.9]}))

    def verdict(better, worse, score):
        return verdict_of(results, Claim("", "", Cell("hh", better), Cell("hh", worse), score))

    assert verdict("a", "b", "E[r]") == (pytest.approx(2), pytest.approx(2.484, abs=1e-3),
                                         "undecided")
    assert verdict("a", "c", "E[r]")[2] == "holds"
    assert verdict("c", "a", "E[r]")[2] == "fails"
    assert verdict("a", "c", "harmful")[2] == "fails"      # smaller is better


def test_the_report_is_written_from_rows_alone_and_leaves_out_what_is_not_done(tmp_path, capsys):
    rows = rows_of({cell.key: [0.5, 0.6, 0.4] for name in ("qa", "z")
                    for cell in TABLES[name].cells})
    bounds = {name: rows[0] for name in ("base", "pi* beta=0.5")}
    stale = rows_of({("qa", "ulma"): [9.0, 9.0, 9.0]})[:1] + [rows[0] | {"data": "hh", "runs": "v"}]
    save_rows(str(tmp_path), stale, bounds)
    save_rows(str(tmp_path), rows, bounds)                  # in place of those
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == len(rows)
    write_report(str(tmp_path))
    assert "2 of 11 tables complete" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.glob("*.md")) == [
        "README.md", "ablation.md", "qa.md", "z.md"]
    readme, table = (tmp_path / "README.md").read_text(), (tmp_path / "qa.md").read_text()
    assert "| ULMA 5.2 | ULMA beats SFT | QA-like points | E[r] | 0.000 ± 0.000 | **undecided** |" \
        in readme
    assert "| QA-like points | ULMA | 0.50 ± 0.25 |" in table      # t_2 s / sqrt(3) = 0.248
    assert "| HH-like pairs | SFT | not run |" in (tmp_path / "ablation.md").read_text()
    assert json.loads((tmp_path / "bounds.json").read_text())["torch"] == torch.__version__


def test_a_cell_that_is_only_tuned_keeps_its_test_runs(tmp_path):
    # Bug this catches: a table that asks for no more than another cell's learning rate (balance, of
    # the cells of qa) took that cell's five seeds out of the file, and qa was "not complete".
    key = ("qa", "ulma")
    tested = rows_of({key: [0.5, 0.6, 0.4]})
    tuning = [row | {"seed": 0, "E[r]": value} for row in tested[:1] for value in (0.1, 0.2)]
    save_rows(str(tmp_path), tested + tuning[:1], {})
    save_rows(str(tmp_path), tuning, {})
    rows = read_rows(str(tmp_path))
    assert sorted(row["E[r]"] for row in rows) == [0.1, 0.2, 0.4, 0.5, 0.6]
    assert len(by_cell(rows)[key]) == 3
