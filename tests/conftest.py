"""Every test runs on eight virtual CPU devices, in float32, with a compilation cache in the checkout."""

import gc
import os
import pathlib
from collections.abc import Iterator

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
CACHE = pathlib.Path(__file__).parents[1] / ".cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

MOST_MAPS = 25_000


@pytest.fixture(scope="module", autouse=True)
def few_programs() -> Iterator[None]:
    """Each compiled program is mapped into memory, and Linux lets a process have 65,530 maps (vm.max_map_count)."""
    yield
    forget_programs()


def forget_programs() -> None:
    """Frees what has been compiled, where it is much; whoever still needs it compiles again, from the cache."""
    with pathlib.Path("/proc/self/maps").open("rb") as maps:
        many = sum(1 for _ in maps) > MOST_MAPS
    if many:
        import jax

        jax.clear_caches()
        gc.collect()
