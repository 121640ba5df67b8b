"""How many experts: as many as PPP finds among the neurons, made to fit the model."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import numpy as np

from uoe_jax.cluster.ppp import PPP
from uoe_jax.config import ExperimentConfig
from uoe_jax.decompose.cut import MAX_EXPERTS, Cut
from uoe_jax.decompose.group import contributions, profiles, sketch
from uoe_jax.decompose.plan import Batch
from uoe_jax.errors import ConfigError, UoeError, all_divisors
from uoe_jax.model import flat_params
from uoe_jax.model.observe import Stream
from uoe_jax.model.stacks import to_layers


class NothingSeparable(UoeError):
    """PPP finds one cluster of neurons, so no number of experts."""


class Number(NamedTuple):
    """A number of experts and why."""

    chosen: int  # one of those that fit
    wanted: int  # what PPP would take, whether it fits or not
    layers: list[int]  # what PPP finds in each layer alone
    # ICL of each number that was tried in every layer, nats a neuron above the least.
    prices: dict[int, float]

    def as_report(self) -> dict[str, Any]:
        """Return what a report says of it."""
        return {
            "wanted": self.wanted,
            "chosen": self.chosen,
            "layers": self.layers,
            "prices": {str(number): price for number, price in self.prices.items()},
        }


def choose_num_experts(
    model: Any, config: ExperimentConfig, cut: Cut, batch: Batch
) -> Number:
    """Return how many experts PPP finds among a dense model's neurons.

    Points are the neurons of a layer, by their profiles on the batch. One number is
    taken for all layers: of those that are separable in at least half of the layers
    that with the least ICL, summed over layers; then the nearest one that the model
    and the mesh can have, of two as near the one with the lower ICL.

    Raises NothingSeparable if that is one cluster, ConfigError if nothing fits.
    """
    allowed = allowed_experts(config, cut)
    layers = to_layers(flat_params(model), model.config)[1]
    most, found = cut.max_experts or MAX_EXPERTS, []
    stream = Stream(model, batch)
    for layer in layers:
        w_down = layer["mlp.w_down"][0].astype(np.float32)
        written = contributions(stream.run_layer().neurons, w_down)
        points = np.asarray(sketch(profiles(written), cut.seed))
        found.append(PPP(max_clusters=most).fit(points))
    tried = [{t.num_clusters: t for t in ppp.tried} for ppp in found]
    common = sorted(set.intersection(*(set(each) for each in tried)))
    icl = {k: sum(each[k].icl for each in tried) for k in common}
    votes = Counter(
        t.num_clusters for p in found for t in p.tried if t.separable(p.agreement)
    )
    separable = [k for k in common if 2 * votes[k] >= len(found)]
    wanted = min(separable, key=icl.__getitem__)
    least = min(icl.values())
    neurons = model.config.d_ff * len(found)
    prices = {k: (value - least) / neurons for k, value in icl.items()}
    if wanted == 1:
        free = min(icl, key=icl.__getitem__)
        offer = min(allowed, key=lambda e: (abs(e - free), e))
        raise NothingSeparable(
            f"experts auto: one. In none of 2 to {max(common)} parts of the neurons "
            f"does a mixture confirm every part, in half of {len(found)} layers; "
            f"without that, ICL is least at {free}: give --experts {offer}, or another "
            "number"
        )
    chosen = min(allowed, key=lambda e: (abs(e - wanted), prices.get(e, np.inf)))
    return Number(chosen, wanted, [ppp.found for ppp in found], prices)


def allowed_experts(config: ExperimentConfig, cut: Cut) -> list[int]:
    """Return which numbers of experts, from two on, the model and the mesh can have.

    None is fewer than the experts that a token uses; with experts that must be off
    none is as many.

    Raises ConfigError if there is none.
    """
    model, most = config.model, cut.max_experts or MAX_EXPERTS
    least = cut.least_experts
    heads = "attention" in cut.parts and cut.attention_experts is None
    numbers = [
        e
        for e in all_divisors(model.d_ff)
        if least <= e <= most
        and not e % config.mesh.tensor
        and not (heads and model.num_kv_heads % e)
    ]
    if not numbers:
        also = f" and {model.num_kv_heads} key/value heads" if heads else ""
        raise ConfigError(
            f"experts auto: no number from {least} to {most} divides {model.d_ff} "
            f"neurons{also} and is a multiple of mesh.tensor {config.mesh.tensor}; cut "
            "the MLP alone with parts mlp, or allow more experts"
        )
    return numbers
