"""Every router and routed baseline, in models of one layer."""

from __future__ import annotations

from tests.model.tiny_models import tiny
from uoe_jax.config import HeadGroups, MobaConfig, ModConfig, ModelConfig, UnionConfig

# A union of attention and MLP for each router.
CAUSAL = {
    "token": {},
    "patch": {"patch_size": 3},
    "always-on": {"num_shared": 1},
    "capacity": {"capacity_factor": 0.75},
    "selection": {"router": "selection", "segment_size": 3},
    "hierarchical": {"router": "hierarchical", "segment_size": 3, "selected": 3},
    "threshold": {"router": "threshold", "num_shared": 1},
    "relu": {"router": "threshold", "gate": "relu", "most_picks": 3},
    "shared keys": {"shared_kv": True},
    "gated values": {"gated_values": True, "num_shared": 1},
    "key router": {"gated_values": True, "key_router": True, "num_shared": 1},
}
LOOKING = {"expert choice": {"router": "expert_choice"}}
# Baselines that choose something else than experts of a union.
OTHERS = {
    "moh": {
        "attention": ("moh",),
        "union": UnionConfig(num_experts=4, top_k=3, num_shared=1),
    },
    "moba": {"attention": ("moba",), "moba": MobaConfig(block_size=3, top_k=2)},
    "head groups": {
        "attention": ("union",),
        "union": UnionConfig(num_experts=4, top_k=2),
        "head_groups": HeadGroups(local=2, window=4, full=2),
    },
    "convolution": {
        "attention": ("union",),
        "union": UnionConfig(num_experts=4, top_k=2),
        "convolution": 4,
    },
    "output gate": {
        "attention": ("union",),
        "union": UnionConfig(num_experts=4, top_k=2),
        "output_gate": True,
    },
    "sink": {
        "attention": ("union",),
        "union": UnionConfig(num_experts=4, top_k=2),
        "head_groups": HeadGroups(local=2, window=4),
        "sink": True,
    },
    "mod": {"blocks": ("mod",), "mod": ModConfig(capacity_factor=0.75)},
}
LENGTH = 12


def config_of(kind: str, name: str) -> ModelConfig:
    if name in OTHERS:
        return tiny(kind=kind, num_layers=1, **OTHERS[name])
    union = UnionConfig(num_experts=4, top_k=2, **{**CAUSAL, **LOOKING}[name])
    return tiny(
        kind=kind, num_layers=1, attention=("union",), mlp=("union",), union=union
    )
