"""One matrix product per group of rows, by backend."""
