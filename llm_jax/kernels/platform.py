"""The device that the code being traced is for."""

import contextlib
import contextvars
import os
from collections.abc import Iterator

import jax

HOPPER = ("H100", "H200", "GH200", "H800", "H20")


def target_platform() -> str:
    """ "cpu", "gpu" or "tpu": of the mesh in force, whose devices may only be described, or else the default one."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = jax.default_backend() if device is None else device.platform
    return "gpu" if platform in ("cuda", "rocm") else platform


def target_device_kind() -> str:
    """The device's name as JAX gives it, for example "NVIDIA H200" or "TPU v5 lite"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if device is None else device.device_kind


def cores_per_device() -> int:
    """How many cores of this machine's CPU, as this process may use it, a JAX device has.

    Processes that share a machine without an affinity of their own each count all of its cores.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # A CPU that is only described, on a machine with an accelerator, is one device.
    return max(1, cores // (jax.local_device_count() if jax.default_backend() == "cpu" else 1))


def hopper_refusal(platform: str) -> str | None:
    """Why kernels that are written for Hopper's tensor cores (sm_90a) can't run on `platform`; None if they can."""
    if platform != "gpu":
        return f"written for Hopper GPUs, not for {platform}"
    kind = target_device_kind() if target_platform() == "gpu" else HOPPER[0]
    return None if any(name in kind for name in HOPPER) else f"written for Hopper GPUs (sm_90a), not for {kind}"


def tpu_refusal(platform: str) -> str | None:
    """Why TPU kernels can't run on `platform`; None if they can."""
    return None if platform == "tpu" else f"written for TPUs, not for {platform}"


_interpreted = contextvars.ContextVar("interpreted", default=False)


def interpreted() -> bool:
    """Whether kernels are traced for an interpreter, which lacks a few of the operations that compilers have."""
    return _interpreted.get()


@contextlib.contextmanager
def interpreting() -> Iterator[None]:
    """Kernels traced within are for an interpreter."""
    token = _interpreted.set(True)
    try:
        yield
    finally:
        _interpreted.reset(token)
