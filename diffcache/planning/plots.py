"""Draw profiles and schedules: the distances between outputs of two steps, the steps that a schedule computes, and the
weights of its predictions.

matplotlib (the extra ``report``) is imported when a picture is drawn.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffcache.documents import files
from diffcache.documents.profile import Profile, SiteProfile
from diffcache.documents.schedule import CacheSchedule, DenoiserPlan, SitePlan, decibels, noise_scheduler_title
from diffcache.documents.sites import GRANULARITIES, in_order, parse
from diffcache.errors import BadOption, DiffCacheError, Unusable
from diffcache.text import printable

DISTANCE = "magma_r"  # perceptually uniform; small distances are light, like the background
INK, MUTED, PALE, MARK = "#22223b", "#6b7080", "#e8e9ef", "#0072b2"
LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # distinguishable with colour blindness (Okabe and Ito)
STYLE = {
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.labelsize": 9,
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "figure.facecolor": "white",
    "legend.frameon": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
}
MOST_PANELS = 6  # the most masks in one figure
MOST_LABELS = 40  # the most labels of sites in one column
MOST_TABLES = 3  # the most tables of weights in one figure
WIDTH = 3.6  # width of a panel in inches
INPUT = "change of the input"
NO_BREAK = "\N{NO-BREAK SPACE}"


def save(document: Profile | CacheSchedule, path: Path, over: Profile | None = None) -> Path:
    """Write the ``figure`` of a document to a file.

    Args:
        document: A profile or a schedule.
        path: The file. Its suffix sets the format.
        over: See ``figure``.

    Returns:
        The path.

    Raises:
        BadOption: matplotlib cannot write the format, the folder does not exist, or ``over`` does not fit the
            schedule.
        DiffCacheError: matplotlib is not installed.
    """
    picture = figure(document, over)
    formats = sorted(picture.canvas.get_supported_filetypes())
    if path.suffix[1:].lower() not in formats:
        raise BadOption("plot", str(path), f"a name that ends in one of {', '.join(formats)}")
    if not path.absolute().parent.is_dir():
        raise BadOption("plot", str(path), "a file in a folder that exists")
    return files.write(path, lambda file: picture.savefig(file, format=path.suffix[1:].lower(), dpi=160))


def figure(document: Profile | CacheSchedule, over: Profile | None = None) -> Any:
    """Return a matplotlib figure of a document, without a window.

    The figure of a profile shows the distances between the outputs of any two steps, averaged over sites and branches,
    with one panel per granularity, and the measured dynamics of the loop. The figure of a schedule shows its masks,
    site by step. With ``over`` it shows them as squares over the distances of that profile. Below, it shows the
    weights of the predictions, unless every prediction is the newest output.

    Args:
        document: A profile or a schedule.
        over: The profile that the schedule was planned from, or None.

    Raises:
        BadOption: ``over`` has other steps or sites than the schedule.
        DiffCacheError: matplotlib is not installed.
    """
    matplotlib = _matplotlib()
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        drawn = Figure(layout="constrained")
        if isinstance(document, Profile):
            _draw_profile(drawn, document)
        elif over is None:
            _draw_masks(drawn, document)
        else:
            _draw_masks_over(drawn, document, over)
    return drawn


def _matplotlib() -> Any:
    """Import matplotlib. Raise DiffCacheError if it is not installed."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise DiffCacheError("plots need matplotlib, which is not installed: pip install 'diffcache[report]'") from None
    return matplotlib


# --- profiles ---------------------------------------------------------------------------------------------------------


def _draw_profile(figure: Any, profile: Profile) -> None:
    """Draw the distances of each granularity at the left, and curves over the steps at the right."""
    groups = _granularities(profile)
    columns = min(len(groups), 2)
    rows = -(-len(groups) // columns)
    _sized(figure, profile, WIDTH * (columns + 1), 3.2 * rows + 0.4)
    left, right = figure.add_gridspec(1, 2, width_ratios=(columns, 1))
    tables = left.subgridspec(rows, columns)
    for n, (name, sites) in enumerate(groups.items()):
        title = name if len(sites) == 1 else f"{name}, mean of {len(sites)} sites"
        _heat(figure, figure.add_subplot(tables[divmod(n, columns)]), _mean_distance(sites), title)
    lines = [_draw_change] if profile.dynamics is None else [_draw_change, _draw_say, _draw_response]
    panels = right.subgridspec(len(lines), 1)
    for n, draw in enumerate(lines):
        axes = figure.add_subplot(panels[n])
        draw(axes, profile)
        axes.set_xlim(-0.5, profile.steps - 0.5)
        axes.xaxis.set_major_locator(_whole_ticks())
        axes.yaxis.set_major_locator(_few_ticks())
        axes.set_xlabel("step" if n == len(lines) - 1 else "")
    _caption(
        figure,
        "Each cell: how far the output of one step (across) is from the output of another (down), if it is used there. "
        "Light: near. relative L1 = sum of absolute differences / sum of absolute values.",
    )


def _draw_change(axes: Any, profile: Profile) -> None:
    """Draw the change of the outputs from step to step."""
    groups = _granularities(profile)
    for (name, sites), colour in zip(groups.items(), LINES, strict=False):
        change = np.diagonal(_mean_distance(sites), offset=-1)
        axes.plot(np.arange(1, len(change) + 1), change, color=colour, lw=1.4, label=name)
    axes.set_title("change of the output since the step before", fontsize=9)
    axes.set_ylim(0, None)
    if len(groups) > 1:
        axes.legend(fontsize=8, ncols=2)


def _draw_say(axes: Any, profile: Profile) -> None:
    """Draw how far the final state moves if a step's output is missing, without the response of the network."""
    assert profile.dynamics is not None
    moved = np.abs(profile.dynamics.reach[-1]) * np.sqrt(np.diagonal(profile.dynamics.gram))
    axes.bar(np.arange(len(moved)), moved, width=0.75, color=LINES[0])
    axes.set_title("how far each output moves the final state (RMS)", fontsize=9)


def _draw_response(axes: Any, profile: Profile) -> None:
    """Draw the response of the network to an error of the state, and the spread of the responses."""
    assert profile.dynamics is not None
    axes.axhline(0, color=MUTED, lw=0.6)
    part, rest = profile.dynamics.response, profile.dynamics.spread**0.5
    axes.plot(part, color=LINES[0], lw=1.4, label="in the direction of the error")
    axes.plot(rest, color=LINES[1], lw=1.4, label="in other directions")
    axes.legend(fontsize=7, frameon=False)
    axes.set_title("change of the output per error of its input", fontsize=9)


# --- schedules --------------------------------------------------------------------------------------------------------


def _draw_masks(figure: Any, schedule: CacheSchedule) -> None:
    """Draw the masks of a schedule, one row per site, and the weights of its predictions."""
    rows = [(name, site) for name, d in schedule.denoisers.items() for site in in_order(d.sites)]
    masks = np.array([_as_run(schedule.denoisers[name], site) for name, site in rows])
    several = len(schedule.denoisers) > 1
    tables, left = _weight_tables(schedule)
    heights = [0.5 + 0.18 * min(len(rows), 70), *(_height(table) for table in tables)]
    _sized(figure, schedule, 8.0, sum(heights) + 0.3, left)
    grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
    _mask(figure.add_subplot(grid[0]), masks, [f"{name} {site}" if several else site for name, site in rows])
    for n, table in enumerate(tables):
        _weights(figure, figure.add_subplot(grid[n + 1]), table)
    strips = "Blue: the step is computed. Grey: its output is predicted. At the right: computed steps of all steps."
    _caption(figure, f"{strips} {_about_weights(tables)}")


def _draw_masks_over(figure: Any, schedule: CacheSchedule, profile: Profile) -> None:
    """Draw the masks of a schedule over the distances of a profile, and the weights of its predictions."""
    panels = _panels(schedule, profile)
    shown = panels[:MOST_PANELS]
    columns = min(len(shown), 3)
    rows = -(-len(shown) // columns)
    left = len(panels) - len(shown)
    tables, more = _weight_tables(schedule)
    heights = [3.6] * rows + [_height(table) for table in tables]
    width = max(WIDTH * columns + 0.8, 7.0 if tables else 0.0)
    _sized(figure, schedule, width, sum(heights) + 0.3, f"{left} more masks not shown" if left else "", more)
    grid = figure.add_gridspec(len(heights), columns, height_ratios=heights)
    for n, (title, table, compute) in enumerate(shown):
        axes = figure.add_subplot(grid[divmod(n, columns)])
        _heat(figure, axes, table, title)
        _spans(axes, compute)
    for n, weights in enumerate(tables):
        _weights(figure, figure.add_subplot(grid[rows + n, :]), weights)
    boxes = "A box: a computed step and the steps at which its output is the newest. Its left edge: the error of reuse."
    _caption(figure, f"{boxes} {_about_weights(tables)}")


@dataclass(frozen=True, slots=True)
class _Table:
    """The coefficients of one or more sites: values float64 [rows, T], NaN where nothing is predicted."""

    title: str
    names: list[str]
    values: np.ndarray


def _weight_tables(schedule: CacheSchedule) -> tuple[list[_Table], str]:
    """Return the coefficients of the predictions, and a sentence on those that are left out.

    Sites with the same coefficients share a table. Sites that only reuse the newest output have none.
    """
    groups: dict[tuple[bytes, ...], tuple[list[str], SitePlan]] = {}
    for name, denoiser in schedule.denoisers.items():
        for site in in_order(denoiser.sites):
            plan = denoiser.sites[site]
            parts = [plan.compute, plan.weights, plan.kappa, plan.inputs]
            key = (name.encode(), *(b"" if part is None else part.tobytes() for part in parts))
            groups.setdefault(key, ([], plan))[0].append(f"{name} {site}" if len(schedule.denoisers) > 1 else site)
    tables = []
    for sites, plan in groups.values():
        names, values = _coefficients(plan)
        if not names:
            continue
        whose = sites[0] if len(sites) == 1 else f"{sites[0]} and {len(sites) - 1} more sites"
        tables.append(_Table(f"weights of the predictions: {whose}", names, values))
    left = len(tables) - MOST_TABLES
    return tables[:MOST_TABLES], f"weights of {left} more groups of sites not shown" if left > 0 else ""


def _coefficients(plan: SitePlan) -> tuple[list[str], np.ndarray]:
    """Return the names and values of a plan's coefficients w, v and κ at the predicted steps; none for plain reuse."""
    branches, _, anchors = plan.weights.shape
    predicted = ~plan.compute
    names: list[str] = []
    rows: list[np.ndarray] = []
    plain = True
    for branch in range(branches):
        of = f", branch {branch + 1}" if branches > 1 else ""
        for k in range(anchors):
            row = plan.weights[branch, :, k]
            plain &= bool((row[predicted] == (k == 0)).all())
            if k == 0 or row[predicted].any():
                names.append(("newest output" if k == 0 else f"{k + 1}{_th(k + 1)} newest output") + of)
                rows.append(row)
        for k in range(0 if plan.inputs is None else anchors):
            row = plan.inputs[branch, :, k]  # type: ignore[index]
            if row[predicted].any():
                names.append(("input of the newest" if k == 0 else f"input of the {k + 1}{_th(k + 1)} newest") + of)
                rows.append(row)
                plain = False
        if plan.kappa is not None and plan.kappa[branch][predicted].any():
            names.append(INPUT + of)
            rows.append(plan.kappa[branch])
            plain = False
    if plain or not predicted.any():
        return [], np.zeros((0, len(plan.compute)))
    return names, np.where(predicted, np.array(rows), np.nan)


def _th(n: int) -> str:
    return {2: "nd", 3: "rd"}.get(n, "th")


def _panels(schedule: CacheSchedule, profile: Profile) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Return the panels of a schedule over a profile: (title, distances, mask), those of most sites first.

    Sites of one granularity with equal masks share a panel.

    Raises:
        BadOption: The profile has other steps or sites than the schedule.
    """
    steps = profile.grid_steps
    if schedule.steps != steps:
        raise Unusable(
            "profile",
            f"it has {steps} steps, and the schedule has {schedule.steps}",
            f"Pass a profile of {schedule.steps} steps",
        )
    groups: dict[tuple[str, bytes], list[tuple[str, SiteProfile, SitePlan]]] = {}
    for denoiser, site, plan in schedule.plans():
        measured = profile.denoisers[denoiser].sites.get(site) if denoiser in profile.denoisers else None
        if measured is not None:
            key = parse(site).granularity, plan.compute.tobytes()
            groups.setdefault(key, []).append((site, measured, plan))
    if not groups:
        raise Unusable(
            "profile",
            "it measured none of the schedule's sites",
            "Pass the profile from which the schedule was planned",
        )
    panels = []
    for (granularity, _), members in sorted(groups.items(), key=lambda group: -len(group[1])):
        name = members[0][0] if len(members) == 1 else f"{granularity}, {len(members)} sites"
        compute = members[0][2].compute[profile.start : profile.start + profile.steps]
        # The headline states the computed steps of the only panel.
        title = f"{name}\n{compute.sum()} of {len(compute)} steps computed" if len(groups) > 1 else name
        panels.append((title, _mean_distance([site for _, site, _ in members]), compute))
    return panels


# --- parts of figures -------------------------------------------------------------------------------------------------


def _heat(figure: Any, axes: Any, table: np.ndarray, title: str) -> None:
    """Draw a table of distances, float64 [T, T].

    At [row, column] is the distance between the output of the row's step and the kept output of the column's step, used
    in its place.
    """
    from matplotlib.colors import PowerNorm

    norm = PowerNorm(0.5, vmin=0, vmax=max(float(np.quantile(table, 0.995)), 1e-12))
    image = axes.imshow(table, cmap=DISTANCE, norm=norm, interpolation="nearest")
    axes.set(title=title, xlabel="output of step", ylabel="used at step")
    axes.xaxis.set_major_locator(_whole_ticks())
    axes.yaxis.set_major_locator(_whole_ticks())
    axes.spines[:].set_visible(False)
    axes.set_anchor("W")
    bar = figure.colorbar(image, cax=axes.inset_axes((1.03, 0, 0.035, 0.8)), ticks=_few_ticks())
    bar.outline.set_visible(False)
    bar.ax.set_title("relative L1", fontsize=8, loc="left", pad=8)


def _spans(axes: Any, compute: np.ndarray) -> None:
    """Draw a square on the diagonal for each computed step, as wide as its output is used.

    Its left edge shows the distances.
    """
    from matplotlib.patches import Rectangle

    starts = np.flatnonzero(compute)
    for start, end in zip(starts, [*starts[1:], len(compute)], strict=True):
        corner, size = (start - 0.5, start - 0.5), end - start
        axes.add_patch(Rectangle(corner, size, size, fill=False, edgecolor=MARK, lw=1.3, clip_on=False))


def _as_run(plan: DenoiserPlan, site: str) -> np.ndarray:
    """Return a site's mask as float64 [T].

    It is 1 if the site is computed, 0 if it is predicted, and NaN if the denoiser is not called.
    """
    compute = plan.sites[site].compute.astype(float)
    return compute if plan.called is None else np.where(plan.called, compute, np.nan)


def _mask(axes: Any, masks: np.ndarray, names: list[str]) -> None:
    """Draw masks with one row per site.

    Args:
        axes: The axes to draw on.
        masks: float64 [sites, steps]: dark for 1, pale for 0, blank for NaN.
        names: The labels of the rows.
    """
    from matplotlib.colors import ListedColormap

    rows, steps = masks.shape
    axes.pcolormesh(
        np.arange(steps + 1) - 0.5,
        np.arange(rows + 1) - 0.5,
        masks,
        cmap=ListedColormap([PALE, MARK]),
        vmin=0,
        vmax=1,
        edgecolors="white",
        linewidth=min(0.8, 40 / max(rows, steps / 2)),  # cells stay wider than their seams
    )
    shown = list(range(0, rows, -(-rows // MOST_LABELS)))
    axes.set_yticks(shown, [names[n] for n in shown])
    axes.set(xlabel="step", ylim=(rows - 0.5, -0.5))
    axes.xaxis.set_major_locator(_whole_ticks(10))
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    for n in shown:
        axes.text(
            steps - 0.2,
            n,
            f"{int(np.nansum(masks[n]))}/{int(np.isfinite(masks[n]).sum())}",
            va="center",
            fontsize=8,
            color=MUTED,
        )


def _weights(figure: Any, axes: Any, table: _Table) -> None:
    """Draw coefficients, one row per coefficient: blue for positive, red for negative, blank for computed steps."""
    from matplotlib.colors import Normalize

    rows, steps = table.values.shape
    most = max(float(np.nanquantile(np.abs(table.values), 0.98)), 1e-12)
    mesh = axes.pcolormesh(
        np.arange(steps + 1) - 0.5,
        np.arange(rows + 1) - 0.5,
        np.ma.masked_invalid(table.values),
        cmap="RdBu",
        norm=Normalize(-most, most),
        edgecolors="white",
        linewidth=min(0.8, 40 / max(rows, steps / 2)),
    )
    axes.set_yticks(range(rows), table.names)
    axes.set(xlabel="step", ylim=(rows - 0.5, -0.5), title=table.title)
    axes.xaxis.set_major_locator(_whole_ticks(10))
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    clipped = bool(np.nanmax(np.abs(table.values)) > most * 1.0001)
    bar = figure.colorbar(
        mesh, ax=axes, aspect=12, pad=0.01, ticks=_few_ticks(), extend="both" if clipped else "neither"
    )
    bar.outline.set_visible(False)


def _about_weights(tables: list[_Table]) -> str:
    """Return the caption of tables of coefficients; "" if there are none."""
    if not tables:
        return ""
    inputs = any(name.startswith(INPUT) for table in tables for name in table.names)
    more = ", plus the change of the input since the newest computed step times its own weight" if inputs else ""
    return f"A prediction is the sum of the kept outputs times their weights{more}. Blank: the step is computed."


def _height(table: _Table) -> float:
    """Return the height of a table of coefficients in inches."""
    return 0.9 + 0.2 * max(3, len(table.names))


def _caption(figure: Any, text: str) -> None:
    """Write a caption below the panels, and make the figure higher for its lines."""
    width, height = figure.get_size_inches()
    lines = textwrap.wrap(text, int(17 * width))
    figure.set_size_inches(width, height + 0.17 * len(lines))
    figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=8, color=MUTED, linespacing=1.4)


def _whole_ticks(most: int = 5) -> Any:
    """Return a locator of whole numbers, at most ``most`` intervals."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(most, integer=True)


def _few_ticks() -> Any:
    """Return a locator of at most four intervals."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(4)


def _sized(figure: Any, document: Profile | CacheSchedule, width: float, height: float, *more: str) -> None:
    """Set the size of a figure in inches, add its title, and make the figure higher for the title's lines."""
    parts = [printable(part).replace(" ", NO_BREAK) for part in (*_headline(document), *more) if part]
    lines = [line.removesuffix("·") for line in textwrap.wrap(f"{NO_BREAK}· ".join(parts), int(13 * width))]
    figure.set_size_inches(width, height + 0.25 * len(lines))
    figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=10, parse_math=False)


def _granularities(profile: Profile) -> dict[str, list[SiteProfile]]:
    """Return the sites of a profile by granularity, the coarsest first."""
    sites = [(parse(name).granularity, site) for d in profile.denoisers.values() for name, site in d.sites.items()]
    found = {granularity: [site for g, site in sites if g == granularity] for granularity in GRANULARITIES}
    return {granularity: members for granularity, members in found.items() if members}


def _mean_distance(sites: Iterable[SiteProfile]) -> np.ndarray:
    """Return the relative L1 distances of outputs, float64 [T, T], averaged over sites and branches."""
    return np.asarray(np.mean([site.output.relative_l1.mean(axis=0) for site in sites], axis=0))


def _headline(document: Profile | CacheSchedule) -> list[str]:
    """Return the parts of a figure's title."""
    parts = [d.class_name for d in document.denoisers.values() if d.class_name]
    if document.noise_scheduler:
        parts.append(noise_scheduler_title(document.noise_scheduler.class_name))
    if isinstance(document, Profile):
        return [*parts, f"{document.steps} steps", f"{document.samples} samples"]
    parts.append(f"{document.computed_steps} of {int(document.called.sum())} steps computed")
    parts += [f"others decided in the run by {d.online.rule}" for d in document.denoisers.values() if d.online]
    return parts + ([f"{decibels(document.expected.mean_db)} expected"] if document.expected else [])
