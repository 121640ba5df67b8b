"""The objects below one address of a store, through fsspec's packages.

Not through `etils.epath`, which Orbax uses: it knows four schemes, by the same
packages, and has no "create if absent", which a lock needs.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from uoe_jax.errors import ConfigError, MissingExtra, first_line, nearest
from uoe_jax.stores.changes import CHANGES

ANSWER_SECONDS = 15.0  # for a store's first answer, or one about small objects
_SLOWEST = 100_000.0  # bytes a second that a transfer may take at worst
_AT_ONCE = 8  # transfers
_WHOLE_BYTES = 64 << 20  # of a file that is read before it is sent
# Letters before the colon; one is a drive of Windows. `Path` makes one slash of two.
# and of `gs://` none.
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(?:/+(.*))?", re.DOTALL)
# What to install for a scheme.
_INSTALL = {
    "gs": "'uoe_jax[gs]'",
    "gcs": "'uoe_jax[gs]'",
    "s3": "'uoe_jax[s3]'",
    "az": "adlfs",
    "abfs": "adlfs",
}


_LIBRARIES = ("gcsfs", "s3fs", "aiobotocore", "botocore", "adlfs", "fsspec")


class StoreError(ConfigError):
    """A store that can't be reached, or refuses what is asked of it."""


class _LastWords(logging.Handler):
    """Keeps the last warning of the stores' libraries, which else go to a terminal."""

    text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text = " ".join(record.getMessage().split())[:200]


_LAST_WORDS = _LastWords(logging.WARNING)


def address_of(path: Any) -> str | None:
    """Return what a text or a path names in a store, as `gs://bucket/run`.

    None for what is local, and for `file://`, which is given as a path. Raises
    StoreError for a text such as `gs:///run`, of an unset variable: `run` would be
    taken for the bucket.
    """
    try:
        text = os.fspath(path)
        found = _ADDRESS.fullmatch(text)
    except TypeError:
        return None
    if found is None or found[1].lower() == "file":
        return None
    scheme, rest = f"{found[1].lower()}://", found[2] or ""
    if rest and text.startswith(":///", len(found[1])):
        raise StoreError(
            f"{text} names no bucket between // and /; give {scheme}BUCKET/FOLDER"
        )
    return scheme + rest.rstrip("/")


class Objects:
    """What lies below an address, by names such as `checkpoints/8/integrity.json`.

    Every method raises StoreError in one line: a package that isn't there, no network,
    no credentials, no such bucket, and an answer that takes too long. Nothing is asked
    of the store before the first of them.
    """

    def __init__(self, address: str):
        self.address = address
        self._scheme, _, rest = address.partition("://")
        if self._scheme == "hf":
            raise StoreError(
                f"{address}: the Hugging Face Hub makes a commit of every write, and a "
                "run writes every few seconds; give gs://, s3:// or a local folder, "
                "and publish what comes out with uoe export"
            )
        if not rest.strip("/"):
            raise StoreError(f"{address} names no folder; give {address}BUCKET/FOLDER")
        if {".", ".."} & set(rest.split("/")):
            raise StoreError(f"{address}: a store has no . or .. ; give the whole path")
        self._opened: tuple[Any, str] | None = None

    def list(self) -> dict[str, int]:
        """Return the bytes of each object by name; {} where nothing is.

        An object whose name leads out of the folder is refused: it would be written
        there. Raises StoreError too while a change that was given up may still come.
        """
        if late := CHANGES.late(f"{self.address}/", ANSWER_SECONDS):
            raise _unsettled(late)

        def find() -> dict[str, int]:
            system, root = self._open()
            system.invalidate_cache()
            found = system.find(root, detail=True)
            start = len(root.rstrip("/")) + 1
            return {
                name[start:]: int(about.get("size") or 0)
                for name, about in found.items()
                if about.get("type", "file") == "file"
                and len(name) > start
                and not name.endswith("/")  # a console's mark of a folder
            }

        try:
            found = self._within(find)
        except FileNotFoundError:
            return {}
        for name in found:
            if {"", ".", ".."} & set(name.split("/")):
                raise StoreError(
                    f"{self.address} holds an object {name!r}, which names no file "
                    "below it; delete it, or give another address"
                )
        return found

    def read(self, name: str) -> bytes | None:
        """Return what a small object holds; None where there is none."""
        try:
            return self._within(lambda: self._call("cat_file", name))
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes) -> None:
        """Write an object; whoever reads sees the old or the new one.

        One that is given up may come later, but never over a later write of this
        process, nor after a removal: those wait for it, or raise StoreError.
        """
        make = lambda: self._call("pipe_file", name, content)
        self._change(name, make, len(content))

    def create(self, name: str, content: bytes) -> bool:
        """Write an object that isn't there yet; whether it was so."""
        make = lambda: self._call("pipe_file", name, content, mode="create")
        try:
            self._change(name, make)
        except FileExistsError:
            pass  # perhaps this one: an answer was lost, and its library tried again
        # Stores without such a request overwrite: then the last one has it.
        return self.read(name) == content

    def download(self, sizes: Mapping[str, int], folder: Path) -> None:
        """Write objects, by their bytes, as files below a folder, each whole or not."""

        def get(name: str) -> None:
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            # Of this try alone: one that was given up goes on writing its own.
            part = file.with_name(f".{file.name}.{secrets.randbits(60)}")
            left = threading.Event()

            def bring() -> None:
                self._call("get_file", name, local=part)
                if left.is_set():
                    part.unlink(missing_ok=True)

            try:
                self._within(bring, sizes[name])
                part.replace(file)
            finally:
                left.set()
                part.unlink(missing_ok=True)

        self._each(get, sizes)

    def upload(self, names: Iterable[str], folder: Path) -> None:
        """Write files of a folder as objects."""

        def put(name: str) -> None:
            file = folder / name
            size = file.stat().st_size
            if size < _WHOLE_BYTES:  # as it is now: it may grow meanwhile
                self.write(name, file.read_bytes())
            else:
                send = lambda: self._call("put_file", name, local=file)
                self._change(name, send, size)

        self._each(put, names)

    def remove(self, names: Iterable[str]) -> None:
        """Delete objects; one that isn't there is no error."""

        def delete(name: str) -> None:
            try:
                self._change(name, lambda: self._call("rm_file", name))
            except FileNotFoundError:
                return

        self._each(delete, names)

    def is_late(self, below: str) -> bool:
        """Whether a change that was given up may still come to a name so begun."""
        return CHANGES.late(f"{self.address}/{below}") is not None

    def _each(self, act: Callable[[str], None], names: Iterable[str]) -> None:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(act, names))

    def _call(
        self, method: str, name: str, *rest: Any, local: Path | None = None, **more: Any
    ) -> Any:
        system, root = self._open()
        place = f"{root.rstrip('/')}/{name}"
        args = [place, *rest]
        if local is not None:
            args = [str(local), place] if method == "put_file" else [place, str(local)]
        return getattr(system, method)(*args, **more)

    def _open(self) -> tuple[Any, str]:
        if self._opened is None:
            import fsspec

            for library in _LIBRARIES:
                logger = logging.getLogger(library)
                if _LAST_WORDS not in logger.handlers:
                    logger.addHandler(_LAST_WORDS)
                    logger.propagate = False  # else each request has its warning
            # Of listings the newest counts: others write there too.
            self._opened = fsspec.core.url_to_fs(self.address, use_listings_cache=False)
        return self._opened

    def _change(self, name: str, call: Callable[[], Any], size: int = 0) -> None:
        """Make a call that changes an object, after all earlier ones of it."""
        place = f"{self.address}/{name}"
        if not CHANGES.begin(place, ANSWER_SECONDS):
            raise _unsettled(place)
        self._within(call, size, place)

    def _within[Found](
        self, call: Callable[[], Found], size: int = 0, changes: str | None = None
    ) -> Found:
        """Return what a call does; raise StoreError after too long a wait.

        Libraries of stores try again for minutes where there is no network. The call
        runs in a thread that nobody waits for when the process ends.
        """
        seconds = ANSWER_SECONDS + size / _SLOWEST
        result: list[Any] = []

        def run() -> None:
            try:
                result.append((call(), None))
            except BaseException as error:
                result.append((None, error))
            finally:
                if changes is not None:
                    CHANGES.end(changes)

        thread = threading.Thread(target=run, name="store", daemon=True)
        _LAST_WORDS.text = ""
        try:
            thread.start()
        except RuntimeError as error:  # no room for one more
            if changes is not None:
                CHANGES.end(changes)
            raise self._refusal(error) from None
        thread.join(seconds)
        if not result:
            if changes is not None:
                CHANGES.give_up(changes)
            said = f" ({_LAST_WORDS.text})" if _LAST_WORDS.text else ""
            raise StoreError(
                f"{self.address} gave no answer in {seconds:.0f} s{said}; look at the "
                "network and the credentials, or give a local folder"
            )
        value, error = result[0]
        if error is None:
            return value
        if isinstance(error, (FileNotFoundError, FileExistsError)):
            raise error
        raise self._refusal(error) from None

    def _refusal(self, error: BaseException) -> ConfigError:
        """Return what a library's error means here, as one line."""
        if isinstance(error, ConfigError):
            return error
        if isinstance(error, ImportError):
            install = _INSTALL.get(self._scheme)
            said = first_line(error)
            fix = f"pip install {install}" if install else said
            packages = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs"}
            package = packages.get(self._scheme, install or "a package")
            return MissingExtra(
                f"{self.address} needs {package}, which isn't installed; {fix}, or "
                "give a local folder"
            )
        if isinstance(error, ValueError) and "rotocol not known" in str(error):
            known = ("gs", "s3", "az", "abfs", "sftp", "memory")
            return StoreError(
                f"{self.address}: no store is known as {self._scheme}://; "
                f"{nearest(self._scheme, known)}"
            )
        text = " ".join(str(error).split())[:200] or type(error).__name__
        return StoreError(
            f"{self.address} can't be used ({type(error).__name__}: {text}); look at "
            "the network and the credentials, or give a local folder"
        )


def _unsettled(place: str) -> StoreError:
    return StoreError(
        f"{place}: an earlier request that got no answer may still arrive, so nothing "
        "newer is sent; look at the network, or give a local folder"
    )
