"""How several processes find each other: from the command line, the environment, Slurm, or a TPU's host."""

import importlib.util
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

from llm_jax.base import processes
from llm_jax.base.errors import RunError, UserError

FLAGS = {"coordinator": "LLM_JAX_COORDINATOR", "processes": "LLM_JAX_PROCESSES", "process": "LLM_JAX_PROCESS"}
"""Command line flags and the environment variables that stand for them."""
JOIN_TIMEOUT = 300.0
"""Seconds in which all processes have to have started."""


@dataclass(frozen=True)
class Place:
    """Where a process belongs; None leaves it to jax, which asks Slurm or the TPU's host."""

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None


def place(flags: Mapping[str, str | None], environ: Mapping[str, str]) -> Place | None:
    """What the command line, the environment, Slurm or a TPU pod say of this process; None for one that is alone.

    Raises UserError for what is missing or no number.
    """
    given = {flag: flags.get(flag) or environ.get(variable) for flag, variable in FLAGS.items()}
    if given["processes"] == "auto":
        return Place()
    if not any(given.values()):
        return Place() if _under_slurm(environ) or _on_tpu_pod(environ) else None
    for flag, value in given.items():
        if not value:
            raise UserError(f"--{flag} (or {FLAGS[flag]}) is missing: several processes need {_all_flags()}")
    numbers = {}
    for flag in ("processes", "process"):
        value = given[flag] or ""
        if not value.isdecimal():
            raise UserError(f"--{flag}={value} is not a number")
        numbers[flag] = int(value)
    processes, process = numbers["processes"], numbers["process"]
    if not process < processes:
        raise UserError(f"--process={process} is not below --processes={processes}; they count from 0")
    host, colon, port = (given["coordinator"] or "").rpartition(":")
    if not (host and colon and port.isdecimal()):
        raise UserError(f"--coordinator={given['coordinator']} is not HOST:PORT")
    return Place(given["coordinator"], processes, process) if processes > 1 else None


def _all_flags() -> str:
    return ", ".join(f"--{flag}" for flag in FLAGS)


def _under_slurm(environ: Mapping[str, str]) -> bool:
    """Whether `srun` started this process as one of several; an `sbatch` script alone is one process."""
    return int(environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1


def _on_tpu_pod(environ: Mapping[str, str]) -> bool:
    """Whether this host has TPU chips of a slice with several hosts."""
    platforms = environ.get("JAX_PLATFORMS", "tpu")
    if "tpu" not in platforms.split(",") or importlib.util.find_spec("libtpu") is None:
        return False
    for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"):
        if name in environ:
            return "," in environ[name] or int(environ.get("MEGASCALE_NUM_SLICES", 1)) > 1
    if "TPU_SKIP_MDS_QUERY" in environ:
        return False
    # Only the metadata server knows more: jax asks it where there are chips, and a slice of one host is one process.
    from jax._src import hardware_utils

    return hardware_utils.num_available_tpu_chips_and_device_id()[0] > 0


def join(where: Place | None) -> None:
    """Meets the other processes; before anything else of jax. None: there are none.

    Raises RunError where they do not all come, UserError where jax finds no cluster.
    """
    if where is None:
        return
    import jax
    from jax._src import distributed

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # It would take SIGTERM for itself.
    jax.config.update("jax_enable_preemption_service", False)
    failures: list[Exception] = []
    thread = threading.Thread(target=_meet, args=(where, failures), daemon=True)
    thread.start()
    deadline = time.monotonic() + JOIN_TIMEOUT
    # jax waits in C++, deaf to signals, and ends in an abort: so it waits in a thread, and this one in Python.
    while thread.is_alive():
        thread.join(0.2)
        if time.monotonic() > deadline:
            which = where.coordinator or "the cluster's first host"
            raise RunError(f"not all processes came to {which} within {JOIN_TIMEOUT:.0f} s; this one did")
    for failure in failures:
        if isinstance(failure, ValueError):
            raise UserError(f"--processes=auto: jax finds no cluster here ({failure}); give {_all_flags()}")
        raise failure
    state = distributed.global_state
    if state.num_processes > 1:
        processes.form(state.client, state.process_id, state.num_processes)


def _meet(where: Place, failures: list[Exception]) -> None:
    import jax
    from jax._src.lib import _jax  # pyright: ignore[reportPrivateImportUsage]

    from llm_jax.base import coordinator

    service = _jax.get_distributed_runtime_service
    _jax.get_distributed_runtime_service = coordinator.launch
    try:
        jax.distributed.initialize(
            where.coordinator, where.processes, where.process, initialization_timeout=2 * round(JOIN_TIMEOUT)
        )
    except Exception as error:
        failures.append(error)
    finally:
        _jax.get_distributed_runtime_service = service
