"""Nothing that would falsify a run passes: other caches, parts and forwards that were replaced, compiled graphs."""

from __future__ import annotations

import threading
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers.hooks as hooks
import pipelines
import pytest
import torch
from diffusers import FirstBlockCacheConfig
from probes import ours
from small_loop import Block, Net, loop, noise
from torch import Tensor, nn

import diffcache
from diffcache import accelerate, accelerated, estimate, evaluate, measure, optimize, report, restore
from diffcache.errors import AlreadyAccelerated, ScheduleMismatch, UnsupportedModel
from diffcache.eval import Method
from diffcache.executor import FailedOpen
from diffcache.profiling.calibration import correct

CALL = pipelines.TINY["flux"].call


def through_the_model(pipe: Any) -> None:
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))


def through_hooks(pipe: Any) -> None:
    hooks.apply_first_block_cache(pipe.transformer, FirstBlockCacheConfig(threshold=1e9))


def through_hooks_on_attention(pipe: Any) -> None:
    hooks.apply_taylorseer_cache(pipe.transformer, hooks.TaylorSeerCacheConfig(cache_interval=3))


def through_cache_dit(pipe: Any) -> None:
    cache_dit = pytest.importorskip("cache_dit")
    cache_dit.enable_cache(pipe, cache_config=cache_dit.DBCacheConfig(Fn_compute_blocks=1, enable_separate_cfg=False))


def teacache_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return type(self).plain(self, *args, **kwargs)


def on_the_object(pipe: Any) -> None:
    pipe.transformer.forward = types.MethodType(teacache_forward, pipe.transformer)


def by_attributes(pipe: Any) -> None:
    pipe.transformer.rel_l1_thresh = 0.4


def on_a_block(pipe: Any) -> None:
    block = pipe.transformer.transformer_blocks[0]
    inner = block.forward

    def cached_forward(*args: Any, **kwargs: Any) -> Any:
        return inner(*args, **kwargs)

    block.forward = cached_forward


CACHES = [
    through_the_model,
    through_hooks,
    through_hooks_on_attention,
    through_cache_dit,
    on_the_object,
    by_attributes,
    on_a_block,
]


@contextmanager
def untouched(pipe: Any) -> Iterator[None]:
    """What cache-dit puts on a class comes off."""
    kind, before = type(pipe), dict(vars(type(pipe)))
    try:
        yield
    finally:
        for name in vars(kind).keys() - before.keys():
            delattr(kind, name)
        for name, value in before.items():
            if vars(kind)[name] is not value:
                setattr(kind, name, value)


def demand_no_step(pipe: Any, asked: Callable[[], Any], error: type[Exception], says: str) -> None:
    with pipelines.watch(pipe, ["transformer"]) as calls:
        with pytest.raises(error, match=says):
            asked()
        assert not calls


@pytest.mark.parametrize("cache", CACHES)
def test_no_verb_takes_a_run_with_another_cache(cache: Callable[[Any], None], tmp_path: Path) -> None:
    pipe = pipelines.fresh("flux")
    call = {**CALL(pipe), "generator": torch.Generator().manual_seed(0)}
    schedule = "uniform:every=2"
    verbs: dict[str, Callable[[], Any]] = {
        "accelerate": lambda: accelerate(pipe, schedule),
        "estimate": lambda: estimate(pipe, schedule, **call),
        "measure": lambda: measure(pipe, [call], resume=tmp_path / "folder"),
        "optimize": lambda: optimize(pipe, [call], 3),
        "evaluate": lambda: evaluate(pipe, {"rule": schedule}, [call], out=tmp_path / "out", progress=False),
    }
    with untouched(pipe):
        cache(pipe)
        for verb in verbs.values():
            demand_no_step(pipe, verb, AlreadyAccelerated, "the transformer of this FluxPipeline has .* on")
    assert ours(pipe) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("cache", [cache for cache in CACHES if cache is not on_a_block])
@pytest.mark.parametrize("sites", ["model", "stack"])
def test_a_cache_that_comes_after_ours_is_refused_before_the_first_step(
    cache: Callable[[Any], None], sites: str
) -> None:
    pipe = pipelines.fresh("flux")
    with accelerated(pipe, f"uniform:every=2,sites={sites}"), untouched(pipe):
        cache(pipe)
        with pytest.raises((AlreadyAccelerated, ScheduleMismatch), match=r"two caches would skip|was replaced since"):
            pipelines.run(pipe, CALL(pipe))
        assert report(pipe).runs == 0


def test_the_class_of_a_network_that_a_fork_has_changed_is_seen_before_and_after() -> None:
    pipe, other = loop(), loop()
    accelerate(other, "uniform:every=2")
    plain = Net.forward
    try:
        Net.plain, Net.forward = plain, teacache_forward  # type: ignore[attr-defined, method-assign]
        with pytest.raises(AlreadyAccelerated, match=r"Net\.forward is teacache_forward"):
            accelerate(pipe, "uniform:every=2")
        with pytest.raises(ScheduleMismatch, match="the forward of class Net was replaced"):
            other(noise())
        Net.enable_teacache = False  # type: ignore[attr-defined]
        accelerate(pipe, "uniform:every=2")
    finally:
        Net.forward = plain  # type: ignore[method-assign]
        for name in ("plain", "enable_teacache"):
            if name in vars(Net):
                delattr(Net, name)
    other(noise())
    assert report(other).predicted == 4


def test_caches_that_are_turned_off_again_leave_the_way_free() -> None:
    pipe = pipelines.fresh("flux")
    full = pipelines.run(pipe, CALL(pipe))
    with untouched(pipe):
        through_the_model(pipe)
        pipe.transformer.disable_cache()
        through_cache_dit(pipe)
        import cache_dit

        cache_dit.disable_cache(pipe)
        with accelerated(pipe, "full"):
            assert torch.equal(pipelines.run(pipe, CALL(pipe)), full)
        through_hooks(pipe)
        with pytest.raises(AlreadyAccelerated, match=r"remove_hook\('fbc_leader_block_hook'\)"):
            accelerate(pipe, "full")
        hooks.HookRegistry.check_if_exists_or_initialize(pipe.transformer).remove_hook("fbc_leader_block_hook")


def test_what_is_not_a_cache_is_let_through() -> None:
    pipe = pipelines.fresh("flux")
    hooks.apply_layerwise_casting(pipe.transformer, storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    hooks.apply_group_offloading(
        pipe.transformer, onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
    )
    inner = pipe.transformer.forward
    pipe.transformer.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    with accelerated(pipe, "uniform:every=2"):
        pipelines.run(pipe, CALL(pipe))
        assert report(pipe).predicted == 3


def test_a_peer_that_does_not_come_off_is_noticed(tmp_path: Path) -> None:
    pipe = pipelines.fresh("flux")

    @contextmanager
    def left_on(pipe: Any) -> Iterator[None]:
        through_the_model(pipe)
        yield

    peer = Method(name="peer", kind="peer", on=left_on)
    call = {**CALL(pipe), "generator": torch.Generator().manual_seed(0)}
    after = Method(name="again", kind="fewer steps", change={"num_inference_steps": 4})
    with pytest.raises(AlreadyAccelerated, match="not a full run"):
        evaluate(pipe, [peer], [call], metrics=["latent"], compare=[after], out=tmp_path, progress=False)


def test_a_correction_asks_as_well() -> None:
    pipe = pipelines.fresh("flux")
    through_hooks(pipe)
    schedule = diffcache.CacheSchedule(
        steps=6, denoisers={"transformer": diffcache.documents.schedule.DenoiserPlan(sites={"model": plan()})}
    )
    demand_no_step(pipe, lambda: correct(pipe, schedule, [CALL(pipe)]), AlreadyAccelerated, "on. Call")


def plan() -> Any:
    from probes import hold

    return hold("#.#.#.")


# --- what was replaced since accelerate -----------------------------------------------------------------------------


def exchanged_list(net: Net) -> None:
    net.blocks = nn.ModuleList(net.blocks)


def exchanged_block(net: Net) -> None:
    net.blocks[1] = Block(3)


def compiled_block(net: Net) -> None:
    net.blocks[1] = torch.compile(net.blocks[1], backend="eager")


def new_forward(net: Net) -> None:
    net.forward = lambda hidden_states, timestep, prompt: (hidden_states[..., :3],)  # type: ignore[method-assign]


def new_forward_of_a_block(net: Net) -> None:
    net.blocks[2].forward = lambda hidden_states, time: hidden_states


@pytest.mark.parametrize(
    "change", [exchanged_list, exchanged_block, compiled_block, new_forward, new_forward_of_a_block]
)
@pytest.mark.parametrize("spec", ["uniform:every=2", "uniform:every=2,sites=block"])
def test_parts_and_forwards_that_were_replaced_are_refused_until_accelerated_anew(
    change: Callable[[Net], None], spec: str
) -> None:
    pipe = loop()
    accelerate(pipe, spec)
    pipe(noise())
    change(pipe.transformer)
    ran = len(pipe.transformer.seen)
    with pytest.raises(ScheduleMismatch, match="accelerate last"):
        pipe(noise())
    assert len(pipe.transformer.seen) == ran
    restore(pipe)
    if change is not compiled_block:  # what torch.compile returned refers to the layers that it was given
        assert ours(pipe) == []
        accelerate(pipe, spec)
        pipe(noise())


def test_wrappers_that_call_on_are_accepted_wherever_they_keep_what_they_found() -> None:
    pipe = loop()
    with accelerated(pipe, "uniform:every=2,sites=block"):
        expected = pipe(noise())
        first, second, third = pipe.transformer.blocks
        first.plain = first.forward
        first.forward = types.MethodType(lambda self, *args, **kwargs: self.plain(*args, **kwargs), first)
        second.forward = lambda *args, kept=second.forward, **kwargs: kept(*args, **kwargs)
        globals()["kept_forward"] = third.forward
        third.forward = lambda *args, **kwargs: kept_forward(*args, **kwargs)  # type: ignore[name-defined] # noqa: F821
        for _ in range(2):
            assert torch.equal(pipe(noise()), expected)


# --- compilers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["compile", "accelerate"])
@pytest.mark.parametrize("way", ["module", "forward"])
def test_inner_sites_and_a_compiled_network_are_refused_in_both_orders(way: str, first: str) -> None:
    def compiled(net: nn.Module) -> None:
        if way == "module":
            net.compile(backend="eager")
        else:
            net.forward = torch.compile(net.forward, backend="eager")  # type: ignore[method-assign]

    pipe = loop()
    torch._dynamo.reset()
    if first == "compile":
        compiled(pipe.transformer)
        with pytest.raises(UnsupportedModel, match="lies inside 'transformer', which is compiled"):
            accelerate(pipe, "uniform:every=2,sites=block")
        assert ours(pipe) == []
        return
    accelerate(pipe, "uniform:every=2,sites=block")
    compiled(pipe.transformer)
    with pytest.raises((UnsupportedModel, ScheduleMismatch), match="compiled"):
        pipe(noise())
    assert pipe.transformer.seen == []
    restore(pipe)


def test_a_compiled_forward_may_be_accelerated_but_not_an_accelerated_one_compiled() -> None:
    pipe = loop()
    with accelerated(pipe, "uniform:every=2"):
        expected = pipe(noise())
    torch._dynamo.reset()
    plain = pipe.transformer.forward
    pipe.transformer.forward = torch.compile(plain, backend="eager")
    with accelerated(pipe, "uniform:every=2"):
        assert torch.equal(pipe(noise()), expected)
    pipe.transformer.forward = plain
    accelerate(pipe, "uniform:every=2")
    pipe.transformer.forward = torch.compile(pipe.transformer.forward, backend="eager")
    for _ in range(2):
        with pytest.raises(ScheduleMismatch, match="compiled while it was accelerated"):
            pipe(noise())
    restore(pipe)
    with pytest.raises(ScheduleMismatch, match="compiled while it was accelerated"):
        accelerate(pipe, "uniform:every=2")
    pipe.transformer.forward = plain
    with accelerated(pipe, "uniform:every=2"):
        assert torch.equal(pipe(noise()), expected)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix = nn.Linear(3, 3)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(self.mix(x)) * t


def walk(called: Callable[..., Tensor], network: nn.Module | None) -> Tensor:
    timesteps, x = torch.linspace(1, 0, 7)[:-1], torch.ones(2, 3)
    with torch.no_grad():
        if network is None:
            for t in timesteps:
                x = x - called(x, t) / 6
            return x
        with diffcache.trajectory(network, timesteps):
            for t in timesteps:
                x = x - called(x, t) / 6
    return x


def test_a_network_of_a_custom_loop_compiled_after_acceleration_loses_no_forward() -> None:
    net = Small()
    with accelerated(net, "uniform:every=2"):
        expected = walk(net, net)
        net.compile(backend="eager")
        for _ in range(2):
            with warnings.catch_warnings():
                warnings.simplefilter("error", FailedOpen)
                assert torch.equal(walk(net, net), expected)
            assert report(net).predicted == 3


def test_what_torch_compile_made_of_an_accelerated_network_is_refused() -> None:
    net = Small()
    accelerate(net, "uniform:every=2")
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="eager")
    with pytest.raises(ScheduleMismatch, match=r"accelerate what torch\.compile returned"):
        walk(compiled, compiled)
    with pytest.raises(ScheduleMismatch, match=r"called through torch\.compile"):
        walk(compiled, net)
    assert report(net).runs == 0
    walk(net, net)
    assert report(net).predicted == 3
    restore(net)
    with accelerated(compiled, "uniform:every=2"):
        walk(compiled, compiled)
        assert report(compiled).predicted == 3


# --- calls that no schedule serves ----------------------------------------------------------------------------------


def heard(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in caught if issubclass(w.category, FailedOpen)]


def test_a_second_pipeline_of_the_same_components_warns_once_that_it_has_no_schedule() -> None:
    pipe = pipelines.fresh("flux")
    call = CALL(pipe)
    full = pipelines.run(pipe, call)
    other = type(pipe)(**pipe.components)
    other.set_progress_bar_config(disable=True)
    accelerate(pipe, "uniform:every=2")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert torch.equal(pipelines.run(other, call), full)
        pipelines.run(pipe, call)
    (told,) = set(heard(caught))
    assert "shares components with this accelerated FluxPipeline" in told
    assert report(pipe).predicted == 3
    accelerate(other, "uniform:every=2")
    with warnings.catch_warnings():
        warnings.simplefilter("error", FailedOpen)
        pipelines.run(other, call)
        pipelines.run(pipe, call)
        with torch.no_grad():
            pipe.transformer.proj_out(torch.zeros(1, pipe.transformer.proj_out.in_features))


@pytest.mark.parametrize("quiet", [torch.no_grad, torch.inference_mode])
def test_a_network_left_in_training_mode_is_reported_if_nothing_is_trained(quiet: Callable[[], Any]) -> None:
    net = Small().train()
    x, t = torch.ones(2, 3), torch.ones(())
    with accelerated(net, "uniform:every=2"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            net(x, t).sum().backward()
        assert heard(caught) == []
        with quiet():
            for _ in range(3):
                net(x, t)
    (told,) = set(heard(caught))
    assert "outside of diffcache.trajectory" in told


def test_calls_that_overlap_are_refused_with_the_true_reason() -> None:
    pipe = loop()
    meet = threading.Barrier(2, timeout=30)
    pipe.before = lambda i, x: (meet.wait() if i == 0 else None, x)[1]
    failures: list[BaseException] = []

    def work() -> None:
        try:
            pipe(noise())
        except (IndexError, TypeError) as reason:  # diffusers' own: one noise scheduler, stepped twice
            failures.append(reason)

    with accelerated(pipe, "uniform:every=2"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    told = [text for text in heard(caught) if "one call at a time" in text]
    assert told
    assert not any("its sampling loop was not seen" in text for text in heard(caught))


def test_calls_of_many_threads_one_at_a_time_are_silent() -> None:
    pipe, lock = loop(), threading.Lock()

    def work() -> None:
        with lock:
            pipe(noise())

    with accelerated(pipe, "uniform:every=2"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert report(pipe).runs == 4
    assert heard(caught) == []


def test_a_call_whose_loop_another_thread_has_hidden_is_refused_with_the_true_reason() -> None:
    """A call that exchanges the timesteps of another one hides its loop, which iterates over them (DiT)."""
    pipe, ran, done = loop(), threading.Event(), threading.Event()

    def work() -> None:
        pipe(noise())
        ran.set()
        done.wait(30)

    with accelerated(pipe, "uniform:every=2"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        thread = threading.Thread(target=work)
        thread.start()
        ran.wait(30)
        pipe.maybe_free_model_hooks()  # what a call ends with; its loop was not seen
        done.set()
        thread.join()
    (told,) = heard(caught)
    assert "one call at a time" in told


def test_calls_that_begin_at_the_same_moment_are_reported() -> None:
    pipe = loop()
    meet = threading.Barrier(2, timeout=30)
    seen: list[str] = []

    class Observer(diffcache.host.LoopObserver):
        def loop_began(self, run: diffcache.host.LoopRun) -> None:
            meet.wait()

        def missed(self, kind: str, why: str) -> None:
            seen.append(kind)

    watcher = diffcache.host.LoopWatcher(pipe, Observer())

    def begin() -> None:
        watcher.open(pipe.scheduler, 0)
        watcher.close()

    pipe.scheduler.set_timesteps(4)
    threads = [threading.Thread(target=begin) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert "calls-overlap" in seen
