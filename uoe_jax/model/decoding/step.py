"""One token a row through all layers: `prepare` once, then `decode` each token."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from uoe_jax.model.attention import DenseAttention, SharedKvAttention, UnionAttention
from uoe_jax.model.baselines.mod import decode_around
from uoe_jax.model.baselines.moe import MoeMlp
from uoe_jax.model.baselines.moh import MohAttention
from uoe_jax.model.cache import Cache, Entry, Slot
from uoe_jax.model.decoding.attention import SharedKvTokenAttention, TokenAttention
from uoe_jax.model.decoding.mlp import TokenMlp
from uoe_jax.model.decoding.routing import scale_of, serves
from uoe_jax.model.head_groups import TokenHeads
from uoe_jax.model.layers import Norm
from uoe_jax.model.mlp import DenseMlp, UnionMlp
from uoe_jax.ops.token_products.api import Addition, Projection, project, static
from uoe_jax.ops.token_products.eight_bits import in_int8

# Parts that have a form for decoding; of other classes the part's own `decode` is used.
FORMS: dict[type, Callable[[Any, Any], Any]] = {
    DenseAttention: TokenAttention.of,
    UnionAttention: TokenAttention.of,
    SharedKvAttention: SharedKvTokenAttention.of,
    MohAttention: SharedKvTokenAttention.of,
    DenseMlp: TokenMlp.of,
    UnionMlp: TokenMlp.of,
    MoeMlp: TokenMlp.of,
}


# A kernel more costs a GPU about 2 us a token, in which an H200 reads this much.
START_BYTES = dict.fromkeys(("gpu", "cuda"), 8 << 20)


class Form(NamedTuple):
    """In what form weights are read: their dtype, for how many rows, of eight bits.

    `wide`: held in float32 after they were rounded to their dtype. A CPU has no
    products of bfloat16, and would widen all weights for each token. `start`: bytes
    that are read in the time that a kernel more takes.
    """

    dtype: Any
    batch: int
    int8: bool = False
    wide: bool = False
    start: int = 0

    def spares(self, weights: int) -> bool:
        """Whether a kernel more is made up for by so many weights that nobody reads."""
        size = 1 if self.int8 else jnp.dtype(self.dtype).itemsize
        return weights * size > self.start

    @property
    def read_as(self) -> Any:
        """The dtype of weights before they are rounded to eight bits."""
        return jnp.dtype("float32") if self.int8 else self.dtype

    def of_weights(self, parts: Any) -> Any:
        """Return projections and additions, alone or within a part, in this form."""
        if not (self.int8 or self.wide):
            return parts

        def change(part: Any) -> Any:
            if not is_product(part):
                return part
            if self.int8:
                return in_int8(part, self.dtype)
            return jax.tree.map(lambda a: a.astype(jnp.float32), part)

        return jax.tree.map(change, parts, is_leaf=is_product)


def is_product(part: Any) -> bool:
    """Whether something holds weights that tokens are multiplied with."""
    return isinstance(part, (Projection, Addition))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OwnPart:
    """A part that decodes in its own way."""

    part: Any

    def add_to(
        self,
        x: Float[Array, "B D"],
        norm: Norm | None,
        slot: Slot,
        to: Float[Array, "B D"] | None = None,
    ) -> tuple[Float[Array, "B D"], Slot]:
        """Return `to` (default x) plus what the part makes of norm(x), and its slot."""
        y, slot = self.part.decode(x if norm is None else norm(x), slot)
        return (x if to is None else to) + y, slot


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenBlock:
    """A block's two parts with their norms; `router` says which tokens enter."""

    attention_norm: Norm
    attention: Any
    mlp_norm: Norm
    mlp: Any
    router: Any
    post_norm: bool = static(False)

    def decode(
        self, x: Float[Array, "B D"], slot: Slot
    ) -> tuple[Float[Array, "B D"], Slot]:
        """Return the output for one token a row, number `slot.lengths`."""
        if self.router is not None:
            return decode_around(self, x, slot)
        return self.run_token(x, slot)

    def run_token(
        self, x: Float[Array, "B D"], slot: Slot
    ) -> tuple[Float[Array, "B D"], Slot]:
        """Return what `decode` does, with every token inside."""
        parts = ((self.attention_norm, self.attention), (self.mlp_norm, self.mlp))
        for norm, part in parts:
            if self.post_norm:
                x, slot = part.add_to(x, None, slot)
                x = norm(x)
            else:
                x, slot = part.add_to(x, norm, slot)
        return x, slot


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenDecoder:
    """A decoder's weights, laid out for decoding by `prepare`.

    `layers` are its blocks in order, or its stacks of them where the compiled step has
    a loop over layers.
    """

    embed: Any
    layers: tuple[TokenBlock, ...]
    norm: Norm | None
    head: Projection
    depth: int = static()
    looped: bool = static(False)

    def decode(
        self, token: Int[Array, " B"], cache: Cache
    ) -> tuple[Float32[Array, "B V"], Cache]:
        """Append one token to each row; return the logits after it."""
        x = self.embed(token, cache.lengths)
        run = self._loop if self.looped else self._walk
        x, entries = run(x, cache)
        return self.logits(x), Cache(cache.lengths + 1, entries)

    def logits(self, x: Float[Array, "B D"]) -> Float32[Array, "B V"]:
        """Return float32 logits of the last hidden state."""
        scale = scale_of(self.norm)
        if scale is None and self.norm is not None:
            x = self.norm(x)
        wide = jnp.promote_types(x.dtype, jnp.float32)
        return project(x, self.head, scale, dtype=wide)[:, 0]

    def _walk(self, x: Array, cache: Cache) -> tuple[Array, tuple[Entry, ...]]:
        """Run the layers one by one."""
        entries = list(cache.layers)
        for number, block in enumerate(self.layers):
            index, stack = divmod(number, len(entries))
            slot = Slot(entries[stack], index, cache.lengths, cache.lengths)
            x, slot = block.decode(x, slot)
            entries[stack] = slot.entry
        return x, tuple(entries)

    def _loop(self, x: Array, cache: Cache) -> tuple[Array, tuple[Entry, ...]]:
        """Run whole periods in a loop, then the layers left over."""
        stacks, period = self.layers, len(cache.layers)
        whole = self.depth // period

        def run(carry: Any, stack: int, index: Any, block: TokenBlock) -> Any:
            x, entries = carry
            slot = Slot(entries[stack], index, cache.lengths, cache.lengths)
            x, slot = block.decode(x, slot)
            return x, (*entries[:stack], slot.entry, *entries[stack + 1 :])

        def body(carry: Any, item: Any) -> tuple[Any, None]:
            index, blocks = item
            for stack, block in enumerate(blocks):
                carry = run(carry, stack, index, block)
            return carry, None

        # The cache is carried, not scanned over: its update then happens in place.
        first = jax.tree.map(lambda a: a[:whole], stacks)
        carry = (x, cache.layers)
        carry, _ = jax.lax.scan(body, carry, (jnp.arange(whole), first))
        for stack in range(self.depth - whole * period):
            last = jax.tree.map(lambda a: a[whole], stacks[stack])
            carry = run(carry, stack, whole, last)
        return carry


def prepare(model: Any, batch: int, looped: bool | None = None) -> TokenDecoder:
    """Return a decoder's weights as decoding of `batch` rows reads them.

    In the compute dtype, or of eight bits where the model's `decode_weights` say so,
    what is read together side by side; routers stay float32. Of parts without such a
    form the weights are the model's own.

    Args:
      model: a decoder.
      batch: rows that are decoded at once.
      looped: compile one period of layers and loop over them; None: on a CPU or TPU
        where layers are alike. On a GPU a loop costs more than it saves.
    """
    config, backend = model.config, jax.default_backend()
    if looped is None:
        looped = model.trunk.alike and backend not in ("gpu", "cuda")
    stacks, dtype = model.trunk.blocks, jnp.dtype(config.compute_dtype)
    form = Form(
        dtype,
        batch,
        int8=model.decode_weights == "int8",
        wide=backend == "cpu" and dtype == jnp.bfloat16,
        start=START_BYTES.get(backend, 0),
    )
    if looped:
        layers = tuple(_prepare_stack(stack, form) for stack in stacks)
    else:
        layers = tuple(
            _prepare_layer(stacks[number % len(stacks)], number // len(stacks), form)
            for number in range(config.num_layers)
        )
    return TokenDecoder(
        embed=model.embed,
        layers=layers,
        norm=model.trunk.norm,
        head=_head(model, form),
        depth=config.num_layers,
        looped=looped,
    )


def prepare_block(block: Any, form: Form) -> TokenBlock:
    """Return one block in the form in which decoding reads it."""
    attention = _prepare_part(block.attention, form)
    if not block.plain:
        _, groups, convolution = block.heads
        # Norms [1, H] and sinks [1, J, G] stay as they are, others are cast on every
        # use anyway.
        cast = lambda a: a.astype(form.dtype) if a.ndim > 3 else a
        attention = TokenHeads(attention, jax.tree.map(cast, dict(groups)), convolution)
    return TokenBlock(
        attention_norm=block.attention_norm,
        attention=attention,
        mlp_norm=block.mlp_norm,
        mlp=_prepare_part(block.mlp, form),
        router=block.router,
        post_norm=block.post_norm,
    )


@functools.partial(jax.jit, static_argnames=("form",))
def _prepare_layer(stack: Any, index: Any, form: Form) -> TokenBlock:
    """Return a layer of a stack: one program for all of them."""
    return prepare_block(jax.tree.map(lambda a: a[index], stack), form)


@functools.partial(jax.jit, static_argnames=("form",))
def _prepare_stack(stack: Any, form: Form) -> TokenBlock:
    """Return a stack of layers, with their axis in front as before."""
    return jax.vmap(lambda block: prepare_block(block, form))(stack)


def _prepare_part(part: Any, wanted: Form) -> Any:
    """Return a part in its form for decoding, or as it is."""
    form = FORMS.get(type(part))
    router = getattr(part, "router", None)
    if getattr(part, "low_rank", ()):
        form = functools.partial(TokenMlp.of, two=wanted.spares)
    # Forms have no gates or sinks of heads.
    if any(getattr(part, name, None) is not None for name in ("wg", "sink")):
        form = None
    if form is None:
        return OwnPart(part)
    if router is not None:
        logs_some = router.varies and isinstance(part, UnionAttention)
        few = serves(wanted.batch, router.num_experts, router.picks)
        if logs_some or not few:
            return OwnPart(part)
    return wanted.of_weights(form(part, wanted.read_as))


def _head(model: Any, form: Form) -> Projection:
    """Return the weights of the logits, a row for each token of the vocabulary."""
    if model.head is None:
        return _rows(model.embed.embedding[...], None, form, turned=False)
    bias = None if model.head.bias is None else model.head.bias[...]
    return _rows(model.head.weight[...], bias, form, turned=True)


@functools.partial(jax.jit, static_argnames=("form", "turned"))
def _rows(weight: Array, bias: Array | None, form: Form, turned: bool) -> Projection:
    rows = weight.T if turned else weight
    dtype = form.read_as
    return form.of_weights(
        Projection(
            rows.astype(dtype)[None, None],
            None if bias is None else bias.astype(dtype)[None, None],
        )
    )


def with_decode_weights(model: Any, weights: Literal["compute", "int8"]) -> Any:
    """Return a decoder that decodes with weights of eight bits, or of its dtype.

    Prompts are read with the model's own weights. The arrays are the same ones.
    """
    model = jax.tree.map(lambda leaf: leaf, model)
    model.decode_weights = weights
    return model


def product_bytes(decoder: TokenDecoder) -> int:
    """Return the bytes of the weights that tokens are multiplied with, and scales."""
    parts = jax.tree.leaves((decoder.layers, decoder.head), is_leaf=is_product)
    held = [a for p in parts if is_product(p) for a in jax.tree.leaves(p)]
    return sum(a.size * a.dtype.itemsize for a in held)
