"""What every room stands on: config binding, errors, tree paths, logging."""

from llm_jax.base.lazy import lazy_exports

__getattr__ = lazy_exports(
    globals(),
    {
        "Interrupted": "llm_jax.base.errors",
        "ModelRef": "llm_jax.base.model_ref",
        "RunError": "llm_jax.base.errors",
        "UserError": "llm_jax.base.errors",
        "apply_overrides": "llm_jax.base.config",
        "bind": "llm_jax.base.config",
        "field_docs": "llm_jax.base.fields",
        "log": "llm_jax.base.logging",
        "run_door": "llm_jax.base.door",
        "to_dict": "llm_jax.base.config",
        "warn": "llm_jax.base.logging",
    },
)
