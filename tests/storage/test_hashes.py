import hashlib

import pytest

from llm_jax.storage import hashes
from llm_jax.storage.hashes import canonical_hash, file_fingerprint, file_sha256


def test_canonical_hash_is_sha256_of_sorted_compact_json():
    assert (
        canonical_hash({"b": [1, 2.5, None], "a": "é"})
        == hashlib.sha256(b'{"a":"\\u00e9","b":[1,2.5,null]}').hexdigest()[:12]
    )
    assert canonical_hash({"a": 1, "b": 2}) == canonical_hash({"b": 2, "a": 1})
    assert canonical_hash({"a": 1}) != canonical_hash({"a": 1.0})
    with pytest.raises(ValueError):
        canonical_hash(float("nan"))


def test_file_sha256(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    # FIPS 180-2, appendix B.1
    assert file_sha256(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_fingerprint_of_a_long_file_sees_size_and_spread_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(hashes, "WHOLE_UP_TO", 100)
    monkeypatch.setattr(hashes, "PIECE", 10)
    monkeypatch.setattr(hashes, "PIECES", 11)
    prints = set()
    for content in (bytes(1000), bytes(1001), b"\1" + bytes(999), bytes(999) + b"\1", bytes(500) + b"\1" + bytes(499)):
        (tmp_path / "f").write_bytes(content)
        prints.add(file_fingerprint(tmp_path / "f"))
    assert len(prints) == 5
