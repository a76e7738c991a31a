"""Read the specs of token rules."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from diffcache import registry
from diffcache.documents.schedule import CacheSchedule
from diffcache.documents.schedule_set import ScheduleSet
from diffcache.documents.token_schedule import TokenSchedule
from diffcache.errors import BadOption, UnknownName, Unusable
from diffcache.schedulers import Rule, is_rule
from diffcache.tokens import rules
from diffcache.tokens.view import Fresh, View

DEFAULT = "dkv:refresh=8"  # the rule of "auto"
LOGITS = ("all", "masks")
GENERAL = ("mask", "shift", "repeat", "logits")  # options of every rule


@dataclass(frozen=True)
class TokenRule:
    """A rule with its options: which positions to compute in each forward.

    Attributes:
        spec: The text that it was made from.
        function: The function of the rule.
        options: The options of the function.
        mask: The id of the mask token, if the spec states it.
        needs: "depth" if the rule refreshes from a layer on, "attention" if it also compares attention rows, "values"
            if each layer computes a share of the positions, else "".
        shift: Whether the logits at position j - 1 decode position j, as in Dream. None: the model decides.
        repeat: Whether a forward with the same arguments as the last one returns the same logits without running. Its
            adapters must not change between the two. Weights that change in place, or are replaced, are seen.
        logits: "masks" computes logits at masks only, for loops that read no others. "all" computes those of every
            position that a forward computes.
    """

    spec: str
    function: Callable[..., Fresh]
    options: Mapping[str, Any] = field(default_factory=dict)
    mask: int | None = None
    needs: str = ""
    shift: bool | None = None
    repeat: bool = False
    logits: str = "all"

    def fresh(self, view: View) -> Fresh:
        """Return the positions to compute.

        Raises:
            Unusable: The function returns no ``Fresh``, or positions of another shape.
        """
        found = self.function(view, **self.options)
        shape = np.shape(found.positions) if isinstance(found, Fresh) else ()
        rows, size = view.masked.shape
        if shape not in ((rows, size), (1, size)):
            what = f"positions of shape {list(shape)}" if isinstance(found, Fresh) else type(found).__name__
            raise Unusable(
                f"the token rule {self.spec!r}",
                f"it returned {what}",
                f"Return diffcache.tokens.Fresh(positions), with bool positions of shape {[rows, size]}",
            )
        return found

    def __str__(self) -> str:
        return self.spec


def token_rules() -> tuple[str, ...]:
    """Return the names of all token rules, sorted."""
    return registry.names(rules.__name__)


def is_token_rule(spec: object) -> bool:
    """Return whether ``spec`` is text that begins with the name of a token rule, or ``"auto"``."""
    return isinstance(spec, str) and _name(spec) in (*token_rules(), "auto")


def parse_token_rule(spec: object, *, model: str = "the model") -> TokenRule:
    """Return the rule of a spec such as ``"dkv:refresh=8"``. ``"auto"`` is ``"dkv:refresh=8"``. A rule stays as it is.

    Every rule has four more options: ``mask``, the id of the mask token; ``shift``, 1 if the logits at position j - 1
    decode position j; ``repeat``, 1 if a forward that repeats the last one need not run; and ``logits``, "masks" if the
    loop reads the logits of masks only.

    Args:
        spec: A spec, a rule or a token schedule.
        model: How an error names the language model.

    Raises:
        UnknownName: There is no such rule, or it has no such option.
        Unusable: ``spec`` is a rule or a schedule that predicts whole outputs.
        BadOption: ``spec`` is of another type, or an option is out of range.
    """
    if isinstance(spec, TokenSchedule):
        from diffcache.tokens.planned import rule_of

        return rule_of(spec)
    if isinstance(spec, TokenRule):
        _demand_known(spec.spec, spec.function, spec.options)
        return spec
    spec = _spec_text(spec, model)
    name = _name(spec)
    if name == "auto":
        rest = spec.partition(":")[2]
        if "speedup" in registry.options(spec, rest):
            raise Unusable(
                f"the token rule {spec!r}",
                f"auto is {DEFAULT!r} for a language model and has no goal",
                "Call diffcache.optimize(diffcache.Loop(model, sample), calls, diffcache.Budget(speedup=3))",
            )
        return parse_token_rule(f"{DEFAULT},{rest}" if rest else DEFAULT)
    if name not in token_rules():
        meant = registry.naming(rules.__name__, name)
        advice = 'A spec reads like "dkv:refresh=8". Pass a rule of yours as diffcache.tokens.TokenRule.'
        if meant:
            advice = f"That method has the rule{'s' * (len(meant) > 1)} {' and '.join(map(repr, meant))}. {advice}"
        raise UnknownName("token rule", name, token_rules(), next_step=advice, suggest=not meant)
    module = registry.load(rules.__name__, name, kind="token rule")
    function = module.fresh
    options = registry.options(spec, spec.partition(":")[2])
    _demand_known(name, function, options, GENERAL, spec=spec)
    mask, shift, repeat = options.pop("mask", None), options.pop("shift", None), options.pop("repeat", 0)
    if mask is not None and (not isinstance(mask, int) or mask < 0):
        raise BadOption("mask", mask, "the id of the mask token, a whole number")
    if shift not in (None, 0, 1):
        raise BadOption("shift", shift, "0 or 1")
    logits = options.pop("logits", "all")
    if logits not in LOGITS:
        raise BadOption("logits", logits, ", ".join(LOGITS))
    if repeat not in (0, 1):
        raise BadOption("repeat", repeat, "0 or 1")
    shifted = None if shift is None else bool(shift)
    rule = TokenRule(spec, function, options, mask, getattr(module, "NEEDS", ""), shifted, bool(repeat), logits)
    rule.fresh(View.of(np.array([[False, True]])))  # raises for a value out of range here, before the run
    return rule


def _spec_text(spec: object, model: str) -> str:
    """Return ``spec``. Raise BadOption unless it is text, and names no rule for whole outputs."""
    allowed = (
        f"a token rule ({', '.join(token_rules())}) such as {DEFAULT!r}, or what "
        "diffcache.optimize(diffcache.Loop(model, sample), calls, diffcache.Budget(speedup=3)) returns"
    )
    if isinstance(spec, str):
        if _name(spec) == "auto" or _name(spec) in token_rules() or not is_rule(spec):
            return spec
        what, it = f"schedule={spec!r}", "it predicts"
    elif isinstance(spec, (CacheSchedule, ScheduleSet, Rule, Mapping)):
        kind = "dictionary" if isinstance(spec, Mapping) else type(spec).__name__
        what, it = "schedule", f"it is a {kind}, which predicts"
    else:
        raise BadOption("schedule", spec, f"for a language model, {allowed}")
    raise Unusable(
        what,
        f"{it} whole outputs, and {model} is a language model, which would decode wrong tokens",
        f"Pass {allowed}",
    )


def _demand_known(
    name: str, function: Callable[..., Fresh], options: Mapping[str, Any], more: tuple[str, ...] = (), *, spec: str = ""
) -> None:
    """Raise UnknownName for an option that neither the function of a rule has nor ``more`` names."""
    known = [*(n for n in inspect.signature(function).parameters if n != "view"), *more]
    for key in options:
        if key not in known:
            advice = registry.argument_advice(spec, key) if spec else ""
            if advice and key == "store":
                advice += " In evaluate, diffcache.eval.token_method(name, rule, store=…) is the method."
            raise UnknownName(f"option of {name!r}", key, known, next_step=advice, suggest=not advice)


def _name(spec: str) -> str:
    return spec.partition(":")[0].strip().lower().replace("-", "_")
