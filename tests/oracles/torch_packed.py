"""Packed weights and what torch and transformers unpack them to.

    python -m tests.oracles.torch_packed    # writes tests/golden/packed.npz

`fp8/NAME/{weight, scale, block, float32, bfloat16}`: uint8 codes of torch.float8_e4m3fn [R, C], float32 scales of
blocks, and their product, as `Fp8Dequantize` of transformers defines it (bfloat16 as uint16). `mxfp4/{blocks, scales,
bfloat16}`: all bytes, and what `convert_moe_packed_tensors` makes of them.
"""

import pathlib

import numpy as np
import torch
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "packed.npz"
FP8 = {"cut": ((37, 70), (16, 32)), "deepseek": ((129, 40), (128, 128)), "whole": ((8, 12), (4, 4))}
"""Name -> shape, block; the last blocks of the first two are cut off."""


def fp8(shape: tuple[int, int], block: tuple[int, int], draw: np.random.RandomState) -> dict[str, np.ndarray]:
    codes = draw.randint(0, 256, shape).astype(np.uint8)
    codes[codes & 127 == 127] = 0  # No numbers.
    scale = draw.uniform(1e-4, 3e-3, [-(-size // by) for size, by in zip(shape, block)]).astype(np.float32)
    weight = torch.from_numpy(codes).view(torch.float8_e4m3fn).to(torch.float32)
    each = torch.from_numpy(scale).repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    product = weight * each[: shape[0], : shape[1]]
    if all(size % by == 0 for size, by in zip(shape, block)):  # It knows no blocks that are cut off.
        packed = torch.from_numpy(codes).view(torch.float8_e4m3fn)
        theirs = Fp8Dequantize(None)._dequantize_one(packed, torch.from_numpy(scale), torch.float32)
        assert torch.equal(theirs, product)
    return {
        "weight": codes,
        "scale": scale,
        "block": np.array(block),
        "float32": product.numpy(),
        "bfloat16": product.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16),
    }


def mxfp4(draw: np.random.RandomState) -> dict[str, np.ndarray]:
    blocks = draw.permutation(256).astype(np.uint8).reshape(2, 4, 2, 16)
    scales = np.array([0, 1, 100, 118, 119, 120, 121, 122, 123, 126, 127, 128, 130, 140, 200, 250], np.uint8)
    out = convert_moe_packed_tensors(torch.from_numpy(blocks), torch.from_numpy(scales.reshape(2, 4, 2)))
    assert out.dtype == torch.bfloat16
    return {
        "blocks": blocks,
        "scales": scales.reshape(2, 4, 2),
        "bfloat16": out.view(torch.int16).numpy().view(np.uint16),
    }


def main() -> None:
    draw = np.random.RandomState(0)
    found = {f"fp8/{name}/{key}": x for name, sizes in FP8.items() for key, x in fp8(*sizes, draw).items()}
    found |= {f"mxfp4/{key}": x for key, x in mxfp4(draw).items()}
    np.savez_compressed(GOLDEN, **found)


if __name__ == "__main__":
    main()
