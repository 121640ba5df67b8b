"""Array aliases and the dimension letters used in every annotation.

B batch, T tokens, S keys, D model width, F MLP width, N query heads, K key/value
heads, G query heads per key head, H head width, J key heads per expert, V vocabulary,
L layers, E experts, X chosen experts (top-k), M packed rows, R rank, P patches,
C classes, I and O the two sides of a generic linear map.
"""

from __future__ import annotations

from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

__all__ = ["Array", "Bool", "Float", "Int", "PyTree", "Shaped"]
