"""The folder of a run: read, written, locked and checked, below what trains."""
