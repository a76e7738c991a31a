"""dKV-Cache: masked positions are computed at every step, and committed ones once more after their commit.

The keys and values of a token move most at the step that commits it. So a token that was committed in the last step is
computed once with its real embedding, and its rows are kept from then on (the delay of one step).

The greedy variant computes a constant number of positions: those that the next step decodes, those committed in the
last step, and a window of masks. It needs a loop that chooses its positions in advance, such as one in random order.
The loop states them with ``diffcache.tokens.announce``.
"""

from __future__ import annotations

import numpy as np

from diffcache.tokens.rules._checks import at_least, flag, one_of
from diffcache.tokens.view import Fresh, View

SOURCE = "Ma et al. 2025, dKV-Cache (arXiv 2505.15781), eq. 4, algorithm 1 and section 3.4; horseee/dKV-Cache @49a76fc"


def fresh(
    view: View, *, refresh: int = 8, prompt: str = "refresh", greedy: str | int = "false", window: int = 4
) -> Fresh:
    """Return the masked positions, or those of the greedy variant, and those committed in the last step.

    Args:
        view: The state of the canvas.
        refresh: Every so many steps, all positions are computed.
        prompt: "refresh" computes the prompt at each refresh (Decode); "keep" never does (PD).
        greedy: "true" computes a window of masks in place of all masks (Greedy). The paper refreshes every 2 steps.
        window: The number of masks of the greedy variant, for each announced position. If the loop announces none, the
            window is around the tokens committed in the last step, as in the paper.
    """
    at_least("refresh", refresh, 1)
    one_of("prompt", prompt, ("refresh", "keep"))
    at_least("window", window, 0)
    now = view.masked | view.changed
    if flag("greedy", greedy):
        now = view.changed | _widened(view, window)
    if view.step % refresh == 0:
        now = now | (True if prompt == "refresh" else ~view.prompt)
    return Fresh(now)


def _widened(view: View, window: int) -> np.ndarray:
    """Return bool [B, N], the announced positions, and the nearest ``window`` masks of each, the left of two first.

    A mask that is near to several positions counts once, so each of them has ``window`` masks that the others have not.
    """
    announced = np.zeros_like(view.masked) if view.announced is None else view.announced
    found: np.ndarray = announced & view.masked
    for row, taken in enumerate(found):
        centres = np.flatnonzero(taken if taken.any() else view.changed[row])
        for centre in centres:
            free = np.flatnonzero(view.masked[row] & ~taken)
            taken[sorted(free, key=lambda place: (abs(place - centre), place))[:window]] = True
    return found
