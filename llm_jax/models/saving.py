"""Models to files: Hugging Face folders and native folders."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from etils import epath

from llm_jax.base.progress import Progress
from llm_jax.base.trees import flatten, unflatten
from llm_jax.models.decoder import layout
from llm_jax.models.families import family
from llm_jax.models.families.tensors import Tensor
from llm_jax.models.loading import EXTRA, ROLE, TEMPLATES, TOKENIZER_FILES, Model
from llm_jax.models.parameter import declarations
from llm_jax.storage.atomic import write_atomically
from llm_jax.storage.safetensors import write_folder
from llm_jax.storage.workdir import FORMAT, Workdir


def save(model: Model, path: epath.PathLike, dtype: str | None = None) -> None:
    """Writes a Hugging Face folder: safetensors, the tokenizer's files if there are any, config.json last.

    `dtype` of the tensors; None keeps what each had in the folder the model came from (bfloat16 of those that were
    packed), float32 for a new model.
    Raises UserError for a head that the family's folders do not have.
    """
    path = epath.Path(path)
    # First whatever may find the model wanting: then nothing is written.
    tensors, fields = hf_contents(model, dtype)
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").unlink(missing_ok=True)
    with Progress(f"writing {path.name}") as progress:

        def told(done: int, make: Callable[[], np.ndarray]) -> np.ndarray:
            progress.update(total=len(tensors), done=done, tensors=done)
            return make()

        write_folder(path, {name: lambda i=i, t=t: told(i, t.array) for i, (name, t) in enumerate(tensors.items())})
    if model.tokenizer_dir is not None:
        copy_tokenizer(model.tokenizer_dir, path)
    stored = {tensor.dtype for tensor in tensors.values()}
    if len(stored) == 1:
        # Releases of transformers before 4.56 know the old name only.
        fields["torch_dtype" if "torch_dtype" in fields else "dtype"] = stored.pop()
    write_atomically(path / "config.json", json.dumps(fields, indent=2, sort_keys=True) + "\n")


def hf_contents(model: Model, dtype: str | None = None) -> tuple[dict[str, HfTensor], dict[str, Any]]:
    """What `save` writes: tensors by name, and config.json less their dtype. Raises UserError as `save`."""
    return hf_tensors(model, dtype), family(model.config.family).to_hf(model.config, model.extra)


class HfTensor(NamedTuple):
    dtype: str
    array: Callable[[], np.ndarray]


def hf_tensors(model: Model, dtype: str | None = None) -> dict[str, HfTensor]:
    """The model's tensors by Hugging Face name, made when asked for. `dtype` as for `save`."""
    flat = flatten(model.params)
    rows = {
        (inner, layer): (f"segments/{s}/{position}/{inner}", row)
        for s, segment in enumerate(model.decoder.groups)
        for position in range(len(segment.block))
        for row, layer in enumerate(segment.layers(position))
        for inner in flatten(model.params["segments"][str(s)][str(position)])
    }

    def read(ours: str, layer: int | None) -> np.ndarray:
        leaf, row = (ours, ...) if layer is None else rows[ours, layer]
        return np.asarray(flat[leaf][row])

    def written(tensor: Tensor, i: int, kind: str) -> np.ndarray:
        arrays = tensor.form.write([read(ours, tensor.layer) for ours in tensor.paths])
        return arrays[i].astype(jnp.dtype(kind))

    found = {}
    for tensor in family(model.config.family).tensors(model.decoder):
        for i, name in enumerate(tensor.names):
            kind = dtype or model.dtypes.get(name, "float32")
            found[name] = HfTensor(kind, lambda tensor=tensor, i=i, kind=kind: written(tensor, i, kind))
    return found


def checksum(model: Model, dtype: str | None = None) -> tuple[int, int, str]:
    """Tensors, bytes, and a SHA-256 over names, dtypes, shapes and values: equal for two folders of one model, in
    whatever layout. `dtype` as for `save`."""
    tensors, size, whole = hf_tensors(model, dtype), 0, hashlib.sha256()
    with Progress("hashing") as progress:
        for number, name in enumerate(sorted(tensors)):
            progress.update(total=len(tensors), done=number, tensors=number)
            array = np.ascontiguousarray(tensors[name].array())
            size += array.nbytes
            whole.update(f"{name} {array.dtype} {array.shape}\n".encode())
            whole.update(array.reshape(-1).view(np.uint8).data)
    return len(tensors), size, whole.hexdigest()


def rounded(model: Model, dtype: str | None = None) -> list[str]:
    """Hugging Face names of the tensors that lose digits of float32 on being written. `dtype` as for `save`."""
    exact, found = hf_tensors(model, "float32"), []
    for name, tensor in hf_tensors(model, dtype).items():
        if tensor.dtype != "float32":
            before = exact[name].array()
            after = before.astype(jnp.dtype(tensor.dtype)).astype(np.float32)
            found += [] if np.array_equal(before, after, equal_nan=True) else [name]
    return found


def save_native(model: Model, path: epath.PathLike) -> None:
    """Writes a native folder: what a workdir holds of a model, as a finished run of 0 steps would leave it."""
    workdir = Workdir(path)
    workdir.path.mkdir(parents=True, exist_ok=True)
    with workdir.lock():
        if model.tokenizer_dir is not None:
            workdir.tokenizer.mkdir(exist_ok=True)
            copy_tokenizer(model.tokenizer_dir, workdir.tokenizer)
        write_checkpoint(model, workdir, 0)
        write_atomically(workdir.path / EXTRA, json.dumps(model.extra, indent=1))
        write_atomically(workdir.path / "model.json", json.dumps(dataclasses.asdict(model.config), indent=1))
        workdir.write_config({"format": FORMAT, "job": "convert", "config": {}})
        workdir.mark_done({})


def write_checkpoint(model: Model, workdir: Workdir, step: int) -> None:
    """Commits a checkpoint of a model's float32 parameters, without an optimizer's state."""
    from llm_jax.storage.checkpoints import Checkpoints

    checkpoints = Checkpoints(workdir.checkpoints)
    declared = flatten(declarations(model.decoder))
    parts = {name: "params" if declared[name].learned else "model_state" for name in declared}
    params = {f"{parts[name]}/{ROLE}/{name}": x.astype(jnp.float32) for name, x in flatten(model.params).items()}
    checkpoints.save(step, unflatten(params), {"layout": layout(model.decoder), "hf": {"dtypes": model.dtypes}})
    checkpoints.wait()


def copy_tokenizer(source: epath.PathLike, folder: epath.PathLike) -> None:
    """Copies the tokenizer's files that are there, byte for byte."""
    source, folder = epath.Path(source), epath.Path(folder)
    names = [name for name in TOKENIZER_FILES if (source / name).exists()]
    if (source / TEMPLATES).is_dir():
        (folder / TEMPLATES).mkdir(exist_ok=True)
        names += [f"{TEMPLATES}/{file.name}" for file in (source / TEMPLATES).iterdir() if file.suffix == ".jinja"]
    for name in names:
        (folder / name).write_bytes((source / name).read_bytes())
