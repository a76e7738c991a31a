"""Which pipelines and networks of diffusers can be cached, tried on tiny ones: here, with cache-dit, with diffusers.

    python benchmarks/supported.py
    python benchmarks/supported.py --only-fit   # two minutes: measures the column "fit", keeps the others of the page

Prints the counts and writes ``docs/supported.md``, and the counts beside the other results. It takes the tiny pipelines
of ``tests/helpers/`` (random weights, real classes; no download), so it needs a checkout. Every entry is the outcome of
runs made there and then:

  yes        with every step computed the result is the untouched pipeline's, bit for bit; with some predicted, fewer
             parts of the network run, and a second run gives the same bits; afterwards every object is as it was found
  wrong      with nothing cached the result already differs
  no effect  nothing is skipped, and nobody says so
  else       what was said

The column "fit" is the target that ``optimize`` takes for the recording of one call: the state of the sampling loop.
Where the loop cannot be replayed, the target is the output of the network, and the reason stands with it. Where it
cannot be recorded, there is none.
"""

from __future__ import annotations

import argparse
import collections
import importlib.metadata
import inspect
import io
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.models.cache_utils import CacheMixin

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]

import denoisers  # noqa: E402
import pipelines  # noqa: E402
from calibrated import recorded  # noqa: E402
from pipelines import ALL, fresh  # noqa: E402
from probes import counted, offered, outcome  # noqa: E402

from diffcache.documents import files  # noqa: E402
from diffcache.errors import UnsupportedModel  # noqa: E402
from diffcache.host.structure import find_sites  # noqa: E402
from diffcache.text import markdown  # noqa: E402

PEERS = ("cache-dit", "diffusers")
ANY, NONE = 1e9, 0.0  # thresholds under which everything, or nothing, is served from a cache


def main() -> None:
    parser = argparse.ArgumentParser(description="Write docs/supported.md.")
    parser.add_argument("--only-fit", action="store_true", help="measure the column 'fit' and keep the others")
    only_fit = parser.parse_args().only_fit
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    page = ROOT / "docs" / "supported.md"
    kept = outcomes(page.read_text(encoding="utf-8")) if only_fit else {}
    rows = []
    for name in progress(ALL):
        found = kept[name] if only_fit else {"diffcache": said(ours, name), **{p: said(PEER[p], name) for p in PEERS}}
        rows.append((name, {**found, "fit": said(fit_target, name)}))
    lines = [*INTRODUCTION, *counts(rows), "", *table(rows), "", "## Networks", "", *networks()]
    files.write(page, "\n".join(lines) + "\n")
    summary = "\n".join(counts(rows))
    files.write(ROOT / "benchmarks" / "results" / "supported.md", summary + "\n")
    print(summary)


def outcomes(page: str) -> dict[str, dict[str, str]]:
    """Return the outcomes on the page, without the column "fit", by name of the tiny pipeline.

    Raises:
        SystemExit: The page is of another version of diffusers or cache-dit, or a pipeline is missing.
    """
    for version in (f"diffusers {diffusers.__version__}'s", f"cache-dit {importlib.metadata.version('cache-dit')} "):
        if version not in page:
            sys.exit(f"docs/supported.md was not made with {version.rstrip()}. Run this script without --only-fit.")
    found, heads = {}, []
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if "as" in cells:
            heads = cells
        elif heads and len(cells) == len(heads) and cells[1] in ALL:
            row = dict(zip(heads, cells, strict=True))
            found[row["as"]] = {"diffcache": row["here"], **{peer: row[peer] for peer in PEERS}}
    if missing := [name for name in ALL if name not in found]:
        sys.exit(f"docs/supported.md has no row for {', '.join(missing)}. Run this script without --only-fit.")
    return found


def progress(names: Any) -> Iterator[str]:
    for n, name in enumerate(names, 1):
        print(f"{n} of {len(names)}: {name}", file=sys.stderr, flush=True)
        yield name


def said(trial: Callable[[str], str], name: str) -> str:
    """What a trial came to, or what was raised."""
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            return trial(name)
    except Exception as error:  # a peer may raise anything
        first = str(error).strip().split("\n")[0]
        return f"{type(error).__name__}: {first[:70]}{'…' * (len(first) > 70)}"


def result(pipe: Any, name: str) -> torch.Tensor:
    return pipelines.run(pipe, ALL[name].call(pipe))


# ------------------------------------------------------------------ here


def ours(name: str) -> str:
    """At every granularity that the denoisers have."""
    return outcome(fresh(name), ALL[name])


def fit_target(name: str) -> str:
    """What `optimize` fits to, by one run in full, recorded.

    "state"; "output" and why the loop cannot be replayed; or "none" and why it cannot be recorded.
    """
    try:
        found = recorded(name)
    except UnsupportedModel as error:
        return f"none: {markdown(str(error).partition('. ')[0])}"
    return found.target if found.target == "state" else f"output: {markdown(found.why_output.rstrip('.'))}"


# ------------------------------------------------------------------ peers


def by_cache_dit(name: str) -> str:
    import cache_dit

    def on(pipe: Any, threshold: float) -> None:
        warm = 1 if threshold else 1000
        config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=warm, residual_diff_threshold=threshold
        )
        cache_dit.enable_cache(pipe, cache_config=config)

    return tried(name, on)


def by_diffusers(name: str) -> str:
    def on(pipe: Any, threshold: float) -> None:
        for denoiser in ALL[name].denoisers:
            getattr(pipe, denoiser).enable_cache(diffusers.FirstBlockCacheConfig(threshold=threshold))

    if not all(isinstance(getattr(pipelines.shared(name), d), CacheMixin) for d in ALL[name].denoisers):
        return "not offered"
    return tried(name, on)


def tried(name: str, on: Callable[[Any, float], None]) -> str:
    pipe = fresh(name)
    untouched, whole = counted(pipe, ALL[name])
    on(pipe, NONE)
    if not torch.equal(result(pipe, name), untouched):
        return "wrong"
    pipe = fresh(name)
    on(pipe, ANY)
    return "yes" if counted(pipe, ALL[name])[1].total() < whole.total() else "no effect"


PEER = {"cache-dit": by_cache_dit, "diffusers": by_diffusers}


# ------------------------------------------------------------------ the page

INTRODUCTION = (
    "# Supported pipelines",
    "",
    f"Each row was tried on a tiny pipeline of diffusers {diffusers.__version__}'s own classes, with random weights. "
    "`python benchmarks/supported.py` writes this page.",
    "",
    "*as*: name of the tiny pipeline in `tests/helpers/pipelines/`, one for each way of calling it. *guidance*: how "
    "the branches reach the network: `separate` calls, or `batched` in one. *sites*: where outputs can be cached, with "
    "their number. *fit*: what [`optimize`](explanation/state-target.md) fits to.",
    "",
    "| fit | meaning |",
    "|---|---|",
    "| state | The loop can be replayed. `optimize` searches for the steps to compute, fits the state after the "
    "sampler's update, and promises a fidelity |",
    "| output | The loop cannot be replayed, for the reason given. `optimize` fits the network's outputs at evenly "
    "spaced steps, which is less accurate, and warns (`WeakerFit`) |",
    "| none | The loop cannot be recorded, for the reason given. `optimize` raises `UnsupportedModel`, which says what "
    "to do |",
    "",
    "The other columns are outcomes:",
    "",
    "| entry | meaning |",
    "|---|---|",
    "| yes | with every step computed, the result is the untouched pipeline's; with some predicted, fewer parts of the "
    "network run |",
    "| wrong | with nothing cached, the result already differs |",
    "| no effect | nothing is skipped, without a message |",
    "| not offered | the package has no cache for this network |",
    "| other text | the error that was raised |",
    "",
    '<div data-filter="Filter: flux inpaint"></div>',
    "",
)


def counts(rows: list[tuple[str, dict[str, str]]]) -> list[str]:
    yes = {who: sum(found[who] == "yes" for _, found in rows) for who in ("diffcache", *PEERS)}
    classes = {name: getattr(diffusers, name) for name in networks_known() if hasattr(diffusers, name)}
    mixed = sum(issubclass(kind, CacheMixin) for kind in classes.values())
    version = importlib.metadata.version("cache-dit")
    fits = collections.Counter(found["fit"].partition(":")[0] for _, found in rows)
    return [
        f"Of {len(rows)} pipelines and ways of calling them, {yes['diffcache']} work here, {yes['cache-dit']} with "
        f"cache-dit {version} (DBCache), {yes['diffusers']} with diffusers' FirstBlockCache.",
        f"Of {len(classes)} networks in diffusers' folders of transformers and U-Nets, "
        f"{len(classes) - len(denoisers.NO_DENOISERS)} can be cached here, {mixed} have diffusers' `enable_cache`.",
        f"`optimize` fits the state in {fits['state']} of the {len(rows)}, and outputs in {fits['output']}. It cannot "
        f"record {fits['none']}.",
    ]


HEAD = [
    "| pipeline | as | guidance | sites | fit | here | cache-dit | diffusers |",
    "|---|---|---|---|---|---|---|---|",
]
HEADINGS = {"image": "Pictures", "video": "Video", "audio": "Audio"}


def table(rows: list[tuple[str, dict[str, str]]]) -> list[str]:
    """One table for each kind of output."""
    lines = []
    for name, found in rows:
        tiny, pipe = ALL[name], pipelines.shared(name)
        sites = find_sites(getattr(pipe, tiny.denoisers[0]))
        kinds = ", ".join(offered(pipe))
        lines.append(
            f"| {type(pipe).__name__} | {name} | {tiny.guidance} | {kinds} ({len(sites)}) | {found['fit']} | "
            f"{found['diffcache']} | {found['cache-dit']} | {found['diffusers']} |"
        )
    return grouped(lines)


def grouped(lines: list[str]) -> list[str]:
    """Rows of the table under a heading for each modality, sorted by pipeline."""
    found = []
    for modality, heading in HEADINGS.items():
        members = [line for line in lines if ALL[line.split(" | ")[1]].modality == modality]
        found += ["", f"## {heading}", "", *HEAD, *sorted(members)]
    return found[1:]


def networks_known() -> list[str]:
    from diffusers.models import transformers, unets

    found = []
    for package in (transformers, unets):
        for kind in vars(package).values():
            if (
                inspect.isclass(kind)
                and issubclass(kind, diffusers.ModelMixin)
                and kind.__module__.startswith(package.__name__)
            ):
                found.append(kind.__name__)
    return sorted(set(found) | set(denoisers.TINY) | set(denoisers.NO_DENOISERS))


def networks() -> list[str]:
    """Every network, where it is tried, and the sites it has."""
    within: dict[str, list[str]] = {}
    modules: dict[str, Any] = {}
    for name, tiny in ALL.items():
        for denoiser in tiny.denoisers:
            module = getattr(pipelines.shared(name), denoiser)
            modules[type(module).__name__] = module
            within.setdefault(type(module).__name__, []).append(name)
    lines = ["| network | tried in | stacks | blocks | sublayers |", "|---|---|---:|---:|---:|"]
    for name in networks_known():
        if name in denoisers.NO_DENOISERS:
            lines.append(f"| {name} | not: {denoisers.NO_DENOISERS[name]} | | | |")
            continue
        module = modules[name] if name in modules else denoisers.TINY[name].build()
        kinds = [site.partition(":")[0] for site in find_sites(module)]
        where = ", ".join(dict.fromkeys(within.get(name, ["a separate loop"])))
        lines.append(
            f"| {name} | {where} | {' | '.join(str(kinds.count(k)) for k in ('stack', 'block', 'sublayer'))} |"
        )
    return lines


if __name__ == "__main__":
    main()
