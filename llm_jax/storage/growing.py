"""A file that grows at its end, on any store."""

import time

from etils import epath

from llm_jax.storage.atomic import write_atomically
from llm_jax.storage.remote import is_remote

SECONDS = 30.0
"""An object that grows is rewritten no oftener than this, `flush` aside."""


class GrowingFile:
    """Local: every piece is appended at once. Remote: the whole object is rewritten, at most twice a minute and at
    every `flush`, so that what it costs is bounded by time and not by the number of pieces.

    What a killed run loses of a remote file is what came after the last `flush`: flush before writing a mark of what
    the file holds.

    Args:
        path: in a folder that exists.
        content: replaces what is there; None keeps it.
    """

    def __init__(self, path: epath.PathLike, content: bytes | None = None) -> None:
        self.path = epath.Path(path)
        self._pieces: list[bytes] | None = None
        self._behind, self._written = False, time.monotonic()
        if content is not None:
            write_atomically(self.path, content)
        if is_remote(self.path):
            there = content if content is not None else self.path.read_bytes() if self.path.exists() else b""
            self._pieces = [there]

    def append(self, data: bytes) -> None:
        if self._pieces is None:
            with self.path.open("ab") as file:
                file.write(data)
            return
        self._pieces.append(data)
        self._behind = True
        if time.monotonic() - self._written >= SECONDS:
            self.flush()

    def flush(self) -> None:
        """Returns when everything appended is stored."""
        if self._pieces is not None and self._behind:
            self._pieces = [b"".join(self._pieces)]
            write_atomically(self.path, self._pieces[0])
            self._behind, self._written = False, time.monotonic()
