"""A Hugging Face folder whose files agree with each other, and its weights by our names, read when asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from llm_jax.base.errors import UserError
from llm_jax.base.trees import flatten
from llm_jax.models.decoder import Decoder
from llm_jax.models.families import family_for
from llm_jax.models.families.packed import notes, open_tensors
from llm_jax.models.families.tensors import Shape, Tensor
from llm_jax.models.parameter import abstract_params, declarations
from llm_jax.sharding import dtype_in_use
from llm_jax.storage.safetensors import TensorInfo

FLOATS = ("float32", "bfloat16", "float16")
PIECE = 1 << 24
"""Bytes of a tensor that are copied at a time."""

Index = tuple[slice, ...]


class HfFolder:
    """config.json and the headers of the safetensors, held against each other; no weight is read before `pieces`.

    Attributes:
        family: of the config's `model_type`.
        decoder: abstract.
        shapes: of its parameters, by path.
        notes: lines for the user about tensors and fields that are not written as they are read.
    """

    def __init__(self, path: epath.Path, hf: Mapping[str, Any], dtype: np.dtype) -> None:
        """`hf`: the content of config.json. `dtype`: of what `pieces` gives, where `dtype_in_use` says no other.

        Raises:
            UserError: a field of it is not honoured, or a tensor is missing, unknown, of another shape or of a dtype
                that is not read, or the files are not whole (`storage.safetensors.read_index`).
        """
        self.path, self.family = path, family_for(hf)
        self._stored = open_tensors(path, hf, dtype)
        self.notes = notes(self._stored)
        config = self.family.from_hf(hf)
        if unknown := self.family.unknown(hf):
            empty = f"config.json: no fields of the {self.family.MODEL_TYPE} family, empty, and not kept"
            self.notes.append(f"{empty}: {', '.join(unknown)}")
        self.decoder = Decoder(self.family.as_stored(config, self._stored.index))
        if config.mtp and not self.decoder.config.mtp:
            said = f"config.json speaks of {config.mtp} layers for further tokens, which the files lack"
            self.notes.append(f"{said}; written, it will say 0")
        self.shapes = {name: leaf.shape for name, leaf in flatten(abstract_params(self.decoder)).items()}
        self._dtypes = {
            name: dtype_in_use(declared.axes, dtype) for name, declared in flatten(declarations(self.decoder)).items()
        }
        self._names = {self.family.canonical(name): name for name in self._stored}
        if len(self._names) < len(self._stored):
            raise UserError(f"{path} has tensors that are one in two spellings")
        self._table = self.family.tensors(self.decoder, frozenset(self._names))
        self._found = {
            (ours, tensor.layer): (tensor, i) for tensor in self._table for i, ours in enumerate(tensor.paths)
        }
        self._check({name: self._stored.index[theirs] for name, theirs in self._names.items()})

    def _check(self, index: Mapping[str, TensorInfo]) -> None:
        wanted = {
            name: shape
            for tensor in self._table
            for name, shape in zip(
                tensor.names, tensor.form.shapes([self._inner_shape(ours, tensor.layer) for ours in tensor.paths])
            )
        }
        for name in wanted:
            if name not in index:
                raise UserError(f"{self.path} has no tensor {name}")
        for name in index:
            if name not in wanted and not self.family.is_derived(name, self.decoder.config):
                raise UserError(
                    f"{self.path} has a tensor {name} that the {self.family.MODEL_TYPE} family does not have"
                )
        for name, shape in wanted.items():
            if index[name].shape != shape:
                have, asked = list(index[name].shape), list(shape)
                raise UserError(f"{self.path}: tensor {name} has shape {have}, config.json says {asked}")
            if str(index[name].dtype) not in FLOATS:
                raise UserError(
                    f"{self.path}: tensor {name} has dtype {index[name].dtype}, not one of {', '.join(FLOATS)}"
                )

    def check_copies(self) -> None:
        """Raises UserError where two tensors are one parameter, and differ: a tied head, or what further-token layers
        have again. Reads both."""
        first: dict[Any, Tensor] = {}
        for tensor in self._table:
            other = first.setdefault((tensor.paths, tensor.layer), tensor)
            for name, again in zip(other.names, tensor.names):
                stored = [self._stored[self._names[each]] for each in (name, again)]
                if name != again and not np.array_equal(stored[0], stored[1]):
                    raise UserError(f"{self.path}: tensors {name} and {again} differ, but are one parameter")
        embed, head = (self._names.get(f"{self.family.TOP.get(name)}.weight") for name in ("embed", "head"))
        if not self.decoder.config.tie_embeddings or embed is None or head is None:
            return
        if not np.array_equal(self._stored[embed], self._stored[head]):
            raise UserError(f"{self.path}: tie_word_embeddings is true, yet {head} differs from the embedding")

    def _inner_shape(self, ours: str, layer: int | None) -> Shape:
        """Shape of one layer's parameter, or of one outside of the layers."""
        if layer is None:
            return self.shapes[ours]
        for s, segment in enumerate(self.decoder.groups):
            for position in range(len(segment.block)):
                if layer in segment.layers(position):
                    return self.shapes[f"segments/{s}/{position}/{ours}"][1:]
        raise ValueError(f"no layer {layer}")

    def _read(self, ours: str, layer: int | None) -> np.ndarray:
        tensor, i = self._found[ours, layer]
        sizes = [self._inner_shape(other, tensor.layer) for other in tensor.paths]
        return tensor.form.read([self._stored[self._names[name]] for name in tensor.names], sizes)[i]

    def pieces(self, ours: str, indices: Sequence[Index]) -> list[np.ndarray]:
        """Parts of a parameter, cast. One layer after the other is read, once; in it what the parts need, if mapped."""
        shape, dtype = self.shapes[ours], self._dtypes[ours]
        outs = [_aligned([len(_range(*pair)) for pair in zip(index, shape, strict=True)], dtype) for index in indices]
        if not ours.startswith("segments/"):
            whole = self._read(ours, None)
            for index, out in zip(indices, outs):
                _copy(whole[index], out)
            return outs
        _, segment, position, inner = ours.split("/", 3)
        for row, layer in enumerate(self.decoder.groups[int(segment)].layers(int(position))):
            holding = [(i, out) for i, out in zip(indices, outs) if row in _range(i[0], shape[0])]
            if not holding:
                continue
            whole = self._read(inner, layer)
            for index, out in holding:
                _copy(whole[index[1:]], out[_range(index[0], shape[0]).index(row), ...])
        return outs

    def dtypes(self) -> dict[str, str]:
        """The dtype that each tensor has here, by the name that it is written under, which may be another one."""
        found = {}
        for tensor in self.family.tensors(self.decoder):
            source = self._found[tensor.paths[0], tensor.layer][0].names[0]
            for name in tensor.names:
                stored = self._names[name if name in self._names else source]
                found[name] = str(self._stored.index[stored].dtype)
        return found


def _range(part: slice, size: int) -> range:
    return range(*part.indices(size))


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An array that jax on a CPU takes as it is; it copies one that lies at no multiple of 64 bytes."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _copy(source: np.ndarray, out: np.ndarray) -> None:
    """Piece by piece along the axis that lies slowest in the source: a file that is mapped is read as it lies.

    A transposed matrix copied at once is read column by column, each a page of its own.
    """
    if source.ndim == 0:
        out[...] = source
        return
    axis = int(np.argmax(source.strides))
    step = max(1, PIECE * source.shape[axis] // max(1, source.nbytes))
    for start in range(0, source.shape[axis], step):
        part = (slice(None),) * axis + (slice(start, start + step),)
        out[part] = source[part]
