"""How much of a run's wall time went into steps that count, over all the commands that it took."""

import os
import time
from collections.abc import Iterable, Mapping
from typing import Any

WALL = "perf/wall_time"

# When this process was last free for a run: its start, then the end of the run before.
_free_since: float | None = None


class RunClock:
    """Wall time of a run, from the start of its first command, and the part of it that was productive.

    What a command did before its run counts too: imports, data, restoring. Time in which no command was at work does
    not. Steps that a kill took back cost wall time and count for nothing.

    Args:
        saved: what `saved()` gave when the restored checkpoint was written.
        lines: metrics.jsonl as the last command left it, which may have gone on after that checkpoint.
    """

    def __init__(self, saved: Mapping[str, float] | None = None, lines: Iterable[Mapping[str, Any]] = ()) -> None:
        global _free_since
        saved = saved or {"productive": 0.0, "wall": 0.0}
        self._productive = saved["productive"]
        self._earlier = max([saved["wall"], *(line.get(WALL, 0.0) for line in lines)])
        if _free_since is None:
            _free_since = time.perf_counter() - process_age()
        self._began = _free_since

    def add(self, seconds: float) -> None:
        """Time spent in steps."""
        self._productive += seconds

    def wall(self) -> float:
        """Seconds that the run's commands have taken so far."""
        return self._earlier + time.perf_counter() - self._began

    def saved(self, under_way: float = 0.0) -> dict[str, float]:
        """For the checkpoint's metadata; `under_way` are seconds in steps that were not added yet."""
        return {"productive": self._productive + under_way, "wall": self.wall()}

    def figures(self) -> dict[str, float]:
        """`perf/wall_time` in seconds and `perf/goodput`, the productive share of it."""
        wall = self.wall()
        return {WALL: wall, "perf/goodput": self._productive / wall}

    def stop(self) -> None:
        """The run is over: what this process does from now on belongs to the next one."""
        global _free_since
        _free_since = time.perf_counter()


def process_age() -> float:
    """Seconds since this process was started; 0 where there is no /proc to tell."""
    try:
        with open("/proc/self/stat") as file:
            # The command's name, in parentheses, may hold spaces and parentheses itself.
            ticks = int(file.read().rsplit(")", 1)[1].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return 0.0
