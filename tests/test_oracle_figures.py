"""Every figure of results/ is drawn from rows of every cell; needs matplotlib, as oracles have."""
import pytest
from test_reproduce import rows_of

import report
from figures import FIGURES
from reproduce import TABLES

pytest.importorskip("matplotlib")


def test_every_figure_is_drawn_from_rows_of_every_cell(tmp_path):
    wanted = {name: [(cell.data, cell.name) for cell in group] for name, group in TABLES.items()}
    rows = rows_of({cell: [0.1 * (n % 7), 0.3, 0.2] for group in wanted.values()
                    for n, cell in enumerate(group)})
    bounds = {prefix + name: rows[0] | {"KL(pi||ref)": 0.5} for prefix in ("", "golden ")
              for name in ("base", "pi* beta=0.5", "pi* beta=1")}
    report.save_rows(str(tmp_path), rows, bounds)
    report.write(str(tmp_path), wanted)
    readme = (tmp_path / "README.md").read_text()
    for file in FIGURES:
        assert (tmp_path / file).stat().st_size > 5000 and file in readme
