"""What can be known before a pipeline runs is checked before it runs.

Every pipeline here raises when it is called, and every refusal has to come before that.
"""

from __future__ import annotations

import copy
import functools
import math
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from documents import profile, schedule
from pipelines import TINY, fresh, shared
from policies import Transformer
from probes import bound, hold
from small_loop import loop, noise
from torch import nn

import diffcache
from diffcache import Budget, CacheSchedule, Loop, accelerate, accelerated, estimate, evaluate, measure, optimize
from diffcache.documents import Guidance
from diffcache.errors import (
    AlreadyAccelerated,
    BadOption,
    DiffCacheError,
    ScheduleMismatch,
    UnknownName,
    UnsupportedModel,
)
from diffcache.eval import Method, Trials
from diffcache.eval.metrics import About, scorer
from diffcache.profiling import Calibration
from diffcache.profiling.calibration import correct


class HasRun(BaseException):
    """The pipeline was called."""


def untouchable(name: str = "flux") -> Any:
    """A tiny pipeline that takes the arguments of its class and raises when it is called."""
    pipe = copy.copy(shared(name))
    kind = type(pipe)

    @functools.wraps(kind.__call__)
    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise HasRun

    pipe.__class__ = type(kind.__name__, (kind,), {"__call__": called, "__module__": kind.__module__})
    return pipe


def good(name: str = "flux", seed: int = 0, **changes: Any) -> dict[str, Any]:
    call = TINY[name].call(shared(name)) | {"generator": torch.Generator().manual_seed(seed)}
    return {key: value for key, value in (call | changes).items() if value is not ...}


STEPS = good()["num_inference_steps"]

# Every function that takes calls, as f(pipe, calls).
VERBS: dict[str, Callable[[Any, Any], Any]] = {
    "measure": lambda pipe, calls: measure(pipe, calls),
    "measure, blocks": lambda pipe, calls: measure(pipe, calls, sites="block"),
    "optimize": lambda pipe, calls: optimize(pipe, calls, 2),
    "optimize, blocks": lambda pipe, calls: optimize(pipe, calls, 2, sites="block"),
    "held_out": lambda pipe, calls: optimize(pipe, [good()], 2, held_out=calls),
    "record": lambda pipe, calls: Calibration.record(pipe, calls),
    "record, held_out": lambda pipe, calls: Calibration.record(pipe, [good()], held_out=calls),
    "correct": lambda pipe, calls: correct(pipe, bound(pipe, hold("#.#.#."[:STEPS])), calls),
    "evaluate": lambda pipe, calls: evaluate(pipe, {"a": "uniform:every=2"}, calls, compare=(), metrics=("latent",)),
}

CALLS: dict[str, tuple[Callable[[], Any], type[DiffCacheError], str]] = {
    "a dictionary and a text": (lambda: [good(), "a dog"], BadOption, "at least one dictionary"),
    "a generator": (lambda: (good() for _ in range(2)), BadOption, "at least one dictionary"),
    "a number": (lambda: 3, BadOption, "at least one dictionary"),
    "nothing": (lambda: None, BadOption, "at least one dictionary"),
    "a key that is no text": (lambda: [good() | {1: 2}], BadOption, "Use the names of arguments as keys"),
    "an unknown argument": (lambda: [good(), good(steps=20)], UnknownName, "of FluxPipeline called 'steps'"),
    "no steps": (lambda: [good(num_inference_steps=0)], BadOption, "num_inference_steps=0"),
    "half a step": (lambda: [good(num_inference_steps=2.5)], BadOption, "num_inference_steps=2.5"),
    "None steps": (lambda: [good(num_inference_steps=None)], BadOption, "num_inference_steps=None"),
    "True steps": (lambda: [good(num_inference_steps=True)], BadOption, "num_inference_steps=True"),
    "steps below 0": (lambda: [good(num_inference_steps=-4)], BadOption, "num_inference_steps=-4"),
    "a billion steps": (lambda: [good(num_inference_steps=10**9)], BadOption, "num_inference_steps=1000000000"),
    "steps as text": (lambda: [good(num_inference_steps="6")], BadOption, "num_inference_steps='6'"),
    "NaN": (lambda: [good(guidance_scale=math.nan)], BadOption, "a finite number"),
    "no height": (lambda: [good(height=0)], BadOption, "'height'"),
    "an empty batch": (lambda: [good(prompt_embeds=torch.zeros(0, 4, 8))], BadOption, "the batch is empty"),
    "no prompts": (lambda: [good(prompt=[], prompt_embeds=...)], BadOption, "the batch is empty"),
    "no generators": (lambda: [good(generator=[])], BadOption, "the batch is empty"),
    "a seed for a generator": (lambda: [good(generator=3)], BadOption, "torch.Generator"),
    "too few generators": (
        lambda: [good(prompt=["a", "b", "c"], prompt_embeds=..., generator=[torch.Generator()] * 2)],
        BadOption,
        "2 generators for 3 samples",
    ),
    "a lone surrogate": (lambda: [good(prompt="a \ud800", prompt_embeds=...)], BadOption, "Unicode"),
}  # fmt: skip


# ``held_out=None`` is allowed: the verb then keeps every fourth of the calls apart.
@pytest.mark.parametrize(
    ("verb", "what"), [(v, w) for v in VERBS for w in CALLS if not ("held_out" in v and w == "nothing")]
)
def test_calls_that_cannot_be_are_refused_before_the_first_one(
    verb: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make, error, says = CALLS[what]
    with pytest.raises(error) as refused:
        VERBS[verb](untouchable(), make())
    assert says in str(refused.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("verb", [verb for verb in VERBS if "held_out" not in verb])
def test_no_calls_are_refused(verb: str) -> None:
    for empty in ([], ()):
        with pytest.raises(BadOption, match="at least one dictionary"):
            VERBS[verb](untouchable(), empty)


@pytest.mark.parametrize("verb", VERBS)
def test_good_calls_reach_the_pipeline(verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HasRun):
        VERBS[verb](untouchable(), [good(), good(seed=1)])


@pytest.mark.parametrize("verb", ["record", "record, held_out", "correct"])
def test_inner_functions_take_lists_of_dictionaries_only(verb: str) -> None:
    for calls in (["a cat"], "a cat", good()):
        with pytest.raises(BadOption, match="at least one dictionary"):
            VERBS[verb](untouchable(), calls)


def test_other_calls_are_answered_with_how_calls_are_written() -> None:
    for calls in (3, [good(), "a dog"]):
        with pytest.raises(BadOption) as refused:
            optimize(untouchable(), calls, 2)  # type: ignore[arg-type]
        *_, first, second = str(refused.value).splitlines()
        made = eval(f"{first}\n{second}".removeprefix("calls = "), {"torch": torch, "prompts": ["a", "b"]})
        assert [call["prompt"] for call in made] == ["a", "b"]
        assert [call["generator"].initial_seed() for call in made] == [0, 1]


@pytest.mark.parametrize(
    "verb", ["measure", "optimize", "held_out", "record", "record, held_out", "correct", "evaluate"]
)
def test_calls_of_two_numbers_of_steps_are_refused(verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((BadOption, ScheduleMismatch), match="steps"):
        VERBS[verb](untouchable(), [good(), good(num_inference_steps=STEPS + 1)])


def test_held_out_calls_have_the_steps_of_the_others() -> None:
    for verb in ("held_out", "record, held_out"):
        with pytest.raises(BadOption, match="calls that all take the same steps"):
            VERBS[verb](untouchable(), [good(num_inference_steps=STEPS + 1)])


@pytest.mark.parametrize(
    ("verb", "options"),
    [("evaluate", {}), ("optimize", {"sites": "block"}), ("optimize", {"store": "int8"})],
)
def test_calls_that_run_twice_need_noise_that_repeats(verb: str, options: dict[str, Any], tmp_path: Path) -> None:
    calls = [good(), good(generator=..., latents=...)]
    ask = {
        "evaluate": lambda: evaluate(untouchable(), {}, calls, out=tmp_path),
        "optimize": lambda: optimize(untouchable(), calls, 2, **options),
    }
    with pytest.raises(BadOption, match="call 1 has no generator"):
        ask[verb]()


def test_a_required_argument_that_is_missing_is_named() -> None:
    with pytest.raises(BadOption, match="'class_labels' is missing, and DiTPipeline requires it"):
        measure(untouchable("dit"), [good("dit"), good("dit", class_labels=...)])


@pytest.mark.parametrize(
    ("budget", "options", "says"),
    [
        (STEPS + 1, {}, f"1 to {STEPS}"),
        (0, {}, "1 or more"),
        (-1, {}, "1 or more"),
        (2.5, {}, "whole numbers"),
        (math.nan, {}, "computed_steps=nan"),
        (math.inf, {}, "computed_steps=inf"),
        ("2", {}, "computed_steps='2'"),
        (True, {}, "computed_steps=True"),
        (None, {}, "Set exactly one of"),
        (STEPS + 0.5, {"sites": "block"}, f"1 to {STEPS}"),
        (STEPS + 1, {"scheduler": "path"}, f"1 to {STEPS}"),
        (Budget(speedup=STEPS + 1), {}, f"up to {STEPS}"),
        (2, {"scheduler": "serach"}, "no scheduler called"),
        (2, {"scheduler": "meancache:gama=4"}, "no option of 'meancache'"),
        (2, {"scheduler": "meancache:gamma=x"}, "gamma='x'"),
        (2, {"scheduler": 4}, "scheduler='int'"),
        (2, {"scheduler": "allocate:x=1", "sites": "block"}, "no option of 'allocate'"),
        (2, {"time_limit_s": math.nan}, "time_limit_s=nan"),
        (2, {"time_limit_s": -1}, "time_limit_s=-1"),
        (2, {"time_limit_s": "5"}, "time_limit_s='5'"),
        (2, {"store": "int7"}, "store='int7'"),
        (2, {"store": "auto"}, "store='auto'"),
        (2, {"store": "auto", "sites": "block"}, "memory_bytes"),
        (2, {"sites": "layers"}, "sites='layers'"),
        (2, {"sites": 3}, "sites=3"),
    ],
    ids=str,
)
def test_what_optimize_cannot_do_is_refused_before_a_call_is_recorded(budget: Any, options: Any, says: str) -> None:
    with pytest.raises(DiffCacheError) as refused:
        optimize(untouchable(), [good(), good(seed=1)], budget, **options)
    assert says in str(refused.value)


def test_a_memory_that_holds_no_output_is_refused_after_one_step() -> None:
    pipe = fresh("flux")
    seen: list[int] = []
    pipe.transformer.register_forward_hook(lambda *_: seen.append(1))
    with pytest.raises(BadOption, match=r"memory_bytes=8 .* or more: one step's outputs"):
        optimize(pipe, [good(), good(seed=1)], Budget(computed_steps=2, memory_bytes=8))
    assert len(seen) == 1


@pytest.mark.parametrize("sites", ["block", "sublayer"])
def test_sites_that_the_network_lacks_are_refused(sites: str, tmp_path: Path) -> None:
    for verb in (measure, functools.partial(optimize, budget=2)):
        with pytest.raises(UnsupportedModel, match="has no sites"):
            verb(untouchable("sd15_ddim"), [good("sd15_ddim")], sites=sites)
    with pytest.raises(UnsupportedModel, match="has no sites"):
        measure(untouchable("sd15_ddim"), [good("sd15_ddim")], sites=sites, resume=tmp_path / "kept")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"influence_steps": 0}, "influence_steps=0"),
        ({"influence_steps": 1.5}, "influence_steps=1.5"),
        ({"influence_steps": True}, "influence_steps=True"),
        ({"sites": "layers"}, "sites='layers'"),
        ({"resume": __file__}, "resume="),
        ({"resume": f"{__file__}/kept"}, "resume="),
        ({"resume": "x" * 8000}, "resume="),
        ({"resume": 3}, "resume=3"),
    ],
    ids=str,
)
def test_what_measure_cannot_do_is_refused(options: Any, says: str) -> None:
    with pytest.raises(BadOption) as refused:
        measure(untouchable(), [good()], **options)
    assert says in str(refused.value)
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize(
    "options", [{"rounds": 0}, {"rounds": 1.5}, {"rounds": True}, {"schedule": "uniform"}], ids=str
)
def test_what_correct_cannot_do_is_refused(options: Any) -> None:
    pipe = untouchable()
    asked = {"schedule": bound(pipe, hold("#.#.#."[:STEPS]))} | options
    with pytest.raises(BadOption, match=next(iter(options))):
        correct(pipe, asked.pop("schedule"), [good()], **asked)


def guided(pipe: Any, scale: float) -> CacheSchedule:
    scales = {"guidance_scale": scale}
    return bound(pipe, hold("#.#.#."[:STEPS]), guidance=Guidance(mode="none", branches=1, scales=scales))


@pytest.mark.parametrize("verb", ["estimate", "correct", "evaluate"])
def test_a_schedule_of_other_steps_or_guidance_is_refused(verb: str, tmp_path: Path) -> None:
    pipe, out = untouchable(), tmp_path / "out"
    ask: dict[str, Callable[[Any], Any]] = {
        "estimate": lambda source: estimate(pipe, source, **good()),
        "correct": lambda source: correct(pipe, source, [good()]),
        "evaluate": lambda source: evaluate(pipe, {"a": source}, [good()], compare=(), metrics=("latent",), out=out),
    }
    for source in (bound(pipe, hold("#.#.#.#.#.")), guided(pipe, good()["guidance_scale"] + 1)):
        with pytest.raises(ScheduleMismatch, match=r"(fit|make) a schedule"):
            ask[verb](source)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("source", "call", "error", "says"),
    [
        ("uniform:every=2", good(num_inference_steps=0), BadOption, "num_inference_steps=0"),
        ("uniform:every=2", good(steps=3), UnknownName, "no argument of FluxPipeline"),
        ("uniform:every=2", good(generator=7), BadOption, "torch.Generator"),
        ("uniform:every=2,sites=layer", good(), BadOption, "sites='layer'"),
        ("unifrom", good(), UnknownName, "Did you mean"),
        ("x" * 8000, good(), UnknownName, "no rule called"),
        ("a/" + "x" * 8000, good(), DiffCacheError, "Allowed|local folder"),
        (3, good(), BadOption, "schedule=3"),
    ],
    ids=lambda value: f"{value!s:.30}",
)
def test_what_estimate_cannot_answer_is_refused(source: Any, call: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        estimate(untouchable(), source, **call)


@pytest.mark.parametrize("name", ["x" * 8000, "a/" + "x" * 8000, "a\0b", "", "\ud800"], ids=lambda v: f"{v!a:.12}")
def test_names_that_no_file_can_have_are_refused(name: str) -> None:
    for verb in (accelerate, lambda pipe, source: accelerated(pipe, source).__enter__()):
        pipe = untouchable()
        with pytest.raises(DiffCacheError):
            verb(pipe, name)
        assert "_diffcache" not in pipe.__dict__
    with pytest.raises(DiffCacheError):
        accelerate(untouchable(), Path(name or "x" * 300))


# evaluate


def brightness(pictures: np.ndarray, prompts: Any) -> np.ndarray:
    return pictures.mean(axis=(1, 2, 3))


EVALUATIONS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a title with a lone surrogate": ({"title": "a \ud800"}, BadOption, "title="),
    "a title that is no text": ({"title": 3}, BadOption, "title="),
    "a file for a folder": ({"out": __file__}, BadOption, "out="),
    "a folder inside a file": ({"out": Path(__file__) / "out"}, BadOption, "out="),
    "a folder of a long name": ({"out": "x" * 8000}, BadOption, "out="),
    "a folder where none can be": ({"out": "/proc/none/out"}, BadOption, "out="),
    "a text for schedules": ({"schedules": "uniform:every=2"}, BadOption, "schedules cannot be used: it is a str"),
    "a schedule that is none": ({"schedules": {"a": 3}}, BadOption, "schedule=3"),
    "a name that is no text": ({"schedules": {1: "full"}}, BadOption, "name="),
    "a long name": ({"schedules": {"x" * 8000: "full"}}, BadOption, "name="),
    "an empty name": ({"schedules": {" ": "full"}}, BadOption, "name="),
    "a name with a lone surrogate": ({"schedules": {"\ud800": "full"}}, BadOption, "name="),
    "the name of the full run": ({"schedules": {"full run": "full"}}, BadOption, "names that no other method has"),
    "a rule for sites that are not there": ({"pipe": "sd15_ddim", "schedules": {"a": "uniform:sites=block"}},
                                            BadOption, "sites='block'"),
    "a missing file": ({"schedules": {"a": "none.safetensors"}}, DiffCacheError, "no such file"),
    "an unknown metric": ({"metrics": ("latnet",)}, UnknownName, "no metric called"),
    "a text for metrics": ({"metrics": "latent"}, BadOption, "metrics="),
    "an unknown option": ({"call": {"output_type": "np"}, "metrics": ("ssim",), "options": {"ssim": {"window": 3}}},
                          UnknownName, "no option of"),
    "options of another metric": ({"options": {"lpips": {}}}, BadOption, "options="),
    "missing weights": ({"call": {"output_type": "np"}, "metrics": ("lpips",),
                         "options": {"lpips": {"weights": "none.pth"}}}, DiffCacheError, "none.pth"),
    "a network that is none": ({"call": {"output_type": "np"}, "metrics": ("lpips",),
                                "options": {"lpips": {"net": "resnet"}}}, BadOption, "net="),
    "no device of that name": ({"call": {"output_type": "np"}, "metrics": ("ssim",),
                                "options": {"ssim": {"device": "tpu"}}}, BadOption, "device="),
    "metrics of pictures for latents": ({"metrics": ("psnr",)}, BadOption, "output_type='latent'"),
    "an extractor for latents": ({"extractor": "efflite0"}, BadOption, "output_type='latent'"),
    "an unknown extractor": ({"call": {"output_type": "np"}, "extractor": "effnet"}, UnknownName, "extractor"),
    "real pictures without an extractor": ({"real": "."}, BadOption, "real cannot be used"),
    "a profile that is none": ({"profile": __file__}, DiffCacheError, "test_early.py"),
    "a missing profile": ({"profile": "none.safetensors"}, DiffCacheError, "no such file"),
    "two scorers of one name": ({"call": {"output_type": "np"}, "metrics": ("psnr",),
                                 "scorers": [scorer(brightness), scorer(brightness)]}, BadOption, "scorers="),
    "a method that is none": ({"extra": ["taylorseer"]}, BadOption, "Method"),
    "a method with other arguments": ({"extra": [Method(name="b", kind="peer", change={"colour": 3})]}, UnknownName,
                                      "colour"),
    "a method of no steps": ({"extra": [Method(name="b", kind="peer", change={"num_inference_steps": 0})]}, BadOption,
                             "num_inference_steps=0"),
    "trials of a pipeline": ({"trials": Trials(lambda policy, n: [True] * n, 3)}, BadOption, "trials cannot be used"),
}  # fmt: skip


@pytest.mark.parametrize("what", EVALUATIONS)
def test_what_cannot_be_evaluated_is_refused_before_anything_runs(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    changes, error, says = EVALUATIONS[what]
    asked: dict[str, Any] = {"schedules": {"a": "uniform:every=2"}, "compare": (), "metrics": ("latent",)} | changes
    name = asked.pop("pipe", "flux")
    call = good(name) | asked.pop("call", {})
    if name != "flux":
        call["output_type"] = "latent"
    with pytest.raises(error) as refused:
        evaluate(untouchable(name), asked.pop("schedules"), [call], **asked)
    assert says in str(refused.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("verb", VERBS)
def test_an_accelerated_pipeline_is_refused_at_once(verb: str) -> None:
    pipe = untouchable()
    with accelerated(pipe, "uniform:every=2"), pytest.raises(AlreadyAccelerated):
        VERBS[verb](pipe, [good()])


@pytest.mark.parametrize(("play", "episodes"), [(None, 3), (print, 0), (print, 2.5), (print, True), (print, -1)])
def test_trials_are_a_function_and_a_number_of_episodes(play: Any, episodes: Any) -> None:
    with pytest.raises(BadOption):
        Trials(play, episodes)


# Loops of one's own


def test_calls_of_a_loop_of_ones_own_are_checked_too() -> None:
    def sample(start: float) -> None:
        raise HasRun

    loop = Loop(Transformer().eval(), sample)
    for calls in ([], [{"begin": 1.0}], [{"start": math.nan}], [{}]):
        for verb in (measure, functools.partial(optimize, budget=2)):
            with pytest.raises((BadOption, UnknownName)):
                verb(loop, calls)
    with pytest.raises(BadOption, match="sample=None"):
        measure(Loop(Transformer().eval()), [{"seed": 1}])
    with pytest.raises(BadOption, match="call 0 has no generator"):
        evaluate(loop, {}, [{"start": 1.0}])


@pytest.mark.parametrize("timesteps", [[], [[1.0, 0.5]], "abc", None, [1.0, math.nan], 3.0], ids=str)
def test_a_trajectory_has_one_number_for_every_evaluation(timesteps: Any) -> None:
    with pytest.raises(BadOption, match="timesteps"), diffcache.trajectory(Transformer(), timesteps):
        raise HasRun


@pytest.mark.parametrize("branches", [0, -1, 1.5, True, "2", None], ids=str)
def test_branches_of_a_trajectory_are_a_count(branches: Any) -> None:
    with pytest.raises(BadOption, match="branches"), diffcache.trajectory(Transformer(), [1.0], branches=branches):
        raise HasRun


def test_a_trajectory_is_around_a_network() -> None:
    with pytest.raises(BadOption, match="network"), diffcache.trajectory("net", [1.0]):  # type: ignore[arg-type]
        raise HasRun
    with pytest.raises(BadOption, match="sample"):
        Loop(nn.Linear(1, 1), 3)  # type: ignore[arg-type]


# Documents


@pytest.mark.parametrize("timesteps", ["abc", None, [], [3.0, math.nan, 1.0], [1.0, 2.0]], ids=str)
def test_a_grid_that_does_not_fall_is_refused(timesteps: Any) -> None:
    with pytest.raises(BadOption, match="timesteps"):
        diffcache.resampled(fallen(), timesteps)
    with pytest.raises(BadOption, match="schedule"):
        diffcache.resampled("uniform", [2.0, 1.0])  # type: ignore[arg-type]


def fallen() -> CacheSchedule:
    pipe = shared("flux")
    source = bound(pipe, hold("#.#.#."[:STEPS]))
    return CacheSchedule(steps=STEPS, denoisers=source.denoisers, timesteps=np.linspace(1.0, 0.1, STEPS))


def test_what_plan_is_not_given_is_refused() -> None:
    for source in ("profile.safetensors", None, schedule()):
        with pytest.raises(BadOption, match="profile"):
            diffcache.plan(source, "uniform", 2)  # type: ignore[arg-type]
    with pytest.raises(BadOption, match="scheduler"):
        diffcache.plan(profile(), 3, 2)  # type: ignore[arg-type]


@pytest.mark.parametrize("thing", ["a text", 3, None, schedule()], ids=lambda v: type(v).__name__)
def test_restore_and_report_refuse_what_can_never_be_accelerated(thing: Any) -> None:
    with pytest.raises(UnsupportedModel):
        diffcache.restore(thing)
    with pytest.raises(DiffCacheError):
        diffcache.report(thing)


# Rules that can never predict


@pytest.mark.parametrize("rule", ["first_block", "firstblockcache:threshold=0.5"])
def test_a_rule_that_decides_in_a_block_is_refused_for_a_network_without_one(rule: str) -> None:
    pipe = untouchable("sd15_ddim")
    for verb in (accelerate, lambda pipe, rule: estimate(pipe, rule, **good("sd15_ddim"))):
        with pytest.raises((BadOption, UnsupportedModel), match="first_block"):
            verb(pipe, rule)
    assert "_diffcache" not in pipe.__dict__


def test_an_estimate_refuses_a_rule_that_the_shapes_of_the_network_rule_out() -> None:
    pipe, x = loop(), noise(1, 4, 3)
    pipe.transformer.odd = lambda call, output: torch.cat([output, output], dim=1)  # twice as many tokens
    with pytest.raises(UnsupportedModel, match="no step could be predicted"):
        estimate(pipe, "easycache:warmup=2", x=x)
    assert estimate(pipe, "uniform:every=2", x=x).gain > 1


@pytest.mark.parametrize("name", ["lpips", "ssim"])
def test_a_metric_names_a_package_that_is_missing_before_anything_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("torchmetrics", "torchmetrics.functional.image", "torchmetrics.functional.image.lpips"):
        monkeypatch.setitem(sys.modules, module, None)
    call = good(output_type="np")
    with pytest.raises(DiffCacheError, match=r"needs the package 'torchmetrics'.*pip install"):
        evaluate(untouchable(), {}, [call], metrics=(name,), compare=(), out=tmp_path / "out")


def test_a_metric_of_ones_own_takes_part_in_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(*, strength: float = 1.0) -> None:
        if strength < 0:
            raise BadOption("strength", strength, "0 or more")

    def score(found: np.ndarray, reference: np.ndarray, *, strength: float = 1.0) -> np.ndarray:
        return np.zeros(len(found))

    home = types.ModuleType("mine")
    home.metric = types.SimpleNamespace(ABOUT=About("Mine", "", "lower", "None."), check=check, score=score)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mine", home)
    name, out = "mine:metric", tmp_path / "out"
    for options, error in (({"strength": -1.0}, BadOption), ({"weight": 1.0}, UnknownName)):
        with pytest.raises(error):
            evaluate(untouchable(), {}, [good()], metrics=(name,), options={name: options}, compare=(), out=out)
    with pytest.raises(HasRun):
        evaluate(untouchable(), {}, [good()], metrics=(name,), options={name: {"strength": 1.0}}, compare=(), out=out)
