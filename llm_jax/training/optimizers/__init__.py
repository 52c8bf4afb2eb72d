"""One update rule a file: what a rule keeps of each parameter, and the direction it steps in."""

from llm_jax.base.lazy import lazy_exports

__getattr__ = lazy_exports(
    globals(),
    {
        "Adafactor": "llm_jax.training.optimizers.adafactor",
        "AdamW": "llm_jax.training.optimizers.adamw",
        "Lion": "llm_jax.training.optimizers.lion",
        "Muon": "llm_jax.training.optimizers.muon",
        "SGD": "llm_jax.training.optimizers.sgd",
        "UpdateRule": "llm_jax.training.optimizers.rule",
    },
)
