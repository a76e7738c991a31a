"""Texts, dictionaries and common arguments become calls."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import TINY, shared
from policies import ACTION, HORIZON, WIDTH, Transformer

import diffcache
from diffcache import Loop, evaluate, host, measure, optimize
from diffcache.errors import BadOption, UnknownName

pytestmark = pytest.mark.fast


def calls_of(given: Any, name: str = "flux", *, first_seed: int = 0, **common: Any) -> Any:
    return host.calls_of(shared(name), given, common, optimize, first_seed=first_seed)


def seeds(calls: Any) -> list[int]:
    return [call["generator"].initial_seed() for call in calls]


def test_texts_become_calls_with_seeds_from_0() -> None:
    made = calls_of(["a cat", "a dog"], num_inference_steps=5, guidance_scale=2.0)
    assert [call["prompt"] for call in made] == ["a cat", "a dog"]
    assert seeds(made) == [0, 1]
    assert all(call["generator"].device == torch.device("cpu") for call in made)
    assert all((call["num_inference_steps"], call["guidance_scale"]) == (5, 2.0) for call in made)
    assert seeds(calls_of("a cat", first_seed=7)) == [7]
    assert seeds(calls_of(("a cat",))) == [0]


def test_dictionaries_are_taken_as_they_are() -> None:
    given = [{"prompt": "a cat"}, {"prompt": "a dog"}]
    assert calls_of(given) is given
    assert calls_of(given[0]) == given[:1]
    before = copy.deepcopy(given)
    assert calls_of(given, height=8) == [{"prompt": "a cat", "height": 8}, {"prompt": "a dog", "height": 8}]
    assert given == before


@pytest.mark.parametrize(
    ("given", "common", "says"),
    [
        ([{"prompt": "a cat"}, {"height": 8}], {"height": 9}, r"calls\[1\]='height, which is also given for all"),
        ("a cat", {"prompt": "a dog"}, r"prompt='a dog' was given\. Allowed: dictionaries"),
        (["a cat"], {"generator": torch.Generator()}, r"generator='a Generator' was given\. Allowed: dictionaries"),
        (["a cat", {"prompt": "a dog"}], {}, "texts and other values in one list"),
        ([{"prompt": "a cat"}, 3], {"height": 8}, "a list of 2 with 3 in it"),
        ([], {"height": 8}, "a list of 0"),
        (b"a cat", {}, "prompts as texts"),
    ],
)  # fmt: skip
def test_a_clash_and_other_values_are_refused(given: Any, common: dict[str, Any], says: str) -> None:
    with pytest.raises(BadOption, match=says):
        calls_of(given, **common)


@pytest.mark.parametrize("verb", [optimize, measure, evaluate])
def test_a_name_that_is_neither_an_option_nor_an_argument_is_refused(verb: Any, tmp_path: Path) -> None:
    more = {optimize: (["a cat"], 2), measure: (["a cat"],), evaluate: ({"a": "full"}, ["a cat"])}[verb]
    said = f"no option of {verb.__name__} and no argument of FluxPipeline called 'num_inference_step'.*Did you mean "
    with pytest.raises(UnknownName, match=said + "'num_inference_steps'"):
        verb(shared("flux"), *more, num_inference_step=3)
    with pytest.raises(UnknownName, match="Did you mean 'progress'"):
        verb(shared("flux"), *more, progres=True)


def test_a_pipeline_without_prompts_says_what_it_takes() -> None:
    with pytest.raises(BadOption, match=r"such as \{'class_labels': …\}: DiTPipeline takes no argument 'prompt'"):
        calls_of(["a cat"], "dit", num_inference_steps=4)
    with pytest.raises(BadOption, match="it takes batch_size"):
        calls_of("a cat", "ddpm")


def test_a_loop_with_prompts_gets_a_seed() -> None:
    loop = Loop(Transformer().eval(), lambda prompt, size=3: None)
    made = host.calls_of(loop, ["a", "b"], {"size": 4}, measure)
    assert made == [{"prompt": "a", "seed": 0, "size": 4}, {"prompt": "b", "seed": 1, "size": 4}]
    with pytest.raises(BadOption, match=r"such as \{'start': …\}"):
        host.calls_of(Loop(Transformer().eval(), lambda start: None), "a", {}, measure)


def test_texts_give_the_profile_of_the_calls_that_they_stand_for(tmp_path: Path) -> None:
    """With prompts given as embeddings through a common argument, as the tiny pipelines have no text encoders."""
    pipe = shared("flux")
    rest = {k: v for k, v in TINY["flux"].call(pipe).items() if k not in ("prompt", "generator", "latents")}
    given = [{"generator": torch.Generator().manual_seed(seed)} for seed in range(2)]
    written = [{**rest, **call} for call in given]
    assert _without_seconds(measure(pipe, given, **rest)) == _without_seconds(measure(pipe, written))
    other = [{"generator": torch.Generator().manual_seed(seed + 1)} for seed in range(2)]
    assert _without_seconds(measure(pipe, other, **rest)) != _without_seconds(measure(pipe, written))
    assert optimize(pipe, given, 3, time_limit_s=0, **rest) == optimize(pipe, written, 3, time_limit_s=0)
    found = evaluate(pipe, {"a": "uniform:every=2"}, given, compare=(), metrics=("latent",), out=tmp_path, **rest)
    assert len(found.record["samples"]) == 2


def _without_seconds(profile: diffcache.Profile) -> Any:
    return profile.denoisers["transformer"].sites["model"].output


def test_held_out_texts_get_the_seeds_that_follow() -> None:
    network, times = Transformer().eval(), torch.linspace(1, 0.2, 5)
    seen: list[tuple[str, int]] = []

    class SeenError(Exception):
        pass

    def sample(prompt: str) -> torch.Tensor:
        seen.append((prompt, torch.initial_seed()))
        if len(seen) == 4:
            raise SeenError
        x = torch.randn(1, HORIZON, ACTION)
        with diffcache.trajectory(network, times):
            for time in times:
                x = x - 0.2 * network(x, time[None], conditioning_vec=torch.zeros(1, WIDTH))
        return x

    with pytest.raises(SeenError):
        optimize(Loop(network, sample), ["a", "b"], 2, held_out=["c", "d"])
    assert seen == [("a", 0), ("b", 1), ("c", 2), ("d", 3)]
