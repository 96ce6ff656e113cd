"""study/report.py and rows.py: tables of what is done, rows replaced, verdicts shown."""
from test_statistics import rows_of

from study.optima import mean_optimum
from study.report import (
    optimum_shown,
    plain,
    shown_score,
    table_lines,
    try_claims,
    write_report,
)
from study.rows import read_rows, save_rows, sort_rows
from study.statistics import Claim, holm
from study.tables import TABLES, at_beta, like, shown

BOUNDS = [{"data": "bounds", "method": name, "seed": 0, "runs": "w"}
          for name in ("base", "pi* beta=0.5")]


def all_scores(rows: list[dict]) -> list[dict]:
    """Rows with every score of every table: the number that E[r] is."""
    scores = {score for table in TABLES.values() for group in table.scores for score in group}
    return [dict.fromkeys(sorted(scores), row.get("E[r]", 0.5)) | row for row in rows]


def test_the_report_is_written_from_rows_alone_and_leaves_out_what_is_not_done(tmp_path, capsys):
    rows = all_scores(rows_of({cell.key: [0.25, 0.35, 0.15] for name in ("qa", "z")
                               for cell in TABLES[name].cells}) + BOUNDS)
    stale = rows_of({("qa", "ulma"): [9.0, 9.0, 9.0]})[:1]
    save_rows(str(tmp_path), all_scores(stale))
    save_rows(str(tmp_path), rows)                          # in place of those
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == len(rows)
    write_report(str(tmp_path))
    assert f"2 of {len(TABLES)} tables complete" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.glob("*.md")) == [
        "README.md", "ablation.md", "qa.md", "z.md"]
    readme, table = (tmp_path / "README.md").read_text(), (tmp_path / "qa.md").read_text()
    line = "| QA-like: ULMA beats SFT | E[r] | 0.00 [0.00, 0.00] | – | 3 | 1.000 | 1.000 |"
    assert line in readme
    assert "| QA-like points | ULMA | 0.25 [0.00, 0.50] |" in table    # t_2 s / sqrt(3) = 0.248
    assert "| HH-like pairs | SFT | not run |" in (tmp_path / "ablation.md").read_text()


def test_a_cell_that_is_only_tuned_keeps_its_test_runs(tmp_path):
    # Bug this catches: a table that asks for no more than another cell's learning rate (balance, of
    # the cells of qa) took that cell's five seeds out of the file, and qa was "not complete".
    tested = rows_of({("qa", "ulma"): [0.5, 0.6, 0.4]})
    tuning = [row | {"seed": 0, "E[r]": value} for row in tested[:1] for value in (0.1, 0.2)]
    save_rows(str(tmp_path), tested + tuning[:1])
    save_rows(str(tmp_path), tuning)
    rows = read_rows(str(tmp_path))
    assert sorted(row["E[r]"] for row in rows) == [0.1, 0.2, 0.4, 0.5, 0.6]
    assert len(sort_rows(rows).results["qa", "ulma"]) == 3


def test_bounds_of_two_bases_stand_side_by_side_while_both_have_runs(tmp_path):
    for folder, method in (("w", "a"), ("v", "b"), ("v", "a")):
        save_rows(str(tmp_path), rows_of({("x", method): [0.5, 0.6]}, folder)
                  + [row | {"runs": folder} for row in BOUNDS])
        bases = sorted(sort_rows(read_rows(str(tmp_path))).bounds)
        assert bases == {"wa": ["w"], "vb": ["v", "w"], "va": ["v"]}[folder + method]


def test_a_cell_that_left_the_world_shows_its_median():
    rows = rows_of({("x", "a"): [1.0, -5.0, 2.0], ("x", "b"): [0.25]})
    for row in rows:
        row["off-world"] = 0.9 if row["E[r]"] < 0 else 0.01
    study = sort_rows(rows)
    assert shown_score(study, ("x", "a"), "E[r]") == "median 1.00 (-5.00 to 2.00)"
    assert shown_score(study, ("x", "b"), "E[r]") == "0.25"
    assert shown_score(study, ("x", "b"), "entropy") == "–"
    assert plain(-0.001) == "0.00" and plain(float("inf")) == "∞"
    assert plain(3.335) == plain(3.335000000000001) == "3.33"


def test_base_and_optimum_stand_once_for_every_base_that_runs_started_from():
    # Bug this catches: they stood once for every seed of the first cell.
    table = TABLES["z"]
    rows = all_scores(rows_of({cell.key: [0.1, 0.2, 0.3] for cell in table.cells})
                      + BOUNDS + [row | {"runs": "v"} for row in BOUNDS])
    for row in rows:
        if row["method"] == table.cells[-1].name:
            row["runs"] = "v"
    lines = table_lines(table, ("E[r]",), sort_rows(rows))
    assert [line.split(" | ")[1] for line in lines[-5:-1]] == ["base", "pi* beta=0.5"] * 2
    assert len(lines) == 2 + len(table.cells) + 4 + 1


def test_the_optimum_beside_a_cell_is_that_of_its_beta_and_of_endless_data():
    assert optimum_shown(at_beta("ulma", 2)) == plain(mean_optimum("hh", "ulma", 2)["E[r]"])
    assert optimum_shown(like(shown("hh", "ulma"), "size-four", 3)) == plain(
        mean_optimum("hh", "ulma")["E[r]"])
    assert optimum_shown(like(shown("hh", "dpo"), "noise-30")) == plain(
        mean_optimum("noise-30", "dpo")["E[r]"])
    assert optimum_shown(shown("hh", "dpo", "sft")) == plain(
        mean_optimum("hh", "dpo", after="sft")["E[r]"])
    assert optimum_shown(shown("hh", "kto")) == "–"


def test_claims_without_two_seeds_of_every_cell_are_left_out():
    study = sort_rows(rows_of({("x", "a"): [1.0, 2.0], ("x", "b"): [0.0, 0.5], ("x", "c"): [0.0]}))
    claims = [Claim("", "", ("x", "a"), ("x", other)) for other in "bcd"]
    assert [row[0] for row in try_claims(study, claims, holm)] == claims[:1]
    study.results["x", "b"][1]["runs"] = "another base"
    assert not try_claims(study, claims, holm)


def test_fewer_seeds_asked_for_take_none_away(tmp_path):
    # Seeds 1 to 3 at one rate; then seed 1 anew, and another cell: 2 and 3 stay. At another rate, or
    # from another base, they would be another cell's.
    key, other = ("hh", "ulma"), ("hh", "dpo")
    save_rows(str(tmp_path), rows_of({key: [1.0, 2.0, 3.0]}))
    again = rows_of({key: [9.0], other: [4.0]})
    save_rows(str(tmp_path), again)

    def rewards():
        return sort_rows(read_rows(str(tmp_path))).results
    assert {seed: row["E[r]"] for seed, row in rewards()[key].items()} == {1: 9.0, 2: 2.0, 3: 3.0}
    for change in ({"learning_rate": 0.5}, {"runs": "another"}):
        save_rows(str(tmp_path), rows_of({key: [1.0, 2.0, 3.0]}))
        save_rows(str(tmp_path), [row | change for row in rows_of({key: [9.0]})])
        assert list(rewards()[key]) == [1]
