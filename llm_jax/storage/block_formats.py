"""Weights that share a scale among the numbers of a block: FP8 (DeepSeek) and MXFP4 (gpt-oss), as plain arrays."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import ml_dtypes
import numpy as np

from llm_jax.base.errors import UserError
from llm_jax.storage.safetensors import LazyTensors, TensorInfo

F32 = np.dtype(np.float32)
BF16 = np.dtype(ml_dtypes.bfloat16)
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
MXFP4_BLOCK = 32
"""Numbers of an MXFP4 block, two to a byte."""


@dataclass(frozen=True)
class Packing:
    """How weights of a folder are packed."""

    method: Literal["fp8", "mxfp4"]
    block: tuple[int, int] = (128, 128)
    """Outputs and inputs that share a scale, of fp8."""


def unpack_fp8(weight: np.ndarray, scale: np.ndarray, block: tuple[int, int], dtype: np.dtype = F32) -> np.ndarray:
    """[..., R, C]: each number of `weight`, float8_e4m3fn, times the `scale` float32[..., r, c] of its block, in
    float32 and then cast to `dtype` (DeepSeek-V3, arXiv:2412.19437, section 3.3.2). The last blocks of rows and of
    columns may be cut off."""
    out = np.empty(weight.shape, dtype)
    columns, codes = weight.shape[-1], weight.view(np.uint8)
    for row in range(scale.shape[-2]):
        rows = slice(row * block[0], (row + 1) * block[0])
        along = np.repeat(scale[..., row : row + 1, :], block[1], axis=-1)[..., :columns]
        out[..., rows, :] = _FP8_VALUES[codes[..., rows, :]] * along
    return out


def unpack_mxfp4(blocks: np.ndarray, scales: np.ndarray, dtype: np.dtype = F32) -> np.ndarray:
    """[E, I, O] of uint8 `blocks` [E, O, I / 32, 16] and `scales` [E, O, I / 32]: FP4 numbers (E2M1) times the power of
    two of their block (E8M0), the low half of a byte before the high one (OCP Microscaling Formats 1.0, sections 5.3.3
    and 5.4.1); in float32, then cast to `dtype`. As gpt-oss has its experts, turned so that inputs come first."""
    out = np.empty((*scales.shape, MXFP4_BLOCK), dtype)
    with np.errstate(over="ignore"):
        for expert in range(len(out)):
            numbers = _FP4_PAIRS[blocks[expert]].view(np.float32)
            out[expert] = numbers * _E8M0_VALUES[scales[expert]][..., None]
    return np.swapaxes(out.reshape(*scales.shape[:2], -1), 1, 2)


class Unpacked(Mapping[str, np.ndarray]):
    """A folder's tensors with the packed ones under the names and with the shapes that plain ones would have.

    A packed tensor is unpacked, to `dtype`, each time it is asked for. In `index`, from which its dtype when written is
    taken, it is bfloat16.
    """

    def __init__(self, stored: LazyTensors, packing: Packing, dtype: np.dtype) -> None:
        """Raises UserError for a weight without scales or scales without a weight, scales of another shape or dtype,
        and a folder where nothing is packed."""
        self.stored, self.packing, self.dtype, self.packed = stored, packing, dtype, {}
        of_weight, of_scale = ("", "_scale_inv") if packing.method == "fp8" else ("_blocks", "_scales")
        kept = dict(stored.index)
        for scale in [name for name in stored.index if name.endswith(of_scale)]:
            name = scale.removesuffix(of_scale)
            weight = name + of_weight
            if weight not in kept:
                raise UserError(f"tensor {scale} has no {weight} beside it")
            shape = self._plain_shape(weight, kept.pop(weight), scale, kept.pop(scale))
            first = stored.index[weight]
            kept[name] = TensorInfo(first.file, shape, BF16, first.start)
            self.packed[name] = (weight, scale)
        for name, info in kept.items():
            if name not in self.packed and (info.dtype == FP8 or name.endswith("_blocks")):
                raise UserError(f"{info.file}: tensor {name} is packed, and has no scales beside it")
        if not self.packed:
            raise UserError(f"config.json: quantization_config says {packing.method}, and no tensor is packed so")
        self.index = kept

    def _plain_shape(self, weight: str, of_weight: TensorInfo, scale: str, of_scale: TensorInfo) -> tuple[int, ...]:
        shape = of_weight.shape
        if self.packing.method == "fp8":
            dtypes = (FP8, F32)
            blocks = tuple(-(-size // block) for size, block in zip(shape[-2:], self.packing.block))
            wanted, fits = (*shape[:-2], *blocks), len(shape) >= 2
        else:
            dtypes = (np.dtype(np.uint8),) * 2
            wanted, fits = shape[:-1], len(shape) == 4 and shape[-1] == MXFP4_BLOCK // 2
        if not fits:
            raise UserError(f"{of_weight.file}: {weight} has shape {list(shape)}, no {self.packing.method} tensor has")
        for name, info, dtype in ((weight, of_weight, dtypes[0]), (scale, of_scale, dtypes[1])):
            if info.dtype != dtype:
                raise UserError(f"{info.file}: {name} has dtype {info.dtype}, {self.packing.method} has {dtype} there")
        if of_scale.shape != wanted:
            have, asked = list(of_scale.shape), list(wanted)
            raise UserError(f"{of_scale.file}: {scale} has shape {have}, {weight} of {list(shape)} needs {asked}")
        return shape if self.packing.method == "fp8" else (shape[0], shape[2] * MXFP4_BLOCK, shape[1])

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.packed:
            return self.stored[name]
        weight, scale = (self.stored[part] for part in self.packed[name])
        if self.packing.method == "mxfp4":
            return unpack_mxfp4(weight, scale, self.dtype)
        return unpack_fp8(weight, scale, self.packing.block, self.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.index)

    def __len__(self) -> int:
        return len(self.index)


def _fp4_values() -> np.ndarray:
    """float32[16]: sign, two bits of exponent, one of mantissa."""
    positive = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
    return np.concatenate([positive, -positive])


def _e8m0_values() -> np.ndarray:
    """float32[256]: powers of two from -127, and at the end no number."""
    return np.append(np.ldexp(np.float32(1), np.arange(255) - 127), np.float32(np.nan))


_FP8_VALUES = np.arange(256, dtype=np.uint8).view(FP8).astype(np.float32)
# Both numbers of a byte as one item: looked up four times as fast as two.
_FP4_PAIRS = np.stack([_fp4_values()[np.arange(256) & 15], _fp4_values()[np.arange(256) >> 4]], axis=-1)
_FP4_PAIRS = _FP4_PAIRS.view(np.uint64)[:, 0]
_E8M0_VALUES = _e8m0_values()
