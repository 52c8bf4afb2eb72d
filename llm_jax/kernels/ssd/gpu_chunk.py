"""What the Hopper kernels of `ssd` share: products, vectors along either side of a tile, decays."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float

from llm_jax.kernels.ssd.gpu import CHUNK, HALF

WARPGROUPS = 2
TILE = (HALF, HALF)


def matrices(*lead: int, dtype: Any) -> Any:
    """Shared memory of tiles of 64 x 64 in 16 bits, laid out as TMA writes and wgmma reads it."""
    tiling, swizzle = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)  # pyright: ignore[reportAbstractUsage]
    return plgpu.SMEM((*lead, *TILE), dtype, transforms=(tiling, swizzle))


def product(*pairs: tuple[Any, Any]) -> Float[Array, "64 n"]:
    """Sum of a @ b over the pairs, tiles in shared memory; float32, in the layout of wgmma's results."""

    def body(acc: Any) -> Array:
        for a, b in pairs:
            plgpu.wgmma(acc, a, b)
        return acc[...]

    return pl.run_scoped(body, plgpu.WGMMAAccumulatorRef((pairs[0][0].shape[0], pairs[0][1].shape[1]), jnp.float32))


def nothing() -> Float[Array, "64 64"]:
    """Zeros in the layout of wgmma's results."""
    return plgpu.layout_cast(jnp.zeros(TILE, jnp.float32), plgpu.Layout.WGMMA)


def read(ref: Any) -> Float[Array, "64 n"]:
    """A tile from shared or global memory, float32, in the layout of wgmma's results."""
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA, optimized=False).astype(jnp.float32)


def vector(ref: Any, axis: int) -> Float[Array, " 64"]:
    """What lies along `axis` of a tile."""
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1 - axis), optimized=False)


def over(vector: Float[Array, " 64"], axis: int) -> Float[Array, "64 64"]:
    """A vector along `axis` of a tile, repeated along the other one."""
    return lax.broadcast_in_dim(vector, TILE, [axis])


class Tokens(NamedTuple):
    """Of half a chunk and a head, along one side of a tile."""

    place: Any
    """Index within the chunk, over the whole tile."""
    dt: Any
    total: Any
    """Running sum of the exponents."""
    run: Any


class Rows(NamedTuple):
    """References to step sizes and running sums [2, B, h, t] and documents [B, t], at a chunk of a head."""

    rows: Any
    run: Any
    batch: Any
    head: Any
    start: Any

    def side(self, half: Any, axis: int) -> Tokens:
        """Tokens of a half, along `axis`."""
        at = pl.ds(self.start + half * HALF, HALF)
        dt, total = (vector(self.rows.at[i, self.batch, self.head, at], axis) for i in range(2))
        run = None if self.run is None else vector(self.run.at[self.batch, at], axis)
        place = half * HALF + plgpu.broadcasted_iota(jnp.int32, TILE, axis, layout=plgpu.Layout.WGMMA)
        return Tokens(place, dt, total, run)

    def _last(self) -> tuple[Array, Array | None]:
        """Running sum and document of the chunk's last token."""
        place = self.start + CHUNK - 1
        return self.rows[1, self.batch, self.head, place], None if self.run is None else self.run[self.batch, place]

    @property
    def total(self) -> Array:
        """Running sum of the exponents at the chunk's end."""
        return self._last()[0]

    def last(self) -> Array:
        """What is left after the chunk of the state before it."""
        total, run = self._last()
        return jnp.exp(total if run is None else jnp.where(run == 0, total, -jnp.inf))

    def until(self, tokens: Tokens) -> Float[Array, " 64"]:
        """From each token to the state after the chunk."""
        last, run = self._last()
        return jnp.exp(
            last - tokens.total if run is None else jnp.where(tokens.run == run, last - tokens.total, -jnp.inf)
        )


def since(tokens: Tokens) -> Float[Array, " 64"]:
    """From the state before the chunk to each token."""
    return jnp.exp(tokens.total if tokens.run is None else jnp.where(tokens.run == 0, tokens.total, -jnp.inf))


def sees(later: Tokens, later_axis: int, earlier: Tokens) -> Bool[Array, "64 64"]:
    """Which of the later tokens see which of the earlier ones."""
    seen = later.place >= earlier.place
    return seen if later.run is None else seen & same_document(later, later_axis, earlier)


def same_document(one: Tokens, axis: int, other: Tokens) -> Bool[Array, "64 64"]:
    """With documents: tokens of `one` lie along `axis`, those of the other along the other one."""
    return over(one.run, axis) == over(other.run, 1 - axis)


def between(
    later: Tokens, later_axis: int, earlier: Tokens, seen: Bool[Array, "64 64"] | None
) -> Float[Array, "64 64"]:
    """What is left at the later tokens of the earlier ones; 0 where not seen."""
    total = exponents(later, later_axis, earlier)
    return jnp.exp(total if seen is None else jnp.where(seen, total, -jnp.inf))


def exponents(later: Tokens, later_axis: int, earlier: Tokens) -> Float[Array, "64 64"]:
    """Sums of the exponents of the tokens behind the earlier ones up to the later ones, of one document."""
    return over(later.total, later_axis) - over(earlier.total, 1 - later_axis)
