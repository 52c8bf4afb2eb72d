"""Rows on disk: one ArrayRecord file and a manifest that is written last. A row is addressed by an integer."""

import functools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]
from etils import epath

from llm_jax.base.errors import UserError
from llm_jax.data.rows import Field, Row, Schema, empty_row
from llm_jax.storage.atomic import write_atomically

FORMAT = 1
GROUP_BYTES = 1 << 18
ROWS, MANIFEST = "rows.array_record", "manifest.json"


def write_rowset(
    folder: str | os.PathLike[str], rows: Iterable[Row], schema: Schema, manifest: Mapping[str, Any]
) -> None:
    """Writes rows, then the manifest; a folder without a manifest is unfinished and is written anew.

    Args:
      folder: made if absent.
      rows: dicts of arrays as the schema says.
      schema: fields of a row, in the order they are stored.
      manifest: JSON values kept beside the rows (`format`, `rows` and `schema` are added).
    """
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Up to 16 rows are compressed together, to about a sixteenth; of long rows fewer, since a read unpacks a group.
    group = min(16, max(1, GROUP_BYTES // _stride(schema)))
    writer = array_record_module.ArrayRecordWriter(str(folder / ROWS), f"group_size:{group},zstd:1")
    count = 0
    for row in rows:
        writer.write(b"".join(np.asarray(row[name], field.dtype).tobytes() for name, field in schema.items()))
        count += 1
    writer.close()
    stored = {"format": FORMAT, **manifest, "rows": count, "schema": {n: [f.dtype, f.shape] for n, f in schema.items()}}
    write_atomically(folder / MANIFEST, json.dumps(stored, indent=2) + "\n")


def _stride(schema: Schema) -> int:
    """Bytes of a row."""
    return sum(np.dtype(field.dtype).itemsize * int(np.prod(field.shape)) for field in schema.values())


class RowSet:
    """The rows that `write_rowset` wrote.

    Attributes:
      manifest: what is kept beside them.
      schema: fields of a row.

    Raises:
      UserError: the folder is no finished row set, or of another format.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = epath.Path(folder)
        file = self.folder / MANIFEST
        if not file.exists():
            raise UserError(f"{folder} is no finished row set (it has no {MANIFEST})")
        self.manifest: dict[str, Any] = json.loads(file.read_text())
        if self.manifest["format"] != FORMAT:
            raise UserError(
                f"{folder}: row format {self.manifest['format']} is not known (this version reads {FORMAT})"
            )
        self.schema: Schema = {n: Field(dtype, tuple(shape)) for n, (dtype, shape) in self.manifest["schema"].items()}
        self._stride = _stride(self.schema)

    def __len__(self) -> int:
        return self.manifest["rows"]

    @functools.cached_property
    def _reader(self):
        return array_record_module.ArrayRecordReader(str(self.folder / ROWS), "")

    def __getitem__(self, index: int) -> Row:
        """Row `index` as a dict of arrays. Raises IndexError past the end."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return {name: column[0] for name, column in self.read([index]).items()}

    def read(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        """Rows stacked, in the order asked for; index -1 gives a row of padding."""
        wanted = [int(i) for i in indices]
        stored = [i for i in wanted if i >= 0]
        found = iter(self._reader.read(stored) if stored else [])
        padding = b"" if len(stored) == len(wanted) else self._padding
        return self._columns([next(found) if i >= 0 else padding for i in wanted])

    @functools.cached_property
    def _padding(self) -> bytes:
        row = empty_row(self.schema, self.manifest.get("pad_id", 0))
        return b"".join(row[name].tobytes() for name in self.schema)

    def columns(self, *names: str) -> dict[str, np.ndarray]:
        """Whole columns `[rows, ...]` of the named fields (all fields where none is named)."""
        if not len(self):
            return {n: np.zeros((0, *f.shape), f.dtype) for n, f in self.schema.items() if n in (names or self.schema)}
        return self._columns(self._reader.read_all(), names or None)

    def _columns(self, records: list[bytes], names: tuple[str, ...] | None = None) -> dict[str, np.ndarray]:
        table = np.frombuffer(b"".join(records), np.uint8).reshape(len(records), self._stride)
        columns, start = {}, 0
        for name, field in self.schema.items():
            width = np.dtype(field.dtype).itemsize * int(np.prod(field.shape))
            if names is None or name in names:
                piece = np.ascontiguousarray(table[:, start : start + width])
                columns[name] = piece.view(field.dtype).reshape(len(records), *field.shape)
            start += width
        return columns

    def where(self, source: str) -> np.ndarray:
        """Indices of the rows of one source, by its name in the manifest."""
        return np.flatnonzero(self.columns("source_id")["source_id"] == self.manifest["sources"].index(source))
