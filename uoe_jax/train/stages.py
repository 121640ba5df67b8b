"""The warm-up of `top_k`: unions begin with all experts on and end with their own.

A union that was cut from a dense model is that model while every expert is on. Each
stage is a program of its own with the parameters of all: routers that choose among
fewer, so that every stage costs what it computes.
"""

from __future__ import annotations

import dataclasses

from uoe_jax.config import ExperimentConfig, ModelConfig, UnionConfig
from uoe_jax.hardware.count import flops_per_token
from uoe_jax.model import split_model
from uoe_jax.train.subject import Subject

STAGES = 4  # before the last, and so at most five compiled programs


def stage_at(config: ExperimentConfig, step: int) -> ExperimentConfig:
    """Return the config whose model trains after `step` steps of the run's own.

    It is the run's own from `train.top_k_warmup_steps` on, and without a warm-up.
    """
    gone = stage_number(config, step)
    if gone == STAGES:
        return config
    model = with_more_experts(config.model, gone)
    return dataclasses.replace(config, model=model)


def stage_number(config: ExperimentConfig, step: int) -> int:
    """Return the stage after `step` steps, from 0; `STAGES` after the warm-up."""
    steps = config.train.top_k_warmup_steps
    return STAGES if step >= steps else step * STAGES // steps


def at_stage(
    subject: Subject, config: ExperimentConfig, stage: ExperimentConfig
) -> Subject:
    """Return what a run of a config trains, its model that of a stage."""
    if stage is config:
        return subject
    cost = [flops_per_token(c.model, c.seq_len).training for c in (config, stage)]
    return dataclasses.replace(
        subject,
        graphdef=split_model(stage.model, stage.train.seed)[0],
        flops_per_token=subject.flops_per_token + cost[1] - cost[0],
    )


def with_more_experts(model: ModelConfig, gone: int) -> ModelConfig:
    """Return a model whose unions have switched off `gone` of `STAGES` parts of the
    experts that they will leave out."""
    own = model.union_for("attention")
    attention = dataclasses.replace(
        model.union_attention,
        top_k=experts_on(own, gone),
        selected=_selected(own, gone),
        most_picks=_most(own, gone),
    )
    union = dataclasses.replace(
        model.union,
        top_k=experts_on(model.union, gone),
        selected=_selected(model.union, gone),
        most_picks=_most(model.union, gone),
    )
    return dataclasses.replace(model, union=union, union_attention=attention)


def experts_on(union: UnionConfig, gone: int) -> int:
    """Return how many experts a token uses in a stage."""
    left_out = union.num_experts - union.top_k
    return union.num_experts - left_out * gone // STAGES


def _selected(union: UnionConfig, gone: int) -> int:
    """Return how many experts a segment keeps: no fewer than a token uses of them."""
    return max(union.selected, experts_on(union, gone)) if union.selected else 0


def _most(union: UnionConfig, gone: int) -> int:
    """Return how many experts a token takes at most, by its own thresholds."""
    return max(union.most_picks, experts_on(union, gone)) if union.most_picks else 0


def describe_stages(config: ExperimentConfig) -> str | None:
    """Return how a warm-up goes, as one line; None without one."""
    steps = config.train.top_k_warmup_steps
    if not steps:
        return None
    model, parts = config.model, []
    for part, kinds in (("attention", model.attention), ("mlp", model.mlp)):
        if not {"union", "moh"} & set(kinds):
            continue
        union = model.union_for(part)  # type: ignore[arg-type]
        counts = [experts_on(union, gone) for gone in range(STAGES)]
        shown = ", ".join(str(count) for count in dict.fromkeys(counts))
        parts.append(f"{shown}, then {union.top_k} in {part}")
    return f"experts on for {steps:,} steps: {'; '.join(parts)}"
