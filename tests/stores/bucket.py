"""A store of objects for tests, which several processes share: `bucket://name/...`.

Its objects are files below $TEST_BUCKETS. It has what `gs://` has and no more: no
rename, no append, writes that appear whole, and a request that creates an object only
where there is none. $TEST_BUCKETS/.down makes every request fail, `.slow` hang.
"""

import os
import secrets
import time
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem


def root() -> Path:
    return Path(os.environ["TEST_BUCKETS"])


class BucketFileSystem(LocalFileSystem):
    protocol = "bucket"
    cachable = False

    def __init__(self, **options):
        super().__init__(auto_mkdir=True, **options)

    @classmethod
    def _strip_protocol(cls, path):
        text = os.fspath(path)
        if text.startswith("bucket://"):
            text = f"{root()}/{text.removeprefix('bucket://')}"
        return text.rstrip("/")

    def _ask(self):
        if (root() / ".down").exists():
            raise ConnectionError("no route to host")
        while (root() / ".slow").exists():
            time.sleep(0.1)

    def find(self, path, *args, **options):
        self._ask()
        if not Path(path).is_dir():  # a store has no folders: nothing is found
            return {}
        return super().find(path, *args, **options)

    def cat_file(self, path, *args, **options):
        self._ask()
        return super().cat_file(path, *args, **options)

    def get_file(self, path, local, **options):
        self._ask()
        Path(local).write_bytes(Path(path).read_bytes())

    def put_file(self, local, path, **options):
        self.pipe_file(path, Path(local).read_bytes())

    def pipe_file(self, path, value, mode="overwrite", **options):
        self._ask()
        part = root() / f".part-{secrets.token_hex(8)}"
        part.write_bytes(value)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        try:
            if mode == "create":
                os.link(part, path)  # fails where the name is taken
            else:
                os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)

    def rm_file(self, path):
        self._ask()
        os.remove(path)

    def mv(self, *args, **options):
        raise NotImplementedError("a store has no rename")

    mv_file = rename = mv

    def _open(self, path, mode="rb", **options):
        self._ask()
        if "a" in mode or "+" in mode:
            raise NotImplementedError("a store has no append")
        return super()._open(path, mode, **options)


fsspec.register_implementation("bucket", BucketFileSystem, clobber=True)
