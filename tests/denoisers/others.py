"""What is neither picture, video nor sound, and what is called a model but is a part of one."""

from __future__ import annotations

from denoisers.tiny import TinyDenoiser

DENOISERS: tuple[TinyDenoiser, ...] = ()

NO_DENOISERS: dict[str, str] = {}
