"""Hashes of configurations and of files."""

import hashlib
import json
import os
from typing import Any

from etils import epath

PIECE = 1 << 20
# Reading 16 GB to name a run would be too slow: of longer files this many pieces, spread evenly, stand for the whole.
WHOLE_UP_TO = 1 << 28
PIECES = 128


def canonical_hash(obj: Any) -> str:
    """12 hexadecimal digits of the SHA-256 of `obj` as JSON with sorted keys. Raises ValueError for NaN."""
    text = json.dumps(obj, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with epath.Path(path).open("rb") as f:
        while piece := f.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()


def file_fingerprint(path: str | os.PathLike[str]) -> str:
    """`file_sha256` of a file up to 256 MiB; beyond, of its size and of 128 pieces of 1 MiB."""
    path = epath.Path(path)
    size = path.stat().length
    if size <= WHOLE_UP_TO:
        return file_sha256(path)
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as f:
        for i in range(PIECES):
            f.seek((size - PIECE) * i // (PIECES - 1))
            digest.update(f.read(PIECE))
    return digest.hexdigest()
