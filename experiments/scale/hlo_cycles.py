"""Time of a program from the TPU compiler's own estimates of its operations.

`cost_analysis()["optimal_seconds"]` counts the body of a loop once. Here each operation's `estimated_cycles` counts as
often as its loops turn: a constant in the loop's condition says how often; a loop whose end is data turns as often as
the caller says.
"""

import re
from collections.abc import Callable

_COMPUTATION = re.compile(r"^(?:ENTRY )?%([\w.\-]+) .*\{$")
_WHILE = re.compile(r' while\(.*condition=%([\w.\-]+), body=%([\w.\-]+).*?op_name="([^"]*)"')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_CONSTANT = re.compile(r"%([\w.\-]+) = [su]32\[\][^ ]* constant\((\d+)\)")
_COMPARE = re.compile(r"compare\(%[\w.\-]+, %([\w.\-]+)\), direction=LT")
_UNKNOWN = 2**62  # The compiler's mark for "no estimate".


def program_cycles(hlo: str, data_dependent: Callable[[str, int | None], float]) -> tuple[float, float]:
    """Cycles of an optimized TPU program: `(with loops counted as they turn, with each body counted once)`.

    Args:
        hlo: `compiled.as_text()`.
        data_dependent: trips of a loop whose end is data, from its name and the trips of the loop around it.
    """
    bodies, entry = _computations(hlo)

    def cycles(name: str, around: int | None) -> tuple[float, float]:
        own = sum(int(x) for line in bodies[name] for x in _CYCLES.findall(line) if int(x) < _UNKNOWN)
        turned, once = float(own), float(own)
        for line in bodies[name]:
            found = _WHILE.search(line)
            if found is None:
                continue
            condition, body, op_name = found.groups()
            trips = _trips(bodies[condition])
            inner_turned, inner_once = cycles(body, trips)
            turned += inner_turned * (data_dependent(op_name, around) if trips is None else trips)
            once += inner_once
        return turned, once

    return cycles(entry, None)


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    bodies: dict[str, list[str]] = {}
    current, entry = None, ""
    for line in hlo.splitlines():
        start = _COMPUTATION.match(line)
        if start:
            current = start.group(1)
            bodies[current] = []
            entry = current if line.startswith("ENTRY") else entry
        elif line.startswith("}"):
            current = None
        elif current is not None:
            bodies[current].append(line)
    return bodies, entry


def _trips(condition: list[str]) -> int | None:
    constants = {name: int(value) for line in condition for name, value in _CONSTANT.findall(line)}
    compared = [constants.get(name) for line in condition for name in _COMPARE.findall(line)]
    return compared[0] if len(compared) == 1 else None
