"""Published calibrations: every row of the data file, how a rule finds it, and that the rule computes what its source
computes."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from commands import Command, command_of
from online import decided, strips
from pipelines import TINY, fresh, run, shared
from probes import ours
from torch import Tensor

from diffcache import CacheSchedule, accelerate, accelerated, estimate, presets, report
from diffcache.errors import BadOption, DocumentError, UnknownName, UnsupportedModel
from diffcache.host import find_sites, network_facts
from diffcache.presets import Match, NetworkFacts, Preset
from diffcache.presets.checks import check_all
from diffcache.schedulers import Grid, Rule, parse_rule
from diffcache.schedulers.magcache import nearest, published

ROWS = presets.available()
TINY_OF = {  # class of a network -> a tiny pipeline of it
    "FluxTransformer2DModel": "flux",
    "HunyuanVideoTransformer3DModel": "hunyuan_video",
    "MochiTransformer3DModel": "mochi",
    "Lumina2Transformer2DModel": "lumina2",
    "CogVideoXTransformer3DModel": "cogvideox",
    "WanTransformer3DModel": "wan",
    "QwenImageTransformer2DModel": "qwen_image",
}
every_row = pytest.mark.parametrize("row", ROWS, ids=[f"{row.method}-{row.name}" for row in ROWS])
MAGCACHE = [row for row in ROWS if row.method == "magcache"]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return command_of(monkeypatch, capsys, "presets")


def named(method: str, name: str) -> Preset:
    return next(row for row in ROWS if (row.method, row.name) == (method, name))


def facts(row: Preset, **over: Any) -> dict[str, NetworkFacts]:
    """The network that a row is for."""
    told: dict[str, Any] = {
        "class_name": row.class_name,
        "config": row.config,
        "pipeline": row.pipelines[0] if row.pipelines else "AnyPipeline",
        "origin": row.hub[0],
    }
    return {"transformer": NetworkFacts(**(told | over))}


# --- the rows --------------------------------------------------------------------------------------------------------


@every_row
def test_a_row_is_of_a_network_and_pipelines_of_diffusers(row: Preset) -> None:
    network = getattr(diffusers, row.class_name, None)
    if network is None:
        pytest.skip(f"this diffusers has no {row.class_name}")
    assert set(row.config) <= set(inspect.signature(network).parameters)
    for pipeline in row.pipelines:
        if not hasattr(diffusers, pipeline):
            pytest.skip(f"this diffusers has no {pipeline}")
        assert issubclass(getattr(diffusers, pipeline), diffusers.DiffusionPipeline)


@every_row
def test_a_row_names_the_stacks_of_its_network(row: Preset) -> None:
    sites = find_sites(shared(TINY_OF[row.class_name]).transformer)
    found = [site.partition(":")[2] for site in sites if site.startswith("stack:")]
    assert list(row.stacks) == found


@every_row
def test_a_row_states_its_source_and_the_conditions(row: Preset) -> None:
    assert row.repository.split("/")[0] in {"ali-vilab", "Zehong-Ma", "chengzeyi"}
    assert row.commit[:7] in row.source
    assert f"{row.steps} steps" in row.described_conditions()


@every_row
def test_a_row_is_found_by_the_network_it_is_for(row: Preset) -> None:
    same = [one for one in ROWS if (one.method, one.hub) == (row.method, row.hub) and one.pipelines == row.pipelines]
    if len(same) > 1:
        with pytest.raises(BadOption, match=re.escape(f"preset={row.name}")):
            presets.find(row.method, facts(row))
    else:
        assert presets.find(row.method, facts(row)).preset == row
    assert presets.find(row.method, facts(row), row.name) == Match(row, "chosen by name")


@every_row
def test_a_row_is_not_found_by_a_network_that_differs_in_one_entry(row: Preset) -> None:
    for key, value in row.config.items():
        other = {**row.config, key: (not value) if isinstance(value, bool) else (value or 0) + 1}
        others = [one for one in ROWS if one.method == row.method and one.class_name == row.class_name]
        if any(not one.unlike(facts(row, config=other)["transformer"]) for one in others):
            continue  # the entry of another model
        with pytest.raises(UnsupportedModel, match=f"{row.name}: {key} is {other[key]!r}, not {value!r}"):
            presets.find(row.method, facts(row, config=other))


def forged(change: Callable[[dict[str, Any]], Any], method: str = "magcache") -> list[dict[str, Any]]:
    rows = json.loads(presets.FILE.read_text(encoding="utf-8"))["presets"]
    row = next(copy.deepcopy(row) for row in rows if row["method"] == method)
    change(row)
    return [row]


FORGED: list[tuple[str, str, Callable[[dict[str, Any]], Any]]] = [
    ("magcache", "source/commit", lambda row: row["source"].update(commit="main")),
    ("magcache", "source/repository", lambda row: row["source"].pop("repository")),
    ("magcache", "measured", lambda row: row.update(measured="measured here")),
    ("magcache", "constants/ratios", lambda row: row["constants"]["ratios"][0].pop()),
    ("magcache", "constants/ratios", lambda row: row["constants"]["ratios"][0].__setitem__(3, -1.0)),
    ("magcache", "constants/ratios", lambda row: row["constants"]["ratios"][0].__setitem__(0, 1.1)),
    ("magcache", "constants/ratios", lambda row: row["constants"].update(ratios=row["constants"]["ratios"] * 3)),
    ("magcache", "constants/keep", lambda row: row["constants"].update(keep=[28])),
    ("magcache", "constants/limit", lambda row: row["constants"].update(limit="above")),
    ("magcache", "constants/first", lambda row: row["constants"].update(first="up")),
    ("magcache", "recommended", lambda row: row["recommended"][0].pop("retention")),
    ("magcache", "recommended", lambda row: row.update(recommended=[])),
    ("magcache", "conditions/steps", lambda row: row["conditions"].pop("steps")),
    ("magcache", "constants/ratios", lambda row: row["conditions"].update(steps=50)),
    ("magcache", "row", lambda row: row.pop("source")),
    ("magcache", "row", lambda row: row.update(more=1)),
    ("magcache", "method", lambda row: row.update(method="fora")),
    ("magcache", "network", lambda row: row["network"].update(config={})),
    ("magcache", "hub", lambda row: row.update(hub=["flux"])),
    ("magcache", "stacks", lambda row: row.update(stacks=[])),
    ("teacache", "constants/polynomial", lambda row: row["constants"]["polynomial"].append(1.0)),
    ("teacache", "constants/polynomial", lambda row: row["constants"]["polynomial"].__setitem__(0, float("nan"))),
    ("teacache", "constants/signal", lambda row: row["constants"].update(signal="noise")),
    ("teacache", "constants/first", lambda row: row["constants"].update(first=0)),
    ("teacache", "recommended", lambda row: row["recommended"].reverse()),
    ("firstblockcache", "constants", lambda row: row["constants"].update(polynomial=[1.0])),
]


@pytest.mark.parametrize(
    ("method", "field", "change"), FORGED, ids=[f"{m}-{f}-{n}" for n, (m, f, _) in enumerate(FORGED)]
)
def test_a_forged_row_is_refused(method: str, field: str, change: Callable[[dict[str, Any]], Any]) -> None:
    check_all(forged(lambda row: None, method), "rows")
    with pytest.raises(DocumentError) as refused:
        check_all(forged(change, method), "rows")
    assert refused.value.field == field


def test_two_rows_of_one_name_are_refused() -> None:
    row = forged(lambda row: None)[0]
    with pytest.raises(DocumentError, match="a name that no row before it has"):
        check_all([row, row], "rows")


def test_the_ratios_of_flux_are_those_of_diffusers() -> None:
    magcache = pytest.importorskip("diffusers.hooks.mag_cache")
    (ratios,) = named("magcache", "flux.1-dev").constants["ratios"]
    assert np.allclose(ratios, magcache.FLUX_MAG_RATIOS.numpy(), rtol=1e-6)


# --- which row a rule takes ------------------------------------------------------------------------------------------


def test_the_pipeline_distinguishes_models_of_one_configuration() -> None:
    flux, kontext = named("magcache", "flux.1-dev"), named("magcache", "flux.1-kontext-dev")
    assert flux.config == kontext.config
    for row in (flux, kontext):
        assert presets.find("magcache", facts(row, origin="")).preset == row
    with pytest.raises(UnsupportedModel, match=r"in a Loop; flux\.1-dev: it is for FluxPipeline, .*preset=NAME"):
        presets.find("magcache", facts(flux, pipeline="Loop"))


@pytest.mark.parametrize(
    "origin",
    [
        "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
        "/home/me/.cache/huggingface/hub/models--Wan-AI--Wan2.1-I2V-14B-480P-Diffusers/snapshots/0123/transformer",
    ],
)
def test_where_a_pipeline_was_loaded_from_distinguishes_models_of_one_configuration(origin: str) -> None:
    row = named("magcache", "wan2.1-i2v-14b-480p")
    match = presets.find("magcache", facts(row, origin=origin))
    assert match.preset == row
    assert match.how == f"loaded from {origin}"
    with pytest.raises(
        BadOption, match=r"preset=wan2\.1-i2v-14b-480p or preset=wan2\.1-i2v-14b-720p: .* fits them all"
    ):
        presets.find("magcache", facts(row, origin="/models/wan"))


def test_a_pipeline_of_two_networks_is_refused() -> None:
    row = named("magcache", "wan2.1-t2v-14b")
    two = {name: network for name in ("transformer", "transformer_2") for network in facts(row).values()}
    with pytest.raises(
        UnsupportedModel, match=r"is for one network; this pipeline has 2 \(transformer, transformer_2\)"
    ):
        presets.find("magcache", two)


@pytest.mark.parametrize("spec", ["teacache", "teacache:threshold=0.25", "magcache:threshold=0.24,max_skip=3"])
def test_another_network_is_refused_with_the_way_to_measure_it(spec: str) -> None:
    pipe = shared("flux")
    with pytest.raises(UnsupportedModel) as refused:
        accelerate(pipe, spec)
    text = str(refused.value)
    method = spec.partition(":")[0]
    assert f"no published calibration of {method!r} is for this FluxTransformer2DModel in a FluxPipeline" in text
    assert "flux.1-dev: in_channels is 16, not 64" in text
    assert f"`diffcache plan PROFILE --scheduler {method} --computed N`" in text
    with pytest.raises(UnsupportedModel):
        estimate(pipe, spec, **TINY["flux"].call(pipe))
    assert ours(pipe) == []


def test_a_preset_of_another_class_is_refused() -> None:
    with pytest.raises(
        UnsupportedModel, match=r"wan2\.1-t2v-1\.3b: it is for a WanTransformer3DModel\. Measure your own"
    ):
        accelerate(shared("flux"), "teacache:preset=wan2.1-t2v-1.3b")


def test_a_preset_is_not_for_sites_other_than_stacks() -> None:
    with pytest.raises(BadOption, match=r"sites='model' was given\. Allowed: stack"):
        accelerate(shared("flux"), "magcache:preset=flux.1-dev,sites=model")


@pytest.mark.parametrize(
    ("spec", "error", "says"),
    [
        ("teacache:preset=flux2", UnknownName, "no preset of 'teacache' called 'flux2'. Known: flux.1-dev, "),
        ("magcache:preset=mochi-1", UnknownName, "no preset of 'magcache' called 'mochi-1'."),
        ("firstblockcache:preset=mochi-1", UnknownName, "no preset of 'firstblockcache' called 'mochi-1'."),
        ("teacache:threshold=-1", BadOption, "threshold=-1 was given. Allowed: a number, 0 or more"),
        ("teacache:most=0", BadOption, "most=0 was given."),
        ("magcache:threshold=-0.1", BadOption, "threshold=-0.1 was given. Allowed: a number, 0 or more"),
        ("magcache:threshold=nan", BadOption, "threshold=nan was given."),
        ("magcache:max_skip=0", BadOption, "max_skip=0 was given. Allowed: a whole number, 1 or more"),
        ("magcache:retention=1.5", BadOption, "retention=1.5 was given. Allowed: a share of the steps, 0 to 1"),
        ("magcache:most=3", UnknownName, "no option of 'magcache' called 'most'. Known: threshold, max_skip"),
    ],
)
def test_options_out_of_range_are_refused_before_a_network_is_known(spec: str, error: type, says: str) -> None:
    with pytest.raises(error) as refused:
        parse_rule(spec)
    assert says in str(refused.value)


def test_a_rule_without_a_network_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="no network is known"):
        Rule("teacache", "stack").schedule(Grid(np.linspace(1, 0.1, 9)), {"transformer": ("model",)})


def test_the_facts_about_a_network_are_its_class_its_configuration_and_where_it_is_from() -> None:
    pipe = fresh("flux")
    pipe.register_to_config(_name_or_path="black-forest-labs/FLUX.1-dev")
    (found,) = network_facts(pipe, {"transformer": pipe.transformer}).values()
    assert (found.class_name, found.pipeline) == ("FluxTransformer2DModel", "FluxPipeline")
    assert found.origin == "black-forest-labs/FLUX.1-dev"
    assert found.config["num_single_layers"] == 3
    assert not [key for key in found.config if key.startswith("_")]
    (bare,) = network_facts(object(), {"net": torch.nn.Linear(2, 2)}).values()
    assert bare == NetworkFacts(class_name="Linear", pipeline="object")


# --- the rule computes what its source computes -----------------------------------------------------------------------


def as_the_authors_walk(row: Preset, setting: dict[str, float], steps: int) -> list[list[bool]]:
    """MagCache as its repository runs it: one counter over the calls of all branches, and a state for each branch."""
    constants = row.constants
    branches = len(constants["ratios"])
    ratios = np.stack([nearest(one, steps) for one in constants["ratios"]], axis=1).reshape(-1)
    product, total, row_of_skips = [1.0] * branches, [0.0] * branches, [0] * branches
    computed: list[list[bool]] = [[] for _ in range(branches)]
    calls = branches * steps
    first = int(setting["retention"] * calls + (0.5 if constants["first"] == "nearest" else 0))
    for call in range(calls):
        b, skip = call % branches, False
        if call >= first:
            product[b] *= ratios[call]
            row_of_skips[b] += 1
            total[b] += abs(1 - product[b])
            small = (
                total[b] < setting["threshold"] if constants["limit"] == "below" else total[b] <= setting["threshold"]
            )
            step_of_source = np.round(call // branches * ((row.steps - 1) / (steps - 1))).astype(int)
            skip = bool(small) and row_of_skips[b] <= setting["max_skip"] and step_of_source not in constants["keep"]
            skip = skip and bool(computed[b])  # the repository fails here, for nothing is kept; diffusers computes
            if not skip:
                product[b], total[b], row_of_skips[b] = 1.0, 0.0, 0
        computed[b].append(not skip)
    return computed


@pytest.mark.parametrize("row", MAGCACHE, ids=[row.name for row in MAGCACHE])
@pytest.mark.parametrize("steps", [None, 2, 20, 30, 47, 60])
def test_magcache_computes_the_steps_that_its_repository_computes(row: Preset, steps: int | None) -> None:
    steps = steps or row.steps
    for setting in row.recommended:
        theirs = as_the_authors_walk(row, dict(setting), steps)
        mine = list(published(row.constants, steps, setting))
        if all(branch == theirs[0] for branch in theirs):
            assert mine == theirs[0]
        else:
            assert "disagree" in row.differs
            either = np.any(theirs, axis=0)
            assert abs(int(np.sum(mine)) - int(either.sum())) <= 2
        assert 0 < sum(mine) < steps or steps == 2


def test_at_the_steps_of_their_authors_both_branches_agree_but_in_these_rows() -> None:
    apart = {
        row.name
        for row in MAGCACHE
        for setting in row.recommended
        if len({tuple(one) for one in as_the_authors_walk(row, dict(setting), row.steps)}) > 1
    }
    assert apart == set()


@pytest.mark.parametrize(("threshold", "most", "retention"), [(0.06, 3, 0.2), (0.24, 5, 0.1), (0.02, 2, 0.3)])
def test_magcache_is_that_of_diffusers(
    monkeypatch: pytest.MonkeyPatch, threshold: float, most: int, retention: float
) -> None:
    """Diffusers has no step that is always computed. Without it, steps and outputs are equal."""
    magcache = pytest.importorskip("diffusers.hooks.mag_cache")
    row = named("magcache", "flux.1-dev")
    free = dataclasses.replace(row, constants={**row.constants, "keep": []})
    monkeypatch.setattr(presets, "available", lambda: (free,))
    pipe, steps = fresh("flux"), 20
    call = TINY["flux"].call(pipe)
    with accelerated(pipe, f"magcache:preset=flux.1-dev,threshold={threshold},max_skip={most},retention={retention}"):
        output = run(pipe, call, num_inference_steps=steps)
        found = report(pipe)
    ran: list[int] = []
    last = pipe.transformer.transformer_blocks[-1].attn
    hook = last.register_forward_hook(lambda *_: ran.append(1))
    pipe.transformer.enable_cache(
        magcache.MagCacheConfig(
            threshold=threshold,
            max_skip_steps=most,
            retention_ratio=retention,
            num_inference_steps=steps,
            mag_ratios=magcache.FLUX_MAG_RATIOS,
        )
    )
    theirs = run(pipe, call, num_inference_steps=steps)
    hook.remove()
    (strip,) = strips(found, "stack:transformer_blocks")
    assert strip.count("■") == len(ran)
    assert 0 < len(ran) < steps
    assert torch.allclose(output, theirs, atol=1e-4)


SIGNALS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Tensor]]] = {  # tiny pipeline -> module, its signal
    "flux": (lambda net: net.transformer_blocks[0].norm1, lambda value: value[0]),
    "hunyuan_video": (lambda net: net.transformer_blocks[0].norm1, lambda value: value[0]),
    "mochi": (lambda net: net.transformer_blocks[0].norm1, lambda value: value[0]),
    "lumina2": (lambda net: net.layers[0].norm1, lambda value: value[0]),
    "cogvideox": (lambda net: net.time_embedding, lambda value: value),
    "wan": (lambda net: net.condition_embedder, lambda value: value[1]),
}


def as_teacache_decides(row: Preset, signals: Sequence[Tensor], threshold: float) -> str:
    """TeaCache as its repository runs it, from the signal of every call of one branch."""
    rescale, total, strip = np.poly1d(row.constants["polynomial"]), 0.0, ""
    for i, now in enumerate(signals):
        if i < row.constants["first"] or i >= len(signals) - row.constants["last"]:
            total, computes = 0.0, True
        else:
            then = signals[i - 1]
            total += rescale(float((now - then).abs().mean() / then.abs().mean()))
            computes = not total < threshold
            total = 0.0 if computes else total
        strip += "■" if computes else "·"
    return strip


@pytest.mark.parametrize(
    ("name", "preset", "threshold"),
    [
        ("flux", "flux.1-dev", 0.6),
        ("hunyuan_video", "hunyuanvideo", 0.15),
        ("mochi", "mochi-1", 0.09),
        ("lumina2", "lumina-image-2.0-v2", 1.1),
        ("cogvideox", "cogvideox1.5-5b", 100.0),  # the changes of tiny networks are large
        ("wan", "wan2.1-i2v-14b-480p", 4e4),
        ("wan", "wan2.1-i2v-14b-720p", 3e3),
    ],
)
def test_teacache_computes_the_steps_that_its_repository_computes(name: str, preset: str, threshold: float) -> None:
    row, pipe = named("teacache", preset), fresh(name)
    module, read = SIGNALS[name]
    seen: list[Tensor] = []
    part = module(pipe.transformer)
    forward = part.forward

    def recorded(*args: Any, **kwargs: Any) -> Any:  # not a hook: at a predicted step the block ends in its first norm
        value = forward(*args, **kwargs)
        seen.append(read(value).detach().clone())
        return value

    part.forward = recorded
    with accelerated(pipe, f"teacache:preset={preset},threshold={threshold}"):
        run(pipe, TINY[name].call(pipe), num_inference_steps=20)
        found = strips(report(pipe), f"stack:{row.stacks[0]}")
    branches = len(found)
    assert len(seen) == branches * len(found[0])
    for b, strip in enumerate(found):
        assert strip == as_teacache_decides(row, seen[b::branches], threshold)
    assert any("·" in strip for strip in found)
    first, last = row.constants["first"], row.constants["last"]
    assert any("■" in strip[first : len(strip) - last] for strip in found), "the threshold decides"


def test_a_block_without_a_time_embedding_is_refused() -> None:
    pipe = shared("dit")
    with pytest.raises(
        UnsupportedModel, match=r"the argument 'temb' of the first block .*; BasicTransformerBlock has none"
    ):
        accelerate(pipe, decided(pipe, "time_embedding"))
    assert ours(pipe) == []


def test_the_last_step_is_computed_as_in_the_source() -> None:
    grid = Grid(np.linspace(1, 0.1, 20), networks=facts(named("teacache", "flux.1-dev")))
    sites = {"transformer": ("model", "stack:transformer_blocks", "stack:single_transformer_blocks", "stack:others")}
    schedule = parse_rule("teacache").schedule(grid, sites)
    plan = schedule.denoisers["transformer"]
    assert set(plan.sites) == {"stack:transformer_blocks", "stack:single_transformer_blocks"}
    compute = plan.sites["stack:transformer_blocks"].compute
    assert list(np.flatnonzero(compute)) == [0, 19]
    assert plan.online is not None
    assert plan.online.limit.max() == 0.25, "the lowest threshold that the authors recommend"


def test_a_loop_that_begins_late_computes_its_first_steps() -> None:
    networks = facts(named("magcache", "flux.1-dev"))
    sites = {"transformer": ("stack:transformer_blocks",)}
    for spec in ("teacache", "magcache"):
        schedule = parse_rule(spec).schedule(Grid(np.linspace(1, 0.1, 20), 7, networks), sites)
        assert schedule.denoisers["transformer"].sites["stack:transformer_blocks"].compute[:8].all()


def test_the_threshold_of_firstblockcache_is_the_published_one() -> None:
    grid = Grid(np.linspace(1, 0.1, 20), networks=facts(named("firstblockcache", "flux.1-dev")))
    sites = {"transformer": ("stack:transformer_blocks", "stack:single_transformer_blocks")}
    online = parse_rule("firstblockcache:preset=flux.1-dev").schedule(grid, sites).denoisers["transformer"].online
    assert online is not None
    assert (online.rule, online.limit.max()) == ("first_block", 0.08)


# --- what users see --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("flux", "magcache:preset=flux.1-dev"),
        ("wan", "teacache:preset=wan2.1-t2v-1.3b"),
        ("mochi", "teacache:preset=mochi-1"),
    ],
)
def test_the_report_states_source_conditions_and_that_nothing_was_measured(name: str, spec: str, tmp_path: Any) -> None:
    rule = parse_rule(spec)
    row = named(rule.name, rule.options["preset"])
    pipe = shared(name)
    call = TINY[name].call(pipe)
    with accelerated(pipe, spec):
        run(pipe, call, num_inference_steps=12)
        found = report(pipe)
    text = str(found)
    for words in (row.source, row.described_conditions(), "not measured here", row.differs):
        assert words in text
    assert f"preset: {row.name}, chosen by name (" in text
    assert found.schedule is not None
    found.schedule.save(tmp_path / "schedule.safetensors")
    assert CacheSchedule.load(tmp_path / "schedule.safetensors").provenance["preset source"] == row.source
    with accelerated(pipe, "uniform:every=2"):
        run(pipe, call, num_inference_steps=12)
        assert "preset" not in str(report(pipe))


def test_the_estimate_takes_a_preset() -> None:
    pipe = shared("flux")
    found = estimate(pipe, "magcache:preset=flux.1-dev", **{**TINY["flux"].call(pipe), "num_inference_steps": 28})
    assert 0 < found.compute_fraction < 1


def test_the_command_lists_presets_by_model_class_and_method(command: Command) -> None:
    status, everything, _ = command()
    assert status == 0
    assert all(row.name in everything and row.model in everything for row in ROWS)
    assert all(one["reason"] in everything for one in presets.left_out())
    wan = command("--model", "WAN", "--method", "magcache", "--details")[1]
    assert "wan2.1-t2v-14b" in wan
    assert "flux" not in wan.lower()
    assert "teacache" not in wan
    assert named("magcache", "wan2.1-t2v-14b").source in wan
    of_class = command("--class", "MochiTransformer3DModel")[1]
    assert all((row.name in of_class) == (row.class_name == "MochiTransformer3DModel") for row in ROWS)
    assert "diffcache presets --model" in command("--help")[1]


@pytest.mark.parametrize(
    ("filters", "says"),
    [
        (("--model", "nope"), "no model with presets called 'nope'."),
        (("--class", "UNet2DConditionModel"), "no network class with presets called 'UNet2DConditionModel'."),
        (("--method", "fora"), "no method with presets called 'fora'. Known: firstblockcache, magcache, teacache."),
    ],
)
def test_a_filter_that_nothing_fits_is_refused(filters: tuple[str, str], says: str, command: Command) -> None:
    status, _, complaint = command(*filters)
    assert status == 2
    assert says in complaint


def test_the_examples_of_the_command_are_rules(command: Command) -> None:
    lines = command("--details")[1].splitlines()
    specs = [line.split('"')[1] for line in lines if "accelerate(pipe" in line]
    assert len(specs) == len(ROWS)
    for spec in specs:
        assert parse_rule(spec).granularity == "stack"


def test_the_page_holds_the_table_of_the_data_file(command: Command) -> None:
    page = (Path(__file__).parents[2] / "docs" / "presets.md").read_text(encoding="utf-8")
    assert command("--markdown")[1] in page
