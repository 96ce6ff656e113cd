"""Win, tie or lose by a judge or a reward model: `python -m judge`."""
