"""The adapters that `peft_adapters.py` makes and the tests load: on which tiny model, PEFT's fields, and numbers.

NumPy only: both sides import it. The models are those of `family_recipe`, with its weights.
"""

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from tests.oracles import family_recipe

LINEAR = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "tied", {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}),
    "llama_all": ("llama", "biases", {"r": 3, "lora_alpha": 7, "use_rslora": True, "target_modules": "all-linear"}),
    "llama_dora": (
        "llama",
        "biases",
        {
            "r": 4,
            "lora_alpha": 8,
            "use_dora": True,
            "target_modules": ["q_proj", "down_proj", "embed_tokens", "lm_head"],
        },
    ),
    "llama_patterns": (
        "llama",
        "tied",
        {
            "r": 4,
            "lora_alpha": 4,
            "target_modules": LINEAR,
            "rank_pattern": {"layers.1.self_attn.q_proj": 6, "down_proj": 2},
            "alpha_pattern": {r"layers\.[12]\.mlp\.up_proj": 10, "o_proj": 1},
            "exclude_modules": ["layers.1.mlp.down_proj"],
        },
    ),
    "llama_layers": (
        "llama",
        "tied",
        {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "gate_proj"], "layers_to_transform": [0, 2]},
    ),
    "llama_regex": (
        "llama",
        "biases",
        {"r": 2, "lora_alpha": 5, "use_dora": True, "target_modules": r".*layers\.1\.(self_attn|mlp)\.[kdg]\w+_proj"},
    ),
    "llama_saved": (
        "llama",
        "biases",
        {
            "r": 2,
            "lora_alpha": 2,
            "target_modules": ["k_proj"],
            "modules_to_save": ["norm", "lm_head"],
            "bias": "lora_only",
        },
    ),
    "llama_embedding": ("llama", "tied", {"r": 3, "lora_alpha": 5, "target_modules": ["embed_tokens", "o_proj"]}),
    "llama_pissa": (
        "llama",
        "biases",
        {"r": 3, "lora_alpha": 6, "init_lora_weights": "pissa", "target_modules": ["q_proj", "up_proj"]},
    ),
    "gpt2": (
        "gpt2",
        "plain",
        {
            "r": 4,
            "lora_alpha": 9,
            "fan_in_fan_out": True,
            "target_modules": ["c_attn", "c_proj", "c_fc"],
            "bias": "all",
        },
    ),
    "gpt2_dora": (
        "gpt2",
        "plain",
        {"r": 3, "lora_alpha": 4, "fan_in_fan_out": True, "use_dora": True, "target_modules": ["c_attn", "wte"]},
    ),
    "gpt_neox": ("gpt_neox", "parallel", {"r": 3, "lora_alpha": 5, "target_modules": "all-linear"}),
    "phi3": (
        "phi3",
        "window",
        {"r": 3, "lora_alpha": 5, "use_dora": True, "target_modules": ["qkv_proj", "gate_up_proj"]},
    ),
    "falcon": ("falcon", "grouped", {"r": 3, "lora_alpha": 5, "target_modules": ["query_key_value", "dense_4h_to_h"]}),
    "gemma2": ("gemma2", "caps", {"r": 3, "lora_alpha": 5, "target_modules": ["embed_tokens", "q_proj"]}),
    "mixtral": (
        "mixtral",
        "full",
        {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj"], "target_parameters": [*EXPERTS, "mlp.gate.weight"]},
    ),
    "qwen3_moe": (
        "qwen3_moe",
        "mixed",
        {"r": 2, "lora_alpha": 3, "target_modules": [], "target_parameters": ["experts.down_proj"]},
    ),
    "gpt_oss": (
        "gpt_oss",
        "yarn",
        {
            "r": 2,
            "lora_alpha": 3,
            "target_modules": ["v_proj"],
            "target_parameters": EXPERTS,
            "rank_pattern": {"experts.down_proj": 3},
        },
    ),
    "llama4_text": (
        "llama4_text",
        "chunks",
        {
            "r": 2,
            "lora_alpha": 3,
            "target_modules": ["k_proj"],
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        },
    ),
    "deepseek_v3": ("deepseek_v3", "groups", {"r": 2, "lora_alpha": 3, "target_modules": "all-linear"}),
    "mamba2": ("mamba2", "groups", {"r": 2, "lora_alpha": 3, "target_modules": ["in_proj"]}),
    "llama_classes": (
        "llama",
        "tied",
        {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"], "task_type": "SEQ_CLS"},
    ),
    "llama_reward": (
        "llama",
        "biases",
        {"r": 2, "lora_alpha": 4, "use_dora": True, "target_modules": ["v_proj"], "modules_to_save": ["score"]},
    ),
    "llama_steps": (
        "llama",
        "biases",
        {"r": 2, "lora_alpha": 3, "target_modules": ["k_proj", "up_proj"], "task_type": "TOKEN_CLS"},
    ),
    "gpt2_classes": (
        "gpt2",
        "plain",
        {"r": 2, "lora_alpha": 3, "fan_in_fan_out": True, "target_modules": ["c_attn"], "task_type": "SEQ_CLS"},
    ),
}
LABELS = {"llama_classes": ("sequence", 3), "llama_reward": ("sequence", 1), "llama_steps": ("token", 2)}
LABELS |= {"gpt2_classes": ("sequence", 2)}
"""Adapters that bring scores to a folder that ends in logits: of texts or of tokens, and how many."""

MERGED_BASE = ("llama", "tied")
MERGED: dict[str, dict[str, Any]] = {
    "one": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]},
    "two": {"r": 4, "lora_alpha": 3, "target_modules": ["q_proj", "o_proj", "embed_tokens"]},
    "three": {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj", "embed_tokens"]},
}
"""Adapters that are put together, on one model."""
MERGED_WEIGHTS = [0.7, 0.4, -0.3]
METHODS: dict[str, dict[str, Any]] = {
    "linear": {},
    "cat": {},
    "svd": {"svd_rank": 5},
    "ties": {"density": 0.6},
    "ties_svd": {"density": 0.4, "majority_sign_method": "frequency"},
}
"""PEFT's arguments of each."""

STEPS: dict[str, tuple[str, dict[str, Any]]] = {
    "sft": ("sft", {"r": 3, "lora_alpha": 5, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
    "dpo": ("dpo", {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]}),
    "dpo_dora": ("dpo", {"r": 2, "lora_alpha": 4, "use_dora": True, "target_modules": ["k_proj", "o_proj", "up_proj"]}),
    "sft_pissa": (
        "sft",
        {"r": 3, "lora_alpha": 3, "init_lora_weights": "pissa", "target_modules": ["v_proj", "gate_proj"]},
    ),
    "reward": ("reward", {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "up_proj"], "task_type": "SEQ_CLS"}),
}
"""What TRL's trainers do with an adapter (trl_lora.py): job, PEFT's fields."""
LR_RATIO = 4.0


def draw(case: str, name: str, shape: tuple[int, ...], weights: Mapping[str, np.ndarray]) -> np.ndarray:
    """float32 values of a tensor of an adapter's file, which depend on `(case, name, shape)`, or are the model's."""
    stored = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    if name.endswith(".base_layer.weight"):
        return weights.get(stored, weights.get("model.embed_tokens.weight"))  # type: ignore[return-value]
    unit = 2.0 * np.random.RandomState(zlib.crc32(f"{case}/{name}".encode())).random_sample(shape) - 1.0
    if "lora_" not in name:
        return family_recipe.draw(CASES[case][0] if case in CASES else "llama", f"{case}/{stored}", shape)
    values = 0.9 + 0.4 * unit if name.endswith("magnitude_vector") else 0.4 * unit
    return values.astype(np.float32)
