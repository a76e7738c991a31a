"""The table of packages and layers that ``test_layers.py`` enforces and ``docs/draw_layers.py`` draws."""

from __future__ import annotations

# Each line is a layer. A package (a folder or a file of ``diffcache/``) may import the packages of the lines above it.
LAYERS = (
    ("errors", "text", "moved"),
    ("registry", "settings", "patch", "documents", "simulation", "kernels", "assets", "presets"),
    ("schedulers", "host"),
    ("planning", "executor", "tokens"),
    ("api",),
    ("profiling",),
    ("eval",),
    ("demo",),
    ("cli",),
    ("__init__", "__main__"),
)
RANK = {package: rank for rank, layer in enumerate(LAYERS) for package in layer}

# The packages of these layers may also import each other, as long as no two need each other.
MUTUAL = {RANK["errors"], RANK["documents"], RANK["__init__"]}

ONLY = {"assets": {"errors"}, "presets": {"errors"}}  # package -> the only packages that it may import
NEVER = {"kernels": {"documents"}, "patch": {"documents"}}  # kernels and layers see tensors and modules, not schedules

# Folder inside a package -> the packages that its files may import. From their package they import only their folder.
PLUG_INS = {"executor/criteria": {"errors", "documents", "registry", "kernels", "executor.store"}}

# Package -> its folders, in order: a folder may import the folders before it. Files of the package itself come last.
INNER = {"profiling": ("recording", "replay", "fitting", "measuring", "calibration")}

LIGHT = (
    "errors",
    "text",
    "registry",
    "documents",
    "simulation",
    "presets",
    "schedulers",
    "planning",
)  # numpy, no torch
HEAVY = {"torch", "diffusers"}  # not reachable from LIGHT, through other packages either
