"""What a door sets up before JAX starts, seen from a process of its own."""

import os
import subprocess
import sys

import pytest

FAULTS = """
import resource
from llm_jax.base.runtime import keep_memory

keep_memory()
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b'x' * 2**28
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults)
"""
CACHE = """
from llm_jax.base.runtime import keep_programs

keep_programs()
import jax

print(jax.config.jax_compilation_cache_dir)
"""


def output_of(script: str, **environment: str) -> str:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "JAX_COMPILATION", "XDG_CACHE"))}
    command = [sys.executable, "-c", script]
    return subprocess.run(command, env=kept | environment, check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_freed_memory_is_taken_again_without_page_faults():
    pages = 2**28 // 4096
    assert int(output_of(FAULTS)) < pages / 100
    assert int(output_of(FAULTS, MALLOC_MMAP_MAX_="65536", MALLOC_MMAP_THRESHOLD_="131072")) > pages / 2


def test_compile_cache_is_the_users_and_can_be_moved_or_switched_off():
    assert output_of(CACHE, XDG_CACHE_HOME="/somewhere").startswith("/somewhere/llm_jax/programs-")
    assert output_of(CACHE, JAX_COMPILATION_CACHE_DIR="/elsewhere") == "/elsewhere"
    assert output_of(CACHE, JAX_COMPILATION_CACHE_DIR="") == ""
