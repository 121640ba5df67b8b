"""Run folders: a dense run in, a union run out, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from uoe_jax.config import ExperimentConfig, ModelConfig
from uoe_jax.decompose.group import Grouping
from uoe_jax.decompose.layers import (
    Arrays,
    flat_buffers,
    flat_params,
    with_params,
)
from uoe_jax.decompose.plan import Plan, make_plan, with_routers
from uoe_jax.decompose.route import RouterStart
from uoe_jax.decompose.split import (
    PARTS,
    Part,
    merge_params,
    merged_config,
    union_config,
)
from uoe_jax.decompose.store import (
    ORDER,
    Which,
    check_free,
    find_order,
    write_result,
    write_run,
)
from uoe_jax.fields import Checked, Count, Seed, check_ranges
from uoe_jax.files import local_path
from uoe_jax.runs.batches import (
    CALIBRATION_TOKENS,
    Batch,
    calibration_batch,
    count_scored,
    probe_batch,
)
from uoe_jax.runs.integrity import digest_array
from uoe_jax.runs.load import LoadedRun, load_run, run_dataset
from uoe_jax.runs.probe import TOLERANCE, in_float32, probe
from uoe_jax.validation import validate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut(Checked):
    """How a dense run becomes a union run.

    `router` None means zero where every expert is used (then every gate is 1), else
    least squares. `attention_experts` None means as many as `num_experts`.
    `calibrate` is a text file, or tokens of the run's own training data.
    """

    num_experts: Count
    top_k: Count | None = None  # None: all of them
    attention_experts: Count | None = None
    parts: tuple[Part, ...] = PARTS
    grouping: Grouping = "contiguous"
    router: RouterStart | None = None
    calibrate: Path | Count = CALIBRATION_TOKENS
    seed: Seed = 0

    @property
    def chosen(self) -> int:
        """Experts that a token uses."""
        return self.top_k or self.num_experts

    @property
    def start(self) -> RouterStart:
        """How the routers start."""
        exact = self.chosen == self.num_experts
        return self.router or ("zero" if exact else "least_squares")

    @property
    def calibrates(self) -> bool:
        """Whether data decides on anything."""
        return self.start != "zero" or self.grouping == "coactivation"


def decompose_run(
    folder: Path, out: Path, cut: Cut, *, which: Which = "last"
) -> dict[str, Any]:
    """Write a dense run's checkpoint as a union run into `out`; return what was found.

    Raises ConfigError if the run can't be cut so or `out` holds something, and
    CheckpointError or DataError if the run or its data can't be read.
    """
    check_ranges(cut, "cut.")
    out = local_path(out, "out")
    run = load_run(folder, which=which)
    model = union_config(
        run.config.model, cut.num_experts, cut.chosen, cut.parts, cut.attention_experts
    )
    config = renamed(run.config, model, f"union{cut.num_experts}")
    validate(config)
    check_free(out)
    batch = calibration_batch(run.config, cut.calibrate) if cut.calibrates else None
    plan = make_plan(
        in_own_float32(run), model, cut.grouping, cut.start, batch, cut.seed
    )
    params, biases = with_routers(plan, model)
    result = {
        "did": "split",
        "run": str(folder),
        "step": run.step,
        **{k: v for k, v in dataclasses.asdict(cut).items() if k != "calibrate"},
        "top_k": cut.chosen,
        "router": cut.start,
        "calibration": str(cut.calibrate) if cut.calibrates else None,
        **_compare_split(run, plan, model, params, biases),
        "router_explains": {
            f"{part} {number}": fit.explained
            for (number, part), fit in plan.routers.items()
        },
        "neuron_order": digest_array(plan.order),
    }
    union = with_params(model, params, biases)
    write_run(out, config, union, Path(folder), run.step, which)
    np.save(out / ORDER, plan.order, allow_pickle=False)
    write_result(out, result)
    return result


def _compare_split(
    run: LoadedRun, plan: Plan, model: ModelConfig, params: Arrays, biases: Arrays
) -> dict[str, Any]:
    """Return how far the union is from the dense model, weights and logits.

    First with every expert and zero routers, where it is the same function; then as
    it is written, with the chosen experts and the routers it starts from.
    """
    dense = in_own_float32(run)
    merged = merge_params(plan.params, model, run.config.model, plan.order)
    found = probe_batch(run_dataset(run.folder, run.config, "valid"))
    whole = with_params(in_float32(all_chosen(model)), plan.params)
    exact = probe(dense, whole, found)
    chosen = probe(dense, with_params(in_float32(model), params, biases), found)
    return {
        "weights_bitwise": same_bits(flat_params(run.model), merged),
        **_difference(exact, found),
        "loss_dense": exact.reference_loss,
        "loss_all_experts": exact.loss,
        "loss_as_written": chosen.loss,
    }


def merge_run(folder: Path, out: Path, *, which: Which = "last") -> dict[str, Any]:
    """Write a union run's checkpoint as a dense run into `out`; return what was found.

    Routers are dropped; the neurons get the order back that they had before the split
    where the run still has it. Raises as `decompose_run` does.
    """
    out = local_path(out, "out")
    run = load_run(folder, which=which)
    model = merged_config(run.config.model)
    config = renamed(run.config, model, "dense")
    check_free(out)
    order = find_order(Path(folder))
    params = merge_params(flat_params(run.model), run.config.model, model, order)
    found = probe_batch(run_dataset(run.folder, run.config, "valid"))
    merged = with_params(in_float32(model), params)
    seen = probe(in_own_float32(run), merged, found)
    result = {
        "did": "merge",
        "run": str(folder),
        "step": run.step,
        "neuron_order_restored": order is not None,
        **_difference(seen, found),
        "loss_union": seen.reference_loss,
        "loss_dense": seen.loss,
    }
    written = with_params(model, params)
    write_run(out, config, written, Path(folder), run.step, which)
    write_result(out, result)
    return result


def _difference(seen: Any, batch: Batch) -> dict[str, Any]:
    return {
        "probe_tokens": count_scored(batch),
        "max_logit_difference": seen.max_logit_difference,
        "max_logit": seen.max_logit,
        "tolerance": TOLERANCE,
        "exact": seen.exact,
    }


def all_chosen(model: ModelConfig) -> ModelConfig:
    """Return a union's config with every expert chosen by every token."""
    union = dataclasses.replace(model.union, top_k=model.union.num_experts)
    experts = model.union_for("attention").num_experts
    overrides = dataclasses.replace(model.union_attention, top_k=experts)
    return dataclasses.replace(model, union=union, union_attention=overrides)


def renamed(
    config: ExperimentConfig, model: ModelConfig, ending: str
) -> ExperimentConfig:
    """Return an experiment with another model, its name with an ending."""
    return dataclasses.replace(config, name=f"{config.name}-{ending}", model=model)


def in_own_float32(run: LoadedRun) -> nnx.Module:
    """Return a run's model computing in float32."""
    config = in_float32(run.config.model)
    return with_params(config, flat_params(run.model), flat_buffers(run.model))


def same_bits(
    first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]
) -> bool:
    """Return whether two sets of arrays are the same, bit for bit."""
    return first.keys() == second.keys() and all(
        a.dtype == second[name].dtype
        and a.shape == second[name].shape
        and a.tobytes() == second[name].tobytes()
        for name, a in first.items()
    )
