"""A plan as a page: the layouts side by side, each with its picture."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from uoe_jax.hardware.roofline import Prediction
from uoe_jax.plan.layouts import Plan, describe_sizes, reasons
from uoe_jax.plan.picture import draw_layout
from uoe_jax.report.page import page, table
from uoe_jax.report.plan_text import HEADER, cells, too_large
from uoe_jax.report.table import si

_PICTURES = 6


def plan_page(plan: Plan, compiled: Mapping[str, Any]) -> str:
    """Return the document; `compiled` holds what a compiler said, by mesh."""
    rows = [cells(found, _peak(found, compiled)) for found in plan.fitting]
    short = [too_large(found) for found in plan.too_large]
    illegal = [(first, str(n), why) for why, n, first in reasons(plan.illegal)]
    pictures = "".join(
        f"<figure>{_svg(plan, found)}</figure>" for found in plan.fitting[:_PICTURES]
    )
    sections = [
        ("Layouts that fit, fastest first", _table(HEADER, rows)),
        ("Who holds what", pictures),
        ("Too large", _table(("layout", "chip needs", "short of"), short)),
        ("Illegal", _table(("such as", "meshes", "why"), illegal)),
    ]
    device = plan.topology.device
    return page(
        f"{plan.config.name} on {plan.topology.name}",
        f"{plan.topology.num_devices} x {device.name} ({device.source}); factors: "
        f"{plan.calibration.source}",
        sections,
    )


def _peak(found: Prediction, compiled: Mapping[str, Any]) -> str:
    said = compiled.get(describe_sizes(found.sizes)) or {}
    peak = said.get("peak_bytes")
    return si(peak, "B") if peak else said.get("error", "-")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return table(header, rows) if rows else ""


def _svg(plan: Plan, found: Prediction) -> str:
    file = io.StringIO()
    chosen = plan.topology.is_tpu
    figure = draw_layout(plan.config, found.sizes, chosen=chosen)
    figure.savefig(file, format="svg")
    text = file.getvalue()
    return text[text.index("<svg") :]
