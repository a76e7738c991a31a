"""Learned perceptual image patch similarity (Zhang, Isola, Efros, Shechtman and Wang 2018, arXiv 1801.03924).

The measure and its linear heads (version 0.1) are those of torchmetrics. The ImageNet weights of the backbone are files
of torchvision. They are never downloaded: they are read from ``weights`` or from torch.hub's folder.
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
    of_pictures=True,
)


class Backbone(NamedTuple):
    """A network that supplies the features for LPIPS.

    Attributes:
        network: Name of the network in torchvision.
        file: Name of its weights in torchvision. The last eight characters are the beginning of its digest.
    """

    network: str
    file: str  # the last eight characters are from its digest


BACKBONES = {
    "alex": Backbone("alexnet", "alexnet-owt-7be5be79.pth"),
    "vgg": Backbone("vgg16", "vgg16-397923af.pth"),
    "squeeze": Backbone("squeezenet1_1", "squeezenet1_1-b8a52dc0.pth"),
}
INSTALL = "'diffcache[eval]'"
LEAST = 32  # pixels; below that AlexNet's last feature map is empty


class MissingWeightsError(WeightsError, FileNotFoundError):
    """There is no file of the backbone's weights."""


def score(
    found: np.ndarray,
    reference: np.ndarray,
    *,
    net: str = "alex",
    weights: str | Path | None = None,
    device: str = "cpu",
    at_once: int = 16,
) -> np.ndarray:
    """Return the LPIPS distance, float64 [N], of pictures, or its mean over the frames of videos.

    The network runs in float32.

    Args:
        found: Pictures [N, H, W, 3] or videos [N, F, H, W, 3] of a method, in 0..1, with sides of 32 pixels or more.
        reference: The pictures or videos of the full run, of the same shape.
        net: The backbone: alex (which the authors recommend for comparisons), vgg or squeeze.
        weights: torchvision's file of that backbone's weights. None: the file in torch.hub's folder of checkpoints.
        device: The device on which the network runs.
        at_once: Number of frames that the network takes at once.

    Raises:
        BadOption: If an option is not valid.
        MissingPackageError: If torchvision or torchmetrics is not installed.
        MissingWeightsError: If there is no file of weights.
        WeightsError: If the file does not contain the weights of this backbone.
        SamplesError: If the arrays are not valid.
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
    """Return the file of the backbone's weights.

    Raises:
        BadOption: If an option is not valid.
        MissingPackageError: If torchvision or torchmetrics is not installed.
        MissingWeightsError: If there is no file of weights.
    """
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
    """Return LPIPS with the backbone's weights from ``path``.

    Args:
        net: The backbone.
        path: File of its weights.
        _changed: Time of the file's last change, so that the cache does not return an older file.
    """
    import torch

    measure = package("torchmetrics.functional.image.lpips", purpose="lpips", install=INSTALL)
    # The public class of torchmetrics always downloads the backbone. Its network can be made with a random backbone
    # (pnet_rand), which is then filled. The random numbers are not taken from the user's generator.
    with torch.random.fork_rng(devices=[]):
        network = measure._NoTrainLpips(net=net, pnet_rand=True)
    backbone = network.net
    own = _read(net, path)
    # torchmetrics: slice1.0.weight or slices.0.0.weight; torchvision: features.0.weight, with the same numbers.
    named = {key: "features." + key.split(".", 2 if net == "squeeze" else 1)[-1] for key in backbone.state_dict()}
    try:
        absent = [name for name in named.values() if name not in own]
        if absent:
            raise _wrong(net, path, f"it has no {absent[0]!r}")
        backbone.load_state_dict({key: own[name] for key, name in named.items()})
    except (TypeError, RuntimeError) as error:  # not a mapping of names to tensors, or tensors of other shapes
        raise _wrong(net, path, str(error).splitlines()[-1].strip()) from error
    return network


def _read(net: str, path: Path) -> Any:
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file of another format can raise any class
        raise _wrong(net, path, f"it cannot be read as tensors ({type(error).__name__})") from error


def _wrong(net: str, path: Path, problem: str) -> WeightsError:
    return WeightsError(
        f"{path} is not the weights of {BACKBONES[net].network}, which net={net!r} asks for: {problem}. Allowed: "
        f"{BACKBONES[net].file}, whole, as torchvision offers it, or other weights of that network. Nothing in it ran."
    )
