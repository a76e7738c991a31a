"""The commands of a first day, one after the other, on a tiny pipeline: each file is read by the next command."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from commands import command_of

from diffcache.documents import CacheSchedule, Profile, ScheduleSet

MODULE = """
import torch
from pipelines import TINY, fresh

def pipe():
    made = fresh("flux")
    call = TINY["flux"].call(made, batch=2) | {"num_inference_steps": 6, "output_type": "pt"}
    return made, [call | {"generator": torch.Generator().manual_seed(seed)} for seed in (1, 2)]
"""


def test_every_file_is_read_by_the_next_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "walk.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("COLUMNS", "80")
    command = command_of(monkeypatch, capsys)

    def run(line: str) -> str:
        code, out, complaint = command(*line.split())
        assert code == 0, complaint
        assert "Traceback" not in complaint
        return out

    out = run("profile walk:pipe")
    assert "written to profile.safetensors" in out
    following = [line.strip() for line in out.splitlines() if line.startswith("  diffcache ")]
    assert len(following) == 2
    for line in following:
        assert "2" in run(line.removeprefix("diffcache "))
    assert Profile.load("profile.safetensors").steps == 6
    for computed, name in ((3, "three"), (2, "two")):
        assert f"{computed} of 6 steps" in run(
            f"plan profile.safetensors --computed {computed} --out {name}.safetensors"
        )
    assert run("plan profile.safetensors --computed 3 --compare").startswith("scheduler")
    three = CacheSchedule.load("three.safetensors")
    assert run("show three.safetensors --profile profile.safetensors --plot three.png").startswith(three.describe())
    assert Path("three.png").read_bytes().startswith(b"\x89PNG")
    ScheduleSet.of(three).save("set.json")
    out = run("eval run walk:pipe ours=set.json two.safetensors --metrics psnr,latent --alone --out made")
    assert "| ours | 3 of 6 |" in out
    assert "| two | 2 of 6 |" in out
    assert Path("made/report.html").is_file()
    (pictures,) = Path("made/pictures").glob("ours-*")
    assert len(list(pictures.glob("*.png"))) == 4


POLICY = """
import torch
from policies import OBS, diffusion_policy


def policy():
    return diffusion_policy(), [{"obs_dict": {"obs": torch.full((1, 2, OBS), 0.1 * n)}, "seed": n} for n in range(2)]


def play(policy, episodes):
    return [n % 2 == 0 for n in range(episodes)]
"""


def test_a_policy_is_calibrated_and_measured_by_the_commands_that_are_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "robot.py").write_text(POLICY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    command = command_of(monkeypatch, capsys)
    code, out, complaint = command("optimize", "robot:policy", "--computed", 4, "--time-limit", 0, "--out", "4.json")
    assert code == 0, complaint
    assert "policy = diffcache.accelerate(policy, '4.json')" in out
    assert "measure it on observations that it has not seen:" in out
    line = out.splitlines()[-1].strip()
    assert line == "diffcache eval policy robot:policy 4.json"
    code, out, complaint = command(*line.split()[1:], "--play", "robot:play", "--episodes", 4, "--alone")
    assert code == 0, complaint
    assert "| 4 | 4 of 10 |" in out
    assert out.count("0.5") >= 2  # half of the episodes succeed, with and without the schedule
    assert Path("evaluation/report.html").is_file()
