"""Numerics on the device at hand: results and gradients of each kernel against the reference at real head sizes.

The formula is the reference on the same numbers in float32; a kernel in bfloat16 may be off by twice what the
reference in bfloat16 is, norm over norm; in float32 by 1e-5.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from kernel_rows import Row
from kernel_sides import case_of

from llm_jax.kernels import cases
from llm_jax.kernels.cases import Case
from llm_jax.kernels.choice import ArgumentError, find

FLOAT32 = 1e-5


@dataclass(frozen=True)
class Check:
    """One result of one implementation."""

    title: str
    implementation: str
    result: str
    """ "out", or "d i", the gradient of array i."""
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.error <= self.limit


def rows(size: str) -> list[Row]:
    """Calls whose scores fit the memory in full."""
    T, N = (1536, 8) if size == "full" else (48, 4)

    def attention(title: str, head_dim: int, **more: int) -> Row:
        shape = {"q_len": T, "heads": N, "head_dim": head_dim if size == "full" else head_dim // 8, **more}
        return Row("flash_attention", f"attention hd{head_dim} {title}", "", shape)

    value = 128 if size == "full" else 16
    made = [attention(f"{'causal' if c else 'full'}", H, causal=c) for H in (64, 128, 256) for c in (1, 0)]
    made += [
        attention("documents", 128, document=T // 5, kv_heads=N // 4),
        attention("window", 128, window=T // 4, kv_heads=N // 2),
        attention("more keys than queries, odd lengths", 96, q_len=T - 5, kv_len=T + 3),
        attention("values of 128", 192, value_dim=value),
        attention("soft cap and ALiBi", 128, softcap=30, alibi=1),
        attention("sinks, window, documents", 64, sinks=1, window=T // 8, document=T // 3, kv_heads=1),
    ]
    big = size == "full"
    decode = {"heads": N, "kv_heads": N // 4, "head_dim": 128 if big else 16}
    made += [
        Row("ragged_paged_attention", f"paged decode, {n} requests", "", {"requests": n, "kv_len": T, **decode})
        for n in (1, 7)
    ]
    made += [
        Row(op, f"{title}, {E} groups{rest}", "", {"rows": M, "inputs": K, "outputs": 2 * K, "groups": E, "tokens": T})
        for op, title in (("grouped_matmul", "experts"), ("grouped_swiglu", "gated experts"))
        for E, M, K, T, rest in (
            (8, 2000, 512, 0, ""),
            (8, 2000, 512, 300, ", rows of tokens"),
            (128, 3000, 512, 0, "") if big else (16, 60, 24, 0, ""),
        )
    ]
    loss = {"tokens": 1000, "width": 1024, "vocab": 32003} if big else {"tokens": 30, "width": 16, "vocab": 101}
    scan = {"length": 1000} if big else {"length": 60}
    small = {"heads": 4, "head_dim": 8, "states": 8}
    return [
        *made,
        Row("linear_cross_entropy", "loss", "", loss),
        Row("ssd", "Mamba-2 scan", "", {**scan, "heads": 8} if big else {**scan, **small}),
        Row("selective_scan", "Mamba scan", "", {**scan, "channels": 512 if big else 16}),
    ]


def check(row: Row, dtype: str) -> list[Check]:
    """Every implementation but the reference that takes the call."""
    case, _ = case_of(row, dtype)
    exact = _results(case, "reference", upcast=True)
    half = _results(case, "reference")
    found = []
    for name in find(row.op).implementations:
        if name == "reference":
            continue
        try:
            got = _results(case, name)
        except ArgumentError as refusal:
            print(f"not checked: {row.title}, {dtype}, {name}: {refusal}", flush=True)
            continue
        for result, value in got.items():
            limit = FLOAT32 if dtype == "float32" else 2 * distance(half[result], exact[result])
            found.append(Check(row.title, name, result, distance(value, exact[result]), limit))
    return found


def distance(got: Any, exact: Any) -> float:
    """Norm of the difference over norm, in float64; NaN where one of the two is not a number."""
    a, b = (np.asarray(x.astype(jnp.float32), np.float64) for x in (got, exact))
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30))


def _results(case: Case, implementation: str, upcast: bool = False) -> dict[str, Any]:
    """Output and gradients for one cotangent; `upcast`: the same numbers, in float32."""
    halves = (jnp.bfloat16, jnp.float16)
    arrays = jax.tree.map(lambda x: x.astype(jnp.float32) if upcast and x.dtype in halves else x, case.arrays)
    if not case.differentiable:
        return {"out": jax.jit(cases.forward(case, implementation))(*arrays)}

    @jax.jit
    def run(*arrays: Any) -> Any:
        out, pull = cases.pull(case, implementation)(*arrays)
        # In bfloat16 first, so that all dtypes get the same numbers.
        g = jax.random.normal(jax.random.key(3), out.shape, jnp.bfloat16).astype(out.dtype)
        return out, pull(g)

    out, gradients = run(*arrays)
    return {"out": out} | {f"d {i}": g for i, g in zip(case.differentiable, gradients, strict=True)}
