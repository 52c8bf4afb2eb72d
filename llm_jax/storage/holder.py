"""Who holds a workdir: a process on a host, and whether it still runs."""

import os
import socket
from pathlib import Path
from typing import Any


def this_process() -> dict[str, Any]:
    """Host, process id, and what tells this process from others that have the same id at another time or boot."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "start": _start_time(os.getpid()), "boot": _boot()}


def is_dead(holder: dict[str, Any]) -> bool:
    """Whether a holder is known to be gone. Of another host nothing is known: False."""
    if holder["host"] != socket.gethostname() or holder.get("boot", _boot()) != _boot():
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return _start_time(holder["pid"]) != holder["start"]


def is_alive(holder: dict[str, Any]) -> bool:
    """Whether a holder is known to run: only a process of this host is."""
    here = holder["host"] == socket.gethostname() and holder.get("boot", _boot()) == _boot()
    return here and not is_dead(holder)


def _boot() -> str | None:
    """Told anew at every boot, and by every machine; None where there is no /proc."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def _start_time(pid: int) -> str | None:
    """When a process started, in clock ticks since boot; "dead" for a zombie; None where there is no /proc."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The command's name, in parentheses, may hold spaces and parentheses itself.
    state, *fields = stat.rsplit(")", 1)[1].split()
    return "dead" if state in "ZX" else fields[18]
