"""A run that opens at any cut: channels in order, and what fits each number of them.

Beside the sorted weights lies one file. For an MLP it holds the factor L of its
neurons' second moment, of which the best down-projection of any first k follows (see
`order.Lift`); then the order of the pairs, and the error curves by which a cut is
spread. Nothing is calibrated again. UniQL (Chiang et al. 2025) has the same without L.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from uoe_jax.compress.channels import (
    Layer,
    Neurons,
    SortedLayer,
    sorted_layer,
)
from uoe_jax.compress.files import (
    digest_arrays,
    digest_described,
    from_triangle,
    read_about,
    read_arrays,
    to_triangle,
    write_arrays,
)
from uoe_jax.compress.methods import SortedModel
from uoe_jax.compress.observed import Smaller
from uoe_jax.compress.options import ANYTIME, Compress
from uoe_jax.compress.order import Lift
from uoe_jax.compress.value_output import ValueBasis
from uoe_jax.compress.widths import Curves
from uoe_jax.config import ModelConfig
from uoe_jax.errors import ConfigError
from uoe_jax.fields import check_ranges
from uoe_jax.model import with_params
from uoe_jax.model.stacks import from_layers, to_layers
from uoe_jax.runs.checkpoint import Checkpoints
from uoe_jax.runs.folder import BEST, CHECKPOINTS
from uoe_jax.runs.load import LoadedRun, load_run, read_run
from uoe_jax.tree import Arrays, named_leaves

_FORMAT = 1


def open_run(
    folder: Path,
    *,
    which: Literal["last", "best"] = "last",
    step: int | None = None,
    cut: float | None = None,
) -> LoadedRun:
    """Return a run, or what it is at a cut: a share of its blocks.

    Raises what `load_run` does, and ConfigError for a cut of a run that
    `uoe compress --anytime` didn't write, or that has trained since.
    """
    options = Compress(cut=cut)
    check_ranges(options)
    if options.cut is None:
        return load_run(folder, which=which, step=step)
    folder, config, saved = read_run(folder, which=which, step=step)
    # On the host: what a cut leaves out never goes to the device.
    params, buffers = (
        {name: saved.arrays[f"{part}.{name}"] for name in named_leaves(tree)}
        for part, tree in saved.template.items()
    )
    digest = _saved_digest(folder, which, saved.step)
    model, options = read_anytime(
        folder, config.model, params, buffers, options, digest
    )
    made = model.cut(options)
    config = dataclasses.replace(config, model=made.config)
    return LoadedRun(config, with_params(*made), saved.step, folder, saved.progress)


def _saved_digest(
    folder: Path, which: Literal["last", "best"], step: int
) -> str | None:
    """Return what `digest_arrays` says of a checkpoint that has just been read.

    Its arrays were compared with these digests then. None where it has none of them:
    several processes wrote it.
    """
    store = Checkpoints(folder / (BEST if which == "best" else CHECKPOINTS))
    saved = store.about(step)["arrays"]
    own = {
        name.split(".", 1)[1]: described
        for name, described in saved.items()
        if name.startswith(("params.", "buffers."))
    }
    if not all("blake2b" in described for described in own.values()):
        return None
    return digest_described(own)


def sort_run(model: SortedModel) -> tuple[Smaller, Arrays]:
    """Return a model with its channels in order, and the arrays that go beside it."""
    layers, beside = [], {"influences": model.influences}
    for number, (layer, found) in enumerate(
        zip(model.layers, model.found, strict=True)
    ):
        layers.append(sorted_layer(layer, found))
        own: Arrays = {}
        if found.neurons[0].lift is not None:
            dtype = layer["mlp.w_down"].dtype
            factors = [to_triangle(n.lift.factor) for n in found.neurons if n.lift]
            own["factors"] = np.stack(factors).astype(dtype)
        if found.pairs is not None:
            own["pairs"] = found.pairs
        for name, curve in model.curves[number]._asdict().items():
            if curve is not None:
                own[f"curve_{name}"] = curve
        beside |= {f"{number}.{name}": array for name, array in own.items()}
    params = from_layers(model.rest, layers, model.model)
    buffers = from_layers({}, model.buffers, model.model)
    return Smaller(model.model, params, buffers), beside


def write_anytime(path: Path, made: Smaller, beside: Arrays, options: Compress) -> None:
    """Write what goes beside a sorted model's weights."""
    about = options.way()._asdict()
    weights = digest_arrays({**made.params, **made.buffers})
    write_arrays(path, beside, {"format": _FORMAT, "weights": weights, **about})


def read_anytime(
    folder: Path,
    config: ModelConfig,
    params: Arrays,
    buffers: Arrays,
    wanted: Compress,
    digest: str | None = None,
) -> tuple[SortedModel, Compress]:
    """Return a run's sorted model, and how it is cut: as it was made to be.

    What `wanted` says of the way that a cut is spread goes first. `digest` is that of
    the arrays, if it is known.

    Raises ConfigError for a run that isn't such a one or has trained since, or for
    another method; DataError for a damaged file.
    """
    file = folder / ANYTIME
    if not file.is_file():
        raise ConfigError(
            f"{folder} doesn't open at a cut: it has no {ANYTIME}; make a run that "
            f"does: uoe compress {folder} --anytime"
        )
    about = read_about(file)
    if about.get("format") != _FORMAT:
        raise ConfigError(
            f"{file} is of another version of this program; make a new one of the run "
            "that it was made of: uoe compress RUN --anytime"
        )
    if about.get("weights") != (digest or digest_arrays({**params, **buffers})):
        raise ConfigError(
            f"{file} is of other weights than the run's, which has trained since; make "
            f"a new one: uoe compress {folder} --anytime"
        )
    method = about["method"]
    if wanted.method not in (None, method):
        raise ConfigError(
            f"method is {wanted.method!r}, but {folder} is sorted by {method}; leave "
            "--method out, or compress the run that it was made of"
        )
    made = {"method": method, "allocate": wanted.allocate or about["allocate"]}
    way = dataclasses.replace(wanted, **made).way(about)
    options = dataclasses.replace(wanted, **way._asdict())
    arrays = read_arrays(file)
    rest, layers = to_layers(params, config)
    found = [_found(arrays, n, layer) for n, layer in enumerate(layers)]
    curve = lambda n, name: arrays.get(f"{n}.curve_{name}")
    curves = [
        Curves(
            arrays[f"{n}.curve_mlp"], curve(n, "query_key"), curve(n, "value_output")
        )
        for n in range(len(layers))
    ]
    kept = to_layers(buffers, config)[1]
    influences = arrays["influences"]
    return SortedModel(config, rest, layers, kept, found, curves, influences), options


def _found(arrays: Mapping[str, Any], number: int, layer: Layer) -> SortedLayer:
    """Return a layer that is in order already, as sorted."""
    w_down = layer["mlp.w_down"]
    order = np.arange(w_down.shape[1])
    triangles = arrays.get(f"{number}.factors")
    lift = lambda e: None
    if triangles is not None:
        lift = lambda e: Lift(order, from_triangle(triangles[e], False), w_down[e])
    nothing = np.zeros(len(order) + 1)  # its curve is kept
    neurons = tuple(Neurons(order, nothing, lift(e)) for e in range(len(w_down)))
    pairs = arrays.get(f"{number}.pairs")
    if pairs is None:
        return SortedLayer(neurons)
    outputs = layer["attention.wo"][0]
    width = outputs.shape[-2]
    values = tuple(
        ValueBasis(np.eye(width), out, np.zeros(width + 1)) for out in outputs
    )
    return SortedLayer(neurons, pairs, None, values)
