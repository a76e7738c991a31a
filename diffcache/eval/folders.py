"""Read pictures and prompts from folders, in the order of the file names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from diffcache.documents import files
from diffcache.errors import BadOption, DocumentError
from diffcache.eval.extractors import PicturesError

ENDINGS = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
NAMED = 12  # folders that an error names


class PromptsError(PicturesError):
    """The number of prompts differs from the number of pictures, or a prompt is empty or cannot be read."""


def pictures(folder: Path) -> list[Path]:
    """Return the pictures directly in a folder, sorted by name.

    Args:
        folder: The folder, or the beginning of its name if no other folder with pictures begins so.

    Raises:
        BadOption: If there is no such folder, several begin so, or no picture is in it.
    """
    if not folder.is_dir():
        folder = _folder_that_begins(folder)
    found = _directly_in(folder)
    if not found:
        allowed = f"a folder with pictures in it, files ending in {', '.join(ENDINGS)}"
        inner = sorted(path for path in folder.iterdir() if path.is_dir() and _directly_in(path))
        if inner:
            allowed += f"; or one of its {len(inner)} folders with pictures, such as {inner[0]}"
        raise BadOption("folder", str(folder), allowed)
    return found


def _folder_that_begins(start: Path) -> Path:
    """Return the one folder with pictures and a path that begins with ``start``."""
    around = start.parent
    try:
        near = sorted(path for path in around.iterdir() if path.is_dir() and _directly_in(path))
    except OSError:  # the folder around it does not exist or cannot be read
        near = []
    found = [path for path in near if path.name.startswith(start.name)]
    if len(found) == 1:
        return found[0]
    allowed = "a folder that exists, with pictures in it"
    if found:
        allowed = f"one of the {len(found)} folders that begin so: {_named(found)}"
    elif near:
        allowed += f". In {around}: {_named(near)}"
    raise BadOption("folder", str(start), allowed)


def _named(folders: Sequence[Path]) -> str:
    """Return the names of folders, of many the first ones."""
    more = f" and {len(folders) - NAMED} more" if len(folders) > NAMED else ""
    return ", ".join(path.name for path in folders[:NAMED]) + more


def _directly_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in ENDINGS and path.is_file())


def read(path: Path) -> np.ndarray:
    """Return a picture as uint8 [H, W, 3]. A grey picture becomes three equal channels; an alpha channel is dropped.

    Raises:
        PicturesError: If the file cannot be read as a picture.
    """
    from PIL import Image

    try:
        with files.opened(path) as data, Image.open(data) as file:
            return np.asarray(file.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())
        raise PicturesError(f"{path} cannot be read as a picture: {reason:.200}. Replace or remove the file.") from None


def batches(paths: Sequence[Path], size: int) -> Iterator[np.ndarray]:
    """Yield pictures in batches, uint8 [n, H, W, 3] with n up to ``size``.

    A batch holds consecutive pictures of one height and width.

    Raises:
        BadOption: If ``size`` is below 1.
        PicturesError: If a file cannot be read as a picture.
    """
    if size < 1:
        raise BadOption("batch_size", size, "1 or more")
    batch: list[np.ndarray] = []
    for path in paths:
        picture = read(path)
        if batch and (len(batch) == size or picture.shape != batch[0].shape):
            yield np.stack(batch)
            batch = []
        batch.append(picture)
    if batch:
        yield np.stack(batch)


def prompts(source: Path, paths: Sequence[Path]) -> list[str]:
    """Return one prompt for each of the pictures ``paths``.

    Args:
        source: A text file with lines in the order of the pictures' names, or a folder that holds a .txt file of
            the same stem for each picture.
        paths: The pictures, sorted by name.

    Raises:
        PromptsError: If there is not one prompt for each picture, or one is empty or cannot be read.
        BadOption: If ``source`` is neither a file nor a folder.
    """
    if source.is_dir():
        missing = [path.name for path in paths if not (source / f"{path.stem}.txt").is_file()]
        if missing:
            raise PromptsError(
                f"{source} has no prompt for {len(missing)} of {len(paths)} pictures, first for {missing[0]}. Allowed: "
                f"a file {Path(missing[0]).stem}.txt in the same folder."
            )
        found = [" ".join(_text(source / f"{path.stem}.txt").split()) for path in paths]
        names = [f"{source / path.stem}.txt" for path in paths]
    elif source.is_file():
        found = [line.strip() for line in _text(source).rstrip().splitlines()]
        names = [f"line {n} of {source}" for n in range(1, len(found) + 1)]
    else:
        raise BadOption(
            "prompts", str(source), "a text file with a line per picture, or a folder with a .txt per picture"
        )
    if len(found) != len(paths):
        raise PromptsError(
            f"{source} has {len(found)} prompt{'s' * (len(found) != 1)} for {len(paths)} "
            f"picture{'s' * (len(paths) != 1)}. Allowed: one line per picture, in the order "
            "of the pictures' names."
        )
    if "" in found:
        raise PromptsError(f"{names[found.index('')]} is empty. Allowed: a prompt for every picture.")
    return found


def _text(path: Path) -> str:
    try:
        return files.read_text(path)
    except DocumentError as error:
        raise PromptsError(f"{path} cannot be read: {error.problem}") from None
