import gzip
import json

import pytest

from llm_jax.base.errors import UserError
from llm_jax.data.examples import Text
from llm_jax.data.sources import PIECE_BYTES, ignored_files, list_files, read_records


def test_jsonl_plain_and_gzipped(tmp_path):
    lines = ['{"text": "é"}', "", '{"text": "b"}']
    (tmp_path / "b.jsonl").write_text("\ufeff" + "\n".join(lines))
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write("\n".join(lines))
    (tmp_path / ".hidden").write_text("x")
    (tmp_path / "notes.bin").write_bytes(b"\xff")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.ndjson").write_text(lines[0])
    found = list(read_records(str(tmp_path)))
    assert [record.value["text"] for record in found] == ["é", "b", "é", "b", "é"]
    assert [record.where.rsplit("/", 1)[1] for record in found[:2]] == ["a.jsonl.gz:1", "a.jsonl.gz:3"]
    assert len(list(read_records(str(tmp_path), max_records=3))) == 3
    assert ignored_files(str(tmp_path)) == [str(tmp_path / "notes.bin")]


def test_text_files_come_in_pieces_that_make_them_up_again(tmp_path):
    paragraph = "a line of text, és még egy\r\n" * 40
    whole = "\n".join([paragraph] * 60) + "no newline at the end"
    path = tmp_path / "long.txt"
    path.write_bytes(whole.encode())
    pieces = [record.value for record in read_records(str(path))]
    assert "".join(piece.text for piece in pieces) == whole
    assert [p.begins for p in pieces] == [True, *[False] * (len(pieces) - 1)]
    assert [p.ends for p in pieces] == [*[False] * (len(pieces) - 1), True]
    assert all(PIECE_BYTES <= len(p.text.encode()) < 2 * PIECE_BYTES for p in pieces[:-1])
    assert all(p.text.endswith("\n\n") or p.text.endswith("\r\n\n") for p in pieces[:-1])
    short = tmp_path / "short.txt"
    short.write_text("one")
    assert [record.value for record in read_records(str(short))] == [Text("one")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"a": 1}\n{"a": \n', r"x.jsonl:2: not JSON: Expecting value \(column"),
        ("x.jsonl", b'{"a": "\xff"}\n', r"x.jsonl:1: not UTF-8 \(byte 0xff\)"),
        ("x.jsonl", b'{"a": "\\ud800"}\n', "x.jsonl:1: holds half of a surrogate pair"),
        ("x.jsonl", b"[" * 200_000, "x.jsonl:1: JSON nested too deep"),
        ("x.jsonl", b"\n\n", "x.jsonl is empty"),
        ("x.jsonl", b"", "x.jsonl is empty"),
        ("x.txt", b"fine\nbad \xe9\n", r"x.txt:2: not UTF-8 \(byte 0xe9\)"),
        ("x.txt", b"", "x.txt is empty"),
        ("x.jsonl.gz", b"not gzip", "not a whole gzip file"),
        ("x.jsonl.gz", gzip.compress(b'{"a": 1}' * 100, mtime=0)[:-12], "not a whole gzip file"),
        ("x.bin", b"x", "is none of the files that are read, which end in .jsonl"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(read_records(str(path)))


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(UserError, match="nonesuch does not exist"):
        list_files(str(tmp_path / "nonesuch"))
    with pytest.raises(UserError, match="holds no file ending in .jsonl"):
        list_files(str(tmp_path))


def test_numbers_and_order_survive(tmp_path):
    record = {"b": 1, "a": [1.5, None, True], "text": "x\u2028y"}
    (tmp_path / "x.jsonl").write_text(json.dumps(record, ensure_ascii=False) + "\n")
    (found,) = read_records(str(tmp_path / "x.jsonl"))
    assert found.value == record and list(found.value) == ["b", "a", "text"]
