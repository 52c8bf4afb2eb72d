"""Parquet files."""

import contextlib
from collections.abc import Iterator
from typing import Any

from llm_jax.base.errors import UserError
from llm_jax.data.readers.base import FileReader, Record
from llm_jax.data.readers.tables import arrow, rows

# Rows turned into Python values at a time: rows may be whole books.
BATCH_ROWS = 64
# Read of a column at a time; without it, or with `pre_buffer`, pyarrow reads a row group's column whole.
BUFFER_BYTES = 1 << 20


class ParquetFile(FileReader):
    """A row is a record. Row groups before `start` are not read."""

    suffixes = (".parquet",)

    def records(self, start: int = 0) -> Iterator[Record]:
        with self._opened() as table:
            first, groups = 0, []
            for group in range(table.num_row_groups):
                size = table.metadata.row_group(group).num_rows
                if not groups and first + size <= start:
                    first += size
                else:
                    groups.append(group)
            if not groups:
                return
            for batch in table.iter_batches(BATCH_ROWS, row_groups=groups, use_threads=False):
                if first + batch.num_rows > start:
                    yield from rows(batch, str(self.file), first, start)
                first += batch.num_rows

    def count(self) -> int:
        with self._opened() as table:
            return table.metadata.num_rows

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Any]:
        pyarrow = arrow(f"{self.file}, a Parquet file,")
        from pyarrow import parquet

        try:
            with self.file.open("rb") as raw:
                yield parquet.ParquetFile(raw, buffer_size=BUFFER_BYTES, pre_buffer=False)
        except (pyarrow.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"{self.file} is not a whole Parquet file: {reason}") from None
