"""Bad input gives one error that says what was asked, what was found, what is allowed and what to do next; and nothing
is half patched: every ``__dict__`` is as before, and the pipeline runs."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from pipelines import TINY, fresh, run, with_scheduler
from probes import bound, dicts, hold

from diffcache import CacheSchedule, accelerate, accelerated, errors, report
from diffcache.documents import DenoiserPlan, Guidance, NoiseSchedulerId, SitePlan
from diffcache.errors import (
    AcceleratedObjectCopied,
    AlreadyAccelerated,
    BadOption,
    DiffCacheError,
    DocumentError,
    ScheduleMismatch,
    UnknownName,
    UnsupportedModel,
    Unusable,
)
from diffcache.executor import FailedOpen
from diffcache.schedulers import Rule, rules

pytestmark = pytest.mark.fast

CALL = TINY["flux"].call(None)


@pytest.fixture(scope="module")
def pipe() -> Any:
    """Refusals leave it as it was, so one serves them all."""
    made = fresh("flux")
    run(made, CALL)
    return made


def schedule_of(pipe: Any, **changes: Any) -> CacheSchedule:
    return dataclasses.replace(bound(pipe, hold("#.#.#.")), **changes)


def denoiser_of(pipe: Any, **changes: Any) -> dict[str, DenoiserPlan]:
    return {"transformer": dataclasses.replace(bound(pipe, hold("#.#.#.")).denoisers["transformer"], **changes)}


def refusal(pipe: Any, asked: Any, error: type[Exception], **options: Any) -> str:
    """The text of the error; and nothing was touched."""
    before = dicts(pipe)
    with pytest.raises(error) as refused:
        accelerate(pipe, asked, **options)
    assert dicts(pipe) == before
    assert isinstance(refused.value, DiffCacheError)
    said = str(refused.value)
    assert 20 < len(said) < 1200
    assert "\n" not in said
    return said


def demand(said: str, *parts: str) -> None:
    for part in parts:
        assert part in said, f"{part!r} is not in {said!r}"


# --- what is accelerated ---------------------------------------------------------------------------------------------

NOT_A_PIPELINE: dict[str, Callable[[Any], Any]] = {
    "NoneType": lambda pipe: None,
    "str": lambda pipe: "stabilityai/stable-diffusion",
    "type": lambda pipe: StableDiffusionPipeline,
    "dict": lambda pipe: dict(pipe.components),
}


@pytest.mark.parametrize("kind", NOT_A_PIPELINE)
def test_something_that_is_not_a_pipeline_is_refused_by_its_type(kind: str, pipe: Any) -> None:
    before = dicts(pipe)
    with pytest.raises(UnsupportedModel) as refused:
        accelerate(NOT_A_PIPELINE[kind](pipe), "uniform:every=2")
    demand(
        str(refused.value),
        f"asked for a {kind}",
        "a diffusers pipeline (an object with a scheduler, components and a progress_bar)",
        "a diffusion policy (diffusion_policy, ",
        "the network of a loop of your own",
    )
    assert dicts(pipe) == before


def test_the_network_of_a_pipeline_alone_is_not_a_pipeline_and_the_first_call_warns() -> None:
    pipe = fresh("flux")
    with (
        accelerated(pipe.transformer, "uniform:every=2"),
        pytest.warns(FailedOpen, match=r"outside of diffcache\.trajectory.*Of a pipeline, accelerate the pipeline"),
    ):
        run(pipe, CALL)


def test_a_pipeline_without_a_denoiser_says_what_it_has_and_what_was_looked_for() -> None:
    pipe = fresh("flux")
    pipe.transformer = None
    said = refusal(pipe, "uniform:every=2", UnsupportedModel)
    demand(
        said,
        "FluxPipeline has no denoiser to accelerate",
        "Components found: ",
        "scheduler",
        "vae",
        "looked for: transformer, unet, prior, decoder and a scheduler",
    )


def test_a_pipeline_without_a_noise_scheduler_is_refused() -> None:
    pipe = fresh("flux")
    pipe.scheduler = None
    with pytest.raises(UnsupportedModel, match=r"FluxPipeline has no denoiser.*and a scheduler\."):
        accelerate(pipe, "uniform:every=2")


def test_an_accelerated_pipeline_is_refused_with_what_it_carries(pipe: Any) -> None:
    for asked, carried in (
        ("uniform:every=2", "the rule 'uniform:every=2'"),
        (schedule_of(pipe), "a schedule of 6 steps (hand-made)"),
        (schedule_of(pipe, provenance={"scheduler": "closed_loop"}), "a schedule of 6 steps (closed_loop)"),
    ):
        with accelerated(pipe, asked):
            said = refusal(pipe, "full", AlreadyAccelerated)
            demand(said, "this FluxPipeline is accelerated already", carried, "Call diffcache.restore first")


# --- what it is accelerated with -------------------------------------------------------------------------------------

KNOWN = ", ".join(rules())

RULES = [
    ("unifrom:every=2", UnknownName, ["no rule called 'unifrom'", "Known: ", "Did you mean 'uniform'?", "reads like"]),
    (
        "",
        UnknownName,
        ["no rule called ''", f"Known: {KNOWN}", 'like "uniform:every=3".'],
    ),
    (
        "output_rate",
        UnknownName,
        ["no rule called 'output_rate'", f"Known: {KNOWN}", "is a criterion", 'Online(rule="output_rate", limit='],
    ),
    ("Modulated-Input:limit=0.1", UnknownName, ["is a criterion", 'Online(rule="modulated_input", limit=']),
    ("uniform:evry=2", UnknownName, ["no option of 'uniform' called 'evry'", "every, sites", "Did you mean 'every'?"]),
    ("uniform:every=0", BadOption, ["every=0 was given", "Allowed: a whole number, at least 1"]),
    ("uniform:every=two", BadOption, ["every='two' was given", "Allowed: a whole number, at least 1"]),
    ("taylorseer:order=9", BadOption, ["order=9 was given", "Allowed: 0 to 4"]),
    ("uniform:sites=layers", BadOption, ["sites='layers' was given", "one of model, stack, block, sublayer"]),
    (Rule("unifrom"), UnknownName, ["no scheduler called 'unifrom'", "Did you mean 'uniform'?"]),
    (
        Rule("closed_loop"),
        UnknownName,
        ["no rule called 'closed_loop'", f"Known: {KNOWN}"],
    ),
    (Rule("uniform", options={"evry": 2}), UnknownName, ["no option of 'uniform' called 'evry'", "mean 'every'?"]),
    (Rule("uniform", options={"every": 0}), BadOption, ["every=0 was given", "at least 1"]),
    (Rule("uniform", granularity="layers"), BadOption, ["sites='layers' was given", "model, stack, sublayer"]),
    (
        None,
        BadOption,
        ["schedule=None was given", f"a hub id, or a rule ({KNOWN}"],
    ),
    (3, BadOption, ["schedule=3 was given"]),
    (b"uniform:every=2", BadOption, ["schedule=b'uniform:every=2' was given"]),
]


@pytest.mark.parametrize(("asked", "error", "parts"), RULES, ids=[str(asked) for asked, *_ in RULES])
def test_a_rule_that_makes_no_sense_is_refused(asked: Any, error: type[Exception], parts: list[str], pipe: Any) -> None:
    demand(refusal(pipe, asked, error), *parts)


def test_a_rule_for_sites_that_are_not_there_says_which_are() -> None:
    said = refusal(fresh("sd15"), "uniform:every=2,sites=block", BadOption)
    demand(said, "sites='block' was given", "what unet of this pipeline has: model")


# --- files -----------------------------------------------------------------------------------------------------------


class Bomb:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('the file ran code')",)


def files(pipe: Any, folder: Path) -> dict[str, tuple[bytes, list[str]]]:
    good = schedule_of(pipe).to_bytes()
    weights, pickled = folder / "weights", folder / "pickled"
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(2)}, weights)
    torch.save({"w": Bomb()}, pickled)
    return {
        "truncated": (good[: len(good) // 2], ["whole safetensors file"]),
        "empty": (b"", ["found 0 bytes"]),
        "text": (b"# a schedule\nsteps: 6\n", ["'file'"]),
        "json": (b'{"steps": 6}', ["a JSON text"]),
        "pickle": (pickle.dumps(Bomb()), ["a pickle", "Nothing in it was run"]),
        "torch.save": (pickled.read_bytes(), ["a zip archive, as torch.save writes", "Nothing in it was run"]),
        "weights": (weights.read_bytes(), ["weights or a LoRA"]),
        "huge header": ((2**62).to_bytes(8, "little") + b"{}", ["a header of"]),
        "a byte changed": (good.replace(b"diffcache.schedule", b"diffcache.schedulx"), ["'format'"]),
        "a later version": (good.replace(rb"\"version\":2", rb"\"version\":9"), ["'version'", "newer"]),
        "more steps": (
            good.replace(rb"\"steps\":6", rb"\"steps\":7"),
            ["'transformer/model/compute'", "6 steps. Allowed: 7"],
        ),
    }


HOSTILE = [
    *("truncated", "empty", "text", "json", "pickle", "torch.save", "weights", "huge header"),
    *("a byte changed", "a later version", "more steps"),
]


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_damaged_foreign_or_hostile_file_is_refused_and_never_run(kind: str, pipe: Any, tmp_path: Path) -> None:
    data, parts = files(pipe, tmp_path)[kind]
    path = tmp_path / "schedule.safetensors"
    path.write_bytes(data)
    for asked in (path, str(path)):
        demand(refusal(pipe, asked, DocumentError), str(path), *parts)


def test_a_good_file_is_accepted_by_either_kind_of_path(pipe: Any, tmp_path: Path) -> None:
    path = schedule_of(pipe).save(tmp_path / "schedule.safetensors")
    for asked in (path, str(path), str(tmp_path)):
        with accelerated(pipe, asked):
            run(pipe, CALL)
            assert report(pipe).predicted == 3


def test_a_path_that_is_not_there_says_so(pipe: Any, tmp_path: Path) -> None:
    missing = tmp_path / "nothing.safetensors"
    demand(refusal(pipe, str(missing), DocumentError), str(missing), "no such file", "Check the path.")
    demand(refusal(pipe, missing, DocumentError), "no such file")


# --- a schedule for something else -----------------------------------------------------------------------------------


def test_another_model_class_is_refused_with_both_names(pipe: Any) -> None:
    asked = schedule_of(pipe, denoisers=denoiser_of(pipe, class_name="SD3Transformer2DModel"))
    for strict in (True, False):
        said = refusal(pipe, asked, ScheduleMismatch, strict=strict)
        demand(said, "made for SD3Transformer2DModel; 'transformer' of this FluxPipeline is FluxTransformer2DModel")
        demand(said, "Load the schedule of this model, or make one.")


def test_another_model_configuration_is_refused_and_accepted_without_strict(pipe: Any) -> None:
    digest = "0" * 64
    asked = schedule_of(pipe, denoisers=denoiser_of(pipe, config_digest=digest))
    said = refusal(pipe, asked, ScheduleMismatch)
    demand(
        said, "a FluxTransformer2DModel of another configuration", f"{digest:.12}…", "strict=False accepts it as it is"
    )
    with accelerated(pipe, asked, strict=False):
        run(pipe, CALL)
        assert report(pipe).predicted == 3


def test_another_noise_scheduler_is_refused_with_both_names_and_the_way_there(pipe: Any) -> None:
    other = NoiseSchedulerId(class_name="EulerDiscreteScheduler", config_digest="0" * 64)
    for strict in (True, False):
        said = refusal(pipe, schedule_of(pipe, noise_scheduler=other), ScheduleMismatch, strict=strict)
        demand(
            said,
            "fitted with the noise scheduler EulerDiscreteScheduler; the pipeline has FlowMatchEulerDiscreteScheduler",
            "Set pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)",
            "or fit a schedule for FlowMatchEulerDiscreteScheduler",
        )


def test_another_noise_scheduler_configuration_is_refused_and_accepted_without_strict(pipe: Any) -> None:
    other = NoiseSchedulerId(
        class_name="FlowMatchEulerDiscreteScheduler", config_digest="0" * 64, prediction_type="v_prediction"
    )
    asked = schedule_of(pipe, noise_scheduler=other)
    said = refusal(pipe, asked, ScheduleMismatch)
    demand(
        said, "of another configuration (prediction type v_prediction, digest 000000000000…; here None", "strict=False"
    )
    with accelerated(pipe, asked, strict=False):
        run(pipe, CALL)
        assert report(pipe).predicted == 3


def test_another_denoiser_name_is_refused_with_those_there_are(pipe: Any) -> None:
    said = refusal(
        pipe, CacheSchedule(steps=6, denoisers={"unet": DenoiserPlan(sites={"model": hold("#.#.#.")})}), UnknownName
    )
    demand(said, "no denoiser called 'unet'", "Known: transformer", "made for another pipeline")


def test_a_site_that_is_not_there_is_refused_with_those_there_are(pipe: Any) -> None:
    asked = schedule_of(pipe, denoisers=denoiser_of(pipe, sites={"block:transformer_block.0": hold("#.#.#.")}))
    said = refusal(pipe, asked, UnknownName)
    demand(said, "no site in FluxTransformer2DModel called 'block:transformer_block.0'", "Known: model, stack:")
    demand(said, "Did you mean 'block:transformer_blocks.0'?")


@pytest.mark.parametrize("steps", [5, 12])
def test_another_number_of_steps_is_refused_with_both_numbers_when_the_run_begins(steps: int, pipe: Any) -> None:
    with accelerated(pipe, schedule_of(pipe)):
        before = dicts(pipe)["transformer."]
        with pytest.raises(ScheduleMismatch) as refused:
            run(pipe, CALL, num_inference_steps=steps)
        demand(
            str(refused.value),
            f"made for 6 steps; this run takes {steps} (noise scheduler FlowMatchEulerDiscreteScheduler",
            f"Pass num_inference_steps=6, or make a schedule for {steps}",
        )
        assert dicts(pipe)["transformer."] == before
        run(pipe, CALL)
        assert report(pipe).predicted == 3


# --- a schedule that contradicts itself ------------------------------------------------------------------------------


def spoiled(field: str, value: float) -> Callable[[], SitePlan]:
    def make() -> SitePlan:
        plan = hold("#.#.#.", kappa=np.zeros((1, 6)), scale=np.ones((1, 6)), bias=np.zeros((1, 6, 4)))
        array = getattr(plan, field).copy()
        array[0, 1] = value
        return dataclasses.replace(plan, **{field: array})

    return make


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("field", ["weights", "kappa", "scale", "bias"])
def test_coefficients_that_are_not_finite_are_refused_when_the_plan_is_made(field: str, value: float) -> None:
    with pytest.raises(DocumentError) as refused:
        spoiled(field, value)()
    demand(
        str(refused.value), f"SitePlan: field {field!r}: branch 0, step 1", f"is {value}", "Allowed: finite numbers."
    )


def test_coefficients_that_are_not_finite_are_refused_in_a_file(pipe: Any, tmp_path: Path) -> None:
    good = schedule_of(
        pipe, denoisers=denoiser_of(pipe, sites={"model": hold("#.#.#.", scale=np.full((1, 6), 1.2345))})
    )
    one, nan = np.float64(1.2345).tobytes(), np.float64("nan").tobytes()
    assert good.to_bytes().count(one) == 6
    path = tmp_path / "schedule.safetensors"
    path.write_bytes(good.to_bytes().replace(one, nan))
    said = refusal(pipe, path, DocumentError)
    demand(said, "'transformer/model/scale'", "branch 0, step 0 is nan", "Allowed: finite numbers")


def test_guidance_that_contradicts_the_branches_is_refused_when_the_schedule_is_made(pipe: Any) -> None:
    with pytest.raises(DocumentError, match=r"2 branches. Allowed: 1 without guidance. Pass guidance=Guidance"):
        bound(pipe, hold("#.#.#.", 2))
    with pytest.raises(DocumentError, match=r"Guidance: field 'branches'"):
        Guidance(mode="none", branches=2)


# --- all of them -----------------------------------------------------------------------------------------------------


def test_after_all_refusals_the_pipeline_runs_as_ever(pipe: Any) -> None:
    plain = run(fresh("flux"), CALL)
    for asked, error, _ in RULES:
        refusal(pipe, asked, error)
    assert torch.equal(run(pipe, CALL), plain)
    with accelerated(pipe, "full"):
        assert torch.equal(run(pipe, CALL), plain)


def test_a_swapped_noise_scheduler_is_named_when_the_schedule_is_refused_at_the_door() -> None:
    pipe = fresh("sd15_ddim")
    schedule = bound(pipe, hold("#.#.#."))
    with_scheduler(pipe, "unipc")
    said = refusal(pipe, schedule, ScheduleMismatch)
    demand(said, "DDIMScheduler; the pipeline has UniPCMultistepScheduler")


@pytest.mark.parametrize(
    ("what", "name"), [("profile", "profile"), ("store='int8'", "store"), ("--compare", "compare")]
)
def test_an_unusable_value_is_described_by_a_reason_and_a_next_step(what: str, name: str) -> None:
    error = Unusable(what, "it has no dynamics", "Pass a profile with dynamics")
    assert str(error) == f"{what} cannot be used: it has no dynamics. Pass a profile with dynamics."
    assert (error.name, error.value, error.allowed) == (name, error.why, error.next_step)


def prose_as_value(tree: ast.AST) -> list[int]:
    """Return the lines that call BadOption with a phrase as the value, where Unusable states a reason."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "BadOption" and len(node.args) > 1:
            parts = node.args[1].values if isinstance(node.args[1], ast.JoinedStr) else [node.args[1]]
            texts = [part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)]
            if re.match(r"(one|a|an|with|without|of|calls?) ", "".join(texts)):
                found.append(node.lineno)
    return found


def test_no_error_shows_a_phrase_as_a_value() -> None:
    sources = sorted(Path(errors.__file__).parent.rglob("*.py"))
    assert not [f"{p}:{n}" for p in sources for n in prose_as_value(ast.parse(p.read_text("utf-8")))]
    planted = """raise BadOption("profile", f"one without {name}", "one with it")"""
    assert prose_as_value(ast.parse(planted)) == [1]


def test_every_error_has_one_base_and_most_are_what_python_would_raise_too() -> None:
    raised = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, Exception)]
    assert all(issubclass(kind, DiffCacheError) for kind in raised)
    assert issubclass(BadOption, ValueError)
    assert issubclass(Unusable, BadOption)
    assert issubclass(DocumentError, ValueError)
    assert issubclass(UnknownName, LookupError)
    assert issubclass(UnsupportedModel, TypeError)
    assert AcceleratedObjectCopied in raised


def test_no_message_leaks_an_address_or_a_class_of_python(pipe: Any) -> None:
    for asked, error, _ in RULES:
        said = refusal(pipe, asked, error)
        assert not re.search(r"0x[0-9a-f]{6}|<class|object at", said)


def test_a_half_patched_pipeline_would_be_noticed(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffcache import api

    def patch_first(pipe: Any, *_: Any, **__: Any) -> None:
        pipe.transformer.__dict__["forward"] = pipe.transformer.forward
        raise BadOption("x", 1, "anything else, as long as the text is long enough")

    monkeypatch.setattr(api, "Executor", patch_first)
    with pytest.raises(AssertionError):
        refusal(pipe, "full", BadOption)
    del pipe.transformer.__dict__["forward"]
