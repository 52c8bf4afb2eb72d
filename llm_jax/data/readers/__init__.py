"""Readers: one file per format, each giving a source's records in order and from any record on."""

from llm_jax.base.lazy import lazy_exports

__getattr__ = lazy_exports(
    globals(),
    {
        "FileReader": "llm_jax.data.readers.base",
        "Reader": "llm_jax.data.readers.base",
        "Record": "llm_jax.data.readers.base",
    },
)
