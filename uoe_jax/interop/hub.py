"""Models of the Hugging Face hub, fetched by the `huggingface_hub` package."""

from __future__ import annotations

import re
from pathlib import Path

from uoe_jax.data.progress import note, unlogged
from uoe_jax.errors import ConfigError, DataError, extra_packages, first_line

MARK = "hf:"
_WANTED = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.jinja")


def fetch(name: str) -> Path:
    """Return the local folder of `hf:ORG/NAME`, or `hf:ORG/NAME@REVISION`.

    Raises ConfigError for another form of name, MissingExtra without the package,
    DataError if the hub doesn't give it.
    """
    found = re.fullmatch(
        r"(\w[\w.-]*/\w[\w.-]*)(?:@(\w[\w./-]*))?", name.removeprefix(MARK)
    )
    if found is None:
        raise ConfigError(f"{name!r} is no model of the hub; write hf:ORG/NAME")
    with extra_packages():
        from huggingface_hub import snapshot_download
    note(f"fetching {name} ...")
    try:
        with unlogged():
            folder = snapshot_download(
                found[1], revision=found[2], allow_patterns=list(_WANTED)
            )
    except Exception as error:  # of the network, of the hub, of its cache
        raise DataError(
            f"{name} can't be fetched ({first_line(error)}); check the name and the "
            "network, or give a folder"
        ) from None
    return Path(folder)
