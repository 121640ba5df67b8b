"""Folders that lie in an object store (`gs://`, `s3://`, ...) and are worked on here.

A store has no rename, no append and no locks. So a folder of it is copied to a local
one, all work goes on there with all that a file system guarantees, and what is
finished goes up: docs/stores.md says in which order. Imports no jax and no network.
"""
