"""Random unit vectors for values, and orthogonal matrices that bind them to keys.

Gallant, "Orthogonal Matrices for MBAT Vector Symbolic Architectures, and a 'Soft' VSA
Representation for JSON" (arXiv 2202.04771). Everything is drawn from a digest of what
it stands for, so that it has the same bits in every process.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int

from uoe_jax.errors import ConfigError, shown

MIN_DIM, MAX_DIM = 64, 1 << 16
_KEPT_KEYS = 1024  # matrices in memory; 48 kB each at 2,048 dimensions

Rows = Float32[np.ndarray, "N D"]


def check_dim(dim: int) -> None:
    """Raise ConfigError for a dimension that isn't a power of two in the range."""
    whole = isinstance(dim, int) and not isinstance(dim, bool)
    if not (whole and MIN_DIM <= dim <= MAX_DIM and dim & (dim - 1) == 0):
        raise ConfigError(
            f"dim is {shown(dim)}; it must be a power of two from {MIN_DIM} to "
            f"{MAX_DIM:,}"
        )


def random_bits(kind: str, text: str) -> np.random.Philox:
    """Return the stream of random bits that stands for (kind, text)."""
    content = f"{kind}\0{text}".encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(content, digest_size=16, person=b"uoe.runs.1")
    return np.random.Philox(key=int.from_bytes(digest.digest(), "little"))


def _signs(bits: np.random.Philox, dim: int) -> Float32[np.ndarray, " D"]:
    words = bits.random_raw(dim // 64).astype("<u8").view(np.uint8)
    return np.unpackbits(words).astype(np.float32) * 2 - 1


def _permutation(bits: np.random.Philox, dim: int) -> Int[np.ndarray, " D"]:
    return np.argsort(bits.random_raw(dim), kind="stable")


def normals(bits: np.random.Philox, count: int) -> Float32[np.ndarray, " N"]:
    """Return standard normal numbers (Box and Muller), whatever numpy's version."""
    raw = (bits.random_raw(2 * count) >> np.uint64(11)) * 2.0**-53
    radius = np.sqrt(-2 * np.log1p(-raw[:count]))
    return (radius * np.cos(2 * np.pi * raw[count:])).astype(np.float32)


def atom(kind: str, text: str, dim: int) -> Float32[np.ndarray, " D"]:
    """Return the unit vector of a value: signs over sqrt(dim)."""
    return _signs(random_bits(kind, text), dim) / np.float32(dim**0.5)


class Operators:
    """One orthogonal matrix a step of a path; subclasses say which."""

    def __init__(self, dim: int):
        check_dim(dim)
        self.dim = dim

    def bind(self, steps: Sequence[str | int], starts: Sequence[int], x: Rows) -> Rows:
        """Return M_s x for rows starts[i] to starts[i + 1] with s = steps[i]."""
        raise NotImplementedError

    def unbind(self, step: str | int, x: Rows) -> Rows:
        """Return M_s^T x, which undoes the binding."""
        raise NotImplementedError


class _Key(NamedTuple):
    """What makes the matrix of a key."""

    first: Float32[np.ndarray, " D"]
    second: Float32[np.ndarray, " D"]
    inner: Int[np.ndarray, " D"]
    outer: Int[np.ndarray, " D"]


class HadamardOperators(Operators):
    """Keys: P2 H S2 P1 H S1, signs, permutations and the Hadamard transform H.

    Applied in D log D operations from 16 bytes a dimension. Positions of lists: powers
    of one random permutation, so that an item's matrix is M^(i+1).
    """

    def __init__(self, dim: int):
        super().__init__(dim)
        half = 1 << (dim.bit_length() // 2)
        scale = np.float32(dim**-0.25)
        self._left, self._right = (
            _hadamard(dim // half) * scale,
            _hadamard(half) * scale,
        )
        self._key = functools.lru_cache(_KEPT_KEYS)(self._make_key)
        self._place = functools.lru_cache(_KEPT_KEYS)(self._make_place)

    def _make_key(self, key: str) -> _Key:
        bits = random_bits("key", key)
        return _Key(
            _signs(bits, self.dim),
            _signs(bits, self.dim),
            _permutation(bits, self.dim).astype(np.int32),
            _permutation(bits, self.dim).astype(np.int32),
        )

    def _make_place(self, place: int) -> Int[np.ndarray, " D"]:
        """Return the permutation of a list's position, or of its length."""
        if place < 0:
            return _permutation(random_bits("list", "length"), self.dim)
        power, square = (
            np.arange(self.dim),
            _permutation(random_bits("list", "position"), self.dim),
        )
        times = place + 1
        while times:
            if times & 1:
                power = power[square]
            square = square[square]
            times >>= 1
        return power

    def _transform(self, x: Rows) -> Rows:
        """Return H x with H orthonormal: a product of two small Hadamard matrices."""
        # Row by row: BLAS's threads would take 15 times as long on a busy machine.
        y = np.matmul(x.reshape(len(x), -1, len(self._right)), self._right)
        return np.matmul(self._left, y).reshape(x.shape)

    def bind(self, steps: Sequence[str | int], starts: Sequence[int], x: Rows) -> Rows:
        """Return M_s x for rows starts[i] to starts[i + 1] with s = steps[i]."""
        x = x.copy()
        groups = list(zip(steps, starts[:-1], starts[1:], strict=True))
        keys = [(self._key(s), a, b) for s, a, b in groups if isinstance(s, str)]
        places = [(self._place(s), a, b) for s, a, b in groups if isinstance(s, int)]
        for place, a, b in places:
            x[a:b] = np.take(x[a:b], place, axis=1)
        if not keys:
            return x
        kept = x.copy() if places else x
        for key, a, b in keys:
            x[a:b] *= key.first
        x = self._transform(x)
        for key, a, b in keys:
            x[a:b] = np.take(x[a:b], key.inner, axis=1)
            x[a:b] *= key.second
        x = self._transform(x)
        for key, a, b in keys:
            x[a:b] = np.take(x[a:b], key.outer, axis=1)
        for _, a, b in places:
            x[a:b] = kept[a:b]
        return x

    def unbind(self, step: str | int, x: Rows) -> Rows:
        """Return M_s^T x, which undoes the binding."""
        y = np.empty_like(x)
        if isinstance(step, int):
            y[:, self._place(step)] = x
            return y
        key = self._key(step)
        y[:, key.outer] = x
        x = self._transform(y) * key.second
        y = np.empty_like(x)
        y[:, key.inner] = x
        return self._transform(y) * key.first


class MatrixOperators(Operators):
    """Dense matrices: Haar orthogonal, or Gaussian for comparison.

    Gaussian ones have entries of variance 1/D: they keep norms on average only, and
    their transpose undoes them only roughly.
    """

    def __init__(self, dim: int, *, orthogonal: bool = True):
        super().__init__(dim)
        self.orthogonal = orthogonal
        self._matrix = functools.lru_cache(_KEPT_KEYS)(self._make)

    def _make(self, step: str | int) -> Float32[np.ndarray, "D D"]:
        if isinstance(step, int) and step >= 0:
            first = self._make_random("list", "position")
            return np.linalg.matrix_power(first, step + 1)
        kind = "key" if isinstance(step, str) else "list"
        return self._make_random(kind, step if isinstance(step, str) else "length")

    def _make_random(self, kind: str, text: str) -> Float32[np.ndarray, "D D"]:
        drawn = normals(random_bits(kind, text), self.dim**2)
        matrix = drawn.reshape(self.dim, self.dim)
        if not self.orthogonal:
            return matrix / np.float32(self.dim**0.5)
        q, r = np.linalg.qr(matrix)
        return q * np.sign(np.diag(r))  # which makes it uniform (Mezzadri 2007)

    def bind(self, steps: Sequence[str | int], starts: Sequence[int], x: Rows) -> Rows:
        """Return M_s x for rows starts[i] to starts[i + 1] with s = steps[i]."""
        y = np.empty_like(x)
        for step, a, b in zip(steps, starts[:-1], starts[1:], strict=True):
            y[a:b] = x[a:b] @ self._matrix(step).T
        return y

    def unbind(self, step: str | int, x: Rows) -> Rows:
        """Return M_s^T x, which undoes the binding where M is orthogonal."""
        return x @ self._matrix(step)


def _hadamard(size: int) -> Float32[np.ndarray, "N N"]:
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix
