"""Peak bfloat16 FLOP/s of a device, dense (no sparsity), from the makers' public datasheets."""

from typing import Any

_PEAKS = (
    # (start of jax's device_kind, FLOP/s); the first match wins, so longer names stand before their beginnings.
    ("NVIDIA GB200", 2.5e15),
    ("NVIDIA B200", 2.25e15),
    ("NVIDIA H200", 989.5e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H100 NVL", 835.5e12),
    ("NVIDIA H100", 989.5e12),
    ("NVIDIA A100", 312e12),
    ("NVIDIA L40S", 362e12),
    ("NVIDIA L4", 121e12),
    ("NVIDIA A10G", 70e12),
    ("NVIDIA A10", 125e12),
    ("TPU v6 lite", 918e12),
    ("TPU v6e", 918e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),
    ("TPU v4", 275e12),
    # One jax device is one of a chip's two cores.
    ("TPU v3", 61.5e12),
    ("TPU v2", 22.5e12),
)


def peak_flops(device: Any, compute_dtype: str) -> float | None:
    """FLOP/s of one jax device for matrix products in `compute_dtype`; None where no datasheet figure is known.

    float32 has none: products of `highest` precision take a number of bfloat16 or TF32 passes that differs by device.
    """
    if compute_dtype != "bfloat16":
        return None
    return next((peak for start, peak in _PEAKS if device.device_kind.startswith(start)), None)
