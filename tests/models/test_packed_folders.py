"""Folders whose weights are packed (FP8 of DeepSeek, MXFP4 of gpt-oss) are read as the plain ones they stand for."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llm_jax.base.errors import UserError
from llm_jax.convert import main as convert
from llm_jax.models.families import family
from llm_jax.models.loading import load, read_model_config
from llm_jax.models.saving import save
from llm_jax.storage.block_formats import FP8, unpack_fp8, unpack_mxfp4
from tests.models.conftest import TESTS
from tests.oracles import family_recipe as recipe

BF16 = ml_dtypes.bfloat16
GOLDEN = TESTS / "golden" / "families"
QUANTIZED: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [8, 6]},
    "gpt_oss": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]},
}


class Folders(NamedTuple):
    packed: Path
    plain: Path
    """The same model with float32 weights."""
    names: set[str]
    """Of the tensors that are packed in the first."""


def fp8(name: str, shape: tuple[int, ...], draw: np.random.RandomState) -> tuple[dict[str, np.ndarray], np.ndarray]:
    codes = draw.randint(0, 256, shape).astype(np.uint8)
    codes[codes & 127 == 127] = 0
    scale = draw.uniform(1e-4, 3e-3, [-(-size // by) for size, by in zip(shape, (8, 6))]).astype(np.float32)
    return {name: codes.view(FP8), f"{name}_scale_inv": scale}, unpack_fp8(codes.view(FP8), scale, (8, 6))


def mxfp4(name: str, shape: tuple[int, ...], draw: np.random.RandomState) -> tuple[dict[str, np.ndarray], np.ndarray]:
    experts, inputs, outputs = shape
    blocks = draw.randint(0, 256, (experts, outputs, inputs // 32, 16)).astype(np.uint8)
    scales = draw.randint(120, 126, blocks.shape[:-1]).astype(np.uint8)
    return {f"{name}_blocks": blocks, f"{name}_scales": scales}, unpack_mxfp4(blocks, scales)


def write(folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, folder / "model.safetensors")
    return folder


def made(name: str, path: Path) -> Folders:
    meta = json.loads(np.load(GOLDEN / f"{name}.npz")["meta"].tobytes())["configs"]
    config, draw = dict(next(iter(meta.values()))["new"]), np.random.RandomState(0)
    shapes: dict[str, tuple[int, ...]] = {
        key: tuple(shape) for key, shape in next(iter(meta.values()))["shapes"].items()
    }
    if name == "gpt_oss":
        # Blocks are of 32 inputs.
        config |= {"hidden_size": 32, "intermediate_size": 32}
        sizes = {24: 32, 14: 32, 28: 64}
        heads = config["num_attention_heads"] * config["head_dim"]
        assert heads not in sizes and not {16, 24, 28} & {config["vocab_size"], config["num_local_experts"]}
        shapes = {key: tuple(sizes.get(size, size) for size in shape) for key, shape in shapes.items()}
    plain = recipe.weights(name, shapes)
    packed = dict(plain)
    for key, shape in shapes.items():
        of_fp8 = name == "deepseek_v3" and "_proj" in key and len(shape) == 2
        if of_fp8 or (name == "gpt_oss" and key.endswith(("gate_up_proj", "down_proj"))):
            del packed[key]
            parts, plain[key] = (fp8 if of_fp8 else mxfp4)(key, shape, draw)
            packed |= parts
    names = {key for key in plain if key not in packed or f"{key}_scale_inv" in packed}
    quantized = {**config, "quantization_config": QUANTIZED[name]}
    return Folders(write(path / "packed", quantized, packed), write(path / "plain", config, plain), names)


@pytest.fixture(scope="module", params=list(QUANTIZED))
def folders(request, tmp_path_factory) -> Folders:
    return made(request.param, tmp_path_factory.mktemp(request.param))


def test_read_as_the_plain_folder(folders, capsys):
    model, plain = load(folders.packed), load(folders.plain)
    assert len(folders.names) > 5
    said = capsys.readouterr().err
    assert f"{len(folders.names)} tensors are unpacked from" in said and "bfloat16" in said and said.count("\n") == 1
    jax.tree.map(np.testing.assert_array_equal, model.params, plain.params)
    assert model.config == plain.config == read_model_config(folders.packed).resolved()
    low, low_plain = load(folders.packed, "bfloat16"), load(folders.plain, "bfloat16")
    jax.tree.map(np.testing.assert_array_equal, low.params, low_plain.params)


def test_written_plain_in_bfloat16(folders, tmp_path):
    model = load(folders.packed)
    save(model, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    written, plain = load_file(tmp_path / "out" / "model.safetensors"), load_file(folders.plain / "model.safetensors")
    assert written.keys() == plain.keys()
    for name, tensor in written.items():
        assert tensor.dtype == (BF16 if name in folders.names else np.float32)
        np.testing.assert_array_equal(tensor, plain[name].astype(tensor.dtype))
    save(model, tmp_path / "wide", "float32")
    wide = load_file(tmp_path / "wide" / "model.safetensors")
    for name in plain:
        np.testing.assert_array_equal(wide[name], plain[name])


def test_converted_both_ways(folders, tmp_path, capsys):
    """What rounding does is said; MXFP4 loses nothing."""
    convert([str(folders.packed), str(tmp_path / "native"), "--verify"])
    assert "logits differ by 0.0e+00" in capsys.readouterr().out
    convert([str(tmp_path / "native"), str(tmp_path / "out"), "--verify"])
    out = capsys.readouterr().out
    if "fp8" in str(read_quantization(folders.packed)):
        assert f"{len(folders.names)} tensors hold more digits" in out
    else:
        assert "more digits" not in out and "logits differ by 0.0e+00" in out
    convert([str(tmp_path / "native"), str(tmp_path / "wide"), "--dtype=float32", "--verify"])
    assert "logits differ by 0.0e+00" in capsys.readouterr().out


def read_quantization(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize(
    ("quantized", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "'gptq'.* only fp8 and mxfp4 are read"),
        ({"quant_method": "awq"}, "'awq'.* only fp8 and mxfp4 are read"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "'bitsandbytes'.* only fp8 and mxfp4 are read"),
        ({"quant_method": "compressed-tensors"}, "'compressed-tensors'.* only fp8"),
        ({"bits": 4}, "{'bits': 4}: .* only fp8"),
        ("fp8", "quantization_config"),
        ({"quant_method": "fp8", "activation_scheme": "static"}, "activation_scheme='static' is not supported"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"weight_block_size=\[128\] is not two"),
        ({"quant_method": "fp8", "weight_block_size": None}, "weight_block_size"),
        ({"quant_method": "fp8", "weight_block_size": [0, 4]}, r"weight_block_size=\[0, 4\]"),
        ({"quant_method": "fp8", "expert_dtype": "fp4"}, "expert_dtype='fp4'"),
        ({"quant_method": "fp8", "group": 3}, "group=3 is not a field of fp8"),
        ({"quant_method": "mxfp4", "bits": 4}, "bits=4 is not a field of mxfp4"),
    ],
)
def test_other_packings_are_refused_by_name(quantized, message):
    with pytest.raises(UserError, match=message) as error:
        family("llama").from_hf({"model_type": "llama", "quantization_config": quantized})
    assert "\n" not in str(error.value)
