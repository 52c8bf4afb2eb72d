"""The golden mixtures of experts in this project's terms: their configs, and where each tensor goes."""

import importlib.util
import pathlib
import sys
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.models.config import ModelConfig
from llm_jax.models.experts import Experts
from llm_jax.models.experts_config import ExpertsConfig
from llm_jax.models.parameter import abstract_params

TESTS = pathlib.Path(__file__).parents[1]


def _load_recipe() -> ModuleType:
    folder = str(TESTS / "oracles")
    spec = importlib.util.spec_from_file_location("experts_recipe", TESTS / "oracles" / "experts_recipe.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(folder)
    return module


RECIPE = _load_recipe()
V3: dict[str, Any] = {"scores": "sigmoid", "correction_bias": True, "group_score": "top2", "top_k": 3, "scale": 1.7}
EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"top_k": 2},
    "qwen3": {"top_k": 3, "normalize": False},
    "qwen3_normalized": {"top_k": 3},
    "olmoe": {"top_k": 3, "normalize": False},
    "qwen2": {"top_k": 3, "normalize": False, "shared_size": 10, "shared_gate": True},
    "deepseek_v2": {"top_k": 3, "normalize": False, "scale": 1.7, "shared_size": 12},
    "deepseek_v2_groups": {
        "top_k": 3,
        "normalize": False,
        "scale": 1.7,
        "shared_size": 12,
        "groups": 4,
        "top_groups": 2,
    },
    "deepseek_v3": {**V3, "groups": 4, "top_groups": 2, "shared_size": 12},
    "deepseek_v3_one_group": {**V3, "normalize": False, "shared_size": 12},
    "llama4": {"top_k": 1, "scores": "sigmoid", "normalize": False, "weigh": "input", "shared_size": 6},
    "gpt_oss": {"top_k": 3, "router_bias": True, "bias": True, "limit": 1.1},
    "granite": {"top_k": 3},
    "jamba": {"top_k": 2, "normalize": False},
    "nemotron": {**V3, "groups": 2, "top_groups": 1, "shared_size": 10},
    "nemotron_latent": {**V3, "groups": 2, "top_groups": 1, "shared_size": 10, "latent_size": 5},
    "switch": {"top_k": 1, "normalize": False, "capacity_factor": 1.0},
}
MODEL: dict[str, dict[str, Any]] = {
    "qwen3_normalized": {"activation": "gelu"},
    "nemotron": {"activation": "relu2", "gated": False},
    "nemotron_latent": {"activation": "relu2", "gated": False, "mlp_bias": True},
    "switch": {"activation": "relu", "gated": False},
}
LINEARS = {
    "gate": "router",
    "router": "router",
    "router.classifier": "router",
    "shared_expert_gate": "shared_gate",
    "fc1_latent_proj": "latent_in",
    "fc2_latent_proj": "latent_out",
}


def model_config(name: str, **experts: Any) -> ModelConfig:
    """With `experts` in place of some of the case's fields."""
    fields = {"num": RECIPE.E, "intermediate_size": RECIPE.F, **EXPERTS[name], **experts}
    options = {"vocab_size": 16, "hidden_size": RECIPE.D, "num_heads": 2, **MODEL.get(name, {})}
    return ModelConfig(**options, experts=ExpertsConfig(**fields)).resolved()


def params(name: str, tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    """The tensors of a transformers block, or their gradients, as the tree of `Experts`."""
    out: dict[str, Any] = {}

    def put(value: np.ndarray, *path: str) -> None:
        node = out
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = jnp.asarray(value)

    for key, value in tensors.items():
        module, _, kind = key.rpartition(".")
        if module in LINEARS:
            put(value.T, LINEARS[module], {"e_score_correction_bias": "correction"}.get(kind, kind))
        elif module.startswith("shared_expert"):
            put(value.T, "shared", module.rpartition(".")[2].removesuffix("_proj"), kind)
        elif name == "switch":
            continue
        elif kind.startswith("gate_up_proj"):
            last = "bias" if kind.endswith("bias") else "weight"
            if last == "weight" and name not in ("llama4", "gpt_oss"):
                value = np.swapaxes(value, 1, 2)
            gate, up = (value[..., ::2], value[..., 1::2]) if name == "gpt_oss" else np.split(value, 2, -1)
            put(gate, "gate", last)
            put(up, "up", last)
        elif kind == "down_proj_bias":
            put(value, "down", "bias")
        else:
            transposed = value if name in ("llama4", "gpt_oss") else np.swapaxes(value, 1, 2)
            put(transposed, kind.removesuffix("_proj"), "weight")
    if name == "switch":
        for ours, theirs in (("up", "wi"), ("down", "wo")):
            each = [tensors.get(f"experts.expert_{e}.{theirs}.weight") for e in range(RECIPE.E)]
            like = next(value for value in each if value is not None)
            put(np.stack([np.zeros_like(like.T) if x is None else x.T for x in each]), ours, "weight")
    return out


def drawn(config: ModelConfig, seed: int = 0, scale: float = 0.4) -> dict[str, Any]:
    """Random parameters, biases included."""
    rng = np.random.default_rng(seed)
    shapes = abstract_params(Experts(config))
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape) * scale, jnp.float32), shapes)
