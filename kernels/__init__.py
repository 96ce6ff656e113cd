"""Log-probs of policy and reference in one pass over the vocabulary. See linear_logps.py."""
from .linear_logps import (choose_linear_logps, linear_logps, linear_logps_torch,
                           linear_logps_triton)

__all__ = ["choose_linear_logps", "linear_logps", "linear_logps_torch", "linear_logps_triton"]
