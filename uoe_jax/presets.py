"""Named experiments and the one-dial family `sized(depth)`. Imports no jax."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

from uoe_jax.config import (
    DataConfig,
    ExperimentConfig,
    LayerWidths,
    MobaConfig,
    ModelConfig,
    MoeConfig,
    OptimConfig,
    TrainConfig,
    UnionConfig,
    UnionOverrides,
)
from uoe_jax.errors import ConfigError, nearest


def sized(depth: int, *, compute_dtype: str = "bfloat16") -> ExperimentConfig:
    """Return a decoder whose width, heads and learning rate follow its depth.

    Width is 64 a layer, heads are 64 wide (128 where that divides a width of 768 or
    more: attention kernels run fastest there), the MLP is 4 times the width, and the
    learning rate falls with the square root of the width.
    """
    if depth < 2:
        raise ConfigError(f"depth is {depth}; sized models start at 2 layers")
    d_model = 64 * depth
    head_dim = 128 if d_model >= 768 and d_model % 128 == 0 else 64
    heads = d_model // head_dim
    return ExperimentConfig(
        name=f"sized-{depth}",
        model=ModelConfig(
            vocab_size=32_768,
            max_seq_len=2048,
            d_model=d_model,
            d_ff=4 * d_model,
            num_layers=depth,
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=head_dim,
            union=UnionConfig(num_experts=heads, top_k=heads // 2),
            compute_dtype=compute_dtype,  # type: ignore[arg-type]
        ),
        data=DataConfig(tokenizer="bpe", bpe_vocab_size=32_768, batch_size=64),
        optim=OptimConfig(
            learning_rate=round(6e-4 * (768 / d_model) ** 0.5, 7), warmup_steps=200
        ),
        train=TrainConfig(
            steps=5000, eval_every=500, save_every=500, loss_chunk=16_384
        ),
    )


def _tiny() -> ExperimentConfig:
    """A byte model that trains on two CPU cores in minutes."""
    return ExperimentConfig(
        name="tiny",
        model=ModelConfig(
            vocab_size=256,
            max_seq_len=256,
            d_model=128,
            d_ff=512,
            num_layers=4,
            num_heads=8,
            num_kv_heads=8,
            head_dim=16,
        ),
        data=DataConfig(batch_size=16),
        optim=OptimConfig(learning_rate=3e-3),
        train=TrainConfig(steps=300),
    )


def _small() -> ExperimentConfig:
    """About 125M parameters: 12 layers of width 768, six heads of 128."""
    base = sized(12)
    # Unrolled: a scan over layers copies every activation into a stack (H200: 25%).
    model = dataclasses.replace(base.model, vocab_size=50_304, scan_layers=False)
    data = dataclasses.replace(base.data, bpe_vocab_size=50_304)
    return dataclasses.replace(base, name="small", model=model, data=data)


def _one_billion() -> ExperimentConfig:
    """About 1.4B parameters: 24 layers, width 2048, heads of 128, SwiGLU."""
    return ExperimentConfig(
        name="1b",
        model=ModelConfig(
            vocab_size=32_768,
            max_seq_len=8192,
            d_model=2048,
            d_ff=6144,  # 3 times the width: SwiGLU, and 384 = 3 * 128 an expert
            num_layers=24,
            num_heads=16,
            num_kv_heads=16,
            head_dim=128,
            activation="swiglu",
            tie_embeddings=False,
            rope_theta=500_000.0,
            union=UnionConfig(num_experts=16, top_k=8),
            remat="auto",
            compute_dtype="bfloat16",
        ),
        data=DataConfig(tokenizer="bpe", bpe_vocab_size=32_768, batch_size=16),
        optim=OptimConfig(learning_rate=3e-4, warmup_steps=500),
        train=TrainConfig(steps=20_000, eval_every=1000, save_every=1000),
    )


def _seven_billion() -> ExperimentConfig:
    """About 7.2B parameters; 32 query heads share 8 key/value heads."""
    base = _one_billion()
    model = dataclasses.replace(
        base.model,
        d_model=4096,
        d_ff=14_336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        union=UnionConfig(num_experts=8, top_k=4),
    )
    optim = dataclasses.replace(base.optim, learning_rate=2e-4, warmup_steps=1000)
    return dataclasses.replace(base, name="7b", model=model, optim=optim)


def _digits_vit() -> ExperimentConfig:
    """A vision transformer on scikit-learn's 8x8 digits, one token per 2x2 pixels."""
    return ExperimentConfig(
        name="digits-vit",
        model=ModelConfig(
            kind="vision",
            max_seq_len=16,
            d_model=64,
            d_ff=256,
            num_layers=4,
            num_heads=4,
            num_kv_heads=4,
            head_dim=16,
            position="learned",
            norm="layernorm",
            use_bias=True,
            tie_embeddings=False,
            union=UnionConfig(num_experts=4, top_k=2),
        ),
        data=DataConfig(source="digits", batch_size=64),
        optim=OptimConfig(learning_rate=2e-3, weight_decay=0.05),
        train=TrainConfig(steps=400),
    )


def as_union(config: ExperimentConfig) -> ExperimentConfig:
    """Return the experiment with every attention and MLP block a union."""
    model = dataclasses.replace(config.model, attention=("union",), mlp=("union",))
    return dataclasses.replace(config, name=f"{config.name}-union", model=model)


def has_unions(model: ModelConfig) -> bool:
    """Whether some part of a model is a union, which has a control."""
    return "union" in (*model.attention, *model.mlp)


def as_control(config: ExperimentConfig) -> ExperimentConfig:
    """Return the plain dense experiment of a union's FLOPs, what unions are held to."""
    model = dense_control(config.model)
    return dataclasses.replace(config, name=f"{config.name}-control", model=model)


def dense_control(model: ModelConfig) -> ModelConfig:
    """Return the dense model whose products cost what a union's chosen experts cost.

    It has that share of the heads and of the MLP, over all layers; products of tokens
    with weights then differ by the router and by what doesn't divide. Its scores cost
    more: a union's shrink with the square of the share, a dense model's with the share.
    Raises ConfigError for a model that has no such control.
    """
    kinds = {*model.attention, *model.mlp} - {"dense", "union"}
    others = sorted(f"{kind} layers" for kind in kinds)
    others += ["shared_kv"] if model.union_for("attention").shared_kv else []
    others += ["layers of other widths"] if model.widths != LayerWidths() else []
    if others:
        raise ConfigError(
            f"a model with {' and '.join(others)} has no dense control; its unions "
            "must route whole heads and be among dense layers of one width"
        )

    def share(kinds: Sequence[str], part: Literal["attention", "mlp"]) -> float:
        keep = model.union_for(part).keep
        return sum(keep if kind == "union" else 1.0 for kind in kinds) / len(kinds)

    attention, mlp = zip(*model.layer_kinds, strict=True)
    heads = max(1, round(model.num_kv_heads * share(attention, "attention")))
    return dataclasses.replace(
        model,
        num_heads=heads * model.num_query_groups,
        num_kv_heads=heads,
        d_ff=max(1, round(model.d_ff * share(mlp, "mlp"))),
        attention=("dense",),
        mlp=("dense",),
        union=UnionConfig(num_experts=1, top_k=1),
        union_attention=UnionOverrides(),
    )


def as_moe(config: ExperimentConfig, **moe: Any) -> ExperimentConfig:
    """Return the experiment with every MLP a top-2 mixture of experts."""
    return _variant(config, "moe", mlp=("moe",), moe=MoeConfig(**moe))


def _variant(config: ExperimentConfig, name: str, **model: Any) -> ExperimentConfig:
    """Return the experiment with some fields of its model replaced."""
    changed = dataclasses.replace(config.model, **model)
    return dataclasses.replace(config, name=f"{config.name}-{name}", model=changed)


def baselines(config: ExperimentConfig) -> dict[str, ExperimentConfig]:
    """Return what unions are compared with, by name, as variants of a dense model.

    The mixtures cost what the dense MLP costs; the others save FLOPs, as published:
    Switch (Fedus et al. 2021), GShard's top-2 (Lepikhin et al. 2020), fine-grained
    experts with a shared one (DeepSeek-V3, 2024), mixture of depths in every other
    block (Raposo et al. 2024), mixture of heads at 75% of the heads (Jin et al. 2024)
    and block-sparse attention (MoBA, Lu et al. 2025).
    """
    model = config.model
    heads = model.num_kv_heads
    moe = {
        "switch": MoeConfig(top_k=1, gate="softmax_all", capacity_factor=1.25),
        "top2": MoeConfig(top_k=2, capacity_factor=1.25),
        "deepseek": MoeConfig(
            num_experts=16,
            top_k=4,
            num_shared=1,
            gate="sigmoid",
            balance_loss=0.0,
            bias_update_rate=0.001,
        ),
    }
    variants: dict[str, dict[str, Any]] = {
        name: {"mlp": ("moe",), "moe": mixture} for name, mixture in moe.items()
    }
    variants["mod"] = {"blocks": ("all", "mod")}
    union = UnionConfig(
        num_experts=heads, top_k=heads * 3 // 4, num_shared=heads // 4, gate="softmax"
    )
    variants["moh"] = {"attention": ("moh",), "union": union}
    size = max(16, model.max_seq_len // 8)
    variants["moba"] = {
        "attention": ("moba",),
        "moba": MobaConfig(block_size=size, top_k=3),
    }
    return {name: _variant(config, name, **model) for name, model in variants.items()}


def as_expert_choice(config: ExperimentConfig) -> ExperimentConfig:
    """Return the experiment with every MLP an expert-choice mixture, twice per token.

    Zhou et al. 2022; experts look at whole samples, so not for decoders.
    """
    moe = MoeConfig(router="expert_choice", gate="softmax_all", top_k=2)
    return _variant(config, "expert-choice", mlp=("moe",), moe=moe)


_BASES: dict[str, Callable[[], ExperimentConfig]] = {
    "tiny": _tiny,
    "small": _small,
    "1b": _one_billion,
    "7b": _seven_billion,
}

PRESETS: dict[str, Callable[[], ExperimentConfig]] = {
    **_BASES,
    **{
        f"{name}-moe": lambda make=make: as_moe(make()) for name, make in _BASES.items()
    },
    **{
        f"{name}-union": lambda make=make: as_union(make())
        for name, make in _BASES.items()
    },
    **{
        f"tiny-{name}": lambda name=name: baselines(_tiny())[name]
        for name in baselines(_tiny())
    },
    "digits-vit": _digits_vit,
    "digits-vit-union": lambda: as_union(_digits_vit()),
    "digits-vit-expert-choice": lambda: as_expert_choice(_digits_vit()),
}


def get_preset(name: str) -> ExperimentConfig:
    """Return a named experiment; `sized-N` gives the N-layer member of the family."""
    if name.startswith("sized-") and name[6:].isdigit():
        return sized(int(name[6:]))
    if name not in PRESETS:
        known = [*PRESETS, "sized-12"]
        raise ConfigError(f"no preset {name!r}; {nearest(name, known)}")
    return PRESETS[name]()
