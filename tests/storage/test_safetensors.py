"""Our safetensors files against the safetensors library, both directions, and the ways a folder can be broken."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llm_jax.base.errors import UserError
from llm_jax.storage.safetensors import LazyTensors, read_index, write_folder


def some_tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "b.weight": rng.standard_normal((3, 5)).astype(np.float32),
        "a.weight": rng.standard_normal((7,)).astype(ml_dtypes.bfloat16),
        "scalar": np.asarray(3, np.int64),
        "flags": np.asarray([True, False, True]),
        "empty": np.zeros((0, 4), np.float16),
        "codes": rng.integers(-128, 127, (2, 3, 4)).astype(np.int8),
    }


def assert_same(got, want):
    assert set(got) == set(want)
    for name in want:
        assert (got[name].dtype, got[name].shape) == (want[name].dtype, want[name].shape)
        assert got[name].tobytes() == want[name].tobytes()


def test_the_library_reads_what_we_write(tmp_path):
    write_folder(tmp_path, some_tensors())
    assert_same(load_file(tmp_path / "model.safetensors"), some_tensors())


def test_we_read_what_the_library_writes(tmp_path):
    save_file(some_tensors(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_same(LazyTensors(tmp_path), some_tensors())


def test_one_file_is_byte_for_byte_the_librarys(tmp_path):
    write_folder(tmp_path, {"b": np.ones((2, 2), np.float32), "a": np.ones(4, np.float32)})
    save_file({"b": np.ones((2, 2), np.float32), "a": np.ones(4, np.float32)}, tmp_path / "x", {"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "x").read_bytes()


def test_shards_are_named_like_transformers_and_replace_older_weights(tmp_path):
    write_folder(tmp_path, some_tensors())
    tensors = {f"w{i}": np.full((10,), i, np.float32) for i in range(5)}
    write_folder(tmp_path, {name: (lambda value=value: value) for name, value in tensors.items()}, max_shard_bytes=80)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)),
        "model.safetensors.index.json",
    ]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 200
    assert index["weight_map"]["w4"] == "model-00003-of-00003.safetensors"
    assert_same(LazyTensors(tmp_path), tensors)
    assert list(read_index(tmp_path)) == list(tensors)

    write_folder(tmp_path, tensors)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_transposed_view_is_written_as_it_reads(tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3).T
    write_folder(tmp_path, {"w": array})
    np.testing.assert_array_equal(LazyTensors(tmp_path)["w"], array)


@pytest.mark.parametrize("pickle", ["pytorch_model.bin", "model.pt", "weights.ckpt"])
def test_a_pickle_is_refused_by_name(tmp_path, pickle):
    (tmp_path / pickle).write_bytes(b"\x80\x04")
    with pytest.raises(UserError, match=f"{pickle}.*only safetensors are read"):
        read_index(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(UserError, match="no model.safetensors"):
        read_index(tmp_path)
    with pytest.raises(UserError, match="not a folder"):
        read_index(tmp_path / "absent")


def test_truncated_and_malformed_files_are_named(tmp_path):
    write_folder(tmp_path, some_tensors())
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=f"model.safetensors is truncated: {len(whole) - 1} bytes"):
        read_index(tmp_path)
    file.write_bytes(whole[:20])
    with pytest.raises(UserError, match="truncated"):
        read_index(tmp_path)
    file.write_bytes(whole[:8] + b"?" + whole[9:])
    with pytest.raises(UserError, match="malformed"):
        read_index(tmp_path)


def test_an_index_that_names_what_is_not_there(tmp_path):
    write_folder(tmp_path, {f"w{i}": np.ones(10, np.float32) for i in range(2)}, max_shard_bytes=40)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="names model-00002-of-00002.safetensors, which is not there"):
        read_index(tmp_path)
    index["weight_map"] = {"w0": "model-00001-of-00002.safetensors", "w9": "model-00001-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="names the tensor w9"):
        read_index(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        read_index(tmp_path)


def test_a_type_the_format_lacks(tmp_path):
    with pytest.raises(UserError, match="w has the type complex64"):
        write_folder(tmp_path, {"w": np.ones(2, np.complex64)})
