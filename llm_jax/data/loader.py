"""Batches of rows as a pure function of (seed, step): resuming is asking for the next step."""

import functools
from collections.abc import Iterator

import grain
import numpy as np
from jaxtyping import Int

from llm_jax.base.errors import UserError
from llm_jax.data.rowset import RowSet

PREFETCH = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)


class Loader:
    """Row `step * batch_size + j` of an endless stream is entry j of batch `step`.

    Shuffled, the stream is one permutation of all rows per epoch, each epoch its own. Unshuffled it is the rows in
    order, once, and then rows of padding (no targets), so that a last partial batch is exact.

    Of a mixture the shuffled stream is dealt out by weights (`data/mixture.py`).

    Args:
      rowset: the rows, or a part of them with `subset`.
      batch_size: rows per batch, over all microbatches.
      microbatches: k; arrays come as [k, batch_size / k, ...].
      seed: of the shuffling.
      shuffle: whether to shuffle.
      subset: int[m], the rows to use; None for all.

    Raises:
      UserError: microbatches do not divide batch_size, or there is no row.
    """

    def __init__(
        self,
        rowset: RowSet,
        batch_size: int,
        microbatches: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        subset: Int[np.ndarray, "m"] | None = None,
    ):
        if microbatches < 1 or batch_size < 1 or batch_size % microbatches:
            raise UserError(f"train.microbatches {microbatches} does not divide train.batch_size {batch_size}")
        self.rowset = rowset
        self.batch_size = batch_size
        self.microbatches = microbatches
        self.shuffle = shuffle
        self._rows = range(len(rowset)) if subset is None else np.asarray(subset)
        if not len(self._rows):
            raise UserError(f"{rowset.folder} has no rows")
        self._order = rowset.stream(seed, subset) if shuffle else None
        self._extras: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        """Batches that hold each row once; the last may be filled with the next epoch's rows, or with padding."""
        return -(-len(self._rows) // self.batch_size)

    def extra(self, name: str, array: np.ndarray) -> None:
        """Joins a further field to every batch: `array[i]` belongs to row i of the row set; padding rows get zeros."""
        if len(array) != len(self.rowset):
            raise ValueError(f"{name} has {len(array)} entries for {len(self.rowset)} rows")
        self._extras[name] = np.asarray(array)

    def indices(self, step: int) -> Int[np.ndarray, "batch"]:
        """Which rows of the row set make batch `step`; -1 is padding."""
        first = step * self.batch_size
        places = range(first, first + self.batch_size)
        if self._order is not None:
            return np.array([self._order[place] for place in places])
        return np.array([self._rows[place] if place < len(self._rows) else -1 for place in places])

    def batch(self, step: int, part: tuple[int, int] = (0, 1)) -> dict[str, np.ndarray]:
        """The fields of batch `step`, each `[microbatches, batch_size / microbatches, ...]`.

        `part=(i, n)`: the i-th of n equal, contiguous parts of each microbatch's rows; no other row is read.
        Raises ValueError where n does not divide them.
        """
        indices = self._part(self.indices(step), part)
        columns = self.rowset.read(indices.tolist())
        for name, array in self._extras.items():
            real = (indices >= 0).reshape(-1, *[1] * (array.ndim - 1))
            columns[name] = np.where(real, array[indices], np.zeros((), array.dtype))
        return {name: c.reshape(self.microbatches, -1, *c.shape[1:]) for name, c in columns.items()}

    def _part(self, indices: Int[np.ndarray, "batch"], part: tuple[int, int]) -> Int[np.ndarray, "rows"]:
        i, n = part
        rows = indices.reshape(self.microbatches, -1)
        if rows.shape[1] % n:
            raise ValueError(f"{n} parts do not divide the {rows.shape[1]} rows of a microbatch")
        return np.split(rows, n, axis=1)[i].ravel()

    def iterate(self, start: int, stop: int, part: tuple[int, int] = (0, 1)) -> Iterator[dict[str, np.ndarray]]:
        """Batches `start` to `stop` (exclusive) in order, read ahead by grain's threads; `part` as for `batch`."""
        read = functools.partial(self.batch, part=part)
        return iter(grain.MapDataset.range(start, stop).map(read).to_iter_dataset(PREFETCH))
