"""Names of the hub against a cache laid out by hand, as `huggingface_hub` lays it out; no network."""

import json
import pathlib

import pytest

from llm_jax.base.errors import UserError
from llm_jax.data.sources import ignored_files, read_records
from tests.storage.hub_cache import COMMIT, lay_out, use_cache


@pytest.fixture
def cache(tmp_path, monkeypatch) -> pathlib.Path:
    return use_cache(tmp_path / "cache", monkeypatch)


def line(text: str) -> str:
    return json.dumps({"text": text}) + "\n"


def test_datasets_by_name(cache):
    files = {"README.md": "A card.", "data/train-0.jsonl": line("a"), "data/train-1.jsonl": line("b")}
    lay_out(cache, "dataset", "some/texts", {**files, "data/test-0.jsonl": line("t"), ".gitattributes": "x"})
    lay_out(cache, "dataset", "other/texts", {"x.txt": "plain\n"}, revision="v1")

    def texts(path):
        return [r.value["text"] for r in read_records(path)]

    assert texts("hub:some/texts") == ["t", "a", "b"]
    assert texts("hub:some/texts/data/train-*") == ["a", "b"]
    assert texts("hub:some/texts/data/test-0.jsonl") == ["t"]
    assert texts(f"hub:some/texts@{COMMIT}/data/train-0.jsonl") == ["a"]
    assert [r.value.text for r in read_records("hub:other/texts@v1")] == ["plain\n"]
    assert ignored_files("hub:some/texts") == []


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("hub:texts", "has to be hub:OWNER/NAME"),
        ("hub:some/t exts", "is no name on the hub"),
        ("hub:no/such", "data path hub:no/such: the dataset no/such is not in the cache, and the hub is out of reach"),
        ("hub:some/texts@v9", "the dataset some/texts@v9 is not in the cache"),
        ("hub:some/texts/valid-*", "does not exist"),
    ],
)
def test_bad_names(cache, path, message):
    lay_out(cache, "dataset", "some/texts", {"a.jsonl": line("a")})
    with pytest.raises(UserError, match=message) as error:
        list(read_records(path))
    assert "\n" not in str(error.value)


def test_an_absent_extra_is_named(cache, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"data path hub:some/texts is on the hub.* 'llm_jax\[hub\]'"):
        list(read_records("hub:some/texts"))
