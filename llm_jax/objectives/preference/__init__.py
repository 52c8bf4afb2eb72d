"""Losses on preferences, a file per method, from summed log-probabilities. `llm_jax.objectives` exports them."""
