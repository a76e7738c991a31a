"""Cache keys and values of masked diffusion language models: compute some positions at each step, keep the others.

A bidirectional decoder recomputes every position at every step. Here a rule names the positions to compute (the fresh
set), the original forward runs on these alone, and the attention reads kept keys and values of all other positions.
"""

from diffcache.tokens.view import Fresh, View

__all__ = ["Fresh", "View"]
