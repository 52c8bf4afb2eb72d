"""Mesh, logical axes, ZeRO: how one program is spread over devices. Read axes, plan, context, shards, weights."""

from llm_jax.base.lazy import lazy_exports

__getattr__ = lazy_exports(
    globals(),
    {
        "MeshConfig": "llm_jax.sharding.config",
        "Plan": "llm_jax.sharding.plan",
        "make_plan": "llm_jax.sharding.plan",
        "abstract_plan": "llm_jax.sharding.plan",
        "check_divides": "llm_jax.sharding.plan",
        "storage_shardings": "llm_jax.sharding.plan",
        "place": "llm_jax.sharding.placement",
        "place_pieces": "llm_jax.sharding.placement",
        "place_batch": "llm_jax.sharding.placement",
        "placed_batches": "llm_jax.sharding.placement",
        "row_part": "llm_jax.sharding.placement",
        "to_first": "llm_jax.sharding.placement",
        "use": "llm_jax.sharding.context",
        "current_plan": "llm_jax.sharding.context",
        "constrain": "llm_jax.sharding.context",
        "on_shards": "llm_jax.sharding.shards",
        "axis_sum": "llm_jax.sharding.shards",
        "axis_max": "llm_jax.sharding.shards",
        "axis_index": "llm_jax.sharding.shards",
        "axis_size": "llm_jax.sharding.shards",
        "compute_weights": "llm_jax.sharding.weights",
        "dtype_in_use": "llm_jax.sharding.weights",
        "gather_all": "llm_jax.sharding.weights",
        "Gathered": "llm_jax.sharding.weights",
    },
)
