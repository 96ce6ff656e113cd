"""Log-probs of policy and reference in one pass over the vocabulary. See linear_logps.py."""
from .linear_logps import linear_logps, linear_logps_torch

__all__ = ["linear_logps", "linear_logps_torch"]
