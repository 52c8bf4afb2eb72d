import numpy as np

from llm_jax.data.encode import Sequence
from llm_jax.data.fitting import Item
from llm_jax.data.rows import empty_row, fill_pair_row, fill_row, lm_schema, pair_schema, steps_schema


def sequence(ids, mask):
    return Sequence(np.array(ids, np.int32), np.array(mask, np.uint8))


BYTES = np.arange(20, dtype=np.int32)


def test_lm_row():
    row = fill_row(lm_schema(8), [sequence([5, 6, 7], [1, 1, 1]), sequence([8, 9], [0, 1])], BYTES, 3, 2)
    assert row["tokens"].tolist() == [5, 6, 7, 8, 9, 3, 3, 3]
    assert row["segment_ids"].tolist() == [1, 1, 1, 2, 2, 0, 0, 0]
    assert row["positions"].tolist() == [0, 1, 2, 0, 1, 0, 0, 0]
    assert row["loss_mask"].tolist() == [0, 1, 1, 0, 1, 0, 0, 0]  # nothing predicts a segment's first token
    assert (int(row["source_id"]), int(row["num_bytes"])) == (2, 6 + 7 + 9)
    assert {name: (str(array.dtype), array.shape) for name, array in row.items()} == {
        name: tuple(field) for name, field in lm_schema(8).items()
    }


def test_pair_row():
    chosen, rejected = sequence([5, 6, 7], [0, 1, 1]), sequence([5, 8], [0, 1])
    pairs = [(41, Item((chosen, rejected))), (7, Item((rejected, rejected)))]
    row = fill_pair_row(pair_schema(10, 3), pairs, BYTES, 0, 0)
    assert row["segment_ids"].tolist() == [1, 1, 1, 2, 2, 3, 3, 4, 4, 0]
    assert row["pair_id"].tolist() == [1, 1, 1, 1, 1, 2, 2, 2, 2, 0]
    assert row["side"].tolist() == [1, 1, 1, 2, 2, 1, 1, 2, 2, 0]
    assert row["pair_index"].tolist() == [41, 7, -1]
    assert row["loss_mask"].tolist() == [0, 1, 1, 0, 1, 0, 1, 0, 1, 0]


def test_empty_row_has_no_target():
    row = empty_row(pair_schema(4, 2), pad_id=9)
    assert row["tokens"].tolist() == [9] * 4 and row["pair_index"].tolist() == [-1, -1]
    assert not any(row[name].any() for name in ("segment_ids", "loss_mask", "pair_id", "side"))
    # Class 0 is a class.
    assert (empty_row(steps_schema(4))["step_label"] == -1).all()
