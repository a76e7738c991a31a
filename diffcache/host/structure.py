"""Find the sites of a denoiser from its structure.

Sites are blocks repeated in a list, and the attention and feed-forward layers inside them; in a U-Net, the deep branch.
Torch's own transformers hold their list one level further down, and their decoder layers have a method as feed-forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import cast

from torch import nn

from diffcache.patch import BoundMethod

ATTENTION = ("Attention", "Attn")
FEED_FORWARD = ("FeedForward", "MLP", "Mlp", "FFN", "SwiGLU", "MoE")
FEED_FORWARD_NAMES = ("mlp", "ff", "ffn", "feed_forward")  # names of parts that are a bare nn.Sequential
DEEP_STACK = "stack:up_blocks"  # the deep branch of a U-Net
NO_CHAINS = {  # lists of which more than the last block's output is used, which the structure does not show
    ("WanVACETransformer3DModel", "vace_blocks"),  # each block also returns a hint for a block of the other list
}


def find_sites(denoiser: nn.Module) -> Mapping[str, tuple[nn.Module, ...]]:
    """Return the sites of a denoiser.

    A stack is a ``ModuleList`` directly under the denoiser, or under a transformer of torch there, whose items are of
    one class and contain attention or a feed-forward. A U-Net has one stack, ``stack:up_blocks``, whose parts differ:
    see ``deep_branch``. Models with neither have only the ``model`` site.

    Returns:
        Site name -> the modules whose calls make up the site: one, or all blocks of a stack in order.
    """
    sites: dict[str, tuple[nn.Module, ...]] = {"model": (denoiser,)}
    if deep := deep_branch(denoiser):
        return sites | {DEEP_STACK: deep}
    for list_name, blocks in _lists(denoiser):
        if len(blocks) < 2 or not _regular(blocks):
            continue
        if (type(denoiser).__name__, list_name) not in NO_CHAINS:
            sites[f"stack:{list_name}"] = tuple(blocks)
        for i, block in enumerate(blocks):
            sites[f"block:{list_name}.{i}"] = (block,)
            for name, part in _sublayers(block):
                sites[f"sublayer:{list_name}.{i}.{name}"] = (part,)
    return sites


def _lists(denoiser: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """Yield the lists of blocks of a denoiser, with their paths."""
    for name, child in denoiser.named_children():
        if isinstance(child, nn.ModuleList):
            yield name, child
        elif isinstance(child, (nn.TransformerDecoder, nn.TransformerEncoder)):
            yield f"{name}.layers", child.layers


def _sublayers(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the attention and feed-forward layers of a block, with their paths.

    Those of torch's encoder layer are left out: in evaluation mode it runs one fused operation and does not call them.
    """
    if isinstance(block, nn.TransformerEncoderLayer):
        return
    for name, part in block.named_children():
        if _kind(part) or (isinstance(part, nn.Sequential) and name in FEED_FORWARD_NAMES):
            yield name, part
    if isinstance(block, nn.TransformerDecoderLayer):
        yield "_ff_block", cast(nn.Module, BoundMethod(block, "_ff_block"))


def deep_branch(denoiser: nn.Module) -> tuple[nn.Module, ...]:
    """Return the parts of a U-Net of which the shallow rest uses the last output alone, in the order in which they run.

    If each layer of the last up block has a separate skip connection, these are all parts except the first and the last
    convolution and the last layer of that block. This is the cut of CacheQuant (arXiv 2503.01323), and that of
    DeepCache (arXiv 2312.00858) at its first skip connection. Otherwise they are all parts between the first down block
    and the last up block.

    Returns:
        The parts; empty for other networks.
    """
    below, above = (getattr(denoiser, name, None) for name in ("down_blocks", "up_blocks"))
    if not isinstance(below, nn.ModuleList) or not isinstance(above, nn.ModuleList) or not below or not above:
        return ()
    if any(isinstance(block, nn.ModuleList) for block in (*below, *above)):
        return ()  # Stable Cascade has lists of lists, and calls their members one by one
    (first, *down), (*up, last) = below, above
    middle = [m for m in [getattr(denoiser, "mid_block", None)] if isinstance(m, nn.Module)]
    columns = _columns(last)
    if not columns:
        return (*down, *middle, *up)
    layers = [part for row in zip(*columns, strict=True) for part in row]
    return (first, *down, *middle, *up, *layers[: -len(columns)])


def _columns(block: nn.Module) -> list[nn.ModuleList]:
    """Return the lists that the layers of an up block consist of: its resnets, which run first, and lists as long.

    The result is empty if the last layer has no separate skip connection, or if an input goes past that layer.
    """
    resnets = getattr(block, "resnets", None)
    if not isinstance(resnets, nn.ModuleList) or len(resnets) < 2 or hasattr(block, "skip_conv"):
        return []
    widths = [[m for m in resnets[i].modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d))] for i in (-2, -1)]
    if not all(widths) or widths[1][0].in_channels <= widths[0][-1].out_channels:
        return []
    others = [part for part in block.children() if isinstance(part, nn.ModuleList) and part is not resnets]
    return [resnets, *(part for part in others if len(part) == len(resnets))]


def first_norm(block: nn.Module) -> nn.Module | None:
    """Return the normalisation that a block begins with, or None if it has none.

    In most blocks it also modulates the normalised values by the timestep. Normalisations inside the block's parts (of
    queries and keys) come later in the forward, regardless of the order of registration.
    """
    found = [(path, m) for path, m in block.named_modules() if m is not block and "Norm" in type(m).__name__]
    return min(found, key=lambda f: f[0].count("."))[1] if found else None


def _regular(blocks: nn.ModuleList) -> bool:
    """Return whether the blocks are of one class and contain attention or a feed-forward.

    A list of bare attention modules is not a chain of blocks: ConsisID and Wan Animate add the output of each to the
    state at different places.
    """
    alike = len({type(block) for block in blocks}) == 1 and not isinstance(blocks[0], nn.ModuleList)
    parts_themselves = type(blocks[0]).__name__.endswith(ATTENTION + FEED_FORWARD)
    return alike and not parts_themselves and any(map(_kind, blocks[0].modules()))


def _kind(module: nn.Module) -> bool:
    """Return whether a module is attention or a feed-forward, by the name of its class."""
    return any(word in type(module).__name__ for word in ATTENTION + FEED_FORWARD)
