"""Sampling loops of one's own: `trajectory` around them, `Loop` to measure them."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from policies import ACTION, CASES, HORIZON, STEPS, Transformer, diffusion_policy, randomised
from probes import far
from torch import Tensor, nn

import diffcache
from diffcache.errors import AlreadyAccelerated, BadOption, DiffCacheError, UnsupportedModel
from diffcache.eval import metrics
from diffcache.executor import FailedOpen


def sampled(net: nn.Module, steps: int = STEPS, branches: int = 1, told: int | None = None) -> Tensor:
    timesteps = torch.linspace(1, 0, steps + 1)[:-1]
    x = torch.randn(2, HORIZON, ACTION, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), diffcache.trajectory(net, timesteps, branches=told or branches):
        for t in timesteps:
            flows = [net(x, t.expand(2), torch.full((1,), 0.3 * n)) for n in range(branches)]
            x = x - (3 * flows[0] - 2 * flows[-1]) / steps
    return x


@pytest.mark.parametrize("branches", [1, 2])
def test_a_loop_of_ones_own(branches: int) -> None:
    net = Transformer().eval()
    full = sampled(net, branches=branches)
    with diffcache.accelerated(net, "full:sites=sublayer"):
        assert torch.equal(sampled(net, branches=branches), full)
    with diffcache.accelerated(net, "uniform:every=2"):
        found = sampled(net, branches=branches)
        rows = diffcache.report(net).rows
    assert {(row.branch, row.computed, row.predicted) for row in rows} == {(b, 5, 5) for b in range(branches)}
    assert 1e-6 < far(found, full) < 0.2


def test_a_loop_of_ones_own_is_measured_by_a_function_that_runs_it() -> None:
    net = Transformer().eval()

    def sample(start: float) -> Tensor:
        x = torch.randn(4, HORIZON, ACTION) + start
        timesteps = torch.linspace(1, 0, STEPS + 1)[:-1]
        with torch.no_grad(), diffcache.trajectory(net, timesteps):
            for t in timesteps:
                x = (1 - 0.02) * x - 0.1 * net(x, t.expand(4), torch.zeros(1))  # any step that is affine will do
        return x

    loop = diffcache.Loop(net, sample)
    calls = [{"start": 0.1 * n, "seed": n} for n in range(4)]
    assert diffcache.estimate(loop, "uniform:every=2", **calls[0]).compute_fraction == pytest.approx(0.5)
    schedule = diffcache.optimize(loop, calls, 5)
    assert schedule.provenance["fit_target"] == "state"
    full = loop(start=1.0, seed=9)
    with diffcache.accelerated(net, schedule):
        fitted = loop(start=1.0, seed=9)
    with diffcache.accelerated(net, "uniform:every=2"):
        assert far(fitted, full) < far(loop(start=1.0, seed=9), full)
    state = torch.get_rng_state()
    loop(start=1.0, seed=9)
    assert torch.equal(torch.get_rng_state(), state)


def test_stages_of_a_solver_are_not_taken_for_affine_steps_however_little_they_move() -> None:
    net = randomised(Transformer())

    def sample() -> Tensor:
        x = torch.randn(4, HORIZON, ACTION)
        with torch.no_grad(), diffcache.trajectory(net, range(2 * STEPS)):
            for _ in range(STEPS):  # Heun: the second evaluation sees a state that is thrown away
                first = net(x, torch.ones(4), torch.zeros(1)) * 1e-3
                second = net(x - first, torch.ones(4), torch.zeros(1)) * 1e-3
                x = x - (first + second) / 2
        return x

    schedule = diffcache.optimize(diffcache.Loop(net, sample), [{"seed": n} for n in range(2)], 10)
    assert schedule.provenance["fit_target"] == "output"
    assert "evaluates the network in stages" in schedule.provenance["fit_target_reason"]


def test_more_forwards_than_expected_are_an_error_and_forwards_outside_a_warning() -> None:
    net = Transformer().eval()
    diffcache.accelerate(net, "uniform:every=2")
    with pytest.raises(UnsupportedModel, match=r"1 call\(s\) of the network at each of 10 timesteps.*branches=2"):
        sampled(net, branches=2, told=1)
    with pytest.warns(FailedOpen, match=r"outside of diffcache\.trajectory"):
        net(torch.zeros(2, HORIZON, ACTION), torch.ones(2), torch.zeros(1))
    sampled(net)  # and the next run is a run as ever


@pytest.mark.parametrize("kind", ["network", "loop", "policy"])
def test_messages_name_what_the_user_passed(kind: str) -> None:
    net = Transformer().eval()
    given = {"network": lambda: net, "loop": lambda: diffcache.Loop(net), "policy": diffusion_policy}[kind]()
    named = type(given if kind == "policy" else net).__name__
    said = []
    with pytest.raises(BadOption, match="it is not accelerated") as error:
        diffcache.report(given)
    said.append(str(error.value))
    with diffcache.accelerated(given, "uniform:every=2"):
        for call in (lambda: diffcache.accelerate(given), lambda: diffcache.measure(given, [{"seed": 0}])):
            with pytest.raises(DiffCacheError) as refused:
                call()
            said.append(str(refused.value))
    assert f"this {named} is accelerated already" in said[1]
    for text in said:
        assert not any(word in text for word in ("RegisteredLoop", "PolicyLoop", "pipe=", "(pipe)"))


def test_without_accelerate_a_trajectory_changes_nothing() -> None:
    net = Transformer().eval()
    before = set(vars(net))
    sampled(net)
    assert set(vars(net)) == before


@pytest.mark.parametrize("timesteps", [[], [[1.0, 2.0]]])
def test_timesteps_that_are_none_are_refused(timesteps: Any) -> None:
    with pytest.raises(diffcache.DiffCacheError, match="timesteps"), diffcache.trajectory(Transformer(), timesteps):
        pass


def test_gradients_of_a_guided_loop_go_past_what_is_kept() -> None:
    """Real-time chunking differentiates each step by its state: nothing that is kept may hold a graph."""
    net = Transformer()
    seen: list[Tensor] = []
    diffcache.accelerate(net, "uniform:every=2")
    x = torch.randn(2, HORIZON, ACTION)
    timesteps = torch.linspace(1, 0, STEPS + 1)[:-1]
    with diffcache.trajectory(net, timesteps), torch.enable_grad():
        for t in timesteps:
            x = x.detach().requires_grad_()
            flow = net(x, t.expand(2), torch.zeros(1))
            target = (x - flow).square().sum()
            (gradient,) = torch.autograd.grad(target, x)
            seen.append(flow)
            x = x - 0.1 * flow - 0.01 * gradient
    assert [flow.requires_grad for flow in seen] == [True, False] * (STEPS // 2)


def test_trajectories_within_another_are_refused_and_leave_nothing() -> None:
    net = randomised(Transformer())
    before = set(vars(net))
    diffcache.accelerate(net, "uniform:every=2")
    with (
        pytest.raises(UnsupportedModel, match="within another"),
        diffcache.trajectory(net, [1.0, 0.5]),
        diffcache.trajectory(net, [1.0, 0.5]),
    ):
        pass
    with diffcache.trajectory(net, [1.0, 0.5]):
        diffcache.restore(net)
    assert set(vars(net)) == before
    with diffcache.trajectory(net, [1.0, 0.5, 0.2]):
        diffcache.accelerate(net, "uniform:every=2")  # too late for this run, in time for the next
    diffcache.restore(net)
    assert set(vars(net)) == before


def test_too_few_forwards_are_reported() -> None:
    net = randomised(Transformer())
    with (
        diffcache.accelerated(net, "uniform:every=2"),
        pytest.warns(FailedOpen, match="have fewer forwards than"),
    ):
        sampled(net, branches=1, told=2)


def test_an_accelerated_loop_of_ones_own_is_not_measured() -> None:
    net = randomised(Transformer())
    loop = diffcache.Loop(net, lambda: sampled(net))
    with diffcache.accelerated(net, "uniform:every=2"), pytest.raises(AlreadyAccelerated):
        diffcache.optimize(loop, [{"seed": 1}], 5)


def test_a_noise_scheduler_named_for_a_loop_serves_its_schedules() -> None:
    net = randomised(Transformer())
    scheduler = DDIMScheduler(100, clip_sample=False)

    def sample() -> Tensor:
        x = torch.randn(4, HORIZON, ACTION)
        scheduler.set_timesteps(STEPS)
        with torch.no_grad(), diffcache.trajectory(net, scheduler.timesteps):
            for t in scheduler.timesteps:
                x = scheduler.step(net(x, t.expand(4), torch.zeros(1)), t, x).prev_sample
        return x

    loop = diffcache.Loop(net, sample, scheduler=scheduler)
    schedule = diffcache.optimize(loop, [{"seed": n} for n in range(2)], 5, time_limit_s=0)
    full = loop(seed=7)
    with diffcache.accelerated(net, schedule):
        assert 0 < far(loop(seed=7), full) < 0.5
        assert {(row.computed, row.predicted) for row in diffcache.report(net).rows} == {(5, 5)}


def test_a_time_that_is_written_into_is_recorded_as_it_was() -> None:
    net = randomised(Transformer())
    time = torch.zeros(4)

    def sample() -> Tensor:
        x = torch.randn(4, HORIZON, ACTION)
        with torch.no_grad(), diffcache.trajectory(net, range(STEPS)):
            for n in range(STEPS):
                x = x - 0.1 * net(x, time.fill_(100 - 10 * n), torch.zeros(1))
        return x

    loop = diffcache.Loop(net, sample)
    schedule = diffcache.optimize(loop, [{"seed": n} for n in range(3)], 5)
    assert schedule.provenance["fit_target"] == "state"
    full = loop(seed=7)
    with diffcache.accelerated(net, schedule):
        fitted = far(loop(seed=7), full)
    with diffcache.accelerated(net, "uniform:every=2"):
        assert fitted < far(loop(seed=7), full)


def test_threads_have_separate_loops() -> None:
    net = randomised(Transformer())
    turn = threading.Barrier(2)

    def work(steps: int, wait: bool = True) -> Tensor:
        timesteps = torch.linspace(1, 0, steps + 1)[:-1]
        x = torch.randn(2, HORIZON, ACTION, generator=torch.Generator().manual_seed(1))
        with torch.no_grad(), diffcache.trajectory(net, timesteps):
            for t in timesteps:
                if wait:
                    turn.wait(10)
                x = x - net(x, t.expand(2), torch.zeros(1)) / steps
        return x

    with diffcache.accelerated(net, "uniform:every=2"):
        alone = work(6, wait=False)
        with ThreadPoolExecutor(2) as pool:
            together = [job.result() for job in [pool.submit(work, 6), pool.submit(work, 6)]]
    assert all(torch.equal(x, alone) for x in together)


def own(net: nn.Module, steps: int | None) -> diffcache.Loop:
    """A loop that takes its number of steps from the call, or has it written into it."""

    def sample(num_inference_steps: int = STEPS) -> Tensor:
        x = torch.randn(4, HORIZON, ACTION)
        timesteps = torch.linspace(1, 0, num_inference_steps + 1)[:-1]
        with torch.no_grad(), diffcache.trajectory(net, timesteps):
            for t in timesteps:
                x = x - net(x, t.expand(4), torch.zeros(1)) / num_inference_steps
        return x

    return diffcache.Loop(net, sample if steps is None else lambda: sample(steps))


def test_a_loop_of_ones_own_is_evaluated_by_its_last_states(tmp_path: Path) -> None:
    net = Transformer().eval()
    calls = [{"seed": n} for n in range(2)]
    found = diffcache.evaluate(own(net, STEPS), {"ours": "uniform:every=2"}, calls, out=tmp_path, progress=False)
    full, ours, reuse = found.record["methods"]
    assert (full["name"], ours["name"], reuse["kind"]) == ("full run", "ours", "reuse")
    assert (full["steps"], ours["computed_steps"]) == (STEPS, STEPS / 2)
    loop = own(net, STEPS)
    plain = [loop(**call) for call in calls]
    with diffcache.accelerated(net, "uniform:every=2"):
        quick = [loop(**call) for call in calls]
    errors = [((a - b).flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1)) for a, b in zip(quick, plain, strict=True)]
    assert ours["scores"]["latent"]["mean"] == pytest.approx(float(torch.cat(errors).mean()), rel=1e-4)


def test_the_record_of_a_loop_holds_the_seeds_of_its_calls(tmp_path: Path) -> None:
    loop, calls = own(Transformer().eval(), STEPS), [{"seed": 7}, {"seed": 8}]
    found = diffcache.evaluate(loop, {"ours": "uniform:every=2"}, calls, out=tmp_path, progress=False)
    assert [sample["seed"] for sample in found.record["samples"]] == [7] * 4 + [8] * 4
    written = json.loads((tmp_path / "record.json").read_text())
    assert [sample["seed"] for sample in written["samples"]] == [7] * 4 + [8] * 4


@pytest.mark.parametrize("metric", [name for name in metrics.available() if metrics.load(name).ABOUT.of_pictures])
@pytest.mark.parametrize("kind", ["loop", "policy"])
def test_a_metric_of_pictures_is_refused_before_a_host_without_pictures_runs(
    metric: str, kind: str, tmp_path: Path
) -> None:
    ran: list[int] = []
    net, policy = Transformer().eval(), diffusion_policy()
    network = net if kind == "loop" else policy.model
    network.register_forward_pre_hook(lambda *_: ran.append(1))
    host = own(net, STEPS) if kind == "loop" else policy
    call = {"seed": 0} | ({} if kind == "loop" else CASES["diffusion_policy"].call())
    with pytest.raises(BadOption, match=f"metrics cannot be used: {metric} needs pictures, .*returns no pictures"):
        diffcache.evaluate(
            host, {"ours": "uniform:every=2"}, [call], metrics=["state", metric], out=tmp_path / "out", progress=False
        )
    assert not ran
    assert not (tmp_path / "out").exists()


def test_a_loop_that_takes_its_number_of_steps_is_compared_with_fewer_steps(tmp_path: Path) -> None:
    loop = own(Transformer().eval(), None)
    call = {"seed": 0, "num_inference_steps": 2 * STEPS}
    found = diffcache.evaluate(loop, {"ours": "uniform:every=2"}, [call], out=tmp_path, progress=False)
    assert found.record["methods"][2]["steps"] == STEPS
    call |= {"num_inference_steps": STEPS}  # in the same folder: nothing of the longer run is taken for its own
    found = diffcache.evaluate(loop, {"ours": "uniform:every=2"}, [call], out=tmp_path, progress=False)
    assert [m["name"] for m in found.record["methods"][2:]] == [
        "5 steps, its own solver",
        "uniform reuse, 5 computed",
    ]


def test_a_function_that_runs_no_trajectory_is_refused(tmp_path: Path) -> None:
    loop = diffcache.Loop(Transformer().eval(), lambda: torch.zeros(4, HORIZON, ACTION))
    with pytest.raises(BadOption, match=r"0 trajectories.*Run the loop exactly once"):
        diffcache.evaluate(loop, {"ours": "uniform:every=2"}, [{"seed": 0}], out=tmp_path, progress=False)


def test_a_loop_that_draws_noise_gets_the_weaker_fit_and_a_warning_that_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    net = randomised(Transformer())

    def sample() -> Tensor:
        x = torch.randn(4, HORIZON, ACTION)
        with torch.no_grad(), diffcache.trajectory(net, range(STEPS)):
            for n in range(STEPS):
                x = x - 0.1 * net(x, torch.full((4,), 100.0 - 10 * n), torch.zeros(1)) + 0.1 * torch.randn(x.shape)
        return x

    loop = diffcache.Loop(net, sample)
    with pytest.warns(diffcache.WeakerFit, match="step 0 of the loop makes something else .* draws noise") as caught:
        schedule = diffcache.optimize(loop, [{"seed": n} for n in range(2)], 5)
    assert "The mask is spread evenly" in str(caught[0].message)
    assert [record.kind for record in caplog.records] == ["weaker-fit"]
    assert schedule.expected is None
    assert schedule.provenance["scheduler"] == "even mask"
    assert "draws noise" in schedule.provenance["fit_target_reason"]


@pytest.mark.parametrize(("drawn", "reason"), [(True, "draws noise"), (False, "depends on more than")])
def test_a_noise_scheduler_whose_steps_cannot_be_repeated_says_why(drawn: bool, reason: str) -> None:
    """One noise scheduler draws from a private generator, and one reads a variable outside of it."""
    net = randomised(Transformer())
    outside = [0.0]

    class Noisy(DDIMScheduler):  # type: ignore[misc]
        def step(self, model_output: Tensor, timestep: Any, sample: Tensor, **more: Any) -> Any:
            found = super().step(model_output, timestep, sample, **more)
            outside[0] = min(outside[0] + 1.0, 5.0)
            noise = torch.randn(sample.shape, generator=torch.Generator().manual_seed(seeds())) if drawn else outside[0]
            if isinstance(found, tuple):
                return (found[0] + 0.1 * noise, *found[1:])
            return type(found)(prev_sample=found.prev_sample + 0.1 * noise)

    def seeds(count: list[int] = [0]) -> int:  # noqa: B006  a counter
        count[0] += 1
        return count[0]

    scheduler = Noisy(100, clip_sample=False)

    def sample() -> Tensor:
        outside[0] = 0.0
        x = torch.randn(4, HORIZON, ACTION)
        scheduler.set_timesteps(STEPS)
        with torch.no_grad(), diffcache.trajectory(net, scheduler.timesteps):
            for t in scheduler.timesteps:
                x = scheduler.step(net(x, t.expand(4), torch.zeros(1)), t, x).prev_sample
        return x

    with pytest.warns(diffcache.WeakerFit, match=reason):
        diffcache.optimize(diffcache.Loop(net, sample, scheduler=scheduler), [{"seed": 0}, {"seed": 1}], 5)
