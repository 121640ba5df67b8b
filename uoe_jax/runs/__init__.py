"""The folder of a run: read, written, locked, checked and searched, below training."""
