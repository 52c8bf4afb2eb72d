"""Decoding: prompts into caches, tokens out of them, and what is drawn."""

from llm_jax.base.lazy import lazy_exports

__getattr__ = lazy_exports(
    globals(),
    {
        "Completion": "llm_jax.inference.generator",
        "Delta": "llm_jax.inference.generator",
        "DecodeState": "llm_jax.inference.decode",
        "Generator": "llm_jax.inference.generator",
        "RowParams": "llm_jax.inference.logits",
        "SamplingParams": "llm_jax.inference.config",
        "Session": "llm_jax.inference.session",
        "check_sampling": "llm_jax.inference.requests",
        "decode_chunk": "llm_jax.inference.decode",
        "decode_step": "llm_jax.inference.steps",
        "decoding_decoder": "llm_jax.inference.steps",
        "extend": "llm_jax.inference.steps",
        "prefill": "llm_jax.inference.steps",
        "request_keys": "llm_jax.inference.sampling",
        "row_params": "llm_jax.inference.logits",
        "sample": "llm_jax.inference.sampling",
        "transform_logits": "llm_jax.inference.logits",
    },
)
