"""Tiny experiments for the tests of this folder."""

import dataclasses

from uoe_jax.config import (
    DataConfig,
    ExperimentConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    UnionConfig,
)


def make_tiny(
    kind="dense", *, attention=None, cache_dir=None, optim=None, data=None, **train
):
    """A two-layer byte model that compiles in seconds."""
    model = ModelConfig(
        vocab_size=256,
        max_seq_len=16,
        d_model=16,
        d_ff=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=4,
        head_dim=4,
        attention=(attention or kind,),
        mlp=(kind,),
        union=UnionConfig(num_experts=4, top_k=2, bias_update_rate=0.01),
    )
    cache = str(cache_dir) if cache_dir else None
    data = {"batch_size": 8, "max_bytes": 200_000, "cache_dir": cache, **(data or {})}
    optim = {"learning_rate": 3e-2, "warmup_steps": 3, **(optim or {})}
    defaults = {"steps": 12, "log_every": 5, "eval_every": 5, "eval_batches": 2}
    return ExperimentConfig(
        name="tiny",
        model=model,
        data=DataConfig(source="stdlib", **data),
        optim=OptimConfig(**optim),
        train=TrainConfig(**(defaults | {"save_every": 4} | train)),
    )


def with_train(config, **train):
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **train))
