"""results/ and README.md: every number follows from results/runs.jsonl, recomputed here."""
import re
import shutil

import pytest
import torch
from conftest import ROOT

from study import exact, figures
from study.optima import mean_optimum
from study.report import dial_table, write_report
from study.rows import TUNING_SEEDS, mean_rewards, read_rows, sort_rows
from study.tables import (
    DIRTY_D2O,
    SHOWN,
    TABLES,
    UNLEARNING,
    cells,
    d2o,
    like,
    unbalanced,
)
from study.tuning import next_rates, plateau

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
    base = study.base(("hh", "ulma"))["E[r]"]
    assert f"base {base:.2f}, π* {mean_optimum('hh', 'pi*')['E[r]']:.2f}:" in readme


def test_every_learning_rate_follows_from_the_tuning_runs_or_was_written_down(study):
    cells = [cell for table in TABLES.values() for cell in table.cells]
    for cell in dict.fromkeys(cells):
        leader = cell.tuned_as or cell
        rates = {row["learning_rate"] for row in study.results.get(cell.key, {}).values()}
        if leader.rates:
            tried = mean_rewards(study, leader.key)
            assert {*leader.rates, leader.rate or leader.rates[0]} <= set(tried), cell
            assert not next_rates(tried), cell
            assert all({row["seed"] for row in rows} == set(TUNING_SEEDS)
                       for rows in study.tuning[leader.key].values()), cell
        assert rates == {leader.rate or plateau(tried)}, cell
        if cell.after and cell.data not in SHOWN:
            assert cell.after.rate == plateau(mean_rewards(study, cell.after.key)), cell
        assert sorted(study.results[cell.key]) == list(range(1, cell.seeds + 1)), cell


def test_all_rows_are_of_one_base():
    assert len({row["runs"] for row in read_rows(str(RESULTS))}) == 1


def test_every_row_is_a_cell_of_a_table_or_its_tuning(study):
    cells = [cell for table in TABLES.values() for cell in table.cells]
    keys = {cell.key for cell in cells} | {cell.tuned_as.key for cell in cells if cell.tuned_as}
    assert set(study.results) <= keys and set(study.tuning) <= keys


def test_strength_and_limit_in_the_readme_are_those_of_the_optima(study):
    readme = " ".join((ROOT / "README.md").read_text().split())
    many, one, unlearning = (f"{study.middle(cell.key, 'E[r]'):.2f}"
                             for cell in (d2o(11), d2o(1), UNLEARNING))
    assert (f"D2O reaches {many} with 11 anchors of the base and {one} with one, unlearning "
            f"{unlearning}.") in readme
    ends = {(method, data): mean_optimum(data, method)["E[r]"]
            for method in ("sft", "ulma", "dpo") for data in SHOWN}
    gains = [f"{ends['ulma', data] - ends['sft', data] + 0.0:.2f}" for data in SHOWN]
    assert f"{', '.join(gains[:3])} and {gains[3]} nats" in readme
    mixed = [mean_optimum("mixture", method)["E[r]"] for method in ("ulma", "sft")]
    reached = [study.middle(("mixture", method), "E[r]") for method in ("ulma", "sft", "kto")]
    assert ("mixed with point-wise labels the optima are {:.2f} and {:.2f}, runs reach {:.2f} and "
            "{:.2f}, KTO's {:.2f}").format(*mixed, *reached) in readme
    assert f"ends at {ends['ulma', 'hh']:.2f} nats, however many there are" in readme
    assert f"DPO at {ends['dpo', 'hh']:.2f}" in readme


def test_learning_rates_in_the_usage_page_are_those_that_tuning_found(study):
    columns, checked = ("hh", "golden", "qa"), 0
    for line in (ROOT / "docs/usage.md").read_text().split("### Learning rates")[1].splitlines():
        name, *cells = [part.strip() for part in line.strip("|").split("|")]
        method = name.removeprefix("`").split("`")[0]
        for data, cell in zip(columns, cells, strict=False):
            if method == "dpo" and data == "qa":
                data = "qa-pairs"
            key = next((key for key in ((data, method), *study.tuning) if key in study.tuning and (
                key[0] == data and key[1].split(" ")[0] == method)), None)
            if key and cell:
                assert float(cell.split()[0]) == plateau(mean_rewards(study, key)), (method, data)
                checked += 1
        if line.startswith("## "):
            break
    assert checked >= 20


def test_figures_of_the_usage_page_are_those_of_the_rows(study):
    page = (ROOT / "docs/usage.md").read_text().split("## Which method")[1]
    lines = {name: line for line in page.splitlines()
             for name in re.findall(r"\(\.\./results/([\w-]+)\.md\)\) \|", line)}
    wanted = {
        "golden": cells("golden", "ulma", "sft", "pointwise_dpo", "dpo"),
        "hh": cells("hh", "dpo", "pointwise_dpo", "ulma", "sft"),
        "lengths": [like(cell, "longer") for cell in cells("hh", "pointwise_dpo", "ulma", "dpo")],
        "qa": cells("qa", "pointwise_dpo", "ulma", "dpo", "sft"),
        "red-team": cells("red-team", "pointwise_dpo", "ulma", "sft", "ulma_mse", "pointwise_mse"),
        "balance": [unbalanced("pointwise_dpo", 10, how) for how in ("class", "mean")],
        "d2o": [d2o(11), d2o(4), d2o(1), UNLEARNING], "dirty": [DIRTY_D2O]}
    for name, listed in wanted.items():
        if name == "hh":
            lines[name] = "".join(line for line in page.splitlines() if "results/hh.md" in line)
            listed = [*listed, *cells("hh", "rlhf")]
        for cell in listed:
            assert f"{study.middle(cell.key, 'E[r]'):.2f}" in lines[name], (name, cell.key)
    for cell in [*cells("golden-30", "ulma", "sft"), DIRTY_D2O]:
        assert f"{study.middle(cell.key, 'harmful'):.2f}" in lines["dirty"]
    assert set(lines) == set(wanted)
