"""Checks of an experiment before anything compiles. Imports no jax."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from uoe_jax.config import (
    DataConfig,
    ExperimentConfig,
    LayerWidths,
    ModelConfig,
    UnionConfig,
    from_json,
)
from uoe_jax.errors import ConfigError, DataError, divisors, shown
from uoe_jax.fields import range_problems
from uoe_jax.files import check_path, parse_json
from uoe_jax.kinds import ATTENTIONS, ROUTERS
from uoe_jax.mixture import check_mix
from uoe_jax.stores.objects import address_of
from uoe_jax.widths import width_problems

CONFIG = "config.json"  # of a run's folder
# What else lies there as a file; and as a folder.
_FILES = ("data.json", "env.json", "metrics.jsonl", "tokenizer.json")
_FOLDERS = ("checkpoints", "best")


def validate(config: ExperimentConfig) -> None:
    """Raise ConfigError with every broken rule, joined into one line.

    Types and literals were checked when the config was made.
    """
    if not isinstance(config, ExperimentConfig):
        raise ConfigError(
            f"config is {shown(config)}; expected an ExperimentConfig, such as "
            "get_preset('tiny')"
        )
    problems = list(find_problems(config))
    if problems:
        raise ConfigError("; ".join(problems))


def validate_model(model: ModelConfig) -> None:
    """Raise ConfigError with every rule that a model's config breaks, in one line."""
    if not isinstance(model, ModelConfig):
        raise ConfigError(
            f"config is {shown(model)}; expected a ModelConfig, or the "
            "ExperimentConfig of get_preset('tiny')"
        )
    out = list(range_problems(model, "model."))
    if problems := out or list(_model_rules(model)):
        raise ConfigError("; ".join(problems))


def read_config(folder: Path) -> ExperimentConfig:
    """Return the config a run was started with, checked as a new one would be.

    Raises ConfigError for one that was edited into something that can't be.
    """
    config = parse_config(folder)
    try:
        validate(config)
    except ConfigError as error:
        raise ConfigError(f"{folder / CONFIG}: {error}") from None
    return config


def parse_config(folder: Path) -> ExperimentConfig:
    """Return the config in a run's folder as it is, its types checked, not its rules.

    Raises ConfigError, naming the file, for one that holds no config, and where what
    else a run has isn't of its kind, such as a folder under the name of a file.
    """
    path = folder / CONFIG
    _check_kinds(folder)
    try:
        text = path.read_text(encoding="utf-8")
        _check_own(folder, text)
        return from_json(text)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} isn't text ({error.reason}); restore it") from None
    except ConfigError as error:
        if str(error).startswith(str(folder)):
            raise
        raise ConfigError(f"{path}: {error}") from None


def _check_kinds(folder: Path) -> None:
    """Raise ConfigError for a folder in a file's place, or the other way round."""
    for name in (*_FILES, *_FOLDERS):
        place, file = folder / name, name in _FILES
        if place.exists() and not (place.is_file() if file else place.is_dir()):
            raise ConfigError(
                f"{place} is not a {'file' if file else 'folder'}, as a run has there; "
                "move it away, or restore what was there"
            )


def check_own(folder: Path) -> None:
    """Raise ConfigError for the folder of another library's model."""
    try:
        _check_own(folder, (folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):  # reading the run will say so
        return


def _check_own(folder: Path, text: str) -> None:
    if _is_foreign(text):
        raise ConfigError(
            f"{folder} holds a model of another library; read it first: uoe import "
            f"{folder}"
        )


def _is_foreign(text: str) -> bool:
    """Whether a config.json is Hugging Face's."""
    try:
        raw = parse_json(text, CONFIG)
    except DataError:
        return False
    mark = isinstance(raw, dict) and ("architectures" in raw or "model_type" in raw)
    return mark and "model" not in raw


def find_problems(config: ExperimentConfig) -> Iterator[str]:
    """Yield each broken rule as "value, rule, fix"."""
    yield from _paths(config.data)
    # Relations between numbers make sense only where each is in its range.
    if out := list(range_problems(config)):
        yield from out
        return
    yield from _splits(config.data)
    yield from _model_rules(config.model)
    yield from _data(config)
    yield from _train(config)


def _model_rules(model: ModelConfig) -> Iterator[str]:
    yield from _model(model)
    yield from _positions(model)
    yield from _head_groups(model)
    yield from _convolution(model)
    yield from _sink(model)
    yield from float8_problems(model)
    yield from _ends(model)
    yield from _union(model)
    yield from _moe(model)
    yield from _sparse(model)
    # Widths are of layers, which a model has only if its patterns make some.
    if all((model.attention, model.mlp, model.blocks, model.window)):
        yield from width_problems(model)


def _paths(data: DataConfig) -> Iterator[str]:
    try:
        check_mix(data)
    except ConfigError as error:
        yield str(error)
    for name in ("path", "data_dir", "cache_dir", "tokenizer"):
        try:
            path = getattr(data, name)
            stored = name == "cache_dir" and address_of(path) is not None
            if path is not None and not stored:
                check_path(path, f"data.{name}")
        except ConfigError as error:
            yield str(error)


def _splits(data: DataConfig) -> Iterator[str]:
    held_out = data.valid_fraction + data.test_fraction
    if held_out >= 1:
        yield (
            f"data.valid_fraction + data.test_fraction is {held_out}; leave something "
            "to train on"
        )
    if data.min_length >= data.max_length - 1:
        yield (
            f"data.min_length is {data.min_length} and data.max_length "
            f"{data.max_length}, both excluded; leave a length between them"
        )


def _model(model: ModelConfig) -> Iterator[str]:
    if model.num_heads % model.num_kv_heads:
        yield (
            f"model.num_kv_heads {model.num_kv_heads} doesn't divide model.num_heads "
            f"{model.num_heads}; use one of {divisors(model.num_heads)}"
        )
    if model.rotates and model.head_dim % 2:
        yield (
            f"model.head_dim is {model.head_dim}; rotary positions need an even width, "
            f"use {model.head_dim + 1}"
        )
    for name in ("attention", "mlp", "blocks", "window"):
        pattern = getattr(model, name)
        if not pattern:
            yield f"model.{name} is empty; name at least one kind"
        elif len(pattern) > model.num_layers:
            yield (
                f"model.{name} has {len(pattern)} kinds for {model.num_layers} layers; "
                f"shorten it to at most {model.num_layers}"
            )
    if model.kind == "vision":
        if model.image_size % model.image_patch:
            yield (
                f"model.image_patch {model.image_patch} doesn't divide "
                f"model.image_size {model.image_size}; use one of "
                f"{divisors(model.image_size)}"
            )
        tokens = model.num_image_tokens
        if tokens > model.max_seq_len:
            yield (
                f"model.max_seq_len is {model.max_seq_len} but an image is {tokens} "
                f"tokens; set it to {tokens}"
            )


def _positions(model: ModelConfig) -> Iterator[str]:
    """Yield what is wrong with windows and with the scaling of rotary positions."""
    scaling = model.rope_scaling
    if scaling.kind != "none" and not model.rotates:
        yield (
            f"model.rope_scaling.kind is {scaling.kind!r} and model.position "
            f"{model.position!r}; only rotary positions are scaled, use none"
        )
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    if scaling.kind == "llama3" and low >= high:
        yield (
            f"model.rope_scaling.low_freq_factor is {low} and high_freq_factor {high}; "
            "the second must be the larger one"
        )
    if not any(model.window):
        return
    if model.kind != "decoder":
        yield (
            f"model.window is {list(model.window)} and model.kind {model.kind!r}; only "
            "a decoder has windows, use 0"
        )
    for kind in sorted(set(model.attention)):
        if kind in ATTENTIONS and not ATTENTIONS[kind].windows:
            yield (
                f"model.window is {list(model.window)} with {kind!r} attention, which "
                "chooses what it sees; use 0"
            )
    if "mod" in model.blocks:
        yield (
            f"model.window is {list(model.window)} with 'mod' blocks, in which only "
            "tokens that entered see each other; use 0"
        )


def _head_groups(model: ModelConfig) -> Iterator[str]:
    """Yield what is wrong with the heads beside those of the layers' kinds."""
    groups, share = model.head_groups, model.num_query_groups
    for name in ("local", "full"):
        heads, kv_heads = getattr(groups, name), getattr(groups, f"{name}_kv")
        field = f"model.head_groups.{name}"
        if kv_heads and (not heads or heads % kv_heads):
            yield (
                f"{field}_kv is {kv_heads} and {field} {heads}; "
                + (f"use one of {divisors(heads)}" if heads else "leave it 0")
            )
        elif not kv_heads and share and heads % share:
            yield (
                f"{field} is {heads} and {share} query heads share a key head; use "
                f"{-(-heads // share) * share}, or set {field}_kv"
            )
    if groups.local and model.kind != "decoder":
        yield (
            f"model.head_groups.local is {groups.local} and model.kind "
            f"{model.kind!r}; only a decoder has windows, use model.head_groups.full"
        )
    if (groups.local or groups.full) and "mod" in model.blocks:
        yield (
            "model.head_groups are set with 'mod' blocks, in which only tokens that "
            "entered see each other; use 0 heads"
        )


def _sink(model: ModelConfig) -> Iterator[str]:
    """Yield what is wrong with sinks: not every kind of attention has them."""
    kinds = sorted({*model.attention} - {"dense", "union"})
    if model.sink and kinds:
        yield (
            f"model.sink is on and model.attention has {kinds[0]!r}, which has none; "
            "switch it off or take dense and union"
        )
    if model.sink and "union" in model.attention:
        if model.union_for("attention").shared_kv:
            yield (
                "model.sink is on and the union's keys and values are shared "
                "(shared_kv), whose attention has none; switch one off"
            )


def float8_problems(model: ModelConfig) -> Iterator[str]:
    """Yield which weights can't be multiplied in eight bits."""
    if model.float8 == "none":
        return
    asked = f"model.float8 is {model.float8!r}"
    if model.compute_dtype != "bfloat16":
        yield (
            f"{asked} and model.compute_dtype {model.compute_dtype!r}; eight bits "
            "stand in for bfloat16, use that or model.float8 none"
        )
    if model.widths != LayerWidths():
        yield (
            f"{asked} and model.widths are set; matrix units take multiples of 16, "
            "which narrow layers needn't be, use model.float8 none"
        )
    for name, side in _product_sides(model):
        if side % 16:
            yield (
                f"{asked} and {name} {side}; matrix units take multiples of 16, use "
                f"{-(-side // 16) * 16} or model.float8 none"
            )
            return


def _product_sides(model: ModelConfig) -> Iterator[tuple[str, int]]:
    """Yield the sides of the weights of attention and MLP, with what they are called.

    Numbers that don't divide are left to their own rules.
    """
    yield "model.d_model is", model.d_model
    heads = {"heads of an expert are together": 0, "heads are together": 0}
    part = model.num_kv_heads * model.head_dim
    if {"union", "moh"} & {*model.attention}:
        experts = model.union_for("attention").num_experts
        heads["heads of an expert are together"] = part // max(experts, 1)
    if {*model.attention} - {"union", "moh"}:
        heads["heads are together"] = part
    groups, shared = model.head_groups, model.num_heads // max(model.num_kv_heads, 1)
    for name, count, keys in (
        ("local", groups.local, groups.local_kv),
        ("full", groups.full, groups.full_kv),
    ):
        keys = keys or count // max(shared, 1)
        heads[f"heads of model.head_groups.{name} are together"] = keys * model.head_dim
    for name, width in heads.items():
        yield f"key {name}", width
    if "dense" in model.mlp:
        yield "model.d_ff is", model.d_ff
    if "union" in model.mlp:
        width = model.d_ff // max(model.union.num_experts, 1)
        yield "model.d_ff of an expert is", width
    if "moe" in model.mlp and model.moe.top_k:
        yield "model.moe.d_expert is", model.d_expert


def _convolution(model: ModelConfig) -> Iterator[str]:
    """Yield what is wrong with the convolution before attention."""
    if model.convolution == 1:
        yield (
            "model.convolution is 1, which mixes no other token in; use 0, or 2 and "
            "more"
        )
    if model.convolution and "mod" in model.blocks:
        yield (
            f"model.convolution is {model.convolution} with 'mod' blocks, in which a "
            "token's neighbours may be missing; use 0"
        )


def _ends(model: ModelConfig) -> Iterator[str]:
    """Yield what doesn't fit the kind of model at its embeddings, norms and heads."""
    if model.post_norm and "mod" in model.blocks:
        yield (
            "model.norm_place is 'post' with 'mod' blocks, whose tokens go around "
            "norms; use pre"
        )
    vision, encoder = model.kind == "vision", model.kind == "encoder"
    wrong = {
        "class_token": model.class_token and not vision,
        "token_types": model.token_types and vision,
        "embed_norm": model.embed_norm and vision,
        "pooling": model.pooling != "mean"
        and not (encoder or vision)
        or (model.pooling == "tanh" and vision),
        "encoder_head": model.encoder_head != "classes" and not encoder,
    }
    for name in (name for name, found in wrong.items() if found):
        yield (
            f"model.{name} is {getattr(model, name)!r} and model.kind {model.kind!r}, "
            "which has no such part; leave it at its default"
        )


def _union(model: ModelConfig) -> Iterator[str]:
    if "union" in model.mlp:
        experts = model.union.num_experts
        if model.d_ff % experts:
            below, above = model.d_ff // experts * experts, -(-model.d_ff // experts)
            near = f"{below} or {above * experts}" if below else f"{above * experts}"
            yield (
                f"model.union.num_experts {experts} doesn't divide model.d_ff "
                f"{model.d_ff}; use one of {divisors(model.d_ff)}, or model.d_ff "
                f"{near}"
            )
        yield from _router(model, model.union, "model.union")
        for option in ("shared_kv", "gated_values", "key_router"):
            if getattr(model.union, option) and "union" not in model.attention:
                yield (
                    f"model.union.{option} is on and no attention is a union; switch "
                    "it off or set model.attention union"
                )
    if any(ATTENTIONS[kind].router(model) is not None for kind in model.attention):
        union = model.union_for("attention")
        own = model.union_attention != type(model.union_attention)()
        name = "model.union_attention" if own else "model.union"
        if union.gated_values and (union.shared_kv or "moh" in model.attention):
            yield (
                f"{name}.gated_values is on and keys and values are everybody's "
                "(shared_kv, or 'moh'), so they have no gate; switch one off"
            )
        if union.key_router:
            yield from _key_router(model, union, name)
        if model.num_kv_heads % union.num_experts:
            yield (
                f"{name}.num_experts {union.num_experts} doesn't divide "
                f"model.num_kv_heads {model.num_kv_heads}; use one of "
                f"{divisors(model.num_kv_heads)}"
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


def _key_router(model: ModelConfig, union: UnionConfig, name: str) -> Iterator[str]:
    """Yield what keys with a router of their own can't go with."""
    own = f"{name}.key_router is on and"
    if union.shared_kv or "moh" in model.attention:
        yield (
            f"{own} keys and values are everybody's (shared_kv, or 'moh'); switch one "
            "off"
        )
    elif not union.gated_values:
        yield (
            f"{own} values have no gate, without which the loss can't train that "
            f"router; set {name}.gated_values true"
        )
    if union.router != "token":
        yield f"{own} {name}.router is {union.router!r}; tokens choose both, use token"
    for option, off in _NOT_WITH_KEYS.items():
        if (value := getattr(union, option)) != off:
            yield f"{own} {name}.{option} {value} is for one router alone; use {off}"
    if model.sink:
        yield f"{own} model.sink too, which that attention has none of; switch one off"


# Options of one router, and where they are off.
_NOT_WITH_KEYS = {"patch_size": 1, "least_top_k": 0, "capacity_factor": None}


def _router(model: ModelConfig, union: UnionConfig, name: str) -> Iterator[str]:
    """Yield what is wrong with one union's router."""
    experts, routed = union.num_experts, union.num_experts - union.num_shared
    if union.top_k > experts:
        yield (
            f"{name}.top_k {union.top_k} is more than {name}.num_experts "
            f"{experts}; use at most {experts}"
        )
    if union.num_shared >= union.top_k:
        yield (
            f"{name}.num_shared is {union.num_shared}; always-on experts are part of "
            f"top_k {union.top_k} and one must be left to route: use 0 to "
            f"{union.top_k - 1}"
        )
    if union.gate == "softmax" and union.top_k - union.num_shared == 1 < routed:
        yield (
            f"{name}.gate 'softmax' over a {name}.top_k of 1 routed expert is always "
            "1, so the loss can't train the router; use gate sigmoid or a higher top_k"
        )
    facts = ROUTERS[union.router]
    if union.patch_size > 1 and not facts.patches:
        yield (
            f"{name}.patch_size is {union.patch_size} with router {union.router!r}; "
            f"patches are for router {_with('patches')}, use patch_size 1"
        )
    if model.causal and not facts.causal:
        yield (
            f"{name}.router {union.router!r} sees {facts.sees} and the model is "
            f"causal; use {_with('causal')}"
        )
    if union.gate == "relu" and not facts.varies:
        yield (
            f"{name}.gate is 'relu' with router {union.router!r}, whose scores have no "
            f"threshold; relu is for router {_with('varies')}, use sigmoid"
        )
    if union.least_top_k:
        yield from _least(union, name)
    if union.most_picks and not facts.varies:
        yield (
            f"{name}.most_picks is {union.most_picks} with router {union.router!r}, "
            f"which takes top_k experts; it is for router {_with('varies')}, use 0"
        )
    yield from facts.problems(union, name)
    yield from _capacity(union.capacity_factor, union.router, name)


def _least(union: UnionConfig, name: str) -> Iterator[str]:
    """Yield what is wrong with the fewest experts that training has on."""
    if not ROUTERS[union.router].ordered:
        yield (
            f"{name}.least_top_k is {union.least_top_k} with router {union.router!r}, "
            f"whose picks have no order; it is for router {_with('ordered')}, use 0"
        )
    if not union.num_shared < union.least_top_k <= union.top_k:
        yield (
            f"{name}.least_top_k is {union.least_top_k}; training draws from it to "
            f"{name}.top_k {union.top_k}, use {union.num_shared + 1} to {union.top_k}"
        )


def _capacity(factor: float | None, router: str, name: str) -> Iterator[str]:
    if factor is not None and not ROUTERS[router].capacity:
        yield (
            f"{name}.capacity_factor is {factor} with router {router!r}; only router "
            f"{_with('capacity')} has a capacity, leave it None"
        )


def _with(fact: str) -> str:
    """Return the routers of which a fact is true, as text."""
    return ", ".join(name for name, facts in ROUTERS.items() if getattr(facts, fact))


def _moe(model: ModelConfig) -> Iterator[str]:
    moe = model.moe
    if "moe" not in model.mlp:
        return
    if moe.top_k > moe.num_experts:
        yield (
            f"model.moe.top_k {moe.top_k} is more than model.moe.num_experts "
            f"{moe.num_experts}; use at most {moe.num_experts}"
        )
    if moe.num_shared >= moe.top_k:
        yield (
            f"model.moe.num_shared is {moe.num_shared}; shared experts are part of "
            f"top_k {moe.top_k} and one must be left to route: use 0 to "
            f"{moe.top_k - 1}"
        )
    routed = moe.num_experts - moe.num_shared
    if moe.gate != "softmax_all" and moe.top_k - moe.num_shared == 1 < routed:
        yield (
            f"model.moe.gate {moe.gate!r} over one routed expert is always 1 and the "
            "loss can't train the router; use gate softmax_all or a higher top_k"
        )
    if model.causal and not ROUTERS[moe.router].causal:
        yield (
            f"model.moe.router {moe.router!r} sees {ROUTERS[moe.router].sees} and the "
            "model is causal; use token"
        )
    yield from _capacity(moe.capacity_factor, moe.router, "model.moe")
    if moe.d_expert is None and model.d_ff % moe.top_k:
        yield (
            f"model.moe.top_k {moe.top_k} doesn't divide model.d_ff {model.d_ff}; "
            "set model.moe.d_expert"
        )


def _sparse(model: ModelConfig) -> Iterator[str]:
    """Yield what is wrong with mixture-of-depths blocks."""
    patterns = (model.attention, model.mlp, model.blocks)
    if "mod" not in model.blocks or not all(patterns):
        return
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
                f"model.vocab_size {model.vocab_size}; set data.bpe_vocab_size "
                f"{model.vocab_size}, or model.vocab_size {data.bpe_vocab_size}"
            )
    if data.mix and model.kind != "decoder":
        yield (
            f"data.mix is a mixture of plain texts but model.kind is {model.kind!r}; "
            "use one source with data.path"
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


def leaves_experts_out(model: ModelConfig) -> bool:
    """Whether a token of some union uses fewer than all of its experts."""
    unions = [model.union_for("mlp")] if "union" in model.mlp else []
    if {"union", "moh"} & set(model.attention):
        unions.append(model.union_for("attention"))
    return any(union.top_k < union.num_experts for union in unions)


def _train(config: ExperimentConfig) -> Iterator[str]:
    if config.optim.ema_decay > 0 and config.model.param_dtype != "float32":
        yield (
            f"optim.ema_decay {config.optim.ema_decay} with model.param_dtype "
            f"{config.model.param_dtype!r}: a mean in it would stand still; use "
            "float32"
        )
    accumulate, batch = config.train.accumulate, config.data.batch_size
    if batch % accumulate:
        yield (
            f"train.accumulate {accumulate} doesn't divide data.batch_size {batch}; "
            f"use one of {divisors(batch)}"
        )
    if config.train.distill_from is not None and config.model.kind != "decoder":
        yield (
            f"train.distill_from is {shown(config.train.distill_from)} and model.kind "
            f"{config.model.kind!r}; only a decoder learns from another run, leave it "
            "None"
        )
    if config.train.top_k_warmup_steps and not leaves_experts_out(config.model):
        yield (
            f"train.top_k_warmup_steps is {config.train.top_k_warmup_steps} and no "
            "union leaves an expert out; use 0, or a top_k below num_experts"
        )
    devices = config.mesh.data
    if devices > 0 and (batch // accumulate) % devices:
        yield (
            f"mesh.data {devices} doesn't divide a microbatch of "
            f"{batch // accumulate} sequences; use one of "
            f"{divisors(batch // accumulate)}"
        )
