"""Acceleration leaves no trace: in any order, with foreign wrappers, after exceptions, when the pipeline goes."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import pickle
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import accelerate.hooks
import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook
from pipelines import TINY, fresh, run, shared, with_scheduler
from probes import assert_same_weights, dicts, granularities, names, ours, owners, weights
from torch import Tensor, nn

from diffcache import accelerate as speed_up
from diffcache import accelerated, report, restore
from diffcache.errors import AcceleratedObjectCopied, AlreadyAccelerated, BadOption
from diffcache.host import LoopWatcher
from diffcache.patch import Layers

# Each pipeline at the granularity that takes most layers, and one of them at all.
DEEPEST = [(name, granularities(tiny)[-1]) for name, tiny in TINY.items()]
everywhere = pytest.mark.parametrize(
    ("name", "granularity"), [*DEEPEST, ("flux", "model"), ("flux", "stack"), ("flux", "block")]
)
RULES = ("uniform:every=2", "uniform:every=2,sites=block")
at_model_and_block = pytest.mark.parametrize("spec", RULES, ids=["model", "block"])
CALL = TINY["flux"].call(None)


def other_with_the_same_parts(pipe: Any) -> Any:
    """Another pipeline of the class, around the same denoiser and the same noise scheduler."""
    other = type(pipe)(**pipe.components)
    other.set_progress_bar_config(disable=True)
    return other


def warm(name: str) -> Any:
    """A pipeline that ran once: diffusers itself leaves things behind in the first run."""
    pipe = fresh(name)
    run(pipe, TINY[name].call(pipe), num_inference_steps=2)
    return pipe


# --- nothing stays ---------------------------------------------------------------------------------------------------


@everywhere
def test_every_dict_is_as_found(name: str, granularity: str) -> None:
    pipe = shared(name)
    before = dicts(pipe)
    assert speed_up(pipe, f"full:sites={granularity}") is pipe
    assert ours(pipe)
    assert dicts(pipe) != before
    assert restore(pipe) is pipe
    assert dicts(pipe) == before


@everywhere
def test_after_runs_nothing_is_left_and_the_bits_are_those_of_a_pipeline_never_touched(
    name: str, granularity: str
) -> None:
    pipe, twin, tiny = fresh(name), fresh(name), TINY[name]
    before = weights(pipe)
    expected = run(twin, tiny.call(twin), num_inference_steps=3)
    with accelerated(pipe, f"full:sites={granularity}"):
        run(pipe, tiny.call(pipe), num_inference_steps=3)
    assert ours(pipe) == []
    assert names(pipe) == names(twin)
    assert torch.equal(run(pipe, tiny.call(pipe), num_inference_steps=3), expected)
    assert_same_weights(weights(pipe), before)


@everywhere
def test_state_dicts_and_configurations_are_the_same_while_accelerated(name: str, granularity: str) -> None:
    pipe = shared(name)
    before, config = weights(pipe), dict(pipe.config)
    with accelerated(pipe, f"full:sites={granularity}"):
        assert_same_weights(weights(pipe), before)
        assert dict(pipe.config) == config


def test_the_noise_scheduler_carries_nothing_between_runs_of_an_accelerated_pipeline() -> None:
    pipe = warm("flux")
    before = names(pipe)["scheduler"]
    with accelerated(pipe, "uniform:every=2"):
        run(pipe, CALL)
        assert names(pipe)["scheduler"] == before


def test_restore_is_harmless_where_nothing_is_accelerated() -> None:
    pipe = warm("flux")
    before = dicts(pipe)
    assert restore(pipe) is pipe
    assert dicts(pipe) == before
    with accelerated(pipe, "full"):
        pass
    restore(restore(pipe))
    assert dicts(pipe) == before


def test_accelerating_twice_is_refused_and_the_first_stays_in_force() -> None:
    pipe = warm("flux")
    before = dicts(pipe)
    with accelerated(pipe, "uniform:every=2"):
        with pytest.raises(AlreadyAccelerated, match=r"by the rule 'uniform:every=2'. Call diffcache\.restore first"):
            speed_up(pipe, "uniform:every=3")
        run(pipe, CALL)
        assert report(pipe).predicted == 3
    changed = [name for name, items in dicts(pipe).items() if items != before[name]]
    assert changed == ["pipe", "scheduler"]  # where the run itself leaves its timesteps and settings


def test_a_with_block_restores_after_an_exception() -> None:
    pipe = warm("flux")
    before = dicts(pipe)
    with pytest.raises(ZeroDivisionError), accelerated(pipe, "uniform:every=2"):
        raise ZeroDivisionError
    assert dicts(pipe) == before


@at_model_and_block
def test_restored_in_the_middle_of_a_run_the_rest_of_it_is_computed(spec: str) -> None:
    pipe = warm("flux")
    before = names(pipe)

    def stop(pipe: Any, step: int, _timestep: Tensor, _inputs: Any) -> dict[str, Any]:
        if step == 1:
            restore(pipe)
            assert ours(pipe) == []
        return {}

    speed_up(pipe, spec)
    output = run(pipe, CALL, callback_on_step_end=stop)
    assert bool(output.isfinite().all())
    assert names(pipe) == before
    assert torch.equal(run(pipe, CALL), run(shared("flux"), CALL))


def test_a_failure_half_way_through_accelerate_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = warm("flux")
    before = dicts(pipe)

    def fail(self: LoopWatcher) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(LoopWatcher, "attach", fail)
    with pytest.raises(ZeroDivisionError):
        speed_up(pipe, "full:sites=sublayer")
    assert dicts(pipe) == before


# --- several pipelines -----------------------------------------------------------------------------------------------


@at_model_and_block
def test_a_second_pipeline_of_the_class_is_not_concerned(spec: str) -> None:
    mine, other = warm("flux"), warm("flux")
    plain = run(shared("flux"), CALL)
    before = dicts(other)
    speed_up(mine, spec)
    assert dicts(other) == before
    fast = run(mine, CALL)
    assert torch.equal(run(other, CALL), plain)
    assert not torch.equal(fast, plain)
    speed_up(other, "full")
    assert torch.equal(run(other, CALL), plain)
    assert torch.equal(run(mine, CALL), fast)
    restore(mine)
    assert torch.equal(run(mine, CALL), plain)
    assert report(other).computed == 6
    restore(other)
    assert ours(mine) == ours(other) == []


@pytest.mark.parametrize(
    ("order", "spec"), [*((order, RULES[0]) for order in itertools.permutations(range(3))), ((0, 2, 1), RULES[1])]
)
def test_pipelines_that_share_denoiser_and_noise_scheduler_are_restored_in_any_order(
    order: tuple[int, ...], spec: str
) -> None:
    first = warm("flux")
    pipes = [first, other_with_the_same_parts(first), other_with_the_same_parts(first)]
    before = [dicts(pipe) for pipe in pipes]
    parts = [{k: v for k, v in names(pipe).items() if k != "pipe"} for pipe in pipes]
    specs = [spec, "full:sites=sublayer", "taylorseer:every=3"]
    plain = run(shared("flux"), CALL)
    alone = []
    for pipe, one in zip(pipes, specs, strict=True):
        with accelerated(pipe, one):
            alone.append(run(pipe, CALL))
    assert len({tuple(output.flatten().tolist()) for output in alone}) == 3
    for pipe, one in zip(pipes, specs, strict=True):
        speed_up(pipe, one)
    for i in (2, 0, 1):
        assert torch.equal(run(pipes[i], CALL), alone[i])
    for done, i in enumerate(order, 1):
        restore(pipes[i])
        for j, pipe in enumerate(pipes):
            assert torch.equal(run(pipe, CALL), plain if j in order[:done] else alone[j])
    assert [ours(pipe) for pipe in pipes] == [[], [], []]
    assert [{k: v for k, v in names(pipe).items() if k != "pipe"} for pipe in pipes] == parts
    assert [d["transformer."] for d in map(dicts, pipes)] == [d["transformer."] for d in before]


def test_a_denoiser_called_outside_the_loop_is_as_if_untouched() -> None:
    pipe = warm("ddpm")
    x = torch.randn(1, 3, 16, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = pipe.unet(x, 5).sample
        with accelerated(pipe, "uniform:every=2"):
            run(pipe, TINY["ddpm"].call(pipe))
            assert torch.equal(pipe.unet(x, 5).sample, plain)


# --- foreign wrappers on the same method -----------------------------------------------------------------------------


class Tally:
    """What a foreign wrapper saw, and how to remove it."""

    def __init__(self) -> None:
        self.calls = 0
        self.off: Callable[[], None] = lambda: None


def by_hand(module: nn.Module) -> Tally:
    tally, found = Tally(), module.__dict__.get("forward")
    inner = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        tally.calls += 1
        return inner(*args, **kwargs)

    def off() -> None:
        if found is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = found

    module.__dict__["forward"], tally.off = forward, off
    return tally


def by_diffusers(module: nn.Module) -> Tally:
    tally = Tally()

    class Listen(ModelHook):
        def new_forward(self, _module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            tally.calls += 1
            return self.fn_ref.original_forward(*args, **kwargs)

    registry = HookRegistry.check_if_exists_or_initialize(module)
    registry.register_hook(Listen(), "tally")
    tally.off = lambda: registry.remove_hook("tally", recurse=False)
    return tally


def by_accelerate(module: nn.Module) -> Tally:
    tally = Tally()

    class Listen(accelerate.hooks.ModelHook):
        def pre_forward(self, _module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            tally.calls += 1
            return args, kwargs

    accelerate.hooks.add_hook_to_module(module, Listen())
    tally.off = lambda: accelerate.hooks.remove_hook_from_module(module)
    return tally


STRANGERS = pytest.mark.parametrize("wrap", [by_hand, by_diffusers, by_accelerate])


def places(pipe: Any) -> list[nn.Module]:
    return [pipe.transformer, pipe.transformer.transformer_blocks[0], pipe.transformer.single_transformer_blocks[2]]


def left_by(wrap: Callable[[nn.Module], Tally], found: list[str]) -> dict[str, list[str]]:
    """Names in every ``__dict__`` of a pipeline after only the foreign wrapper was added and removed.

    Some leave the bound method they found in the ``__dict__``. Where they ``found`` ours, that leaves later.
    """
    pipe = warm("flux")
    for tally in map(wrap, places(pipe)):
        tally.off()
    run(pipe, CALL)
    return {owner: [n for n in there if f"{owner}.{n}" not in found] for owner, there in names(pipe).items()}


@STRANGERS
@at_model_and_block
@pytest.mark.parametrize("stranger", ["below", "above"])
@pytest.mark.parametrize("first_off", ["ours", "theirs"])
def test_a_foreign_wrapper_on_the_same_modules_keeps_working_and_leaves_in_any_order(
    wrap: Callable[[nn.Module], Tally], spec: str, stranger: str, first_off: str
) -> None:
    pipe = warm("flux")
    before = weights(pipe)
    plain = run(shared("flux"), CALL)
    with accelerated(shared("flux"), spec):
        fast = run(shared("flux"), CALL)

    if stranger == "above":
        speed_up(pipe, spec)
    found = ours(pipe)
    tallies = [wrap(module) for module in places(pipe)]
    if stranger == "below":
        speed_up(pipe, spec)
    assert torch.equal(run(pipe, CALL), fast)
    assert all(tally.calls for tally in tallies)

    if first_off == "ours":
        restore(pipe)
        counts = [tally.calls for tally in tallies]
        assert torch.equal(run(pipe, CALL), plain)
        assert [tally.calls for tally in tallies] == [count + 6 for count in counts]
        for tally in tallies:
            tally.off()
    else:
        for tally in tallies:
            tally.off()
        counts = [tally.calls for tally in tallies]
        assert torch.equal(
            run(pipe, CALL), fast
        )  # still accelerated, although the foreign wrapper restored what it had found
        assert report(pipe).runs == 2
        assert sum(row.predicted for row in report(pipe).rows) > 0
        assert [tally.calls for tally in tallies] == counts
        restore(pipe)

    assert torch.equal(run(pipe, CALL), plain)
    assert ours(pipe) == []
    assert names(pipe) == left_by(wrap, found)
    assert_same_weights(weights(pipe), before)


@STRANGERS
def test_a_foreign_wrapper_above_a_layer_keeps_working_when_the_layer_leaves_and_returns(
    wrap: Callable[[nn.Module], Tally],
) -> None:
    pipe = warm("flux")
    plain = run(shared("flux"), CALL)
    speed_up(pipe, "full")
    tally = wrap(pipe.transformer)
    for _ in range(3):
        restore(pipe)
        assert torch.equal(run(pipe, CALL), plain)
        speed_up(pipe, "uniform:every=2")
        assert not torch.equal(run(pipe, CALL), plain)
        assert report(pipe).predicted == 3
    calls = tally.calls
    restore(pipe)
    run(pipe, CALL)
    assert tally.calls == calls + 6
    tally.off()
    assert torch.equal(run(pipe, CALL), plain)
    assert ours(pipe) == []


@pytest.mark.parametrize("first", ["offload", "accelerate"])
def test_model_offloading_hangs_its_hooks_anew_after_each_run_and_acceleration_lasts(first: str) -> None:
    pipe = warm("flux")
    plain = run(shared("flux"), CALL)
    with accelerated(shared("flux"), "uniform:every=2"):
        fast = run(shared("flux"), CALL)
    if first == "offload":
        pipe.enable_model_cpu_offload(device="cpu")
    speed_up(pipe, "uniform:every=2")
    if first == "accelerate":
        pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(3):
        assert torch.equal(run(pipe, CALL), fast)
        assert report(pipe).predicted == 3
    assert report(pipe).runs == 3
    restore(pipe)
    assert torch.equal(run(pipe, CALL), plain)
    pipe.remove_all_hooks()
    assert torch.equal(run(pipe, CALL), plain)
    assert ours(pipe) == []


def test_layers_of_two_owners_on_one_noise_scheduler_come_off_in_any_order() -> None:
    pipe = warm("flux")
    found = pipe.scheduler.step
    steps = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        steps.append(1)
        return found(*args, **kwargs)

    pipe.scheduler.step = counted
    with accelerated(pipe, "uniform:every=2"):
        run(pipe, CALL)
        assert report(pipe).predicted == 3
    assert len(steps) == 6
    assert pipe.scheduler.step is counted


# --- copies ----------------------------------------------------------------------------------------------------------

COPYING: dict[str, Callable[[Any], Any]] = {
    "deep copy": copy.deepcopy,
    "pickle": pickle.dumps,
}


@at_model_and_block
@pytest.mark.parametrize("action", COPYING)
def test_copies_are_refused_while_accelerated_and_sound_after(action: str, spec: str) -> None:
    pipe = warm("flux")
    parts = {"FluxPipeline": pipe, "FluxTransformer2DModel": pipe.transformer}
    if "block" in spec:
        parts["FluxTransformerBlock"] = pipe.transformer.transformer_blocks[0]
    with accelerated(pipe, spec):
        run(pipe, CALL)
        for thing in parts.values():
            with pytest.raises(AcceleratedObjectCopied) as refused:
                COPYING[action](thing)
            said = str(refused.value)
            assert f"a {action} of Flux" in said
            assert f"Call diffcache.restore(pipe) first, {action} it, then accelerate both." in said
    for thing in parts.values():
        COPYING[action](thing)


def test_torch_save_of_an_accelerated_denoiser_is_refused_and_its_state_dict_is_not() -> None:
    pipe = warm("flux")
    with accelerated(pipe, "uniform:every=2"):
        with pytest.raises(AcceleratedObjectCopied, match="pickle of FluxTransformer2DModel"):
            torch.save(pipe.transformer, io.BytesIO())
        torch.save(pipe.transformer.state_dict(), io.BytesIO())


def test_a_copy_made_after_restore_computes_with_its_own_weights() -> None:
    pipe = warm("flux")
    with accelerated(pipe, "uniform:every=2"):
        run(pipe, CALL)
    twin = copy.deepcopy(pipe)
    thawed = pickle.loads(pickle.dumps(pipe.transformer))
    for module in (twin.transformer, thawed):
        assert "forward" not in vars(module)
        module.proj_out.weight.data.zero_()
    assert not torch.equal(run(twin, CALL), run(pipe, CALL))
    assert torch.equal(run(pipe, CALL), run(shared("flux"), CALL))


def test_the_noise_scheduler_may_be_copied_in_mid_run_and_the_copy_is_plain() -> None:
    pipe = warm("flux")
    copies = []

    def grab(pipe: Any, _step: int, _timestep: Tensor, _inputs: Any) -> dict[str, Any]:
        assert isinstance(vars(pipe.scheduler)["step"], Layers)
        copies.append(copy.deepcopy(pipe.scheduler))
        copies.append(pickle.loads(pickle.dumps(pipe.scheduler)))
        return {}

    with accelerated(pipe, "uniform:every=2"):
        run(pipe, CALL, callback_on_step_end=grab)
        assert report(pipe).predicted == 3
    for twin in copies:
        assert not isinstance(twin.step, Layers)
        assert twin.step.__self__ is twin


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_an_inert_layer_below_a_foreign_wrapper_neither_refuses_copies_nor_ties_them_to_the_original(
    copied: Callable[[Any], Any],
) -> None:
    module = nn.Linear(2, 2)
    pipe = fresh("flux")
    pipe.transformer.proj_out = module
    from diffcache.patch import layer

    off = layer(module, "forward", lambda inner, x: inner(x) + 1)
    held = module.forward
    module.__dict__["forward"] = lambda x: held(x)
    off()
    module.__dict__["forward"] = held  # the foreign wrapper restores what it found: an empty shell
    twin = copied(module)
    twin.weight.data.zero_()
    twin.bias.data.zero_()
    x = torch.ones(1, 2)
    assert float(twin(x).detach().abs().sum()) == 0
    assert float(module(x).detach().abs().sum()) > 0
    assert "forward" not in vars(module)  # the shell left when it was called


# --- garbage ---------------------------------------------------------------------------------------------------------


@contextmanager
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.mark.parametrize("name", ["flux", "sd15", "wan22", "ddpm", "ltx2"])
@pytest.mark.parametrize("ran", [False, True], ids=["unused", "after a run"])
def test_a_dropped_pipeline_is_freed_at_once(name: str, ran: bool) -> None:
    pipe, tiny = fresh(name), TINY[name]
    with no_collector():
        speed_up(pipe, "uniform:every=1" if tiny.denoisers[0] == "unet" else "uniform:every=1,sites=sublayer")
        if ran:
            run(pipe, tiny.call(pipe), num_inference_steps=3)
        there = [weakref.ref(pipe)]
        if "_diffusers_hook" not in vars(getattr(pipe, tiny.denoisers[0])):  # diffusers ties that knot itself
            there += [weakref.ref(getattr(pipe, denoiser)) for denoiser in tiny.denoisers]
        del pipe
        assert [ref() for ref in there] == [None] * len(there)


def test_a_pipeline_dropped_after_an_interrupted_run_is_freed_at_once() -> None:
    pipe = fresh("flux")
    with no_collector():
        speed_up(pipe, "uniform:every=2")
        with pytest.raises(ZeroDivisionError):
            run(pipe, CALL, callback_on_step_end=lambda *_: 1 / 0)
        there = weakref.ref(pipe)
        del pipe
        assert there() is None


def test_a_cycle_through_our_layers_would_be_noticed() -> None:
    pipe = fresh("flux")
    with no_collector():
        speed_up(pipe, "uniform:every=2")
        vars(pipe)["_diffcache"].executor.pipe = pipe
        there = weakref.ref(pipe)
        del pipe
        assert there() is not None


def test_a_dropped_pipeline_takes_its_layers_off_the_denoiser_it_shared() -> None:
    pipe = warm("flux")
    other = other_with_the_same_parts(pipe)
    before = {name: items for name, items in dicts(other).items() if name not in ("pipe", "scheduler")}
    speed_up(pipe, "uniform:every=2,sites=sublayer")
    run(pipe, CALL)
    del pipe
    assert ours(other) == []
    assert {name: items for name, items in dicts(other).items() if name in before} == before
    copy.deepcopy(other.transformer)
    assert torch.equal(run(other, CALL), run(shared("flux"), CALL))


def test_report_needs_an_accelerated_pipeline() -> None:
    pipe = warm("flux")
    with pytest.raises(BadOption, match=r"this FluxPipeline cannot be used: it is not accelerated\. Pass what"):
        report(pipe)
    with accelerated(pipe, "full"):
        assert report(pipe).runs == 0
    with pytest.raises(BadOption):
        report(pipe)


def test_a_trace_would_be_noticed() -> None:
    pipe = warm("flux")
    before = dicts(pipe)
    for owner in owners(pipe).values():
        owner.__dict__["left"] = 1
        assert dicts(pipe) != before
        del owner.__dict__["left"]
    assert dicts(pipe) == before
    with accelerated(pipe, "full"):
        assert set(ours(pipe)) == {
            "pipe.progress_bar",
            "pipe.maybe_free_model_hooks",
            "pipe._diffcache",
            "transformer..forward",
            "transformer..cache_context",
        }


def test_a_swapped_noise_scheduler_is_left_as_found_too() -> None:
    pipe = with_scheduler(warm("flux"), "unipc")
    run(pipe, CALL)
    old, before = pipe.scheduler, names(pipe)["scheduler"]
    with accelerated(pipe, "uniform:every=2"):
        run(pipe, CALL)
        with_scheduler(pipe, "dpmpp_2m")
        run(pipe, CALL)
    assert sorted(vars(old)) == before
    assert ours(pipe) == []
