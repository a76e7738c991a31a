"""Save and find the parts of an evaluation while it runs.

    pipeline.json               the pipeline of the evaluation
    parts/METHOD/0003.json      numbers of the fourth call: seconds, scores, bytes
    pictures/METHOD/0003-00.png the first picture of that call, for readers and distances of sets
    exact/0003.npz              the output of the full run, bit for bit, for metrics of pairs

Files are written whole or not at all, and links inside the folder are not followed. A file that is damaged, belongs to
another run or has impossible values is made again.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from diffcache.documents import files
from diffcache.documents.checks import refuse
from diffcache.errors import DocumentError, Unusable
from diffcache.eval.plausible import Due, Part, demand_sound

PARTS, EXACT, PICTURES, TRIALS = "parts", "exact", "pictures", "trials"
RESULTS = ("record.json", "table.md", "report.html")
PART_BYTES = 16 * 2**20
EXACT_BYTES = 64 * 2**30  # videos of a whole batch


@dataclass(frozen=True, slots=True)
class Exact:
    """The result of a full run.

    Attributes:
        output: The output, [N, …].
        latent: The final state; None if there is none.
    """

    output: np.ndarray
    latent: np.ndarray | None

    @property
    def samples(self) -> int:
        """The number of samples."""
        return len(self.output)


@dataclass(frozen=True, slots=True)
class EvaluationFolder:
    """The folder of one evaluation."""

    path: Path

    def prepare(self, methods: Iterable[str]) -> None:
        """Make the folders of these methods, named by ``slug``, before anything runs.

        Raises:
            DocumentError: If a link or another object is in the place of a folder or a file.
            NotWritten: If a folder cannot be made.
        """
        files.make_folder(self.path)
        of_methods = [f"{kind}/{method}" for kind in (PARTS, PICTURES) for method in methods]
        for name in (EXACT, TRIALS, *of_methods):
            folder = files.make_folder(self.path / name, inside=self.path)
            for found in folder.iterdir():
                files.demand_place(found)
        for name in RESULTS:
            files.demand_place(self.path / name)

    def find(self, method: str, call: str, due: Due) -> Part | None:
        """Return the part of a method and a call; None if there is none, or it does not match ``due``."""
        path = self._part(method, call)
        try:
            part = files.read_json(path, most=PART_BYTES, inside=self.path)
            demand_sound(str(path), part, due)
            if list(part["pictures"]) != [self._picture(method, call, n) for n in range(due.pictures)]:
                refuse(str(path), "pictures", f"found {list(part['pictures'])!r:.80}", "those of this call")
            for name, digest in part["pictures"].items():
                if hashlib.sha256(files.read_bytes(self.path / name, inside=self.path)).hexdigest() != digest:
                    refuse(str(self.path / name), "file", "found another picture", "the picture of this run")
        except DocumentError:
            return None
        return part

    def find_exact(self, call: str, key: str) -> Exact | None:
        """Return the result of the full run; None if there is no valid result with this key."""
        try:
            found = files.read_arrays(self._exact(call), most=EXACT_BYTES, inside=self.path)
        except DocumentError:
            return None
        arrays = [found[name] for name in ("output", "latent") if name in found]
        named = {"key", "output"} <= found.keys() <= {"key", "output", "latent"}
        if not named or str(found["key"]) != key or not all(map(_is_numbers, arrays)):
            return None
        return Exact(found["output"], found.get("latent"))

    def claim(self, pipeline: Mapping[str, str], known: str) -> None:
        """Record that the folder belongs to one pipeline.

        Args:
            pipeline: The class of the pipeline, where it was loaded from, and its denoisers.
            known: A digest of everything that its results depend on.

        Raises:
            BadOption: If the folder holds the evaluation of another pipeline.
        """
        file = self.path / "pipeline.json"
        try:
            found = files.read_json(file, inside=self.path)
        except DocumentError:  # missing or damaged; parts have keys that identify them
            found = {}
        other, was = found.get("pipeline"), found.get("known")
        if other is not None and known != was and dict(pipeline) != other:
            raise Unusable(
                "out",
                f"{self.path} holds the evaluation of another pipeline than this {pipeline.get('class')}: {other}",
                "Choose another folder, or remove this one",
            )
        files.make_folder(self.path)
        files.write(file, json.dumps({"pipeline": dict(pipeline), "known": known}), inside=self.path)

    def forget(self, method: str, call: str) -> None:
        """Remove a part, before its pictures are replaced."""
        self._part(method, call).unlink(missing_ok=True)

    def keep(self, method: str, call: str, part: Part) -> None:
        """Save a part."""
        files.write(self._part(method, call), json.dumps(part, allow_nan=False), inside=self.path)

    def keep_exact(self, call: str, exact: Exact, key: str) -> None:
        """Save the result of the full run."""

        def fill(file: BinaryIO) -> None:
            if exact.latent is None:
                np.savez(file, key=np.array(key), output=exact.output)
            else:
                np.savez(file, key=np.array(key), output=exact.output, latent=exact.latent)

        files.write(self._exact(call), fill, inside=self.path)

    def keep_pictures(self, method: str, call: str, output: np.ndarray) -> dict[str, str]:
        """Write a picture of each sample, or the middle frame of each video. Other outputs have no pictures.

        Returns:
            Path of each file relative to the folder -> its sha256.
        """
        found = {}
        for n in range(pictures_in(output)):
            picture = output[n] if output.ndim == 4 else output[n, output.shape[1] // 2]
            data = io.BytesIO()
            Image.fromarray((np.clip(picture, 0, 1) * 255).round().astype(np.uint8)).save(data, format="PNG")
            name = self._picture(method, call, n)
            files.write(self.path / name, data.getvalue(), inside=self.path)
            found[name] = hashlib.sha256(data.getvalue()).hexdigest()
        return found

    def _picture(self, method: str, call: str, n: int) -> str:
        return f"{PICTURES}/{method}/{call}-{n:02d}.png"

    def _part(self, method: str, call: str) -> Path:
        return self.path / PARTS / method / f"{call}.json"

    def _exact(self, call: str) -> Path:
        return self.path / EXACT / f"{call}.npz"


def pictures_in(output: np.ndarray) -> int:
    """Return the number of samples of an output that have a picture."""
    return len(output) if output.ndim in (4, 5) and output.shape[-1] == 3 else 0


def slug(name: str) -> str:
    """Return a method's name as part of a path. Different names have different results."""
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return f"{plain[:48]}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def _is_numbers(array: np.ndarray) -> bool:
    return array.dtype.kind in "fiub" and array.ndim > 0 and array.size > 0 and bool(np.isfinite(array).all())
