"""The fixed-shape rows that training reads: what is in them, and how sequences become them.

| field | type | meaning |
|---|---|---|
| tokens | int32[T] | ids; pad where segment_ids is 0 |
| segment_ids | int32[T] | 1, 2, ... per document, conversation or answer; 0 is padding |
| positions | int32[T] | from 0 in each segment |
| loss_mask | uint8[T] | 1 where the token itself is a target; never at a segment's first token |
| source_id | int32[] | which source (manifest `sources`) the row is from |
| num_bytes | int32[] | UTF-8 bytes of the tokens whose loss_mask is 1 |
| pair_id | int32[T] | preference: which pair of the row, 1 to P; 0 is padding |
| side | int32[T] | preference: 1 chosen, 2 rejected, 0 padding |
| pair_index | int32[P] | preference: the pair's number in the whole set; -1 where the row has fewer pairs |

A document that is cut (longer than a window, or wherever `concat_split` cuts) goes on as a segment of another row: its
positions begin at 0 again, it does not see what came before, and the first token after the cut is no target.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from llm_jax.data.encode import Sequence as TokenSequence

Row = dict[str, np.ndarray]


class Field(NamedTuple):
    """Type and shape of one field of a row."""

    dtype: str
    shape: tuple[int, ...]


Schema = dict[str, Field]


def lm_schema(window: int) -> Schema:
    """Fields of a pretraining or SFT row."""
    return {
        "tokens": Field("int32", (window,)),
        "segment_ids": Field("int32", (window,)),
        "positions": Field("int32", (window,)),
        "loss_mask": Field("uint8", (window,)),
        "source_id": Field("int32", ()),
        "num_bytes": Field("int32", ()),
    }


def pair_schema(window: int, max_pairs: int) -> Schema:
    """Fields of a preference row."""
    return {
        **lm_schema(window),
        "pair_id": Field("int32", (window,)),
        "side": Field("int32", (window,)),
        "pair_index": Field("int32", (max_pairs,)),
    }


def empty_row(schema: Mapping[str, Field], pad_id: int = 0) -> Row:
    """A row of padding: no segment, no target, no pair."""
    row = {name: np.zeros(field.shape, field.dtype) for name, field in schema.items()}
    row["tokens"][...] = pad_id
    if "pair_index" in row:
        row["pair_index"][...] = -1
    return row


def fill_row(
    schema: Mapping[str, Field], segments: Iterable[TokenSequence], token_bytes: np.ndarray, pad_id: int, source_id: int
) -> Row:
    """Lays segments one behind the other into a row.

    Args:
      schema: the row's fields.
      segments: at most a window in all.
      token_bytes: int32[V], UTF-8 bytes of each id.
      pad_id: fills the rest.
      source_id: the row's source.
    """
    row = empty_row(schema, pad_id)
    tokens, segment_ids, positions, loss_mask = (
        row[name] for name in ("tokens", "segment_ids", "positions", "loss_mask")
    )
    start = 0
    for number, segment in enumerate(segments, 1):
        stop = start + len(segment.ids)
        tokens[start:stop] = segment.ids
        segment_ids[start:stop] = number
        positions[start:stop] = np.arange(stop - start)
        loss_mask[start:stop] = segment.mask
        loss_mask[start] = 0
        start = stop
    row["source_id"][...] = source_id
    row["num_bytes"][...] = token_bytes[tokens[loss_mask == 1]].sum()
    return row


def fill_pair_row(
    schema: Mapping[str, Field],
    pairs: Sequence[tuple[int, TokenSequence, TokenSequence]],
    token_bytes: np.ndarray,
    pad_id: int,
    source_id: int,
) -> Row:
    """Lays whole pairs (number in the set, chosen, rejected) into a row: two segments each, chosen first."""
    segments = [side for _, *sides in pairs for side in sides]
    row = fill_row(schema, segments, token_bytes, pad_id, source_id)
    used = row["segment_ids"] > 0
    row["pair_id"][...] = np.where(used, (row["segment_ids"] + 1) // 2, 0)
    row["side"][...] = np.where(used, 2 - row["segment_ids"] % 2, 0)
    row["pair_index"][: len(pairs)] = [number for number, *_ in pairs]
    return row
