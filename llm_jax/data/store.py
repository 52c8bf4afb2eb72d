"""Packed sets, and tokenizers trained for them, under the hash of what they are made from.

Made once, by one process at a time, and shared by all runs."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from etils import epath

from llm_jax.base.errors import UserError
from llm_jax.base.logging import log
from llm_jax.storage.atomic import write_atomically
from llm_jax.storage.hashes import canonical_hash
from llm_jax.storage.remote import is_remote

MANIFEST = "manifest.json"
POLL_SECONDS = 0.2


def obtain(
    store: str | os.PathLike[str], inputs: Mapping[str, Any], build: Callable[[epath.Path], Mapping[str, Any]]
) -> epath.Path:
    """The folder `store/HASH` of a set, built if it isn't finished.

    Who comes while another process builds it waits, and goes on with it if that process dies.

    Args:
      store: a local folder; made if absent.
      inputs: JSON values that decide every byte of the set.
      build: writes it into the folder, or goes on doing so, and returns a summary; `manifest.json`, which commits it,
        is written here.

    Raises:
      UserError: the store cannot be written to, or is not local.
    """
    if is_remote(store):
        raise UserError(f"data.cache_dir={store}: packed rows are read from a local folder")
    folder = epath.Path(store) / canonical_hash(inputs)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise UserError(f"packed rows cannot be kept in {store}: {error.strerror} (see data.cache_dir)") from None
    if not (folder / MANIFEST).exists():
        with _lock(folder):
            if not (folder / MANIFEST).exists():
                stored = {"inputs": inputs, "summary": build(folder)}
                write_atomically(folder / MANIFEST, json.dumps(stored, indent=1) + "\n")
    return folder


def summary_of(folder: epath.Path) -> dict[str, Any]:
    """What `build` returned."""
    return json.loads((folder / MANIFEST).read_text())["summary"]


@contextlib.contextmanager
def _lock(folder: epath.Path) -> Iterator[None]:
    """Holds a set for this process. The system lets go of it when the process ends, however it does."""
    with open(folder / "lock", "a+") as file:
        told = ""
        while not _try(file):
            file.seek(0)
            holder = file.read().strip()
            if holder != told:
                log(f"waiting for {holder or 'another process'}, which makes {folder}")
                told = holder
            time.sleep(POLL_SECONDS)
        if told:
            finished = (folder / MANIFEST).exists()
            log(f"{folder} is {'made' if finished else 'left unfinished by ' + told + '; going on with it'}")
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _try(file: Any) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
