"""Kept tensors in fewer bytes: formats, and what packs and unpacks them. Plain torch, which is the specification."""

from diffcache.kernels.formats import FORMATS, Format, format_of
from diffcache.kernels.packing import Packed, pack, unpack

__all__ = ["FORMATS", "Format", "Packed", "format_of", "pack", "unpack"]
