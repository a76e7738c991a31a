"""What is on disk of an evaluation while it runs: a small file for each method and call, pictures, the full run exact.

    pipeline.json               the pipeline that the folder is for
    parts/METHOD/0003.json      numbers of the fourth call: seconds, scores, bytes
    pictures/METHOD/0003-00.png its first picture, for eyes, distributions and scorers
    exact/0003.npz              what the full run gave, bit for bit, which pairs are compared with

Files appear whole or not at all. One that belongs to another method, call or set of metrics is made again.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffcache import _files
from diffcache.errors import BadOption, DiffCacheError, DocumentError
from diffcache.eval.watch import Run

Part = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Folder:
    """Of one evaluation."""

    path: Path

    def find(self, method: str, call: str, key: str) -> Part | None:
        """The part, if it is there and was made under this key."""
        try:
            part: Part = json.loads(self._part(method, call).read_text())
        except (OSError, ValueError):
            return None
        return part if part.get("key") == key else None

    def has_exact(self, call: str, key: str) -> bool:
        """Whether the full run's result is there and was made under this key."""
        try:
            with np.load(self._exact(call), allow_pickle=False) as found:
                return str(found["key"]) == key
        except (OSError, ValueError, KeyError):
            return False

    def claim(self, pipeline: Mapping[str, str], known: str) -> None:
        """Make the folder that of one pipeline.

        Args:
            pipeline: What names the pipeline: its class, where it was loaded from, its denoisers.
            known: A digest of everything that its results depend on.

        Raises:
            BadOption: The folder holds the evaluation of another pipeline.
        """
        file = self.path / "pipeline.json"
        try:
            found = _files.read_json(file, inside=self.path)
        except DocumentError:  # none, or a damaged one; parts are known by their own keys
            found = {}
        other, was = found.get("pipeline"), found.get("known")
        if other is not None and known != was and dict(pipeline) != other:
            raise BadOption(
                "out",
                str(self.path),
                f"a folder for this {pipeline.get('class')}; this one holds the evaluation of another pipeline: "
                f"{other}. Choose another folder, or remove this one",
            )
        _files.make_folder(self.path)
        _files.write(file, json.dumps({"pipeline": dict(pipeline), "known": known}), inside=self.path)

    def forget(self, method: str, call: str) -> None:
        """Remove a part, before its pictures are replaced."""
        self._part(method, call).unlink(missing_ok=True)

    def keep(self, method: str, call: str, part: Part) -> None:
        _whole(self._part(method, call), json.dumps(part).encode())

    def keep_exact(self, call: str, run: Run, key: str) -> None:
        data = io.BytesIO()
        if run.latent is None:
            np.savez(data, key=np.array(key), output=run.output)
        else:
            np.savez(data, key=np.array(key), output=run.output, latent=run.latent)
        _whole(self._exact(call), data.getvalue())

    def exact(self, call: str, key: str) -> tuple[np.ndarray, np.ndarray | None]:
        """(output, last state or None) of the full run. Raises DiffCacheError for another run's."""
        if not self.has_exact(call, key):
            raise DiffCacheError(
                f"{self._exact(call)} does not hold the full run of this call. The full run has to be the first "
                "method; or somebody else writes into this folder: take another one."
            )
        with np.load(self._exact(call), allow_pickle=False) as found:
            return found["output"], found["latent"] if "latent" in found else None

    def keep_pictures(self, method: str, call: str, output: np.ndarray) -> list[str]:
        """One file a sample, of a video its middle frame; their paths from the folder. None for what is no picture."""
        if output.ndim not in (4, 5) or output.shape[-1] != 3:
            return []
        found = []
        for n, picture in enumerate(output if output.ndim == 4 else output[:, output.shape[1] // 2]):
            path = self.pictures(method) / f"{call}-{n:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_suffix(".part")
            Image.fromarray((np.clip(picture, 0, 1) * 255).round().astype(np.uint8)).save(unfinished, format="PNG")
            unfinished.replace(path)
            found.append(path.relative_to(self.path).as_posix())
        return found

    def pictures(self, method: str) -> Path:
        return self.path / "pictures" / method

    def _part(self, method: str, call: str) -> Path:
        return self.path / "parts" / method / f"{call}.json"

    def _exact(self, call: str) -> Path:
        return self.path / "exact" / f"{call}.npz"


def slug(name: str) -> str:
    """A method's name as part of a path; two names never share one."""
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return f"{plain[:48]}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def _whole(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_bytes(data)
    unfinished.replace(path)
