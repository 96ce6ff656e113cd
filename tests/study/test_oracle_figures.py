"""Every figure of results/ is drawn from its rows, to the same bytes; needs matplotlib."""
import shutil

import pytest
from conftest import ROOT

from study.exact import write
from study.figures import FIGURES
from study.report import write_report

pytest.importorskip("matplotlib")


def test_every_figure_is_drawn_again_to_the_same_bytes(tmp_path):
    shutil.copy(ROOT / "results/runs.jsonl", tmp_path)
    write_report(str(tmp_path))
    write(str(tmp_path))
    for name in (*FIGURES, "exact"):
        for kind in ("png", "svg"):
            file = f"{name}.{kind}"
            assert (tmp_path / file).read_bytes() == (ROOT / "results" / file).read_bytes(), file
    assert (tmp_path / "README.md").read_text() == (ROOT / "results/README.md").read_text()
