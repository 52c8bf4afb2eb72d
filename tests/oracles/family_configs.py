"""Tiny odd-sized configurations of every published family: together they take each branch that changes numbers.

`CONFIGS[family][name]` are fields of config.json in the spelling of transformers 5; a field left out has its family's
default. Windows, chunks and trained lengths lie below `family_recipe.LENGTH`.
"""

from typing import Any

Fields = dict[str, Any]
IDS: Fields = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
BASE: Fields = {
    **IDS,
    "vocab_size": 53,
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
WINDOW = 7


def rope(kind: str = "default", theta: float = 10000.0, **more: Any) -> Fields:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **more}}


def pattern(letters: str) -> Fields:
    """`layer_types` of a string of letters: s(liding), f(ull), l(inear: a state-space layer)."""
    names = {"s": "sliding_attention", "f": "full_attention", "l": "linear_attention"}
    return {"layer_types": [names[letter] for letter in letters], "num_hidden_layers": len(letters)}


TIED: Fields = {"tie_word_embeddings": True}
UNTIED: Fields = {"tie_word_embeddings": False}
# A base and a length whose ramp of frequencies is several dimensions wide.
YARN: Fields = {"theta": 50.0, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3: Fields = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
SHORT, LONG = [1.0, 1.1, 1.35, 1.6], [1.2, 2.3, 4.5, 9.0]
LONGROPE: Fields = {"short_factor": SHORT, "long_factor": LONG, "original_max_position_embeddings": 16}

LLAMA = {
    "biases": {**rope(), "attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-3},
    "tied": {**rope(theta=5e5), **TIED, "head_dim": 10, "num_key_value_heads": 1, "num_hidden_layers": 3},
    "gelu": {**rope(), "hidden_act": "gelu", "num_key_value_heads": 4},
    "linear": rope("linear", factor=3.0),
    "dynamic": {**rope("dynamic", factor=2.5), "max_position_embeddings": 16},
    "yarn": {**rope("yarn", beta_fast=2.0, beta_slow=0.5, **YARN), "head_dim": 16},
    "yarn_factor": {**rope("yarn", attention_factor=1.3, truncate=False, **YARN), "head_dim": 16},
    "yarn_mscale": {**rope("yarn", mscale=0.9, mscale_all_dim=0.3, **YARN), "head_dim": 16},
    "llama3": {**rope("llama3", **LLAMA3), "head_dim": 12},
    "longrope": {**rope("longrope", **LONGROPE), "head_dim": 8},
    "longrope_factor": {**rope("longrope", attention_factor=1.25, factor=2.0, **LONGROPE), "head_dim": 8},
}
LLAMA4 = {
    "chunks": {**rope(theta=5e5), "num_hidden_layers": 5, "no_rope_layer_interval": 4, "interleave_moe_layer_step": 2}
    | {"attention_chunk_size": WINDOW, "floor_scale": 8, "attn_scale": 0.3},
    "plain": {**rope("llama3", 5e5, **LLAMA3), **TIED, "attention_bias": True, "use_qk_norm": False}
    | {"num_hidden_layers": 3, "no_rope_layers": [1, 0, 1], "moe_layers": [0, 2], "num_experts_per_tok": 2}
    | {"attn_temperature_tuning": False, "floor_scale": 8, "attention_chunk_size": 9},
}
MISTRAL = {
    "window": {**rope(), "sliding_window": WINDOW},
    "full": {**rope(theta=1e6), **TIED, "sliding_window": None, "head_dim": 10},
    "yarn": {**rope("yarn", **YARN), "sliding_window": None, "rms_norm_eps": 1e-3, "head_dim": 16},
}
MIXTRAL = {
    "full": {**rope(theta=1e6), "hidden_size": 16, "intermediate_size": 20, "num_local_experts": 4},
    "window": {**rope("linear", factor=2.0), **TIED, "sliding_window": WINDOW, "head_dim": 10}
    | {"num_local_experts": 5, "num_experts_per_tok": 3, "num_hidden_layers": 3},
}
QWEN2 = {
    "full": rope(theta=1e6),
    "window": {**rope(), **TIED, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
    | {"num_hidden_layers": 3},
    "yarn": {**rope("yarn", **YARN), "hidden_size": 32, "num_attention_heads": 2},
}
QWEN3 = {
    "full": {**rope(theta=1e6), "head_dim": 10, "attention_bias": True},
    "window": {**rope(), **TIED, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2}
    | {"num_hidden_layers": 3, "head_dim": 8},
    "pattern": {**rope("dynamic", factor=4.0), **pattern("sfs"), "use_sliding_window": True, "sliding_window": WINDOW}
    | {"head_dim": 8, "max_position_embeddings": 16},
}
QWEN3_MOE = {
    "normed": {**rope(theta=1e6), "head_dim": 10, "moe_intermediate_size": 14, "num_experts": 6}
    | {"num_experts_per_tok": 3, "norm_topk_prob": True},
    "mixed": {**rope("yarn", **YARN), **TIED, "head_dim": 16, "attention_bias": True, "moe_intermediate_size": 10}
    | {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3], "num_experts": 5}
    | {"num_experts_per_tok": 3, "use_sliding_window": True, "sliding_window": WINDOW},
}
GEMMA = {
    "tied": {**rope(), **TIED, "head_dim": 10, "num_key_value_heads": 1},
    "biases": {**rope(theta=5e3), "head_dim": 6, "attention_bias": True, "num_hidden_layers": 3},
}
GEMMA2 = {
    "caps": {**rope(), **TIED, **pattern("sfs"), "head_dim": 10, "query_pre_attn_scalar": 13}
    | {"sliding_window": WINDOW, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "no_caps": {**rope(), **pattern("fss"), "head_dim": 6, "query_pre_attn_scalar": 24, "attention_bias": True}
    | {"sliding_window": WINDOW, "attn_logit_softcapping": None, "final_logit_softcapping": None},
}


def gemma3_rope(full: Fields) -> Fields:
    local = {"rope_type": "default", "rope_theta": 10000.0}
    return {"rope_parameters": {"full_attention": full, "sliding_attention": local}}


GEMMA3 = {
    "pattern": {**gemma3_rope({"rope_type": "default", "rope_theta": 1e6}), **TIED, **pattern("ssfss"), "head_dim": 10}
    | {"query_pre_attn_scalar": 13, "sliding_window": WINDOW},
    "linear": {**gemma3_rope({"rope_type": "linear", "rope_theta": 1e5, "factor": 8.0}), **pattern("fsf")}
    | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": WINDOW, "attention_bias": True}
    | {"final_logit_softcapping": 3.0},
}
PHI3 = {
    "window": {**rope(partial_rotary_factor=1.0), "sliding_window": WINDOW},
    "longrope": {**rope("longrope", partial_rotary_factor=1.0, **LONGROPE), "hidden_size": 32}
    | {"original_max_position_embeddings": 16},
    "partial": {**rope("longrope", partial_rotary_factor=0.75, short_factor=SHORT[:3], long_factor=LONG[:3])}
    | {**TIED, "hidden_size": 32, "original_max_position_embeddings": 16, "num_hidden_layers": 3},
}
OLMO2 = {
    "grouped": rope(theta=5e5),
    "biases": {**rope("linear", factor=2.0), **TIED, "attention_bias": True, "num_key_value_heads": 4},
}
OLMOE = {
    "plain": {**rope(), "num_key_value_heads": 4, "intermediate_size": 14, "num_experts": 6, "num_experts_per_tok": 3},
    "clipped": {**rope(), **TIED, "clip_qkv": 0.9, "norm_topk_prob": True, "attention_bias": True}
    | {"intermediate_size": 14, "num_experts": 5, "num_experts_per_tok": 2, "num_hidden_layers": 3},
}
SMOLLM3 = {
    "interval": {**rope(theta=2e6), **TIED, "num_hidden_layers": 3, "no_rope_layer_interval": 2},
    "window": {**rope(theta=5e4), "num_hidden_layers": 4, "no_rope_layers": [0, 1, 1, 0], "attention_bias": True}
    | {"mlp_bias": True, "use_sliding_window": True, "sliding_window": WINDOW},
}
GLM4 = {
    "biases": {**rope(partial_rotary_factor=0.5), "head_dim": 12, "attention_bias": True},
    "tied": {**rope(theta=5e3, partial_rotary_factor=0.25), **TIED, "head_dim": 16, "attention_bias": False}
    | {"num_hidden_layers": 3, "rms_norm_eps": 1e-2},
}
COHERE2 = {
    "pattern": {**rope(theta=5e4), **TIED, **pattern("ssfs"), "sliding_window": WINDOW, "logit_scale": 0.25},
    "biases": {**rope(), **pattern("fs"), "sliding_window": WINDOW, "logit_scale": 1.5, "attention_bias": True},
}
GRANITE = {
    "multipliers": {**rope(), **TIED, "embedding_multiplier": 0.6, "logits_scaling": 1.7, "residual_multiplier": 0.8}
    | {"attention_multiplier": 0.21},
    "biases": {**rope("linear", factor=2.0), "attention_bias": True, "mlp_bias": True, "attention_multiplier": 0.5}
    | {"num_key_value_heads": 4, "num_hidden_layers": 3},
}
GPT2_BASE: Fields = {**IDS, "vocab_size": 53, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 48}
GPT2 = {
    "plain": {},
    "inverse": {"n_inner": 37, "activation_function": "relu", "scale_attn_by_inverse_layer_idx": True, **UNTIED},
    "unscaled": {"scale_attn_weights": False, "reorder_and_upcast_attn": True, "n_layer": 3, "n_head": 3}
    | {"layer_norm_epsilon": 1e-3},
}
GPT_NEOX = {
    "parallel": {**rope(partial_rotary_factor=0.25), "hidden_size": 32, "num_attention_heads": 2},
    "serial": {**rope("linear", partial_rotary_factor=0.5, factor=2.0), **TIED, "hidden_size": 32}
    | {"use_parallel_residual": False, "attention_bias": False, "hidden_act": "relu", "num_hidden_layers": 3},
}
BLOOM_BASE: Fields = {**IDS, "vocab_size": 53, "hidden_size": 24, "n_layer": 2, "n_head": 4}
BLOOM = {
    "six_heads": {"n_head": 6},
    "post": {"apply_residual_connection_post_layernorm": True, **UNTIED, "n_layer": 3},
}
FALCON_BASE: Fields = {k: v for k, v in BASE.items() if k not in ("intermediate_size", "num_key_value_heads")}
FALCON = {
    "multi_query": {**rope(), **TIED},
    "grouped": {**rope(), **TIED, "new_decoder_architecture": True, "num_kv_heads": 2},
    "one_norm": {**rope(), "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1}
    | {"bias": True},
    "alibi": {**TIED, "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}
    | {"num_attention_heads": 8, "hidden_size": 48},  # Powers of two: of other slopes transformers rounds the biases.
    "heads": {**rope("linear", factor=2.0), "multi_query": False, "bias": True, "activation": "relu"}
    | {"ffn_hidden_size": 50, "num_hidden_layers": 3},
}
LATENT: Fields = {
    **BASE,
    "num_key_value_heads": 4,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 10,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 6,
    "v_head_dim": 5,
}
DEEPSEEK_V2 = {
    "lite": {**rope(), "q_lora_rank": None, "n_routed_experts": 5, "num_experts_per_tok": 2, "n_shared_experts": 2}
    | {"rms_norm_eps": 1e-3},
    "groups": {**rope("yarn", mscale=0.9, mscale_all_dim=0.6, **YARN), **TIED, "q_lora_rank": 12, "n_group": 3}
    | {"topk_group": 2, "topk_method": "group_limited_greedy", "n_routed_experts": 6, "num_experts_per_tok": 3}
    | {"n_shared_experts": 1, "routed_scaling_factor": 2.5, "attention_bias": True, "mlp_bias": True}
    | {"first_k_dense_replace": 0, "num_hidden_layers": 2, "qk_rope_head_dim": 12},
}
DEEPSEEK_V3 = {
    "groups": {**rope("yarn", mscale=1.0, mscale_all_dim=1.0, **YARN), "q_lora_rank": 12, "n_group": 2}
    | {"topk_group": 1, "n_routed_experts": 6, "num_experts_per_tok": 2, "num_mtp_layers": 0, "hidden_size": 16}
    | {"intermediate_size": 20, "num_hidden_layers": 2, "qk_rope_head_dim": 12},
    "lite": {**rope(), **TIED, "q_lora_rank": None, "n_group": 1, "topk_group": 1, "n_routed_experts": 4}
    | {"num_experts_per_tok": 3, "norm_topk_prob": False, "rope_interleave": False, "attention_bias": True}
    | {"routed_scaling_factor": 1.5, "n_shared_experts": 2, "num_mtp_layers": 0, "rms_norm_eps": 1e-3},
}
GPT_OSS_BASE: Fields = {**BASE, "intermediate_size": 14, "head_dim": 8, "sliding_window": WINDOW}
GPT_OSS = {
    "yarn": {**rope("yarn", beta_fast=2.0, beta_slow=0.5, truncate=False, **YARN), **pattern("sfs"), "head_dim": 16}
    | {"num_local_experts": 5, "num_experts_per_tok": 2, "swiglu_limit": 1.5},
    "tied": {**rope(), **TIED, **pattern("fs"), "attention_bias": False, "num_local_experts": 4}
    | {"num_experts_per_tok": 3, "swiglu_alpha": 1.2},
}
MAMBA_BASE: Fields = {**IDS, "vocab_size": 53, "hidden_size": 20, "num_hidden_layers": 2, "state_size": 5}
MAMBA = {
    "tied": {"hidden_size": 16},
    "biases": {**UNTIED, "use_bias": True, "use_conv_bias": False, "conv_kernel": 3, "expand": 3, "time_step_rank": 5},
}
FALCON_MAMBA = {
    "tied": {},
    "biases": {**MAMBA["biases"], "mixer_rms_eps": 1e-2},
}
MAMBA2_BASE: Fields = {**MAMBA_BASE, "num_heads": 4, "head_dim": 10, "n_groups": 2, "chunk_size": 8}
MAMBA2 = {
    "groups": {"hidden_size": 16, "head_dim": 8},
    "limits": {**TIED, "time_step_limit": [0.2, 0.6], "use_bias": True, "use_conv_bias": False, "n_groups": 1}
    | {"chunk_size": 16, "conv_kernel": 3, "num_hidden_layers": 3},
}
JAMBA_BASE: Fields = {**BASE, "mamba_d_state": 5, "mamba_dt_rank": 3}
JAMBA = {
    "experts": {"hidden_size": 16, "intermediate_size": 18, "num_hidden_layers": 3, "attn_layer_period": 3}
    | {"attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1, "num_experts": 4}
    | {"rms_norm_eps": 1e-2},
    "dense": {**TIED, "attn_layer_period": 2, "attn_layer_offset": 0, "num_experts": 1, "mamba_proj_bias": True}
    | {"mamba_conv_bias": False, "mamba_d_conv": 3, "num_hidden_layers": 4, "mamba_dt_rank": "auto"},
}
MAMBA_LAYERS: Fields = {"mamba_n_heads": 6, "mamba_d_state": 5, "mamba_chunk_size": 8}
# Half of a head turns; of an odd half transformers would turn one more, at frequencies of its own.
BAMBA_BASE: Fields = {**BASE, **MAMBA_LAYERS, "num_hidden_layers": 3, "num_attention_heads": 6}
BAMBA = {
    "plain": {**rope(), "attn_layer_indices": [1], "num_attention_heads": 3, "num_key_value_heads": 1},
    "biases": {**rope(theta=5e3), **TIED, "attn_layer_indices": [0, 2], "mamba_n_groups": 2, "mamba_proj_bias": True}
    | {"attention_bias": True, "mlp_bias": True, "mamba_conv_bias": False, "time_step_limit": [0.2, 0.6]},
}
GRANITE_HYBRID_BASE: Fields = {**BASE, **MAMBA_LAYERS, "shared_intermediate_size": 22, "intermediate_size": 14}
GRANITE_HYBRID = {
    "experts": {**pattern("lfl"), "num_local_experts": 4, "num_experts_per_tok": 2, "attention_multiplier": 0.3}
    | {
        "embedding_multiplier": 2.5,
        "residual_multiplier": 0.6,
        "logits_scaling": 1.7,
        "position_embedding_type": "nope",
    },
    "dense": {**rope(), **TIED, **pattern("flf"), "num_local_experts": 0, "position_embedding_type": "rope"}
    | {"attention_bias": True, "mamba_proj_bias": True, "mamba_conv_bias": False, "mamba_n_groups": 3}
    | {"attention_multiplier": 0.5, "time_step_limit": [0.2, 0.6]},
}
NEMOTRON_BASE: Fields = {
    **{k: v for k, v in BASE.items() if k != "num_hidden_layers"},
    "head_dim": 8,
    "mamba_num_heads": 6,
    "mamba_head_dim": 7,
    "ssm_state_size": 5,
    "chunk_size": 8,
    "n_groups": 2,
    "moe_intermediate_size": 14,
    "moe_shared_expert_intermediate_size": 18,
}


def blocks(letters: str) -> Fields:
    """`layers_block_type` of a `hybrid_override_pattern`."""
    names = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}
    return {"layers_block_type": [names[letter] for letter in letters]}


NEMOTRON = {
    "dense": {**blocks("M-M*-"), "use_bias": False},
    "experts": {**blocks("ME*EM"), "n_routed_experts": 6, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
    | {"routed_scaling_factor": 2.5},
    "biases": {**blocks("*ME-"), "use_bias": True, "attention_bias": True, "mlp_bias": True, "use_conv_bias": False}
    | {"n_routed_experts": 5, "num_experts_per_tok": 3, "norm_topk_prob": False, "moe_latent_size": 9}
    | {"time_step_min": 0.25, "n_groups": 3},
}


def modernbert_rope(full: float, local: float) -> Fields:
    kinds = {"full_attention": full, "sliding_attention": local}
    return {"rope_parameters": {kind: {"rope_type": "default", "rope_theta": x} for kind, x in kinds.items()}}


MODERNBERT_BASE: Fields = {
    **{k: v for k, v in BASE.items() if k not in ("num_key_value_heads", "tie_word_embeddings")},
    "pad_token_id": 3,
    "cls_token_id": 1,
    "sep_token_id": 2,
    "local_attention": 8,
    "num_labels": 3,
}
MODERNBERT = {
    "plain": {**modernbert_rope(1.6e5, 1e4), **pattern("fssf")},
    "biases": {**modernbert_rope(5e3, 1e3), **UNTIED, **pattern("sfs"), "attention_bias": True, "mlp_bias": True}
    | {"norm_bias": True, "classifier_bias": True, "decoder_bias": False, "classifier_pooling": "mean"}
    | {"local_attention": 6},
}


def _join(model_type: str, base: Fields, variants: dict[str, Fields]) -> dict[str, Fields]:
    return {name: {"model_type": model_type, **base, **fields} for name, fields in variants.items()}


CONFIGS: dict[str, dict[str, Fields]] = {
    "llama": _join("llama", BASE, LLAMA),
    "llama4_text": _join(
        "llama4_text",
        {**BASE, "intermediate_size": 20, "intermediate_size_mlp": 30, "head_dim": 8, "num_local_experts": 4},
        LLAMA4,
    ),
    "mistral": _join("mistral", BASE, MISTRAL),
    "mixtral": _join("mixtral", BASE, MIXTRAL),
    "qwen2": _join("qwen2", BASE, QWEN2),
    "qwen3": _join("qwen3", {**BASE, "hidden_size": 16, "intermediate_size": 28}, QWEN3),
    "qwen3_moe": _join("qwen3_moe", BASE, QWEN3_MOE),
    "gemma": _join("gemma", BASE, GEMMA),
    "gemma2": _join("gemma2", BASE, GEMMA2),
    "gemma3_text": _join("gemma3_text", BASE, GEMMA3),
    "phi3": _join("phi3", BASE, PHI3),
    "olmo2": _join("olmo2", BASE, OLMO2),
    "olmoe": _join("olmoe", BASE, OLMOE),
    "smollm3": _join("smollm3", BASE, SMOLLM3),
    "glm4": _join("glm4", BASE, GLM4),
    "cohere2": _join("cohere2", BASE, COHERE2),
    "granite": _join("granite", BASE, GRANITE),
    "gpt2": _join("gpt2", GPT2_BASE, GPT2),
    "gpt_neox": _join("gpt_neox", {k: v for k, v in BASE.items() if k != "num_key_value_heads"}, GPT_NEOX),
    "bloom": _join("bloom", BLOOM_BASE, BLOOM),
    "falcon": _join("falcon", FALCON_BASE, FALCON),
    "deepseek_v2": _join("deepseek_v2", LATENT, DEEPSEEK_V2),
    "deepseek_v3": _join("deepseek_v3", LATENT, DEEPSEEK_V3),
    "gpt_oss": _join("gpt_oss", GPT_OSS_BASE, GPT_OSS),
    "mamba": _join("mamba", MAMBA_BASE, MAMBA),
    "falcon_mamba": _join("falcon_mamba", MAMBA_BASE, FALCON_MAMBA),
    "mamba2": _join("mamba2", MAMBA2_BASE, MAMBA2),
    "jamba": _join("jamba", JAMBA_BASE, JAMBA),
    "bamba": _join("bamba", BAMBA_BASE, BAMBA),
    "granitemoehybrid": _join("granitemoehybrid", GRANITE_HYBRID_BASE, GRANITE_HYBRID),
    "nemotron_h": _join("nemotron_h", NEMOTRON_BASE, NEMOTRON),
    "modernbert": _join("modernbert", MODERNBERT_BASE, MODERNBERT),
}
