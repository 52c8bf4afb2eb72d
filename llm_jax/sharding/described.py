"""Compiles for a TPU or GPU that is not there: the real compiler, for devices that are only described.

TPUs need libtpu (the extra `aot`), GPUs the CUDA plugin (the extra `aot-gpu`).
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, use_abstract_mesh

H200 = """
gpu_device_info {
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_core: 233472  shared_memory_per_block_optin: 232448
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98  l2_cache_size: 62914560
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  memory_bandwidth: 4800000000000  device_memory_size: 150754820096
  cuda_compute_capability { major: 9  feature_extension: ACCELERATED_FEATURES }
}
platform_name: "CUDA"
dnn_version_info { major: 9  minor: 28 }
runtime_version { major: 13  minor: 0 }
device_description_str: "NVIDIA H200"
"""


def devices_of(topology: str) -> list[Any]:
    """Devices to compile for. `topology` is "v5p:2x2x1" and the like; of GPUs "h200:SLICESxHOSTSxGPUS_PER_HOST"."""
    kind, _, shape = topology.partition(":")
    if kind == "h200":
        described = topologies.get_topology_desc(platform="cuda", target_config=H200, topology=shape)
    else:
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    return list(described.devices)


def compile_for(topology: str, f: Callable[..., Any], *shapes: Any, donated: Sequence[int] = ()) -> jax.stages.Compiled:
    """`f`, compiled for the first device of the topology. Ops within choose the kernels of that device.

    Args:
        shapes: pytrees of arrays or ShapeDtypeStructs, of which shape and dtype count.
        donated: places of those whose memory the results may take.
    """
    mesh = Mesh(devices_of(topology)[:1], ("device",))
    here = NamedSharding(mesh, PartitionSpec())
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes)
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=mesh.abstract_mesh.abstract_device)):
        return jax.jit(f, keep_unused=True, donate_argnums=tuple(donated)).lower(*placed).compile()


def custom_calls(text: str) -> list[tuple[str, str]]:
    """(name, hash) of each custom call in the text of an optimized HLO module, repeats included.

    The name is that of a Pallas kernel (`name=`), or else the call's target. GPU kernels have a hash, others "".
    """
    calls = []
    for line in text.splitlines():
        target = re.search(r'custom_call_target="([^"]+)"', line)
        if target is None:
            continue
        # A kernel under transformations is named as in "transpose(jvp(NAME))".
        kernel = re.search(r'op_name="(?:[^"]*[/(])?([^/"()]+)\)*/(?:pallas_call|mpmd_map)"', line)
        digest = re.search(r'kernel_hash = "((?:[^"\\]|\\.)*)"', line)
        calls.append((kernel[1] if kernel else target[1], digest[1] if digest else ""))
    return calls
