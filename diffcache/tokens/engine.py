"""Run the forward of a bidirectional decoder on the fresh positions only."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffcache import registry
from diffcache.errors import UnknownName, Unusable
from diffcache.patch import Undo, layer
from diffcache.tokens import rules
from diffcache.tokens.store import PlacedCache, gathered
from diffcache.tokens.view import Fresh, View

CACHES = ("cache", "past_key_values")  # the argument's name since and before transformers 5.24


@dataclass(frozen=True, slots=True)
class Counts:
    """The work of one canvas.

    Attributes:
        forwards: The number of forwards.
        computed: The number of positions computed, over all rows and forwards. Rows padded to the longest count.
        full: The number of positions that the model without a cache computes.
        refreshes: The number of forwards that computed every position.
    """

    forwards: int = 0
    computed: int = 0
    full: int = 0
    refreshes: int = 0


class TokenCache:
    """Applies a token rule to one model, between ``attach`` and ``detach``.

    A canvas begins when the shape of the input changes, when a position that was decoded is masked again, or when the
    prompt changes. It then computes every position.

    Args:
        model: A bidirectional decoder. Its ``forward`` takes ``input_ids``, ``position_ids`` and a cache.
        mask: The id of the mask token.
        rule: The rule: which positions to compute.
    """

    def __init__(self, model: nn.Module, mask: int, rule: Callable[[View], Fresh]) -> None:
        names = inspect.signature(model.forward).parameters
        caches = [name for name in CACHES if name in names]
        if not caches or "position_ids" not in names:
            raise Unusable(
                type(model).__name__,
                "its forward takes no position_ids, or no cache",
                "Pass a decoder of transformers with a forward that takes input_ids, position_ids and a cache",
            )
        self.model, self.mask, self.rule, self.cache_argument = model, mask, rule, caches[0]
        self.cache = PlacedCache()
        self.counts = Counts()
        self._signature = inspect.signature(model.forward)
        kinds = {p.kind: name for name, p in names.items()}
        self._rest = kinds.get(inspect.Parameter.VAR_KEYWORD, "")
        self._undo: Undo | None = None
        self.reset()

    def reset(self) -> None:
        """Forget the canvas."""
        self.cache.clear()
        self._ids: np.ndarray | None = None
        self._prompt = np.zeros((0, 0), bool)
        self._logits: Tensor | None = None
        self._step = 0

    def attach(self) -> None:
        """Wrap the forward of the model."""
        self._undo = layer(self.model, "forward", self._forward)

    def detach(self) -> None:
        """Undo the wrapper, and drop everything kept."""
        if self._undo is not None:
            self._undo()
            self._undo = None
        self.reset()

    def _forward(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Wrap ``forward``: compute the fresh positions, and return the logits of all."""
        given = dict(self._signature.bind(*args, **kwargs).arguments)
        given.update(given.pop(self._rest, {}))
        ids = given.get("input_ids")
        if ids is None or given.get(self.cache_argument) is not None or given.get("labels") is not None:
            self.reset()
            return inner(*args, **kwargs)
        now = ids.detach().cpu().numpy().copy()  # the loop writes into its ids
        view = self._view(now)
        chosen = np.ones_like(now, bool) if view.step == 0 else np.broadcast_to(self.rule(view).positions, now.shape)
        index = None if chosen.all() else _indices(chosen)
        try:
            out = self._compute(inner, given, ids, index)
        except BaseException:
            self.reset()  # some layers may hold rows of this forward, and others not
            raise
        done = chosen.sum() if index is None else index.size
        self.counts = replace(
            self.counts,
            forwards=self.counts.forwards + 1,
            computed=self.counts.computed + int(done),
            full=self.counts.full + now.size,
            refreshes=self.counts.refreshes + (index is None),
        )
        self._ids, self._step = now, self._step + 1
        return out

    def _view(self, now: np.ndarray) -> View:
        """Return the state of the canvas before a forward. A canvas begins if the input is not the next of the last."""
        masked = now == self.mask
        last = self._ids
        if last is None or last.shape != now.shape or self._restarted(now, last):
            self.reset()
            self.counts = Counts()
            self._prompt, last = ~masked, now
        return View(step=self._step, masked=masked, changed=now != last, prompt=self._prompt)

    def _restarted(self, now: np.ndarray, last: np.ndarray) -> bool:
        """Return whether the prompt changed in any row, or no position is decoded.

        A loop that was interrupted may begin again with the same prompt. Its first forward has nothing but the prompt.
        """
        return bool(((now != last) & self._prompt).any() or ((now == self.mask) == ~self._prompt).all())

    def _compute(self, inner: Callable[..., Any], given: dict[str, Any], ids: Tensor, index: np.ndarray | None) -> Any:
        """Run the model on the positions ``index``, or on all, and return an output with the logits of all."""
        self.cache.size = ids.shape[1]
        call = dict(given)
        where = None
        if index is not None:
            where = torch.from_numpy(index).to(ids.device)
            positions = given.get("position_ids")
            call["input_ids"] = torch.gather(ids, 1, where)
            call["position_ids"] = where if positions is None else gathered(positions.expand_as(ids), where)
            call["attention_mask"] = _query_rows(given.get("attention_mask"), where)
        self.cache.index = where
        call[self.cache_argument] = self.cache
        call["use_cache"] = True
        call.pop("return_dict", None)
        out = inner(**call)
        logits = out.logits
        if where is not None:
            kept = self._logits
            assert kept is not None  # step 0 computed every position
            logits = kept.scatter(1, where[..., None].expand_as(logits), logits)
        self._logits = logits
        return _with_logits(out, logits.clone(), given)


def _with_logits(out: Any, logits: Tensor, given: dict[str, Any]) -> Any:
    """Return the output of a forward with other logits and without its cache, in the form that the caller asked for."""
    made = type(out)(**{name: value for name, value in out.items() if name not in CACHES} | {"logits": logits})
    return made.to_tuple() if given.get("return_dict") is False else made


def _indices(chosen: np.ndarray) -> np.ndarray:
    """Return int64 [B, n], the positions chosen in each row; shorter rows repeat their last position."""
    counts = chosen.sum(1)
    order = np.argsort(~chosen, axis=1, kind="stable")[:, : max(int(counts.max()), 1)]
    last = np.maximum(counts - 1, 0)[:, None]
    return np.take_along_axis(order, np.minimum(np.arange(order.shape[1])[None], last), 1)


def _query_rows(mask: Any, where: Tensor) -> Any:
    """Return the attention mask for the query rows ``where``.

    Args:
        mask: None; a mask of keys [B, N]; or one of queries and keys [B, 1 or heads, N, N].
        where: int64 [B, n].
    """
    if mask is None:
        return None
    if mask.ndim == 2:  # real tokens are 1
        return mask.bool()[:, None, None, :].expand(-1, 1, where.shape[1], -1)
    rows = where[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3])
    return torch.gather(mask.expand(where.shape[0], -1, -1, -1), 2, rows)


def rule_of(spec: str) -> Callable[[View], Fresh]:
    """Return the rule of a spec such as ``"dkv:refresh=8"``.

    Raises:
        UnknownName: There is no such rule, or it has no such option.
        BadOption: The text is not a spec, or an option is out of range.
    """
    name, _, rest = spec.partition(":")
    found = registry.load(rules.__name__, name.lower().replace("-", "_"), kind="token rule").fresh
    known = [n for n in inspect.signature(found).parameters if n != "view"]
    options = registry.options(spec, rest)
    for key in options:
        if key not in known:
            raise UnknownName(f"option of {name!r}", key, known)
    rule = functools.partial(found, **options)
    rule(View.of(np.array([[False, True]])))  # raises for a value out of range here, before the run
    return rule
