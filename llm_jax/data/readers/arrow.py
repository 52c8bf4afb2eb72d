"""Arrow files, and the folders that `save_to_disk` of Hugging Face `datasets` leaves."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath

from llm_jax.base.errors import UserError
from llm_jax.data.readers.base import FileReader, Reader, Record
from llm_jax.data.readers.tables import arrow, rows
from llm_jax.storage.json_files import read_json

STATE, INFO, SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"
FILE_FORMAT = b"ARROW1"
# Ends a stream. Without it a stream that was cut between two batches would read as a shorter one.
END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"


class ArrowFile(FileReader):
    """A row is a record. Both of Arrow's layouts are read: streams (as `datasets` writes) and files."""

    suffixes = (".arrow",)

    def __init__(self, file: epath.Path, columns: tuple[str, ...] | None = None):
        super().__init__(file)
        self.columns = columns

    def records(self, start: int = 0) -> Iterator[Record]:
        first = 0
        for batch in self._batches():
            if first + batch.num_rows > start:
                yield from rows(batch, str(self.file), first, start)
            first += batch.num_rows

    def count(self) -> int:
        return sum(batch.num_rows for batch in self._batches())

    def _batches(self) -> Iterator[Any]:
        pyarrow = arrow(f"{self.file}, an Arrow file,")
        try:
            with self._opened(pyarrow) as raw:
                if raw.read(len(FILE_FORMAT)) == FILE_FORMAT:
                    reader = pyarrow.ipc.open_file(raw)
                    for index in range(reader.num_record_batches):
                        yield self._selected(reader.get_batch(index))
                    return
                size = raw.seek(0, 2)
                raw.seek(max(0, size - len(END_OF_STREAM)))
                if raw.read(len(END_OF_STREAM)) != END_OF_STREAM:
                    raise UserError(f"{self.file} is not a whole Arrow file: it has no end mark")
                raw.seek(0)
                for batch in pyarrow.ipc.open_stream(raw):
                    yield self._selected(batch)
        except (pyarrow.ArrowException, OSError, KeyError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"{self.file} is not a whole Arrow file: {reason}") from None

    def _selected(self, batch: Any) -> Any:
        return batch if self.columns is None else batch.select(self.columns)

    def _opened(self, pyarrow: Any) -> contextlib.AbstractContextManager[Any]:
        # Mapped into memory, batches that are passed over cost nothing.
        if isinstance(self.file, Path):
            return pyarrow.memory_map(str(self.file)) if self.file.stat().length else self.file.open("rb")
        return self.file.open("rb")


class DatasetFolder(Reader):
    """What `Dataset.save_to_disk` leaves: Arrow files in the order that `state.json` gives."""

    def __init__(self, folder: epath.Path):
        self.folder = folder
        state = read_json(folder / STATE)
        try:
            names = [entry["filename"] for entry in state["_data_files"]]
            columns = state.get("_format_columns")
        except (KeyError, TypeError):
            raise UserError(f"{folder / STATE} names no data files: not a folder of `datasets`") from None
        if state.get("_indices_files") or state.get("_indices_data_files"):
            raise UserError(f"{folder}: rows chosen by an index are not read: save it after flatten_indices()")
        if columns is not None and not state.get("_output_all_columns"):
            columns = tuple(columns)
        else:
            columns = None
        for name in names:
            if not (folder / name).exists():
                raise UserError(f"{folder / name} is missing, which {STATE} names")
        self.parts = [ArrowFile(folder / name, columns) for name in names]

    def records(self, start: int = 0) -> Iterator[Record]:
        return chain(self.parts, start)

    def count(self) -> int:
        return sum(part.count() for part in self.parts)

    def hashes(self) -> list[list[str]]:
        return [entry for part in self.parts for entry in part.hashes()]

    def files(self) -> list[epath.Path]:
        return [part.file for part in self.parts]


def dataset_folder(folder: epath.Path) -> Reader | None:
    """The reader of a folder of `datasets`; None for any other folder.

    Raises UserError for a DatasetDict of several splits: which of them is wanted has to be said.
    """
    if (folder / SPLITS).exists():
        splits = read_json(folder / SPLITS).get("splits") or []
        if len(splits) != 1:
            said = ", ".join(f"{folder}/{split}" for split in splits) or "none"
            raise UserError(f"{folder} holds the splits of a DatasetDict: give one of {said}")
        return dataset_folder(folder / splits[0])
    if (folder / STATE).exists() and (folder / INFO).exists():
        return DatasetFolder(folder)
    return None


def chain(parts: list[Any], start: int) -> Iterator[Record]:
    """The records of several readers from number `start` on."""
    for part in parts:
        if start and part is not parts[-1]:
            count = part.count()
            if count <= start:
                start -= count
                continue
        yield from part.records(start)
        start = 0
