"""Data that need no download: the standard library's text, word problems, docstrings."""

from llm_jax.base.lazy import lazy_exports

__getattr__ = lazy_exports(
    globals(),
    {
        "Problem": "llm_jax.data.embedded.problems",
        "is_careful": "llm_jax.data.embedded.problems",
        "is_correct": "llm_jax.data.embedded.problems",
    },
)
