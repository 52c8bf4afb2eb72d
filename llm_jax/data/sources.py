"""Records from whatever a path names: which reader takes which file, folder or scheme.

| path | read as |
|---|---|
| `.jsonl`, `.ndjson` (also `.gz`) | JSON lines |
| `.txt`, `.md`, `.rst`, `.py` (also `.gz`) | one document a file |
| `.parquet` | Parquet (extra `arrow`) |
| `.arrow` | Arrow, stream or file (extra `arrow`) |
| folder with `state.json` and `dataset_info.json` | what `save_to_disk` of `datasets` left (extra `arrow`) |
| `.array_record`, `.arrayrecord` | ArrayRecord of JSON objects or of texts |
| any other folder | all of these in it, however deep, sorted by name |
| a path with `*` or `?` in its last part | the files that match, sorted |
| `seqio:MODULE:NAME[:SPLIT]` | a seqio task or mixture (extra `seqio`) |
| `hub:OWNER/NAME[@REVISION][/PATH]` | a dataset of the Hugging Face hub, or a file or folder in it (extra `hub`) |
"""

import fnmatch
from collections.abc import Iterator

from etils import epath

from llm_jax.base.errors import UserError
from llm_jax.data.readers.array_records import ArrayRecordFile
from llm_jax.data.readers.arrow import ArrowFile, chain, dataset_folder
from llm_jax.data.readers.base import FileReader, Reader, Record
from llm_jax.data.readers.hub import PREFIX as HUB
from llm_jax.data.readers.hub import hub_path, is_card
from llm_jax.data.readers.json_lines import JsonLines
from llm_jax.data.readers.parquet import ParquetFile
from llm_jax.data.readers.seqio import PREFIX as SEQIO
from llm_jax.data.readers.seqio import SeqioReader
from llm_jax.data.readers.text import PIECE_BYTES, TextFile
from llm_jax.storage.remote import to_path

__all__ = ["PIECE_BYTES", "Record", "ignored_files", "list_files", "open_source", "read_records", "source_hashes"]

FILE_READERS: tuple[type[FileReader], ...] = (JsonLines, TextFile, ParquetFile, ArrowFile, ArrayRecordFile)


def open_source(path: str) -> list[Reader]:
    """The readers of a path, in the order they are read. Nothing is read yet.

    Raises:
      UserError: the path is missing, holds nothing that is read, or needs an extra that is not installed.
    """
    if path.startswith(SEQIO):
        return [SeqioReader(path)]
    root = epath.Path(hub_path(path)) if path.startswith(HUB) else to_path(path, f"data path {path}")
    if not root.exists():
        found = _matches(root)
        if not found:
            raise UserError(f"data path {path} does not exist")
    elif root.is_dir():
        found = sorted(_walk(root), key=str)
        if path.startswith(HUB):
            found = [entry for entry in found if not is_card(root, entry)]
    else:
        found = [root]
    readers = [reader for reader in map(_reader, found) if reader is not None]
    if not readers:
        known = ", ".join(suffix for kind in FILE_READERS for suffix in kind.suffixes)
        said = "holds no file ending in" if root.is_dir() else "is none of the files that are read, which end in"
        raise UserError(f"{path} {said} {known} (text and JSON lines also in .gz)")
    return readers


def list_files(path: str) -> list[epath.Path]:
    """The files of a path that are read, in order; none of a seqio task.

    Raises:
      UserError: as `open_source`.
    """
    return [file for reader in open_source(path) for file in reader.files()]


def source_hashes(path: str) -> list[list[str]]:
    """Names and content hashes of all that a path is read from; of a seqio task, of its module and files.

    Raises:
      UserError: as `open_source`.
    """
    return [entry for reader in open_source(path) for entry in reader.hashes()]


def ignored_files(path: str) -> list[str]:
    """Files of a folder that are not read, by their endings; hidden ones aside."""
    if path.startswith(SEQIO):
        return []
    root = epath.Path(hub_path(path)) if path.startswith(HUB) else to_path(path)
    return sorted(str(entry) for entry in _walk(root) if _reader(entry) is None) if root.is_dir() else []


def read_records(path: str, max_records: int | None = None, start: int = 0) -> Iterator[Record]:
    """The records of a path, in order of file name and of their place in it, a few at a time in memory.

    Args:
      path: see the module.
      max_records: reads no more than this many, those before `start` included.
      start: begins with the record of this number, from 0. Those before it are passed over, not parsed: where a format
        has an index (Parquet, ArrayRecord) at no cost, else at the cost of finding lines or batches.

    Raises:
      UserError: a file is missing, or its first bad record: file and line, row or record number; all of it is empty.
    """
    number = start
    for record in chain(open_source(path), start):
        if max_records is not None and number >= max_records:
            return
        number += 1
        yield record
    if not number:
        raise UserError(f"{path} is empty: no records")


def _reader(entry: epath.Path) -> Reader | None:
    """The reader of a file or of a folder that is one source."""
    for kind in FILE_READERS:
        if kind.reads(entry.name) and not entry.is_dir():
            return kind(entry)
    return dataset_folder(entry) if entry.is_dir() else None


def _walk(folder: epath.Path) -> Iterator[epath.Path]:
    """Files, and folders that are one source; hidden ones aside."""
    if dataset_folder(folder) is not None:
        yield folder
        return
    for entry in folder.iterdir():
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _walk(entry)
        else:
            yield entry


def _matches(root: epath.Path) -> list[epath.Path]:
    if not set("*?[") & set(root.name) or not root.parent.is_dir():
        return []
    names = sorted(entry.name for entry in root.parent.iterdir() if not entry.name.startswith("."))
    return [root.parent / name for name in names if fnmatch.fnmatchcase(name, root.name)]
