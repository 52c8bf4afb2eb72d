"""Tile tables: the row of the device at hand, the default without one, bad tables."""

import dataclasses
import json

import pytest

from llm_jax.base.errors import UserError
from llm_jax.kernels import platform
from llm_jax.kernels.tiles import KEYS, TABLES, tiles, trying
from tests.kernels import devices


@dataclasses.dataclass(frozen=True)
class Sizes:
    q: int = 64
    kv: int = 32


def row(**changes):
    values = ("some_op", "gpu", "NVIDIA H200", "bfloat16", "hd128", {"q": 128})
    return dict(zip(KEYS, values, strict=True)) | changes


def ask(shape="hd128", dtype="bfloat16"):
    return tiles("some_op", "gpu", dtype=dtype, shape=shape, default=Sizes())


def test_the_row_of_device_dtype_and_shape(tmp_path, monkeypatch):
    path = tmp_path / "tiles.json"
    path.write_text(json.dumps([row(), row(device="NVIDIA B200", tiles={"q": 256, "kv": 256})]))
    monkeypatch.setenv("LLM_JAX_TILES", str(path))
    assert ask() == Sizes()  # this CPU has no row
    with devices.target(devices.GPU):
        assert platform.target_platform() == "gpu"
        assert ask() == Sizes(q=128)
        assert ask("hd64") == ask(dtype="float16") == Sizes()
        with trying("some_op", "gpu", Sizes(8, 8)):
            assert ask() == Sizes(8, 8)
        assert ask() == Sizes(q=128)


@pytest.mark.parametrize(
    "text, message",
    [
        ("[", "not a list of rows"),
        ('[{"op": "some_op"}]', "implementation"),
        (json.dumps([row(tiles={"rows": 1})]), "not one of q, kv"),
    ],
)
def test_a_bad_table_is_named(tmp_path, monkeypatch, text, message):
    path = tmp_path / "tiles.json"
    path.write_text(text)
    monkeypatch.setenv("LLM_JAX_TILES", str(path))
    with devices.target(devices.GPU), pytest.raises(UserError, match=message) as caught:
        ask()
    assert str(path) in str(caught.value)


def test_a_table_that_is_not_there(monkeypatch, tmp_path):
    monkeypatch.setenv("LLM_JAX_TILES", str(tmp_path / "none.json"))
    with pytest.raises(UserError, match="is not a file"):
        ask()


def test_shipped_tables_are_lists_of_rows():
    for path in TABLES.glob("*.json"):
        assert all(set(KEYS) <= set(row) and row["op"] == path.stem for row in json.loads(path.read_text()))
