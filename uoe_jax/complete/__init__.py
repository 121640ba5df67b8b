"""`uoe complete`: low-rank completion of a file of entries."""
