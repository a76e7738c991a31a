"""``diffcache presets``: list calibrations that authors published for models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import typer

from diffcache import presets as published
from diffcache.cli import _printing
from diffcache.errors import UnknownName
from diffcache.text import markdown

HEADS = ("method", "preset", "model", "steps", "recommended by its authors")


def presets(
    model: Annotated[
        str | None, typer.Option(help="Part of the name of a model, of a preset or of a Hub id, in any case.")
    ] = None,
    network: Annotated[
        str | None, typer.Option("--class", help="The class of a network, such as WanTransformer3DModel.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="The method: teacache, magcache or firstblockcache.")] = None,
    details: Annotated[
        bool, typer.Option("--details", help="Also print the network, the conditions and the source.")
    ] = False,
    table: Annotated[bool, typer.Option("--markdown", help="Print the table of docs/presets.md.")] = False,
) -> None:
    """List calibrations that authors published for models. None was measured for this package.

    A rule finds the one for its network by itself: accelerate(pipe, "teacache:threshold=0.25").

    Example:
        diffcache presets --model wan --method magcache --details
    """
    found = matching(model, network, method)
    if table:
        typer.echo(as_markdown(found))
        return
    if _printing.on_terminal() and not details:
        _printing.table(HEADS, {"": _rows(found)})
    else:
        typer.echo(listing(found, details=details))
    if not (model or network):
        typer.echo("\nnot listed, because no rule of diffcache computes the same:")
        for one in published.left_out():
            if method in (None, one["method"]):
                typer.echo(f"  {one['method']} for {one['models']} ({one['repository']}): {one['reason']}")


def matching(model: str | None, network: str | None, method: str | None) -> tuple[published.Preset, ...]:
    """Return the presets that fit all filters. None filters nothing.

    Raises:
        UnknownName: No preset fits one of the filters.
    """
    found = published.available()
    methods = sorted({preset.method for preset in found})
    if method is not None and method not in methods:
        raise UnknownName("method with presets", method, methods)
    classes = sorted({preset.class_name for preset in found})
    if network is not None and network not in classes:
        raise UnknownName("network class with presets", network, classes, next_step=_plan_instead())
    found = tuple(p for p in found if method in (None, p.method) and network in (None, p.class_name))
    if model is None:
        return found
    named = tuple(p for p in found if any(model.lower() in text.lower() for text in (p.model, p.name, *p.hub)))
    if not named:
        raise UnknownName("model with presets", model, sorted({p.name for p in found}), next_step=_plan_instead())
    return named


def listing(found: Sequence[published.Preset], *, details: bool = False) -> str:
    """Return the presets as text, one or several lines each.

    Args:
        found: The presets.
        details: Whether to add the network, the conditions, the source and an example.
    """
    rows = _rows(found)
    widths = [max(map(len, column)) for column in zip(HEADS, *rows, strict=True)]
    lines = []
    for row, preset in zip([HEADS, *rows], [None, *found], strict=True):
        lines.append("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        if details and preset is not None:
            lines += [f"    {line}" for line in described(preset)]
    return "\n".join(lines)


def _rows(found: Sequence[published.Preset]) -> list[tuple[str, ...]]:
    return [(p.method, p.name, p.model, str(p.steps), recommended(p)) for p in found]


def described(preset: published.Preset) -> list[str]:
    """Return the lines about one preset: its network, its conditions, its source and an example."""
    config = ", ".join(f"{key}={value}" for key, value in preset.config.items())
    lines = [f"network: {preset.class_name} with {config}", f"hub: {', '.join(preset.hub)}"]
    if preset.pipelines:
        lines.append(f"pipelines: {', '.join(preset.pipelines)}")
    lines += [f"conditions: {preset.described_conditions()}", f"source: {preset.source}"]
    if preset.differs:
        lines.append(f"differs: {preset.differs}")
    threshold = "" if preset.method == "firstblockcache" else f",threshold={preset.recommended[0]['threshold']:g}"
    return [*lines, f'accelerate(pipe, "{preset.method}:preset={preset.name}{threshold}")']


def recommended(preset: published.Preset) -> str:
    """Return the settings that the authors recommend, in one line."""
    return "; ".join(_setting(setting) for setting in preset.recommended)


def as_markdown(found: Sequence[published.Preset]) -> str:
    """Return the presets as a Markdown table, followed by the list of what is left out."""
    heads = ("method", "preset", "model", "network", "steps", "recommended by its authors", "source")
    rows = [
        (p.method, f"`{p.name}`", p.model, f"`{p.class_name}`", str(p.steps), recommended(p), p.source) for p in found
    ]
    cells = [[cell if cell.startswith("`") else markdown(cell) for cell in row] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in [list(heads), *cells]]
    missing = [
        f"- {one['method']} for {one['models']} ({one['repository']}): {one['reason']}" for one in published.left_out()
    ]
    return "\n".join([lines[0], f"|{'---|' * len(heads)}", *lines[1:], "", "Left out:", "", *missing])


def _setting(setting: Mapping[str, float]) -> str:
    """Return one recommended setting as the options of a rule, with the speed-up that the authors claim."""
    options = ",".join(f"{name}={value:g}" for name, value in setting.items() if name != "speedup")
    return options + (f" ({setting['speedup']:g}x)" if "speedup" in setting else "")


def _plan_instead() -> str:
    """Return the advice for models without presets."""
    return "For another model, measure it: `diffcache profile`, then `diffcache plan`."
