"""Blocks, the trunk that stacks them, and the three models around it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from uoe_jax.config import LayerWidths, ModelConfig
from uoe_jax.errors import ConfigError, choose
from uoe_jax.model.attention import DenseAttention, SharedKvAttention, UnionAttention
from uoe_jax.model.baselines.moba import MobaAttention
from uoe_jax.model.baselines.mod import DepthRouter, run_around
from uoe_jax.model.baselines.moe import MoeMlp
from uoe_jax.model.baselines.moh import MohAttention
from uoe_jax.model.cache import Cache, Entry, Kept, write_prompt
from uoe_jax.model.context import Context, make_context, takes_images, takes_tokens
from uoe_jax.model.convolution import Convolution
from uoe_jax.model.decoding.step import prepare
from uoe_jax.model.head_groups import HeadGroup, LayerHeads, write_beside
from uoe_jax.model.heads import Pooler, TokenHead
from uoe_jax.model.layers import (
    Head,
    Norm,
    PatchEmbedding,
    TokenEmbedding,
    dropout,
    fold_key,
    mean_pool,
    output_logits,
)
from uoe_jax.model.mlp import DenseMlp, UnionMlp
from uoe_jax.model.paired_attention import PairedAttention
from uoe_jax.model.routing import ROUTERS
from uoe_jax.model.routing.balance import Aux, Stats, router_configs, stack_stats
from uoe_jax.model.sharded import run_part
from uoe_jax.ops.float8 import float8_products
from uoe_jax.ops.numerics import PROJECTION
from uoe_jax.partition.collectives import GATHERED
from uoe_jax.weights import GROUPS, layer_period

ATTENTION: dict[str, Any] = {
    "dense": DenseAttention,
    "union": UnionAttention,
    "moba": MobaAttention,
    "moh": MohAttention,
}
MLP: dict[str, Any] = {"dense": DenseMlp, "union": UnionMlp, "moe": MoeMlp}

# (carry, block, its stack, its index in the stack) -> (carry, output)
Body = Callable[[Any, "Block", int, Any], tuple[Any, Any]]


def attention_class(config: ModelConfig, kind: str) -> Any:
    """Return the class of an attention kind; unions may share keys and values, or
    choose for these apart."""
    if kind == "union" and config.union_for("attention").shared_kv:
        return SharedKvAttention
    if kind == "union" and config.union_for("attention").key_router:
        return PairedAttention
    return ATTENTION[kind]


class Block(nnx.Module):
    """Pre-norm block: normalise, attend, add; normalise, apply the MLP, add.

    A post-norm block normalises each of the two sums instead (Vaswani et al. 2017). The
    kinds of its parts are those that the config has for layer number `layer`, and the
    config that its parts are given has that layer's window and widths.
    """

    def __init__(self, config: ModelConfig, layer: int, *, rngs: nnx.Rngs):
        attention, mlp = config.layer_kinds[layer]
        self.rate, self.causal = config.dropout, config.causal
        self.post_norm = config.post_norm
        self.attention_norm = Norm(config)
        own = config.of_layer(layer)
        self.attention = attention_class(config, attention)(own, rngs=rngs)
        self.mlp_norm = Norm(config)
        self.mlp = MLP[mlp](own, rngs=rngs)
        around = config.block_kinds[layer] == "mod"
        self.router = DepthRouter(config, rngs=rngs) if around else None
        for name, group in own.beside.items():
            setattr(self, name, HeadGroup(group, own.layer_heads, rngs=rngs))
        if config.convolution:
            self.convolution = Convolution(config)

    def __call__(
        self, x: Float[Array, "B T D"], context: Context, key: jax.Array | None = None
    ) -> tuple[Float[Array, "B T D"], dict[str, Stats], Kept]:
        """Return the block's output, routing statistics by part, and what a cache
        keeps of its heads."""
        if self.router is not None:
            return run_around(self, x, context, key, self.causal)
        return self.run(x, context, key)

    def run(
        self, x: Float[Array, "B T D"], context: Context, key: jax.Array | None = None
    ) -> tuple[Float[Array, "B T D"], dict[str, Stats], Kept]:
        """Return what the call does, with every token inside."""
        normed = self.before(self.attention_norm, x)
        drawn = [context._replace(draw=fold_key(context.draw, n)) for n in range(2)]
        y, attention, kept = run_part(self.heads, normed, drawn[0])
        y = dropout(y, self.rate, fold_key(key, 0))
        x = self.add(self.attention_norm, x, y)
        y, mlp = run_part(self.mlp, self.before(self.mlp_norm, x), drawn[1])
        y = dropout(y, self.rate, fold_key(key, 1))
        x = self.add(self.mlp_norm, x, y)
        parts = {"attention": attention, "mlp": mlp}
        if self.plain:
            kept = {"attention": kept}
        return x, {name: part for name, part in parts.items() if part}, kept

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups of heads beside those of the layer's kind."""
        return tuple(name for name in GROUPS if hasattr(self, name))

    @property
    def plain(self) -> bool:
        """Whether the layer's heads are those of its kind, and read normed tokens."""
        return not (self.groups or hasattr(self, "convolution"))

    @property
    def heads(self) -> Any:
        """The attention of the layer, with what is before it and beside it if any."""
        if self.plain:
            return self.attention
        groups = {name: getattr(self, name) for name in self.groups}
        convolution = getattr(self, "convolution", None)
        return LayerHeads(self.attention, groups, convolution)

    def before(self, norm: Norm, x: Array) -> Array:
        """Return what a part reads of the residual x."""
        return x if self.post_norm else norm(x)

    def add(self, norm: Norm, x: Array, y: Array) -> Array:
        """Return the residual x with a part's output y added."""
        return norm(x + y) if self.post_norm else x + y


class Trunk(nnx.Module):
    """Blocks in stacks: layer i is entry `i // period` of stack `i % period`.

    A stack's weights have a leading layer axis, so that `lax.scan` compiles one period.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.num_layers, self.dropout = config.num_layers, config.dropout
        keys = jax.random.split(rngs.params(), config.num_layers)
        period = layer_period(config)
        # Layers none of which is like another are not scanned: XLA would undo a loop
        # of one turn, and then the recomputation in it.
        self.alike = config.widths == LayerWidths() or period < config.num_layers
        self.remat, self.fp8 = config.recompute, config.float8
        self.scan_layers = config.scan_layers and self.alike
        self.blocks = nnx.List(
            [_stack(config, i, keys[i::period], type(rngs)) for i in range(period)]
        )
        self.norm = None if config.post_norm else Norm(config)

    def finish(self, x: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
        """Return the last hidden state; post-norm blocks have normalised it."""
        return x if self.norm is None else self.norm(x)

    def __call__(
        self, x: Float[Array, "B T D"], context: Context
    ) -> tuple[Float[Array, "B T2 D"], Aux]:
        """Return the normalised last hidden state and the stacked router statistics.

        T2 is T, or this device's share where a layout spreads tokens over tensor.
        """
        period, parallel = len(self.blocks), context.parallel
        if parallel is not None:
            x = parallel.enter(x)
        x = dropout(x, self.dropout, fold_key(context.key, self.num_layers))

        def apply(
            x: Array, block: Block, key: jax.Array | None, draw: jax.Array | None
        ) -> tuple[Array, Any]:
            if parallel is not None:
                block = parallel.gather_block(block)
            x, stats, _ = block(x, context._replace(draw=draw), key)
            return x, stats

        gathers = parallel is not None and parallel.has("fsdp")
        apply = _remat(apply, self.remat, self.scan_layers, gathers)

        def body(x: Array, block: Block, stack: int, index: Any) -> tuple[Array, Any]:
            keys = (context.key, context.draw)
            number = index * period + stack
            return apply(x, block, *(fold_key(key, number) for key in keys))

        with float8_products(self.fp8):
            x, outs = self.scan(body, x)
        return self.finish(x), stack_stats(outs, self.num_layers)

    def prefill(
        self, x: Float[Array, "B T D"], context: Context, layers: tuple[Entry, ...]
    ) -> tuple[Float[Array, "B T D"], tuple[Entry, ...]]:
        """Return the last hidden state of whole prompts and the filled cache entries.

        Padding after a prompt is causally invisible to it, and decoding overwrites it.
        Layers that are alike are scanned whatever the config says: one pass over a
        prompt takes far less time than all of its layers to compile.
        """

        def body(carry: Any, block: Block, stack: int, index: Any) -> tuple[Any, None]:
            x, layers = carry
            x, stats, kept = block(x, context)
            entry = write_prompt(layers[stack], index, kept, stats)
            entry = write_beside(entry, index, kept, context)
            return (x, _replace(layers, stack, entry)), None

        (x, layers), _ = scan_blocks(body, (x, layers), self.blocks, self.alike)
        return self.finish(x), layers

    def scan(self, body: Body, carry: Any) -> tuple[Any, list[Any]]:
        """Run `body` over the layers; return the carry and the outputs by stack."""
        return scan_blocks(body, carry, self.blocks, self.scan_layers)


def scan_blocks(
    body: Body, carry: Any, blocks: Sequence[Block], scan: bool
) -> tuple[Any, list[Any]]:
    """Run `body` over stacked blocks, interleaved, by `lax.scan` or a Python loop.

    Whole periods are scanned and the layers left over are looped. Each stack's outputs
    are returned with a leading layer axis.
    """
    depths = [jax.tree.leaves(block)[0].shape[0] for block in blocks]
    whole = min(depths) if scan else 0
    outs: list[list[Any]] = [[] for _ in blocks]

    def group(carry: Any, item: Any) -> tuple[Any, tuple[Any, ...]]:
        index, members = item
        results = []
        for stack, block in enumerate(members):
            carry, out = body(carry, block, stack, index)
            results.append(out)
        return carry, tuple(results)

    if whole:
        members = tuple(_take(block, slice(whole)) for block in blocks)
        carry, results = jax.lax.scan(group, carry, (jnp.arange(whole), members))
        for out, result in zip(outs, results, strict=True):
            out.append(result)
    layers = [_unstack(block, whole) for block in blocks]
    for index in range(whole, max(depths)):
        for stack, members in enumerate(layers):
            if index < depths[stack]:
                block = members[index - whole]
                carry, out = body(carry, block, stack, index)
                outs[stack].append(jax.tree.map(lambda a: a[None], out))
    joined = [jax.tree.map(lambda *a: jnp.concatenate(a), *out) for out in outs]
    return carry, joined


def _take(block: Block, index: slice) -> Block:
    if index.stop == jax.tree.leaves(block)[0].shape[0]:
        return block
    return jax.tree.map(lambda a: a[index], block)


def _unstack(block: Block, start: int) -> list[Block]:
    """Return the layers of a stack from `start` on.

    By one split, whose gradient is one concatenation: that of as many slices is a sum
    of padded stacks, which a GPU makes at a fifth of its bandwidth.
    """
    leaves, tree = jax.tree.flatten(block)
    count = leaves[0].shape[0]
    if start == count:
        return []
    sizes = [start] * (start > 0) + [1] * (count - start)
    parts = [jax.lax.split(leaf, sizes)[-(count - start) :] for leaf in leaves]
    return [
        jax.tree.unflatten(tree, [part.squeeze(0) for part in layer])
        for layer in zip(*parts, strict=True)
    ]


def _stack(
    config: ModelConfig, layer: int, keys: jax.Array, kind: type[nnx.Rngs]
) -> Block:
    make = lambda key: Block(config, layer, rngs=kind(key))
    return jax.vmap(make)(keys)


def _remat(apply: Callable, remat: str, scanned: bool, gathers: bool) -> Callable:
    """Recompute activations in the backward pass, all or all but the projections'.

    Weights that were gathered are gathered again, never kept.
    """
    policies = jax.checkpoint_policies
    kept = {
        "none": policies.save_anything_except_these_names(GATHERED),
        "dots": policies.save_only_these_names(PROJECTION),
        "full": policies.nothing_saveable,
    }
    policy = choose("remat", remat, kept)
    if remat == "none" and not gathers:
        return apply
    # Inside a scan XLA can't merge the recomputation with the forward pass anyway.
    return jax.checkpoint(apply, policy=policy, prevent_cse=not scanned)


def init_cache(
    config: ModelConfig, batch: int, max_len: int, dtype: str | None = None
) -> Cache:
    """Return an empty cache for `max_len` tokens a row; default the compute dtype."""
    if config.kind != "decoder":
        raise ConfigError(
            f"model.kind is {config.kind!r}; only a decoder has a cache, use 'decoder'"
        )
    stacks = range(layer_period(config))
    make = lambda stack: _cache_entry(
        config, stack, batch, max_len, dtype or config.compute_dtype
    )
    return Cache(jnp.zeros(batch, jnp.int32), tuple(make(stack) for stack in stacks))


def _cache_entry(
    config: ModelConfig, stack: int, batch: int, max_len: int, dtype: str
) -> Entry:
    """Return zeros for all that the layers of a stack remember."""
    depth = len(range(stack, config.num_layers, layer_period(config)))
    attention = attention_class(config, config.layer_kinds[stack][0])
    layer = config.of_layer(stack)
    entry: Entry = {
        name: jnp.zeros((depth, batch, *shape), own or dtype)
        for name, (shape, own) in attention.cache_shapes(layer, max_len).items()
    }
    for name, group in layer.beside.items():
        entry[name] = {
            part: jnp.zeros((depth, batch, *shape), dtype)
            for part, (shape, _) in HeadGroup.cache_shapes(group, max_len).items()
        }
    if config.convolution:
        shape = (depth, batch, config.convolution - 1, config.d_model)
        entry["convolution"] = {"tokens": jnp.zeros(shape, dtype)}
    for part in ("attention", "mlp"):
        router: Any = router_configs(config, part).get(stack)
        if router is not None:
            states = ROUTERS[router.router].state_shapes(router, batch)
            entry[part] = {
                name: jnp.zeros((depth, *shape), dtype)
                for name, (shape, dtype) in states.items()
            }
    if config.block_kinds[stack] == "mod":
        entry["depth"] = {"count": jnp.zeros((depth, batch), jnp.int32)}
    return entry


def _replace(layers: tuple[Entry, ...], stack: int, entry: Entry) -> tuple[Entry, ...]:
    return (*layers[:stack], entry, *layers[stack + 1 :])


class Decoder(nnx.Module):
    """Causal transformer over tokens.

    All forward methods take `positions` [B, T] (default 0..T-1), `segments` [B, T]
    (document ids, 0 is padding; default one document), `key` and `train` (dropout needs
    both), `axis_name` (mesh axis to sum balance statistics over, inside shard_map) and
    `collect_choices` (adds the chosen experts to the statistics).
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.decode_weights = "compute"  # int8: see decoding.step.with_decode_weights
        self.embed = TokenEmbedding(config, rngs=rngs)
        self.trunk = Trunk(config, rngs=rngs)
        tied, vocab = config.tie_embeddings, config.vocab_size
        self.head = None if tied else Head(config, vocab, False, rngs=rngs)

    @takes_tokens
    def __call__(
        self, tokens: Int[Array, "B T"], **options: Any
    ) -> tuple[Float[Array, "B T V"], Aux]:
        """Return float32 logits and router statistics."""
        x, aux = self.hidden(tokens, **options)
        return self.logits(x), aux

    @takes_tokens
    def hidden(
        self, tokens: Int[Array, "B T"], **options: Any
    ) -> tuple[Float[Array, "B T2 D"], Aux]:
        """Return the normalised last hidden state and router statistics; see Trunk."""
        context = self._context(tokens.shape, options)
        return self.trunk(self.embed(tokens, context.positions), context)

    def hidden_from_embeddings(
        self, x: Float[Array, "B T D"], **options: Any
    ) -> tuple[Float[Array, "B T D"], Aux]:
        """Return what `hidden` does, from the output of `embed`."""
        return self.trunk(x, self._context(x.shape[:2], options))

    def logits(self, x: Float[Array, "*N D"]) -> Float[Array, "*N V"]:
        """Return float32 logits of hidden states."""
        if self.head is not None:
            return self.head(x)
        return output_logits(x, self.embed.embedding[...].T)

    def prefill(
        self, tokens: Int[Array, "B T"], lengths: Int[Array, " B"], cache: Cache
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Fill an empty cache with prompts; return the logits after each one's end.

        Row b is `tokens[b, :lengths[b]]`, at least one token; the rest is ignored.
        """
        options = {"collect_choices": True, "lengths": lengths}
        context = self._context(tokens.shape, options)
        x = self.embed(tokens, context.positions)
        x, layers = self.trunk.prefill(x, context, cache.layers)
        x = jnp.take_along_axis(x, lengths[:, None, None] - 1, axis=1)[:, 0]
        return self.logits(x), Cache(lengths, layers)

    def decode(
        self, token: Int[Array, " B"], cache: Cache
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Append one token to each row; return the logits after it.

        Of many tokens `prepare` once and call its `decode`: this lays out the weights
        each time.
        """
        return prepare(self, token.shape[0]).decode(token, cache)

    def _context(self, shape: tuple[int, ...], options: dict[str, Any]) -> Context:
        return make_context(self.config, shape, **options)


_ENCODER_HEADS: dict[str, Callable[[ModelConfig, nnx.Rngs], Any]] = {
    "classes": lambda c, rngs: Head(c, c.num_classes, True, rngs=rngs),
    "tokens": lambda c, rngs: TokenHead(c, rngs=rngs),
    "none": lambda c, rngs: None,
}


class Encoder(nnx.Module):
    """Bidirectional transformer over tokens, with a head by `encoder_head`.

    Takes the options of `Decoder`, and `token_types` [B, T] (default: all 0) where the
    config has any.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = TokenEmbedding(config, rngs=rngs)
        self.trunk = Trunk(config, rngs=rngs)
        self.pool = Pooler(config, rngs=rngs) if config.pooling == "tanh" else None
        make = choose("encoder_head", config.encoder_head, _ENCODER_HEADS)
        self.head = make(config, rngs)

    @takes_tokens
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        token_types: Int[Array, "B T"] | None = None,
        **options: Any,
    ) -> tuple[Float[Array, "B *T2 C"], Aux]:
        """Return float32 logits and router statistics.

        Logits of the classes [B, C], of tokens [B, T, V], or hidden states [B, T, D].
        """
        context = make_context(self.config, tokens.shape, **options)
        x = self.embed(tokens, context.positions, token_types)
        x, aux = self.trunk(x, context)
        if self.head is None:
            return x.astype(jnp.promote_types(x.dtype, jnp.float32)), aux
        if isinstance(self.head, TokenHead):
            return self.head(x, self.embed.embedding[...]), aux
        return self.head(self.pooled(x, context.segments)), aux

    def pooled(
        self, x: Float[Array, "B T D"], segments: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B D"]:
        """Return the one vector of each sample that classes are read from."""
        if self.config.pooling == "mean":
            return mean_pool(x, segments)
        return x[:, 0] if self.pool is None else self.pool(x[:, 0])


class VisionTransformer(nnx.Module):
    """Bidirectional transformer over square patches of an image, pooled to classes.

    Takes the options of `Decoder` but for positions and segments.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = PatchEmbedding(config, rngs=rngs)
        self.trunk = Trunk(config, rngs=rngs)
        self.head = Head(config, config.num_classes, True, rngs=rngs)

    @takes_images
    def __call__(
        self, images: Float[Array, "B Hi Wi Ci"], **options: Any
    ) -> tuple[Float[Array, "B C"], Aux]:
        """Return float32 logits of the classes and router statistics."""
        x = self.embed(images)
        context = make_context(self.config, x.shape[:2], **options)
        x, aux = self.trunk(x, context)
        first = self.config.pooling != "mean"
        return self.head(x[:, 0] if first else mean_pool(x, None)), aux


def routing_choices(
    model: nnx.Module, inputs: jax.Array, **options: Any
) -> dict[str, Int[Array, "L B T X"]]:
    """Return the experts each token chose, by part, for the routed layers in order."""
    _, aux = model(inputs, collect_choices=True, **options)  # pyrefly: ignore
    return {part: stats["choices"] for part, stats in aux.items()}
