"""Evaluate token rules on a language model: exact match, agreement with the full loop, tokens per second."""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from diffcache import host, tokens
from diffcache.api import accelerated, loaded, report
from diffcache.documents import files
from diffcache.documents.token_schedule import TokenSchedule
from diffcache.errors import BadOption, UnknownName, Unusable
from diffcache.eval.methods import FULL, Method
from diffcache.host import MARK
from diffcache.patch import layer, spot
from diffcache.profiling.measuring.token_measure import demand_loop
from diffcache.profiling.recording import wait
from diffcache.settings import shows_progress
from diffcache.tokens import TokenRule
from diffcache.tokens.answers import same_tokens, token_ids
from diffcache.tokens.report import TokenReport

Score = Callable[[Mapping[str, Any], Tensor], Sequence[bool]]
COLUMNS = (
    "method",
    "exact match",
    "against full",
    "same tokens",
    "same answers",
    "tokens/s",
    "speed-up",
    "forwards",
    "computed",
    "kept MB",
)
Z = 1.959963984540054  # of a 95 % interval


@dataclass(frozen=True, kw_only=True, slots=True)
class TextResult:
    """The results of one method on all prompts.

    Attributes:
        name: The name of the method.
        rule: The token rule; empty for a loop without a cache.
        change: The arguments of the loop that the method changes.
        answers: The number of answers, over all calls.
        exact: The share of answers that the scorer accepts, with its 95 % Wilson interval. None without a scorer.
        better: The answers that are accepted with this method, and not in the full loop.
        worse: The answers that are accepted in the full loop, and not with this method.
        p_value: The p value of McNemar's exact test of ``better`` and ``worse``. None without a scorer.
        same_tokens: The share of generated tokens that equal those of the full loop.
        same_answers: The share of answers that equal those of the full loop in every token.
        seconds: The seconds of each call.
        tokens_per_s: Generated tokens per second, over all calls.
        speedup: The median over the calls of the ratio of seconds to those of the full loop.
        forwards: The number of forwards, over all calls.
        computed: The share of the positions that the forwards computed, 0 to 1.
        peak_bytes: The most bytes of kept tensors at one time.
    """

    name: str
    rule: str
    change: Mapping[str, Any] = field(default_factory=dict)
    answers: int
    exact: tuple[float, float, float] | None
    better: int = 0
    worse: int = 0
    p_value: float | None = None
    same_tokens: float
    same_answers: float
    seconds: tuple[float, ...]
    tokens_per_s: float
    speedup: float
    forwards: int
    computed: float
    peak_bytes: int


@dataclass(frozen=True, slots=True, repr=False)
class TextEvaluation:
    """The results of an evaluation of token rules.

    Attributes:
        results: The results of the methods, the full loop first.
        folder: The folder with ``record.json`` and ``table.md``.
    """

    results: tuple[TextResult, ...]
    folder: Path

    def __getitem__(self, name: str) -> TextResult:
        """Return the results of a method.

        Raises:
            UnknownName: There is no method of that name.
        """
        for one in self.results:
            if one.name == name:
                return one
        raise UnknownName("method", name, [one.name for one in self.results])

    def __iter__(self) -> Iterator[str]:
        """Return an iterator over the names of the methods."""
        return iter([one.name for one in self.results])

    def __repr__(self) -> str:
        return f"<TextEvaluation of {len(self.results)} methods on {self.results[0].answers} answers>"

    def __str__(self) -> str:
        return table(self.results)


def token_method(
    name: str, rule: str | Path | TokenRule | TokenSchedule = "", *, store: str | None = None, **change: Any
) -> Method:
    """Return a way to run a decoding loop.

    Args:
        name: The name in the table.
        rule: A token rule, a schedule or its path. Empty for the loop without a cache.
        store: The format in which keys and values are kept. None keeps the precision of the model.
        **change: Arguments of the loop that the method changes, such as the number of tokens that a step commits.

    Raises:
        DiffCacheError: The rule or the name is not valid.
    """
    if rule != "":
        rule = loaded(rule, for_tokens=True)
        detail = str(tokens.parse_token_rule(rule))
        kept = f"{detail}, {store}" if store else detail
        on = partial(accelerated, schedule=rule, store=store)
        return Method(name=name, kind="ours", on=on, change=change, detail=kept)
    return Method(name=name, kind="fewer steps", change=change)


def evaluate_text(
    pipe: Any,
    methods: Mapping[str, str] | Sequence[Method],
    calls: Sequence[Mapping[str, Any]],
    *,
    score: Score | None = None,
    out: str | Path = "evaluation",
    measured: Callable[[TextResult], object] | None = None,
    progress: bool | None = None,
) -> TextEvaluation:
    """Run a decoding loop in full and with each method on the same prompts, and compare the answers.

    The calls of all methods alternate, and the order rotates from call to call. In the last call it is that of the
    results.

    Args:
        pipe: A :class:`diffcache.Loop` around a language model, or a diffusers pipeline with one. A call returns token
            ids, int64 [B, N] or [B, generated tokens]. It is left unchanged.
        methods: Name -> token rule, or methods that :func:`token_method` makes.
        calls: The arguments of the loop, one dictionary for each batch of prompts.
        score: Judges answers: ``score(call, ids)`` returns one bool for each row. None: answers are only compared.
        out: The folder for ``record.json`` and ``table.md``.
        measured: Called with each result when the last call of its method has ended, the full loop first.
        progress: Whether to show a progress bar. None: on a terminal or in a notebook.

    Returns:
        The results, the full loop first.

    Raises:
        BadOption: An argument is not valid, or a call returns no token ids.
        AlreadyAccelerated: The model is accelerated.
    """
    pipe = host.adopted(pipe)
    network = host.language_model_of(pipe)
    if network is None:
        raise Unusable(
            f"this {host.host_name(pipe)}",
            "it has no language model",
            "Pass diffcache.Loop(model, sample), where sample runs your decoding loop, or a pipeline for text",
        )
    demand_loop(pipe)
    mask = host.mask_id_of(pipe)
    if mask is None:
        raise BadOption("model.config.mask_token_id", None, "the id of the mask token: set it before the evaluation")
    host.demand_full_run(pipe)
    host.check_calls(pipe, calls, repeatable=False)
    if isinstance(methods, Mapping):
        methods = [token_method(name, rule) for name, rule in methods.items()]
    if not all(isinstance(one, Method) for one in methods):
        raise BadOption("methods", f"{methods!r:.80}", "a dictionary, name -> token rule, or a list of token_method(…)")
    for one in methods:
        host.check_calls(pipe, [{**call, **one.change} for call in calls], repeatable=False)
    every = [Method(name=FULL, kind="full"), *methods]
    if len({one.name for one in every}) < len(every):
        raise BadOption(
            "methods", [one.name for one in methods], f"names that differ from each other and from {FULL!r}"
        )
    runs: dict[str, list[_Run]] = {one.name: [] for one in every}
    found: list[TextResult] = []
    shown = shows_progress(progress)
    with tqdm(total=len(calls) * len(every), desc="compare", unit="call", disable=not shown) as bar:
        for number, call in enumerate(calls):
            first = (len(calls) - 1 - number) % len(every)
            for one in [*every[first:], *every[:first]]:
                runs[one.name].append(_run(pipe, network, mask, one, call, score))
                bar.update(1)
                if number == len(calls) - 1:  # the full loop is the first
                    found.append(_result(one, runs[one.name], runs[FULL], scored=score is not None))
                    if measured is not None:
                        measured(found[-1])
    folder = Path(out)
    files.make_folder(folder)
    record = {"format": "diffcache.text-evaluation", "version": 1, "methods": [asdict(one) for one in found]}
    files.write(folder / "record.json", json.dumps(record, indent=1, allow_nan=False, default=str) + "\n")
    files.write(folder / "table.md", table(found) + "\n")
    return TextEvaluation(tuple(found), folder)


@dataclass(slots=True)
class _Run:
    """One call of one method.

    Attributes:
        ids: int64 [B, N], the result.
        accepted: bool [B], the answers that the scorer accepts.
        seconds: The time of the call.
        forwards: The number of forwards that the loop asked for.
        generated: The number of masks that were decoded, in all rows.
        report: The report of the token cache. None without one.
    """

    ids: np.ndarray
    accepted: np.ndarray
    seconds: float
    forwards: int
    generated: int
    report: TokenReport | None


def _run(pipe: Any, network: nn.Module, mask: int, one: Method, call: Mapping[str, Any], score: Score | None) -> _Run:
    """Run one call with a method."""
    given = {**call, **one.change}
    with one.on(pipe), _counted(network, mask) as counts, torch.no_grad():
        wait()
        began = time.perf_counter()
        ids = token_ids(pipe(**given))
        wait()
        seconds = time.perf_counter() - began
        on = MARK in getattr(host.adopted(pipe, bare=True), "__dict__", {})
        found = report(pipe) if on else None
    accepted = np.zeros(len(ids), bool)
    if score is not None:
        judged: Any = score(call, ids)
        values = list(judged) if isinstance(judged, (Sequence, np.ndarray, Tensor)) else []
        if len(values) != len(ids) or any(value not in (0, 1) for value in values):
            raise BadOption("score", f"{judged!r:.80} for {len(ids)} answers", "one bool for each answer")
        accepted = np.asarray([bool(value) for value in values])
    return _Run(ids.numpy(), accepted, seconds, counts[0], counts[1], found if isinstance(found, TokenReport) else None)


@contextlib.contextmanager
def _counted(network: nn.Module, mask: int) -> Iterator[list[int]]:
    """Count the forwards of a network, and the masks that are decoded.

    Masks that a forward still has are decoded when the next forward has tokens there, or when it is the last forward of
    its prompt.
    """
    counts = [0, 0]
    last: Tensor | None = None

    def forward(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal last
        ids = args[0] if args else kwargs.get("input_ids")
        if isinstance(ids, Tensor) and ids.ndim == 2:
            counts[0] += 1
            counts[1] += _decoded(last, ids, mask)
            last = ids.detach().clone()
        return inner(*args, **kwargs)

    undo = layer(*spot(network), forward)
    try:
        yield counts
    finally:
        undo()
        counts[1] += _decoded(last, None, mask)


def _decoded(last: Tensor | None, now: Tensor | None, mask: int) -> int:
    """Return the number of masks of the last forward that are decoded in the next one, or at its end."""
    if last is None:
        return 0
    masked = last == mask
    if now is None or len(now) != len(last) or now.shape[1] < last.shape[1]:
        return int(masked.sum())
    now = now[:, : last.shape[1]]
    if bool((~masked & (now != last)).any()):  # another prompt
        return int(masked.sum())
    return int((masked & (now != mask)).sum())


def _demand_rows(one: Method, runs: list[_Run], full: list[_Run]) -> None:
    """Raise BadOption unless a method returned as many answers as the full loop in every call."""
    for number, (run, other) in enumerate(zip(runs, full, strict=True)):
        if len(run.ids) != len(other.ids):
            raise BadOption(
                "methods",
                f"{one.name}: {len(run.ids)} answers in call {number}",
                f"{len(other.ids)}, as in the full loop",
            )


def _result(one: Method, runs: list[_Run], full: list[_Run], *, scored: bool) -> TextResult:
    """Return the results of a method. Runs have the order of the calls."""
    _demand_rows(one, runs, full)
    accepted, before = (np.concatenate([run.accepted for run in them]) for them in (runs, full))
    same = [same_tokens(run.ids, other.ids) for run, other in zip(runs, full, strict=True)]
    better, worse = int(np.sum(accepted & ~before)), int(np.sum(before & ~accepted))
    reports = [run.report for run in runs if run.report is not None]
    computed = sum(r.computed for r in reports) / max(sum(r.full for r in reports), 1) if reports else 1.0
    generated = sum(run.generated for run in runs)
    differing = sum(int(np.sum(~equal)) for equal in same)
    return TextResult(
        name=one.name,
        rule=one.detail if one.kind == "ours" else "",
        change=dict(one.change),
        answers=len(accepted),
        exact=wilson(int(accepted.sum()), len(accepted)) if scored else None,
        better=better,
        worse=worse,
        p_value=mcnemar(better, worse) if scored else None,
        same_tokens=1 - differing / max(generated, 1),
        same_answers=float(np.mean(np.concatenate([equal.all(1) for equal in same]))),
        seconds=tuple(run.seconds for run in runs),
        tokens_per_s=generated / sum(run.seconds for run in runs),
        speedup=statistics.median(f.seconds / run.seconds for f, run in zip(full, runs, strict=True)),
        forwards=sum(run.forwards for run in runs),
        computed=computed,
        peak_bytes=max((r.peak_bytes for r in reports), default=0),
    )


def wilson(successes: int, n: int) -> tuple[float, float, float]:
    """Return the share of successes, and the ends of its 95 % interval (Wilson 1927).

    Args:
        successes: The number of successes.
        n: The number of trials, at least 1.
    """
    share = successes / n
    centre = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return share, max(0.0, centre - half), min(1.0, centre + half)


def mcnemar(better: int, worse: int) -> float:
    """Return the two-sided p value of McNemar's exact test: the smaller of two counts is a fair coin's.

    Args:
        better: The number of pairs that differ in favour of the method.
        worse: The number of pairs that differ in favour of the full loop.
    """
    n, fewer = better + worse, min(better, worse)
    if n == 0:
        return 1.0
    return float(min(1.0, 2 * sum(math.comb(n, k) for k in range(fewer + 1)) / 2**n))


def table(results: Sequence[TextResult]) -> str:
    """Return a Markdown table with one row per method."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for one in results:
        exact = "–" if one.exact is None else "{:.1%} [{:.1%}, {:.1%}]".format(*one.exact)
        against = "–" if one.p_value is None else f"+{one.better} −{one.worse}, p = {one.p_value:.2g}"
        cells = (
            one.name,
            exact,
            against,
            f"{one.same_tokens:.2%}",
            f"{one.same_answers:.1%}",
            f"{one.tokens_per_s:.0f}",
            f"{one.speedup:.2f}",
            f"{one.forwards:,}",
            f"{one.computed:.1%}",
            f"{one.peak_bytes / 1e6:.1f}" if one.peak_bytes else "–",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
