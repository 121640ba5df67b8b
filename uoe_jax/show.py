"""`show`: a model, a run, a plan or findings as an aligned table."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from uoe_jax.config import ExperimentConfig, ModelConfig
from uoe_jax.errors import ConfigError, shown
from uoe_jax.hardware.count import flops_per_token, group_title, num_tokens
from uoe_jax.kinds import router_of
from uoe_jax.report.table import format_table, si
from uoe_jax.runs.find import run_or_preset
from uoe_jax.validation import validate_model
from uoe_jax.weights import BLOCKS, layer_period, model_params

_HEADER = ("part", "weight", "shape", "layers", "parameters", "FLOPs a token")
Row = tuple[str, str, str, str, str, str]


@dataclass(frozen=True)
class Shown:
    """What was printed; a notebook draws it as a table."""

    title: str
    text: str
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()

    def __str__(self) -> str:
        return f"{self.title}\n\n{self.text}" if self.title else self.text

    def __repr__(self) -> str:
        return f"<{self.title or self.text.splitlines()[0]}>"

    def _repr_html_(self) -> str:
        if not self.rows:
            return f"<pre>{html.escape(str(self))}</pre>"
        cells = lambda row, tag: "".join(
            f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in row
        )
        body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in self.rows)
        return (
            f"<table><caption>{html.escape(self.title)}</caption>"
            f"<thead><tr>{cells(self.header, 'th')}</tr></thead>"
            f"<tbody>{body}</tbody></table>"
        )


def show(subject: Any) -> Shown:
    """Print what a model, a run, a config, a plan or findings hold; return the table.

    Of a model: every weight with its shape in one layer, its parameters in all of them,
    and the FLOPs of a token's forward pass, by part. Experts that a token doesn't use
    cost it nothing.

    Args:
      subject: a config, a model of this package, a run (what `load_run` returned, its
        folder or name), a preset's name, or what `plan` or `leakcheck` returned.

    Raises:
      ConfigError: something else, or a config that can't be.
    """
    found = _describe(subject)
    print(found)
    return found


def _describe(subject: Any) -> Shown:
    if isinstance(subject, (str, Path)):
        subject = run_or_preset(str(subject))[1]
    if isinstance(subject, ExperimentConfig):
        return model_table(subject.model, subject.name, subject.seq_len)
    if isinstance(subject, ModelConfig):
        return model_table(subject, subject.kind)
    config = getattr(subject, "config", None)  # of a model or a loaded run
    if isinstance(config, ModelConfig):
        return model_table(config, type(subject).__name__)
    if isinstance(config, ExperimentConfig) and hasattr(subject, "fitting"):
        from uoe_jax.report.plan_text import describe

        return Shown("", describe(subject, {}, 12))
    if isinstance(config, ExperimentConfig):
        name = f"{config.name}, step {subject.step}"
        return model_table(config.model, name, config.seq_len)
    if isinstance(subject, list) and subject and hasattr(subject[0], "perturbed"):
        from uoe_jax.leakcheck import format_findings

        return Shown("", format_findings(subject))
    raise ConfigError(
        f"show takes a config, a model, a run or a preset's name; this is "
        f"{shown(subject)}"
    )


def model_table(
    model: ModelConfig, name: str = "model", seq_len: int | None = None
) -> Shown:
    """Return the weights of a model by part; FLOPs are at `seq_len` tokens."""
    validate_model(model)
    length = num_tokens(model, seq_len)
    rows = list(_rows(model, length))
    size = sum(math.prod(param.shape) for param in model_params(model).values())
    forward = flops_per_token(model, length).forward
    title = (
        f"{name}: {size:,} parameters, {si(forward, 'FLOP')} a token forward at "
        f"{length} tokens"
    )
    rows.append(("all", "", "", "", f"{size:,}", si(forward, "FLOP")))
    return Shown(title, format_table(_HEADER, rows), _HEADER, rows)


def _rows(model: ModelConfig, length: int) -> Iterator[Row]:
    flops = flops_per_token(model, length).parts
    told = {"embed": flops.get("embedding", 0.0), "head": flops.get("head", 0.0)}
    outer = {n: p for n, p in model_params(model).items() if not n.startswith(BLOCKS)}
    first = [name for name in outer if name.startswith("embed")]
    for name in first:
        yield _outer(name, outer[name].shape, told)
    for stack in range(layer_period(model)):
        yield from _layer_rows(model, stack, length)
    for name in outer:
        if name not in first:
            yield _outer(name, outer[name].shape, told)
    if cost := told.pop("head", 0.0):
        yield "head", "the embedding's", "", "", "", si(cost, "FLOP")


def _outer(name: str, shape: tuple[int, ...], told: dict[str, float]) -> Row:
    """Return the row of a weight that is in no block; its part's FLOPs once."""
    part, _, weight = name.removeprefix("trunk.").rpartition(".")
    return _row(part, weight, shape, "", told.pop(part, 0.0))


def _layer_rows(model: ModelConfig, stack: int, length: int) -> Iterator[Row]:
    """Yield the weights of the layers that have the kinds of number `stack`."""
    numbers = range(stack, model.num_layers, layer_period(model))
    attention, mlp = model.layer_kinds[stack]
    block = model.block_kinds[stack]
    inside = model.mod.keep if block == "mod" else 1.0
    kinds: Any = {"attention": (attention,), "mlp": (mlp,), "blocks": (block,)}
    alone = replace(model.of_layer(stack), num_layers=1, **kinds)
    flops = flops_per_token(alone, length).parts
    begin, before = f"{BLOCKS}{stack}.", ""
    params = {
        name.removeprefix(begin): param.shape[1:]
        for name, param in model_params(model).items()
        if name.startswith(begin)
    }
    routers = {
        name: 2.0 * math.prod(shape) * (1 if name.startswith("router") else inside)
        for name, shape in params.items()
        if "router" in name and len(shape) == 2
    }
    told = {
        "attention": flops["attention projections"] + flops["attention scores"]
        # What is chosen without weights, as blocks of keys are.
        + flops.get("routers", 0.0) - sum(routers.values()),
        "mlp": flops["mlp"],
    }  # fmt: skip
    told["convolution"] = flops.get("convolution", 0.0)
    for name in model.beside:
        heads = group_title(name)
        told[name] = flops[f"{heads} projections"] + flops[f"{heads} scores"]
    for name, shape in params.items():
        part, _, weight = name.rpartition(".")
        title = part.replace(".", " ")
        if part in kinds:
            title = f"{part}: {_kind(model, part, *kinds[part])}"
        if part in model.beside:
            title = group_title(part)
        if part == "router":
            title = f"router: {inside:.0%} of the tokens enter"
        same, before = part == before, part
        yield _row(
            "" if same else title,
            weight,
            shape,
            "" if same else _numbers(numbers),
            len(numbers) * (told.pop(part, 0.0) + routers.get(name, 0.0)),
            len(numbers),
        )


def _kind(model: ModelConfig, part: str, kind: str) -> str:
    """Return a part's kind in words: "union, 4 of 8 experts"."""
    router = router_of(model, part, kind)
    if router is None:
        return kind
    return f"{kind}, {router.top_k} of {router.num_experts} experts"


def _numbers(numbers: range) -> str:
    """Return layer numbers as text: "0-3", "0, 2, 4", "0, 2, ... 22"."""
    if len(numbers) > 1 and numbers.step == 1:
        return f"{numbers[0]}-{numbers[-1]}"
    if len(numbers) > 4:
        return f"{numbers[0]}, {numbers[1]}, ... {numbers[-1]}"
    return ", ".join(map(str, numbers))


def _row(
    part: str,
    weight: str,
    shape: tuple[int, ...],
    layers: str,
    flops: float,
    count: int = 1,
) -> Row:
    cost = si(flops, "FLOP") if flops else ""
    size = f"{count * math.prod(shape):,}"
    return part, weight, " x ".join(map(str, shape)), layers, size, cost
