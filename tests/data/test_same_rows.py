"""The same thousand documents through every format give the same rows, token for token."""

import gzip
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from llm_jax.data.config import DataConfig
from llm_jax.data.prepare import prepare
from llm_jax.data.sources import read_records
from tests.data.readers.conftest import write_array_record, write_dataset_folder

FORMATS = ("text", "jsonl", "jsonl.gz", "parquet", "datasets", "arrayrecord", "arrayrecord of text", "seqio")


def documents(count: int, seed: int) -> list[str]:
    """Texts of very different lengths, up to some that fill several rows, with odd characters and no form feed."""
    rng = np.random.default_rng(seed)
    words = [
        "the",
        "model",
        "naïve",
        "日本語",
        "👩‍👩‍👧",
        "x = 1\n",
        "\t",
        "\u2028",
        "▁",
        "\r\n",
        '"quoted"',
        "{",
        "\x00",
        " ",
    ]
    lengths = np.minimum(rng.geometric(0.03, count), 900)
    return [" ".join(rng.choice(words, n)) + f" {seed}-{i}" for i, n in enumerate(lengths)]


def write(name: str, texts: list[str], folder, monkeypatch) -> str:
    """The texts in one format; the path to give to `data.path`."""
    folder.mkdir(parents=True)
    records = [{"text": text} for text in texts]
    table = pyarrow.Table.from_pylist(records)
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    match name:
        case "text":
            for number, text in enumerate(texts):
                (folder / f"{number:04d}.txt").write_bytes(text.encode())
            return str(folder)
        case "jsonl":
            (folder / "all.jsonl").write_text(lines, newline="")
        case "jsonl.gz":
            (folder / "all.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
        case "parquet":
            pyarrow.parquet.write_table(table, folder / "all.parquet", row_group_size=300)
        case "datasets":
            write_dataset_folder(folder / "saved", table, 3)
        case "arrayrecord":
            write_array_record(folder / "all.array_record", [json.dumps(record).encode() for record in records])
        case "arrayrecord of text":
            write_array_record(folder / "all.arrayrecord", [text.encode() for text in texts])
        case "seqio":
            (folder / "all").write_bytes("\f".join(texts).encode())
            monkeypatch.setenv("SEQIO_DOCUMENTS", str(folder / "all"))
            return "seqio:tests.data.readers.seqio_tasks:lj_documents"
    return str(folder)


@pytest.mark.parametrize("name", FORMATS)
def test_same_rows(tmp_path, monkeypatch, bpe, name):
    if name == "seqio":
        pytest.importorskip("seqio")
    texts, held_out = documents(1000, 0), documents(30, 1)
    eval_path = write("jsonl", held_out, tmp_path / "eval", monkeypatch)
    made = {}
    for kind in ("jsonl", name):
        path = write(kind, texts, tmp_path / "train" / kind / str(len(made)), monkeypatch)
        values = [record.value for record in read_records(path)]
        assert [value["text"] if isinstance(value, dict) else value.text for value in values] == texts
        data = DataConfig(path=path, eval_path=eval_path, window=128)
        made[kind] = prepare("pretrain", data, bpe, tmp_path / "rows" / str(len(made)))
    expected, found = made["jsonl"], made[name]
    assert len(found.train) == len(expected.train) > 200
    for split in ("train", "eval"):
        ours, theirs = getattr(found, split).columns(), getattr(expected, split).columns()
        for column, values in theirs.items():
            np.testing.assert_array_equal(ours[column], values, err_msg=f"{split} {column}")
    tokens = sum(len(bpe.encode(text)) + 2 for text in texts)
    assert int((expected.train.columns("segment_ids")["segment_ids"] > 0).sum()) == tokens
