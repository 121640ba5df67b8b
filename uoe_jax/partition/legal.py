"""Which meshes a model can be laid out on, and why not on the others. Imports no jax.

Sizes are devices by axis name. `sequence` splits the tokens of a sample, `tensor` the
experts of a union or mixture and the heads and MLP columns of dense layers, `fsdp` and
`data` the batch; `fsdp` also splits weights and optimizer state.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

from uoe_jax.config import ExperimentConfig, MeshConfig, ModelConfig
from uoe_jax.errors import ConfigError, all_divisors, divisors, shown
from uoe_jax.kinds import ATTENTIONS, MLPS, ROUTERS, AttentionFacts, MlpFacts
from uoe_jax.splits import split_axes
from uoe_jax.weights import model_params

# Neighbours in the last axes are neighbours on the machine: these talk most.
AXES = ("data", "fsdp", "sequence", "tensor")
Sizes = Mapping[str, int]

# The kinds of a layer's two parts, in the order in which `layer_kinds` has them.
_KINDS: dict[str, Mapping[str, AttentionFacts | MlpFacts]] = {
    "attention": ATTENTIONS,
    "mlp": MLPS,
}


def mesh_sizes(mesh: MeshConfig, num_devices: int) -> dict[str, int]:
    """Return devices by axis, `mesh.data` 0 filled in with what is left.

    Raises:
      ConfigError: an axis below 1, or more devices asked for than there are.
    """
    sizes = {axis: getattr(mesh, axis) for axis in AXES}
    for axis in AXES:
        least = 0 if axis == "data" else 1
        if sizes[axis] < least:
            raise ConfigError(
                f"mesh.{axis} is {sizes[axis]}; it must be at least {least}"
            )
    others = math.prod(sizes[axis] for axis in AXES[1:])
    sizes["data"] = sizes["data"] or max(num_devices // others, 1)
    count = sizes["data"] * others
    if count > num_devices:
        text = " x ".join(f"{a} {n}" for a, n in sizes.items() if n > 1 or a == "data")
        if others == 1:
            raise ConfigError(
                f"mesh.data is {count} but {num_devices} devices are visible; "
                f"use mesh.data {num_devices} or less (0 takes all)"
            )
        raise ConfigError(
            f"mesh {text} needs {count} devices but {num_devices} are visible; "
            f"choose axes whose product is at most {num_devices}"
        )
    return sizes


def check_axes(names: Iterable[str]) -> None:
    """Raise ConfigError for an axis of a mesh that means nothing to a model here."""
    for name in names:
        if name not in AXES:
            raise ConfigError(
                f"the mesh has an axis {shown(name)}; name its axes "
                f"{', '.join(AXES)}, as partition.mesh.mesh_for does"
            )


def check_layout(config: ExperimentConfig, sizes: Sizes) -> None:
    """Raise ConfigError with every reason why the model can't be laid out so."""
    if problems := list(layout_problems(config, sizes)):
        raise ConfigError("; ".join(problems))


def layout_problems(config: ExperimentConfig, sizes: Sizes) -> Iterator[str]:
    """Yield what doesn't divide as "value, rule, fix"."""
    yield from _batch(config, sizes)
    fsdp, width = sizes["fsdp"], config.model.d_model
    if width % fsdp:
        yield _indivisible("mesh.fsdp", fsdp, "model.d_model", width)
    yield from _rules(config, sizes)
    yield from _tensor(config.model, sizes)
    yield from _sequence(config, sizes)
    yield from _choices(config, sizes)


def _rules(config: ExperimentConfig, sizes: Sizes) -> Iterator[str]:
    rules, fsdp = config.layout.rules, sizes["fsdp"]
    if not rules:
        return
    params = model_params(config.model)
    for name, words in split_axes(config.model, rules).items():
        axes = words.split()
        size = params[name].shape[axes.index("fsdp")] if "fsdp" in axes else fsdp
        if size % fsdp:
            letter = params[name].weight.axes[axes.index("fsdp")]
            yield _indivisible("mesh.fsdp", fsdp, f"axis {letter} of {name}", size)


def _batch(config: ExperimentConfig, sizes: Sizes) -> Iterator[str]:
    count = sizes["data"] * sizes["fsdp"]
    size = config.data.batch_size // max(config.train.accumulate, 1)
    if size % count == 0:
        return
    fits = ", ".join(str(n) for n in all_divisors(size) if n < count)
    yield (
        f"a batch of {size} doesn't divide over {count} devices (mesh.data "
        f"{sizes['data']} x mesh.fsdp {sizes['fsdp']}); use a product of {fits}, or a "
        f"batch of {-(-size // count) * count}"
    )


def tensor_counts(model: ModelConfig) -> dict[str, int]:
    """Return the numbers that `tensor` must divide, by the name of their field."""
    counts = {}
    for attention, mlp in set(model.layer_kinds):
        if ATTENTIONS[attention].splits:
            router = ATTENTIONS[attention].router(model)
            if router is None:
                counts["model.num_kv_heads"] = model.num_kv_heads
            else:
                counts["the experts of union attention"] = router.num_experts
        for name, group in model.beside.items():
            counts[f"the key heads of {name}"] = group.num_kv_heads
        if MLPS[mlp].splits:
            experts, width = MLPS[mlp].sizes(model)
            if MLPS[mlp].router(model) is None:
                counts[MLPS[mlp].field] = experts * width
                if narrow := model.widths.d_ff:
                    name = "the common divisor of model.widths.d_ff,"
                    counts[name] = math.gcd(*narrow)
            else:
                counts[f"{MLPS[mlp].field}.num_experts"] = experts
    return counts


def _tensor(model: ModelConfig, sizes: Sizes) -> Iterator[str]:
    tensor, sequence = sizes["tensor"], sizes["sequence"]
    if tensor * sequence > 1:
        yield from _unsplit(model)
    for name, number in sorted(tensor_counts(model).items()):
        if number % tensor:
            yield _indivisible("mesh.tensor", tensor, name, number)
    union = any(attention == "union" for attention, _ in model.layer_kinds)
    experts = model.union_for("attention").num_experts
    if union and experts % tensor == 0 and (experts // tensor) % sequence:
        yield (
            f"mesh.tensor {tensor} x mesh.sequence {sequence} doesn't divide the "
            f"{experts} experts of union attention, which the sequence devices share "
            f"out; use a product of {divisors(experts)}"
        )


def _unsplit(model: ModelConfig) -> Iterator[str]:
    for index, (part, table) in enumerate(_KINDS.items()):
        able = [name for name, facts in table.items() if facts.splits]
        kinds = {kinds[index] for kinds in model.layer_kinds} - set(able)
        for kind in sorted(kinds):
            yield (
                f"model.{part} {kind!r} isn't split over mesh.tensor or mesh.sequence; "
                f"leave both 1 or use {', '.join(able)}"
            )
    union = any(attention == "union" for attention, _ in model.layer_kinds)
    if union and model.union_for("attention").shared_kv:
        yield (
            "union attention with shared_kv isn't split over mesh.tensor or "
            "mesh.sequence; leave both 1 or switch shared_kv off"
        )
    if "mod" in model.block_kinds:
        yield (
            "model.blocks 'mod' isn't split over mesh.tensor or mesh.sequence; leave "
            "both 1"
        )


def _sequence(config: ExperimentConfig, sizes: Sizes) -> Iterator[str]:
    sequence, tensor = sizes["sequence"], sizes["tensor"]
    if config.model.kind != "decoder":
        if sequence > 1:
            yield (
                f"mesh.sequence is {sequence} and model.kind {config.model.kind!r}; "
                "classifiers aren't split by tokens, use mesh.sequence 1"
            )
        return
    # Devices of one tensor group each take the loss of their share of the tokens.
    if config.seq_len % (sequence * tensor):
        yield (
            f"mesh.sequence {sequence} x mesh.tensor {tensor} doesn't divide the "
            f"{config.seq_len} tokens of a sequence; use a product of "
            f"{divisors(config.seq_len)}"
        )
    share, before = config.seq_len // sequence, config.model.convolution - 1
    if sequence > 1 and share < before:
        fits = (
            n for n in all_divisors(config.seq_len) if config.seq_len // n >= before
        )
        most = max(fits, default=1)
        yield (
            f"mesh.sequence {sequence} leaves a device {share} tokens of a sequence, "
            f"and model.convolution {before + 1} reads {before} of the device before; "
            f"use at most {most}"
        )


def _choices(config: ExperimentConfig, sizes: Sizes) -> Iterator[str]:
    layout, model = config.layout, config.model
    if sizes["sequence"] > 1 and layout.sequence_attention == "heads":
        yield from _exchanged_heads(model, sizes)
    if sizes["tensor"] == 1:
        return
    if layout.scatters and model.kind != "decoder":
        yield (
            f"layout.tensor_reduce is {layout.tensor_reduce!r} and model.kind "
            f"{model.kind!r}; classifiers keep all tokens, use all_reduce"
        )
    if layout.dispatches:
        yield from _all_to_all(model)


def _exchanged_heads(model: ModelConfig, sizes: Sizes) -> Iterator[str]:
    """Yield the key heads that sequence and tensor devices can't share out."""
    counts = {f"the key heads of {n}": g.num_kv_heads for n, g in model.beside.items()}
    if any(ATTENTIONS[kind].router(model) is None for kind, _ in model.layer_kinds):
        counts["model.num_kv_heads"] = model.num_kv_heads
    devices = sizes["sequence"] * sizes["tensor"]
    for name, number in sorted(counts.items()):
        if number % devices:
            yield (
                "layout.sequence_attention is 'heads' and mesh.sequence "
                f"{sizes['sequence']} x mesh.tensor {sizes['tensor']} doesn't divide "
                f"{name} {number}; use a product of {divisors(number)}, or ring"
            )


def _all_to_all(model: ModelConfig) -> Iterator[str]:
    if model.kind != "decoder":
        yield (
            f"layout.dispatch is 'all_to_all' and model.kind {model.kind!r}; it "
            "shares out the tokens of decoders, use replicated"
        )
    for kind in sorted({mlp for _, mlp in model.layer_kinds}):
        router, field = MLPS[kind].router(model), MLPS[kind].field
        if router is None:
            continue
        if not ROUTERS[router.router].sees_one_token(router):
            yield (
                f"layout.dispatch is 'all_to_all' but {field}'s router looks at "
                "other tokens; use replicated, or router token with patch_size 1"
            )
        if router.capacity_factor is not None:
            yield (
                f"layout.dispatch is 'all_to_all' but {field}.capacity_factor is "
                f"{router.capacity_factor}, counted over whole samples; use replicated"
            )


def _indivisible(axis: str, size: int, name: str, number: int) -> str:
    return f"{axis} {size} doesn't divide {name} {number}; use {divisors(number)}"
