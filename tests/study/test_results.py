"""results/ and README.md: every number follows from results/runs.jsonl, recomputed here."""
import shutil

import pytest
import torch
from conftest import ROOT

from study import exact, figures
from study.__main__ import plateau
from study.optima import mean_optimum
from study.report import dial_table, write_report
from study.rows import read_rows, sort_rows
from study.tables import RATES, SHOWN, TABLES, shown

RESULTS = ROOT / "results"


@pytest.fixture(scope="module")
def study():
    return sort_rows(read_rows(str(RESULTS)))


def test_every_page_is_written_again_from_the_rows_alone(tmp_path, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr("study.report.draw", lambda *_: [
        (f"{name}.png", caption) for name, (_, caption) in figures.FIGURES.items()])
    shutil.copy(RESULTS / "runs.jsonl", tmp_path)
    write_report(str(tmp_path))
    monkeypatch.setattr(exact, "pyplot", lambda: None)
    exact.write(str(tmp_path))
    pages = sorted(path.name for path in RESULTS.glob("*.md")
                   if not path.name.startswith("real"))
    assert pages == sorted(path.name for path in tmp_path.glob("*.md"))
    for name in pages:
        assert (tmp_path / name).read_text() == (RESULTS / name).read_text(), name


def test_the_projects_readme_shows_the_dial_as_results_does(study):
    readme = (ROOT / "README.md").read_text()
    assert "\n".join(dial_table(study)) in readme
    base = study.base(shown("bt", "ulma").key)["E[r]"]
    assert f"base {base:.2f}, π*\n{mean_optimum('hh', 'pi*')['E[r]']:.2f}:" in readme


def test_rates_of_the_dial_follow_from_its_tuning_runs(study):
    for how in SHOWN:
        for method, rates in RATES.items():
            rows = study.results.get(shown(how, method).key, {}).values()
            tried = study.tuning.get(shown(how, method).key, {})
            rate = rates[0]
            if len(rates) > 1:
                assert set(tried) == set(rates)
                rate = plateau({rate: row["E[r]"] for rate, row in tried.items()})
            assert {row["learning_rate"] for row in rows} <= {rate}, (how, method)


def test_every_row_is_a_cell_of_a_table_or_its_tuning(study):
    cells = [cell for table in TABLES.values() for cell in table.cells]
    keys = {cell.key for cell in cells} | {cell.tuned_as.key for cell in cells if cell.tuned_as}
    assert set(study.results) <= keys and set(study.tuning) <= keys


def test_strength_and_limit_in_the_readme_are_those_of_the_optima():
    readme = " ".join((ROOT / "README.md").read_text().split())
    ends = {(method, how): mean_optimum(f"shown-{how}", method)["E[r]"]
            for method in ("sft", "ulma", "dpo") for how in SHOWN}
    gains = [f"{ends['ulma', how] - ends['sft', how] + 0.0:.2f}" for how in SHOWN]
    assert f"{', '.join(gains[:3])} and {gains[3]} nats" in readme
    mixed = [mean_optimum("mixture", method)["E[r]"] for method in ("ulma", "sft")]
    assert f"{mixed[0]:.2f} against {mixed[1]:.2f} on demonstrations mixed" in readme
    assert f"ends at {ends['ulma', 'bt']:.2f} nats, however many there are" in readme
    assert f"DPO at {ends['dpo', 'bt']:.2f}" in readme
