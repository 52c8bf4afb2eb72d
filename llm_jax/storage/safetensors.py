"""Weights of a Hugging Face folder: `model.safetensors`, or shards named by `model.safetensors.index.json`.

A safetensors file is 8 bytes of header length (little endian), a JSON header `{name: {dtype, shape, data_offsets}}`,
and the raw tensors (github.com/huggingface/safetensors, "Format"). Reading and writing here go tensor by tensor, on
any path that etils knows, with NumPy's bfloat16 and float8 of ml_dtypes.
"""

import json
import math
import re
import tempfile
from collections.abc import Callable, Container, Iterator, Mapping
from typing import NamedTuple

import ml_dtypes
import numpy as np
from etils import epath

from llm_jax.base.errors import UserError
from llm_jax.storage.atomic import write_atomically
from llm_jax.storage.json_files import read_json
from llm_jax.storage.pointers import refuse_pointer
from llm_jax.storage.remote import is_remote, publish

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_OURS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?|shard-\d{5}\.safetensors\.part")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


class TensorInfo(NamedTuple):
    """Where a tensor lies: its file, shape, dtype, and its first byte in the file."""

    file: epath.Path
    shape: tuple[int, ...]
    dtype: np.dtype
    start: int


def read_index(folder: epath.PathLike) -> dict[str, TensorInfo]:
    """What a folder's safetensors hold, from the headers alone.

    Raises UserError for a folder with no weights or with pickles only (named; they are never read), for a truncated
    or malformed file or a git-LFS pointer, and for an index that is not what the shards are: it names a file that is
    not there, or a tensor that the file lacks, or leaves one out.
    """
    folder = epath.Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    if (folder / _SINGLE).exists():
        return _read_header(folder / _SINGLE)
    if not (folder / _INDEX).exists():
        raise UserError(_no_weights(folder))
    try:
        weight_map = read_json(folder / _INDEX)["weight_map"]
        files = sorted(set(weight_map.values()))
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{folder / _INDEX} is not an index of safetensors shards") from None
    found: dict[str, TensorInfo] = {}
    for file in files:
        if not isinstance(file, str) or "/" in file:
            raise UserError(f"{folder / _INDEX} names {file!r}, which is no file of the folder")
        if not (folder / file).exists():
            raise UserError(f"{folder / _INDEX} names {file}, which is not there")
        held = _read_header(folder / file)
        for name in held:
            if name not in weight_map:
                raise UserError(f"{folder / file} holds the tensor {name}, which {_INDEX} does not name")
            if weight_map[name] != file:
                raise UserError(f"{folder / _INDEX} names {name} in {weight_map[name]}, but {file} holds one too")
        found.update(held)
    missing = sorted(set(weight_map) - set(found))
    if missing:
        raise UserError(f"{folder / _INDEX} names the tensor {missing[0]}, which {weight_map[missing[0]]} lacks")
    return {name: found[name] for name in weight_map}


def has_weights(folder: epath.PathLike) -> bool:
    """Whether a folder holds weights or a part of them, readable ones or not."""
    names = [child.name for child in epath.Path(folder).iterdir()]
    return any(name == _INDEX or name.endswith((".safetensors", *_PICKLES)) for name in names)


class LazyTensors(Mapping[str, np.ndarray]):
    """A folder's tensors by name, read-only. Raises as `read_index`.

    Those of a local file are views of it, mapped: its bytes are read where they are looked at, and are the system's to
    drop. Those of a remote one are read when they are asked for.
    """

    def __init__(self, folder: epath.PathLike) -> None:
        self.index = read_index(folder)

    def __getitem__(self, name: str) -> np.ndarray:
        file, shape, dtype, start = self.index[name]
        count = math.prod(shape)
        # NumPy maps no empty range, and a tensor that starts between two numbers would be slow to work with.
        if count and start % dtype.itemsize == 0 and not is_remote(file):
            return np.memmap(file, dtype, "r", start, shape).view(np.ndarray)
        with file.open("rb") as stream:
            stream.seek(start)
            data = stream.read(count * dtype.itemsize)
        return np.frombuffer(data, dtype).reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.index)

    def __len__(self) -> int:
        return len(self.index)


def read_file(file: epath.PathLike) -> dict[str, np.ndarray]:
    """All tensors of one file, by name. Raises UserError as `read_file_index`."""
    held, raw = read_file_index(file), epath.Path(file).read_bytes()
    return {
        name: np.frombuffer(raw, info.dtype, math.prod(info.shape), info.start).reshape(info.shape)
        for name, info in held.items()
    }


def read_file_index(file: epath.PathLike) -> dict[str, TensorInfo]:
    """What tensors one file has. Raises UserError for one that is absent, a git-LFS pointer or malformed."""
    file = epath.Path(file)
    if not file.exists():
        raise UserError(f"{file} does not exist")
    return _read_header(file)


def write_folder(
    folder: epath.PathLike,
    tensors: Mapping[str, np.ndarray | Callable[[], np.ndarray]],
    max_shard_bytes: float = 5e9,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes tensors as transformers does: one `model.safetensors`, or shards and their index, which is written last.

    Shards get their final names only when all are on disk, and replace the weights that were there.

    Args:
        folder: made if absent.
        tensors: arrays, or functions giving them, which are called one at a time; one shard is held in memory.
        max_shard_bytes: a shard is closed before it would grow past this.
        metadata: of each file; transformers wants, and by default gets, `{"format": "pt"}`.
    """
    folder = epath.Path(folder)
    if is_remote(folder):  # Nothing can be renamed there, and how many shards there are is known last.
        with tempfile.TemporaryDirectory() as local:
            write_folder(local, tensors, max_shard_bytes, metadata)
            _remove_weights(folder)
            publish(local, folder, _INDEX)
        return
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt"} if metadata is None else dict(metadata)
    shards: list[list[str]] = []
    pending: dict[str, np.ndarray] = {}
    total = 0

    def part(number: int) -> epath.Path:
        return folder / f"shard-{number:05d}.safetensors.part"

    def close() -> None:
        write_file(part(len(shards)), pending, metadata)
        shards.append(list(pending))
        pending.clear()

    for name, value in tensors.items():
        array = np.asarray(value() if callable(value) else value)
        if pending and sum(held.nbytes for held in pending.values()) + array.nbytes > max_shard_bytes:
            close()
        pending[name] = array
        total += array.nbytes
    close()

    _remove_weights(folder, keep={part(number).name for number in range(len(shards))})
    if len(shards) == 1:
        part(0).rename(folder / _SINGLE)
        return
    weight_map = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        part(number).rename(folder / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_atomically(folder / _INDEX, json.dumps(index, indent=2) + "\n")


def _remove_weights(folder: epath.Path, keep: Container[str] = ()) -> None:
    for old in list(folder.iterdir()) if folder.exists() else []:
        if _OURS.fullmatch(old.name) and old.name not in keep:
            old.unlink()


def _read_header(file: epath.Path) -> dict[str, TensorInfo]:
    length = file.stat().length
    with file.open("rb") as stream:
        start = stream.read(64)
        refuse_pointer(file, start)
        size = int.from_bytes(start[:8], "little")
        stream.seek(8)
        if length < 8 or size > length - 8:
            raise UserError(f"{file} is truncated or not a safetensors file")
        raw = stream.read(size)
    infos, places = {}, []
    try:
        for name, entry in json.loads(raw).items():
            if name == "__metadata__":
                continue
            if entry["dtype"] not in _DTYPES:
                raise UserError(f"{file}: {name} has the type {entry['dtype']}, which is not supported")
            dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
            start, stop = entry["data_offsets"]
            if not all(type(number) is int and number >= 0 for number in (*shape, start, stop)):
                raise UserError(f"{file}: {name} has the shape {list(shape)} at {[start, stop]}, which none can have")
            if stop - start != math.prod(shape) * dtype.itemsize:
                raise UserError(f"{file}: {name} has {stop - start} bytes for {entry['dtype']}{list(shape)}")
            infos[name] = TensorInfo(file, shape, dtype, 8 + size + start)
            places.append((start, stop, name))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{file} has a malformed safetensors header") from None
    end = 0
    # Side by side and without gaps, as the format asks: else two names might share one tensor's bytes.
    for start, stop, name in sorted(places):
        if start != end:
            raise UserError(f"{file}: {name} begins at byte {start} of the data, where {end} are taken")
        end = stop
    if 8 + size + end != length:
        raise UserError(f"{file} is truncated: {length} bytes instead of {8 + size + end}")
    return infos


def write_file(file: epath.Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """One file. Raises UserError for a dtype that the format does not have."""
    # Wide types first, as the safetensors library orders them: then every tensor is aligned to its own width.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name in names:
        array = tensors[name]
        if array.dtype not in _CODES:
            raise UserError(f"{name} has the type {array.dtype}, which safetensors files can't hold")
        stop = start + array.nbytes
        header[name] = {"dtype": _CODES[array.dtype], "shape": list(array.shape), "data_offsets": [start, stop]}
        start = stop
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with file.open("wb") as stream:
        stream.write(len(raw).to_bytes(8, "little"))
        stream.write(raw)
        for name in names:
            stream.write(np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8).data)


def _no_weights(folder: epath.Path) -> str:
    pickles = sorted(child.name for child in folder.iterdir() if child.name.endswith(_PICKLES))
    if pickles:
        return f"{folder / pickles[0]} is a pickle: only safetensors are read (convert it with transformers first)"
    shards = sorted(child.name for child in folder.iterdir() if child.name.endswith(".safetensors"))
    return f"{folder} has {shards[0]} but no {_INDEX}" if shards else f"{folder} has no {_SINGLE} and no {_INDEX}"
