"""Others' implementations of the same calls, as cases on the same arrays. What this machine can't run is left out."""

import dataclasses
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax import kernels
from llm_jax.kernels.cases import Case

GATHERED = "llm_jax (automatic), after x[rows]"


def peers(op: str, shape: Mapping[str, int], case: Case) -> dict[str, Case]:
    """By name. They take the case's arrays; their `call` has no use for `implementation`."""
    made = {name: call for name, call in _calls(op, shape, jax.default_backend()).items() if call is not None}
    return {name: dataclasses.replace(case, call=_ignoring(call)) for name, call in made.items()}


def _ignoring(call: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arrays, implementation: call(*arrays)


def _calls(op: str, shape: Mapping[str, int], platform: str) -> dict[str, Callable[..., Any] | None]:
    tokamax: Any = None
    if platform != "cpu" and importlib.util.find_spec("tokamax"):
        import tokamax  # pyright: ignore[reportMissingImports]
    if op == "flash_attention":
        return _attention(shape, platform, tokamax)
    if op == "grouped_matmul":
        of_tokamax = None if tokamax is None else tokamax.ragged_dot
        ours = kernels.grouped_matmul if shape["tokens"] else None
        each = {"jax.lax.ragged_dot": jax.lax.ragged_dot, "tokamax": of_tokamax, GATHERED: ours}
        return {name: None if call is None else _of_rows(call) for name, call in each.items()}
    if op == "grouped_swiglu":
        ours = _of_rows(kernels.grouped_swiglu) if shape["tokens"] else None
        return {"jax.lax.ragged_dot": _of_rows(_gated_ragged_dot), GATHERED: ours}
    if op == "linear_cross_entropy":
        return {"plain (logits in memory)": _plain_loss}
    if op == "ssd":
        return {"jax.lax.associative_scan": _associative_ssd}
    if op == "selective_scan":
        return {"jax.lax.associative_scan": _associative_scan}
    return {}


def _of_rows(product: Callable[..., Any]) -> Callable[..., Any]:
    """Of x[rows], which is written first."""

    def call(x: Any, *rest: Any) -> Any:
        *weights, sizes, rows = rest
        return product(x if rows is None else x[rows], *weights, sizes)

    return call


def _gated_ragged_dot(x: Any, gate: Any, up: Any, sizes: Any) -> Any:
    of_gate, of_up = (jax.lax.ragged_dot(x, w, sizes) for w in (gate, up))
    return jax.nn.silu(of_gate) * of_up


def _attention(shape: Mapping[str, int], platform: str, tokamax: Any) -> dict[str, Callable[..., Any] | None]:
    """jax.nn has no packed documents, and cuDNN no head sizes that differ."""
    causal, window = bool(shape["causal"]), shape["window"]
    if shape["document"]:
        return {}
    sizes = (window - 1, 0) if causal else (window - 1, window - 1)

    def of_jax(implementation: Any) -> Callable[..., Any]:
        options: dict[str, Any] = {"local_window_size": sizes} if window else {}
        attend = jax.nn.dot_product_attention
        return lambda q, k, v: attend(q, k, v, is_causal=causal, implementation=implementation, **options)

    def of_tokamax(q: Any, k: Any, v: Any) -> Any:
        return tokamax.dot_product_attention(
            q, k, v, is_causal=causal, local_window_size=sizes if window else None, implementation="mosaic"
        )

    same = not shape["value_dim"] or shape["value_dim"] == shape["head_dim"]
    return {
        "cuDNN": of_jax("cudnn") if platform == "gpu" and same else None,
        "jax.nn (xla)": of_jax("xla") if platform == "cpu" and same else None,
        "tokamax": None if tokamax is None else of_tokamax,
    }


def _plain_loss(hidden: Any, head: Any, targets: Any) -> Any:
    logits = jnp.einsum("md,dv->mv", hidden, head, preferred_element_type=jnp.float32)
    return jnp.take_along_axis(logits, targets[:, None], 1)[:, 0] - jax.nn.logsumexp(logits, 1)


def _scan(decay: Any, added: Any) -> Any:
    """h[t] = decay[t] h[t-1] + added[t] along axis 1, in parallel."""

    def join(first: Any, second: Any) -> Any:
        return first[0] * second[0], first[1] * second[0] + second[1]

    return jax.lax.associative_scan(join, (decay, added), axis=1)[1]


def _associative_scan(u: Any, delta: Any, A: Any, b: Any, c: Any) -> Any:
    x, delta, b, c = (y.astype(jnp.float32) for y in (u, delta, b, c))
    states = _scan(jnp.exp(delta[..., None] * A), (delta * x)[..., None] * b[:, :, None])
    return jnp.einsum("btdn,btn->btd", states, c).astype(u.dtype)


def _associative_ssd(x: Any, dt: Any, A: Any, b: Any, c: Any) -> Any:
    group = x.shape[2] // b.shape[2]
    y, b, c = (z.astype(jnp.float32) for z in (x, jnp.repeat(b, group, 2), jnp.repeat(c, group, 2)))
    added = (dt[..., None] * y)[..., None] * b[..., None, :]
    decay = jnp.broadcast_to(jnp.exp(dt * A)[..., None, None], added.shape)
    return jnp.einsum("bthpn,bthn->bthp", _scan(decay, added), c).astype(x.dtype)
