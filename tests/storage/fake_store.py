"""An object store for tests: `fake://bucket/key` is an object, kept in a local folder so that processes share it.

No rename, no append, no folders (a folder is a common beginning of keys; mkdir does nothing). An object is there whole
or not at all, and is replaced whole; as with fsspec's files, leaving a `with` by an exception still stores what was
written so far. `STORE` counts what is called and fails where it is told to.
"""

import contextlib
import errno
import fnmatch
import io
import os
import pathlib
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

from etils import epath
from etils.epath import backend, gpath, stat_utils

SCHEME = "fake://"


class Fault:
    """Writes to keys that match `pattern` fail, from the `first`-th on."""

    def __init__(self, pattern: str, code: int, first: int = 1) -> None:
        self.pattern, self.code, self.first, self.seen = pattern, code, first, 0

    def strike(self, path: str) -> None:
        if fnmatch.fnmatch(path, self.pattern):
            self.seen += 1
            if self.seen >= self.first:
                raise OSError(self.code, os.strerror(self.code), path)


class FakeStore(backend.Backend):
    def __init__(self) -> None:
        self.root = pathlib.Path(os.environ.get("FAKE_STORE", tempfile.gettempdir() + "/fake_store"))
        self.calls: Counter[str] = Counter()
        self.writes: list[str] = []
        self.faults: list[Fault] = []
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def failing(self, pattern: str, code: int = errno.ENOSPC, first: int = 1) -> Iterator[Fault]:
        fault = Fault(pattern, code, first)
        self.faults.append(fault)
        try:
            yield fault
        finally:
            self.faults.remove(fault)

    # ---- the store itself

    def _file(self, path: Any) -> pathlib.Path:
        """Keys lie flat: `/` is written as `%2F`, so that a kill can't leave half of a tree of folders."""
        bucket, _, key = os.fspath(path).removeprefix(SCHEME).strip("/").partition("/")
        return self.root / bucket / key.replace("%", "%25").replace("/", "%2F")

    def _keys(self, path: Any) -> list[str]:
        """The keys below a folder, relative to it."""
        bucket, _, key = os.fspath(path).removeprefix(SCHEME).strip("/").partition("/")
        folder = self.root / bucket
        names = [n for n in os.listdir(folder) if not n.startswith(".")] if folder.is_dir() else []
        keys = [name.replace("%2F", "/").replace("%25", "%") for name in names]
        start = f"{key}/" if key else ""
        return sorted(k.removeprefix(start) for k in keys if k.startswith(start))

    def put(self, path: Any, data: bytes) -> None:
        with self._lock:
            self.calls["put"] += 1
            self.writes.append(os.fspath(path))
            for fault in self.faults:
                fault.strike(os.fspath(path))
        file = self._file(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(prefix=".", dir=file.parent)
        with os.fdopen(handle, "wb") as f:
            f.write(data)
        os.replace(part, file)

    def open(self, path: Any, mode: str) -> Any:
        if mode in ("r", "rb"):
            self.calls["get"] += 1
            try:
                data = self._file(path).read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                raise FileNotFoundError(errno.ENOENT, "no such object", os.fspath(path)) from None
            return io.BytesIO(data) if "b" in mode else io.StringIO(data.decode())
        if mode not in ("w", "wb"):
            raise io.UnsupportedOperation(f"an object store can't open {path} with {mode!r}")
        return _Writer(self, os.fspath(path)) if "b" in mode else io.TextIOWrapper(_Writer(self, os.fspath(path)))

    def exists(self, path: Any) -> bool:
        self.calls["exists"] += 1
        return self._file(path).is_file() or bool(self._keys(path))

    def isdir(self, path: Any) -> bool:
        self.calls["exists"] += 1
        return bool(self._keys(path))

    def listdir(self, path: Any) -> list[str]:
        self.calls["list"] += 1
        keys = self._keys(path)
        if not keys:
            raise FileNotFoundError(errno.ENOENT, "no such folder", os.fspath(path))
        return sorted({key.partition("/")[0] for key in keys})

    def glob(self, path: Any) -> list[str]:
        self.calls["list"] += 1
        bucket, _, pattern = os.fspath(path).removeprefix(SCHEME).partition("/")
        keys = self._keys(f"{SCHEME}{bucket}")
        level = pattern.count("/") + 1
        found = {"/".join(k.split("/")[:level]) for k in keys if k.count("/") + 1 >= level}
        parts = pattern.split("/")
        return [
            f"{SCHEME}{bucket}/{key}"
            for key in sorted(found)
            if all(fnmatch.fnmatchcase(*pair) for pair in zip(key.split("/"), parts))
        ]

    def walk(self, top: Any, *, top_down: bool = True, on_error: Any = None) -> Iterator[Any]:
        raise io.UnsupportedOperation("walk")

    def makedirs(self, path: Any, *, exist_ok: bool = False, mode: int | None = None) -> None:
        self.calls["mkdir"] += 1

    mkdir = makedirs

    def remove(self, path: Any) -> None:
        self.calls["delete"] += 1
        try:
            self._file(path).unlink()
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError(errno.ENOENT, "no such object", os.fspath(path)) from None

    def rmtree(self, path: Any) -> None:
        keys = self._keys(path)
        if not keys:
            raise FileNotFoundError(errno.ENOENT, "no such folder", os.fspath(path))
        for key in keys:
            with contextlib.suppress(FileNotFoundError):
                self.remove(f"{os.fspath(path)}/{key}")

    def rename(self, path: Any, dst: Any) -> None:
        raise io.UnsupportedOperation(f"an object store can't rename {path}")

    replace = rename

    def copy(self, path: Any, dst: Any, overwrite: bool) -> None:
        raise io.UnsupportedOperation(f"copy {path}")

    def stat(self, path: Any) -> stat_utils.StatResult:
        self.calls["stat"] += 1
        file = self._file(path)
        if file.is_file():
            status = file.stat()
            return stat_utils.StatResult(False, status.st_size, int(status.st_mtime), None, None, None)
        if self._keys(path):
            return stat_utils.StatResult(True, 0, 0, None, None, None)
        raise FileNotFoundError(errno.ENOENT, "no such object", os.fspath(path))

    def clear(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)
        self.calls.clear()
        self.writes.clear()


class _Writer(io.BytesIO):
    """Stores the object when it is closed."""

    def __init__(self, store: FakeStore, path: str) -> None:
        super().__init__()
        self._store, self._path = store, path

    def close(self) -> None:
        if not self.closed:
            data = self.getvalue()
            super().close()
            self._store.put(self._path, data)


STORE = FakeStore()


@epath.register_path_cls(SCHEME)
class FakePath(gpath.PosixGPath):
    def __init__(self, *parts: Any) -> None:
        whole = "/".join(os.fspath(part) for part in parts)
        if SCHEME in whole:
            whole = "/fake/" + whole.rsplit(SCHEME, 1)[1]
        super().__init__(whole)

    @property
    def _uri_scheme(self) -> str | None:
        return "fake" if self.parts[:2] == ("/", "fake") else super()._uri_scheme

    @property
    def _backend(self) -> backend.Backend:
        return STORE if self._uri_scheme == "fake" else super()._backend
