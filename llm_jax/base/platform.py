"""On a machine without a TPU, an installed libtpu must not make every start of JAX look for one."""

import importlib.util
import os
from pathlib import Path

_GOOGLE = "0x1ae0"
_DEVICES = Path("/sys/bus/pci/devices")
_GPUS = (Path("/dev/nvidiactl"), Path("/dev/dxg"))


def choose_platform() -> None:
    """Sets `JAX_PLATFORMS`, to all but TPUs, where libtpu is installed, none is attached, and nobody has set it.

    Without it JAX asks the cloud's metadata server for a TPU, for minutes, before it takes what is there. Has an
    effect before jax is imported.
    """
    if "JAX_PLATFORMS" in os.environ or importlib.util.find_spec("libtpu") is None or _tpu_is_attached():
        return
    gpu = importlib.util.find_spec("jax_plugins") is not None and any(device.exists() for device in _GPUS)
    os.environ["JAX_PLATFORMS"] = "cuda,cpu" if gpu else "cpu"


def _tpu_is_attached() -> bool:
    vendors = (_vendor(device) for device in _DEVICES.glob("*")) if _DEVICES.is_dir() else ()
    return bool({"TPU_NAME", "TPU_WORKER_ID"} & os.environ.keys()) or _GOOGLE in vendors


def _vendor(device: Path) -> str | None:
    try:
        return (device / "vendor").read_text().strip()
    except OSError:
        return None
