"""JSON lines."""

import json
from collections.abc import Iterator

from llm_jax.base.errors import UserError
from llm_jax.data.readers.base import FileReader, Record
from llm_jax.data.readers.lines import decode_line, read_lines

MARK = b"\xef\xbb\xbf"


class JsonLines(FileReader):
    """A JSON value a line; blank lines are none."""

    suffixes = (".jsonl", ".ndjson")
    gzipped = True

    def records(self, start: int = 0) -> Iterator[Record]:
        for index, (number, line) in enumerate(self._lines()):
            if index >= start:
                where = f"{self.file}:{number}"
                yield Record(where, parse_json(decode_line(self.file, number, line), where))

    def count(self) -> int:
        return sum(1 for _ in self._lines())

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        for number, line in enumerate(read_lines(self.file), 1):
            line = line.removeprefix(MARK) if number == 1 else line
            if line.strip():
                yield number, line


def parse_json(text: str, where: str) -> object:
    """A JSON value. Raises UserError that begins with `where`."""
    try:
        value = json.loads(text)
        # JSON can spell half a surrogate pair, which no text is made of: only as \ud800 to \udfff.
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON: {error.msg} (column {error.colno})") from None
    except UnicodeEncodeError:
        raise UserError(f"{where}: holds half of a surrogate pair, which is not UTF-8") from None
    except RecursionError:
        raise UserError(f"{where}: JSON nested too deep") from None
    except ValueError as error:  # a number of thousands of digits
        raise UserError(f"{where}: {error}") from None
    return value
