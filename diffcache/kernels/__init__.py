"""Formats that keep tensors in fewer bytes, and the kernels that quantize, dequantize and predict.

Each folder holds one operation: its contract, the plain-torch form that specifies it, and a Triton kernel.
"""

from diffcache.kernels.formats import FORMATS, Format, format_of
from diffcache.kernels.packing import Packed, from_kept, pack, pack_again, packed_bytes, unpack

__all__ = ["FORMATS", "Format", "Packed", "format_of", "from_kept", "pack", "pack_again", "packed_bytes", "unpack"]
