"""Lines of plain and of gzipped files, for the formats made of lines."""

import gzip
import zlib
from collections.abc import Iterator

from etils import epath

from llm_jax.base.errors import UserError


def read_lines(file: epath.Path) -> Iterator[bytes]:
    """The lines of a file, their ends included. Raises UserError for a `.gz` that is none or is cut short."""
    try:
        with file.open("rb") as raw:
            if file.name.endswith(".gz"):
                with gzip.GzipFile(fileobj=raw) as unpacked:
                    yield from unpacked
            else:
                yield from raw
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(f"{file} is not a whole gzip file: {error}") from None


def decode_line(file: epath.Path, number: int, line: bytes) -> str:
    """A line as text. Raises UserError for one that is not UTF-8."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}:{number}: not UTF-8 (byte 0x{line[error.start]:02x})") from None
