"""Policies of an installed lerobot, built small with random weights: what can be cached, and whether it holds.

    pip install lerobot diffcache && python benchmarks/lerobot_policies.py     # lerobot 0.6 wants Python 3.12 or newer

The classes are lerobot's own; what would come from the Hub (encoders of pictures and text) is left out, and the
condition is given instead. For each granularity of sites: whether all computed steps give the untouched policy's
actions bit for bit, and what every second step computed does. Prints a table and writes ``results/lerobot.md``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import lerobot
import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy
from lerobot.policies.groot.groot_n1_7 import GR00TN17ActionHead, GR00TN17Config
from lerobot.policies.multi_task_dit.configuration_multi_task_dit import MultiTaskDiTConfig
from lerobot.policies.multi_task_dit.modeling_multi_task_dit import (
    DiffusionObjective,
    DiffusionTransformer,
    FlowMatchingObjective,
)
from torch import Tensor, nn

import diffcache
from diffcache.errors import DiffCacheError

RESULTS = Path(__file__).parent / "results"
STEPS, SAMPLES, JOINTS, WIDTH = 20, 4, 4, 32


def randomised(policy: Any) -> Any:
    """Gates that begin at zero would let a cache pass for the wrong reason."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return policy.eval()


class MultiTask(nn.Module):
    """lerobot's network and objective; its policy would fetch CLIP."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.config = config = MultiTaskDiTConfig(hidden_dim=2 * WIDTH, num_layers=3, num_heads=4, **options)
        config.output_features = {"action": PolicyFeature(type=FeatureType.ACTION, shape=(JOINTS,))}
        self.noise_predictor = DiffusionTransformer(config, conditioning_dim=WIDTH)
        kind = DiffusionObjective if config.is_diffusion else FlowMatchingObjective
        self.objective = kind(config, action_dim=JOINTS, horizon=config.horizon)

    @torch.no_grad()
    def predict_action_chunk(self, batch: dict[str, Tensor]) -> Tensor:
        return self.objective.conditional_sample(self.noise_predictor, len(batch["seen"]), batch["seen"])


def multi_task(**options: Any) -> tuple[Any, dict[str, Any]]:
    return randomised(MultiTask(**options)), {"batch": {"seen": torch.randn(SAMPLES, WIDTH)}}


def diffusion() -> tuple[Any, dict[str, Any]]:
    config = DiffusionConfig(n_obs_steps=2, horizon=16, n_action_steps=8, down_dims=(32, 64), num_inference_steps=STEPS)
    config.input_features = {
        "observation.state": PolicyFeature(type=FeatureType.STATE, shape=(6,)),
        "observation.environment_state": PolicyFeature(type=FeatureType.ENV, shape=(5,)),
    }
    config.output_features = {"action": PolicyFeature(type=FeatureType.ACTION, shape=(JOINTS,))}
    seen = {name: torch.randn(SAMPLES, 2, feature.shape[0]) for name, feature in config.input_features.items()}
    return randomised(DiffusionPolicy(config)), {"batch": seen}


class Groot(nn.Module):
    """lerobot's action head; its policy would fetch a language model."""

    def __init__(self) -> None:
        super().__init__()
        layers = {"num_layers": 4, "num_attention_heads": 4, "attention_head_dim": 8, "positional_embeddings": None}
        config = GR00TN17Config(
            backbone_embedding_dim=WIDTH, hidden_size=WIDTH, input_embedding_dim=WIDTH, max_state_dim=6,
            max_action_dim=JOINTS, action_horizon=8, max_num_embodiments=2, num_inference_timesteps=STEPS,
            diffusion_model_cfg=layers | {
                "norm_type": "ada_norm", "dropout": 0.0, "output_dim": WIDTH, "interleave_self_attention": True
            },
            vl_self_attention_cfg=layers | {"num_layers": 0, "dropout": 0.0},
        )  # fmt: skip
        self._groot_model = nn.Module()
        self._groot_model.action_head = GR00TN17ActionHead(config)

    @torch.no_grad()
    def predict_action_chunk(self, batch: dict[str, Tensor]) -> Tensor:
        head, mask = self._groot_model.action_head, torch.ones(SAMPLES, 6, dtype=torch.bool)
        seen = SimpleNamespace(image_mask=torch.arange(6).expand(SAMPLES, 6) < 3, backbone_attention_mask=mask)
        where = torch.zeros(SAMPLES, dtype=torch.long)
        return head.get_action_with_features(batch["seen"], batch["state"], where, seen, {})["action_pred"]


def groot() -> tuple[Any, dict[str, Any]]:
    seen = {"seen": torch.randn(SAMPLES, 6, WIDTH), "state": torch.randn(SAMPLES, 1, WIDTH)}
    return randomised(Groot()), {"batch": seen}


POLICIES: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "multi_task_dit, DDPM": lambda: multi_task(objective="diffusion", num_inference_steps=STEPS),
    "multi_task_dit, DDIM": lambda: multi_task(
        objective="diffusion", noise_scheduler_type="DDIM", num_inference_steps=STEPS
    ),
    "multi_task_dit, DDPM, rotary": lambda: multi_task(objective="diffusion", num_inference_steps=STEPS, use_rope=True),
    "multi_task_dit, flow, Euler": lambda: multi_task(objective="flow_matching", num_integration_steps=STEPS),
    "multi_task_dit, flow, Runge-Kutta": lambda: multi_task(
        objective="flow_matching", num_integration_steps=STEPS // 4, integration_method="rk4"
    ),
    "diffusion (U-Net)": diffusion,
    "GR00T N1.7, action head": groot,
}


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = ["| policy | sites | bit-equal, all computed | computed and predicted | error of the actions | fit |"]
    rows.append("|---|---|---|---:|---:|---|")
    for name, make in POLICIES.items():
        torch.manual_seed(0)
        policy, call = make()
        for sites in ("model", "stack", "block", "sublayer"):
            rows += [f"| {name} | {cells} |" for cells in tried(policy, call, sites)]
    versions = f"lerobot {lerobot.__version__}, torch {torch.__version__}, diffusers {diffusers.__version__}"
    table = "\n".join([f"{versions}, random weights, {STEPS} evaluations a run.", "", *rows])
    (RESULTS / "lerobot.md").write_text(f"{table}\n")
    print(table)


def tried(policy: Any, call: dict[str, Any], sites: str) -> list[str]:
    """One row, or none where the network has no such sites."""

    def actions() -> Tensor:
        torch.manual_seed(1)
        given = {key: value.clone() for key, value in call["batch"].items()}
        return policy.predict_action_chunk(given)

    full = actions()
    try:
        with diffcache.accelerated(policy, f"full:sites={sites}"):
            same = torch.equal(actions(), full)
    except DiffCacheError:
        return []
    with diffcache.accelerated(policy, f"uniform:every=2,sites={sites}"):
        error = float((actions() - full).norm() / full.norm())
        counts = {(row.computed, row.predicted) for row in diffcache.report(policy).rows if row.site.startswith(sites)}
    fit = ""
    if sites == "model":
        schedule = diffcache.optimize(policy, [call | {"seed": n} for n in range(3)], 8, time_limit_s=0)
        fit = f"to the {schedule.provenance['fit_target']}"
    told = ", ".join(f"{a} and {b}" for a, b in sorted(counts))
    return [f"{sites} | {'yes' if same else '**no**'} | {told} | {error:.4f} | {fit}"]


if __name__ == "__main__":
    main()
