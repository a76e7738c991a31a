"""dKV-Cache-Decode: masked positions are computed at every step, and committed ones once more after their commit.

The keys and values of a token move most at the step that commits it. So a token that was committed in the last step is
computed once with its real embedding, and its rows are kept from then on (the delay of one step).
"""

from __future__ import annotations

from diffcache.tokens.rules._checks import at_least, one_of
from diffcache.tokens.view import Fresh, View

SOURCE = "Ma et al. 2025, dKV-Cache (arXiv 2505.15781), eq. 4 and algorithm 1; horseee/dKV-Cache @49a76fc"


def fresh(view: View, *, refresh: int = 8, prompt: str = "refresh") -> Fresh:
    """Return the masked positions, and those committed in the last step.

    Args:
        view: The state of the canvas.
        refresh: Every so many steps, all positions are computed.
        prompt: "refresh" computes the prompt at each refresh (Decode); "keep" never does (PD).
    """
    at_least("refresh", refresh, 1)
    one_of("prompt", prompt, ("refresh", "keep"))
    now = view.masked | view.changed
    if view.step % refresh == 0:
        now = now | (True if prompt == "refresh" else ~view.prompt)
    return Fresh(now)
