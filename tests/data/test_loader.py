import numpy as np
import pytest

from llm_jax.base.errors import UserError
from llm_jax.data.loader import Loader
from llm_jax.data.rows import empty_row, pair_schema
from llm_jax.data.rowset import RowSet, write_rowset

SCHEMA = pair_schema(6, 2)


@pytest.fixture(scope="module")
def rowset(tmp_path_factory):
    rows = []
    for i in range(22):
        row = empty_row(SCHEMA)
        row["tokens"][:] = np.arange(6) + 100 * i
        row["source_id"][...] = i % 2
        row["loss_mask"][1:] = 1
        row["pair_index"][0] = i
        rows.append(row)
    folder = tmp_path_factory.mktemp("rows")
    write_rowset(folder, rows, SCHEMA, {"sources": ["even", "odd"], "pad_id": 5})
    return RowSet(folder)


def test_rows_come_back(rowset):
    assert len(rowset) == 22
    for i in (0, 7, 21):
        row = rowset[i]
        assert row["tokens"].tolist() == (np.arange(6) + 100 * i).tolist()
        assert {n: (str(a.dtype), a.shape) for n, a in row.items()} == {n: tuple(f) for n, f in SCHEMA.items()}
    with pytest.raises(IndexError):
        rowset[22]
    assert rowset.columns("tokens")["tokens"].shape == (22, 6)
    assert set(rowset.columns()) == set(SCHEMA)
    assert rowset.where("odd").tolist() == list(range(1, 22, 2))


def test_unfinished_and_unknown_row_sets(tmp_path):
    with pytest.raises(UserError, match="no finished row set"):
        RowSet(tmp_path)
    write_rowset(tmp_path, [], SCHEMA, {})
    assert len(RowSet(tmp_path)) == 0 and RowSet(tmp_path).columns("tokens")["tokens"].shape == (0, 6)
    file = tmp_path / "manifest.json"
    file.write_text(file.read_text().replace('"format": 2', '"format": 99'))
    with pytest.raises(UserError, match="row format 99 is not known"):
        RowSet(tmp_path)


def test_each_epoch_is_a_permutation_of_its_own(rowset):
    loader = Loader(rowset, batch_size=2, seed=3)
    epochs = [np.concatenate([loader.indices(11 * e + s) for s in range(11)]) for e in range(3)]
    assert all(sorted(epoch) == list(range(22)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert not np.array_equal(epochs[0], np.concatenate([Loader(rowset, 2, seed=4).indices(s) for s in range(11)]))


def test_batches_are_a_function_of_seed_and_step(rowset):
    loader, again = Loader(rowset, 4, 2, seed=1), Loader(rowset, 4, 2, seed=1)
    ahead = list(loader.iterate(5, 12))
    assert len(ahead) == 7
    for step, batch in zip(range(5, 12), ahead, strict=True):
        for name, array in again.batch(step).items():
            assert array.shape[:2] == (2, 2)
            np.testing.assert_array_equal(array, batch[name])
    # Another number of microbatches, or of rows per batch, cuts the same stream.
    np.testing.assert_array_equal(
        np.concatenate([Loader(rowset, 2, seed=1).indices(s) for s in (4, 5)]), loader.indices(2)
    )


def test_unshuffled_is_each_row_once_then_padding(rowset):
    loader = Loader(rowset, batch_size=8, microbatches=2, shuffle=False)
    assert len(loader) == 3
    assert np.concatenate([loader.indices(s) for s in range(3)]).tolist() == [*range(22), -1, -1]
    last = loader.batch(2)
    assert last["tokens"][1, 3].tolist() == [5] * 6 and last["pair_index"][1, 3].tolist() == [-1, -1]
    assert last["loss_mask"].sum() == 6 * 5


def test_extra_field_and_subset(rowset):
    loader = Loader(rowset, 4, shuffle=False, subset=rowset.where("odd"))
    loader.extra("ref_logps", np.arange(44, dtype=np.float32).reshape(22, 2))
    batch = loader.batch(2)
    assert batch["pair_index"][0, :, 0].tolist() == [17, 19, 21, -1]
    assert batch["ref_logps"][0].tolist() == [[34, 35], [38, 39], [42, 43], [0, 0]]
    with pytest.raises(ValueError, match="3 entries for 22 rows"):
        loader.extra("x", np.zeros(3))


def test_bad_sizes(rowset):
    with pytest.raises(UserError, match="microbatches 3 does not divide train.batch_size 4"):
        Loader(rowset, 4, 3)
    with pytest.raises(UserError, match="has no rows"):
        Loader(rowset, 4, subset=np.array([], int))


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("shuffle", [True, False])
def test_parts_of_the_rows_of_each_microbatch(rowset, parts, shuffle):
    loader = Loader(rowset, 16, microbatches=2, seed=3, shuffle=shuffle)
    loader.extra("weight", np.arange(22) + 0.5)
    for step in (0, 1):
        whole = loader.batch(step)
        read = [loader.batch(step, (i, parts)) for i in range(parts)]
        ahead = [next(loader.iterate(step, step + 1, (i, parts))) for i in range(parts)]
        for name, array in whole.items():
            np.testing.assert_array_equal(np.concatenate([part[name] for part in read], axis=1), array)
            np.testing.assert_array_equal(np.concatenate([part[name] for part in ahead], axis=1), array)
    with pytest.raises(ValueError, match="3 parts do not divide the 8 rows"):
        loader.batch(0, (0, 3))
