"""Hash every byte of a tensor on its device, at the speed of its memory."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

BLOCK = 1 << 15  # words of 32 bits that share a pair of sums; the hashes depend on it
AT_ONCE = 512  # blocks that are hashed together on a GPU
ON_CPU = (
    1  # blocks on a CPU: PyTorch splits larger operations among threads, which wait for each other on a busy machine
)


def tensor_hash(tensor: Tensor) -> bytes:
    """Return a hash of the bytes of a dense tensor that changes if an element changes or moves.

    Each block of 128 KiB has two sums, in the order of the blocks. They are sums of integers modulo 2**64, so they do
    not depend on the device or on the order of addition. The first sum multiplies each word of 32 bits by a fixed
    random number of 64 bits. An accidental change leaves it the same with a probability of about 2**-32. The second sum
    first combines the upper half of each product with the lower half by exclusive or, so that it detects changes that
    the first does not. The hash does not resist an attacker.

    Args:
        tensor: Any dtype, shape, strides and device. Shape and dtype are not part of the hash.

    Returns:
        16 bytes per block, and up to 3 bytes that do not fill a word.
    """
    with torch.no_grad():
        flat = tensor.detach().contiguous().reshape(-1)
        if flat.storage_offset() * flat.element_size() % 4:
            flat = flat.clone()  # words of 32 bits have to begin at a multiple of 4 bytes
        raw = flat.view(torch.uint8)
        whole = raw.numel() // 4 * 4
        words, rest = raw[:whole].view(torch.int32), raw[whole:]
        full = words.numel() // BLOCK * BLOCK
        keys = _keys(words.device)
        at_once = ON_CPU if words.device.type == "cpu" else AT_ONCE
        rows = words[:full].view(-1, BLOCK)
        sums = [_sums(rows[n : n + at_once], keys) for n in range(0, len(rows), at_once)]
        if full < words.numel():
            sums.append(_sums(words[full:].view(1, -1), keys[: words.numel() - full]))
        found = torch.cat(sums).cpu().numpy().tobytes() if sums else b""
    return found + rest.cpu().numpy().tobytes()


def _sums(rows: Tensor, keys: Tensor) -> Tensor:
    """Return the two sums of each block.

    Args:
        rows: int32 [R, W], the words.
        keys: int64 [W], the multipliers.

    Returns:
        int64 [R, 2].
    """
    mixed = rows.to(torch.int64).mul_(keys)
    plain = mixed.sum(dim=1)
    folded = mixed.bitwise_xor_(mixed >> 32).sum(dim=1)
    return torch.stack([plain, folded], dim=1)


@functools.lru_cache(maxsize=16)
def _keys(device: torch.device) -> Tensor:
    """Return the multipliers, odd int64 [BLOCK], on ``device``.

    They are the output of SplitMix64 (Steele, Lea and Flood 2014), equal on every machine.
    """
    with np.errstate(over="ignore"):
        z = np.arange(1, BLOCK + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = (z ^ (z >> np.uint64(31))) | np.uint64(1)
    return torch.from_numpy(z.view(np.int64)).to(device)
