"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/): momentum, orthogonalised matrix by matrix.

optax's takes a stacked `[L, D, F]` for no matrix and a stacked norm `[L, D]` for one. Here a declared matrix is a
matrix, one per layer, and the layers are orthogonalised as a batch.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from llm_jax.sharding import current_plan
from llm_jax.sharding.context import constrain_spec
from llm_jax.training.config import MuonConfig
from llm_jax.training.optimizers.rule import Slots, batch_axes

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
EPS = 1e-7


def is_for_muon(declaration: Any) -> bool:
    """Whether the rule applies: a matrix between layers, so no embedding and no head (of a vocabulary, of labels)."""
    return declaration.matrix is not None and not {"vocab", "labels"} & set(declaration.axes)


class Muon:
    """Equal to torch.optim.Muon, but for its bfloat16 where `ns_dtype` is float32."""

    def __init__(self, config: MuonConfig):
        self._config = config
        self._trace = optax.trace(config.momentum, config.nesterov)

    def init(self, shape: tuple[int, ...], declaration: Any) -> Slots:
        del declaration
        return {"momentum": jnp.zeros(shape, jnp.float32)}

    def shared(self, count: Array) -> Array:
        return count

    def direction(
        self, gradient: Array, slots: Mapping[str, Array], param: Array, declaration: Any, shared: Any
    ) -> tuple[Array, Slots]:
        del shared
        config = self._config
        step, state = self._trace.update(gradient, optax.TraceState(slots["momentum"]))
        rows, columns = declaration.matrix
        order = (*batch_axes(declaration), *rows, *columns)
        fan_in, fan_out = (math.prod(param.shape[i] for i in axes) for axes in (rows, columns))
        moved = jnp.transpose(step, order)  # type: ignore[arg-type]
        made = _spread(moved.reshape(-1, fan_in, fan_out), _stored(declaration, param.shape), config)
        back = tuple(order.index(i) for i in range(len(order)))
        scale = shape_factor(fan_in, fan_out, config.adjust_lr_fn)
        return scale * jnp.transpose(made.reshape(moved.shape), back), {"momentum": state.trace}  # type: ignore[union-attr]


def shape_factor(fan_in: int, fan_out: int, kind: str) -> float:
    """sqrt(max(1, out/in)) (Jordan et al.), or 0.2 sqrt(max(out, in)) (Liu et al. 2025, arXiv:2502.16982, eq. 4)."""
    return math.sqrt(max(1.0, fan_out / fan_in)) if kind == "original" else 0.2 * math.sqrt(max(fan_out, fan_in))


def orthogonalize(x: Float[Array, "N R C"], steps: int = 5, dtype: Any = jnp.float32) -> Float[Array, "N R C"]:
    """Newton-Schulz iterations X <- a X + (b A + c A^2) X, A = X X', of each matrix over its Frobenius norm, float32.

    Singular values go to somewhere in 0.7 to 1.2, not to 1: the coefficients are for a steep slope at 0.
    """
    a, b, c = COEFFICIENTS
    wide = x.shape[1] <= x.shape[2]
    x = x / jnp.maximum(jnp.sqrt(jnp.sum(jnp.square(x), (1, 2), keepdims=True)), EPS)
    x = x.astype(dtype)
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    for _ in range(steps):
        # The smaller of the two products of x with itself: the iteration commutes with transposition.
        gram = jnp.einsum("nrc,nsc->nrs" if wide else "nrc,nrd->ncd", x, x, precision=precision)
        poly = b * gram + c * jnp.matmul(gram, gram, precision=precision)
        product = jnp.matmul(poly, x, precision=precision) if wide else jnp.matmul(x, poly, precision=precision)
        x = a * x + product
    return x.astype(jnp.float32)


def _stored(declaration: Any, shape: tuple[int, ...]) -> tuple[Any, Any] | None:
    """Mesh axes along rows and columns of a stored matrix; None without a plan, or where either is several axes."""
    plan, (rows, columns) = current_plan(), declaration.matrix
    if plan is None or len(rows) != 1 or len(columns) != 1:
        return None
    spec = plan.storage_spec(declaration.axes, shape)
    return spec[rows[0]], spec[columns[0]]


def _spread(x: Float[Array, "N R C"], spec: tuple[Any, Any] | None, config: MuonConfig) -> Float[Array, "N R C"]:
    """`orthogonalize`, each device whole matrices of its own: N is padded to the devices and cut over all mesh axes.

    `spec`: mesh axes of rows and columns as stored, None where unknown. From there the axes move to N one by one, an
    all-to-all each; in one step XLA would replicate everything, and without any constraint every product of the
    iteration gathers again (seen: 15 all-gathers against 2 all-to-alls).
    """
    plan = current_plan()
    if plan is None or plan.mesh.size == 1:
        return orthogonalize(x, config.ns_steps, config.ns_dtype)
    path = [PartitionSpec(None, *spec)] if spec else [PartitionSpec(plan.mesh.axis_names)]
    for i, axis in enumerate(plan.mesh.axis_names if spec else ()):
        rest = (None if used == axis else used for used in path[-1][1:])
        path.append(PartitionSpec(plan.mesh.axis_names[: i + 1], *rest))
    y = jnp.pad(x, ((0, -len(x) % plan.mesh.size), (0, 0), (0, 0)))
    for step in path:
        y = constrain_spec(y, step)
    y = orthogonalize(y, config.ns_steps, config.ns_dtype)
    for step in reversed(path):
        y = constrain_spec(y, step)
    return y[: len(x)]
