"""Every figure of results/ is drawn from rows of every cell; needs matplotlib, as oracles have."""
import pytest
from test_report import rows_of

from study.figures import FIGURES
from study.report import write_report
from study.rows import save_rows
from study.tables import TABLES

pytest.importorskip("matplotlib")


def test_every_figure_is_drawn_from_rows_of_every_cell(tmp_path):
    rows = rows_of({cell.key: [0.1 * (n % 7), 0.3, 0.2] for table in TABLES.values()
                    for n, cell in enumerate(table.cells)})
    bounds = {prefix + name: rows[0] | {"KL(pi||ref)": 0.5} for prefix in ("", "golden ")
              for name in ("base", "pi* beta=0.5", "pi* beta=1")}
    save_rows(str(tmp_path), rows, bounds)
    write_report(str(tmp_path))
    readme = (tmp_path / "README.md").read_text()
    for file in FIGURES:
        assert (tmp_path / file).stat().st_size > 5000 and file in readme
