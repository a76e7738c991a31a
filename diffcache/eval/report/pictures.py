"""Embed pictures of the full run, of each method, and of their differences in the report, within a limit of size."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image, features

from diffcache.documents import files as document_files
from diffcache.errors import BadOption
from diffcache.eval.report.findings import main_metric
from diffcache.eval.table import finite, score_of

MOST = 24  # triplets on the page
LONGEST = 512  # longest side of a picture in pixels
BYTES = 6_500_000  # of all pictures together, before base64, which adds a third
FACTORS = (32, 16, 8, 4, 2, 1)


@dataclass(frozen=True, slots=True)
class Triplet:
    """A picture of the full run, of a method, and their difference.

    Attributes:
        method: Name of the method.
        sample: Id of the sample.
        full: The picture of the full run, uint8 [h, w, 3].
        found: The picture of the method, uint8 [h, w, 3].
        difference: |found − full|, uint8 [h, w, 3], not amplified, computed at full size and then reduced.
    """

    method: str
    sample: str
    full: np.ndarray
    found: np.ndarray
    difference: np.ndarray


def shown(record: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the pictures that the page shows, as data for JSON.

    The worst and the median sample of our method of fewest computed steps come first, then the other samples in the
    order of the record. Their number is as large as MOST triplets with all methods allow, but at least two.

    Args:
        record: The record.
        folder: The folder to which the paths of pictures are relative.

    Returns:
        The pictures as data URIs, with their numbers and notes; ``{"note": reason}`` if there are none.

    Raises:
        BadOption: If a path leads out of the folder.
    """
    methods = [m for m in record.get("methods") or [] if m.get("pictures")]
    full = next((m for m in methods if m.get("kind") == "full"), None)
    others = [m for m in methods if m is not full]
    if full is None or not others:
        return {"note": "The record names no pictures of the full run and of another method."}
    judged = named_samples(record)
    pairs = [(s, m) for s in _samples(record, full, judged) for m in others if s in m["pictures"]]
    chosen = _chosen(pairs, len(others))
    read = {(m["name"], s): _read(folder, m["pictures"][s]) for s, m in [*chosen, *((s, full) for s, _ in chosen)]}
    triplets, unread = [], 0
    for sample, method in chosen:
        a, b = read[full["name"], sample], read[method["name"], sample]
        if a is None or b is None or a.size != b.size:
            unread += 1
        else:
            triplets.append(_triplet(method["name"], sample, a, b))
    notes = []
    if unread:
        notes.append(
            f"{unread} could not be shown: a video, a sound, a file that is missing, or a picture of another size"
        )
    if not triplets:
        return {"note": f"Of the {len(pairs)} results, {'; '.join(notes)}."}
    encoded = _encoded(triplets)
    return {
        **encoded,
        "count": len(triplets),
        "of": len(pairs),
        "note": "; ".join(notes),
        "order": list(encoded["full"]),  # the keys of a JSON object have no order that a script can rely on
        "named": {s: words for s, words in judged["samples"].items() if s in encoded["full"]},
        "judged": judged["method"],
    }


def ranked(record: Mapping[str, Any]) -> tuple[str | None, list[str]]:
    """Return our method of fewest computed steps, and the ids of all samples by its main metric, the worst first.

    Returns:
        The name of the method and the ids; (None, []) if no method of kind "ours" has a finite score of every sample.
    """
    metric = main_metric(record) or ""
    ids = [s.get("id") for s in record.get("samples") or []]
    able: list[tuple[float, int, str, list[float]]] = []
    for method in record.get("methods") or []:
        values = (score_of(method, metric) or {}).get("values") or []
        if method.get("kind") == "ours" and len(values) == len(ids) > 0 and all(map(finite, values)):
            able.append((method.get("computed_steps") or 0, len(able), method["name"], values))
    if not able:
        return None, []
    _, _, name, values = min(able)
    sign = -1 if record["metrics"][metric].get("better") == "lower" else 1
    return name, [ids[n] for n in sorted(range(len(ids)), key=lambda n: sign * values[n])]


def named_samples(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the worst and the median sample of our method of fewest computed steps, by the main metric.

    Returns:
        "method": the name of the method, or None. "samples": the id of a sample -> "worst" or "median". Of an even
        number of samples, the median is the worse of the two middle ones.
    """
    name, order = ranked(record)
    named = {order[0]: "worst"} if order else {}
    if len(order) > 1:
        named.setdefault(order[(len(order) - 1) // 2], "median")
    return {"method": name, "samples": named}


def _samples(record: Mapping[str, Any], full: Mapping[str, Any], judged: Mapping[str, Any]) -> list[str]:
    every = [*judged["samples"], *(s.get("id") for s in record.get("samples") or [])]
    return [s for s in dict.fromkeys(every) if s in full["pictures"]]


def _chosen(pairs: list[tuple[str, Any]], methods: int) -> list[tuple[str, Any]]:
    """Return all methods at the first samples, at least two. More than MOST methods: MOST at one sample, ours first."""
    if methods > MOST:
        pairs = [pair for pair in pairs if pair[0] == pairs[0][0]]
        return sorted(pairs, key=lambda pair: pair[1].get("kind") != "ours")[:MOST]
    first = list(dict.fromkeys(sample for sample, _ in pairs))[: max(2, MOST // methods)]
    return [pair for pair in pairs if pair[0] in first]


def _read(folder: Path, name: str) -> Image.Image | None:
    """Return a picture; None if pillow cannot read the file as one still picture."""
    parts = PurePosixPath(str(name).replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts or Path(name).is_absolute():
        raise BadOption("pictures", name, "a path inside the folder of pictures, relative to it")
    try:
        with document_files.opened(folder / name, inside=folder) as data, Image.open(data) as file:
            return None if getattr(file, "n_frames", 1) > 1 else file.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # DocumentError is a ValueError
        return None


def _triplet(method: str, sample: str, full: Image.Image, found: Image.Image) -> Triplet:
    """Return the reduced pictures and their difference.

    The difference is taken before the pictures are reduced. Otherwise details finer than the pixels of the page would
    be lost.
    """
    apart = np.abs(np.asarray(full, np.int16) - np.asarray(found, np.int16)).astype(np.uint8)
    a, b, c = (_smaller(x) for x in (full, found, Image.fromarray(apart)))
    return Triplet(method, sample, a, b, c)


def _smaller(picture: Image.Image) -> np.ndarray:
    picture = picture.copy()
    picture.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
    return np.asarray(picture)


def _factor(triplets: list[Triplet]) -> int:
    """Return the largest factor that leaves 99.5 % of all differences unclipped.

    All methods have the same factor, so that their differences can be compared.
    """
    top = max(1.0, float(np.quantile(np.concatenate([t.difference.ravel() for t in triplets]), 0.995)))
    return next((f for f in FACTORS if f * top <= 255), 1)


def _encoded(triplets: list[Triplet]) -> dict[str, Any]:
    factor = _factor(triplets)
    pictures: dict[tuple[str, str, str], np.ndarray] = {}
    for t in triplets:
        pictures["full", "", t.sample] = t.full
        pictures["found", t.method, t.sample] = t.found
        pictures["difference", t.method, t.sample] = np.clip(t.difference.astype(np.int32) * factor, 0, 255)
    written, lossless = _written({key: p.astype(np.uint8) for key, p in pictures.items()})
    methods: dict[str, dict[str, dict[str, str]]] = {}
    for t in triplets:
        methods.setdefault(t.method, {})[t.sample] = {
            kind: written[kind, t.method, t.sample] for kind in ("found", "difference")
        }
    return {
        "full": {sample: uri for (kind, _, sample), uri in written.items() if kind == "full"},
        "methods": methods,
        "factor": factor,
        "lossless": lossless,
    }


def _written(pictures: Mapping[Any, np.ndarray]) -> tuple[dict[Any, str], bool]:
    """Return the pictures as data URIs, and whether they are lossless.

    They are lossless if they fit into BYTES together. Otherwise the quality is reduced until they fit.
    """
    webp = features.check("webp")
    lossy = [("WEBP" if webp else "JPEG", {"quality": q}) for q in (90, 75, 50, 25)]
    exact: tuple[str, dict[str, Any]] = ("WEBP", {"lossless": True}) if webp else ("PNG", {"optimize": True})
    small = sum(p.size for p in pictures.values()) <= 3 * BYTES  # larger ones never fit without loss
    for name, options in [*([exact] if small else []), *lossy]:
        files = {key: _file(p, name, options) for key, p in pictures.items()}
        if sum(map(len, files.values())) <= BYTES:
            break
    uri = f"data:image/{name.lower()};base64,"
    return {key: uri + base64.b64encode(file).decode() for key, file in files.items()}, (name, options) == exact


def _file(picture: np.ndarray, name: str, options: Mapping[str, Any]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, name, **options)
    return file.getvalue()
