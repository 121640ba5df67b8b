"""Union of Experts transformers in JAX. Importing this touches no device."""

__version__ = "0.1.0"
