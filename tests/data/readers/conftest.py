"""The same records in every format."""

import json
import pathlib
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

RECORDS = [{"text": f"document {i}: naïve 日本 {'x' * (i % 50)}\n", "id": i} for i in range(1000)]


def write_array_record(file: pathlib.Path, records: list[bytes]) -> None:
    writer = array_record_module.ArrayRecordWriter(str(file), "group_size:8")
    for record in records:
        writer.write(record)
    writer.close()


def write_stream(file: pathlib.Path, table: pyarrow.Table, rows: int = 100) -> None:
    with pyarrow.OSFile(str(file), "wb") as raw, pyarrow.ipc.new_stream(raw, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)


def write_dataset_folder(folder: pathlib.Path, table: pyarrow.Table, shards: int = 2, **state: Any) -> None:
    """As `Dataset.save_to_disk` of `datasets` 5.2."""
    folder.mkdir(parents=True)
    size = -(-table.num_rows // shards)
    names = [f"data-{i:05d}-of-{shards:05d}.arrow" for i in range(shards)]
    for i, name in enumerate(names):
        write_stream(folder / name, table.slice(i * size, size))
    files = [{"filename": name} for name in names]
    kept = {"_format_columns": None, "_output_all_columns": False, "_split": "train", **state}
    (folder / "state.json").write_text(json.dumps({"_data_files": files, **kept}))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {}}))


@pytest.fixture(scope="session")
def everywhere(tmp_path_factory) -> dict[str, str]:
    """Paths by format; each holds RECORDS."""
    root = tmp_path_factory.mktemp("formats")
    table = pyarrow.Table.from_pylist(RECORDS)
    lines = [json.dumps(record) for record in RECORDS]
    (root / "jsonl").mkdir()
    (root / "jsonl" / "a.jsonl").write_text("\n".join(lines[:300]) + "\n\n")
    (root / "jsonl" / "b.jsonl").write_text("\n".join(lines[300:]) + "\n")
    (root / "parquet").mkdir()
    pyarrow.parquet.write_table(table.slice(0, 400), root / "parquet" / "a.parquet", row_group_size=150)
    pyarrow.parquet.write_table(table.slice(400), root / "parquet" / "b.parquet", row_group_size=150)
    write_dataset_folder(root / "dataset", table)
    write_stream(root / "stream.arrow", table)
    with pyarrow.OSFile(str(root / "file.arrow"), "wb") as raw, pyarrow.ipc.new_file(raw, table.schema) as writer:
        writer.write_table(table, max_chunksize=64)
    write_array_record(root / "rows.array_record", [line.encode() for line in lines])
    names = ("jsonl", "parquet", "dataset", "stream.arrow", "file.arrow", "rows.array_record")
    return {name: str(root / name) for name in names}
