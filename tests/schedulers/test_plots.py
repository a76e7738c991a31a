"""Pictures show the numbers of the documents: what is drawn is read back from the figure."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from documents import STEPS, hold, mask, profile, schedule, site

from diffcache.documents import CacheSchedule, DenoiserPlan, DenoiserProfile, Guidance, Profile, SitePlan
from diffcache.errors import BadOption

pytest.importorskip("matplotlib")

from diffcache.planning import plots

BLOCKS = [f"block:blocks.{n}" for n in range(11)]


def measured(steps: int = STEPS, *names: str, start: int = 0) -> Profile:
    """Return sites with different tables, two branches each."""
    outputs = np.random.default_rng(0).normal(size=(len(names), 2, steps, 8)).cumsum(axis=2)
    sites = {name: site(found) for name, found in zip(names, outputs, strict=True)}
    return profile(steps=steps, start=start, denoisers={"unet": DenoiserProfile(class_name="Net", sites=sites)})


def distance(found: Profile, *names: str) -> np.ndarray:
    tables = [found.denoisers["unet"].sites[name].output.relative_l1.mean(0) for name in names]
    return np.mean(tables, axis=0)


def planned(sites: dict[str, str], **changes: Any) -> CacheSchedule:
    plan = DenoiserPlan(sites={name: hold(strip) for name, strip in sites.items()}, class_name="Net")
    return CacheSchedule(steps=len(next(iter(sites.values()))), denoisers={"unet": plan}, **changes)


def heats(figure: Any) -> dict[str, Any]:
    """Axes with a table, by title."""
    return {axes.get_title(loc="left"): axes for axes in figure.axes if axes.images}


def test_a_profile_is_a_panel_per_granularity_with_its_mean_distance() -> None:
    found = measured(STEPS, "model", *BLOCKS[:3], "sublayer:blocks.0.attn")
    panels = heats(plots.figure(found))
    assert list(panels) == ["model", "block, mean of 3 sites", "sublayer"]
    for title, names in zip(panels, (["model"], BLOCKS[:3], ["sublayer:blocks.0.attn"]), strict=True):
        (image,) = panels[title].images
        assert np.array_equal(image.get_array(), distance(found, *names))
        assert panels[title].get_xlabel() == "output of step"
        assert panels[title].get_ylabel() == "used at step"


def test_a_profile_shows_what_is_known_of_the_loop() -> None:
    found = measured(STEPS, "model", BLOCKS[0])
    assert found.dynamics is not None
    figure = plots.figure(found)
    change, share, answer = [axes for axes in figure.axes if axes.get_title(loc="left") and not axes.images]
    for line, name in zip(change.lines, ("model", BLOCKS[0]), strict=True):
        assert line.get_xdata().tolist() == [1, 2, 3, 4, 5]
        assert line.get_ydata() == pytest.approx([distance(found, name)[i, i - 1] for i in range(1, STEPS)])
    assert [text.get_text() for text in change.get_legend().get_texts()] == ["model", "block"]
    moved = [abs(found.dynamics.reach[-1, j]) * found.dynamics.gram[j, j] ** 0.5 for j in range(STEPS)]
    assert [bar.get_height() for bar in share.patches] == pytest.approx(moved)
    along, beside = answer.lines[-2:]
    assert along.get_ydata() == pytest.approx(found.dynamics.response)
    assert beside.get_ydata() == pytest.approx(found.dynamics.spread**0.5)
    assert figure.get_suptitle() == "Net · Euler · 6\xa0steps · 16\xa0samples".replace(" ·", "\xa0·")

    bare = plots.figure(dataclasses.replace(found, dynamics=None))
    assert len(bare.axes) == len(figure.axes) - 2


def test_a_schedule_is_its_masks_in_the_order_in_which_sites_run() -> None:
    strips = {"block:blocks.10": "■·■·", "block:blocks.2": "■■··", "block:blocks.0": "■···"}
    (axes,) = plots.figure(planned(strips)).axes
    (mesh,) = axes.collections
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["block:blocks.0", "block:blocks.2", "block:blocks.10"]
    assert np.array_equal(mesh.get_array().astype(bool), [mask(strips[name]) for name in names])
    assert [text.get_text() for text in axes.texts] == ["1/4", "2/4", "2/4"]


def test_sites_of_several_denoisers_keep_their_names_apart() -> None:
    two = {name: DenoiserPlan(sites={"model": hold("■·")}) for name in ("transformer", "transformer_2")}
    (axes,) = plots.figure(CacheSchedule(steps=2, denoisers=two)).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["transformer model", "transformer_2 model"]


def test_many_sites_are_not_all_named_but_all_drawn() -> None:
    sites = {f"block:blocks.{n}": "■·■·" for n in range(100)}
    (axes,) = plots.figure(planned(sites)).axes
    assert axes.collections[0].get_array().shape == (100, 4)
    assert len(axes.get_yticklabels()) <= plots.MOST_LABELS


def squares(axes: Any) -> list[tuple[float, float, float, float]]:
    return [(*patch.get_xy(), patch.get_width(), patch.get_height()) for patch in axes.patches]


def test_a_mask_over_distances_is_a_square_per_computed_step_as_wide_as_its_output_lasts() -> None:
    found = measured(7, "model")
    (panel,) = heats(plots.figure(planned({"model": "■■··■·■"}), found)).items()
    title, axes = panel
    assert title == "model"  # the headline states the computed steps
    assert np.array_equal(axes.images[0].get_array(), distance(found, "model"))
    assert squares(axes) == [(-0.5, -0.5, 1, 1), (0.5, 0.5, 3, 3), (3.5, 3.5, 2, 2), (5.5, 5.5, 1, 1)]


def test_sites_of_one_mask_share_a_panel_and_the_rarest_are_left_out() -> None:
    strips = dict.fromkeys(BLOCKS[:3], "■·■·") | dict.fromkeys(BLOCKS[3:5], "■··■") | {BLOCKS[5]: "■···"}
    found = measured(4, *BLOCKS[:6])
    panels = heats(plots.figure(planned(strips), found))
    assert list(panels) == [
        "block, 3 sites\n2 of 4 steps computed",
        "block, 2 sites\n2 of 4 steps computed",
        f"{BLOCKS[5]}\n1 of 4 steps computed",
    ]
    assert np.array_equal(
        panels["block, 3 sites\n2 of 4 steps computed"].images[0].get_array(), distance(found, *BLOCKS[:3])
    )
    each = {name: "■" + "".join("■" if n >> bit & 1 else "·" for bit in range(3)) for n, name in enumerate(BLOCKS[:8])}
    figure = plots.figure(planned(each), measured(4, *BLOCKS[:8]))
    assert len(heats(figure)) == plots.MOST_PANELS
    assert "2\xa0more\xa0masks\xa0not\xa0shown" in figure.get_suptitle()


def test_a_loop_that_starts_late_is_drawn_from_there() -> None:
    late = planned({"model": "■■■·■·"})
    (axes,) = heats(plots.figure(late, measured(4, "model", start=2))).values()
    assert squares(axes) == [(-0.5, -0.5, 2, 2), (1.5, 1.5, 2, 2)]


def test_a_profile_of_something_else_is_refused() -> None:
    made = planned({"model": "■·■·"})
    with pytest.raises(BadOption, match=r"it has 5 steps, and the schedule has 4. Pass a profile of 4 steps"):
        plots.figure(made, measured(5, "model"))
    with pytest.raises(BadOption, match="it measured none of the schedule's sites"):
        plots.figure(made, measured(4, "block:blocks.0"))


@pytest.mark.parametrize("steps", [1, 2, 300])
def test_short_and_long_loops_can_be_drawn(steps: int, tmp_path: Any) -> None:
    found, made = measured(steps, "model"), planned({"model": "■" + "·" * (steps - 1)})
    for n, of in enumerate(([found], [made], [made, found])):
        assert plots.save(of[0], tmp_path / f"{n}.svg", *of[1:]).stat().st_size > 1000  # type: ignore[arg-type]


def fitted() -> SitePlan:
    """Two branches, three anchors of which the last is never used, and a coefficient of the input in one branch."""
    compute = mask("■·■··")
    weights = np.zeros((2, 5, 3))
    weights[:, ~compute, 0] = [[1, 1.5, 2], [1, 1.25, 0.5]]
    weights[0, 3:, 1] = [-0.5, -1]
    kappa = np.zeros((2, 5))
    kappa[1, 1] = 0.25
    return SitePlan(compute=compute, weights=weights, kappa=kappa)


def guided(sites: dict[str, SitePlan]) -> CacheSchedule:
    plan = DenoiserPlan(sites=sites, class_name="Net")
    return CacheSchedule(steps=5, denoisers={"unet": plan}, guidance=Guidance(mode="batched", branches=2))


def weight_tables(figure: Any) -> dict[str, Any]:
    """Axes with coefficients, by title."""
    found = {axes.get_title(loc="left"): axes for axes in figure.axes}
    return {title: axes for title, axes in found.items() if title.startswith("weights of the predictions")}


@pytest.mark.parametrize("over", [False, True])
def test_the_weights_of_predictions_are_drawn_and_computed_steps_stay_blank(over: bool) -> None:
    plan = fitted()
    made = guided({"model": plan})
    figure = plots.figure(made, measured(5, "model") if over else None)
    (axes,) = weight_tables(figure).values()
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "newest output, branch 1",
        "2nd newest output, branch 1",
        "newest output, branch 2",
        "change of the input, branch 2",
    ]
    rows = np.array([plan.weights[0, :, 0], plan.weights[0, :, 1], plan.weights[1, :, 0], plan.kappa[1]])  # type: ignore[index]
    drawn = axes.collections[0].get_array()
    assert np.array_equal(np.ma.getmaskarray(drawn), np.broadcast_to(plan.compute, rows.shape))
    assert np.array_equal(drawn.compressed(), rows[:, ~plan.compute].ravel())
    assert "change of the input since" in figure.texts[-1].get_text().replace("\n", " ")


def test_the_distances_stand_at_the_left_with_their_scale_next_to_them() -> None:
    """Not away from the weights below, and no label of the scale next to another panel's numbers."""
    drawn = plots.figure(guided({"model": fitted()}), measured(5, "model"))
    drawn.draw_without_rendering()
    (heat,), (weights,) = heats(drawn).values(), weight_tables(drawn).values()
    assert heat.get_window_extent().x0 == pytest.approx(weights.get_window_extent().x0, abs=2)
    (scale,) = heat.child_axes
    assert scale.get_title(loc="left") == "relative L1"
    assert 0 < scale.get_window_extent().x0 - heat.get_window_extent().x1 < 0.1 * heat.get_window_extent().width
    page = drawn.bbox
    for axes in (heat, weights, scale):
        box = axes.get_tightbbox()
        assert page.x0 <= box.x0
        assert box.x1 <= page.x1


def test_plain_reuse_has_no_weights_and_equal_sites_share_a_table() -> None:
    reused = guided({"model": hold("■·■··", branches=2)})
    assert weight_tables(plots.figure(reused)) == {}
    sites = {name: fitted() for name in BLOCKS[:3]} | {BLOCKS[3]: hold("■·■··", branches=2)}
    made = guided(sites)
    assert list(weight_tables(plots.figure(made))) == [f"weights of the predictions: {BLOCKS[0]} and 2 more sites"]


def test_steps_have_whole_numbers_and_no_square_is_cut_off() -> None:
    figure = plots.figure(planned({"model": "■··"}), measured(3, "model"))
    figure.canvas.draw()
    (axes,) = heats(figure).values()
    assert all(float(t).is_integer() for axis in (axes.xaxis, axes.yaxis) for t in axis.get_majorticklocs())
    assert not any(patch.get_clip_on() for patch in axes.patches)


def test_what_to_expect_stands_in_the_headline() -> None:
    headline = plots.figure(schedule()).get_suptitle().replace("\xa0", " ").replace("\n", " ")
    assert headline == ("Net · Euler · 2 of 5 steps computed · others decided in the run by drift · 40.0 dB expected")


def test_foreign_names_are_drawn_as_text(tmp_path: Path) -> None:
    made = planned({"model": "■·■·"})
    names = {name: dataclasses.replace(d, class_name="$\\frac$\x1b[2J") for name, d in made.denoisers.items()}
    figure = plots.figure(dataclasses.replace(made, denoisers=names))
    assert "$\\frac$\\x1b[2J" in figure.get_suptitle()
    assert plots.save(dataclasses.replace(made, denoisers=names), tmp_path / "a.png").stat().st_size > 1000
