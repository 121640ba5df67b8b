"""A smaller model width: the residual stream turned, its last directions deleted.

After SliceGPT (Ashkboos et al. 2024, arXiv 2401.15024). RMS norms without their scales
commute with rotations, so the scales go into what reads a norm, and then all that reads
or writes the residual stream can be turned by its principal components at no cost. The
last of these are deleted. SliceGPT turns each block's input by a rotation of its own,
with a product beside each residual sum that turns one into the next. This model form
has no such product, so one rotation serves all blocks: that of the sum of their
moments.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from uoe_jax.compress.channels import Layer, as_before
from uoe_jax.compress.observed import Observed, Smaller
from uoe_jax.compress.options import Compress
from uoe_jax.config import ModelConfig
from uoe_jax.errors import ConfigError
from uoe_jax.model.stacks import from_layers
from uoe_jax.tree import Arrays

# What reads the residual stream behind each norm, and what writes to it.
_READERS = {"attention": ("wq", "wk", "wv"), "mlp": ("w_up", "w_gate")}
_WRITERS = {"attention": ("wo", "bo"), "mlp": ("w_down", "b_down")}
_NORMALISED = ("wq", "bq", "wk", "bk")  # by norms of their own, with `qk_norm`


def prepare_slice(observed: Observed) -> Callable[[Compress], Smaller]:
    """Return what deletes a share of the residual stream's directions.

    Every matrix of the blocks loses that share, and so do the embedding and the head,
    which are two matrices from then on. Raises ConfigError for a model that a rotation
    of its residual stream would change.
    """
    check_turns(observed.model)
    _, basis = np.linalg.eigh(residual_moment(observed))
    basis = basis[:, ::-1]

    def cut(options: Compress) -> Smaller:
        width = kept_width(
            observed.model.d_model, options.cut or 0.0, options.way().multiple
        )
        return turned(observed, basis[:, :width])

    return cut


def kept_width(d_model: int, cut: float, multiple: int) -> int:
    """Return the width that a cut leaves, the nearest multiple.

    Raises ConfigError for a cut that deletes nothing or everything.
    """
    width = round((1 - cut) * d_model / multiple) * multiple
    if not 0 < width < d_model:
        raise ConfigError(
            f"cut is {cut:g}, which of a width of {d_model} leaves {width} in steps of "
            f"{multiple}; give another --cut, or a smaller --multiple"
        )
    return width


def residual_moment(observed: Observed) -> Float[np.ndarray, "D D"]:
    """Return the second moment of the normalised residual stream, summed over norms.

    Of each block's two and of the last one, before the head, without their scales; a
    direction that a scale of zero hides adds nothing.
    """
    moments = [(observed.rest["trunk.norm.scale"], observed.seen[-1].head_input)]
    for layer, seen in zip(observed.layers, observed.seen, strict=True):
        moments.append((layer["attention_norm.scale"], seen.attention_input))
        moments.append((layer["mlp_norm.scale"], seen.mlp_input))
    total = np.zeros((observed.model.d_model,) * 2)
    for scale, moment in moments:
        scale = scale.astype(np.float64)
        inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
        total += moment.astype(np.float64) * np.outer(inverse, inverse)
    return total


def turned(observed: Observed, basis: Float[np.ndarray, "D K"]) -> Smaller:
    """Return a model whose residual stream has K directions, the columns of a basis.

    Norms divide by the mean square of K numbers in the place of D: what reads them,
    and what they add to variances, make up for that. Their scales are 1.
    """
    model, (whole, width) = observed.model, basis.shape
    grown = whole / width
    new = [_turned_layer(layer, basis, model.qk_norm) for layer in observed.layers]
    rest: Arrays = {
        name: (table.astype(np.float64) @ basis).astype(table.dtype)
        for name, table in observed.rest.items()
        if name.startswith("embed.")
    }
    last, table = observed.rest["trunk.norm.scale"], observed.rest["embed.embedding"]
    head = observed.rest.get("head.weight", table.T).astype(np.float64)
    reads = basis * (grown**0.5 * last.astype(np.float64))[:, None]
    rest["head.weight"] = (reads.T @ head).astype(table.dtype)
    rest["trunk.norm.scale"] = np.ones(width, last.dtype)
    config = dataclasses.replace(
        model,
        d_model=width,
        norm_eps=model.norm_eps * grown,
        tie_embeddings=False,
    )
    buffers = from_layers({}, observed.buffers, config)
    return Smaller(config, from_layers(rest, new, config), buffers)


def _turned_layer(
    layer: Layer, basis: Float[np.ndarray, "D K"], qk_norm: bool
) -> Arrays:
    """Return a layer's parameters in a basis of the residual stream.

    Norms of queries and keys add as much more to variances as the others do, and their
    widths are as before: what they normalise grows by as much.
    """
    new: Arrays = {}
    whole, width = basis.shape
    grown = (whole / width) ** 0.5
    for part, names in _READERS.items():
        scale = grown * layer[f"{part}_norm.scale"].astype(np.float64)
        new[f"{part}_norm.scale"] = np.ones(width)
        for name in (f"{part}.{n}" for n in names):
            if name in layer:
                new[name] = _read_from(basis * scale[:, None], layer[name])
    if qk_norm:
        for name in (f"attention.{n}" for n in _NORMALISED):
            if name in layer:
                new[name] = grown * np.asarray(new.get(name, layer[name]), np.float64)
    for part, names in _WRITERS.items():
        for name in (f"{part}.{n}" for n in names):
            if name in layer:
                new[name] = layer[name].astype(np.float64) @ basis
    return {**layer, **as_before(new, layer)}


def _read_from(
    reads: Float[np.ndarray, "D K"], weight: Float[np.ndarray, "E D *O"]
) -> Float[np.ndarray, "E K *O"]:
    """Return weights that read K numbers, of which `reads` makes the D of before."""
    flat = weight.reshape(*weight.shape[:2], -1).astype(np.float64)
    return (reads.T @ flat).reshape(len(weight), -1, *weight.shape[2:])


def check_turns(model: ModelConfig) -> None:
    """Raise ConfigError for parts that don't commute with a rotation."""
    found = {
        f"model.kind {model.kind}": model.kind != "decoder",
        f"model.norm {model.norm}": model.centred,
        f"model.norm_place {model.norm_place}": model.post_norm,
        "model.embed_norm": model.embed_norm,
    }
    for attention, mlp in model.layer_kinds:
        found[f"attention {attention}"] = attention != "dense"
        found[f"mlp {mlp}"] = mlp != "dense"
    if other := [name for name, given in found.items() if given]:
        raise ConfigError(
            f"the model has {other[0]}; method slice takes decoders of dense layers "
            "with RMS norms before them, use another --method"
        )
