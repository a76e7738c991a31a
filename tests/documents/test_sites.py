"""Names of sites: where a sublayer lies, and in which order sublayers run."""

from __future__ import annotations

import pytest

from diffcache.documents.sites import SiteLocation, feeds_forward, in_order, location

pytestmark = pytest.mark.fast


def test_names_are_taken_apart() -> None:
    assert location("sublayer:transformer_blocks.12.attn2") == SiteLocation("transformer_blocks", 12, "attn2")
    assert location("sublayer:net.blocks.3.inner.ff") == SiteLocation("net.blocks", 3, "inner.ff")
    assert location("block:blocks.3") == SiteLocation("blocks", 3, "")
    assert location("stack:blocks") == SiteLocation("blocks", 0, "")


@pytest.mark.parametrize("part", ["ff", "ff_context", "mlp", "ffn", "feed_forward", "img_mlp", "net"])
def test_feed_forwards_are_what_is_not_attention(part: str) -> None:
    assert feeds_forward(f"sublayer:blocks.0.{part}")


@pytest.mark.parametrize("part", ["attn", "attn1", "attn2", "self_attn", "cross_attention", "self_attention"])
def test_attention_is_known_by_its_name(part: str) -> None:
    assert not feeds_forward(f"sublayer:attn_blocks.0.{part}")


@pytest.mark.parametrize(
    "names",
    [
        ["sublayer:blocks.2.ff", "sublayer:blocks.10.attn"],
        ["sublayer:blocks.0.self_attn", "sublayer:blocks.0.ffn", "sublayer:blocks.1.attn"],
        ["sublayer:transformer_blocks.9.ff", "sublayer:single_transformer_blocks.0.attn"],
        ["sublayer:double_stream_blocks.0.attn", "sublayer:single_stream_blocks.0.attn"],
        ["sublayer:joint_transformer_blocks.0.attn", "sublayer:single_transformer_blocks.0.attn"],
        ["sublayer:noise_refiner.1.attn", "sublayer:layers.0.attn"],
        ["sublayer:text_transformer_blocks.1.attn", "sublayer:visual_transformer_blocks.0.attn"],
        ["sublayer:vace_blocks.1.attn1", "sublayer:blocks.0.attn1"],
    ],
)
def test_sublayers_are_put_in_the_order_in_which_they_run(names: list[str]) -> None:
    assert in_order(names) == in_order(reversed(names)) == names


def test_the_order_of_lists_may_be_said() -> None:
    names = ["sublayer:a.0.ff", "sublayer:b.0.ff", "sublayer:single.0.ff"]
    assert in_order(names) == names
    assert in_order(names, ["single", "b"]) == names[::-1]
