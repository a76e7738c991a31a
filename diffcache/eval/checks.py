"""Check the arguments of an evaluation before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffcache import host
from diffcache.documents.checks import is_unicode
from diffcache.documents.schedule import CacheSchedule
from diffcache.errors import BadOption, Unusable
from diffcache.eval.methods import Method
from diffcache.eval.metrics import load
from diffcache.executor.checks import check_steps

LONGEST_TITLE = 1000

Calls = Sequence[Mapping[str, Any]]


def check_title(title: object) -> None:
    """Raise BadOption unless ``title`` is Unicode text of at most LONGEST_TITLE characters."""
    if not isinstance(title, str) or len(title) > LONGEST_TITLE or not is_unicode(title):
        raise BadOption("title", ascii(title)[:80], f"Unicode text of at most {LONGEST_TITLE} characters")


def check_names(metrics: object) -> None:
    """Raise BadOption unless ``metrics`` is None or a list of names."""
    named = isinstance(metrics, Sequence) and all(isinstance(name, str) for name in metrics)
    if metrics is not None and (isinstance(metrics, str) or not named):
        raise BadOption("metrics", metrics, "a list of names, or None")


def check_outputs(
    title: str,
    traits: host.Traits,
    calls: Calls,
    metrics: Sequence[str],
    extractor: object,
    scorers: Sequence[Any],
) -> None:
    """Raise BadOption if a metric, the extractor or a scorer needs pictures, and the calls do not return any.

    Args:
        title: The name of the pipeline in errors.
        traits: The facts about its kind.
        calls: The calls.
        metrics: Names of metrics.
        extractor: The network for distances of sets; None if there is none.
        scorers: Scorers of pictures and prompts.
    """
    latents = any(call.get("output_type") == "latent" for call in calls)
    pictures = [name for name in metrics if load(name).ABOUT.of_pictures]
    if traits.returns != "pictures":
        if extractor is not None:
            raise Unusable("extractor", f"a {title} returns no pictures", "Leave out the extractor")
        if pictures:
            names = ", ".join(pictures)
            allowed = f"Use {', '.join(traits.metrics)} or another metric that needs no pictures"
            raise Unusable("metrics", f"{names} needs pictures, and a {title} returns no pictures", allowed)
        return
    if latents and pictures:
        raise Unusable(
            "metrics",
            f"{', '.join(pictures)} compare pictures, and the calls have output_type='latent'",
            "Use the metric latent, or calls that return pictures",
        )
    if latents and (extractor is not None or scorers):
        name = "extractor" if extractor is not None else "scorers"
        raise Unusable(
            name,
            "the calls have output_type='latent' and return no pictures",
            f"Use calls that return pictures, or leave out {name}",
        )


def check_kinds(methods: Sequence[Method]) -> None:
    """Raise BadOption unless every method is a ``Method`` and has a name that no other method has."""
    for method in methods:
        if not isinstance(method, Method):
            raise BadOption("methods", type(method).__name__, "instances of diffcache.eval.methods.Method")
    names = [method.name for method in methods]
    for name in names:
        if names.count(name) > 1:
            raise BadOption("schedules", name, "names that no other method has")


def check_counted(methods: Sequence[Method], steps: int) -> None:
    """Raise ScheduleMismatch if a schedule has another number of steps than the loop takes.

    Args:
        methods: The methods. Only methods with a schedule are checked.
        steps: Number of steps that the loop took in a run.
    """
    for method in methods:
        if isinstance(method.source, CacheSchedule):
            check_steps(method.source, steps)
