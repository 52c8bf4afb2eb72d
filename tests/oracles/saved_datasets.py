"""Makes tests/golden/datasets: what `save_to_disk` of Hugging Face `datasets` leaves.

Run with datasets 5.2: `python tests/oracles/saved_datasets.py`.
"""

import json
import pathlib
import shutil

import datasets


def records(split: str, count: int) -> list[dict]:
    made = []
    for i in range(count):
        calls = [{"type": "function", "function": {"name": "f", "arguments": {"a" if i % 2 else "b": i}}}]
        turns = [{"role": "user", "content": f"{split} {i}: 日本?"}, {"role": "assistant", "tool_calls": calls}]
        made.append({"messages": turns, "id": i})
    return made


def main() -> None:
    folder = pathlib.Path(__file__).parents[1] / "golden" / "datasets"
    shutil.rmtree(folder, ignore_errors=True)
    splits = {split: datasets.Dataset.from_list(records(split, n)) for split, n in (("train", 5), ("test", 1))}
    # A choice of rows, which is kept as an index until it is saved.
    splits["train"] = splits["train"].select([4, 2, 0])
    datasets.DatasetDict(splits).save_to_disk(folder, num_shards={"train": 2, "test": 1})
    expected = {split: [records(split, 5)[i] for i in rows] for split, rows in (("train", (4, 2, 0)), ("test", (0,)))}
    (folder / "expected.json").write_text(json.dumps(expected, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
