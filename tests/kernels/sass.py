"""Loops in the machine code of a GPU kernel: how deep in them something stands.

Loops are natural ones: ptxas puts what waits for a barrier behind the end of a kernel and jumps back from there, so
that a jump backward alone makes no loop.
"""

import re
from dataclasses import dataclass, field

_LABEL = re.compile(r"^(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P\d+ +)?([A-Z][\w.]*)")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")
_ENDS = ("BRA", "EXIT", "RET", "BRX", "JMP")


@dataclass
class _Block:
    opcodes: list[str] = field(default_factory=list)
    follows: list[str] = field(default_factory=list)
    """Names of the blocks that may come next."""


def depth(sass: str, *opcodes: str) -> int:
    """Loops around the innermost instruction that begins with one of these; 0 outside of all, -1 if there is none.

    `sass` is the text of one kernel, as nvdisasm writes it.
    """
    blocks = _blocks(sass)
    loops = _loops(blocks)
    holding = [name for name, block in blocks.items() if any(op.startswith(opcodes) for op in block.opcodes)]
    return max((sum(name in loop for loop in loops) for name in holding), default=-1)


def _blocks(sass: str) -> dict[str, _Block]:
    """In the order of the text."""
    blocks = {"0": _Block()}
    own, open_ended = blocks["0"], True

    def begin(name: str) -> _Block:
        if open_ended:
            own.follows.append(name)
        return blocks.setdefault(name, _Block())

    for line in sass.splitlines():
        if label := _LABEL.match(line):
            own, open_ended = begin(label[1]), True
        elif found := _INSTRUCTION.search(line):
            predicate, opcode = found.groups()
            own.opcodes.append(opcode)
            if opcode.startswith(_ENDS):
                own.follows += _TARGET.findall(line)
                open_ended = predicate is not None
                own, open_ended = begin(str(len(blocks))), True
    return blocks


def _loops(blocks: dict[str, _Block]) -> list[set[str]]:
    """Blocks of each loop; jumps back to one block are one loop."""
    before: dict[str, set[str]] = {name: set() for name in blocks}
    for name, block in blocks.items():
        for following in block.follows:
            before[following].add(name)
    dominators = _dominators(blocks, before)
    loops: dict[str, set[str]] = {}
    for name, block in blocks.items():
        for head in dominators[name].intersection(block.follows):
            loop, waiting = loops.setdefault(head, {head}), [name]
            while waiting:
                inner = waiting.pop()
                if inner not in loop:
                    loop.add(inner)
                    waiting += before[inner]
    return list(loops.values())


def _dominators(blocks: dict[str, _Block], before: dict[str, set[str]]) -> dict[str, set[str]]:
    """Of each block that the first one reaches: those on every way to it. Of the others, none."""
    reached, waiting = {"0"}, ["0"]
    while waiting:
        new = set(blocks[waiting.pop()].follows) - reached
        reached |= new
        waiting += new
    dominators = {name: set(reached) if name in reached else set() for name in blocks}
    dominators["0"] = {"0"}
    changed = True
    while changed:
        changed = False
        for name in blocks:
            if name in reached and name != "0":
                common = set.intersection(*(dominators[b] for b in before[name] & reached)) | {name}
                changed |= common != dominators[name]
                dominators[name] = common
    return dominators
