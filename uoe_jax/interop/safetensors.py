"""safetensors files, checked before anything is read, and read tensor by tensor.

Why not the `safetensors` package for reading: it maps whole files into memory, where
pages stay while a model is built from them, twice its size; here bytes are read once,
to where they are wanted. It writes what is exported.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from uoe_jax.errors import DataError, nearest, shown
from uoe_jax.files import parse_json, read_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_SIZES = {"I16": 2, "U16": 2, "U32": 4, "U64": 8, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1}
_HEADER_BYTES = 100_000_000  # as the package allows


class Tensor(NamedTuple):
    """Where one tensor lies: a file and the bytes from `start` on."""

    path: Path
    dtype: str  # the file's word
    shape: tuple[int, ...]
    start: int


class TensorFiles:
    """The tensors of one file, or of the shards that an index names.

    Nothing but headers is read until `read`. `bytes_read` counts what was.
    """

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.tensors = dict(tensors)
        self.bytes_read = 0

    def names(self) -> frozenset[str]:
        """Return the names of all tensors."""
        return frozenset(self.tensors)

    def read(self, name: str, rows: tuple[int, int] | None = None) -> np.ndarray:
        """Return a tensor, or some rows of it, in its own dtype.

        Raises DataError for a file that has become shorter, and for a dtype that isn't
        read.
        """
        tensor = self.tensors[name]
        dtype = DTYPES.get(tensor.dtype)
        if dtype is None:
            known = ", ".join(DTYPES)
            raise DataError(
                f"{tensor.path}: {name} is {tensor.dtype}; read are {known}"
            )
        shape, start = tensor.shape, tensor.start
        if rows is not None and shape:
            row = math.prod(shape[1:]) * dtype.itemsize
            shape, start = (rows[1] - rows[0], *shape[1:]), start + rows[0] * row
        array = np.empty(shape, dtype)
        wanted = memoryview(array.reshape(-1).view(np.uint8))
        with tensor.path.open("rb") as file:
            file.seek(start)
            while wanted:
                count = file.readinto(wanted)
                if not count:
                    raise DataError(f"{tensor.path} ends inside {name}; copy it again")
                wanted = wanted[count:]
                self.bytes_read += count
        return array


def open_folder(folder: Path) -> TensorFiles:
    """Return the tensors of a folder: of its one file, or of its shards.

    Raises DataError for pickled weights, naming how to convert them, for shards that
    are missing, lie outside of the folder or don't hold what the index says.
    """
    single, index = folder / WEIGHTS, folder / INDEX
    if index.is_file():
        return TensorFiles(_read_shards(folder, index))
    if single.is_file():
        check_inside(single, folder)
        return TensorFiles(read_header(single))
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        check_inside(found[0], folder)
        return TensorFiles(read_header(found[0]))
    if found:
        raise DataError(
            f"{folder} has {len(found)} .safetensors files and no {INDEX}; add the "
            "index that says which tensor lies where"
        )
    for pickled in (*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")):
        refuse_pickle(pickled)
    raise DataError(f"{folder} has no {WEIGHTS}; give a folder that holds the weights")


def refuse_pickle(path: Path) -> None:
    """Raise DataError for pickled weights, with the line that converts them."""
    line = (
        "import torch; from safetensors.torch import save_file; save_file({k: "
        "v.clone().contiguous() for k, v in torch.load("
        f"{str(path)!r}, map_location='cpu', weights_only=True).items()}}, "
        f"{str(path.with_name(WEIGHTS))!r})"
    )
    raise DataError(
        f"{path} is pickled, which can run code when it is read; convert it where "
        f'torch is installed: python -c "{line}"'
    )


def check_inside(path: Path, folder: Path) -> None:
    """Raise DataError for a file that links out of its folder.

    A hub's cache links its snapshots to files in the same repository's folder.
    """
    root = folder.resolve()
    if root.parent.name == "snapshots":
        root = root.parent.parent
    if not path.resolve().is_relative_to(root):
        raise DataError(
            f"{path} links to {path.resolve()}, outside of {folder}; copy the file "
            "there if it is what you want"
        )


def _read_shards(folder: Path, index: Path) -> dict[str, Tensor]:
    content = read_json(index)
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not all(
        isinstance(name, str) for name in places.values()
    ):
        raise DataError(f"{index} has no weight_map of file names; restore it")
    shards: dict[str, dict[str, Tensor]] = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise DataError(
                f"{index} names {shown(name)}; shards are .safetensors files beside it"
            )
        if not (folder / name).exists():
            missing = sum(place == name for place in places.values())
            raise DataError(
                f"{folder / name} is missing, with {missing} tensors of {index.name}; "
                "copy it too"
            )
        check_inside(folder / name, folder)
        shards[name] = read_header(folder / name)
    found = {}
    for tensor, name in places.items():
        if tensor not in shards[name]:
            raise DataError(f"{folder / name} has no {tensor}, which {index.name} says")
        found[tensor] = shards[name][tensor]
    extra = sorted(t for shard in shards.values() for t in shard if t not in places)
    if extra:
        raise DataError(
            f"{folder} has {len(extra)} tensors that {index.name} doesn't name, "
            f"{extra[0]} first; restore the index"
        )
    return found


def read_header(path: Path) -> dict[str, Tensor]:
    """Return what a file says it holds, checked against its size.

    Raises DataError, before memory is taken, for a header that is longer than the file
    or isn't JSON, for tensors that overlap, leave gaps or end elsewhere than the file,
    and for shapes that don't fit their bytes.
    """
    with open(path, "rb", opener=_without_waiting) as file:
        total = os.fstat(file.fileno()).st_size
        lead = file.read(8)
        if len(lead) < 8:
            raise DataError(f"{path} has {len(lead)} bytes; it is no safetensors file")
        (length,) = struct.unpack("<Q", lead)
        if length > min(total - 8, _HEADER_BYTES):
            raise DataError(
                f"{path} says that its header has {length:,} bytes and has "
                f"{total:,} in all; it is damaged or no safetensors file"
            )
        text = file.read(length)
    header = parse_json(text, f"the header of {path}")
    if not isinstance(header, dict):
        raise DataError(f"the header of {path} is no object; copy the file again")
    header.pop("__metadata__", None)
    begin, size = 8 + length, total - 8 - length
    tensors, spans = {}, []
    for name, entry in header.items():
        dtype, shape, span = _check_entry(path, name, entry, size)
        tensors[name] = Tensor(path, dtype, shape, begin + span[0])
        spans.append((*span, name))
    end = 0
    for low, high, name in sorted(spans):
        if low != end:
            what = "overlaps what is before it" if low < end else "leaves a gap before"
            raise DataError(f"{path}: {name} {what} (byte {low}, not {end})")
        end = high
    if end != size:
        raise DataError(
            f"{path} has {size:,} bytes of tensors and its header says {end:,}; copy "
            "the file again"
        )
    return tensors


def _check_entry(
    path: Path, name: str, entry: Any, size: int
) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    """Return dtype, shape and span of one tensor of a header."""
    fields: dict[str, Any] = entry if isinstance(entry, dict) else {}
    words = ("dtype", "shape", "data_offsets")
    dtype, shape, span = (fields.get(word, "") for word in words)
    whole = lambda values: (
        isinstance(values, list)
        and len(values) <= 16
        and all(type(value) is int and 0 <= value < 2**63 for value in values)
    )
    if not (isinstance(dtype, str) and whole(shape) and whole(span) and len(span) == 2):
        raise DataError(f"{path}: {name} is {shown(entry)}; it needs dtype, shape and "
                        "two data_offsets")  # fmt: skip
    width = DTYPES[dtype].itemsize if dtype in DTYPES else _SIZES.get(dtype)
    if width is None:
        fix = nearest(dtype, [*DTYPES, *_SIZES])
        raise DataError(f"{path}: {name} has the dtype {shown(dtype)}; {fix}")
    low, high = span
    if not low <= high <= size:
        raise DataError(
            f"{path}: {name} lies at bytes {low:,} to {high:,} of {size:,}; copy the "
            "file again"
        )
    if math.prod(shape) * width != high - low:
        raise DataError(
            f"{path}: {name} of shape {shown(shape)} in {dtype} needs "
            f"{shown(math.prod(shape) * width)} bytes and has {high - low:,}"
        )
    return dtype, tuple(shape), (low, high)


def _without_waiting(path: str, flags: int) -> int:
    # A pipe under the name of a file would otherwise wait for its writer for ever.
    return os.open(path, flags | os.O_NONBLOCK)
