"""Record full decodes of a language model: what each commit changes, and what old keys and values cost."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from diffcache import host, tokens
from diffcache.errors import UnsupportedModel, Unusable
from diffcache.patch import layer, spot
from diffcache.tokens.answers import token_ids

if TYPE_CHECKING:
    from diffcache.tokens.canvas import Canvas
    from diffcache.tokens.engine import TokenCache

PARTS = 32  # parts of a decode, of equally many commits; keys and values are kept once in each
AGES = (1, 2, 4, 8)  # in parts
PROBED = (8, 16, 24)  # parts at which old keys and values are tried
CANDIDATES = 32  # masked positions, the most confident ones, that a trial computes

Rows = dict[int, tuple[Tensor, Tensor]]  # number of the layer -> its keys and values, [B, heads, N, head_dim]


@dataclass(slots=True)
class Decoding:
    """One decode of a batch, in full.

    Attributes:
        ids: int64 [B, N], the result of the call.
        masked: One bool [B, N] for each forward, the positions that it found masked.
        drift: One float64 [B, N] for each forward: at masked positions the change of the probabilities since the
            forward before (total variation), at others the relative change of keys and values, averaged over layers.
        committed: int64 [B, N], the forward after which a position was committed, from 1 on; 0 in the prompt.
        margins: float64 [B, N], the probability of the best token less that of the second best at the commit.
        errors: One float64 [L, A] for each trial: the error of the probabilities with one layer's keys and values old.
        changes: One float64 [L, 3, A] for each trial: the relative change of keys and values. NaN without positions.
        flips: The number of positions in all trials at which another token was best.
        risks: The sum over these positions of the error divided by the margin, at most 1 each.
    """

    ids: np.ndarray
    masked: list[np.ndarray] = field(default_factory=list)
    drift: list[np.ndarray] = field(default_factory=list)
    committed: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.int64))
    margins: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    errors: list[np.ndarray] = field(default_factory=list)
    changes: list[np.ndarray] = field(default_factory=list)
    flips: int = 0
    risks: float = 0.0


def record_decodes(pipe: Any, calls: Sequence[Mapping[str, Any]], done: Callable[[], object]) -> list[Decoding]:
    """Run the calls in full, and return what their forwards did.

    Args:
        pipe: A loop around a language model, or a pipeline with one.
        calls: The arguments of the loop.
        done: Called after each call.

    Raises:
        Unusable: A call decodes nothing, or its canvas changes its length.
    """
    found = []
    for call in calls:
        recorder = _Recorder(pipe)
        ids = recorder.run(call)
        found.append(recorder.decoding(ids))
        done()
    return found


class _Recorder:
    """Records the forwards of one call, each of which computes every position.

    Args:
        pipe: A loop around a language model.
    """

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.network = network_of(pipe)
        self.cache: TokenCache = tokens.cache_for(pipe, "full")
        self.mask, self.shift = self.cache.mask, bool(self.cache.source.shift)
        self.record = Decoding(np.zeros((0, 0), np.int64))
        self.ids: np.ndarray | None = None
        self.predicted: Tensor | None = None  # [B, N, V], the probabilities of the last forward
        self.kept: Rows = {}  # of the last forward
        self.parts: deque[tuple[int, np.ndarray, Rows]] = deque(maxlen=max(AGES) + 1)

    def run(self, call: Mapping[str, Any]) -> Any:
        """Run the call, and return its result."""
        self.cache.attach()
        undo = layer(*spot(self.network), self.forward)
        try:
            with torch.no_grad():
                return self.pipe(**call)
        finally:
            undo()
            self.cache.detach()

    def forward(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Wrap a forward of the network."""
        out = inner(*args, **kwargs)
        if self.cache.trying:
            return out
        canvas = canvas_of(self.cache)
        given = args[0] if args else kwargs["input_ids"]
        if self.ids is not None and given.shape != self.ids.shape:
            raise Unusable(
                "the loop",
                f"its canvas grows from {self.ids.shape[1]} to {given.shape[1]} positions",
                'Use a rule without calibration, such as "block_causal" or "dkv"',
            )
        if self.cache.runs > 1:
            raise Unusable(
                "calls",
                "a call decodes more than one canvas: one prompt after the other, or the branches of guidance",
                "Pass one call for each batch of prompts, or use a rule without calibration, such as dkv",
            )
        self._see(given.detach(), canvas)
        return out

    def _see(self, ids: Tensor, canvas: Canvas) -> None:
        """Record a forward."""
        logits: Any = canvas.logits
        now, record = ids.cpu().numpy().copy(), self.record
        masked = now == self.mask
        if self.ids is None:
            record.committed, record.margins = np.zeros(now.shape, np.int64), np.zeros(now.shape)
        else:
            self._commit(record.masked[-1] & ~masked, len(record.masked))
        if self.shift:  # the logits at j - 1 decode position j
            logits = torch.cat([logits[:, :1], logits[:, :-1]], 1)
        predicted = probabilities(logits, self.mask)
        kept = canvas.cache.rows()
        record.drift.append(self._drift(predicted, kept, masked))
        record.masked.append(masked)
        self.ids, self.predicted, self.kept = now, predicted, kept
        begun = record.masked[0].sum()
        part = int((begun - masked.sum()) * PARTS // max(begun, 1))
        if not self.parts or part > self.parts[-1][0]:
            last = self.parts[-1][0] if self.parts else part
            self.parts.append((part, masked, kept))
            if masked.any() and any(last < probed <= part for probed in PROBED):
                self._probe(ids)

    def _commit(self, committed: np.ndarray, forward: int) -> None:
        """Record the positions that were committed after a forward, numbered from 1 on."""
        if self.predicted is None:
            return
        best = self.predicted.topk(2, dim=-1).values
        margin = (best[..., 0] - best[..., 1]).double().cpu().numpy()
        self.record.committed[committed] = forward
        self.record.margins[committed] = margin[committed]

    def _drift(self, predicted: Tensor, kept: Rows, masked: np.ndarray) -> np.ndarray:
        """Return the drift of every position since the last forward, float64 [B, N]. Masks that were committed: 0."""
        if self.predicted is None or self.ids is None:
            return np.zeros(masked.shape)
        moved = (0.5 * (predicted - self.predicted).abs().sum(-1)).double().cpu().numpy()
        changed = np.mean([_change(self.kept[n], kept[n]) for n in kept], axis=0)
        before = self.record.masked[-1]
        drift: np.ndarray = np.where(masked, moved, changed) * (masked == before)
        return drift

    def _probe(self, ids: Tensor) -> None:
        """Try older keys and values in one layer after the other, and record the error of the probabilities.

        If several tokens are committed at a time, some ages have no keys and values. Errors are interpolated to them.
        """
        (part, masked, kept), past = self.parts[-1], list(self.parts)[:-1]
        if self.predicted is None:
            return
        confidence = np.where(masked, self.predicted.amax(-1).cpu().numpy(), -1)
        count = min(CANDIDATES, int(masked.sum(1).min()))
        olds = {}  # age in parts -> the newest keys and values of at least the wanted age
        for age in AGES:
            if enough := [one for one in past if part - one[0] >= age]:
                olds[part - enough[-1][0]] = enough[-1]
        ages = sorted(olds)
        if count == 0 or not ages:
            return
        index = np.argsort(-confidence, axis=1, kind="stable")[:, :count]
        exact = torch.gather(
            self.predicted,
            1,
            torch.from_numpy(index).to(ids.device)[..., None].expand(-1, -1, self.predicted.shape[-1]),
        )
        best = exact.topk(2, dim=-1).values
        margin = (best[..., 0] - best[..., 1]).clamp_min(1e-6)
        errors, changes = np.zeros((len(kept), len(ages))), np.full((len(kept), 3, len(ages)), np.nan)
        computed = np.maximum(index - 1, 0) if self.shift else index
        for column, age in enumerate(ages):
            _, then, old = olds[age]
            classes = (~self.record.masked[0], self.record.masked[0] & ~masked & ~then, masked & then)
            for row, number in enumerate(kept):
                logits = self.cache.trial(ids, {**kept, number: old[number]}, computed)
                found = probabilities(logits, self.mask)
                error = 0.5 * (found - exact).abs().sum(-1)
                errors[row, column] = float(error.mean())
                self.record.flips += int((found.argmax(-1) != exact.argmax(-1)).sum())
                self.record.risks += float((error / margin).clamp(max=1).sum())
                change = _change(old[number], kept[number])
                for which, where in enumerate(classes):
                    if where.any():
                        changes[row, which, column] = change[where].mean()
        self.record.errors.append(_at_ages(ages, errors))
        self.record.changes.append(_at_ages(ages, changes))

    def decoding(self, result: Any) -> Decoding:
        """Return the record of the call, which has ended with ``result``."""
        ids = token_ids(result)
        if not self.record.masked or not self.record.masked[0].any():
            raise Unusable("calls", "a call decoded no mask", "Pass prompts for which the loop decodes masks")
        self._commit(self.record.masked[-1], len(self.record.masked))
        self.record.ids = ids.numpy()
        return self.record


def _at_ages(ages: Sequence[int], values: np.ndarray) -> np.ndarray:
    """Return values [..., ages], measured at ``ages``, interpolated to those of ``AGES``. At age 0 they are 0."""
    return np.apply_along_axis(lambda row: np.interp(AGES, [0, *ages], [0, *row]), -1, values)


def canvas_of(cache: TokenCache) -> Canvas:
    """Return the canvas with what the last forward computed.

    Raises:
        UnsupportedModel: The cache took no part in a forward.
    """
    if cache.canvas is None or cache.passed:
        reasons = "; ".join(cache.passed) or "it got no input_ids"
        raise UnsupportedModel(f"a forward of the loop cannot be recorded: {reasons}. See docs/language-models.md")
    return cache.canvas


def network_of(pipe: Any) -> nn.Module:
    """Return the language model of a loop or a pipeline.

    Raises:
        UnsupportedModel: There is none.
    """
    network = host.language_model_of(pipe)
    if network is None:
        raise UnsupportedModel(f"{host.host_name(pipe)} has no language model")
    return network


def probabilities(logits: Tensor, mask: int) -> Tensor:
    """Return the probabilities of the tokens, without the mask token, float32."""
    logits = logits.float().clone()
    logits[..., mask] = -torch.inf
    return logits.softmax(-1)


def _change(before: tuple[Tensor, Tensor], now: tuple[Tensor, Tensor]) -> np.ndarray:
    """Return the relative change of the keys and values of one layer, float64 [B, N]."""
    moved = sum((b - a).float().pow(2).sum((1, 3)) for a, b in zip(before, now, strict=True))
    size = sum(a.float().pow(2).sum((1, 3)) for a in before)
    change: np.ndarray = (moved / size.clamp_min(1e-12)).sqrt().double().cpu().numpy()  # type: ignore[union-attr]
    return change
