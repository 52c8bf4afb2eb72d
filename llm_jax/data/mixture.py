"""Several row sets as one, each with its share of the stream."""

from collections.abc import Mapping, Sequence

import numpy as np

from llm_jax.data.rows import NUMBERED, Schema
from llm_jax.data.rowset import Order, RowSet, Shuffled
from llm_jax.data.shares import Shares


class MixedRows(RowSet):
    """Row sets side by side: `source_id` says which one a row is from, by its number in the mixture.

    For training (`stream`), row i of the stream is from the source that `Shares` says, in an order of that source's
    own, again and again if it runs out. In order (evaluation), every row comes once, and the sources by their weights
    for as long as they last.

    Args:
      sets: by name; all of one kind, window and tokenizer.
      weights: of rows, by name.
      in_turn: numbers rows by turns as above; without it one set comes behind the other, for sets of any size.
    """

    def __init__(self, sets: Mapping[str, RowSet], weights: Mapping[str, float], in_turn: bool = False):
        self._sets = list(sets.values())
        self.folder = self._sets[0].folder
        self.weights = dict(weights)
        lengths = [len(rows) for rows in self._sets]
        first = self._sets[0]
        self.manifest = {**first.manifest, "sources": list(sets), "rows": sum(lengths)}
        # How many pairs (or answers) a row may have differs from set to set.
        widest = max(self._sets, key=lambda rows: _most(rows.schema))
        self.schema = widest.schema
        self._starts = np.cumsum([0, *lengths])
        self._turns = self._by_turns(lengths) if in_turn else None

    def _by_turns(self, lengths: Sequence[int]) -> np.ndarray:
        due = [(np.arange(n) + 0.5) / w for n, w in zip(lengths, self.weights.values(), strict=True)]
        return np.argsort(np.concatenate(due), kind="stable")

    def stream(self, seed: int, subset: Sequence[int] | np.ndarray | None = None) -> Order:
        if subset is not None or self._turns is not None:
            return super().stream(seed, subset)
        return _Mixed(
            [Shuffled(range(len(rows)), seed) for rows in self._sets], self._starts, Shares([*self.weights.values()])
        )

    def read(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        wanted = np.asarray(indices, np.int64)
        rows = wanted if self._turns is None else np.where(wanted < 0, -1, self._turns[wanted])
        # Padding is alike in all sets.
        numbers = np.where(rows < 0, 0, np.searchsorted(self._starts, rows, "right") - 1)
        columns = {name: np.empty((len(rows), *field.shape), field.dtype) for name, field in self.schema.items()}
        for number in np.unique(numbers).tolist():
            places = np.flatnonzero(numbers == number)
            local = np.where(rows[places] < 0, -1, rows[places] - self._starts[number])
            self._put(columns, places, number, self._sets[number].read(local.tolist()))
        return columns

    def columns(self, *names: str) -> dict[str, np.ndarray]:
        wanted = names or tuple(self.schema)
        columns = {name: np.empty((len(self), *self.schema[name].shape), self.schema[name].dtype) for name in wanted}
        rows = np.arange(len(self)) if self._turns is None else np.argsort(self._turns)  # where each one is put
        for number, one in enumerate(self._sets):
            places = rows[self._starts[number] : self._starts[number + 1]]
            self._put(columns, places, number, one.columns(*wanted))
        return columns

    def _put(
        self, columns: dict[str, np.ndarray], places: np.ndarray, number: int, found: dict[str, np.ndarray]
    ) -> None:
        for name, column in found.items():
            if name == "source_id":
                column = np.full_like(column, number)
            elif column.ndim == 2 and column.shape[1] < columns[name].shape[1]:
                more = columns[name].shape[1] - column.shape[1]
                column = np.pad(column, ((0, 0), (0, more)), constant_values=-1 if name in NUMBERED else 0)
            columns[name][places] = column


def _most(schema: Schema) -> int:
    """How many pairs or answers a row may have."""
    return next((schema[name].shape[0] for name in NUMBERED if name in schema), 0)


class _Mixed:
    def __init__(self, orders: Sequence[Order], starts: np.ndarray, shares: Shares):
        self._orders, self._starts, self._shares = orders, starts, shares

    def __getitem__(self, place: int) -> int:
        source, row = self._shares.at(place)
        return int(self._starts[source]) + self._orders[source][row]
