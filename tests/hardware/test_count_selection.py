"""FLOPs of attention whose samples select experts: sets hold whole samples."""

import dataclasses

import pytest

from uoe_jax.config import ModelConfig, UnionConfig
from uoe_jax.hardware.count import flops_per_token

pytestmark = pytest.mark.both_jax

# Four experts of one head, width 2; eight tokens of one sample.
MODEL = ModelConfig(
    kind="encoder",
    d_model=8,
    d_ff=16,
    num_layers=1,
    num_heads=4,
    num_kv_heads=4,
    head_dim=2,
    attention=("union",),
)


def pairs(kind, **union):
    """(query, key, head) triples of eight tokens, from the counted FLOPs."""
    config = dataclasses.replace(
        MODEL, kind=kind, union=UnionConfig(num_experts=4, top_k=2, **union)
    )
    scores = flops_per_token(config, 8).parts["attention scores"]
    return 8 * scores / (4 * 2)  # a product and a weighted sum of 2 numbers


def test_selected_experts_see_the_whole_sample():
    # Two experts see all eight tokens, two see none.
    assert pairs("encoder", router="selection") == 2 * 8 * 8
    assert pairs("decoder", router="selection") == 2 * (8 * 9 / 2)
    # Tokens that choose for themselves: four experts with half of the tokens each.
    assert pairs("encoder") == 4 * 4 * 4
    assert pairs("encoder", router="expert_choice") == 4 * 4 * 4


def test_tokens_spread_over_the_experts_their_sample_selected():
    # Three experts share 8 tokens x 2 picks.
    found = pairs("encoder", router="hierarchical", selected=3)
    assert found == pytest.approx(3 * (16 / 3) ** 2)
    # All four selected: as if tokens alone chose. Two: as if samples alone did.
    assert pairs("encoder", router="hierarchical", selected=4) == pairs("encoder")
    assert pairs("encoder", router="hierarchical", selected=2) == 2 * 8 * 8
    # One of them always on, for every token; two others share one pick each.
    found = pairs("encoder", router="hierarchical", selected=3, num_shared=1)
    assert found == 8 * 8 + 2 * 4 * 4
