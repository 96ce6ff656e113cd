"""Each kernel is a specification in plain torch with its GPU kernel (Triton) beside it.

    linear_logps.py    log-probs of policy and reference in one pass over the vocabulary
    attention.py       attention over packed trees: the specification, and which way runs where
    tree_attention.py  its kernels
    layers.py          RMSNorm, rotary embedding and SwiGLU
    lora_linear.py     a linear layer with its adapter

Nothing here imports anything of the project outside of this folder.
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
