"""Commands beside a run: `python -m tools.export`, `tools.gguf`, `tools.heatmap`, `tools.plot`."""
