"""What single experts and heads add to the residual, and a model without some of them.

    probe = capture(model)
    seen = probe(tokens)
    seen.experts["mlp", 3]  # [E, B, T, D]: their sum and `bias` are the layer's output
    probe.without("mlp", 3, expert=5)(tokens).logits

A model that isn't captured runs as ever: a copy of it records.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from uoe_jax.config import ModelConfig
from uoe_jax.errors import ConfigError, shown
from uoe_jax.kinds import router_of
from uoe_jax.model.attention import AttentionWeights
from uoe_jax.model.context import Context
from uoe_jax.model.mlp import DenseMlp, RoutedMlp
from uoe_jax.model.routing.balance import Aux
from uoe_jax.model.routing.token import Routing
from uoe_jax.model.sharded import pack_local
from uoe_jax.ops.packing import Packing

Part = Literal["attention", "mlp"]
# What an output becomes: an array that is broadcast to it, or a function of it.
Value = Array | float | Callable[[Array], Array]


class Captured(NamedTuple):
    """A forward pass, and what was added to the residual in it.

    By (part, layer): `outputs` are whole, `experts` of each expert with its gate, zero
    where a token didn't choose it; a dense part is one expert. `heads` are by layer, in
    the order of experts. `bias` is the output bias, which no expert has. In a
    mixture-of-depths block T are the tokens that entered.
    """

    logits: Float[Array, ...]
    aux: Aux
    outputs: dict[tuple[str, int], Float[Array, "B T D"]]
    experts: dict[tuple[str, int], Float[Array, "E B T D"]]
    heads: dict[int, Float[Array, "Q B T D"]]
    bias: dict[tuple[str, int], Float[Array, " D"]]


class _Edit(NamedTuple):
    part: str
    layer: int
    expert: int | None
    head: int | None
    value: Value


@dataclass(frozen=True)
class Capture:
    """A model that says what its experts and heads add; some may be off or replaced."""

    model: Any
    edits: tuple[_Edit, ...] = ()
    _programs: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __repr__(self) -> str:
        return f"<capture of a {type(self.model).__name__}, {len(self.edits)} replaced>"

    def __call__(self, inputs: Array, **options: Any) -> Captured:
        """Run the model; options are its own (positions, segments, ...)."""
        if "run" not in self._programs:
            self._programs["run"] = jax.jit(self._run, static_argnums=3)
        arrays = {k: v for k, v in options.items() if hasattr(v, "shape")}
        words = tuple((k, v) for k, v in options.items() if k not in arrays)
        return self._programs["run"](self.model, inputs, arrays, words)

    def without(
        self,
        part: Part,
        layer: int,
        *,
        expert: int | None = None,
        head: int | None = None,
    ) -> Capture:
        """Return the model without what an expert, or a head of attention, adds."""
        return self.replaced(part, layer, 0.0, expert=expert, head=head)

    def replaced(
        self,
        part: Part,
        layer: int,
        value: Value,
        *,
        expert: int | None = None,
        head: int | None = None,
    ) -> Capture:
        """Return the model with another output of an expert, or a head of attention.

        `value` is an array that is broadcast to [B, T, D], or a function of the output:
        `lambda y: y.mean((0, 1), keepdims=True)`. Later calls see earlier ones; heads
        come before experts. Raises ConfigError for a part that isn't there.
        """
        _check(self.model.config, part, layer, expert, head)
        edit = _Edit(part, layer, expert, head, value)
        return replace(self, edits=(*self.edits, edit), _programs={})

    def _run(
        self,
        model: Any,
        inputs: Array,
        arrays: Mapping[str, Array],
        words: tuple[tuple[str, Any], ...],
    ) -> Captured:
        record = _Record(self.edits)
        logits, aux = _watched(model, record)(inputs, **arrays, **dict(words))
        return Captured(
            logits, aux, record.outputs, record.experts, record.heads, record.bias
        )


def capture(model: nnx.Module) -> Capture:
    """Return a model that says what its experts and heads add to the residual.

    Call it as the model is called. `without` and `replaced` return one with experts or
    heads switched off or replaced. Raises ConfigError for what is no model of this
    package.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, ModelConfig):
        raise ConfigError(
            f"capture takes a model, such as load_run(RUN).model; this is "
            f"{shown(type(model).__name__)}"
        )
    if config.additions:
        raise ConfigError(
            f"the model has {config.additions[0]}, whose parts aren't captured; "
            "take a model without it"
        )
    return Capture(model)


def _check(
    model: ModelConfig, part: str, layer: int, expert: int | None, head: int | None
) -> None:
    if part not in ("attention", "mlp"):
        raise ConfigError(f"part is {shown(part)}; it is attention or mlp")
    if (expert is None) == (head is None) or (part == "mlp" and expert is None):
        raise ConfigError(
            f"expert is {shown(expert)} and head {shown(head)}; name an expert, or a "
            "head of attention"
        )
    limits = {"layer": (layer, model.num_layers)}
    if head is not None:
        limits["head"] = (head, model.num_heads)
    if expert is not None and 0 <= layer < model.num_layers:
        kind = model.layer_kinds[layer][part == "mlp"]
        router = router_of(model, part, kind)
        count = 1 if router is None else router.num_experts
        limits["expert"] = (expert, count)
    for name, (number, count) in limits.items():
        if not 0 <= number < count:
            raise ConfigError(f"{name} is {number}; {part} has 0 to {count - 1}")


class _Record:
    """What the parts of one forward pass added, layer by layer."""

    def __init__(self, edits: tuple[_Edit, ...]):
        self.edits = edits
        self.outputs: dict[tuple[str, int], Array] = {}
        self.experts: dict[tuple[str, int], Array] = {}
        self.heads: dict[int, Array] = {}
        self.bias: dict[tuple[str, int], Array] = {}

    def add(
        self, part: str, output: Array, bias: Array | None, pieces: Array, experts: int
    ) -> Array:
        """Keep what the next layer's part added; return it, edited."""
        layer = sum(name == part for name, _ in self.outputs)
        edits = [e for e in self.edits if (e.part, e.layer) == (part, layer)]
        if part == "attention":
            pieces = _edited(pieces, [(e.head, e.value) for e in edits])
            self.heads[layer] = pieces
            pieces = pieces.reshape(experts, -1, *pieces.shape[1:]).sum(1)
        pieces = _edited(pieces, [(e.expert, e.value) for e in edits])
        if bias is None:
            bias = jnp.zeros(output.shape[-1:], output.dtype)
        if edits:
            output = (pieces.sum(0) + _beside(bias, output)).astype(output.dtype)
        place = (part, layer)
        self.outputs[place], self.experts[place] = output, pieces
        self.bias[place] = bias
        return output


def _beside(bias: Array, output: Array) -> Array:
    return bias.astype(output.dtype).reshape((1,) * (output.ndim - 1) + (-1,))


def _edited(pieces: Array, edits: list[tuple[int | None, Value]]) -> Array:
    for number, value in edits:
        if number is not None:
            new: Any = value(pieces[number]) if callable(value) else value
            new = jnp.broadcast_to(jnp.asarray(new, pieces.dtype), pieces.shape[1:])
            pieces = pieces.at[number].set(new)
    return pieces


def _watched(model: Any, record: _Record) -> Any:
    """Return a copy of a model that records, its layers run one by one."""
    model = jax.tree.map(lambda leaf: leaf, model)
    model.trunk.scan_layers, model.trunk.remat = False, "none"
    for block in model.trunk.blocks:
        block.attention = _watching(block.attention, record)
        block.mlp = _watching(block.mlp, record)
    return model


def _watching(part: Any, record: _Record) -> Any:
    """Return a copy of an attention or MLP whose last step records."""
    copy = object.__new__(_watching_class(type(part)))
    vars(copy).update(vars(part))
    copy.record = record
    return copy


@functools.cache
def _watching_class(cls: type) -> type:
    for base, watching in (
        (AttentionWeights, _WatchedHeads),
        (RoutedMlp, _WatchedExperts),
        (DenseMlp, _WatchedMlp),
    ):
        if issubclass(cls, base):
            return type(f"Watched{cls.__name__}", (watching, cls), {})
    raise ConfigError(
        f"capture doesn't know {cls.__name__}; derive it from "
        "AttentionWeights, RoutedMlp or DenseMlp"
    )


def _value(bias: Any) -> Array | None:
    return None if bias is None else bias[...]


class _WatchedHeads:
    """Attention that records each query head's part of its output."""

    def project_out(self: Any, heads: Float[Array, "*N Q H"]) -> Array:
        output = super().project_out(heads)  # type: ignore[misc]
        width = heads.shape[-1]
        weight = self.wo[...].reshape(-1, width, self.wo.shape[-1])
        pieces = jnp.einsum("...qh,qhd->q...d", heads, weight.astype(heads.dtype))
        return self.record.add("attention", output, _value(self.bo), pieces, 1)

    def project_picks(
        self: Any, heads: Float[Array, "J M G H"], routing: Routing, packing: Packing
    ) -> Array:
        whole = super().project_picks(heads, routing, packing)  # type: ignore[misc]
        experts, j, groups, _, width = self.wo.shape
        bias = 0.0 if self.bo is None else _beside(self.bo[...], whole)

        def piece(number: Array) -> Array:
            expert, inner = number // (j * groups), number % (j * groups)
            only = jnp.arange(j * groups).reshape(j, 1, groups, 1) == inner
            chosen = jnp.where(routing.choices == expert, routing.gates, 0)
            alone = routing._replace(gates=chosen)
            masked = jnp.where(only, heads, jnp.zeros_like(heads))
            return (
                super(_WatchedHeads, self).project_picks(  # type: ignore[misc]
                    masked, alone, packing
                )
                - bias
            )

        shape = (*routing.choices.shape[:2], width)
        pieces = jax.lax.map(piece, jnp.arange(experts * j * groups))
        pieces = pieces.reshape(-1, *shape)
        output = self.record.add(
            "attention", whole.reshape(shape), _value(self.bo), pieces, experts
        )
        return output.reshape(whole.shape)


class _WatchedExperts:
    """A routed MLP that records what each expert adds, times its gate."""

    def apply(
        self: Any, x: Float[Array, "B T D"], routing: Routing, context: Context
    ) -> Array:
        output = super().apply(x, routing, context)  # type: ignore[misc]
        count = self.w_up.shape[0]
        packing = pack_local(self.router, routing, context, count)

        def piece(expert: Array) -> Array:
            gates = jnp.where(routing.choices == expert, routing.gates, 0)
            rows = self.experts(x.reshape(-1, x.shape[-1]), packing, gates)
            return rows.reshape(x.shape)

        pieces = jax.lax.map(piece, jnp.arange(count))
        return self.record.add("mlp", output, _value(self.b_down), pieces, count)


class _WatchedMlp:
    """A dense MLP, which is one expert."""

    def apply(self: Any, x: Float[Array, "*N D"]) -> Array:
        output = super().apply(x)  # type: ignore[misc]
        bias = _value(self.b_down)
        piece = output if bias is None else output - _beside(bias, output)
        return self.record.add("mlp", output, bias, piece[None], 1)
