"""004: gates, routers, balance and sizes of a union, one change at a time."""

from __future__ import annotations

from typing import Any

from experiments.e001_language import config as language
from experiments.shared.case import Case, Study, change
from uoe_jax.config import ExperimentConfig


def base(tiny: bool) -> ExperimentConfig:
    """Return a dense model of width 256 on 20M bytes, as 001 in other respects."""
    config = language.base(tiny)
    if tiny:
        return config
    return change(
        config,
        model={
            "d_model": 256,
            "d_ff": 1024,
            "num_layers": 6,
            "num_heads": 4,
            "num_kv_heads": 4,
        },
        data={"batch_size": 64},
        optim={"learning_rate": 2e-3, "warmup_steps": 60},
        train={"steps": 620},
    )


def study(tiny: bool) -> Study:
    """Return the union of MLP experts, 8 of 16, and what differs from it in one way."""
    dense = base(tiny)
    seeds = (0,) if tiny else (0, 1, 2)
    f, heads = dense.model.d_ff, dense.model.num_heads
    union = {"num_experts": 16, "top_k": 8}
    wide = {"mlp": ("union",), "d_ff": 2 * f}
    more_heads = {"attention": ("union",), "num_heads": 2 * heads}
    more_heads |= {"num_kv_heads": 2 * heads}
    own = {"num_experts": 2 * heads, "top_k": heads}

    def case(name: str, model: dict[str, Any] | None = None, **options: Any) -> Case:
        config = change(dense, model=model or {}, optim=options)
        return Case(name=name, config=config, seeds=seeds, family="union")

    def uome(name: str, **changed: Any) -> Case:
        return case(name, wide | {"union": union | changed})

    def smha(name: str, **changed: Any) -> Case:
        model = wide | more_heads | {"union": union}
        return case(name, model | {"union_attention": own | changed})

    cases = (
        uome("UoME 8 of 16"),
        uome("gate softmax", gate="softmax"),
        uome("gate straight-through", gate="straight_through"),
        case("router untrained", wide | {"union": union}, router_lr_scale=0.0),
        smha("SMHA"),
        uome("2 of 4", num_experts=4, top_k=2),
        uome("16 of 32", num_experts=32, top_k=16),
        uome("no balance loss", balance_loss=0.0),
        uome("loss-free balance", balance_loss=0.0, bias_update_rate=0.001),
        uome("patches of 4", patch_size=4),
        uome("patches of 16", patch_size=16),
        smha("SMHA, a quarter always on", num_shared=max(heads // 2, 1)),
        smha("routed queries, shared keys", shared_kv=True),
        smha("SMHA, straight-through", gate="straight_through"),
        uome("one expert always on", num_shared=1),
        uome("selection by segments", router="selection"),
        uome("hierarchical 12, then 8", router="hierarchical", selected=12),
        case("router rate x 0.3", wide | {"union": union}, router_lr_scale=0.3),
        case("router rate x 3", wide | {"union": union}, router_lr_scale=3.0),
        uome("balance loss 0.1", balance_loss=0.1),
        case("dense"),
    )
    return Study(
        title="What a union needs: one change at a time",
        metric="bits_per_byte",
        cases=cases,
        origin="UoME 8 of 16",
    )
