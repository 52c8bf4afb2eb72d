"""What a run leaves on disk: the workdir's layout, checkpoints, safetensors folders, hashes."""

from llm_jax.base.lazy import lazy_exports

__getattr__ = lazy_exports(
    globals(),
    {
        "Checkpoints": "llm_jax.storage.checkpoints",
        "LazyTensors": "llm_jax.storage.safetensors",
        "Workdir": "llm_jax.storage.workdir",
        "canonical_hash": "llm_jax.storage.hashes",
        "file_sha256": "llm_jax.storage.hashes",
        "is_workdir": "llm_jax.storage.workdir",
        "read_index": "llm_jax.storage.safetensors",
        "write_atomically": "llm_jax.storage.atomic",
        "write_folder": "llm_jax.storage.safetensors",
    },
)
