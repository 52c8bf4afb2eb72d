"""Every format gives the same records, from the first or from any other on, and names what is wrong with a file."""

import json
import pathlib
from collections.abc import Callable

import pyarrow
import pyarrow.parquet
import pytest

from llm_jax.base.errors import UserError
from llm_jax.data.examples import Text
from llm_jax.data.sources import list_files, open_source, read_records, source_hashes
from tests.data.readers.conftest import RECORDS, write_array_record, write_dataset_folder, write_stream

FORMATS = ("jsonl", "parquet", "dataset", "stream.arrow", "file.arrow", "rows.array_record")


@pytest.mark.parametrize("name", FORMATS)
def test_records_from_any_start(everywhere, name):
    path = everywhere[name]
    assert [record.value for record in read_records(path)] == RECORDS
    assert sum(reader.count() for reader in open_source(path)) == 1000
    for start in (1, 63, 64, 299, 300, 301, 399, 400, 450, 999):
        found = list(read_records(path, start=start))
        assert [record.value for record in found] == RECORDS[start:]
    whole = [record.where for record in read_records(path)]
    assert [record.where for record in read_records(path, start=555)] == whole[555:] and len(set(whole)) == 1000
    assert [r.value["id"] for r in read_records(path, max_records=420, start=410)] == list(range(410, 420))
    assert list(read_records(path, start=1000)) == [] == list(read_records(path, max_records=3, start=3))


def test_hashes_tell_any_change(everywhere, tmp_path):
    made = [source_hashes(everywhere[name]) for name in FORMATS]
    assert len({json.dumps(hashes) for hashes in made}) == len(FORMATS)
    assert made == [source_hashes(everywhere[name]) for name in FORMATS]
    file = tmp_path / "a.jsonl"
    file.write_text('{"a": 1}\n')
    before = source_hashes(str(file))
    file.write_text('{"a": 12}\n')
    assert source_hashes(str(file)) != before


def test_text_in_array_records(tmp_path):
    file = tmp_path / "x.arrayrecord"
    write_array_record(file, [b"plain text\n", b'{"text": "a document about JSON"}', "é".encode()])
    assert [r.value for r in read_records(str(file))] == [
        Text("plain text\n"),
        Text('{"text": "a document about JSON"}'),
        Text("é"),
    ]
    assert [r.where.rsplit(", ", 1)[1] for r in read_records(str(file))] == ["record 1", "record 2", "record 3"]


def test_pieces_of_text_from_any_start(tmp_path):
    (tmp_path / "a.txt").write_text("a line of some length\n" * 4000)
    (tmp_path / "b.txt").write_text("short\n")
    whole = list(read_records(str(tmp_path)))
    assert len(whole) > 3
    for start in range(len(whole) + 1):
        assert list(read_records(str(tmp_path), start=start)) == whole[start:]


def test_nulls_are_no_fields_and_odd_types_become_json(tmp_path):
    """Arrow gives every row the fields of all; transformers and TRL (`remove_none_values`) take such nulls away too."""
    import datetime
    import decimal

    messages = [{"role": "user", "content": "q", "tool_calls": None}, {"role": "assistant", "content": None}]
    calls = [{"function": {"name": "f", "arguments": {"a": 1}}}, {"function": {"name": "g", "arguments": {"b": "y"}}}]
    row = {
        "messages": [messages[0], {**messages[1], "tool_calls": calls}],
        "label": None,
        "when": datetime.datetime(2024, 1, 2, 3, 4, 5),
        "blob": b"\xff\x00",
        "cost": decimal.Decimal("1.50"),
        "scores": [1.5, None],
        "tags": [{"k": datetime.date(2024, 1, 2)}],
    }
    table = pyarrow.Table.from_pylist([row])
    table = table.append_column("tools", pyarrow.array(['[{"name": "f", "default": null}]'], pyarrow.json_()))
    pyarrow.parquet.write_table(table.drop_columns("tools"), tmp_path / "x.parquet")
    write_stream(tmp_path / "x.arrow", table)
    expected = {
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": calls}],
        "when": "2024-01-02T03:04:05",
        "blob": "/wA=",
        "cost": "1.50",
        "scores": [1.5, None],
        "tags": [{"k": "2024-01-02"}],
    }
    (found,) = read_records(str(tmp_path / "x.parquet"))
    assert found.value == expected
    (found,) = read_records(str(tmp_path / "x.arrow"))
    assert found.value == {**expected, "tools": [{"name": "f", "default": None}]}


def test_folders_of_datasets(tmp_path):
    table = pyarrow.Table.from_pylist(RECORDS[:10])
    write_dataset_folder(tmp_path / "dict" / "train", table, 3)
    (tmp_path / "dict" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    assert [r.value for r in read_records(str(tmp_path / "dict"))] == RECORDS[:10]
    assert [f.name for f in list_files(str(tmp_path / "dict"))] == [f"data-0000{i}-of-00003.arrow" for i in range(3)]
    (tmp_path / "dict" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(UserError, match=r"holds the splits of a DatasetDict: give one of .*dict/train, .*dict/test"):
        list_files(str(tmp_path / "dict"))
    # As `with_format(columns=["text"])` before saving: what such a dataset gives back.
    write_dataset_folder(tmp_path / "chosen", table, 1, _format_columns=["text"])
    assert [r.value for r in read_records(str(tmp_path / "chosen"))] == [{"text": r["text"]} for r in RECORDS[:10]]


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_folder_that_datasets_saved(split):
    folder = pathlib.Path(__file__).parents[2] / "golden" / "datasets"
    expected = json.loads((folder / "expected.json").read_text())[split]
    assert [r.value for r in read_records(str(folder / split))] == expected
    assert [r.value for r in read_records(str(folder / split), start=1)] == expected[1:]


def test_some_files_of_a_folder(tmp_path):
    for split in ("train-0", "train-1", "test-0"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"text": split}) + "\n")
    assert [r.value["text"] for r in read_records(str(tmp_path / "train-*.jsonl"))] == ["train-0", "train-1"]
    with pytest.raises(UserError, match=r"data path .*valid-\* does not exist"):
        list_files(str(tmp_path / "valid-*"))


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow"])
def test_no_more_than_a_batch_is_in_memory(tmp_path, name):
    """One row group of 24 MB, which pyarrow reads whole unless told otherwise."""
    table = pyarrow.table({"text": [f"{i} {'word ' * 200}" for i in range(24000)]})
    if name == "x.parquet":
        pyarrow.parquet.write_table(table, tmp_path / name, row_group_size=24000, compression="none")
    else:
        write_stream(tmp_path / name, table, 100)
    del table
    before, most = pyarrow.total_allocated_bytes(), 0
    for record in read_records(str(tmp_path / name)):
        assert record.value["text"].endswith("word ")
        most = max(most, pyarrow.total_allocated_bytes() - before)
    assert most < 6e6


def _parquet(file, change: Callable[[bytes], bytes] = bytes):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS[:100]), file)
    file.write_bytes(change(file.read_bytes()))


def _stream(file, change: Callable[[bytes], bytes] = bytes):
    write_stream(file, pyarrow.Table.from_pylist(RECORDS[:100]), 20)
    file.write_bytes(change(file.read_bytes()))


def _records(*records):
    return lambda file: write_array_record(file, list(records))


# A TensorFlow Example {"text": "x"}: length-delimited fields, and valid UTF-8.
EXAMPLE = b"\n\x0f\n\x0d\n\x04text\x12\x05\n\x03\n\x01x"


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("x.parquet", lambda f: _parquet(f, lambda b: b[:-100]), "x.parquet is not a whole Parquet file: "),
        ("x.parquet", lambda f: _parquet(f, lambda b: b[:50] + bytes(40) + b[90:]), "x.parquet"),
        ("x.parquet", lambda f: f.write_bytes(b""), "x.parquet is not a whole Parquet file: "),
        ("x.parquet", lambda f: f.write_bytes(b"not parquet" * 9), "x.parquet is not a whole Parquet file: "),
        ("x.arrow", lambda f: _stream(f, lambda b: b[: len(b) // 2]), "x.arrow is not a whole Arrow file"),
        ("x.arrow", lambda f: _stream(f, lambda b: b[:-8]), "x.arrow is not a whole Arrow file: it has no end mark"),
        ("x.arrow", lambda f: f.write_bytes(b""), "x.arrow is not a whole Arrow file"),
        ("x.arrow", lambda f: f.write_bytes(b"ARROW1\0\0" + bytes(90)), "x.arrow is not a whole Arrow file: "),
        (
            "x.arrow",
            lambda f: _stream(f, lambda b: b.replace("日本".encode(), b"\xff" * 6)),
            "x.arrow, rows 1 to 20: .*UTF8",
        ),
        ("x.arrayrecord", lambda f: f.write_bytes(b"garbage" * 99), "x.arrayrecord is not a whole ArrayRecord file"),
        ("x.arrayrecord", lambda f: f.write_bytes(b""), "x.arrayrecord is not a whole ArrayRecord file"),
        ("x.arrayrecord", _records(b'{"text": "a"}', b"{"), "x.arrayrecord, record 2: not JSON: "),
        ("x.arrayrecord", _records(b'{"text": "a"}', b"3"), "x.arrayrecord, record 2: not a JSON object, as the"),
        ("x.arrayrecord", _records(b"a", b"\xff"), "x.arrayrecord, record 2: neither JSON nor text: not UTF-8"),
        ("x.arrayrecord", _records(EXAMPLE), "x.arrayrecord, record 1: a TensorFlow Example"),
    ],
)
def test_bad_files(tmp_path, name, write, message):
    write(tmp_path / name)
    with pytest.raises(UserError, match=message) as error:
        list(read_records(str(tmp_path / name)))
    assert "\n" not in str(error.value)


def test_bad_folders_of_datasets(tmp_path):
    table = pyarrow.Table.from_pylist(RECORDS[:10])
    write_dataset_folder(tmp_path / "a", table, 2)
    (tmp_path / "a" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(UserError, match=r"data-00001-of-00002.arrow is missing, which state.json names"):
        list_files(str(tmp_path / "a"))
    (tmp_path / "a" / "state.json").write_text("{")
    with pytest.raises(UserError, match=r"state.json is not JSON"):
        list_files(str(tmp_path / "a"))
    (tmp_path / "a" / "state.json").write_text("{}")
    with pytest.raises(UserError, match=r"state.json names no data files"):
        list_files(str(tmp_path / "a"))
    write_dataset_folder(tmp_path / "b", table, 1, _format_columns=["nonesuch"])
    with pytest.raises(UserError, match=r"not a whole Arrow file: .*nonesuch"):
        list(read_records(str(tmp_path / "b")))


def test_two_columns_of_one_name(tmp_path):
    table = pyarrow.table([["a"], ["b"]], names=["text", "text"])
    write_stream(tmp_path / "x.arrow", table)
    with pytest.raises(UserError, match="two columns are called 'text'"):
        list(read_records(str(tmp_path / "x.arrow")))


def test_an_absent_extra_is_named(tmp_path, monkeypatch):
    import sys

    _parquet(tmp_path / "x.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"x.parquet, a Parquet file, is read with pyarrow.* 'llm_jax\[arrow\]'"):
        list(read_records(str(tmp_path / "x.parquet")))
