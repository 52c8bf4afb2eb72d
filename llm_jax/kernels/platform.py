"""The platform that the code being traced is for."""

import jax


def target_platform() -> str:
    """ "cpu", "gpu" or "tpu": of the mesh in force, whose devices may only be described, or else the default one."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    platform = jax.default_backend() if device is None else device.platform
    return "gpu" if platform in ("cuda", "rocm") else platform
