"""Decompositions as such: matrix completion, sketching, low-rank tools."""
