"""What a page says about the colours of an example's tokens and patches."""

import dataclasses
from pathlib import Path

from uoe_jax.config import MoeConfig, UnionOverrides
from uoe_jax.presets import get_preset
from uoe_jax.report.build import _about_routing as about_routing
from uoe_jax.report.read import Run, experts_choose


def words(name, what, **model):
    config = get_preset(name)
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, **model)
    )
    return about_routing(Run(Path(), "run", config), what)


def test_colours_are_the_best_experts_unless_experts_choose():
    text, image = words("tiny-union", "text"), words("digits-vit-union", "image")
    assert "each token" in text and "hover" in text and "scored highest" in text
    assert "each patch" in image and "its number" in image and "hover" not in image
    assert "experts choose" not in text + image
    own = UnionOverrides(router="expert_choice")
    found = words("digits-vit-union", "image", union_attention=own)
    assert "of the first that took it, and a patch that none took is bare" in found


def test_where_experts_choose():
    assert not experts_choose(get_preset("tiny-union").model)
    assert not experts_choose(get_preset("tiny-mod").model)
    mixture = get_preset("digits-vit-expert-choice").model
    assert experts_choose(mixture)
    # A router that no layer uses doesn't count.
    assert not experts_choose(dataclasses.replace(mixture, mlp=("dense",)))
    unused = MoeConfig(router="expert_choice")
    assert not experts_choose(
        dataclasses.replace(get_preset("digits-vit-union").model, moe=unused)
    )
