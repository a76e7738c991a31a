"""dLLM-Cache: refresh the prompt rarely and the response often; in between, compute the tokens with changed values.

Every layer compares the value of each response token with the kept one, and computes the share of tokens with the
lowest cosine. Each row of a batch chooses alone. In the first layer, values depend on the token alone. So only tokens
that have changed differ there, and of equal ones the leftmost are computed. ``full_layers=1`` computes the whole
response in the first layer, as the released code does for Dream (for LLaDA it does not). The later layers then compare
values that depend on the context.
"""

from __future__ import annotations

import numpy as np

from diffcache.errors import BadOption
from diffcache.tokens.rules._checks import at_least
from diffcache.tokens.view import Fresh, View

SOURCE = "Liu et al. 2025, dLLM-Cache (arXiv 2506.06295), section 3.3; maomaocun/dLLM-cache @17235bf"
NEEDS = "values"


def fresh(
    view: View,
    *,
    prompt_interval_steps: int = 100,
    gen_interval_steps: int = 7,
    transfer_ratio: float = 0.25,
    full_layers: int = 0,
) -> Fresh:
    """Return the response, of which each layer computes a share, and the prompt when it is refreshed.

    Args:
        view: The state of the canvas.
        prompt_interval_steps: Every so many steps, the prompt is computed (K_p).
        gen_interval_steps: Every so many steps, the whole response is computed (K_r).
        transfer_ratio: The share of the response that each layer computes at other steps (rho). At least one token of
            each row is computed.
        full_layers: The number of layers, from the first one, that compute the whole response at every step.
    """
    at_least("prompt_interval_steps", prompt_interval_steps, 1)
    at_least("gen_interval_steps", gen_interval_steps, 1)
    at_least("full_layers", full_layers, 0)
    if isinstance(transfer_ratio, bool) or not isinstance(transfer_ratio, (int, float)) or not 0 < transfer_ratio <= 1:
        raise BadOption("transfer_ratio", transfer_ratio, "a number above 0, at most 1")
    response = ~view.prompt
    now = np.ones_like(response) if view.step % prompt_interval_steps == 0 else response
    if view.step % gen_interval_steps == 0:
        return Fresh(now)
    return Fresh(now, among=response, share=float(transfer_ratio), whole=full_layers)
