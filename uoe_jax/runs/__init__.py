"""The folder of a run: read, written, locked, checked and searched, below training.

`JsonVector` and `RunIndex` are for anybody's JSON; see docs/howto/find_runs.md.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uoe_jax.runs.index import RunIndex
    from uoe_jax.runs.vector import JsonVector

__all__ = ["JsonVector", "RunIndex"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: the rest of the room needs jax."""
    if name == "RunIndex":
        from uoe_jax.runs.index import RunIndex

        return RunIndex
    if name == "JsonVector":
        from uoe_jax.runs.vector import JsonVector

        return JsonVector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
