"""Clusters: which points belong together, and how many kinds there are."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uoe_jax.cluster.mlc import MLC
    from uoe_jax.cluster.ppp import PPP

__all__ = ["MLC", "PPP"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name == "MLC":
        from uoe_jax.cluster.mlc import MLC

        return MLC
    if name == "PPP":
        from uoe_jax.cluster.ppp import PPP

        return PPP
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
