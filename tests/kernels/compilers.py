"""The real TPU and GPU compilers, for one device that is not there: which kernels a program holds, and what they take.

`tpu_compile` needs the extra `aot` (tests marked `aot`), `gpu_compile` the extra `aot-gpu` (tests marked `aot_gpu`).
"""

import contextlib
import importlib.util
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import pytest

from llm_jax.sharding.described import compile_for, custom_calls
from tests.kernels import sass

TPUS = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
REGISTERS, SHARED_MEMORY, THREADS = 65536, 233472, 2048
"""Of a Hopper multiprocessor, the memory in bytes."""
RESERVED = 1024
"""Bytes of shared memory that CUDA takes for each block."""


@dataclass(frozen=True)
class Resources:
    """What one GPU kernel takes: registers per thread, bytes per thread (spills, stack) and per block (smem)."""

    kernel: str
    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    smem: int
    threads: int
    """Of a block."""
    product_depth: int
    """Loops around the innermost wgmma; -1 where there is none."""
    spill_depth: int
    """Loops around the innermost access to a spilled register; -1 where there is none."""
    warnings: tuple[str, ...]
    """Lines in which ptxas tells of a loss of performance, without their prefix."""

    @property
    def occupancy(self) -> float:
        """Threads on a multiprocessor at a time, as a share of the most it can hold."""
        warps = self.threads // 32
        by_registers = REGISTERS // (warps * -(-self.registers * 32 // 256) * 256)
        by_memory = SHARED_MEMORY // (self.smem + RESERVED)
        return min(by_registers, by_memory, THREADS // self.threads) * self.threads / THREADS

    def __str__(self) -> str:
        spills = f"{self.spill_stores}/{self.spill_loads}"
        if self.spill_depth >= 0:
            spills += f" in {self.spill_depth} loops, products in {self.product_depth}"
        return (
            f"| {self.kernel} | {self.registers} | {spills} | {self.smem} | {self.threads} | {self.occupancy:.0%} "
            f"| {'; '.join(self.warnings)} |"
        )


COLUMNS = ("kernel", "registers", "spill stores/loads B", "smem B", "threads", "occupancy", "warnings")
TABLE = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"
"""Header of a table whose rows are `str(resources)`."""


@dataclass(frozen=True)
class Program:
    """A compiled program."""

    compiled: jax.stages.Compiled
    kernels: tuple[str, ...]
    """Names of Pallas kernels (`name=`) and targets of other custom calls, as the HLO has them, repeats included."""
    resources: tuple[Resources, ...] = ()
    """Of the different GPU kernels."""


def tpu_compile(f: Callable[..., Any], *shapes: Any, topology: str = "v5e:2x2", donated: Sequence[int] = ()) -> Program:
    """`f` compiled by libtpu for the first device of `topology`. `shapes`: pytrees of ShapeDtypeStructs, of which those
    at the places `donated` give their memory to the results."""
    with _environment(TPU_SKIP_MDS_QUERY="1"):
        compiled = compile_for(topology, f, *shapes, donated=donated)
    return Program(compiled, tuple(name for name, _ in custom_calls(compiled.as_text() or "")))


def gpu_compile(f: Callable[..., Any], *shapes: Any) -> Program:
    """`f` compiled for one H200: XLA, and ptxas for sm_90a. `shapes`: pytrees of ShapeDtypeStructs."""
    path = f"{_disassembler()}{os.pathsep}{os.environ['PATH']}"
    with tempfile.TemporaryDirectory() as folder:
        asked = {f"MOSAIC_GPU_DUMP_{what}": "1" for what in ("PTX", "PTXAS", "SASS", "RESOURCES")}
        with _environment(CUDA_VISIBLE_DEVICES="-1", MOSAIC_GPU_DUMP_TO=folder, PATH=path, **asked):
            compiled = compile_for("h200:1x1x1", f, *shapes)
        calls = custom_calls(compiled.as_text() or "")
        return Program(compiled, tuple(name for name, _ in calls), _resources(calls, Path(folder)))


def on_every_tpu(cases: Mapping[str, Any], sample: Mapping[str, str]) -> pytest.MarkDecorator:
    """Parametrizes a test's `case` and `topology`: each case, given by its id, for each generation.

    Marked `aot`, and where `sample` has the case with this topology, `sample`.
    """
    assert sample.keys() <= cases.keys() and set(sample.values()) <= set(TPUS)
    params = []
    for topology in TPUS:
        for name, case in cases.items():
            marks = [pytest.mark.aot, *([pytest.mark.sample] if sample.get(name) == topology else [])]
            params.append(pytest.param(case, topology, id=f"{name}-{topology}", marks=marks))
    return pytest.mark.parametrize("case, topology", params)


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _disassembler() -> str:
    """Where the extra's nvdisasm lies."""
    package = importlib.util.find_spec("nvidia.cu13")
    folders = [] if package is None else [Path(place, "bin") for place in package.submodule_search_locations or ()]
    return str(next(folder for folder in folders if (folder / "nvdisasm").exists()))


_known: dict[str, Resources] = {}
"""By a kernel's hash: one that was compiled before is not compiled again, and nothing is dumped."""


def _resources(calls: list[tuple[str, str]], folder: Path) -> tuple[Resources, ...]:
    """Of each different kernel. Of several new ones with one name it is not known which is which."""
    kernels = dict.fromkeys((name, digest) for name, digest in calls if digest)
    for name, digest in kernels:
        if digest not in _known:
            # Kernels are numbered as they are lowered in one sort of file, as they are compiled in the other.
            ptxas, taken = (next(folder.glob(f"{name}_[0-9]*{suffix}")) for suffix in (".ptxas", ".resources.txt"))
            _known[digest] = _parse(name, ptxas, taken.read_text())
            ptxas.unlink()
            taken.unlink()
    return tuple(_known[digest] for _, digest in kernels)


def _parse(name: str, path: Path, taken: str) -> Resources:
    ptxas, code = path.read_text(), path.with_suffix(".sass_ctrl").read_text()

    def number(pattern: str, text: str = ptxas) -> int:
        found = re.search(pattern, text)
        assert found is not None, f"{path}: no {pattern!r} in\n{text}"
        return int(found[1])

    barriers = sum(
        int(barriers) * int(count) for barriers, count in re.findall(r"num_barriers=(\d+)[^)]*\): (\d+)", taken)
    )
    return Resources(
        kernel=name,
        registers=number(r"Used (\d+) registers"),
        spill_stores=number(r"(\d+) bytes spill stores"),
        spill_loads=number(r"(\d+) bytes spill loads"),
        stack=number(r"(\d+) bytes stack frame"),
        smem=number(r"smem_scratch_bytes=(\d+)", taken) + 8 * barriers,
        threads=number(r"\.maxntid (\d+)", path.with_suffix(".ptx").read_text()),
        product_depth=sass.depth(code, "HGMMA"),
        spill_depth=sass.depth(code, "LDL", "STL"),
        warnings=tuple(sorted(set(re.findall(r"\(C\d+\) [^\n]*|[^\n]*[Ww]arning[^\n]*", ptxas)))),
    )


Calls = Mapping[str, tuple[Callable[..., Any], tuple[Any, ...]]]
"""By the name of the one kernel of ours that each compiles to: a function, and the structs of its arrays."""


def assert_one_kernel_each(calls: Calls, topology: str) -> None:
    """In what the TPU compiler makes of them."""
    for name, (f, structs) in calls.items():
        found = tpu_compile(f, *structs, topology=topology).kernels
        assert [kernel for kernel in found if kernel.startswith("llm_jax")] == [name]


def assert_products_run_freely(calls: Calls) -> None:
    """On Hopper no spills, and no product that waits for the one before: ptxas says so in other warnings than C7504,
    which tells that the registers are shared evenly between the warpgroups."""
    for name, (f, structs) in calls.items():
        program = gpu_compile(f, *structs)
        print(TABLE, *program.resources, sep="\n")
        (taken,) = program.resources
        assert program.kernels == (name,) and taken.spill_stores == taken.spill_loads == 0
        assert all(warning.startswith("(C7504)") for warning in taken.warnings)
