"""The stack of blocks and its final norm, scanned over layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from uoe_jax.config import ModelConfig
from uoe_jax.errors import choose
from uoe_jax.model.balance import Aux, stack_stats
from uoe_jax.model.block import Block
from uoe_jax.model.context import Context
from uoe_jax.model.depth import DepthBlock
from uoe_jax.model.linear import PROJECTION, dropout, fold_key
from uoe_jax.model.norm import Norm
from uoe_jax.partition.collectives import GATHERED
from uoe_jax.weights import layer_period

# (carry, block, its stack, its index in the stack) -> (carry, output)
Body = Callable[[Any, Block, int, Any], tuple[Any, Any]]


class Trunk(nnx.Module):
    """Blocks in stacks: layer i is entry `i // period` of stack `i % period`.

    A stack's weights have a leading layer axis, so that `lax.scan` compiles one period.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        keys = jax.random.split(rngs.params(), config.num_layers)
        period = layer_period(config)
        self.blocks = nnx.List(
            [_stack(config, i, keys[i::period]) for i in range(period)]
        )
        self.norm = Norm(config)

    def __call__(
        self, x: Float[Array, "B T D"], context: Context
    ) -> tuple[Float[Array, "B T2 D"], Aux]:
        """Return the normalised last hidden state and the stacked router statistics.

        T2 is T, or this device's share where a layout spreads tokens over tensor.
        """
        config, period, parallel = self.config, len(self.blocks), context.parallel
        if parallel is not None:
            x = parallel.enter(x)
        x = dropout(x, config.dropout, fold_key(context.key, config.num_layers))

        def apply(x: Array, block: Block, key: jax.Array | None) -> tuple[Array, Any]:
            if parallel is not None:
                block = parallel.gather_block(block)
            x, stats, _ = block(x, context, key)
            return x, stats

        gathers = parallel is not None and parallel.has("fsdp")
        apply = _remat(apply, config, gathers)

        def body(x: Array, block: Block, stack: int, index: Any) -> tuple[Array, Any]:
            return apply(x, block, fold_key(context.key, index * period + stack))

        x, outs = self.scan(body, x)
        return self.norm(x), stack_stats(outs, config.num_layers)

    def scan(self, body: Body, carry: Any) -> tuple[Any, list[Any]]:
        """Run `body` over the layers; return the carry and the outputs by stack."""
        return scan_blocks(body, carry, self.blocks, self.config.scan_layers)


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


def _stack(config: ModelConfig, layer: int, keys: jax.Array) -> Block:
    kind = DepthBlock if config.block_kinds[layer] == "mod" else Block
    kinds = config.layer_kinds[layer]
    make = lambda key: kind(config, *kinds, rngs=nnx.Rngs(key))
    return jax.vmap(make)(keys)


def _remat(apply: Callable, config: ModelConfig, gathers: bool) -> Callable:
    """Recompute activations in the backward pass, all or all but the projections'.

    Weights that were gathered are gathered again, never kept.
    """
    policies = jax.checkpoint_policies
    kept = {
        "none": policies.save_anything_except_these_names(GATHERED),
        "dots": policies.save_only_these_names(PROJECTION),
        "full": policies.nothing_saveable,
    }
    policy = choose("remat", config.remat, kept)
    if config.remat == "none" and not gathers:
        return apply
    # Inside a scan XLA can't merge the recomputation with the forward pass anyway.
    return jax.checkpoint(apply, policy=policy, prevent_cse=not config.scan_layers)
