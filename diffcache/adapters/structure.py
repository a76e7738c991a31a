"""Find the sites of a denoiser from how it is built: blocks repeated in a list, attention and feed-forward inside."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

ATTENTION = ("Attention", "Attn")
FEED_FORWARD = ("FeedForward", "MLP", "Mlp", "FFN")


def find_sites(denoiser: nn.Module) -> Mapping[str, tuple[nn.Module, ...]]:
    """Site name -> the modules whose calls make it up (one, or all blocks of a stack in order).

    A stack is a ``ModuleList`` directly under the denoiser whose items are of one class and contain attention or a
    feed-forward. Models without one (U-Nets: their blocks differ) have the ``model`` site alone.
    """
    sites: dict[str, tuple[nn.Module, ...]] = {"model": (denoiser,)}
    for list_name, blocks in denoiser.named_children():
        if not isinstance(blocks, nn.ModuleList) or len(blocks) < 2 or not _regular(blocks):
            continue
        sites[f"stack:{list_name}"] = tuple(blocks)
        for i, block in enumerate(blocks):
            sites[f"block:{list_name}.{i}"] = (block,)
            for name, part in block.named_children():
                if _kind(part):
                    sites[f"sublayer:{list_name}.{i}.{name}"] = (part,)
    return sites


def first_norm(block: nn.Module) -> nn.Module | None:
    """The normalisation that a block begins with; most of them also modulate what they normalise by the timestep. Those
    inside its parts (of queries and keys) come later, wherever they are registered."""
    found = [(path, m) for path, m in block.named_modules() if m is not block and "Norm" in type(m).__name__]
    return min(found, key=lambda f: f[0].count("."))[1] if found else None


def _regular(blocks: nn.ModuleList) -> bool:
    return len({type(block) for block in blocks}) == 1 and any(_kind(part) for part in blocks[0].modules())


def _kind(module: nn.Module) -> bool:
    return any(word in type(module).__name__ for word in ATTENTION + FEED_FORWARD)
