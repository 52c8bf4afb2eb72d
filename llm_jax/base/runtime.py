"""What a command asks of the machine before JAX starts: memory that is kept, and programs that are compiled once."""

import ctypes
import hashlib
import os
import sys
from pathlib import Path

# mallopt(3)
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_CACHE = "JAX_COMPILATION_CACHE_DIR"


def prepare_runtime() -> None:
    """For every door. Has an effect before jax is imported; what the user has set stays."""
    keep_memory()
    keep_programs()


def keep_memory() -> None:
    """Freed memory stays with the process, for the next step to take.

    XLA on a CPU allocates the temporaries of every step anew. As a mapping of its own each is given back and comes as
    zeroed pages again: a hundred thousand page faults in a step of a 6.8M model, a fifth of its time. Other C libraries
    than glibc are left alone, and so is a process whose user tunes malloc.
    """
    tuned = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None or tuned:
        return
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, -1)
    # What another thread's arena keeps is of no use to this one, so there are few; with a single one, threads that
    # tokenize wait for each other (4 times as long on two cores).
    mallopt(_ARENA_MAX, os.cpu_count() or 1)


def keep_programs() -> None:
    """JAX's compile cache lies in the user's cache folder, for this kind of processor.

    `JAX_COMPILATION_CACHE_DIR=FOLDER` is another place, an empty one none.
    """
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    os.environ.setdefault(_CACHE, os.path.join(home, "llm_jax", f"programs-{_processor()}"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")


def _processor() -> str:
    """A name for what compiled programs may use here: home folders are shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return sys.platform
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return hashlib.sha256(features.encode()).hexdigest()[:8]
