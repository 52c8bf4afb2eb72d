"""TensorBoard events without TensorBoard: the scalars of metrics.jsonl, in the one file format TensorBoard reads.

A file is a sequence of records (length, its checksum, data, its checksum: tensorflow.org/tutorials/load_data/tfrecord),
each an `Event` protocol buffer (tensorflow/core/util/event.proto): wall_time=1, step=2, file_version=3, summary=5 of
values with tag=1 and simple_value=2.
"""

import struct
import time
from collections.abc import Iterable, Mapping
from typing import Any

from etils import epath

from llm_jax.base import processes
from llm_jax.storage.growing import GrowingFile

FILE = "events.out.tfevents.0000000000.metrics"


class Events:
    """`FILE` in a folder: made anew from the lines that metrics.jsonl has, so that a resumed run has no steps twice."""

    def __init__(self, folder: epath.PathLike, lines: Iterable[Mapping[str, Any]]) -> None:
        self._file: GrowingFile | None = None
        if processes.first():
            epath.Path(folder).mkdir(parents=True, exist_ok=True)
            version = _record(_event(3, b"brain.Event:2"))
            self._file = GrowingFile(epath.Path(folder) / FILE, version + b"".join(_scalars(line) for line in lines))

    def append(self, line: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl: its `step` and its finite numbers."""
        if self._file is not None:
            self._file.append(_scalars(line))

    def close(self, failed: bool) -> None:
        """Returns when all events are stored."""
        if self._file is not None:
            self._file.flush()


def _scalars(line: Mapping[str, Any]) -> bytes:
    values = b"".join(
        _field(1, _field(1, name.encode()) + b"\x15" + struct.pack("<f", value))
        for name, value in line.items()
        if name != "step" and isinstance(value, int | float)
    )
    return _record(_event(5, values, line["step"]))


def _event(field: int, content: bytes, step: int = 0) -> bytes:
    return b"\x09" + struct.pack("<d", time.time()) + b"\x10" + _varint(step) + _field(field, content)


def _field(number: int, content: bytes) -> bytes:
    """A length-delimited field of a protocol buffer."""
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def _record(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + _masked(length) + data + _masked(data)


def _masked(data: bytes) -> bytes:
    checksum = crc32c(data)
    rotated = (checksum >> 15 | checksum << 17) & 0xFFFFFFFF
    return struct.pack("<I", (rotated + 0xA282EAD8) & 0xFFFFFFFF)


def crc32c(data: bytes) -> int:
    """CRC-32 of Castagnoli (RFC 3720, appendix B.4)."""
    checksum = 0xFFFFFFFF
    for byte in data:
        checksum = _TABLE[(checksum ^ byte) & 255] ^ checksum >> 8
    return checksum ^ 0xFFFFFFFF


def _table() -> list[int]:
    table = []
    for entry in range(256):
        for _ in range(8):
            entry = entry >> 1 ^ (0x82F63B78 if entry & 1 else 0)
        table.append(entry)
    return table


_TABLE = _table()
