"""The schedule of a rule is made once for a loop, and again for another one."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from pipelines import TINY

from diffcache import accelerated, report
from diffcache.executor import engine
from diffcache.schedulers import Rule

pytestmark = pytest.mark.fast


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The steps and the first step of every loop for which a rule made a schedule."""
    found: list[tuple[int, int]] = []
    inner = Rule.schedule

    def schedule(rule: Rule, grid: Any, sites: Any) -> Any:
        found.append((grid.steps, grid.start))
        return inner(rule, grid, sites)

    monkeypatch.setattr(Rule, "schedule", schedule)
    return found


def run(pipe: Any, steps: int) -> torch.Tensor:
    call = TINY["dit"].call(pipe) | {"num_inference_steps": steps, "generator": torch.Generator().manual_seed(0)}
    return torch.as_tensor(pipe(**call).images)


def test_runs_of_one_loop_share_the_schedule(made: list[tuple[int, int]]) -> None:
    pipe = TINY["dit"].build()
    with accelerated(pipe, "auto:speedup=2"):
        made.clear()
        first, second = run(pipe, 10), run(pipe, 10)
        assert torch.equal(first, second)
        assert report(pipe).skipped == pytest.approx(0.5)
        assert made == [(10, 0)]
        run(pipe, 12)
        run(pipe, 10)
        assert made == [(10, 0), (12, 0)]


def test_another_noise_scheduler_makes_another_schedule(made: list[tuple[int, int]]) -> None:
    pipe = TINY["dit"].build()
    with accelerated(pipe, "auto:speedup=2"):
        made.clear()
        run(pipe, 10)
        pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
        run(pipe, 10)
        assert len(made) == 2


def test_not_more_than_a_few_are_kept(made: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "MOST_MADE", 2)
    pipe = TINY["dit"].build()
    with accelerated(pipe, "uniform:every=2"):
        made.clear()
        for steps in (4, 5, 6, 6, 5, 4):
            run(pipe, steps)
        assert [steps for steps, _ in made] == [4, 5, 6, 4]
