"""The tiny Llamas of the golden files: configs, weights and inputs from seeds. NumPy only: both sides import it.

Norms and biases are drawn too: left at ones and zeros they would hide a swapped or forgotten one.
"""

import zlib

import numpy as np

BASE = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "head_dim": 6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
CONFIGS = {
    "mha": {"num_key_value_heads": 4, "hidden_size": 32, "head_dim": 8},
    "gqa": {},
    "mqa": {"num_key_value_heads": 1, "num_hidden_layers": 3},
    "tied": {"tie_word_embeddings": True, "vocab_size": 83},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "attention_bias": {"attention_bias": True, "num_key_value_heads": 1, "tie_word_embeddings": True},
    "wide_heads": {"head_dim": 24, "num_attention_heads": 2, "num_key_value_heads": 1},
    "odd_heads": {"hidden_size": 30, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 12},
    "long_rope": {"rope_theta": 5e5, "max_position_embeddings": 8192, "head_dim": 8},
    "large_eps": {"rms_norm_eps": 1e-2, "num_hidden_layers": 4, "intermediate_size": 28},
    "packed": {"attention_bias": True},
}
"""`packed` is called with documents of several lengths per row, positions restarted and a block mask."""
BATCH, LENGTH, PROMPT, NEW_TOKENS = 2, 24, 9, 32
LENGTHS = [[7, 1, 11, 5], [16, 8]]


def config(name: str) -> dict:
    """Fields of config.json."""
    return {"model_type": "llama", "hidden_act": "silu", **BASE, **CONFIGS[name]}


def shapes(c: dict) -> dict[str, tuple[int, ...]]:
    """Hugging Face tensor names and shapes."""
    D, F, V, H = c["hidden_size"], c["intermediate_size"], c["vocab_size"], c["head_dim"]
    N, K = c["num_attention_heads"] * H, c["num_key_value_heads"] * H
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    if not c["tie_word_embeddings"]:
        out["lm_head.weight"] = (V, D)
    for i in range(c["num_hidden_layers"]):
        prefix = f"model.layers.{i}."
        attention = {"q_proj": (N, D), "k_proj": (K, D), "v_proj": (K, D), "o_proj": (D, N)}
        mlp = {"gate_proj": (F, D), "up_proj": (F, D), "down_proj": (D, F)}
        for part, biased, projections in (
            ("self_attn", c["attention_bias"], attention),
            ("mlp", c["mlp_bias"], mlp),
        ):
            for projection, shape in projections.items():
                out[f"{prefix}{part}.{projection}.weight"] = shape
                if biased:
                    out[f"{prefix}{part}.{projection}.bias"] = shape[:1]
        out[prefix + "input_layernorm.weight"] = out[prefix + "post_attention_layernorm.weight"] = (D,)
    return out


def weights(name: str) -> dict[str, np.ndarray]:
    """float32 tensors under their Hugging Face names."""
    out = {}
    for tensor, shape in shapes(config(name)).items():
        rng = np.random.default_rng([zlib.crc32(name.encode()), zlib.crc32(tensor.encode())])
        values = rng.standard_normal(shape)
        if "norm" in tensor:
            values = 1 + 0.3 * values
        elif tensor.endswith("bias"):
            values = 0.2 * values
        else:
            values = values * (0.5 if "embed" in tensor else shape[-1] ** -0.5)
        out[tensor] = values.astype(np.float32)
    return out


def tokens(name: str) -> np.ndarray:
    """int32[BATCH, LENGTH]."""
    rng = np.random.default_rng([zlib.crc32(name.encode()), 1])
    return rng.integers(0, config(name)["vocab_size"], (BATCH, LENGTH)).astype(np.int32)


def packing(name: str) -> tuple[np.ndarray, np.ndarray]:
    """positions, segment_ids int32[BATCH, LENGTH]; one document per row except for `packed`."""
    lengths = LENGTHS if name == "packed" else [[LENGTH]] * BATCH
    positions = np.stack([np.concatenate([np.arange(n) for n in row]) for row in lengths])
    segments = np.stack([np.repeat(np.arange(len(row)) + 1, row) for row in lengths])
    return positions.astype(np.int32), segments.astype(np.int32)


def logit_weights(name: str) -> np.ndarray:
    """float32[BATCH, LENGTH, V]: gradients are those of the mean cross-entropy plus mean(this * logits)."""
    rng = np.random.default_rng([zlib.crc32(name.encode()), 2])
    return rng.standard_normal((BATCH, LENGTH, config(name)["vocab_size"])).astype(np.float32)
