"""Around the step: setup, ranks, checkpoints, reference log-probs computed once."""
