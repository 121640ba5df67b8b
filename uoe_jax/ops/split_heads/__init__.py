"""Projected rows to queries, keys and values of their heads, by backend."""
