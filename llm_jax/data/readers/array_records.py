"""ArrayRecord files whose records are JSON objects or texts."""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

from llm_jax.base.errors import UserError
from llm_jax.data.examples import Text
from llm_jax.data.readers.base import FileReader, Record
from llm_jax.data.readers.json_lines import parse_json

# Records read at a time.
BATCH = 64


class ArrayRecordFile(FileReader):
    """Records are JSON objects if the first one is, and then all have to be; else each is a document in UTF-8."""

    suffixes = (".arrayrecord", ".array_record")

    def records(self, start: int = 0) -> Iterator[Record]:
        with self._opened() as reader:
            count = reader.num_records()
            if start >= count:
                return
            objects = _is_object(reader.read(0, 1)[0])
            for first in range(start, count, BATCH):
                for number, data in enumerate(reader.read(first, min(first + BATCH, count)), first + 1):
                    where = f"{self.file}, record {number}"
                    text = _text(data, where)
                    if not objects:
                        yield Record(where, Text(text))
                        continue
                    value = parse_json(text, where)
                    if not isinstance(value, dict):
                        raise UserError(f"{where}: not a JSON object, as the file's first record is")
                    yield Record(where, value)

    def count(self) -> int:
        with self._opened() as reader:
            return reader.num_records()

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Any]:
        reader = array_record_module.ArrayRecordReader(str(self.file), "")
        try:
            if not reader.ok():
                raise UserError(f"{self.file} is not a whole ArrayRecord file")
            yield reader
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{self.file} is not a whole ArrayRecord file: {str(error).splitlines()[0]}") from None
        finally:
            with contextlib.suppress(RuntimeError, ValueError):
                reader.close()


def _is_object(data: bytes) -> bool:
    try:
        return isinstance(json.loads(data), dict)
    except (ValueError, RecursionError):
        return False


def _text(data: bytes, where: str) -> str:
    if _is_tensorflow_example(data):
        raise UserError(f"{where}: a TensorFlow Example; records have to be JSON objects or UTF-8 text")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: neither JSON nor text: not UTF-8 (byte 0x{data[error.start]:02x})") from None


def _is_tensorflow_example(data: bytes) -> bool:
    """Whether the bytes are one length-delimited field 1 that begins with another; they may pass for UTF-8."""
    inner = _field_1(data)
    return inner is not None and _field_1(inner, whole=False) is not None


def _field_1(data: bytes, whole: bool = True) -> bytes | None:
    if data[:1] != b"\x0a":
        return None
    length, place = 0, 1
    while place < min(len(data), 10):
        length |= (data[place] & 0x7F) << 7 * (place - 1)
        place += 1
        if data[place - 1] < 0x80:
            fits = len(data) - place == length if whole else 0 < length <= len(data) - place
            return data[place : place + length] if fits else None
    return None
