import collections

import numpy as np
import pytest

from llm_jax.data.config import DataConfig, SourceConfig
from llm_jax.data.loader import Loader
from llm_jax.data.mixture import MixedRows
from llm_jax.data.prepare import open_rows, prepare

WEIGHTS = {"wiki": 0.6, "books": 0.3, "code": 0.1}


@pytest.fixture(scope="module")
def mixed(bpe, tmp_path_factory):
    """Three sources of quite other sizes than their weights, and the folder they are mixed in."""
    folder = tmp_path_factory.mktemp("mixed")
    sources = []
    for name, documents in (("wiki", 120), ("books", 400), ("code", 30)):
        path = folder / f"{name}.jsonl"
        lines = (f'{{"text": "{name} {i} {"word " * (i * 5 % 17)}"}}\n' for i in range(documents))
        path.write_text("".join(lines))
        sources.append(SourceConfig(str(path), WEIGHTS[name]))
    data = DataConfig(mixture=tuple(sources), window=32, eval_fraction=0.15)
    return prepare("pretrain", data, bpe, folder / "run", folder / "sets"), data, folder


def sources_of(rows, indices):
    names = rows.manifest["sources"]
    return [names[i] for i in rows.read(indices)["source_id"].tolist()]


def test_shares_over_ten_thousand_rows(mixed):
    rows = mixed[0].train
    loader = Loader(rows, 8, 2, seed=3)
    stream = np.concatenate([loader.indices(step) for step in range(1250)])
    counts = collections.Counter(sources_of(rows, stream.tolist()))
    for name, weight in WEIGHTS.items():
        assert counts[name] / len(stream) == pytest.approx(weight, abs=1e-4)
    # A source is gone through in epochs: none of its rows comes a second time before all have come once.
    for source in range(3):
        own = [i for i in stream if rows._starts[source] <= i < rows._starts[source + 1]]
        size = rows._starts[source + 1] - rows._starts[source]
        for start in range(0, len(own) - size, size):
            assert len(set(own[start : start + size])) == size


def test_the_stream_is_a_function_of_the_step(mixed):
    """Resuming, other batch sizes, and one, two or four processes: the same rows in the same order."""
    rows = mixed[0].train
    loader = Loader(rows, 8, 2, seed=1)
    resumed = list(Loader(open_rows(mixed[2] / "run", "train"), 8, 2, seed=1).iterate(20, 23))
    for step, batch in zip(range(20, 23), resumed, strict=True):
        for name, array in loader.batch(step).items():
            np.testing.assert_array_equal(array, batch[name])
            for parts in (1, 2, 4):
                read = [loader.batch(step, (i, parts))[name] for i in range(parts)]
                np.testing.assert_array_equal(np.concatenate(read, axis=1), array)
    np.testing.assert_array_equal(
        np.concatenate([Loader(rows, 4, seed=1).indices(s) for s in (4, 5)]), loader.indices(2)
    )


def test_held_out_rows_come_once_each_and_by_weights(mixed):
    rows = mixed[0].eval
    loader = Loader(rows, 4, shuffle=False)
    indices = np.concatenate([loader.indices(step) for step in range(len(loader))])
    assert indices[: len(rows)].tolist() == list(range(len(rows)))
    texts = [tuple(row) for row in rows.columns("tokens")["tokens"].tolist()]
    assert isinstance(rows, MixedRows)
    assert collections.Counter(texts) == collections.Counter(
        tuple(row) for part in rows._sets for row in part.columns("tokens")["tokens"].tolist()
    )
    columns = rows.columns()
    for name, array in rows.read(range(len(rows))).items():
        np.testing.assert_array_equal(columns[name], array)
    early = collections.Counter(sources_of(rows, range(10)))
    assert all(abs(early[name] - 10 * weight) <= 1 for name, weight in WEIGHTS.items())


def test_each_source_is_packed_on_its_own_and_shared(mixed, bpe):
    prepared, data, folder = mixed
    counts = prepared.summary["train"]["sources"]
    assert list(counts) == list(WEIGHTS) and [counts[n]["share"] for n in counts] == list(WEIGHTS.values())
    for field in ("rows", "tokens", "documents"):
        assert prepared.summary["train"][field] == sum(source[field] for source in counts.values())
    assert len(list((folder / "sets").iterdir())) == 3
    alone = DataConfig(path=data.mixture[1].path, window=32, eval_fraction=0.15)
    books = prepare("pretrain", alone, bpe, folder / "alone", folder / "sets")
    assert len(list((folder / "sets").iterdir())) == 3
    assert len(books.train) == counts["books"]["rows"] == len(prepared.train.where("books"))


def test_pairs_of_sets_with_fewer_per_row(bpe, tmp_path, write_jsonl):
    short = [{"prompt": "q", "chosen": f"{i}", "rejected": "b"} for i in range(40)]
    long = [{"prompt": "q", "chosen": f"{i} long answer", "rejected": "another long answer"} for i in range(20)]
    sources = [SourceConfig(write_jsonl(*r, name=f"{n}.jsonl")) for n, r in (("short", short), ("long", long))]
    data = DataConfig(mixture=tuple(sources), window=96, eval_fraction=0.1)
    rows = prepare("preference", data, bpe, tmp_path / "run").train
    assert isinstance(rows, MixedRows)
    most = [one.schema["pair_index"].shape[0] for one in rows._sets]
    assert most[0] > most[1] and rows.schema["pair_index"].shape == (most[0],)
    batch = Loader(rows, 8).batch(0)
    fewer = batch["pair_index"][0][batch["source_id"][0] == 1]
    assert len(fewer) == 4 and (fewer[:, most[1] :] == -1).all()
    assert (batch["pair_id"].max(-1) == (batch["pair_index"] >= 0).sum(-1)).all()
