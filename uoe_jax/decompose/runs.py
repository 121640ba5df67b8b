"""Run folders: a dense run in, a union run out, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from uoe_jax.config import ExperimentConfig, ModelConfig
from uoe_jax.data.progress import note_once
from uoe_jax.decompose.compare import compare_groupings
from uoe_jax.decompose.cut import Cut
from uoe_jax.decompose.group import GROUPINGS
from uoe_jax.decompose.number import choose_num_experts
from uoe_jax.decompose.plan import Plan, as_written, make_plan
from uoe_jax.decompose.split import (
    check_dense,
    merge_params,
    merged_config,
    union_config,
)
from uoe_jax.errors import DataError
from uoe_jax.fields import check_ranges
from uoe_jax.model import with_params
from uoe_jax.runs.integrity import digest_array
from uoe_jax.runs.probe import in_float32
from uoe_jax.runs.result import RESULT, read_result
from uoe_jax.surgery import Changed, Form, Source, Surgery, Which, operate
from uoe_jax.tree import Arrays
from uoe_jax.validation import validate

ORDER = "neuron_order.npy"  # in a union's folder: its neurons, as the dense model's


def decompose_run(
    folder: Path, out: Path, cut: Cut, *, which: Which = "last"
) -> dict[str, Any]:
    """Write a dense run's checkpoint as a union run into `out`; return what was found.

    Raises what `operate` does, and ConfigError for a cut that can't be.
    """
    check_ranges(cut, "cut.")
    cut.check()
    return operate(folder, out, splitting(cut), verb="decompose", which=which)


def merge_run(folder: Path, out: Path, *, which: Which = "last") -> dict[str, Any]:
    """Write a union run's checkpoint as a dense run into `out`; return what was found.

    Routers are dropped; the neurons get the order back that they had before the split
    where the run still has it. Raises what `operate` does.
    """
    return operate(folder, out, merging, verb="decompose", which=which)


def splitting(cut: Cut) -> Surgery:
    """Return the change that cuts a dense model into experts.

    Compared first with every expert and zero routers, where it is the same function;
    then as it is written, with the chosen experts and the routers it starts from.
    """

    def change(config: ExperimentConfig, params: Arrays, source: Source) -> Changed:
        batch = source.calibration(cut.calibrate) if cut.calibrates else None
        dense = with_params(in_float32(config.model), params, source.buffers)
        settled, number = _with_number(dense, config, cut, batch)
        model = union_config(
            config.model,
            settled.experts,
            settled.chosen,
            settled.parts,
            settled.attention_experts,
            settled.shared,
        )
        new = renamed(config, model, f"union{settled.experts}")
        validate(new)
        settled, plan, groupings = _with_grouping(dense, model, settled, batch, source)
        routed, biases = as_written(plan, model)
        merged = merge_params(plan.params, model, config.model, plan.order)
        report = {
            **_cut_facts(settled),
            **number,
            **groupings,
            "weights_bitwise": same_bits(params, merged),
            "router_explains": {
                f"{part} {number}": fit.explained
                for (number, part), fit in plan.routers.items()
            },
            "refits": {
                f"mlp {number}": [fit.before, fit.after]
                for number, fit in plan.refits.items()
            },
            "neuron_order": digest_array(plan.order),
        }
        return Changed(
            did="split",
            config=new,
            params=routed,
            buffers=biases,
            report=report,
            source_name="dense",
            forms={
                "all_experts": Form(all_chosen(model), plan.params, {}),
                "as_written": Form(model, routed, biases),
            },
            arrays={ORDER: plan.order},
        )

    return change


def _with_number(
    dense: Any, config: ExperimentConfig, cut: Cut, batch: Any
) -> tuple[Cut, dict[str, Any]]:
    """Return a cut whose number of experts is known, and how it was found."""
    if cut.num_experts != "auto":
        return cut, {}
    check_dense(config.model)
    layers = config.model.num_layers
    note_once(f"decompose: PPP looks for the number of experts in {layers} layers")
    number = choose_num_experts(dense, config, cut, batch)
    settled = dataclasses.replace(cut, num_experts=number.chosen, max_experts=None)
    settled.check()
    return settled, {"experts_found": number.as_report()}


def _with_grouping(
    dense: Any, model: ModelConfig, cut: Cut, batch: Any, source: Source
) -> tuple[Cut, Plan, dict[str, Any]]:
    """Return a cut whose grouping is known, its plan, and what was compared for it."""
    if cut.grouping != "all":
        return cut, make_plan(dense, model, cut, batch), {}
    note_once(
        f"decompose: {len(GROUPINGS)} groupings are tried on held-out data, mlc with a "
        "network for each layer"
    )
    plan, rows = compare_groupings(dense, model, cut, batch, source.held_out())
    best = min(rows, key=lambda row: row.loss)
    return best.cut, plan, {"groupings": [row.as_row() for row in rows]}


def _cut_facts(cut: Cut) -> dict[str, Any]:
    """Return what a report says of a cut whose number and grouping are known."""
    names = {f.name for f in dataclasses.fields(cut)} - {"calibrate", "max_experts"}
    facts = {k: v for k, v in dataclasses.asdict(cut).items() if k in names}
    return {
        **facts,
        "top_k": cut.chosen,
        "router": cut.start,
        "calibration": str(cut.calibrate) if cut.calibrates else None,
    }


def merging(config: ExperimentConfig, params: Arrays, source: Source) -> Changed:
    """Return a union with every layer dense, its neurons in their order of before."""
    model = merged_config(config.model)
    order = find_order(source.folder)
    merged = merge_params(params, config.model, model, order)
    return Changed(
        did="merge",
        config=renamed(config, model, "dense"),
        params=merged,
        report={"neuron_order_restored": order is not None},
        source_name="union",
        forms={"dense": Form(model, merged, {})},
    )


def find_order(folder: Path) -> np.ndarray | None:
    """Return the order of neurons a union run was split with; None if it has none.

    Raises DataError if the file isn't the one that was written.
    """
    file, result = folder / ORDER, read_result(folder)
    if not result or not file.is_file():
        return None
    try:
        order = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{file} can't be read ({error}); restore it") from None
    if digest_array(order) != result.get("neuron_order"):
        raise DataError(f"{file} isn't what {RESULT} says; restore it")
    return order


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
