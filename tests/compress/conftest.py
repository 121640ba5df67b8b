"""A fresh seed each session."""

from tests.linalg.conftest import seed

__all__ = ["seed"]
