"""What a gated grouped product asks for: the same as each of its two products."""

from typing import Any

from llm_jax.kernels.grouped_matmul.spec import GroupedSpec, grouped_spec


def grouped_swiglu_spec(x: Any, gate: Any, up: Any, group_sizes: Any, *, rows: Any = None) -> GroupedSpec:
    """Checks a call, arguments as for `grouped_swiglu`; raises ArgumentError."""
    return grouped_spec("grouped_swiglu", x, {"gate": gate, "up": up}, group_sizes, rows)
