"""What each matrix product of a training step costs on a device. Imports no jax."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from uoe_jax.config import ExperimentConfig
from uoe_jax.errors import ConfigError
from uoe_jax.hardware import gemm
from uoe_jax.hardware.devices import DEVICES
from uoe_jax.hardware.fit import ONE
from uoe_jax.hardware.step_products import chosen_products
from uoe_jax.report.table import format_table


def read_model(text: str) -> gemm.GemmModel:
    """Return the model that a file or a device's name stands for.

    Raises:
      ConfigError: a device that isn't known or has no model.
      DataError: a file that holds no model.
    """
    path = Path(text)
    if path.suffix == ".json" or path.exists():
        return gemm.load(path)
    wanted = text.lower().replace("-", " ")
    for device in DEVICES:
        if device.name.lower() == wanted:
            if (model := gemm.choose(None, device)) is not None:
                return model
            raise ConfigError(
                f"--gemm is {text!r}, of which no products were timed; run uoe bench "
                "gemm there, or choose h200 or h100"
            )
    names = ", ".join(device.name.lower().replace(" ", "-") for device in DEVICES)
    raise ConfigError(f"--gemm is {text!r}; give a file of uoe bench gemm, or: {names}")


def product_costs(config: ExperimentConfig, model: gemm.GemmModel) -> dict[str, Any]:
    """Return every product of a step on one device, with its seconds.

    Raises:
      ConfigError: layers whose products aren't listed.
    """
    counted = chosen_products(config, ONE, model)
    if counted is None:
        raise ConfigError(
            "--gemm lists products of decoders with dense, union, moe and moba layers; "
            "leave it out for this one"
        )
    median, low, high = model.seconds([product for _, product, _ in counted])
    rows = [
        {
            "kind": kind,
            "kernel": product.kernel,
            "m": product.m,
            "n": product.n,
            "k": product.k,
            "groups": product.groups,
            "layout": product.layout,
            "tile": product.tile,
            "times": times,
            "seconds": seconds,
            "low": least,
            "high": most,
            "flops": product.flops,
        }
        for (kind, product, times), seconds, least, most in zip(
            counted, median.tolist(), low.tolist(), high.tolist(), strict=True
        )
    ]
    total = sum(row["seconds"] * row["times"] for row in rows)
    return {"model": gemm.describe(model), "seconds": total, "rows": rows}


def describe(found: dict[str, Any]) -> str:
    """Return the products as a table, those that take most first."""
    rows = [
        (
            row["kernel"],
            f"{row['m']} x {row['n']} x {row['k']}",
            str(row["groups"]),
            row["layout"],
            f"{row['times']:.0f}",
            f"{row['seconds'] * 1e6:.0f} us",
            f"{row['low'] * 1e6:.0f} to {row['high'] * 1e6:.0f}",
            f"{row['flops'] / row['seconds'] / 1e12:.0f}",
            f"{row['seconds'] * row['times'] * 1e3:.1f} ms",
        )
        for row in sorted(found["rows"], key=lambda row: -row["seconds"] * row["times"])
    ]
    header = ("product", "m x n x k", "groups", "layout", "times", "each", "8 in 10",
              "TFLOP/s", "a step")  # fmt: skip
    head = f"{found['model']}: {found['seconds'] * 1e3:.1f} ms of products a step"
    return f"{head}\n\n{format_table(header, rows)}"
