"""Exact attention, forward and backward, in memory linear in the sequence length, for NumPy and CuPy arrays."""

from cuflash.api import attention, attention_backward, attention_forward, attention_vjp
from cuflash.merge import merge

__all__ = ["attention", "attention_backward", "attention_forward", "attention_vjp", "merge"]
__version__ = "0.1.0"
