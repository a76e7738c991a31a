"""Run the forward of a bidirectional decoder on the fresh positions only."""

from __future__ import annotations

import inspect
import itertools
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffcache.errors import BadOption, UnsupportedModel
from diffcache.host import unwrapped
from diffcache.kernels.library import Backend, check_backend
from diffcache.patch import Undo, layer, spot, weak
from diffcache.tokens.attention import AttentionStack, Drift
from diffcache.tokens.canvas import Canvas, equal_inputs
from diffcache.tokens.drift import observe
from diffcache.tokens.head import Head, Projection
from diffcache.tokens.layers import Depths, LayerStack, decoder_layers
from diffcache.tokens.mixed import parse_store
from diffcache.tokens.rotary_blocks import RotaryBlocks, blocks_of
from diffcache.tokens.rows import gathered, grown, indices, picked
from diffcache.tokens.shares import Shares, ShareStack
from diffcache.tokens.spec import TokenRule
from diffcache.tokens.store import PlacedCache
from diffcache.tokens.suitability import (
    CACHES,
    demand_decoder,
    demand_depth,
    demand_layers,
    demand_two_directions,
    signature_of,
    takes_positions,
)
from diffcache.tokens.view import View

# Arguments that ask for more than the logits of all positions.
WHOLE = (
    "labels",
    "output_hidden_states",
    "output_attentions",
    "output_router_logits",
    "logits_to_keep",
    "num_logits_to_keep",
    "use_cache",
)
IN_CONFIG = ("output_hidden_states", "output_attentions", "output_router_logits")  # settings that ask for them as well
DEEP = ("depth", "attention")  # needs of rules that compute more positions from a layer on
MOST = 2  # canvases that a thread may decode in turns


class TokenCache:
    """Applies a token rule to one model, between ``attach`` and ``detach``.

    Every thread that calls the model has a canvas. A canvas begins when the input is not a later state of the last one,
    and computes every position then.

    Args:
        model: A bidirectional decoder. Its ``forward`` takes ``input_ids``, ``position_ids`` and a cache.
        source: The rule: which positions to compute.
        mask: The id of the mask token.
        store: The format in which keys and values are kept, such as ``"int8"``, or ``"int8:far=int4,distance=32"`` for
            masks far from every decoded token in another one. None keeps the precision of the model.
        backend: What runs operations on kept rows.

    Attributes:
        source: The rule.
        canvas: The canvas of the thread that called the model last. None before the first forward.
        runs: The number of canvases that have begun.
        passed: The number of forwards that the cache took no part in, by reason.

    Raises:
        Unusable: The model takes no positions or no cache, or attends causally.
    """

    def __init__(
        self, model: nn.Module, source: TokenRule, mask: int, *, store: str | None = None, backend: Backend = "auto"
    ) -> None:
        demand_decoder(model)
        demand_two_directions(model)
        check_backend(backend)
        self._store, self._backend = parse_store(store), backend
        self.store = self._store.spec
        self._signature = signature_of(model)
        names = self._signature.parameters
        self._cache_argument = next((name for name in CACHES if name in names), "")
        self._takes_positions = takes_positions(model)
        self._rest = next((n for n, p in names.items() if p.kind is inspect.Parameter.VAR_KEYWORD), "")
        self._model = weak(model)
        self._parts: list[LayerStack | AttentionStack | ShareStack | RotaryBlocks | Head] = []
        if not self._takes_positions:
            self._parts.append(RotaryBlocks(model, self._cache_in_progress))
        if source.needs in DEEP:
            demand_depth(model, str(source))
        elif source.needs:
            demand_layers(model, str(source))
        if source.needs in DEEP:
            stack = LayerStack(model, self._depths)
            self._parts.append(stack)
            if source.needs == "attention":
                self._parts.append(AttentionStack(stack.modules, self._observe))
            self._layers = len(stack.modules)
        elif source.needs:
            layers = decoder_layers(model) if self._takes_positions else blocks_of(model)
            self._parts.append(ShareStack(layers, self._shares))
            self._layers = len(layers)
        if source.logits == "masks":
            self._parts.append(Head(model, self._projection))
        self._local = threading.local()
        self._undo: list[Undo] = []
        self.source, self.mask = source, mask
        self.canvas: Canvas | None = None
        self.runs = 0
        self.passed: Counter[str] = Counter()

    def attach(self) -> None:
        """Wrap the forward of the model."""
        try:
            for part in self._parts:
                self._undo.extend(part.attach())
            self._undo.append(layer(*spot(self._model()), self._forward))
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Undo the wrapper, and drop every kept tensor."""
        while self._undo:
            self._undo.pop()()
        for canvas in getattr(self._local, "canvases", []):
            canvas.drop()
        if self.canvas is not None:
            self.canvas.drop()
        self._local = threading.local()

    def announce(self, positions: Any) -> None:
        """Keep the positions that the loop of this thread decodes after its next forward. See ``diffcache.tokens``."""
        given = torch.as_tensor(positions)
        if given.ndim != 2 or given.is_floating_point():
            raise BadOption(
                "positions", f"{given.dtype} of shape {list(given.shape)}", "bool [B, N], or whole numbers [B, n]"
            )
        self._local.announced = given.detach().cpu().numpy()

    @property
    def canvases(self) -> int:
        """Return the number of canvases that this thread decodes in turns."""
        return len(getattr(self._local, "canvases", []))

    @property
    def trying(self) -> bool:
        """Return whether this thread runs a ``trial``."""
        return bool(getattr(self._local, "trial", False))

    def _forward(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Wrap ``forward``: compute the fresh positions, and return the logits of all."""
        if self.trying:
            return inner(*args, **kwargs)
        given = dict(self._signature.bind(*args, **kwargs).arguments)
        given.update(given.pop(self._rest, {}))
        reason = self._reason_to_pass(given)
        if reason:
            self.passed[reason] += 1
            return inner(*args, **kwargs)
        ids = given["input_ids"]
        now = ids.detach().cpu().numpy().copy()  # the loop writes into its ids
        canvas, view = self._canvas_for(now)
        inputs = {name: _copied(value) for name, value in given.items() if name != "input_ids"}
        inputs.update(self._settings(ids.device))
        if self.source.repeat and view is not None and canvas.repeats(view, inputs):
            canvas.counts = canvas.counts.after(0, now.size, 0, ran=False)
            return _with_logits(canvas.output, canvas.logits, given)
        announced = self._announced(now)
        if view is not None:
            view = replace(view, announced=announced)
        index = self._fresh(canvas, now, view, inputs, ids.device)
        self._local.running = canvas
        canvas.projection = self._projected(canvas, now, index) if self.source.logits == "masks" else None
        try:
            out, projected = self._compute(canvas, inner, given, now, index)
        except BaseException:
            canvas.drop()  # some layers may hold rows of this forward, and others not
            raise
        finally:
            self._local.running = None
        canvas.counts = canvas.counts.after(self._work(canvas, now, index), now.size, projected, ran=True)
        canvas.ids, canvas.inputs = now, inputs
        if view is not None:
            canvas.prompt = view.prompt
        canvas.peak_bytes = max(canvas.peak_bytes, canvas.nbytes)
        return out

    def trial(self, ids: Tensor, rows: Mapping[int, tuple[Tensor, Tensor]], index: np.ndarray | None) -> Tensor:
        """Return the logits of the positions ``index`` if all others have these keys and values, [B, n, V].

        The other arguments are those of the last forward. No canvas changes. The cache must be attached.

        Args:
            ids: int64 [B, N], the tokens.
            rows: Keys and values of all positions, by number of the layer.
            index: int64 [B, n]. None computes every position.
        """
        canvas = Canvas(PlacedCache())
        canvas.cache.place(rows)
        given = {**(self.canvas.arguments if self.canvas is not None else {}), "input_ids": ids}
        model = self._model()
        self._local.running, self._local.trial = canvas, True
        try:
            out, _ = self._compute(canvas, model, given, ids.cpu().numpy(), index)
            logits: Tensor = out.logits
            return logits if index is None else gathered(logits, torch.from_numpy(index).to(logits.device))
        finally:
            self._local.running, self._local.trial = None, False

    def _reason_to_pass(self, given: dict[str, Any]) -> str:
        """Return why a forward cannot be cached; empty if it can."""
        ids = given.get("input_ids")
        if ids is None or ids.ndim != 2:
            return "no input_ids of shape [batch, positions]"
        if any(given.get(name) is not None for name in CACHES):
            return "another cache was passed"
        for name in WHOLE:
            value = given.get(name)
            if value is not None and (isinstance(value, Tensor) or bool(value)):
                return f"{name} was passed"
        model = self._model()
        for name in IN_CONFIG:
            if given.get(name) is None and getattr(getattr(model, "config", None), name, False) is True:
                return f"config.{name} is on"
        mask = given.get("attention_mask")
        if isinstance(mask, Mapping) or (isinstance(mask, Tensor) and mask.ndim not in (2, 4)):
            return "attention_mask is a dictionary, or has neither two nor four dimensions"
        if model.training:
            return "the model is in training mode"
        wants = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in model.parameters())
        return "gradients are enabled" if wants else ""

    def _canvas_for(self, now: np.ndarray) -> tuple[Canvas, View | None]:
        """Return the canvas of this thread, and the state before the forward; None for the first of a canvas."""
        known: list[Canvas] = getattr(self._local, "canvases", [])
        repeat = self.source.repeat
        views = [(canvas, view) for canvas in known if (view := canvas.view(now, self.mask, repeat=repeat)) is not None]
        if views:  # of two canvases in turns, the one that differs least
            canvas, view = min(views, key=lambda pair: int(pair[1].changed.sum()))
        else:
            canvas, view = self._begun(now), None
        twice = bool(known) and known[0] is canvas
        for other in known[1:] if view is None or twice else []:
            other.drop()
        self._local.canvases = [canvas] if twice else [canvas, *(one for one in known if one is not canvas)][:MOST]
        self.canvas = canvas
        return canvas, view

    def _announced(self, now: np.ndarray) -> np.ndarray | None:
        """Return bool [B, N], the positions that were announced for the forward of ``now``. None if there are none."""
        given = getattr(self._local, "announced", None)
        self._local.announced = None
        if given is None or (given.dtype == bool and given.shape == now.shape):
            return given
        places = given.dtype != bool and len(given) == len(now) and given.size
        if not places or given.min() < 0 or given.max() >= now.shape[1]:
            raise BadOption(
                "positions",
                f"{given.dtype} of shape {list(given.shape)}",
                f"bool {list(now.shape)}, or {len(now)} rows of whole numbers below {now.shape[1]}, as in input_ids",
            )
        found = np.zeros_like(now, bool)
        np.put_along_axis(found, given, True, 1)
        return found

    def _begun(self, now: np.ndarray) -> Canvas:
        """Return a canvas that begins with the tokens ``now``, int64 [B, N]."""
        canvas = Canvas(PlacedCache(self._store, self._backend), prompt=now != self.mask)
        canvas.depths = Depths() if self.source.needs in DEEP else None
        canvas.shares = Shares() if self.source.needs == "values" else None
        if self.source.needs == "attention":
            canvas.drift, canvas.cache.keeps_before = Drift(), True
        self.runs += 1
        return canvas

    def _fresh(
        self, canvas: Canvas, now: np.ndarray, view: View | None, inputs: dict[str, Any], device: torch.device
    ) -> np.ndarray | None:
        """Return int64 [B, n], the positions to compute; None for all. Begin the forward in the parts of the canvas."""
        chosen, among = np.ones_like(now, bool), None
        state = View.of(now == self.mask) if view is None else view
        found = self.source.fresh(state) if view is not None or self.source.needs else None
        if found is not None and view is not None and canvas.ids is not None:
            chosen = np.broadcast_to(found.positions, now.shape).copy()
            chosen[:, canvas.ids.shape[1] :] = True  # positions that have just appeared
            among = found.among
            grows = canvas.ids.shape != now.shape
            if (self.source.needs and grows) or not equal_inputs(inputs, canvas.inputs):
                chosen[:], among = True, None  # kept rows belong to another mask, or to other positions
        if self.source.shift:  # the logits at j - 1 decode position j
            chosen[:, :-1] |= chosen[:, 1:] & state.masked[:, 1:]
        index = None if chosen.all() else indices(chosen)
        if canvas.shares is not None and found is not None:
            canvas.shares.begin(index, among, found.share, found.whole, device)
        if canvas.depths is not None and found is not None:
            canvas.depths.begin(index, np.full(len(now), self._layers) if found.start is None else found.start)
            if canvas.drift is not None:
                canvas.drift.window = state.masked if found.window is None else found.window
                canvas.drift.decoded, canvas.drift.gamma = ~state.masked, found.gamma
        return index

    def _work(self, canvas: Canvas, now: np.ndarray, index: np.ndarray | None) -> int:
        """Return the number of positions that a forward computed, as a mean over the layers."""
        if canvas.shares is not None:
            return round(canvas.shares.computed / self._layers)
        if index is None:
            return now.size
        if canvas.depths is None:
            return index.size
        return round(index.size + canvas.depths.wide / self._layers * (now.size - index.size))

    def _cache_in_progress(self) -> PlacedCache | None:
        """Return the cache of the forward that this thread runs; None outside of one."""
        canvas: Canvas | None = getattr(self._local, "running", None)
        return None if canvas is None else canvas.cache

    def _depths(self) -> tuple[Depths, PlacedCache] | None:
        """Return the state of the forward that this thread runs; None outside of one."""
        canvas: Canvas | None = getattr(self._local, "running", None)
        return None if canvas is None or canvas.depths is None else (canvas.depths, canvas.cache)

    def _projection(self) -> Projection | None:
        """Return what the forward that this thread runs projects; None for every position, or outside of a forward."""
        canvas: Canvas | None = getattr(self._local, "running", None)
        return None if canvas is None else canvas.projection

    def _projected(self, canvas: Canvas, now: np.ndarray, index: np.ndarray | None) -> Projection:
        """Return the projection of a forward of the positions ``index``: the logits that decode masks."""
        needed = now == self.mask
        if self.source.shift:
            needed = np.concatenate([needed[:, :1] | needed[:, 1:2], needed[:, 2:], np.zeros_like(needed[:, :1])], 1)
        depths = canvas.depths
        return Projection(needed, lambda: index if depths is None else depths.index)

    def _settings(self, device: torch.device) -> dict[str, Any]:
        """Return what a forward depends on besides its arguments. The names are not those of arguments."""
        kind, first = device.type, next(self._model().parameters(), None)
        cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        found: dict[str, Any] = {"*precision": (cast, None if first is None else first.dtype)}
        if self.source.repeat:
            weights = itertools.chain(self._model().parameters(), self._model().buffers())
            found["*weights"] = [(id(w), w.data_ptr(), 0 if w.is_inference() else w._version) for w in weights]
        return found

    def _shares(self) -> tuple[Shares, PlacedCache] | None:
        """Return the state of the forward that this thread runs; None outside of one."""
        canvas: Canvas | None = getattr(self._local, "running", None)
        return None if canvas is None or canvas.shares is None else (canvas.shares, canvas.cache)

    def _observe(self, number: int, query: Tensor, keys: Tensor, mask: Any, scaling: float) -> None:
        """Test the attention of a layer for drift."""
        canvas: Canvas | None = getattr(self._local, "running", None)
        if canvas is not None and canvas.depths is not None and canvas.drift is not None:
            observe(canvas.drift, canvas.depths, canvas.cache, number, query, keys, mask, scaling)

    def _compute(
        self, canvas: Canvas, inner: Callable[..., Any], given: dict[str, Any], now: np.ndarray, index: Any
    ) -> tuple[Any, int]:
        """Run the model on the positions ``index``, or on all.

        Returns:
            An output with the logits of all positions, and the number of positions with new logits.
        """
        ids = given["input_ids"]
        canvas.cache.size = ids.shape[1]
        canvas.cache.layout = self._store.layout(now == self.mask, ids.device)
        call = dict(given)
        where = None
        if index is not None:
            where = torch.from_numpy(index).to(ids.device)
            for name, value in given.items():
                if isinstance(value, Tensor) and value.shape == ids.shape and name != "attention_mask":
                    call[name] = torch.gather(value, 1, where)
            if self._takes_positions:
                positions = given.get("position_ids")
                call["position_ids"] = where if positions is None else gathered(positions.expand_as(ids), where)
                call["attention_mask"] = self._query_rows(given.get("attention_mask"), where)
        canvas.cache.index = where
        if self._takes_positions:
            call[self._cache_argument] = canvas.cache
        call["use_cache"] = self._takes_positions
        call.pop("return_dict", None)
        if "return_dict" in self._signature.parameters:
            call["return_dict"] = True
        out = inner(**call)
        self._check(canvas, out)
        logits = out.logits.detach()
        if canvas.depths is not None and canvas.depths.widened:
            where = canvas.cache.index  # of the last layer
        canvas.cache.end()
        projected = logits.shape[0] * logits.shape[1]
        if canvas.projection is not None and canvas.projection.where is not None:
            where = canvas.projection.where
        if where is not None:
            if where.shape[1] != logits.shape[1]:
                raise UnsupportedModel(
                    f"{type(unwrapped(self._model())).__name__} returned logits of {logits.shape[1]} positions, and "
                    f"ran on {where.shape[1]}. Allowed: one row of logits for each position. Use a rule without "
                    "logits=masks, or restore the model."
                )
            kept = logits.new_zeros(len(logits), 0, logits.shape[2]) if canvas.logits is None else canvas.logits
            kept = grown(kept.to(logits.dtype), 1, ids.shape[1])
            logits = kept.scatter(1, where[..., None].expand_as(logits), logits)
        canvas.logits, canvas.output = logits, out if self.source.repeat else None
        return _with_logits(out, logits, given), projected

    def _check(self, canvas: Canvas, out: Any) -> None:
        """Raise UnsupportedModel if a forward of all positions has not filled what the rule needs."""
        title = type(unwrapped(self._model())).__name__
        if not hasattr(out, "logits"):
            raise UnsupportedModel(
                f"the forward of {title} returned a {type(out).__name__} without logits. Allowed: an output with the "
                "field logits, as in transformers."
            )
        layers = self._layers if self.source.needs else 1
        if canvas.cache.layers_kept < layers:
            raise UnsupportedModel(
                f"the layers of {title} did not write their keys and values into the cache that its forward takes. "
                "Restore it: this model cannot be accelerated by a token rule."
            )
        if canvas.drift is not None and len(canvas.drift.queries) < layers:
            raise UnsupportedModel(
                f"the attention of {title} is not called through transformers' AttentionInterface. "
                "Use a rule without drift: dkv, dual."
            )

    def _query_rows(self, mask: Any, where: Tensor) -> Any:
        """Return the attention mask for the query rows ``where``.

        Args:
            mask: None; a mask of keys [B, N]; or one of queries and keys [B, 1 or heads, N or 1, N].
            where: int64 [B, n].
        """
        if not isinstance(mask, Tensor):
            return mask
        if mask.ndim == 2:  # real tokens are 1
            rows = mask.bool()[:, None, None, :].expand(-1, 1, where.shape[1], -1)
            model = self._model()
            if getattr(getattr(model, "config", None), "_attn_implementation", "sdpa") in ("sdpa", None):
                return rows
            dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
            return torch.zeros(rows.shape, dtype=dtype, device=rows.device).masked_fill(~rows, torch.finfo(dtype).min)
        if mask.shape[2] == 1:
            return mask.expand(-1, -1, where.shape[1], -1)
        return picked(mask.expand(where.shape[0], -1, -1, -1), where)


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _with_logits(out: Any, logits: Any, given: dict[str, Any]) -> Any:
    """Return the output of a forward with a copy of ``logits`` and without its cache, in the form that was asked for.

    The loop may write into the copy.
    """
    fields = {name: value for name, value in out.items() if name not in CACHES}
    made = type(out)(**fields | {"logits": logits.clone()})
    return made.to_tuple() if given.get("return_dict") is False else made
