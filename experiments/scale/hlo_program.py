"""What stands in the text of an optimized program: its collectives, and its time by the TPU compiler's own estimates.

`cost_analysis()["optimal_seconds"]` counts the body of a loop once. Here each operation's `estimated_cycles` counts as
often as its loops turn, which a constant in a loop's condition says.
"""

import re
from collections import Counter

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(?:ENTRY )?%([\w.\-]+) .*\{$")
_COLLECTIVE = re.compile(rf" ({'|'.join(COLLECTIVES)})(?:-start)?\(")
_WHILE = re.compile(r' while\(.*condition=%([\w.\-]+), body=%([\w.\-]+).*?op_name="([^"]*)"')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_CONSTANT = re.compile(r"%([\w.\-]+) = [su]32\[\][^ ]* constant\((\d+)\)")
_COMPARE = re.compile(r"compare\(%[\w.\-]+, %([\w.\-]+)\), direction=LT")
_UNKNOWN = 2**62  # The compiler's mark for "no estimate".


def collectives(hlo: str) -> dict[str, int]:
    """How often each stands in `compiled.as_text()`, loops counted once.

    The TPU compiler writes a reduce-scatter that nothing runs beside as a fusion `all-reduce-scatter`, of an all-reduce
    and a slice of what it gives: counted as what it is. One cut into pieces, between those of a product, is permutes.
    """
    found: Counter[str] = Counter()
    for name, lines in _computations(hlo)[0].items():
        own = Counter(kind for line in lines for kind in _COLLECTIVE.findall(line))
        if name.startswith("all-reduce-scatter"):
            own["reduce-scatter"] += own.pop("all-reduce", 0)
        found += own
    return {kind: found[kind] for kind in COLLECTIVES}


def cycles(hlo: str) -> tuple[int, list[str]]:
    """Cycles of `compiled.as_text()` for a TPU, and the loops whose end is data, whose bodies are counted once.

    Kernels and collectives have no estimate and count nothing.
    """
    bodies, entry = _computations(hlo)
    once: list[str] = []

    def of(name: str) -> int:
        total = sum(int(x) for line in bodies[name] for x in _CYCLES.findall(line) if int(x) < _UNKNOWN)
        for loop in filter(None, map(_WHILE.search, bodies[name])):
            condition, body, op_name = loop.groups()
            trips = _trips(bodies[condition])
            if trips is None:
                once.append(op_name)
            total += of(body) * (1 if trips is None else trips)
        return total

    return of(entry), once


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
