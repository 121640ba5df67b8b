"""Union of Experts transformers in JAX.

    import uoe_jax as uoe

    run = uoe.train("tiny-union", "runs/first")
    print(uoe.generate("runs/first", "def "))

Names are imported when they are first used: importing this touches no jax and no
device. Some are those of folders of this package too (`train`, `evaluate`, ...): here
they are the functions; `from uoe_jax.train import ...` still finds the folder.
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uoe_jax import ops
    from uoe_jax.api import (
        adapt,
        decompose,
        evaluate,
        generate,
        leakcheck,
        load_run,
        merge,
        plan,
        train,
    )
    from uoe_jax.config import (
        DataConfig,
        ExperimentConfig,
        LayoutConfig,
        MeshConfig,
        ModelConfig,
        MoeConfig,
        OptimConfig,
        TrainConfig,
        UnionConfig,
    )
    from uoe_jax.errors import UoeError
    from uoe_jax.kinds import AttentionFacts, MlpFacts, RouterFacts
    from uoe_jax.linalg.completion.fit import complete
    from uoe_jax.model import (
        make_model,
        register_attention,
        register_mlp,
        register_router,
    )
    from uoe_jax.model.capture import capture
    from uoe_jax.presets import get_preset
    from uoe_jax.show import show

__version__ = "0.2.0"

__all__ = [
    "AttentionFacts",
    "DataConfig",
    "ExperimentConfig",
    "LayoutConfig",
    "MeshConfig",
    "MlpFacts",
    "ModelConfig",
    "MoeConfig",
    "OptimConfig",
    "RouterFacts",
    "TrainConfig",
    "UnionConfig",
    "UoeError",
    "adapt",
    "capture",
    "complete",
    "decompose",
    "evaluate",
    "generate",
    "get_preset",
    "leakcheck",
    "load_run",
    "make_model",
    "merge",
    "ops",
    "plan",
    "register_attention",
    "register_mlp",
    "register_router",
    "show",
    "train",
]

_FILES = {
    "config": tuple(name for name in __all__ if name.endswith("Config")),
    "kinds": tuple(name for name in __all__ if name.endswith("Facts")),
    "errors": ("UoeError",),
    "presets": ("get_preset",),
    "model": ("make_model", *(n for n in __all__ if n.startswith("register_"))),
    "model.capture": ("capture",),
    "linalg.completion.fit": ("complete",),
    "show": ("show",),
    "api": ("adapt", "decompose", "evaluate", "generate", "leakcheck", "load_run",
            "merge", "plan", "train"),
}  # fmt: skip
_FILE = {name: file for file, names in _FILES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name when it is asked for."""
    if name == "ops":
        return importlib.import_module("uoe_jax.ops")
    if name not in _FILE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"{__name__}.{_FILE[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


class _Package(types.ModuleType):
    """This package; importing a folder doesn't hide the function of the same name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _FILE and isinstance(value, types.ModuleType):
            return
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
