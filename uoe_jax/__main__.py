"""`python -m uoe_jax` is `uoe`."""

from __future__ import annotations

import sys

from uoe_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
