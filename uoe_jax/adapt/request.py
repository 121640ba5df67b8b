"""What a run is to be adapted to, and how; the verb's options. Imports no jax."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from uoe_jax.adapt.config import AdapterConfig, check_adapter
from uoe_jax.adapt.config import Path as Forward
from uoe_jax.config import LayoutConfig, MeshConfig, Share
from uoe_jax.errors import ConfigError
from uoe_jax.fields import Checked, Count, NotNegative, Seed, Whole, check_ranges


@dataclass(frozen=True, kw_only=True)
class Adaptation(Checked):
    """What an adapter is trained on, and how: of the command and of Python."""

    # File, folder, glob, tfds:NAME, stdlib or digits; the run's own if not given.
    data: str | None = None

    steps: Whole = 300  # 0: only merge what is loaded

    learning_rate: NotNegative = 3e-3  # highest; after a warm-up it falls

    batch_size: Count | None = None  # the run's if not given

    # How products are computed: with the small factors, or with the whole delta.
    path: Forward = "auto"

    # Start from this adapter folder, or PEFT's LoRA; its method and ranks stay.
    load: Path | None = None

    merge: bool = False  # also write a run with the deltas in its weights

    # Checkpoint of the run.
    which: Annotated[Literal["last", "best"], arg(name="checkpoint")] = "last"

    cut: Share | None = None  # open a run of compress --anytime without this share

    layout: LayoutConfig = field(default_factory=LayoutConfig)

    seed: Seed = 0  # of the factors and the order of the data


@dataclass(frozen=True, kw_only=True)
class AdaptRequest(Adaptation):
    """What a run is adapted to, and how."""

    adapter: AdapterConfig | None = None  # None: the loaded adapter's
    eval_batches: Count = 8
    mesh: MeshConfig | None = None  # None: as many devices as divide a pass


def check_request(request: AdaptRequest) -> None:
    """Raise ConfigError for a request that can't be carried out."""
    check_ranges(request)
    steps, load = request.steps, request.load
    if (request.adapter is None) == (load is None):
        raise ConfigError(
            "a loaded adapter keeps its own config: give either a config or a folder"
        )
    if request.adapter is not None:
        check_adapter(request.adapter)
    if steps == 0 and load is None:
        raise ConfigError(f"steps is {steps}; 0 is for merging an adapter from --load")
