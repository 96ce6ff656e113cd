"""Commands for a finished run: `python -m tools.export`, `python -m tools.heatmap`."""
