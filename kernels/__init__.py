"""Each kernel is a specification in plain torch with its GPU kernel (Triton) beside it.

    linear_logps.py   log-probs of policy and reference in one pass over the vocabulary
    attention.py      attention over packed trees

Nothing here imports anything of the project: a file can be copied as it is.
"""
from .linear_logps import (
    LinearLogps,
    choose_linear_logps,
    linear_logps,
    linear_logps_torch,
    linear_logps_triton,
)

__all__ = ["LinearLogps", "choose_linear_logps", "linear_logps", "linear_logps_torch",
           "linear_logps_triton"]
