"""Writes the generated parts of docs/models.md: presets, routers, attentions and MLPs.

python docs/make_models.py

Between `<!-- NAME -->` and `<!-- end -->` stands what a function here returns;
tests/test_docs_models.py holds the page to it.
"""

from __future__ import annotations

import re
from pathlib import Path

from uoe_jax.config import ModelConfig
from uoe_jax.hardware.count import count_active_params, count_params, flops_per_token
from uoe_jax.kinds import ATTENTIONS, MLPS, ROUTERS
from uoe_jax.presets import PRESETS, get_preset

PAGE = Path(__file__).parent / "models.md"


def table(header: str, rows: list[tuple[str, ...]]) -> str:
    """Return a table whose header is words separated by bars."""
    columns = [cell.strip() for cell in header.split("|")]
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def amount(number: float) -> str:
    """Return a number of parameters as 123.6M or 1.44B."""
    return f"{number / 1e9:.2f}B" if number >= 1e9 else f"{number / 1e6:.1f}M"


def kind_of(model: ModelConfig) -> str:
    """Return what the layers are, in the words of the config."""
    parts = ["/".join(dict.fromkeys(part)) for part in (model.attention, model.mlp)]
    if set(model.blocks) != {"all"}:
        parts.append("blocks " + "/".join(dict.fromkeys(model.blocks)))
    return ", ".join(parts)


def presets() -> str:
    """Return every preset with its size and its work."""
    rows = []
    for name in PRESETS:
        model = get_preset(name).model
        flops = flops_per_token(model, get_preset(name).seq_len).forward
        rows.append(
            (
                f"`{name}`",
                model.kind,
                kind_of(model),
                str(model.num_layers),
                str(model.d_model),
                f"{model.num_heads} x {model.head_dim}",
                str(model.d_ff),
                amount(sum(count_params(model).values())),
                amount(count_active_params(model)),
                f"{flops / 1e6:,.1f}",
            )
        )
    header = "preset | kind | attention, MLP | layers | width | heads | MLP | "
    return table(header + "parameters | active | forward MFLOPs a token", rows)


def routers() -> str:
    """Return every router and what its choice depends on."""
    rows = [
        (f"`{name}`", facts.sees, "yes" if facts.causal else "no")
        for name, facts in ROUTERS.items()
    ]
    return table("router | a token's choice depends on | for decoders", rows)


def kinds() -> str:
    """Return the kinds of attentions and MLPs."""
    yes = lambda fact: "yes" if fact else "no"
    rows = [
        (f"`{name}`", part, yes(facts.splits))
        for part, found in (("attention", ATTENTIONS), ("MLP", MLPS))
        for name, facts in found.items()
    ]
    return table("kind | part | split over tensor devices", rows)


PARTS = {"presets": presets, "routers": routers, "kinds": kinds}


def fill(text: str) -> str:
    """Return the page with its generated parts made anew."""
    for name, make in PARTS.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        if not re.search(pattern, text, re.S):
            raise ValueError(f"{PAGE.name} has no place for {name}")
        put = make() + "\n"
        text = re.sub(pattern, lambda m, put=put: m[1] + put + m[2], text, flags=re.S)
    return text


if __name__ == "__main__":
    PAGE.write_text(fill(PAGE.read_text()))
