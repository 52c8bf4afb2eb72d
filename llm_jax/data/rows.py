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
| visible | int32[T, 2] | preference with shared prompts: places [start, end) of the row that the token sees, as far as
their positions are not beyond its own; the shared tokens are of the rejected side's segment (`data/sharing.py`) |
| pair_index | int32[P] | preference: the pair's number in the whole set; -1 where the row has fewer pairs |
| weight | float32[P] | of the pair's (or unpaired answer's) loss: 1 where its record has none; 0 for no pair |
| chosen_score, rejected_score, margin, label_smoothing | float32[P] | preference: the record's; NaN where it has none |
| answer_index | int32[P] | unpaired: the number in the whole set of the answer whose segment is p + 1; -1 for none |
| label | uint8[P] | unpaired: 1 where the answer is desirable |
| label | int32[P] | labelled: the class of the text whose segment is p + 1 |
| ranking_index | int32[P] | ranking: its number in the whole set; -1 where the row has fewer |
| ranking_id | int32[A] | ranking: of the answer whose segment is a + 1, which ranking of the row it is of; 0 for none;
the answers of one stand in order, the best first |
| step_label | int32[T] | steps: the step's class at its last token, -1 elsewhere |
| kl_tokens, kl_segment_ids, kl_positions, kl_loss_mask | as above | unpaired: the same prompts, each with an answer
that was given to another one |

A document that is cut (longer than a window, or wherever `concat_split` cuts) goes on as a segment of another row: its
positions begin at 0 again, it does not see what came before, and the first token after the cut is no target.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from llm_jax.data.encode import Sequence as TokenSequence
from llm_jax.data.fitting import Item

Row = dict[str, np.ndarray]


# A record's own numbers, and what stands for one it does not have.
PAIR_COLUMNS = {
    "weight": 1.0,
    "chosen_score": np.nan,
    "rejected_score": np.nan,
    "margin": np.nan,
    "label_smoothing": np.nan,
}
NUMBERED = ("pair_index", "answer_index", "ranking_index")
LAID = ("tokens", "segment_ids", "positions", "loss_mask")


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


def pair_schema(window: int, max_pairs: int, share: bool = False) -> Schema:
    """Fields of a preference row; with `share` also `visible`."""
    return {
        **lm_schema(window),
        **({"visible": Field("int32", (window, 2))} if share else {}),
        "pair_id": Field("int32", (window,)),
        "side": Field("int32", (window,)),
        "pair_index": Field("int32", (max_pairs,)),
        **{name: Field("float32", (max_pairs,)) for name in PAIR_COLUMNS},
    }


def unpaired_schema(window: int, max_answers: int, mismatched: bool) -> Schema:
    """Fields of a row of unpaired answers, each its own segment; with `mismatched` also the fields `kl_…`."""
    lm = lm_schema(window)
    beside = {f"kl_{name}": lm[name] for name in LAID} if mismatched else {}
    return {
        **lm,
        **beside,
        "answer_index": Field("int32", (max_answers,)),
        "label": Field("uint8", (max_answers,)),
        "weight": Field("float32", (max_answers,)),
    }


def labelled_schema(window: int, max_answers: int) -> Schema:
    """Fields of a row of texts, each its own segment and of a class."""
    fields = {name: Field("int32", (max_answers,)) for name in ("answer_index", "label")}
    return {**lm_schema(window), **fields}


def ranking_schema(window: int, max_rankings: int, max_answers: int) -> Schema:
    """Fields of a row of rankings, each answer its own segment; `max_answers` in a row."""
    ids = {"ranking_index": Field("int32", (max_rankings,)), "ranking_id": Field("int32", (max_answers,))}
    return {**lm_schema(window), **ids}


def steps_schema(window: int) -> Schema:
    """Fields of a row of answers judged step by step, each its own segment."""
    return {**lm_schema(window), "step_label": Field("int32", (window,))}


def empty_row(schema: Mapping[str, Field], pad_id: int = 0) -> Row:
    """A row of padding: no segment, no target, no pair, no judged step."""
    row = {name: np.zeros(field.shape, field.dtype) for name, field in schema.items()}
    for name in {"tokens", "kl_tokens"} & row.keys():
        row[name][...] = pad_id
    for name in row.keys() & {*NUMBERED, "step_label"}:
        row[name][...] = -1
    return row


def fill_labelled_row(
    schema: Mapping[str, Field],
    texts: Sequence[tuple[int, TokenSequence, Mapping[str, float]]],
    token_bytes: np.ndarray,
    pad_id: int,
    source_id: int,
) -> Row:
    """Lays texts (number in the set, the text, its `label`) into a row."""
    row = fill_row(schema, [text for _, text, _ in texts], token_bytes, pad_id, source_id)
    row["answer_index"][: len(texts)] = [number for number, *_ in texts]
    row["label"][: len(texts)] = [columns["label"] for *_, columns in texts]
    return row


def fill_ranking_row(
    schema: Mapping[str, Field],
    rankings: Sequence[tuple[int, Sequence[TokenSequence]]],
    token_bytes: np.ndarray,
    pad_id: int,
    source_id: int,
) -> Row:
    """Lays rankings (number in the set, the answers, best first) into a row."""
    row = fill_row(schema, [one for _, answers in rankings for one in answers], token_bytes, pad_id, source_id)
    row["ranking_index"][: len(rankings)] = [number for number, _ in rankings]
    ids = [i for i, (_, answers) in enumerate(rankings, 1) for _ in answers]
    row["ranking_id"][: len(ids)] = ids
    return row


def fill_steps_row(
    schema: Mapping[str, Field],
    answers: Sequence[tuple[TokenSequence, Mapping[str, float]]],
    token_bytes: np.ndarray,
    pad_id: int,
    source_id: int,
) -> Row:
    """Lays answers with the classes of their steps, `step_0`, `step_1`, …, into a row; of a cut one the first steps."""
    row = fill_row(schema, [one for one, _ in answers], token_bytes, pad_id, source_id)
    labels = [columns[f"step_{i}"] for one, columns in answers for i in range(int(one.mask.sum()))]
    row["step_label"][row["loss_mask"] == 1] = labels
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
    _lay(row, ((segment, 0) for segment in segments))
    _count(row, token_bytes, source_id)
    return row


def _count(row: Row, token_bytes: np.ndarray, source_id: int) -> None:
    row["source_id"][...] = source_id
    row["num_bytes"][...] = token_bytes[row["tokens"][row["loss_mask"] == 1]].sum()


def _lay(row: Row, segments: Iterable[tuple[TokenSequence, int]], prefix: str = "") -> None:
    """Segments, each without so many of its first tokens, which stand elsewhere in the row."""
    tokens, segment_ids, positions, loss_mask = (row[prefix + name] for name in LAID)
    start = 0
    for number, (segment, first) in enumerate(segments, 1):
        stop = start + len(segment.ids) - first
        tokens[start:stop] = segment.ids[first:]
        segment_ids[start:stop] = number
        positions[start:stop] = np.arange(first, len(segment.ids))
        loss_mask[start:stop] = segment.mask[first:]
        loss_mask[start] = 0
        start = stop


def fill_pair_row(
    schema: Mapping[str, Field],
    pairs: Sequence[tuple[int, Item]],
    token_bytes: np.ndarray,
    pad_id: int,
    source_id: int,
) -> Row:
    """Lays whole pairs (number in the set; chosen and rejected) into a row: two segments each, chosen first."""
    row = empty_row(schema, pad_id)
    _lay(row, (one for _, item in pairs for one in zip(item.sequences, (item.shared, 0), strict=True)))
    _count(row, token_bytes, source_id)
    if "visible" in schema:
        _show(row["visible"], [item for _, item in pairs])
    used = row["segment_ids"] > 0
    row["pair_id"][...] = np.where(used, (row["segment_ids"] + 1) // 2, 0)
    row["side"][...] = np.where(used, 2 - row["segment_ids"] % 2, 0)
    row["pair_index"][: len(pairs)] = [number for number, *_ in pairs]
    for name, default in PAIR_COLUMNS.items():
        row[name][: len(pairs)] = [item.columns.get(name, default) for _, item in pairs]
    return row


def _show(visible: np.ndarray, pairs: Sequence[Item]) -> None:
    """What tokens see, see `data/sharing.py`; padding sees nothing."""
    start = 0
    for item in pairs:
        chosen, rejected = (len(sequence.ids) for sequence in item.sequences)
        middle = start + chosen - item.shared
        visible[start:middle] = start, middle + item.shared
        visible[middle : middle + item.shared] = middle, middle + item.shared
        start, before = middle + rejected, middle
        visible[before + item.shared : start] = before, start


def fill_unpaired_row(
    schema: Mapping[str, Field],
    answers: Sequence[tuple[int, Sequence[TokenSequence], Mapping[str, float]]],
    token_bytes: np.ndarray,
    pad_id: int,
    source_id: int,
) -> Row:
    """Lays unpaired answers (number in the set, the answer and perhaps its mismatched one, numbers) into a row."""
    row = fill_row(schema, [own for _, (own, *_), _ in answers], token_bytes, pad_id, source_id)
    if "kl_tokens" in schema:
        _lay(row, ((other, 0) for _, (_, other), _ in answers), "kl_")
    row["answer_index"][: len(answers)] = [number for number, *_ in answers]
    row["label"][: len(answers)] = [columns["label"] for *_, columns in answers]
    row["weight"][: len(answers)] = [columns.get("weight", 1.0) for *_, columns in answers]
    return row
