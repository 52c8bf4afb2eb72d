"""The tiny mixtures of experts of the golden files: configs, weights and inputs from seeds. NumPy only.

A case names a module of `transformers.models`, its block and config class, the block's tensors and the config's fields.
"""

from typing import Any

import numpy as np
from recipe import draw

BATCH, LENGTH, D, F, E = 2, 9, 12, 6, 8
SHARED = 10


def _fused(experts: int = E, width: int = D) -> dict[str, tuple[int, ...]]:
    return {"experts.gate_up_proj": (experts, 2 * F, width), "experts.down_proj": (experts, width, F)}


def _shared(name: str, size: int = SHARED, gate: bool = True, bias: bool = False) -> dict[str, tuple[int, ...]]:
    shapes = {"gate_proj": (size, D), "up_proj": (size, D), "down_proj": (D, size)}
    if not gate:
        del shapes["gate_proj"]
    out: dict[str, tuple[int, ...]] = {f"{name}.{key}.weight": shape for key, shape in shapes.items()}
    return out | {f"{name}.{key}.bias": shape[:1] for key, shape in shapes.items() if bias}


GATE, ROUTER = {"gate.weight": (E, D)}, {"router.weight": (E, D)}
CORRECTED = {**GATE, "gate.e_score_correction_bias": (E,)}
QWEN = {"num_experts": E, "num_experts_per_tok": 3, "moe_intermediate_size": F, "norm_topk_prob": False}
DEEPSEEK = {
    "n_routed_experts": E,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": F,
    "n_shared_experts": 2,
    "routed_scaling_factor": 1.7,
}
NEMOTRON = {
    **{k: v for k, v in DEEPSEEK.items() if k != "n_shared_experts"},
    "moe_shared_expert_intermediate_size": SHARED,
    "n_group": 2,
    "topk_group": 1,
    "mlp_hidden_act": "relu2",
}
GROUPED = {"n_group": 4, "topk_group": 2}


def _case(model: str, block: str, config: str, tensors: dict[str, tuple[int, ...]], **fields: Any) -> dict[str, Any]:
    return {"model": model, "block": block, "config": config, "tensors": tensors, "fields": fields}


CASES: dict[str, dict[str, Any]] = {
    "mixtral": _case(
        *("mixtral", "MixtralSparseMoeBlock", "MixtralConfig", {**GATE, **_fused()}),
        num_local_experts=E,
        num_experts_per_tok=2,
        intermediate_size=F,
    ),
    "qwen3": _case("qwen3_moe", "Qwen3MoeSparseMoeBlock", "Qwen3MoeConfig", {**GATE, **_fused()}, **QWEN),
    "qwen3_normalized": _case(
        *("qwen3_moe", "Qwen3MoeSparseMoeBlock", "Qwen3MoeConfig", {**GATE, **_fused()}),
        **{**QWEN, "norm_topk_prob": True, "hidden_act": "gelu"},
    ),
    "olmoe": _case(
        *("olmoe", "OlmoeSparseMoeBlock", "OlmoeConfig", {**GATE, **_fused()}),
        num_experts=E,
        num_experts_per_tok=3,
        intermediate_size=F,
        norm_topk_prob=False,
    ),
    "qwen2": _case(
        *("qwen2_moe", "Qwen2MoeSparseMoeBlock", "Qwen2MoeConfig"),
        {**GATE, **_fused(), **_shared("shared_expert"), "shared_expert_gate.weight": (1, D)},
        **{**QWEN, "shared_expert_intermediate_size": SHARED},
    ),
    "deepseek_v2": _case(
        *("deepseek_v2", "DeepseekV2Moe", "DeepseekV2Config", {**GATE, **_fused(), **_shared("shared_experts", 2 * F)}),
        **{**DEEPSEEK, "topk_method": "greedy"},
    ),
    "deepseek_v2_groups": _case(
        *("deepseek_v2", "DeepseekV2Moe", "DeepseekV2Config", {**GATE, **_fused(), **_shared("shared_experts", 2 * F)}),
        **{**DEEPSEEK, "topk_method": "group_limited_greedy", **GROUPED},
    ),
    "deepseek_v3": _case(
        *("deepseek_v3", "DeepseekV3MoE", "DeepseekV3Config"),
        {**CORRECTED, **_fused(), **_shared("shared_experts", 2 * F)},
        **{**DEEPSEEK, **GROUPED, "norm_topk_prob": True},
    ),
    "deepseek_v3_one_group": _case(
        *("deepseek_v3", "DeepseekV3MoE", "DeepseekV3Config"),
        {**CORRECTED, **_fused(), **_shared("shared_experts", 2 * F)},
        **{**DEEPSEEK, "n_group": 1, "topk_group": 1, "norm_topk_prob": False},
    ),
    "llama4": _case(
        *("llama4", "Llama4TextMoe", "Llama4TextConfig"),
        {
            **ROUTER,
            "experts.gate_up_proj": (E, D, 2 * F),
            "experts.down_proj": (E, F, D),
            **_shared("shared_expert", F),
        },
        num_local_experts=E,
        num_experts_per_tok=1,
        intermediate_size=F,
    ),
    "gpt_oss": _case(
        *("gpt_oss", "GptOssMLP", "GptOssConfig"),
        {
            **ROUTER,
            "router.bias": (E,),
            "experts.gate_up_proj": (E, D, 2 * F),
            "experts.gate_up_proj_bias": (E, 2 * F),
            "experts.down_proj": (E, F, D),
            "experts.down_proj_bias": (E, D),
        },
        num_local_experts=E,
        num_experts_per_tok=3,
        intermediate_size=F,
        swiglu_limit=1.1,
    ),
    "granite": _case(
        *("granitemoe", "GraniteMoeMoE", "GraniteMoeConfig", {**ROUTER, **_fused()}),
        num_local_experts=E,
        num_experts_per_tok=3,
        intermediate_size=F,
    ),
    "jamba": _case(
        *("jamba", "JambaSparseMoeBlock", "JambaConfig", {**ROUTER, **_fused()}),
        num_experts=E,
        num_experts_per_tok=2,
        intermediate_size=F,
    ),
    "nemotron": _case(
        *("nemotron_h", "NemotronHMoE", "NemotronHConfig"),
        {
            **CORRECTED,
            "experts.up_proj": (E, F, D),
            "experts.down_proj": (E, D, F),
            **_shared("shared_experts", gate=False),
        },
        **NEMOTRON,
    ),
    "nemotron_latent": _case(
        *("nemotron_h", "NemotronHMoE", "NemotronHConfig"),
        {
            **CORRECTED,
            "experts.up_proj": (E, F, 5),
            "experts.down_proj": (E, 5, F),
            "fc1_latent_proj.weight": (5, D),
            "fc1_latent_proj.bias": (5,),
            "fc2_latent_proj.weight": (D, 5),
            "fc2_latent_proj.bias": (D,),
            **_shared("shared_experts", gate=False, bias=True),
        },
        **{**NEMOTRON, "moe_latent_size": 5, "mlp_bias": True},
    ),
    "switch": _case(
        *("switch_transformers", "SwitchTransformersSparseMLP", "SwitchTransformersConfig"),
        {
            "router.classifier.weight": (E, D),
            **{f"experts.expert_{e}.wi.weight": (F, D) for e in range(E)},
            **{f"experts.expert_{e}.wo.weight": (D, F) for e in range(E)},
        },
        num_experts=E,
        d_ff=F,
        d_model=D,
        expert_capacity=2,
        dense_act_fn="relu",
    ),
}


def weights(name: str) -> dict[str, np.ndarray]:
    return {key: draw(f"{name}.{key}", shape, 1) for key, shape in CASES[name]["tensors"].items()}


def inputs(name: str) -> tuple[np.ndarray, np.ndarray]:
    """x [B, T, D] of variance 1, and what the output is multiplied by for the loss."""
    return tuple(draw(f"{name}.embed.{part}", (BATCH, LENGTH, D), 2) for part in ("x", "probe"))  # type: ignore[return-value]


def logits() -> tuple[np.ndarray, np.ndarray]:
    """Router logits of three layers [3, B, T, E], and an attention mask [B, T]."""
    mask = np.arange(LENGTH)[None] < np.array([[LENGTH], [5]])
    return draw("embed.logits", (3, BATCH, LENGTH, E), 3), mask
