"""Reads records from files and folders, and names the file and line of whatever is wrong with them."""

import gzip
import json
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from etils import epath

from llm_jax.base.errors import UserError
from llm_jax.data.formats import Text

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
RECORD_SUFFIXES = (".jsonl", ".ndjson")
# A text file is read in pieces of about this many bytes, cut after a blank line, or else at a line's end.
PIECE_BYTES = 16384


class Record(NamedTuple):
    """One record and where it stands (`file:line`)."""

    where: str
    value: Any  # a JSON value, or a formats.Text piece of a text file


def list_files(path: str) -> list[epath.Path]:
    """The files of a path that are read, sorted.

    Raises:
      UserError: the path is missing, or holds nothing that is read.
    """
    root = epath.Path(path)
    if not root.exists():
        raise UserError(f"data path {path} does not exist")
    if root.is_dir():
        files = sorted(_walk(root), key=str)
        files = [file for file in files if _format(file) is not None]
        if not files:
            raise UserError(f"{path} holds no file ending in {_known()}")
        return files
    if _format(root) is None:
        raise UserError(f"{path}: data files end in {_known()}")
    return [root]


def ignored_files(path: str) -> list[str]:
    """Files of a folder that are not read, by their endings; hidden ones aside."""
    root = epath.Path(path)
    return sorted(str(file) for file in _walk(root) if _format(file) is None) if root.is_dir() else []


def _walk(folder: epath.Path) -> Iterator[epath.Path]:
    for entry in folder.iterdir():
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _walk(entry)
        else:
            yield entry


def _known() -> str:
    return ", ".join((*RECORD_SUFFIXES, *TEXT_SUFFIXES)) + ", or one of these and .gz"


def _format(file: epath.Path) -> str | None:
    name = file.name.removesuffix(".gz")
    if name.endswith(RECORD_SUFFIXES):
        return "records"
    return "text" if name.endswith(TEXT_SUFFIXES) else None


def read_records(path: str, max_records: int | None = None, start: int = 0) -> Iterator[Record]:
    """The records of a file or folder, in order of file name and line.

    Args:
      path: a file or folder.
      max_records: reads no more than this many, those before `start` included.
      start: begins with the record of this number, from 0.

    Raises:
      UserError: a file is missing, empty as a whole, not UTF-8, not JSON, or not gzip.
    """
    count = 0
    for file in list_files(path):
        for record in _records(file) if _format(file) == "records" else _pieces(file):
            if max_records is not None and count >= max_records:
                return
            count += 1
            if count > start:
                yield record
    if not count:
        raise UserError(f"{path} is empty: no records")


def _lines(file: epath.Path) -> Iterator[bytes]:
    try:
        with file.open("rb") as raw:
            if file.name.endswith(".gz"):
                with gzip.GzipFile(fileobj=raw) as unpacked:
                    yield from unpacked
            else:
                yield from raw
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(f"{file} is not a whole gzip file: {error}") from None


def _text(file: epath.Path, number: int, line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}:{number}: not UTF-8 (byte 0x{line[error.start]:02x})") from None


def _records(file: epath.Path) -> Iterator[Record]:
    for number, line in enumerate(_lines(file), 1):
        text = _text(file, number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
        if not text.strip():
            continue
        where = f"{file}:{number}"
        try:
            value = json.loads(text)
            # JSON can spell half a surrogate pair, which no text is made of.
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: not JSON: {error.msg} (column {error.colno})") from None
        except UnicodeEncodeError:
            raise UserError(f"{where}: holds half of a surrogate pair, which is not UTF-8") from None
        except RecursionError:
            raise UserError(f"{where}: JSON nested too deep") from None
        yield Record(where, value)


def _pieces(file: epath.Path) -> Iterator[Record]:
    lines: list[str] = []
    first, size, begins = 1, 0, True
    for number, line in enumerate(_lines(file), 1):
        if size >= 2 * PIECE_BYTES or (size >= PIECE_BYTES and lines and not lines[-1].strip()):
            yield Record(f"{file}:{first}", Text("".join(lines), begins=begins, ends=False))
            lines, first, size, begins = [], number, 0, False
        lines.append(_text(file, number, line))
        size += len(line)
    if lines:
        yield Record(f"{file}:{first}", Text("".join(lines), begins=begins))
