"""Cost model: what a config costs, and what devices offer. Imports no jax."""
