"""Rows on disk: ArrayRecord shards and a manifest that is written last. A row is addressed by an integer."""

import functools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import grain
import numpy as np
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]
from etils import epath

from llm_jax.base.errors import UserError
from llm_jax.data.rows import Field, Row, Schema, empty_row
from llm_jax.storage.atomic import write_atomically

FORMAT = 2
GROUP_BYTES = 1 << 18
MANIFEST = "manifest.json"
# Shards whose files are held open at a time, far below what a process may have.
OPEN_SHARDS = 128
# Read at a time where whole columns are wanted.
PIECE_ROWS = 8192


class Order(Protocol):
    """Rows in an order, by place."""

    def __getitem__(self, place: int, /) -> int: ...


def write_rowset(
    folder: str | os.PathLike[str], rows: Iterable[Row], schema: Schema, manifest: Mapping[str, Any]
) -> None:
    """Writes rows as one shard, then the manifest; a folder without a manifest is unfinished and is written anew.

    Args:
      folder: made if absent.
      rows: dicts of arrays as the schema says.
      schema: fields of a row, in the order they are stored.
      manifest: JSON values kept beside the rows (`format`, `rows`, `shards` and `schema` are added).
    """
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_manifest(folder, [write_shard(folder, 0, rows, schema)], schema, manifest)


def write_shard(folder: epath.Path, number: int, rows: Iterable[Row], schema: Schema) -> int:
    """Writes one shard, over one that is there, and to the disk itself. Returns how many rows it has."""
    # Up to 16 rows are compressed together, to about a sixteenth; of long rows fewer, since a read unpacks a group.
    group = min(16, max(1, GROUP_BYTES // _stride(schema)))
    file = str(folder / shard_name(number))
    writer = array_record_module.ArrayRecordWriter(file, f"group_size:{group},zstd:1")
    count = 0
    for row in rows:
        writer.write(b"".join(np.asarray(row[name], field.dtype).tobytes() for name, field in schema.items()))
        count += 1
    writer.close()
    with open(file, "rb") as f:
        os.fsync(f.fileno())
    return count


def write_manifest(folder: epath.Path, shards: Sequence[int], schema: Schema, manifest: Mapping[str, Any]) -> None:
    """Commits shards, given how many rows each has."""
    fields = {name: [field.dtype, field.shape] for name, field in schema.items()}
    stored = {"format": FORMAT, **manifest, "rows": sum(shards), "shards": list(shards), "schema": fields}
    write_atomically(folder / MANIFEST, json.dumps(stored, indent=2) + "\n")


def shard_name(number: int) -> str:
    return f"rows-{number:05d}.array_record"


def _stride(schema: Schema) -> int:
    """Bytes of a row."""
    return sum(np.dtype(field.dtype).itemsize * int(np.prod(field.shape)) for field in schema.values())


class RowSet:
    """The rows of a folder that has a manifest.

    Of one shard, rows are numbered as they are stored, and the builder shuffled them; of several, by one fixed
    permutation of all. So any run of rows is a sample of all.

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
        self._firsts = np.cumsum([0, *self.manifest["shards"]])
        one_shard = len(self.manifest["shards"]) <= 1
        self._stored: Any = range(len(self)) if one_shard else grain.MapDataset.range(len(self)).seed(0).shuffle()
        self._reader = functools.lru_cache(OPEN_SHARDS)(self._open)

    def __len__(self) -> int:
        return self.manifest["rows"]

    def _open(self, shard: int) -> Any:
        # Rows are asked for here and there: to read ahead would cost memory, 16 MB a shard, and gain nothing.
        return array_record_module.ArrayRecordReader(str(self.folder / shard_name(shard)), "readahead_buffer_size:0")

    def __getitem__(self, index: int) -> Row:
        """Row `index` as a dict of arrays. Raises IndexError past the end."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return {name: column[0] for name, column in self.read([index]).items()}

    def stream(self, seed: int, subset: Sequence[int] | np.ndarray | None = None) -> Order:
        """An endless order for training: one permutation of all rows (or the subset's) per epoch, each its own."""
        rows = range(len(self)) if subset is None else subset
        return Shuffled(rows, seed)

    def read(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        """Rows stacked, in the order asked for; index -1 gives a row of padding."""
        padding = self._padding if any(i < 0 for i in indices) else b""
        records = [padding] * len(indices)
        places = [place for place, i in enumerate(indices) if i >= 0]
        stored = [self._stored[int(indices[place])] for place in places]
        for place, record in zip(places, self._records(stored), strict=True):
            records[place] = record
        return self._columns(records)

    def _records(self, stored: Sequence[int]) -> list[bytes]:
        """Rows by where they are stored, in the order asked for."""
        rows = np.asarray(stored, np.int64)
        shards = np.searchsorted(self._firsts, rows, "right") - 1
        records: list[bytes] = [b""] * len(rows)
        for shard in np.unique(shards).tolist():
            places = np.flatnonzero(shards == shard)
            found = self._reader(shard).read((rows[places] - self._firsts[shard]).tolist())
            for place, record in zip(places.tolist(), found, strict=True):
                records[place] = record
        return records

    @functools.cached_property
    def _padding(self) -> bytes:
        row = empty_row(self.schema, self.manifest.get("pad_id", 0))
        return b"".join(row[name].tobytes() for name in self.schema)

    def columns(self, *names: str) -> dict[str, np.ndarray]:
        """Whole columns `[rows, ...]` of the named fields (all fields where none is named)."""
        count = len(self)
        fields = {n: f for n, f in self.schema.items() if n in (names or self.schema)}
        columns = {name: np.empty((count, *field.shape), field.dtype) for name, field in fields.items()}
        # In the order they are stored in, so that each group is unpacked once.
        stored = np.fromiter((self._stored[i] for i in range(count)), np.int64, count)
        order = np.argsort(stored)
        for start in range(0, count, PIECE_ROWS):
            places = order[start : start + PIECE_ROWS]
            piece = self._columns(self._records(stored[places].tolist()), tuple(fields))
            for name, column in piece.items():
                columns[name][places] = column
        return columns

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


class Shuffled:
    """Rows by place in an endless stream: one permutation per epoch, each epoch its own."""

    def __init__(self, rows: Sequence[int] | np.ndarray, seed: int):
        self._rows = rows
        # grain's shuffle is a permutation computed index by index: no list of the whole order is held.
        self._order: Any = grain.MapDataset.range(len(rows)).seed(seed).shuffle().repeat(reseed_each_epoch=True)

    def __getitem__(self, place: int) -> int:
        return int(self._rows[self._order[place]])
