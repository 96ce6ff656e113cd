"""The life of a run, above the step: ranks, checkpoints, log-probs that are computed once."""
