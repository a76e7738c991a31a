"""Every network of diffusers that can stand in a sampling loop, small, and a loop to put it in.

    from denoisers import TINY, Loop
    pipe = Loop(TINY["LatteTransformer3DModel"].build())
    latents = pipe(batch=2, generator=torch.Generator().manual_seed(0))

A class is in one of the files of this folder, in ``pipelines.TINY`` with its pipeline, or in ``NO_DENOISERS``
with the reason; ``test_denoisers.py`` walks diffusers and misses none.
"""

from __future__ import annotations

import diffusers

from denoisers import audio, others, pictures_a_to_i, pictures_j_to_z, unets, videos_a_to_i, videos_j_to_z
from denoisers.tiny import Loop, TinyDenoiser

ROOMS = (pictures_a_to_i, pictures_j_to_z, videos_a_to_i, videos_j_to_z, audio, unets, others)

TINY: dict[str, TinyDenoiser] = {
    one.name: one
    for room in ROOMS
    for one in room.DENOISERS
    if hasattr(diffusers, one.name)  # older ones have fewer
}

NO_DENOISERS: dict[str, str] = {name: reason for room in ROOMS for name, reason in room.NO_DENOISERS.items()}

__all__ = ["NO_DENOISERS", "TINY", "Loop", "TinyDenoiser"]
