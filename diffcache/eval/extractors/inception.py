"""The Inception network of FID (Heusel et al. 2017, arXiv 1706.08500), with 2048 pooled features.

The network is built by torch-fidelity. Pictures become 8-bit and are resized to 299 × 299 as in TensorFlow 1, bilinear
without antialiasing. Published values were computed in this way, and this extractor reproduces them. Parmar et al. 2022
(arXiv 2104.11222) show that the filter aliases when it shrinks pictures. A distance with a better filter would not be
comparable with published values.

No package contains the weights. A file is recognised by its sha256, not by its name.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from diffcache.errors import BadOption
from diffcache.eval.extractors import INCEPTION, Extractor
from diffcache.eval.requirements import WeightsError, package

FILES = (  # the names of the same file in pytorch-fid and in torch-fidelity
    "pt_inception-2015-12-05-6726825d.pth",
    "weights-inception-2015-12-05-6726825d.pth",
)
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
SOURCES = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/" + FILES[0],
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/" + FILES[1],
)
FEATURES = 2048
ALTERNATIVES = "Without it: the extractor 'efflite0' (reported as FD-EffLite0), or your own 'package.module:function'."


def extractor(*, weights: str | Path | None = None, device: str | torch.device = "cpu") -> Extractor:
    """Return the extractor on ``device``.

    Args:
        weights: The file of the weights, or the folder that contains it. None: torch.hub's folder of checkpoints.
        device: The device on which the network runs.

    Raises:
        WeightsError: If the file is missing, or is another file.
        BadOption: If ``weights`` is empty.
        MissingPackageError: If torch-fidelity is not installed.
    """
    path = find(weights)
    fidelity = package(
        "torch_fidelity.feature_extractor_inceptionv3", purpose="FID", install="torch-fidelity"
    ).FeatureExtractorInceptionV3
    where = torch.device(device)
    network = fidelity("inception-v3-compat", [str(FEATURES)], feature_extractor_weights_path=str(path)).to(where)
    network.eval()

    def features(pictures: Tensor) -> Tensor:
        found: Tensor = network((pictures * 255).round().to(torch.uint8))[0]
        return found

    settings = {"weights": SHA256, "features": str(FEATURES), "resize": "299 bilinear as TensorFlow 1"}
    return Extractor(INCEPTION, features, settings, where)


def find(weights: str | Path | None) -> Path:
    """Return the file of the weights, after checking its sha256.

    Args:
        weights: The file, or the folder that contains it. None: torch.hub's folder of checkpoints.

    Raises:
        WeightsError: If the file is missing, or is another file.
        BadOption: If ``weights`` is empty.
    """
    if weights is not None and not str(weights):
        raise BadOption("weights", str(weights), "a file or a folder")
    where = Path(weights) if weights is not None else Path(torch.hub.get_dir()) / "checkpoints"
    candidates = [where / name for name in FILES] if weights is None or where.is_dir() else [where]
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        looked = f"no file {where}" if candidates == [where] else f"none of {' or '.join(FILES)} in {where}"
        raise WeightsError(
            f"FID needs its Inception network's weights: {looked}. Download them from {SOURCES[0]} or {SOURCES[1]}. "
            f"Put the file there, or name it with --weights FILE (weights=). {ALTERNATIVES}"
        )
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != SHA256:
        raise WeightsError(
            f"{path} is not the file of the FID network: its sha256 is {found[:16]}…, wanted is {SHA256[:16]}…. "
            f"Features of other weights are not called FID. Download it again: {SOURCES[0]}. {ALTERNATIVES}"
        )
    return path
