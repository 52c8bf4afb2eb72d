"""`quantization_config` of config.json: how a folder's weights are packed, for those packings that are read."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from llm_jax.base.config import typed
from llm_jax.base.errors import UserError
from llm_jax.storage.block_formats import BF16, Packing, Unpacked
from llm_jax.storage.safetensors import LazyTensors

FIELD = "quantization_config"
# Method -> its fields -> the values that change nothing here; None where any does (which tensors are packed is seen).
METHODS: dict[str, dict[str, tuple[Any, ...] | None]] = {
    "fp8": {
        "fmt": ("e4m3", "float8_e4m3fn", None),
        # Engines that multiply in fp8 round activations too; here they stay as they are.
        "activation_scheme": ("dynamic", None),
        "scale_fmt": None,
        "modules_to_not_convert": None,
        "ignored_layers": None,
        "modules_to_convert": None,
        "expert_dtype": ("fp8", None),
        "dequantize": None,
        "weight_block_size": None,
    },
    "mxfp4": {"modules_to_not_convert": None, "dequantize": None},
}


def read_packing(hf: Mapping[str, Any]) -> Packing | None:
    """None where weights are plain. Raises UserError for a method that is not read, or options of it that are not."""
    said = hf.get(FIELD)
    if said is None:
        return None
    said = typed(dict[str, Any], said, f"config.json: {FIELD}")
    method = said.get("quant_method")
    if not isinstance(method, str) or method not in METHODS:
        raise UserError(f"config.json: {FIELD}={said!r}: of packed weights only {' and '.join(METHODS)} are read")
    for name, value in said.items():
        if name != "quant_method" and name not in METHODS[method]:
            raise UserError(f"config.json: {FIELD}: {name}={value!r} is not a field of {method}")
        allowed = METHODS[method].get(name)
        if allowed is not None and value not in allowed:
            raise UserError(f"config.json: {FIELD}: {name}={value!r} is not supported (only {allowed[0]!r})")
    if method == "mxfp4":
        return Packing("mxfp4")
    block = typed(tuple[int, ...], said.get("weight_block_size", (128, 128)), f"config.json: {FIELD}.weight_block_size")
    if len(block) != 2 or min(block) < 1:
        raise UserError(f"config.json: {FIELD}: weight_block_size={list(block)} is not two positive numbers")
    return Packing("fp8", (block[0], block[1]))


def open_tensors(path: epath.PathLike, hf: Mapping[str, Any], dtype: np.dtype) -> LazyTensors | Unpacked:
    """The tensors of a folder by the names of plain ones: packed ones in `dtype`, others in their own.

    Raises UserError as they and `read_packing` do."""
    packing, stored = read_packing(hf), LazyTensors(path)
    return stored if packing is None else Unpacked(stored, packing, dtype)


def notes(stored: LazyTensors | Unpacked) -> list[str]:
    """A line for the user about tensors that are not written as they are read; none where all are."""
    if not isinstance(stored, Unpacked):
        return []
    count, method = len(stored.packed), stored.packing.method
    return [
        f"{count} tensors are unpacked from {method}, and plain from here on (written as {BF16}, unless told otherwise)"
    ]
