"""Diffusion policies: what holds for pipelines holds for them, family by family."""

from __future__ import annotations

import copy
import gc
import json
import re
import warnings
import weakref
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import command_of
from diffusers import DDIMScheduler
from policies import ACTION, CASES, HORIZON, OBS, STEPS, Case, MultiTask, Transformer, diffusion_policy, randomised
from probes import far
from torch import Tensor, nn

import diffcache
from diffcache import host
from diffcache.errors import AcceleratedObjectCopied, AlreadyAccelerated, BadOption, ScheduleMismatch, UnsupportedModel
from diffcache.eval import Trials, baselines
from diffcache.host.policies import FAMILIES

DOCUMENT = (Path(__file__).parents[2] / "docs/policies.md").read_text()
ALL = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
SITES = pytest.mark.parametrize(
    ("case", "sites"), [pytest.param(c, g, id=f"{n}-{g}") for n, c in CASES.items() for g in c.granularities]
)


@SITES
def test_all_computed_is_the_policy_bit_for_bit(case: Case, sites: str) -> None:
    policy = case.make()
    full = case.act(policy)
    with diffcache.accelerated(policy, f"full:sites={sites}"):
        assert torch.equal(case.act(policy), full)
        assert diffcache.report(policy).rows


@SITES
def test_every_second_step_is_predicted_and_the_next_call_begins_anew(case: Case, sites: str) -> None:
    policy = case.make()
    full, other = case.act(policy), case.act(policy, samples=2, seed=5)
    with diffcache.accelerated(policy, f"uniform:every=2,sites={sites}"):
        first = case.act(policy)
        rows = [row for row in diffcache.report(policy).rows if row.site.startswith(sites)]
        assert {(row.computed, row.predicted) for row in rows} == {(case.steps // 2, case.steps // 2)}
        assert 1e-5 < far(first, full) < 0.5
        assert far(case.act(policy, samples=2, seed=5), other) < 0.5  # another batch, nothing of the one before
        assert torch.equal(case.act(policy), first)
    assert torch.equal(case.act(policy), full)


@ALL
def test_restored_policies_bear_no_trace(case: Case) -> None:
    policy = case.make()
    case.act(policy)
    before = {name: set(vars(part)) for name, part in policy.named_modules()}
    diffcache.accelerate(policy, "taylorseer:every=3,order=1,sites=" + case.granularities[-1])
    case.act(policy)
    assert {name: set(vars(part)) for name, part in policy.named_modules()} != before
    diffcache.restore(policy)
    assert {name: set(vars(part)) for name, part in policy.named_modules()} == before


@ALL
def test_a_plan_fitted_to_the_actions_is_nearer_than_reuse_of_as_many_steps(case: Case) -> None:
    policy, held = case.make(), [5, 6, 7]
    calls = [case.call(8, seed) | {"seed": seed} for seed in range(4)]
    schedule = diffcache.optimize(policy, calls, 5)
    assert schedule.provenance["fit_target"] == ("state" if case.replays else "output")
    full = [case.act(policy, seed=seed) for seed in held]

    def error(source: Any) -> float:
        with diffcache.accelerated(policy, source):
            return sum(far(case.act(policy, seed=seed), x) for seed, x in zip(held, full, strict=True))

    if case.replays:
        assert error(schedule) < error(f"uniform:every={case.steps // 5}")
    assert error(schedule) < 1


@pytest.mark.parametrize("name", ["diffusion_policy", "multi_task_dit, Euler", "pi0"])
def test_inner_sites_are_measured_planned_and_corrected(name: str) -> None:
    case = CASES[name]
    policy = case.make()
    calls = [case.call(4, seed) | {"seed": seed} for seed in range(3)]
    profile = diffcache.measure(policy, calls, sites="sublayer")
    for scheduler in ("bac:n=2", "bac:n=0"):
        schedule = diffcache.plan(profile, scheduler, 6)
        with diffcache.accelerated(policy, schedule):
            case.act(policy)
            rows = diffcache.report(policy).rows
        planned = {site: int(plan.compute.sum()) for _, site, plan in schedule.plans()}
        assert {row.site: row.computed for row in rows if row.site in planned} == planned
    schedule = diffcache.optimize(policy, calls, 8, sites="block", scheduler="bac:n=0,sites=block")
    assert schedule.expected is not None
    assert schedule.expected.mean_db > 15


def test_training_is_left_alone() -> None:
    policy = diffusion_policy().train()
    batch = {"obs": torch.randn(4, 2, OBS), "action": torch.randn(4, HORIZON, ACTION)}

    def loss() -> Tensor:
        torch.manual_seed(3)
        return policy.compute_loss(batch)

    plain = loss()
    with warnings.catch_warnings(), diffcache.accelerated(policy, "uniform:every=2,sites=block"):
        warnings.simplefilter("error")
        found = loss()
        found.backward()
    assert torch.equal(found, plain)
    assert all(p.grad is not None for p in policy.model.parameters())


def test_each_sample_of_a_batch_of_environments_is_its_own() -> None:
    policy = diffusion_policy()
    obs = torch.randn(3, 2, OBS)

    def actions(rows: slice) -> Tensor:
        generators = [torch.Generator().manual_seed(n) for n in range(3)][rows]
        return policy.predict_action({"obs": obs[rows]}, generators)["action"]

    with diffcache.accelerated(policy, "taylorseer:every=3,order=1"):
        together = actions(slice(None))
        alone = torch.cat([actions(slice(n, n + 1)) for n in range(3)])
    assert torch.allclose(together, alone, atol=1e-4)


def test_a_plan_belongs_to_its_sampler_and_number_of_steps() -> None:
    case = CASES["diffusion_policy"]
    policy = case.make()
    schedule = diffcache.optimize(policy, [case.call() | {"seed": n} for n in range(2)], 5, time_limit_s=0)
    diffcache.accelerate(policy, schedule)
    policy.num_inference_steps = STEPS + 1
    with pytest.raises(ScheduleMismatch, match=f"{STEPS} steps"):
        case.act(policy)
    diffcache.restore(policy)
    policy.noise_scheduler = DDIMScheduler.from_config(policy.noise_scheduler.config)
    with pytest.raises(ScheduleMismatch, match="DDPMScheduler"):
        diffcache.accelerate(policy, schedule)


def test_a_flow_with_another_number_of_steps_is_refused_by_a_plan() -> None:
    case = CASES["pi0"]
    policy = case.make()
    schedule = diffcache.optimize(policy, [case.call() | {"seed": n} for n in range(2)], 5, time_limit_s=0)
    with diffcache.accelerated(policy, schedule):
        case.act(policy)
        with pytest.raises(ScheduleMismatch, match=f"{STEPS} steps"):
            case.act(policy, num_steps=4)


def test_something_other_than_a_policy_is_refused_with_all_that_is_allowed() -> None:
    class Head:
        pass

    with pytest.raises(UnsupportedModel, match=r"a Head.*diffusers pipeline.*diffusion_policy.*trajectory"):
        diffcache.accelerate(Head(), "uniform:every=2")  # type: ignore[type-var]
    policy = diffusion_policy()
    diffcache.accelerate(policy, "uniform:every=2")
    with pytest.raises(AlreadyAccelerated, match="DiffusionTransformerLowdimPolicy"):
        diffcache.accelerate(policy, "uniform:every=2")
    with pytest.raises(AlreadyAccelerated):
        diffcache.measure(policy, [CASES["diffusion_policy"].call()])


def test_another_network_in_the_accelerated_policy_is_noticed() -> None:
    policy = diffusion_policy()
    diffcache.accelerate(policy, "uniform:every=2")
    policy.model = diffusion_policy().model
    with pytest.raises(ScheduleMismatch, match="another object"):
        CASES["diffusion_policy"].act(policy)


def test_copies_are_refused_and_weights_are_saved_as_ever() -> None:
    policy = diffusion_policy()
    names = list(policy.state_dict())
    with diffcache.accelerated(policy, "uniform:every=2"):
        assert list(policy.state_dict()) == names
        with pytest.raises(AcceleratedObjectCopied):
            copy.deepcopy(policy)
    copy.deepcopy(policy)


@pytest.mark.parametrize("name", ["diffusion_policy", "pi0"])
def test_a_dropped_policy_is_freed_at_once(name: str) -> None:
    policy = CASES[name].make()
    diffcache.accelerate(policy, "uniform:every=2")
    CASES[name].act(policy)
    gone, network = weakref.ref(policy), policy.model
    gc.collect()
    gc.disable()
    try:
        del policy
        assert gone() is None
    finally:
        gc.enable()
    gc.collect()
    assert all("forward" not in vars(part) and "denoise_step" not in vars(part) for part in network.modules())


def test_the_table_of_families_is_that_of_the_code() -> None:
    rows = re.findall(r"^\| (.+?) \| `(.+?)` \| `(.+?)` \| (?:`(.+?)`|forwards.*?) \|$", DOCUMENT, re.M)
    assert rows == [(name, f.network, f.loop, f.scheduler) for name, f in FAMILIES.items()]


# The proof.


def play(policy: Any, episodes: int) -> list[bool]:
    """A point that is to be brought near the origin in three calls; the policy has to answer the same for all."""
    outcomes = []
    for n in range(episodes):
        generator = torch.Generator().manual_seed(n)
        obs = torch.randn(1, 2, OBS, generator=generator)
        for _ in range(3):
            obs = 0.7 * obs + 0.01 * policy.predict_action({"obs": obs}, generator)["action"].mean()
        outcomes.append(bool(obs.norm() < 1.0))
    return outcomes


@pytest.fixture(scope="module")
def proof(tmp_path_factory: pytest.TempPathFactory) -> Any:
    policy = diffusion_policy()
    calls = [CASES["diffusion_policy"].call(8, seed) | {"seed": seed} for seed in range(4)]
    return diffcache.evaluate(
        policy, {"ours": "taylorseer:every=2,order=1"}, calls, trials=Trials(play, 20, "point"), progress=False,
        out=tmp_path_factory.mktemp("policy"),
    )  # fmt: skip


def test_policies_are_compared_with_other_samplers_of_as_many_steps(proof: Any) -> None:
    methods = {m["name"]: m for m in proof.record["methods"]}
    assert set(methods) == {
        "full run", "ours", "5 steps, DDPM", "5 steps, DDIM", "5 steps, DPM-Solver++", "uniform reuse, 5 computed",
    }  # fmt: skip
    assert {m["computed_steps"] for name, m in methods.items() if name != "full run"} == {5}
    for name, method in methods.items():
        assert set(method["scores"]) == {"action", "state", "success"}, name
        assert len(method["scores"]["success"]["values"]) == 20
        assert len(method["scores"]["action"]["values"]) == 32
        low, mean, high = (method["scores"]["success"][k] for k in ("low", "mean", "high"))
        assert low < high
        assert low <= mean <= high
        assert name == "full run" or method["scores"]["action"]["mean"] > 0
    assert methods["ours"]["scores"]["success"]["verdicts"][0]["against"] == "full run"
    assert "success ↑" in str(proof)
    assert "action error ↓" in str(proof)
    assert proof.report.is_file()


def test_episodes_that_were_played_are_not_played_again(proof: Any) -> None:
    def never(policy: Any, episodes: int) -> list[bool]:
        raise RuntimeError("played")

    def written() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in proof.folder.glob("trials/*")}

    calls = [CASES["diffusion_policy"].call(8, seed) | {"seed": seed} for seed in range(4)]
    options: dict[str, Any] = {"out": proof.folder, "progress": False, "compare": ()}
    rule, before = {"ours": "taylorseer:every=2,order=1"}, written()
    again = diffcache.evaluate(diffusion_policy(), rule, calls, trials=Trials(play, 20, "point"), **options)
    was = {m["name"]: m["scores"]["success"]["values"] for m in proof.record["methods"]}
    assert again.record["methods"][1]["scores"]["success"]["values"] == was["ours"]
    assert written() == before
    with pytest.raises(RuntimeError, match="played"):  # the task has the same name and other code
        diffcache.evaluate(diffusion_policy(), rule, calls, trials=Trials(never, 20, "point"), **options)
    diffcache.evaluate(diffusion_policy(), rule, calls, trials=Trials(play, 20, "another"), **options)
    assert all(written()[path] != before[path] for path in before if "ours" in path.name or "full" in path.name)


def mine() -> tuple[Any, list[dict[str, Any]]]:
    """The function that the command is given."""
    return diffusion_policy(), [CASES["diffusion_policy"].call(8, seed) | {"seed": seed} for seed in range(2)]


def test_the_command_evaluates_a_policy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = command_of(monkeypatch, capsys, "eval", "policy")
    words = ["test_policies:mine", "half=uniform:every=2", "--out", tmp_path, "--alone", "--episodes", 3]
    code, said, _ = run(*words, "--play", "test_policies:play")
    assert code == 0
    assert "| half | 5 of 10 |" in said
    assert len(json.loads((tmp_path / "record.json").read_text())["methods"][1]["scores"]["success"]["values"]) == 3
    code, _, complaint = run(*words, "--play", "test_policies:nothing")
    assert code == 2
    assert "play='test_policies:nothing'" in complaint
    code, _, complaint = run("test_policies:diffusion_policy", "uniform:every=2", "--out", tmp_path)
    assert code == 2
    assert "calls" in complaint


def test_a_sampler_swapped_for_a_comparison_is_put_back() -> None:
    policy = diffusion_policy()
    before = policy.noise_scheduler
    loop = host.adopted(policy)
    for method in baselines(loop, STEPS, [4]):
        with method.on(loop):
            case_steps = policy.num_inference_steps
            CASES["diffusion_policy"].act(policy)
        assert case_steps == (4 if method.kind == "fewer steps" else STEPS)
    assert policy.noise_scheduler is before
    assert policy.num_inference_steps == STEPS


def test_a_pipeline_plays_no_episodes(tmp_path: Path) -> None:
    loop = diffcache.Loop(Transformer(), lambda num_inference_steps: None)
    with pytest.raises(diffcache.DiffCacheError, match="trials"):
        diffcache.evaluate(loop, {}, [{"seed": 1, "num_inference_steps": 3}], trials=Trials(play, 2), out=tmp_path)


# What went wrong once.


def marks(policy: nn.Module) -> dict[str, set[str]]:
    return {name: set(vars(part)) for name, part in policy.named_modules()}


def test_watching_an_accelerated_policy_leaves_nothing(tmp_path: Path) -> None:
    policy = diffusion_policy()
    case = CASES["diffusion_policy"]
    before, scheduler = marks(policy), set(vars(policy.noise_scheduler))
    calls = [case.call(2, seed) | {"seed": seed} for seed in range(3)]
    diffcache.evaluate(policy, {"a": "uniform:every=2"}, calls, compare=(), progress=False, out=tmp_path)
    with diffcache.accelerated(policy, "uniform:every=2"):
        diffcache.estimate(policy, "uniform:every=2", **calls[0])
        for _ in range(3):
            host.adopted(policy)(**calls[0])
        rows = diffcache.report(policy).rows
    assert {(row.computed, row.predicted) for row in rows} == {(5, 5)}
    assert marks(policy) == before
    assert set(vars(policy.noise_scheduler)) - scheduler <= {"num_inference_steps", "timesteps"}


def test_another_checkpoint_is_not_taken_for_one_that_was_evaluated(tmp_path: Path) -> None:
    case = CASES["pi0"]
    calls = [case.call(2, seed) | {"seed": seed} for seed in range(2)]

    def errors(policy: Any) -> list[float]:
        found = diffcache.evaluate(policy, {"a": "uniform:every=2"}, calls, compare=(), progress=False, out=tmp_path)
        return list(found.record["methods"][1]["scores"]["action"]["values"])

    one, other = case.make(), case.make()
    first = errors(one)
    assert errors(one) == first
    with torch.no_grad():
        other.model.embed.weight.mul_(2)
    assert errors(other) != first


def test_wrapped_policies_are_the_policies_and_unknown_ones_are_refused() -> None:
    policy = diffusion_policy()
    with diffcache.accelerated(torch.compile(policy, backend="eager"), "uniform:every=2"):
        CASES["diffusion_policy"].act(policy)
        assert diffcache.report(policy).rows[0].predicted == 5

    class Unknown(nn.Linear):
        def select_action(self, batch: Any) -> None: ...

    with pytest.raises(UnsupportedModel, match="a Unknown"):
        diffcache.accelerate(Unknown(2, 2), "uniform:every=2")
    compiled = CASES["pi0"].make()
    compiled.model.sample_actions = torch.compile(compiled.model.sample_actions, backend="eager")
    with pytest.raises(UnsupportedModel, match="compiled as one graph"):
        diffcache.accelerate(compiled, "uniform:every=2")


def test_inside_of_a_compiled_step_there_are_no_sites() -> None:
    policy = CASES["pi0"].make()
    policy.model.denoise_step = torch.compile(policy.model.denoise_step, backend="eager")
    with pytest.raises(BadOption, match="sites='block'"):
        diffcache.accelerate(policy, "uniform:every=2,sites=block")
    with diffcache.accelerated(policy, "uniform:every=2"):
        CASES["pi0"].act(policy)
        assert diffcache.report(policy).rows[0].predicted == STEPS // 2


@pytest.mark.parametrize("store", [None, "int8"])
@pytest.mark.parametrize("sites", ["model", "block"])
def test_real_time_chunking_sees_a_predicted_step_as_constant(sites: str, store: str | None) -> None:
    case = CASES["pi0"]
    policy = case.make()
    left = case.act(policy, seed=2)
    left = torch.cat([left, left[..., :1]], dim=-1)  # of all joints that the network knows
    full = case.act(policy, left=left)
    assert 0.1 < far(full, case.act(policy))
    with diffcache.accelerated(policy, f"full:sites={sites}"):
        assert torch.equal(case.act(policy, left=left), full)
    policy.model.guided.carried.clear()
    with diffcache.accelerated(policy, f"taylorseer:every=2,order=1,sites={sites}", store=store):
        assert far(case.act(policy, left=left), full) < 0.1
    if sites == "model":
        assert policy.model.guided.carried == [True, False] * (STEPS // 2)


class Queued(MultiTask):
    """As lerobot has it: what was observed lies in queues, which the call does not fill."""

    def __init__(self) -> None:
        super().__init__("diffusion")
        self._queues = {"obs": deque(maxlen=2), "action": deque(maxlen=2)}

    def predict_action_chunk(self, batch: dict[str, Tensor]) -> Tensor:
        for name in batch:
            batch[name] = torch.stack(list(self._queues[name]), dim=1)
        return super().predict_action_chunk(batch)


def test_queues_of_a_policy_hold_what_is_asked_and_are_put_back() -> None:
    policy, case = randomised(Queued()), CASES["multi_task_dit"]
    policy._queues["obs"].append(torch.full((4, OBS), 9.0))
    calls = [case.call(4, seed) | {"seed": seed} for seed in range(2)]
    before = [call["batch"]["obs"].clone() for call in calls]
    loop = host.adopted(policy)
    plain = case.make()
    plain.load_state_dict(policy.state_dict())
    assert torch.equal(loop(**calls[0]), host.adopted(plain)(**calls[0]))
    diffcache.optimize(policy, calls, 5, time_limit_s=0)
    assert all(torch.equal(call["batch"]["obs"], was) for call, was in zip(calls, before, strict=True))
    assert len(policy._queues["obs"]) == 1
