"""TPU and GPU kernels on the CPU: an interpreter, and a mesh that says which device the code is for."""

import contextlib
from collections.abc import Iterator

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from llm_jax.kernels.platform import interpreting

TPU = AbstractDevice("TPU v5e", 1, "tpu")
GPU = AbstractDevice("NVIDIA H200", 132, "gpu")
SMALL_GPU = AbstractDevice("NVIDIA H200", 2, "gpu")
"""Persistent kernels go from tile to tile, and there are few blocks to interpret."""


def target(device: AbstractDevice) -> contextlib.AbstractContextManager:
    """Code traced within is for this device, which need not be there."""
    return use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


@contextlib.contextmanager
def interpreter(implementation: str, gpu: AbstractDevice = GPU) -> Iterator[None]:
    """Runs "tpu" or "gpu" kernels on the CPU: memory starts as NaN, reads out of bounds and races raise."""
    if implementation == "tpu":
        with target(TPU), pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
            yield
    elif implementation == "gpu":
        with target(gpu), interpreting(), plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
            yield
    else:
        yield


@contextlib.contextmanager
def unoptimized() -> Iterator[None]:
    """Programs are compiled in a hurry. The interpreter for GPUs compiles each kernel on threads of its own, which know
    nothing of the options for the program that calls it."""
    option = "jax_disable_most_optimizations"
    before = jax.config.read(option)
    jax.config.update(option, True)
    try:
        yield
    finally:
        jax.config.update(option, before)
