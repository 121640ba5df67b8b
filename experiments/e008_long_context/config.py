"""008: longer T, where scores are most of the FLOPs: what do unions of heads save?"""

from __future__ import annotations

from typing import Any

from experiments.e004_ablation import config as ablation
from experiments.shared.case import Case, Study, change
from uoe_jax.config import ExperimentConfig
from uoe_jax.presets import as_moe


def base(tiny: bool) -> ExperimentConfig:
    """Return 004's dense model at eight times its T, as many bytes a batch."""
    config = ablation.base(tiny)
    longer = 128 if tiny else 4096
    batch = config.data.batch_size * config.model.max_seq_len // longer
    return change(config, model={"max_seq_len": longer}, data={"batch_size": batch})


def study(tiny: bool) -> Study:
    """Return dense, a mixture and unions of heads; `same heads` halves them."""
    dense = base(tiny)
    seeds = (0,) if tiny else (0, 1, 2)
    f, heads = dense.model.d_ff, dense.model.num_heads
    wide = {"mlp": ("union",), "d_ff": 2 * f}
    wide |= {"union": {"num_experts": 16, "top_k": 8}}

    def case(name: str, config: ExperimentConfig | None = None, **model: Any) -> Case:
        changed = change(config or dense, model=model)
        return Case(name=name, config=changed, seeds=seeds, family="all")

    def smha(name: str, times: int, attention: dict[str, Any], **more: Any) -> Case:
        count = times * heads
        own = {"num_experts": count, "top_k": count // 2} | attention
        sides = {"num_heads": count, "num_kv_heads": count}
        kind = {"attention": ("union",), "union_attention": own}
        return case(name, **kind, **sides, **more)

    cases = (
        case("dense"),
        smha("SMHA 4 of 8", 2, {}),
        smha("SMHA 2 of 4, same heads", 1, {}),
        smha("SMHA 4 of 8, two always on", 2, {"num_shared": 2}),
        smha("routed queries, 4 of 8", 2, {"shared_kv": True}),
        case("UoME 8 of 16", **wide),
        smha("SMHA 4 of 8 + UoME 8 of 16", 2, {}, **wide),
        case("MoE 2 of 8", as_moe(dense)),
    )
    return Study(
        title="Language modelling, bytes of English Wikipedia, T 4096",
        metric="bits_per_byte",
        cases=cases,
        rivals=("MoE 2 of 8",),
    )
