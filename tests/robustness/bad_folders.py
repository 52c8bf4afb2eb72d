"""Folders that came half, torn or from elsewhere: a table of damages to a good one, and what the one line has to say.

`bad_checkpoints` breaks files at random places; here each row is a way in which real downloads and clones go wrong.
"""

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llm_jax.storage.safetensors import LazyTensors, write_folder

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"
NORM, UP = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"


class Damage(NamedTuple):
    name: str
    damage: Callable[[Path], object]
    said: tuple[str, ...]
    """Parts of the line."""
    config_only: bool = False
    """Whether the architecture can still be described: no file of the folder is wrong, some are absent."""


def pointer(size: int) -> bytes:
    """As git-LFS writes them (github.com/git-lfs/git-lfs, docs/spec.md)."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4d7a2146' * 8}\nsize {size}\n".encode()


def shard(folder: Path, tensors: dict[str, np.ndarray], sizes: int = 3) -> None:
    """Writes weights in shards of about equal size."""
    whole = sum(array.nbytes for array in tensors.values())
    write_folder(folder, tensors, max_shard_bytes=whole / sizes * 1.15)


def tensors(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Path], None]:
    """Other tensors, with an index that is theirs."""

    def damage(folder: Path) -> None:
        held = {name: np.array(array) for name, array in LazyTensors(folder).items()}
        change(held)
        shard(folder, held)

    return damage


def index(change: Callable[[dict[str, str]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = json.loads((folder / INDEX).read_text())
        change(content["weight_map"])
        (folder / INDEX).write_text(json.dumps(content))

    return damage


def config(**fields: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return damage


def put(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def cut(name: str, share: float) -> Callable[[Path], None]:
    """The first part of a file, as a broken download leaves it."""

    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * share)])

    return damage


def header_cut(folder: Path) -> None:
    content = (folder / SECOND).read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    (folder / SECOND).write_bytes(content[: 8 + size // 2])


def only_pickle(folder: Path) -> None:
    for file in folder.glob("model*.safetensors*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({NORM: [1.0]}))


def sharded_pickles(folder: Path) -> None:
    only_pickle(folder)
    (folder / "pytorch_model.bin").rename(folder / "pytorch_model-00001-of-00001.bin")
    (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": {}}')


def elsewhere(weight_map: dict[str, str]) -> None:
    weight_map[NORM] = next(file for file in weight_map.values() if file != weight_map[NORM])


def shorter(held: dict[str, np.ndarray]) -> None:
    held[UP] = held[UP][:-1]


DAMAGES = [
    Damage("unknown architecture", config(model_type="lama"), ("'lama'", "nearest: llama")),
    Damage("another family", config(model_type="gpt_neo_x", architectures=None), ("'gpt_neo_x'", "nearest: gpt_neox")),
    Damage("no model_type", config(model_type=None), ("model_type",)),
    Damage("another class", config(architectures=["LlamaForTokens"]), ("architectures", "LlamaForTokens")),
    Damage("a field that changes numbers", config(quantization_config={"bits": 4}), ("quantization_config",)),
    Damage("missing tensor", tensors(lambda held: held.pop(UP)), ("no tensor", UP)),
    Damage("extra tensor", tensors(lambda held: held.update(extra=np.ones(2))), ("tensor extra", "llama family")),
    Damage("wrong shape", tensors(shorter), (UP, "[11, 8]", "[12, 8]")),
    Damage("integers", tensors(lambda held: held.update({NORM: np.ones(8, np.int32)})), (NORM, "int32")),
    Damage("half a shard", cut(SECOND, 0.6), (SECOND, "truncated", "bytes instead of")),
    Damage("half a header", header_cut, (SECOND, "truncated")),
    Damage("an empty shard", put(SECOND, b""), (SECOND, "truncated")),
    Damage("a shard short of a byte", cut(FIRST, 0.9999), (FIRST, "truncated")),
    Damage("no such shard", lambda folder: (folder / SECOND).unlink(), (INDEX, SECOND, "not there")),
    Damage("no index", lambda folder: (folder / INDEX).unlink(), (FIRST, f"no {INDEX}")),
    Damage("half an index", cut(INDEX, 0.5), (INDEX, "not JSON")),
    Damage("index names too many", index(lambda map: map.update(more=FIRST)), (INDEX, "more", FIRST)),
    Damage("index leaves one out", index(lambda map: map.pop(NORM)), (NORM, INDEX, "does not name")),
    Damage("index points elsewhere", index(elsewhere), (INDEX, NORM, "holds one too")),
    Damage("pointer for a shard", put(SECOND, pointer(10**9)), (SECOND, "git-LFS pointer")),
    Damage("pointer for the index", put(INDEX, pointer(10**4)), (INDEX, "git-LFS pointer")),
    Damage("pointer for config.json", put("config.json", pointer(700)), ("config.json", "git-LFS pointer")),
    Damage("pointer for tokenizer.json", put("tokenizer.json", pointer(10**6)), ("tokenizer.json", "git-LFS pointer")),
    Damage("pickle", only_pickle, ("pytorch_model.bin", "pickle")),
    Damage("pickles", sharded_pickles, ("pytorch_model-00001-of-00001.bin", "pickle")),
    Damage(
        "no weights at all",
        lambda folder: [file.unlink() for file in folder.glob("model*")],
        ("safetensors",),
        config_only=True,
    ),
]
