"""Learned perceptual image patch similarity (Zhang, Isola, Efros, Shechtman and Wang 2018, arXiv 1801.03924).

torchmetrics has the measure and its linear heads (version 0.1); the backbone's ImageNet weights are files of
torchvision. They are never downloaded here: they come from ``weights``, or lie in torch.hub's folder already.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffcache.errors import BadOption
from diffcache.eval.metrics import About
from diffcache.eval.metrics._checks import frame_by_frame
from diffcache.eval.requirements import WeightsError, device_named, package

RANGE = (0.0, math.inf)
ABOUT = About(
    "LPIPS",
    "",
    "lower",
    "How different the pictures and the full run's look to a network trained on photographs, fitted to people's "
    "judgements: 0 is identical; above about 0.5 little is left in common.",
)


class Backbone(NamedTuple):
    network: str
    file: str  # as torchvision names it; the last eight characters are of its digest


BACKBONES = {
    "alex": Backbone("alexnet", "alexnet-owt-7be5be79.pth"),
    "vgg": Backbone("vgg16", "vgg16-397923af.pth"),
    "squeeze": Backbone("squeezenet1_1", "squeezenet1_1-b8a52dc0.pth"),
}
INSTALL = "'diffcache[eval]'"
LEAST = 32  # pixels; below that AlexNet's last feature map is empty


class MissingWeightsError(WeightsError, FileNotFoundError):
    """The backbone's weights are not where they were looked for."""


def score(
    found: np.ndarray,
    reference: np.ndarray,
    *,
    net: str = "alex",
    weights: str | Path | None = None,
    device: str = "cpu",
    at_once: int = 16,
) -> np.ndarray:
    """Pictures or videos, sides of 32 pixels or more -> float64 [N]; of a video the mean of its frames.

    ``net``: alex (the authors' choice for comparing), vgg or squeeze. ``weights``: torchvision's file of that backbone;
    without it, torch.hub's folder of checkpoints. ``at_once`` frames go through the network together, in float32.

    Raises BadOption for another net, MissingWeightsError and WeightsError.
    """
    path = check(net=net, weights=weights, device=device, at_once=at_once)
    network = _network(net, path, path.stat().st_mtime_ns).to(device)

    def lpips(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        import torch

        with torch.no_grad():
            pictures = [torch.from_numpy(x.astype(np.float32)).permute(0, 3, 1, 2).to(device) for x in (a, b)]
            return np.asarray(network(*pictures, normalize=True).flatten().cpu())

    return frame_by_frame("lpips", found, reference, lpips, least=LEAST, at_once=at_once)


def check(*, net: str = "alex", weights: str | Path | None = None, device: str = "cpu", at_once: int = 16) -> Path:
    """Return the file of the backbone's weights. Raises what ``score`` raises, apart from the samples."""
    if net not in BACKBONES:
        raise BadOption("net", net, f"one of {', '.join(BACKBONES)}")
    if not isinstance(at_once, int) or at_once < 1:
        raise BadOption("at_once", at_once, "1 or more frames")
    device_named(device)
    for module in ("torchvision", "torchmetrics.functional.image.lpips"):
        package(module, purpose="lpips", install=INSTALL)
    return _find(net, weights)


def _find(net: str, weights: str | Path | None) -> Path:
    import torch.hub

    name = BACKBONES[net].file
    kept = Path(torch.hub.get_dir()) / "checkpoints" / name
    path = kept if weights is None else Path(weights)
    if not path.is_file():
        asked = "was not given, and is not in torch.hub's folder" if weights is None else "is not there"
        raise MissingWeightsError(
            f"LPIPS with net={net!r} needs {name}, torchvision's ImageNet weights of {BACKBONES[net].network}. It "
            f"{asked}: {path}. Nothing is downloaded here. Fetch https://download.pytorch.org/models/{name} where "
            f"there is a network; then pass weights='…/{name}', or put it at {kept}."
        )
    return path


@functools.lru_cache(maxsize=len(BACKBONES))
def _network(net: str, path: Path, _changed: int) -> Any:
    """LPIPS with the backbone's weights from ``path``. ``_changed``: a file that was written anew is read anew."""
    import torch

    measure = package("torchmetrics.functional.image.lpips", purpose="lpips", install=INSTALL)
    # torchmetrics' public class can only fetch the backbone by itself. Its network can be made with a random one
    # (pnet_rand), which is then filled; the random numbers are not taken from the user's generator.
    with torch.random.fork_rng(devices=[]):
        network = measure._NoTrainLpips(net=net, pnet_rand=True)
    backbone = network.net
    own = _read(net, path)
    # Parts are called slice1.0.weight or slices.0.0.weight here, features.0.weight there; the numbers are the same.
    named = {key: "features." + key.split(".", 2 if net == "squeeze" else 1)[-1] for key in backbone.state_dict()}
    try:
        absent = [name for name in named.values() if name not in own]
        if absent:
            raise _wrong(net, path, f"it has no {absent[0]!r}")
        backbone.load_state_dict({key: own[name] for key, name in named.items()})
    except (TypeError, RuntimeError) as error:  # no mapping of names to tensors; tensors of other shapes
        raise _wrong(net, path, str(error).splitlines()[-1].strip()) from error
    return network


def _read(net: str, path: Path) -> Any:
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever foreign bytes bring about, the reason is the same
        raise _wrong(net, path, f"it cannot be read as tensors ({type(error).__name__})") from error


def _wrong(net: str, path: Path, problem: str) -> WeightsError:
    return WeightsError(
        f"{path} is not the weights of {BACKBONES[net].network}, which net={net!r} asks for: {problem}. Allowed: "
        f"{BACKBONES[net].file}, whole, as torchvision offers it, or other weights of that network. Nothing in it ran."
    )
