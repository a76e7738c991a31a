"""Compute every position at every step. The output is bit-identical to that of the model without diffcache."""

from __future__ import annotations

import numpy as np

from diffcache.tokens.view import Fresh, View

SOURCE = ""


def fresh(view: View) -> Fresh:
    """Return all positions."""
    return Fresh(np.ones_like(view.masked))
