"""Every weight of a model, stated once: its axes, what they do, and how it is treated.

Layouts, adapters, decompositions, the optimizer and the cost model read this table.
Imports no jax.

One letter an axis:

    l  layers of a stack          d  model width           v  vocabulary, or classes
    e  experts (1 when dense)     j  key/value heads       p  numbers of an image patch
    x  experts that are scored    g  query heads of each   t  positions, types of tokens
    f  neurons                    h  width of a head       w  model width, going out
    r  rank of a product          n  pairs that are rotated
    s  taps of a convolution
"""

from __future__ import annotations

import dataclasses
import functools
import math
import string
from collections.abc import Mapping
from dataclasses import dataclass

from uoe_jax.config import RANKS, LayerWidths, ModelConfig
from uoe_jax.errors import ConfigError
from uoe_jax.kinds import ATTENTIONS, MLPS, router_columns, router_of

LAYER, EXPERT = "l", "e"
BLOCKS = "trunk.blocks."  # before the number of a stack
GROUPS = ("local_attention", "full_attention")  # heads beside a layer's kind
ROTATED = ("wq", "wk", "bq", "bk")  # of attention: what becomes queries and keys


@dataclass(frozen=True, kw_only=True)
class WeightAxes:
    """One letter an axis, in order, and what the axes do.

    Letters in none of `ins`, `outs` and `kernel` are batch axes: each index of them is
    a matrix of its own. `heads` are the axes that Tucker may take one by one. Letters
    are lower case: ranks and banks have the others. Raises ConfigError for a letter
    that is none, occurs twice, or isn't an axis.
    """

    axes: str
    ins: str
    outs: str
    kernel: str = ""
    heads: str = ""

    def __post_init__(self):
        if set(self.axes) - set(string.ascii_lowercase) or _repeats(self.axes):
            raise ConfigError(
                f"axes are {self.axes!r}; give each axis a lower-case letter of its own"
            )
        used = self.ins + self.outs + self.kernel
        if _repeats(used) or set(used + self.heads) - set(self.axes):
            raise ConfigError(
                f"ins {self.ins!r}, outs {self.outs!r}, kernel {self.kernel!r} and "
                f"heads {self.heads!r} of axes {self.axes!r}: name axes only, none of "
                "them in two of the first three"
            )

    @property
    def batch(self) -> str:
        """Letters of the batch axes."""
        used = self.ins + self.outs + self.kernel
        return "".join(a for a in self.axes if a not in used)


def _repeats(word: str) -> bool:
    return len(set(word)) < len(word)


@dataclass(frozen=True, kw_only=True)
class Weight(WeightAxes):
    """A weight of this library's models.

    `cut` is the axis that a union's experts divide: its heads or its neurons. Dense
    layers are split over tensor devices there, routed ones along their experts. `fsdp`
    is the axis along which the fsdp devices share the weight. `cast`: the model casts
    it to the compute dtype before it uses it, so a frozen copy may be kept in that.
    """

    cut: str = ""
    fsdp: str = ""
    cast: bool = False

    def stacked(self) -> Weight:
        """Return the weight with the layer axis of a stack of blocks before it."""
        return dataclasses.replace(self, axes=LAYER + self.axes)

    def mesh_axes(self, routed: bool) -> str:
        """Return the mesh axis of each dimension, "." where it stays whole.

        "*" alone: all of it does.
        """
        tensor = (EXPERT if routed else self.cut) if self.cut else ""
        names = {self.fsdp: "fsdp", tensor: "tensor"}
        names.pop("", None)
        return " ".join(names.get(a, ".") for a in self.axes) if names else "*"


# The weights of each part by name. A part's optional ones (biases, the gate of SwiGLU)
# are there if the config asks for them.
ATTENTION = {
    "wq": Weight(
        axes="edjgh", ins="d", outs="jgh", heads="jgh", cut="j", fsdp="d", cast=True
    ),
    "wk": Weight(
        axes="edjh", ins="d", outs="jh", heads="jh", cut="j", fsdp="d", cast=True
    ),
    "wv": Weight(
        axes="edjh", ins="d", outs="jh", heads="jh", cut="j", fsdp="d", cast=True
    ),
    "wo": Weight(
        axes="ejghd", ins="jgh", outs="d", heads="jgh", cut="j", fsdp="d", cast=True
    ),
    # Gates of what the heads read.
    "wg": Weight(
        axes="edjg", ins="d", outs="jg", heads="jg", cut="j", fsdp="d", cast=True
    ),
    # Logits in the heads' denominators.
    "sink": Weight(axes="ejg", ins="", outs="jg", heads="jg", cut="j"),
    "bq": Weight(axes="ejgh", ins="", outs="jgh", heads="jgh", cut="j"),
    "bk": Weight(axes="ejh", ins="", outs="jh", heads="jh", cut="j"),
    "bv": Weight(axes="ejh", ins="", outs="jh", heads="jh", cut="j"),
    "bo": Weight(axes="d", ins="", outs="d"),  # of no expert
}
MLP = {
    "w_up": Weight(axes="edf", ins="d", outs="f", cut="f", fsdp="d", cast=True),
    "w_gate": Weight(axes="edf", ins="d", outs="f", cut="f", fsdp="d", cast=True),
    "w_down": Weight(axes="efd", ins="f", outs="d", cut="f", fsdp="d", cast=True),
    # Of low rank: a product's two matrices in the place of its one.
    "w_up_a": Weight(axes="edr", ins="d", outs="r", fsdp="d", cast=True),
    "w_up_b": Weight(axes="erf", ins="r", outs="f", cut="f", cast=True),
    "w_gate_a": Weight(axes="edr", ins="d", outs="r", fsdp="d", cast=True),
    "w_gate_b": Weight(axes="erf", ins="r", outs="f", cut="f", cast=True),
    "w_down_a": Weight(axes="efr", ins="f", outs="r", cut="f", cast=True),
    "w_down_b": Weight(axes="erd", ins="r", outs="d", fsdp="d", cast=True),
    "b_up": Weight(axes="ef", ins="", outs="f", cut="f"),
    "b_gate": Weight(axes="ef", ins="", outs="f", cut="f"),
    "b_down": Weight(axes="d", ins="", outs="d"),
}
_OF_VALUES = ("wv", "wo", "bv")  # of attention: their heads are as wide as values
# Integers beside the weights: of each pair that narrow heads keep, which one it was.
ROTARY_PAIRS = Weight(axes="jn", ins="", outs="", cut="j")
# Routers are small and are read in float32 by every device.
_SCORES = Weight(axes="dx", ins="d", outs="x")
ROUTER = {
    "weight": _SCORES,
    "token_weight": _SCORES,  # hierarchical: the token's own scores
    "key_weight": _SCORES,  # of keys, where these have a router of their own
    "default": Weight(axes="x", ins="", outs="x"),  # of a sample's first segment
    "shared_weight": _SCORES,  # mixture of heads: always-on heads against each other
    "split_weight": _SCORES,  # and against the routed ones
}
NORM = {
    "scale": Weight(axes="d", ins="", outs="d"),
    "bias": Weight(axes="d", ins="", outs="d"),
}
# Causal and depthwise: each channel for itself; small, so it stays whole.
CONVOLUTION = {"weight": Weight(axes="sd", ins="", outs="", kernel="s")}
HEAD_NORM = {"scale": Weight(axes="h", ins="", outs="h")}  # of every head
_SQUARE = Weight(axes="dw", ins="d", outs="w", fsdp="d", cast=True)
OUTER = {
    "embed.embedding": Weight(axes="vd", ins="v", outs="d", fsdp="d", cast=True),
    "embed.weight": Weight(axes="pd", ins="p", outs="d", fsdp="d"),
    "embed.bias": Weight(axes="d", ins="", outs="d"),
    "embed.position.embedding": Weight(
        axes="td", ins="t", outs="d", fsdp="d", cast=True
    ),
    "embed.token_type.embedding": Weight(
        axes="td", ins="t", outs="d", fsdp="d", cast=True
    ),
    "embed.class_token": Weight(axes="d", ins="", outs="d"),
    "pool.weight": _SQUARE,
    "pool.bias": Weight(axes="w", ins="", outs="w"),
    "head.weight": Weight(axes="dv", ins="d", outs="v", fsdp="d", cast=True),
    "head.bias": Weight(axes="v", ins="", outs="v"),
    "head.transform.weight": _SQUARE,
    "head.transform.bias": Weight(axes="w", ins="", outs="w"),
}


def find_weight(name: str) -> Weight | None:
    """Return what is known of a parameter by its dotted name; None: nothing is.

    Inside a stack of blocks its first axis is the layers'.
    """
    if name in OUTER:
        return OUTER[name]
    folder, _, last = name.rpartition(".")
    part = folder.rpartition(".")[2]
    tables = {"attention": ATTENTION, "mlp": MLP, "router": ROUTER}
    tables |= dict.fromkeys(GROUPS, ATTENTION) | {"convolution": CONVOLUTION}
    table = NORM if part.endswith("norm") else tables.get(part, {})
    table = HEAD_NORM if part in ("q_norm", "k_norm") else table
    weight = table.get(last)
    return weight.stacked() if weight and "blocks." in name else weight


def is_decayed(name: str) -> bool:
    """Whether weight decay acts on a parameter: not on norms, biases, sinks, routers.

    By the convention of names, as optimizers also serve models that aren't ours.
    """
    *folders, last = name.split(".")
    if last in ("scale", "sink") or last.startswith(("b", "bias")):
        return False
    return not any("norm" in part or "router" in part for part in [*folders, last])


@dataclass(frozen=True, kw_only=True)
class Param:
    """A parameter of a model: the weight, its shape, and whether its layer routes."""

    weight: Weight
    shape: tuple[int, ...]
    routed: bool = False


def layer_period(model: ModelConfig) -> int:
    """Return after how many layers the pattern of kinds repeats: the stacks."""
    patterns = (model.attention, model.mlp, model.blocks, model.window)
    period = min(math.lcm(*map(len, patterns)), model.num_layers)
    return period if model.widths == LayerWidths() else _width_period(model, period)


@functools.lru_cache(256)
def _width_period(model: ModelConfig, step: int) -> int:
    """Return the first multiple of `step` layers after which widths repeat."""
    own = [model.of_layer(n) for n in range(model.num_layers)]
    shapes = [(layer.d_ff, layer.widths) for layer in own]
    for period in range(step, model.num_layers, step):
        if shapes[period:] == shapes[:-period]:
            return period
    return model.num_layers


def model_params(model: ModelConfig) -> dict[str, Param]:
    """Return every parameter of a model by name; nothing is computed."""
    params = {
        name: Param(weight=OUTER[name], shape=_shape(OUTER[name], sizes))
        for name, sizes in _outer_sizes(model).items()
    }
    width = {"d": model.d_model}
    if not model.post_norm:
        params |= _norm("trunk.norm", model, width)
    if model.embed_norm and model.kind != "vision":
        params |= _norm("embed.norm", model, width)
    if model.kind == "encoder" and model.encoder_head == "tokens":
        params |= _norm("head.norm", model, width)
    period = layer_period(model)
    for stack in range(period):
        layers = len(range(stack, model.num_layers, period))
        for name, param in _block(model, stack).items():
            params[f"{BLOCKS}{stack}.{name}"] = dataclasses.replace(
                param, weight=param.weight.stacked(), shape=(layers, *param.shape)
            )
    return params


def _outer_sizes(model: ModelConfig) -> dict[str, dict[str, int]]:
    """Return the weights outside the blocks, with the sizes of their axes."""
    d, vision = model.d_model, model.kind == "vision"
    names: dict[str, dict[str, int]] = {}
    if vision:
        pixels = model.image_patch**2 * model.image_channels
        names["embed.weight"] = {"p": pixels, "d": d}
        names["embed.bias"] = {"d": d}
    else:
        names["embed.embedding"] = {"v": model.vocab_size, "d": d}
    if not model.rotates:
        length = model.num_image_tokens if vision else model.max_seq_len
        names["embed.position.embedding"] = {"t": length, "d": d}
    if vision and model.class_token:
        names["embed.class_token"] = {"d": d}
    if not vision and model.token_types:
        names["embed.token_type.embedding"] = {"t": model.token_types, "d": d}
    return names | _head_sizes(model)


def _head_sizes(model: ModelConfig) -> dict[str, dict[str, int]]:
    """Return the weights after the blocks, with the sizes of their axes."""
    d, names = model.d_model, {}
    if model.kind == "decoder":
        if not model.tie_embeddings:
            names["head.weight"] = {"d": d, "v": model.vocab_size}
        return names
    if model.kind == "encoder" and model.pooling == "tanh":
        names |= {"pool.weight": {"d": d, "w": d}, "pool.bias": {"w": d}}
    if model.kind == "encoder" and model.encoder_head == "tokens":
        names["head.transform.weight"] = {"d": d, "w": d}
        names["head.transform.bias"] = {"w": d}
        names["head.bias"] = {"v": model.vocab_size}
    elif model.kind == "vision" or model.encoder_head == "classes":
        names["head.weight"] = {"d": d, "v": model.num_classes}
        names["head.bias"] = {"v": model.num_classes}
    return names


def _block(model: ModelConfig, number: int) -> dict[str, Param]:
    """Return the parameters of one layer by name, without the layer axis."""
    attention, mlp = model.layer_kinds[number]
    model, block = model.of_layer(number), model.block_kinds[number]
    sizes = {"d": model.d_model}
    params = _norm("attention_norm", model, sizes) | _norm("mlp_norm", model, sizes)
    params |= _attention(model, attention)
    for name, group in model.beside.items():
        params |= _attention(group, "dense", name)
    if model.convolution:
        weight, taps = CONVOLUTION["weight"], {"s": model.convolution}
        shape = _shape(weight, sizes | taps)
        params["convolution.weight"] = Param(weight=weight, shape=shape)
    params |= _mlp(model, mlp)
    if block == "mod":
        params |= _router("router", {"weight": 1}, model.d_model)
    return params


def _norm(name: str, model: ModelConfig, sizes: Mapping[str, int]) -> dict[str, Param]:
    parts = ("scale", "bias") if model.centred else ("scale",)
    return {
        f"{name}.{part}": Param(weight=NORM[part], shape=_shape(NORM[part], sizes))
        for part in parts
    }


def _attention(
    model: ModelConfig, kind: str, part: str = "attention"
) -> dict[str, Param]:
    router = router_of(model, "attention", kind)
    experts = 1 if router is None else router.num_experts
    sizes = {
        "e": experts,
        "d": model.d_model,
        "j": model.num_kv_heads // experts,
        "g": model.num_query_groups,
        "h": model.key_dim,
    }
    values = sizes | {"h": model.value_dim}
    params = {
        name: Param(
            weight=weight,
            shape=_shape(weight, values if name in _OF_VALUES else sizes),
            routed=router is not None,
        )
        for name, weight in ATTENTION.items()
        if _has(model, name)
    }
    if model.qk_norm:
        scale = HEAD_NORM["scale"]
        params |= {
            f"{name}.scale": Param(weight=scale, shape=_shape(scale, sizes))
            for name in ("q_norm", "k_norm")
        }
    columns = router_columns(model, "attention", kind)
    params |= _router("router", columns, model.d_model)
    params |= ATTENTIONS[kind].params(model)
    return {f"{part}.{name}": param for name, param in params.items()}


def _has(model: ModelConfig, name: str) -> bool:
    """Whether a model's attention has a weight of the table."""
    asked = {"wg": model.output_gate, "sink": model.sink, "bo": model.output_bias}
    return asked.get(name, name.startswith("w") or model.qkv_bias)


def _mlp(model: ModelConfig, kind: str) -> dict[str, Param]:
    experts, width = MLPS[kind].sizes(model)
    sizes = {"e": experts, "d": model.d_model, "f": width}
    routed = router_of(model, "mlp", kind) is not None
    params = {}
    for name in mlp_weights(model):
        rank = {"r": model.rank(name[:-2])} if name[:-2] in RANKS else {}
        shape = _shape(MLP[name], sizes | rank)
        params[name] = Param(weight=MLP[name], shape=shape, routed=routed)
    params |= _router("router", router_columns(model, "mlp", kind), model.d_model)
    params |= MLPS[kind].params(model)
    return {f"mlp.{name}": param for name, param in params.items()}


def mlp_weights(model: ModelConfig) -> list[str]:
    """Return the names of an MLP's weights in the config of a layer."""
    names = [name for name in RANKS if model.gated or name != "w_gate"]
    found = []
    for name in names:
        found += [f"{name}_a", f"{name}_b"] if model.rank(name) else [name]
    biases = [f"b{name[1:]}" for name in names] if model.has_mlp_bias else []
    return found + biases


def rotary_pairs(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each stack's integers of rotated pairs, by name.

    Narrow heads whose queries and keys are rotated have them: each pair's number in a
    head of the model's width, by which it is rotated.
    """
    period, found = layer_period(model), {}
    for stack in range(period):
        own = model.of_layer(stack)
        if own.widths.key_dim and model.rotates:
            layers = len(range(stack, model.num_layers, period))
            shape = (layers, model.num_kv_heads, own.key_dim // 2)
            found[f"{BLOCKS}{stack}.attention.rotary_pairs"] = shape
    return found


def _router(name: str, columns: Mapping[str, int], width: int) -> dict[str, Param]:
    return {
        f"{name}.{part}": Param(
            weight=ROUTER[part], shape=_shape(ROUTER[part], {"d": width, "x": count})
        )
        for part, count in columns.items()
    }


def _shape(weight: Weight, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(sizes[axis] for axis in weight.axes)
