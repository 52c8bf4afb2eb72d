"""Losses of reward models, a file per method, from scalar rewards. `llm_jax.objectives` exports them."""
