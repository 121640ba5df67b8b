"""`uoe cost`: what a model costs, counted from its config. Imports no jax."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from uoe_jax.cli import cost_decode, cost_products
from uoe_jax.cli.parse import Experiment, parse
from uoe_jax.cli.paths import take_experiment
from uoe_jax.config import ExperimentConfig
from uoe_jax.errors import ConfigError
from uoe_jax.fields import Count
from uoe_jax.files import format_json
from uoe_jax.hardware import count
from uoe_jax.report.table import format_table, si
from uoe_jax.validation import validate


@dataclass(frozen=True, kw_only=True)
class CostOptions:
    """Count parameters, FLOPs and bytes of a preset or a run; nothing is run."""

    config: Experiment
    batch: Count | None = None  # sequences at a time; the preset's batch size
    seq_len: Count | None = None  # tokens in each; the preset's sequence length
    gemm: str | None = None  # h200, or a file of uoe bench gemm: a step's products
    device: str | None = None  # decode there: aim-gddr6:8 (in memory), h200, t4, ...
    context: Count | None = None  # tokens in the cache; the model's max_seq_len
    json: bool = False  # one JSON object instead of tables


def cost(args: list[str]) -> int:
    """Print the cost of `PRESET [options]`, or of what a run trained."""
    _, preset, rest = take_experiment(args, "cost")
    options = parse(
        CostOptions,
        rest,
        "cost",
        default=CostOptions(config=preset),
        first="PRESET|RUN|--config FILE",
    )
    validate(options.config)
    found = count_all(options.config, options.batch, options.seq_len)
    if options.gemm is not None:
        found["products"] = _products(options)
    if options.device is not None:
        model = options.config.model
        found["decode"] = cost_decode.decode_costs(
            model, options.device, options.context
        )
    elif options.context is not None:
        raise ConfigError(
            f"--context is {options.context}; it is for decoding, add --device"
        )
    print(format_json(found, indent=2) if options.json else describe(found))
    return 0


def _products(options: CostOptions) -> dict:
    """Return what each product of a step costs on one device."""
    config, data = options.config, options.config.data
    data = dataclasses.replace(
        data,
        batch_size=options.batch or data.batch_size,
        seq_len=options.seq_len or data.seq_len,
    )
    model = cost_products.read_model(options.gemm or "")
    return cost_products.product_costs(dataclasses.replace(config, data=data), model)


def count_all(
    config: ExperimentConfig, batch: int | None = None, seq_len: int | None = None
) -> dict:
    """Return every count of an experiment as plain numbers; bytes and FLOPs."""
    model = config.model
    batch = batch or config.data.batch_size
    length = count.num_tokens(model, seq_len or config.seq_len)
    params = count.count_params(model)
    flops = count.flops_per_token(model, length)
    cache = count.cache_bytes(model, batch, length) if model.kind == "decoder" else 0
    return {
        "name": config.name,
        "batch": batch,
        "seq_len": length,
        "params": {**params, "total": sum(params.values())},
        "active_params": count.count_active_params(model),
        "flops_per_token": {
            **flops.parts,
            "forward": flops.forward,
            "training": flops.training,
        },
        "flops_per_step": flops.training * batch * length,
        "bytes": {
            **count.state_bytes(model),
            "activations": count.activation_bytes(model, batch, length),
            "kv_cache": cache,
        },
    }


def describe(found: dict) -> str:
    """Return the counts as aligned tables."""
    params, flops, size = found["params"], found["flops_per_token"], found["bytes"]
    total, forward = params["total"], flops["forward"]
    share = lambda part, whole: f"{100 * part / whole:.1f}%"
    first = [(k, f"{v:,}", share(v, total)) for k, v in params.items()]
    first.append(
        (
            "used by a token",
            f"{found['active_params']:,}",
            share(found["active_params"], total),
        )
    )
    second = [
        (k, si(v, "FLOP"), share(v, forward) if v <= forward else "")
        for k, v in flops.items()
    ]
    third = [(k.replace("_", " "), si(v, "B")) for k, v in size.items()]
    where = f"{found['batch']} x {found['seq_len']} tokens"
    tables = []
    if "products" in found:
        tables.append(cost_products.describe(found["products"]))
    if "decode" in found:
        tables.append(cost_decode.describe(found["decode"]))
    return "\n\n".join(
        [
            f"{found['name']}: {total:,} parameters, {si(forward, 'FLOP')} a "
            f"token forward, {si(found['flops_per_step'], 'FLOP')} a training step of "
            f"{where}",
            format_table(("parameters", "number", "share"), first),
            format_table(("one token", "forward", "share"), second),
            format_table((f"bytes at {where}", "size"), third),
            *tables,
        ]
    )
