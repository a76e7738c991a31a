"""``from diffcache import *`` costs torch and numpy, nothing else that is heavy, and asks nothing of the GPU.

Measured in a fresh interpreter, against what torch and numpy bring by themselves. The twins spoil a copy of the package
and expect to hear of it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "diffcache"
HEAVY = ("diffusers", "transformers", "triton", "torchvision", "scipy", "skimage", "matplotlib", "typer")

PROBE = """
import json, sys
import numpy, torch

asked = []
def watched(name, answer):
    def call(*args, **kwargs):
        asked.append(name)
        return answer(*args, **kwargs)
    return call
for name in ("is_available", "device_count", "current_device", "get_device_properties", "_lazy_init"):
    setattr(torch.cuda, name, watched(name, getattr(torch.cuda, name)))

before = set(sys.modules)
from diffcache import *  # every public name: the package imports them when they are first used
import diffcache
top = sorted({name.partition(".")[0] for name in set(sys.modules) - before})
print(json.dumps({"from": list(diffcache.__path__), "new": top, "asked": asked, "cuda": torch.cuda.is_initialized()}))
"""


def heard(package: Path, *more_paths: Path) -> list[str]:
    """What an import of the package at this place does that it should not."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (package.parent, *more_paths)))}
    run = subprocess.run(
        [sys.executable, "-c", PROBE], cwd=package.parent, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert Path(found["from"][0]).resolve() == package.resolve()
    words = [f"import diffcache imports {name}" for name in HEAVY if name in found["new"]]
    words += [f"import diffcache asks torch.cuda.{name}" for name in found["asked"]]
    return words + ["import diffcache starts CUDA"] * found["cuda"]


def test_import_is_light() -> None:
    assert heard(PACKAGE) == []


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Return a copy of the package's Python files that tests may change, with stand-ins for all heavy packages."""
    for path in PACKAGE.rglob("*.py"):
        target = tmp_path / "here" / "diffcache" / path.relative_to(PACKAGE)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    for name in HEAVY:
        (tmp_path / "stand_ins" / name).mkdir(parents=True)
        (tmp_path / "stand_ins" / name / "__init__.py").touch()
    return tmp_path / "here" / "diffcache"


def test_every_heavy_import_and_every_question_to_cuda_is_reported(copy: Path) -> None:
    lines = [f"import {name}" for name in HEAVY]
    (copy / "_planted.py").write_text(
        "\n".join([*lines, "import torch", "torch.cuda.is_available()"]), encoding="utf-8"
    )
    with (copy / "__init__.py").open("a", encoding="utf-8") as file:
        file.write("\nimport diffcache._planted\n")
    words = heard(copy, copy.parents[1] / "stand_ins")
    assert words[: len(HEAVY)] == [f"import diffcache imports {name}" for name in HEAVY]
    assert "import diffcache asks torch.cuda.is_available" in words


def test_a_copy_with_nothing_planted_is_silent(copy: Path) -> None:
    assert heard(copy, copy.parents[1] / "stand_ins") == []
