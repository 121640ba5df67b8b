"""Checks of an experiment before anything compiles. Imports no jax."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from uoe_jax.config import (
    CAUSAL_ROUTERS,
    ROUTER_SEES,
    DataConfig,
    ExperimentConfig,
    ModelConfig,
    UnionConfig,
)
from uoe_jax.errors import ConfigError


def validate(config: ExperimentConfig) -> None:
    """Raise ConfigError with every broken rule, joined into one line."""
    problems = list(find_problems(config))
    if problems:
        raise ConfigError("; ".join(problems))


def find_problems(config: ExperimentConfig) -> Iterator[str]:
    """Yield each broken rule as "value, rule, fix"."""
    yield from _positive(config)
    yield from _fractions(config)
    yield from _model(config.model)
    yield from _union(config.model)
    yield from _moe(config.model)
    yield from _sparse(config.model)
    yield from _data(config)
    yield from _train(config)


def _divisors(number: int, limit: int = 8) -> str:
    """Return the divisors of a number, at most `limit` of them, as text."""
    found = [str(d) for d in range(1, number + 1) if number % d == 0]
    if len(found) > limit:
        found = [*found[: limit - 1], "...", found[-1]]
    return ", ".join(found)


def _positive(config: ExperimentConfig) -> Iterator[str]:
    model, data, train = config.model, config.data, config.train
    sizes = {
        "model.vocab_size": model.vocab_size,
        "model.max_seq_len": model.max_seq_len,
        "model.d_model": model.d_model,
        "model.d_ff": model.d_ff,
        "model.num_layers": model.num_layers,
        "model.num_heads": model.num_heads,
        "model.num_kv_heads": model.num_kv_heads,
        "model.head_dim": model.head_dim,
        "model.num_classes": model.num_classes,
        "model.image_size": model.image_size,
        "model.image_channels": model.image_channels,
        "model.image_patch": model.image_patch,
        "model.union.num_experts": model.union.num_experts,
        "model.union.top_k": model.union.top_k,
        "model.moe.num_experts": model.moe.num_experts,
        "model.moe.top_k": model.moe.top_k,
        "model.moba.block_size": model.moba.block_size,
        "model.moba.top_k": model.moba.top_k,
        "data.batch_size": data.batch_size,
        "train.accumulate": train.accumulate,
        "train.log_every": train.log_every,
        "train.eval_every": train.eval_every,
        "train.eval_batches": train.eval_batches,
        "train.save_every": train.save_every,
        "train.keep_checkpoints": train.keep_checkpoints,
        "train.max_bad_steps": train.max_bad_steps,
        "train.loss_chunk": train.loss_chunk,
    }
    if data.seq_len is not None:
        sizes["data.seq_len"] = data.seq_len
    if model.moe.d_expert is not None:
        sizes["model.moe.d_expert"] = model.moe.d_expert
    if data.max_bytes is not None:
        sizes["data.max_bytes"] = data.max_bytes
    for name, value in sizes.items():
        if value < 1:
            yield f"{name} is {value}; it must be at least 1"


def _fractions(config: ExperimentConfig) -> Iterator[str]:
    model, data, optim = config.model, config.data, config.optim
    unit = {
        "model.dropout": model.dropout,
        "optim.beta1": optim.beta1,
        "optim.beta2": optim.beta2,
        "train.label_smoothing": config.train.label_smoothing,
        "data.valid_fraction": data.valid_fraction,
        "data.test_fraction": data.test_fraction,
    }
    for name, value in unit.items():
        if not 0 <= value < 1:
            yield f"{name} is {value}; it must be in [0, 1)"
    if data.valid_fraction + data.test_fraction >= 1:
        yield (
            f"data.valid_fraction + data.test_fraction is "
            f"{data.valid_fraction + data.test_fraction}; leave something to train on"
        )
    nonnegative = {
        "optim.learning_rate": optim.learning_rate,
        "optim.weight_decay": optim.weight_decay,
        "optim.clip_norm": optim.clip_norm,
        "optim.router_lr_scale": optim.router_lr_scale,
        "optim.warmup_steps": optim.warmup_steps,
        "optim.final_lr_fraction": optim.final_lr_fraction,
        "train.z_loss": config.train.z_loss,
        "train.steps": config.train.steps,
        "mesh.data": config.mesh.data,
        "model.union.balance_loss": model.union.balance_loss,
        "model.union.router_z_loss": model.union.router_z_loss,
        "model.union.bias_update_rate": model.union.bias_update_rate,
        "model.union.router_init_std": model.union.router_init_std,
        "model.moe.balance_loss": model.moe.balance_loss,
        "model.moe.router_z_loss": model.moe.router_z_loss,
        "model.moe.bias_update_rate": model.moe.bias_update_rate,
        "model.moe.router_init_std": model.moe.router_init_std,
        "model.mod.bias_update_rate": model.mod.bias_update_rate,
        "model.mod.router_z_loss": model.mod.router_z_loss,
        "model.mod.router_init_std": model.mod.router_init_std,
    }
    for name, value in nonnegative.items():
        if not value >= 0:
            yield f"{name} is {value}; it must not be negative"
    positive = {
        "optim.eps": optim.eps,
        "model.norm_eps": model.norm_eps,
        "model.rope_theta": model.rope_theta,
        "model.mod.capacity_factor": model.mod.capacity_factor,
    }
    if config.train.max_seconds is not None:
        positive["train.max_seconds"] = config.train.max_seconds
    for name, value in positive.items():
        if not value > 0:
            yield f"{name} is {value}; it must be positive"


def _model(model: ModelConfig) -> Iterator[str]:
    if model.num_kv_heads > 0 and model.num_heads % model.num_kv_heads:
        yield (
            f"model.num_kv_heads {model.num_kv_heads} doesn't divide model.num_heads "
            f"{model.num_heads}; use one of {_divisors(model.num_heads)}"
        )
    if model.position == "rope" and model.head_dim % 2:
        yield (
            f"model.head_dim is {model.head_dim}; rotary positions need an even width, "
            f"use {model.head_dim + 1}"
        )
    for name in ("attention", "mlp", "blocks"):
        pattern = getattr(model, name)
        if not pattern:
            yield f"model.{name} is empty; name at least one kind"
        elif len(pattern) > max(model.num_layers, 1):
            yield (
                f"model.{name} has {len(pattern)} kinds for {model.num_layers} layers; "
                f"shorten it to at most {model.num_layers}"
            )
    if model.kind == "vision" and model.image_patch > 0:
        if model.image_size % model.image_patch:
            yield (
                f"model.image_patch {model.image_patch} doesn't divide "
                f"model.image_size {model.image_size}; use one of "
                f"{_divisors(model.image_size)}"
            )
        tokens = (model.image_size // model.image_patch) ** 2
        if tokens > model.max_seq_len:
            yield (
                f"model.max_seq_len is {model.max_seq_len} but an image is {tokens} "
                f"tokens; set it to {tokens}"
            )


def _union(model: ModelConfig) -> Iterator[str]:
    if "union" in model.mlp:
        experts = model.union.num_experts
        if experts > 0 and model.d_ff % experts:
            below, above = model.d_ff // experts * experts, -(-model.d_ff // experts)
            near = f"{below} or {above * experts}" if below else f"{above * experts}"
            yield (
                f"model.union.num_experts {experts} doesn't divide model.d_ff "
                f"{model.d_ff}; use one of {_divisors(model.d_ff)}, or model.d_ff "
                f"{near}"
            )
        yield from _router(model, model.union, "model.union")
        if model.union.shared_kv and "union" not in model.attention:
            yield (
                "model.union.shared_kv is on and no attention is a union; switch it "
                "off or set model.attention union"
            )
    if "union" in model.attention or "moh" in model.attention:
        union = model.union_for("attention")
        own = model.union_attention != type(model.union_attention)()
        name = "model.union_attention" if own else "model.union"
        if min(union.num_experts, union.top_k) < 1:
            if own:
                yield (
                    f"{name} has num_experts {union.num_experts} and top_k "
                    f"{union.top_k}; both must be at least 1"
                )
            return
        if union.num_experts > 0 and model.num_kv_heads % union.num_experts:
            yield (
                f"{name}.num_experts {union.num_experts} doesn't divide "
                f"model.num_kv_heads {model.num_kv_heads}; use one of "
                f"{_divisors(model.num_kv_heads)}"
            )
        if "moh" in model.attention:
            # Its gates are softmaxes, whatever the union's are.
            union = dataclasses.replace(union, gate="softmax")
            if union.router != "token":
                yield (
                    f"{name}.router is {union.router!r} and model.attention 'moh'; "
                    "mixture-of-head attention routes tokens, use token"
                )
        if own or "moh" in model.attention or "union" not in model.mlp:
            yield from _router(model, union, name)


def _router(model: ModelConfig, union: UnionConfig, name: str) -> Iterator[str]:
    """Yield what is wrong with one union's router."""
    experts, routed = union.num_experts, union.num_experts - union.num_shared
    if union.top_k > experts:
        yield (
            f"{name}.top_k {union.top_k} is more than {name}.num_experts "
            f"{experts}; use at most {experts}"
        )
    if not 0 <= union.num_shared < max(union.top_k, 1):
        yield (
            f"{name}.num_shared is {union.num_shared}; always-on experts are part of "
            f"top_k {union.top_k} and one must be left to route: use 0 to "
            f"{max(union.top_k - 1, 0)}"
        )
    if union.gate == "softmax" and union.top_k - union.num_shared == 1 < routed:
        yield (
            f"{name}.gate 'softmax' over a {name}.top_k of 1 routed expert is always "
            "1, so the loss can't train the router; use gate sigmoid or a higher top_k"
        )
    if not 1 <= union.patch_size <= 128:
        yield (
            f"{name}.patch_size is {union.patch_size}; use 1 (each token decides for "
            "itself) to 128"
        )
    if union.patch_size > 1 and union.router != "token":
        yield (
            f"{name}.patch_size is {union.patch_size} with router "
            f"{union.router!r}; patches are for router token, use patch_size 1"
        )
    if model.causal and union.router not in CAUSAL_ROUTERS:
        yield (
            f"{name}.router {union.router!r} sees {ROUTER_SEES[union.router]} and the "
            f"model is causal; use {', '.join(CAUSAL_ROUTERS)}"
        )
    if union.segment_size < 1:
        yield f"{name}.segment_size is {union.segment_size}; it must be at least 1"
    if union.router == "hierarchical" and not union.top_k <= union.selected <= experts:
        yield (
            f"{name}.selected is {union.selected}; the hierarchical router keeps that "
            f"many experts for its tokens, use {union.top_k} (top_k) to {experts}"
        )
    yield from _capacity(union.capacity_factor, union.router, name)


def _capacity(factor: float | None, router: str, name: str) -> Iterator[str]:
    if factor is None:
        return
    if not factor > 0:
        yield (
            f"{name}.capacity_factor is {factor}; it must be positive, or None for no "
            "drops"
        )
    if router != "token":
        yield (
            f"{name}.capacity_factor is {factor} with router {router!r}; only router "
            "token has a capacity, leave it None"
        )


def _moe(model: ModelConfig) -> Iterator[str]:
    moe = model.moe
    if "moe" not in model.mlp:
        return
    if moe.top_k > moe.num_experts:
        yield (
            f"model.moe.top_k {moe.top_k} is more than model.moe.num_experts "
            f"{moe.num_experts}; use at most {moe.num_experts}"
        )
    if not 0 <= moe.num_shared < max(moe.top_k, 1):
        yield (
            f"model.moe.num_shared is {moe.num_shared}; shared experts are part of "
            f"top_k {moe.top_k} and one must be left to route: use 0 to "
            f"{max(moe.top_k - 1, 0)}"
        )
    routed = moe.num_experts - moe.num_shared
    if moe.gate != "softmax_all" and moe.top_k - moe.num_shared == 1 < routed:
        yield (
            f"model.moe.gate {moe.gate!r} over one routed expert is always 1 and the "
            "loss can't train the router; use gate softmax_all or a higher top_k"
        )
    if model.causal and moe.router not in CAUSAL_ROUTERS:
        yield (
            f"model.moe.router {moe.router!r} sees {ROUTER_SEES[moe.router]} and the "
            "model is causal; use token"
        )
    yield from _capacity(moe.capacity_factor, moe.router, "model.moe")
    if moe.d_expert is None and moe.top_k > 0 and model.d_ff % moe.top_k:
        yield (
            f"model.moe.top_k {moe.top_k} doesn't divide model.d_ff {model.d_ff}; "
            "set model.moe.d_expert"
        )


def _sparse(model: ModelConfig) -> Iterator[str]:
    """Yield what is wrong with mixture-of-depths blocks."""
    patterns = (model.attention, model.mlp, model.blocks)
    if "mod" not in model.blocks or not all(patterns):
        return
    if model.mod.bias_update_rate > 1:
        yield (
            f"model.mod.bias_update_rate is {model.mod.bias_update_rate}; it is a "
            "share of the way to the bias wanted, use 1 or less"
        )
    if not 0 < model.mod.keep < 1:
        yield (
            f"model.mod.keep is {model.mod.keep}; it is the share of the tokens that "
            "enter a block, use more than 0 and less than 1"
        )
    for layer, kinds in enumerate(model.layer_kinds):
        if model.block_kinds[layer] == "mod" and kinds != ("dense", "dense"):
            yield (
                f"layer {layer} is a 'mod' block of {kinds[0]} attention and a "
                f"{kinds[1]} MLP; tokens enter dense blocks only, use dense for both"
            )
            return


def _data(config: ExperimentConfig) -> Iterator[str]:
    model, data = config.model, config.data
    if data.seq_len is not None and data.seq_len > model.max_seq_len:
        yield (
            f"data.seq_len {data.seq_len} is more than model.max_seq_len "
            f"{model.max_seq_len}; lower it or raise model.max_seq_len"
        )
    if model.kind == "decoder" and data.tokenizer == "byte" and model.vocab_size < 256:
        yield (
            f"model.vocab_size is {model.vocab_size}; bytes need at least 256 entries"
        )
    if model.kind == "decoder" and data.tokenizer == "bpe":
        if data.bpe_vocab_size < 257:
            yield (
                f"data.bpe_vocab_size is {data.bpe_vocab_size}; byte-level BPE needs "
                "at least 257 entries"
            )
        if data.bpe_vocab_size > model.vocab_size:
            yield (
                f"data.bpe_vocab_size {data.bpe_vocab_size} is more than "
                f"model.vocab_size {model.vocab_size}; set model.vocab_size to it"
            )
    yield from _source(model, data)


def _source(model: ModelConfig, data: DataConfig) -> Iterator[str]:
    if data.source in ("text", "jsonl", "npz", "tfds") and data.path is None:
        yield f"data.source is {data.source!r} without data.path; say where the data is"
    if data.source == "digits" and model.kind != "vision":
        yield (
            f"data.source 'digits' holds images but model.kind is {model.kind!r}; "
            "use model.kind vision"
        )
    if data.source in ("stdlib", "jsonl", "text") and model.kind == "vision":
        yield (
            f"data.source {data.source!r} holds text but model.kind is 'vision'; "
            "use digits, npz or tfds"
        )


def _train(config: ExperimentConfig) -> Iterator[str]:
    accumulate, batch = config.train.accumulate, config.data.batch_size
    if accumulate > 0 and batch % accumulate:
        yield (
            f"train.accumulate {accumulate} doesn't divide data.batch_size {batch}; "
            f"use one of {_divisors(batch)}"
        )
    devices = config.mesh.data
    if devices > 0 and accumulate > 0 and (batch // accumulate) % devices:
        yield (
            f"mesh.data {devices} doesn't divide a microbatch of "
            f"{batch // accumulate} sequences; use one of "
            f"{_divisors(batch // accumulate)}"
        )
