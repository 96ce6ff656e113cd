"""study/exact.py: the page's cells, its claims, and the ceiling."""
import pytest

from study import exact
from study.exact import ceiling, cell_of, claims, mean_optimum, plain, reward_shown, table, wanted
from study.runs import Cell


def test_the_ceiling_is_the_pi_star_with_the_same_kl():
    row = mean_optimum("hh", "pi*", 0.5)
    assert ceiling(row["KL(pi||ref)"]) == pytest.approx(row["E[r]"], abs=1e-6)
    ulma = mean_optimum("hh", "ulma")
    assert ulma["E[r]"] < ceiling(ulma["KL(pi||ref)"])


def test_cells_say_why_there_is_no_optimum():
    assert cell_of("hh", "unlikelihood", 0.5, reward_shown) == "none: unbounded"
    assert cell_of("red-team", "d2o K=1", 0.5, reward_shown) == "none: many"
    assert cell_of("negatives", "ulma", 0.5, reward_shown) == "–"
    assert cell_of("negatives", "negative_dpo", 0.5, reward_shown) == "-5.38 (off-world 1.00)"
    assert plain(-0.001) == "0.00" and plain(float("inf")) == "∞"
    assert table(("a", "b"), [("1", "2")]) == ["| a | b |", "|---|---|", "| 1 | 2 |", ""]


def test_claims_are_compared_with_what_was_measured(monkeypatch):
    monkeypatch.setattr(exact, "CLAIMS", exact.CLAIMS[:4])          # ULMA against four on HH-like
    # DPO on points is solved on the points, whose pairs it gets; methods with flags are left out.
    assert wanted(Cell("qa-pairs", "dpo")) == mean_optimum("qa", "dpo")["E[r]"]
    assert wanted(Cell("qa", "ulma", (("reduction", "class"),))) is None
    assert wanted(Cell("hh", "unlearning")) is None
    results = {("hh", "ulma"): {seed: {"E[r]": 1.0} for seed in (1, 2)},
               ("hh", "sft"): {seed: {"E[r]": 0.0} for seed in (1, 2)},
               ("hh", "dpo"): {seed: {"E[r]": 0.5} for seed in (1, 2)}}
    lines, counts = claims(results)
    assert "| ULMA 5.2 | ULMA beats SFT | HH-like pairs | 0.40 | **holds** | 1.000 ± 0.000 | " \
           "holds |" in lines
    assert counts == {"decided": 2, "as measured": 1, "against": 1, "undecided": 0, "ties": 0}
