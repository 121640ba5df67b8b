"""The CIFAR-10 copy of UOE_DATA_DIR as an .npz that `data.source npz` reads."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np


def undo_deltas(rows: np.ndarray) -> np.ndarray:
    """Return images uint8 [N, Hi, Wi, 3] of deltas uint8 [N, 3, Hi, Wi].

    Every plane holds differences along both image axes, modulo 256; the planes are
    green, red minus green and blue minus green, in the order red, green, blue of what
    comes out: planes 0 + 1, 0 and 0 + 2.
    """
    planes = np.cumsum(np.cumsum(rows, 2, dtype=np.uint8), 3, dtype=np.uint8)
    green = planes[:, 0]
    return np.stack([green + planes[:, 1], green, green + planes[:, 2]], axis=-1)


def plain_copy(source: str) -> str:
    """Write the images without their coding beside the system's other temporary files.

    Returns the path; a copy that is there is used again.
    """
    out = Path(tempfile.gettempdir()) / f"plain-{Path(source).name}"
    if not out.is_file():
        with np.load(source, allow_pickle=False) as coded:
            arrays = {
                "xtr": undo_deltas(coded["xtr"]),
                "ytr": coded["ytr"],
                "xte": undo_deltas(coded["xte"]),
                "yte": coded["yte"],
            }
        # Written aside: another process may read or write the same file.
        aside = out.with_name(f"{os.getpid()}-{out.name}")
        np.savez(aside, **arrays)
        aside.rename(out)
    return str(out)
