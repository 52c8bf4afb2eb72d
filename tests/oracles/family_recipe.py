"""Weights, tokens and names of the tiny models of `family_configs`, from seeds. NumPy only: both sides import it.

Norms, biases and every vector are drawn too: left at ones and zeros they would hide a swapped or forgotten one. Values
are uniform, drawn by `RandomState.random_sample`, whose stream is frozen (NEP 19) and uses no libm.
"""

import re
import zlib
from collections.abc import Mapping

import numpy as np

from tests.oracles.family_configs import CONFIGS as CONFIGS

BATCH, LENGTH, PROMPT, NEW_TOKENS = 2, 37, 9, 32
POSITIONS = np.arange(0, LENGTH, 3)
"""Those whose logits a golden file holds."""
ENCODERS = ("modernbert",)
GRADIENTS = {
    "qwen3": "full",
    "mixtral": "full",
    "deepseek_v3": "groups",
    "mamba": "tied",
    "mamba2": "groups",
    "jamba": "experts",
}
"""The configuration of a family whose gradients a golden file holds."""
AS_GENERATE = {("llama", "dynamic"), ("qwen3", "pattern")}
"""Dynamic NTK: past the trained length, cached decoding is to follow `generate`, which differs from a full forward."""

EMBEDDINGS = "embed_tokens|wte|wpe|word_embeddings|embed_in|backbone.embeddings|tok_embeddings"
RENAMED = {
    "gpt_neox": {"embed_out.": "lm_head."},
    "nemotron_h": {"backbone.": "model."},
    "mixtral": {".block_sparse_moe.": ".mlp."},
    "granitemoehybrid": {
        "moe.input_linear.weight": "moe.experts.gate_up_proj",
        "moe.output_linear.weight": "moe.experts.down_proj",
        "moe.router.layer.weight": "moe.router.weight",
    },
}
"""Names in a folder, and in a running model of transformers 5."""
HEADS = ("lm_head.weight", "embed_out.weight", "decoder.weight", "classifier.weight")
ROUTERS = r"\.gate\.weight$|router\.(layer\.)?weight$"
INPUTS_FIRST = r"\.(c_attn|c_proj|c_fc)\.weight|experts\.(gate_up_proj|down_proj)$"
"""Matrices stored `[..., inputs, outputs]`: those of GPT-2, and the experts of Llama 4 and gpt-oss."""


def draw(family: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32 values of the tensor `name` in a folder, which depend on `(family, name, shape)` only."""
    unit = 2.0 * np.random.RandomState(zlib.crc32(name.encode())).random_sample(shape) - 1.0
    if name.endswith("A_log"):
        values = 0.2 + unit
    elif name.endswith(("dt_bias", "dt_proj.bias")):
        values = 1.6 * unit - 1.2
    elif name.endswith(("sinks", "router.bias")):
        values = unit
    elif name.endswith(".D"):
        values = 1.0 + 0.5 * unit
    elif len(shape) == 1 and name.endswith("weight"):
        # Gemma's norms multiply by 1 + weight.
        values = 0.5 * unit + (not family.startswith("gemma"))
    elif name.endswith("correction_bias"):
        values = 0.25 * unit
    elif name.endswith(("bias", "_bias")):
        values = 0.5 * unit
    elif re.search(EMBEDDINGS, name):
        # Gemma multiplies its embedding by the root of its width.
        values = unit * (0.2 if family.startswith("gemma") else 0.5)
    else:
        first = family in ("gpt2", "llama4_text", "gpt_oss") and re.search(INPUTS_FIRST, name)
        # Larger ones would make gradients in float32 too inexact to be compared.
        gain = 1.5 if name in HEADS else 2.0 if re.search(ROUTERS, name) else 1.0
        values = unit * (gain * np.sqrt(3.0 / shape[-2 if first else -1]))
    return values.astype(np.float32)


def weights(family: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """The tensors of a folder under their Hugging Face names."""
    return {name: draw(family, name, tuple(shape)) for name, shape in shapes.items()}


def tokens(family: str, name: str) -> np.ndarray:
    """int32[BATCH, LENGTH]."""
    config = CONFIGS[family][name]
    unit = np.random.RandomState(zlib.crc32(f"{family}/{name}".encode())).random_sample((BATCH, LENGTH))
    return (unit * config["vocab_size"]).astype(np.int32)


def seen(family: str) -> np.ndarray:
    """bool[BATCH, LENGTH], True for tokens: the second row of an encoder ends in padding."""
    lengths = (LENGTH, LENGTH - 9 if family in ENCODERS else LENGTH)
    return np.arange(LENGTH) < np.array(lengths)[:, None]


def published(family: str, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same tensors as older releases left them: without the prefix of the inner model, or with derived buffers."""
    if family in ("gpt2", "bloom") and "lm_head.weight" not in tensors:
        tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    out = dict(tensors)
    for name in tensors:
        layer, _, rest = name.rpartition("input_layernorm.weight")
        if family == "llama" and layer and not rest:
            out[f"{layer}self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
        elif family == "gpt_neox" and layer and not rest:
            out[f"{layer}attention.bias"] = np.tril(np.ones((1, 1, 64, 64), np.bool_))
            out[f"{layer}attention.masked_bias"] = np.float32(-1e9)
            out[f"{layer}attention.rotary_emb.inv_freq"] = np.ones(4, np.float32)
        elif family == "gpt2" and name.endswith("ln_1.weight"):
            out[f"{name.removesuffix('ln_1.weight')}attn.bias"] = np.tril(np.ones((1, 1, 48, 48), np.float32))
    return {name: np.asarray(tensor) for name, tensor in out.items()}


def fused(
    family: str, tensors: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
    """The tensors under the names of `shapes`, those of a running model, where one tensor holds all experts."""
    renamed = {_renamed(name, RENAMED.get(family, {})): tensor for name, tensor in tensors.items()}
    out = {}
    for name in shapes:
        if name in renamed:
            out[name] = renamed[name]
            continue
        stem, _, kind = name.rpartition(".")
        first, second, down = ("w1", "w3", "w2") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
        parts = {"gate_up_proj": (first, second), "up_proj": ("up_proj",), "down_proj": (down,)}[kind]
        experts = [[renamed[f"{stem}.{e}.{part}.weight"] for part in parts] for e in range(shapes[name][0])]
        out[name] = np.stack([np.concatenate(expert) for expert in experts])
    return out


def _renamed(name: str, pairs: Mapping[str, str]) -> str:
    for before, after in pairs.items():
        name = name.replace(before, after)
    return name
