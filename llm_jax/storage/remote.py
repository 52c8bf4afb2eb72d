"""Folders on object stores (`gs://bucket/run`), which have no rename, no append, no folders and no file locks.

What they do have: an object is there whole or not at all, is replaced whole, and every finished write is seen by the
next read and list (Google's, Amazon's and Azure's stores all promise that). So whatever has to be complete is marked by
an object written last; files that grow are rewritten (`growing`); the lock is a folder of claims (`claims`); and what
a library must have as local files is made in a local folder and copied whole, by the functions here.
"""

import fcntl
import functools
import hashlib
import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from llm_jax.base.errors import UserError

# With TensorFlow installed, etils would import all of it to reach a bucket, and its errors are no OSErrors. Etils asks
# once, at the first path of any kind.
os.environ.setdefault("EPATH_USE_TF", "false")

PIECE = 1 << 23
# What etils and a file system library can reach, and the package that brings the latter.
PACKAGES = {"gs": ("gcsfs", "gcs")}


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path names a place on an object store."""
    return "://" in os.fspath(path)


def to_path(text: str | os.PathLike[str], said: str = "") -> epath.Path:
    """The path that a person wrote, local or remote.

    Args:
      text: the path.
      said: what the message starts with, `data.path=...` say; the path itself by default.

    Raises:
      UserError: its scheme is not known, or needs an extra that is not installed; it holds a null character.
    """
    path = os.fspath(text)
    said = said or path
    if "\0" in path:
        raise UserError(f"{said!r}: a path can't hold a null character")
    if not is_remote(path):
        return epath.Path(path)
    scheme = path.split("://", 1)[0]
    package, extra = PACKAGES.get(scheme, ("", ""))
    if package and importlib.util.find_spec(package) is None:
        raise UserError(f"{said}: {scheme}:// needs {package}: pip install 'llm_jax[{extra}]'")
    if package:
        _prepare(scheme, package.removesuffix("fs"))
    try:
        return epath.Path(path)
    except KeyError:
        known = ", ".join(f"{name}://" for name in PACKAGES)
        raise UserError(f"{said}: paths that begin with {scheme}:// are not known; {known} is") from None


@functools.cache
def _prepare(*protocols: str) -> None:
    """Before the first path of a scheme is made: how fsspec reaches it."""
    from fsspec.config import conf

    # What other processes have written since must be seen, the lock's claims above all.
    for protocol in protocols:
        conf.setdefault(protocol, {})["use_listings_cache"] = False


def local_copy(folder: epath.PathLike, version: str) -> epath.Path:
    """Where files of a folder are at hand: the folder itself, or for a remote one a place in the local cache.

    Args:
      folder: local or remote.
      version: tells apart what the remote folder may hold at different times; the run's hash, say.

    The cache is `$LLM_JAX_CACHE`, else `$XDG_CACHE_HOME/llm_jax` or `~/.cache/llm_jax`.
    """
    folder = epath.Path(folder)
    if not is_remote(folder):
        return folder
    name = hashlib.sha256(f"{folder}\0{version}".encode()).hexdigest()[:16]
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llm_jax"
    return epath.Path(os.environ.get("LLM_JAX_CACHE") or base) / f"{folder.name}-{name}"


def in_step(folder: epath.PathLike, copy: epath.PathLike, marker: str) -> bool:
    """Whether a remote folder and its local copy are finished and the same: both have the same `marker`."""
    files = [epath.Path(place) / marker for place in (folder, copy)]
    return all(file.exists() for file in files) and files[0].read_bytes() == files[1].read_bytes()


def fetch(folder: epath.PathLike, copy: epath.PathLike, marker: str) -> None:
    """Brings a remote folder's files into its local copy, `marker` last; nothing where the copy has that very marker.

    Does nothing for a folder that is its own copy, or that is not finished: has no `marker`. Processes of one machine
    take turns.
    """
    folder, copy = epath.Path(folder), epath.Path(copy)
    if folder == copy or not (folder / marker).exists():
        return
    copy.parent.mkdir(parents=True, exist_ok=True)
    with open(copy.with_name(f"{copy.name}.lock"), "w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        if in_step(folder, copy, marker):
            return
        if copy.exists():
            copy.rmtree()
        for name, file in sorted(files_below(folder), key=lambda entry: (entry[0] == marker, entry[0])):
            copy_file(file, copy / name)


def publish(copy: epath.PathLike, folder: epath.PathLike, marker: str) -> None:
    """Stores a local copy's files in its remote folder, `marker` last. Does nothing for a folder that is its own."""
    copy, folder = epath.Path(copy), epath.Path(folder)
    if folder == copy or in_step(folder, copy, marker):
        return
    for name, file in sorted(files_below(copy), key=lambda entry: (entry[0] == marker, entry[0])):
        copy_file(file, folder / name)


def copy_file(source: epath.Path, target: epath.Path) -> None:
    """Copies a file's bytes from or to a remote folder, piece by piece."""
    if not is_remote(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as read, target.open("wb") as write:
        shutil.copyfileobj(read, write, PIECE)


def files_below(folder: epath.Path, prefix: str = "") -> Iterator[tuple[str, epath.Path]]:
    """Every file below a folder, by its name relative to it; none where there is no folder."""
    if not folder.exists():
        return
    for child in folder.iterdir():
        if child.is_dir():
            yield from files_below(child, f"{prefix}{child.name}/")
        else:
            yield prefix + child.name, child
