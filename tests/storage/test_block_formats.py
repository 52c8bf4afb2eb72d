"""Packed weights unpack to the very bits of torch and transformers: golden file of tests/oracles/torch_packed.py."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from llm_jax.base.errors import UserError
from llm_jax.storage.block_formats import BF16, F32, FP8, Packing, Unpacked, unpack_fp8, unpack_mxfp4
from llm_jax.storage.safetensors import LazyTensors, write_folder

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "packed.npz")


def of(prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): GOLDEN[name] for name in GOLDEN.files if name.startswith(prefix)}


def bf16(x: np.ndarray) -> np.ndarray:
    return x.astype(ml_dtypes.bfloat16).view(np.uint16)


@pytest.mark.parametrize("name", ["cut", "deepseek", "whole"])
def test_fp8_is_torchs_product(name):
    case = of(f"fp8/{name}/")
    ours = unpack_fp8(case["weight"].view(FP8), case["scale"], tuple(case["block"]))
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours.view(np.uint32), case["float32"].view(np.uint32))
    half = unpack_fp8(case["weight"].view(FP8), case["scale"], tuple(case["block"]), BF16)
    np.testing.assert_array_equal(half.view(np.uint16), case["bfloat16"])


def test_fp8_of_several_matrices_is_each():
    case = of("fp8/cut/")
    weight, scale = (np.stack([case[name], case[name][::-1]]) for name in ("weight", "scale"))
    both = unpack_fp8(weight.view(FP8), scale, tuple(case["block"]))
    np.testing.assert_array_equal(both[0], case["float32"])
    np.testing.assert_array_equal(both[1], unpack_fp8(weight[1].view(FP8), scale[1], tuple(case["block"])))


def test_mxfp4_is_transformers():
    case = of("mxfp4/")
    ours = unpack_mxfp4(case["blocks"], case["scales"])
    assert ours.dtype == np.float32 and ours.shape == (2, 64, 4)
    half = unpack_mxfp4(case["blocks"], case["scales"], BF16)
    np.testing.assert_array_equal(np.ascontiguousarray(half).view(np.uint16), case["bfloat16"])
    # Every number is a bfloat16: nothing is lost by writing them so.
    np.testing.assert_array_equal(ours.astype(ml_dtypes.bfloat16).astype(np.float32), ours)


def test_mxfp4_scale_without_a_number():
    """E8M0 has no number for 255 (OCP Microscaling Formats 1.0, section 5.4.1)."""
    ours = unpack_mxfp4(np.zeros((1, 1, 1, 16), np.uint8), np.full((1, 1, 1), 255, np.uint8))
    assert np.isnan(ours).all()


def folder_of(path: Path, tensors: dict[str, np.ndarray], packing: Packing) -> Unpacked:
    write_folder(path, tensors)
    return Unpacked(LazyTensors(path), packing, F32)


def test_folder_of_packed_tensors_as_plain_ones(tmp_path):
    case, norm = of("fp8/cut/"), np.ones(3, np.float32)
    tensors = {"a.weight": case["weight"].view(FP8), "a.weight_scale_inv": case["scale"], "norm.weight": norm}
    found = folder_of(tmp_path / "fp8", tensors, Packing("fp8", (16, 32)))
    assert sorted(found) == ["a.weight", "norm.weight"]
    assert (found.index["a.weight"].shape, str(found.index["a.weight"].dtype)) == ((37, 70), "bfloat16")
    np.testing.assert_array_equal(found["a.weight"], case["float32"])
    np.testing.assert_array_equal(found["norm.weight"], norm)
    case = of("mxfp4/")
    tensors = {"e.up_blocks": case["blocks"], "e.up_scales": case["scales"], "e.up_bias": norm}
    found = folder_of(tmp_path / "mxfp4", tensors, Packing("mxfp4"))
    assert sorted(found) == ["e.up", "e.up_bias"]
    assert (found.index["e.up"].shape, str(found.index["e.up"].dtype)) == ((2, 64, 4), "bfloat16")
    np.testing.assert_array_equal(bf16(found["e.up"]), case["bfloat16"])


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        ("fp8", {"weight_scale_inv": None}, "weight is packed, and has no scales beside it"),
        ("fp8", {"weight": None}, "weight_scale_inv has no weight beside it"),
        ("fp8", {"weight": np.ones((37, 70), np.float32)}, "weight has dtype float32, fp8 has float8_e4m3fn there"),
        ("fp8", {"weight_scale_inv": np.ones((3, 3), np.int8)}, "weight_scale_inv has dtype int8, fp8 has float32"),
        (
            "fp8",
            {"weight_scale_inv": np.ones((3, 2), np.float32)},
            r"\[3, 2\], weight of \[37, 70\] needs \[3, 3\]",
        ),
        ("fp8", {"weight": np.ones(70, FP8)}, r"weight has shape \[70\], no fp8 tensor has"),
        ("fp8", {"weight": None, "weight_scale_inv": None}, "says fp8, and no tensor is packed so"),
        ("mxfp4", {"_scales": None}, "_blocks is packed, and has no scales beside it"),
        ("mxfp4", {"_blocks": np.zeros((2, 4, 2, 8), np.uint8)}, r"shape \[2, 4, 2, 8\], no mxfp4 tensor has"),
        ("mxfp4", {"_scales": np.zeros((2, 4, 1), np.uint8)}, r"shape \[2, 4, 1\], _blocks of .* needs \[2, 4, 2\]"),
        ("mxfp4", {"_blocks": np.zeros((2, 4, 2, 16), np.float32)}, "_blocks has dtype float32, mxfp4 has uint8"),
    ],
)
def test_folders_that_are_refused(tmp_path, method, change, message):
    fp8, mxfp4 = of("fp8/cut/"), of("mxfp4/")
    tensors = {"weight": fp8["weight"].view(FP8), "weight_scale_inv": fp8["scale"]}
    if method == "mxfp4":
        tensors = {"_blocks": mxfp4["blocks"], "_scales": mxfp4["scales"]}
    tensors = {name: x for name, x in {"kept": np.ones(1, np.float32), **tensors, **change}.items() if x is not None}
    with pytest.raises(UserError, match=message) as error:
        folder_of(tmp_path, tensors, Packing(method, (16, 32)))
    assert "\n" not in str(error.value)
