"""config.json as published folders carry it, from the one that transformers 5 writes. Neither NumPy nor torch."""

import math
from typing import Any

Fields = dict[str, Any]
EXPERTS = {"qwen3_moe": "num_experts", "olmoe": "num_experts", "jamba": "num_experts", "mixtral": "num_local_experts"}
EXPERTS |= {"deepseek_v2": "n_routed_experts", "deepseek_v3": "n_routed_experts", "nemotron_h": "n_routed_experts"}
NOTES: dict[str, Fields] = {
    "gemma": {"hidden_act": "gelu", "hidden_activation": None},
    "deepseek_v2": {
        "scoring_func": "softmax",
        "moe_layer_freq": 1,
        "ep_size": 1,
        "aux_loss_alpha": 0.001,
        "seq_aux": True,
    },
    "deepseek_v3": {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1, "ep_size": 1},
    "bloom": {"offset_alibi": 100, "seq_length": 2048, "skip_bias_add": True, "attention_softmax_in_fp32": True},
    "gpt2": {"n_ctx": 48},
    "mamba": {"rms_norm": True, "fused_add_norm": True, "ssm_cfg": {}},
    "jamba": {"attn_implementation": "eager", "num_logits_to_keep": 1},
    "cohere2": {"cache_implementation": "hybrid"},
}
"""Fields that only published folders have and that change nothing."""


def published(new: Fields, defaults: Fields) -> Fields:
    """The same model in the fields that folders had before release 5, without those that are the class's `defaults`."""
    family = new["model_type"]
    old = {k: v for k, v in new.items() if k not in defaults or defaults[k] != v or k == "model_type"}
    for name in ("dtype", "transformers_version", "rope_parameters"):
        old.pop(name, None)
    old |= {"torch_dtype": "float32", "transformers_version": "4.40.1", "use_cache": True}
    if new.get("rope_parameters"):
        old |= _rope(family, new)
    for name, wanted in ((name, EXPERTS[family]) for name in ("num_experts", "num_local_experts") if family in EXPERTS):
        if name in old and name != wanted:
            old[wanted] = old.pop(name)
    old |= _layers(family, new, old)
    if family == "bloom":
        old["n_embed"], old["num_attention_heads"] = old.pop("hidden_size"), old.pop("n_head")
    if family in ("mamba2", "bamba", "granitemoehybrid"):
        # Python's JSON had `Infinity` here before release 5 wrote {"__float__": "Infinity"}.
        old.setdefault("time_step_limit", [0.0, math.inf])
    if family == "deepseek_v3" and "num_mtp_layers" in old:
        old["num_nextn_predict_layers"] = old.pop("num_mtp_layers")
    return {k: v for k, v in (old | NOTES.get(family, {})).items() if v != "drop"}


def _rope(family: str, new: Fields) -> Fields:
    rope = dict(new["rope_parameters"])
    if family == "gemma3_text":
        full, local = rope["full_attention"], rope["sliding_attention"]
        scaling = {k: v for k, v in full.items() if k != "rope_theta"}
        return {
            "rope_theta": full["rope_theta"],
            "rope_local_base_freq": local["rope_theta"],
            "rope_scaling": None if full["rope_type"] == "default" else scaling,
        }
    if family == "modernbert":
        return {
            "global_rope_theta": rope["full_attention"]["rope_theta"],
            "local_rope_theta": rope["sliding_attention"]["rope_theta"],
        }
    theta, kind, partial = rope.pop("rope_theta"), rope.pop("rope_type"), rope.pop("partial_rotary_factor", None)
    old: Fields = {"rope_theta": theta, "rope_scaling": None}
    if kind != "default":
        # Llama 3.1 brought `rope_type`; older kinds were published under `type`.
        old["rope_scaling"] = {"rope_type" if kind in ("llama3", "yarn") else "type": kind, **rope}
    if family in ("falcon", "olmoe", "granitemoehybrid") and kind == "default" and theta == 10000.0:
        return {}
    if family == "gpt_oss" and kind == "default":
        # Without any, its default is YaRN.
        old["rope_scaling"] = {"rope_type": "default"}
    if family == "phi3" and kind == "longrope":
        old["rope_scaling"].pop("original_max_position_embeddings")
    if family == "gpt_neox":
        return {"rotary_emb_base": theta, "rotary_pct": partial, "rope_scaling": old["rope_scaling"]}
    if family == "bamba":
        return old
    return old if partial is None else {**old, "partial_rotary_factor": partial}


def _layers(family: str, new: Fields, old: Fields) -> Fields:
    """Patterns by a period, an index or letters, where one says the same as the list."""
    types = new.get("layer_types", [])
    full = [i for i, kind in enumerate(types) if kind == "full_attention"]
    if family in ("gemma3_text", "cohere2"):
        period = full[0] + 1
        if types == ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(len(types))]:
            old.pop("layer_types", None)
            return {"sliding_window_pattern": period, "_sliding_window_pattern": "drop"}
    if family == "gemma2" and types == [("sliding", "full")[i % 2] + "_attention" for i in range(len(types))]:
        old.pop("layer_types", None)
    if family == "modernbert" and full and all((i in full) == (i % 3 == 0) for i in range(len(types))):
        old.pop("layer_types", None)
        return {"global_attn_every_n_layers": 3}
    if family in ("qwen2", "qwen3") and new.get("use_sliding_window"):
        first = new["max_window_layers"]
        if types == [("full" if i < first else "sliding") + "_attention" for i in range(len(types))]:
            old.pop("layer_types", None)
            return {"max_window_layers": first}
    if family in ("qwen2", "qwen3") and not new.get("use_sliding_window"):
        old.pop("layer_types", None)
    if family == "llama4_text":
        old.pop("layer_types", None)
        count, step = new["num_hidden_layers"], new["interleave_moe_layer_step"]
        if new["moe_layers"] == list(range(step - 1, count, step)):
            old.pop("moe_layers")
        # Published as an empty list where the interval says it.
        return {"no_rope_layers": []} if _by_interval(new) else {}
    if family == "smollm3":
        old.pop("layer_types", None)
        if _by_interval(new):
            old.pop("no_rope_layers")
    if family in ("mamba", "falcon_mamba"):
        old.pop("intermediate_size")
    if family == "granitemoehybrid":
        names = {"linear_attention": "mamba", "full_attention": "attention"}
        return {"layer_types": [names[kind] for kind in types]}
    if family == "nemotron_h":
        letters = {"linear_attention": "M", "full_attention": "*", "mlp": "-", "moe": "E"}
        kinds = old.pop("layers_block_type")
        return {"hybrid_override_pattern": "".join(letters[kind] for kind in kinds), "num_hidden_layers": len(kinds)}
    return {}


def _by_interval(new: Fields) -> bool:
    interval = new["no_rope_layer_interval"]
    return new["no_rope_layers"] == [int((i + 1) % interval != 0) for i in range(new["num_hidden_layers"])]
