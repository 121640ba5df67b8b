"""TensorBoard's event files of a run that goes on from an earlier step."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from uoe_jax.errors import extra_packages
from uoe_jax.files import write_atomically

_LENGTH = struct.Struct("<Q")
_CHECKSUM_BYTES = 4


def drop_events_after(folder: Path, step: int) -> None:
    """Rewrite the event files in a folder without the events after a step.

    An event whose end a kill cut off goes too. A file is a sequence of records: length,
    its checksum, the event, its checksum (TensorFlow's TFRecord).
    """
    with extra_packages():
        from tensorboardX.proto import event_pb2

    make: Any = event_pb2.Event.FromString  # pyrefly: ignore[missing-attribute]
    for path in sorted(folder.glob("*tfevents*")):
        content = path.read_bytes()
        kept = [
            record for record, event in _records(content) if make(event).step <= step
        ]
        if (rest := b"".join(kept)) != content:
            write_atomically(path, rest)


def _records(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield every whole record and the event inside it."""
    start = 0
    while start + _LENGTH.size <= len(content):
        (length,) = _LENGTH.unpack_from(content, start)
        first = start + _LENGTH.size + _CHECKSUM_BYTES
        end = first + length + _CHECKSUM_BYTES
        if end > len(content):
            return
        yield content[start:end], content[first : first + length]
        start = end
