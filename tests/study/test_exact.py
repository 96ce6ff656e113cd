"""study/exact.py: the page's cells, its claims, and the ceiling."""
import pytest

from test_statistics import rows_of

from study.exact import cell_of, claims, reward_shown, wanted
from study.optima import ceiling, mean_optimum
from study.report import markdown
from study.rows import sort_rows


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
    assert markdown(("a", "b"), [("1", "2")]) == ["| a | b |", "|---|---|", "| 1 | 2 |", ""]


def test_claims_are_compared_with_what_was_measured():
    # DPO on points is solved on the points, whose pairs it gets; methods with flags are left out.
    assert wanted(("qa-pairs", "dpo")) == mean_optimum("qa", "dpo")["E[r]"]
    assert wanted(("qa", "ulma reduction=class")) is None and wanted(("hh", "unlearning")) is None
    study = sort_rows(rows_of({("hh", "ulma"): [1.0] * 2, ("hh", "sft"): [0.0] * 2,
                               ("hh", "dpo"): [0.5] * 2}))
    lines, counts = claims(study)
    assert "| ULMA 5.2 (ii) | HH-like: ULMA beats SFT | 0.40 | **holds** | 1.00 [1.00, 1.00] | " \
           "holds |" in lines
    assert counts == {"decided": 2, "as measured": 1, "against": 1, "undecided": 0, "ties": 0}
