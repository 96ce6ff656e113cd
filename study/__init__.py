"""The papers' claims, tried on the embedded world: `python -m study` writes results/."""
