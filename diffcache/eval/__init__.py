"""Measure accelerated pipelines against the full run: fidelity, distributions, alignment, seconds, memory.

The names of the package are imported when they are first used, so that its checks of arguments need no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffcache.eval.distribution import Distribution
    from diffcache.eval.evaluation import Evaluation, evaluate
    from diffcache.eval.methods import Method, baselines, evenly_reused, fewer_steps, full, ours, uniform_reuse
    from diffcache.eval.text import TextEvaluation, evaluate_text, token_method
    from diffcache.eval.trials import Trials

_HOMES = {  # name -> its module; the same as the imports above
    "Distribution": "distribution",
    "Evaluation": "evaluation",
    "Method": "methods",
    "TextEvaluation": "text",
    "Trials": "trials",
    "baselines": "methods",
    "evaluate": "evaluation",
    "evaluate_text": "text",
    "evenly_reused": "methods",
    "fewer_steps": "methods",
    "full": "methods",
    "ours": "methods",
    "token_method": "text",
    "uniform_reuse": "methods",
}

__all__ = [
    "Distribution",
    "Evaluation",
    "Method",
    "TextEvaluation",
    "Trials",
    "baselines",
    "evaluate",
    "evaluate_text",
    "evenly_reused",
    "fewer_steps",
    "full",
    "ours",
    "token_method",
    "uniform_reuse",
]


def __getattr__(name: str) -> Any:
    """Import a name of the package when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
