"""The decoder: embedding, segments of stacked blocks, final norm, head."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from llm_jax.base.errors import UserError
from llm_jax.models.cache import Cache, Meta, Packed, with_dropout
from llm_jax.models.config import ModelConfig
from llm_jax.models.layers import RESIDUAL, Attention, Embedding, Linear, RMSNorm, SwiGLU
from llm_jax.models.parameter import stack
from llm_jax.models.remat import REMAT
from llm_jax.models.rope import Rotation, rotation
from llm_jax.models.segments import Grouping, Layout, Segment, group, layer_specs, layout_of, regroup
from llm_jax.models.weights import in_compute
from llm_jax.sharding import constrain

TAPS = ("hidden", "attention_out", "mlp_out")
LAYER_INPUTS = ("residual", "residual_dropout", "attention_dropout")


class Shared(NamedTuple):
    """What all layers of a call read: computed once."""

    rope: Rotation
    meta: Meta


class Block(nnx.Module):
    """A pre-norm layer: attention, then feed-forward, each added to the residual stream."""

    def __init__(self, config: ModelConfig):
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = SwiGLU(config)

    def __call__(
        self, hidden: Array, shared: Shared, layer_inputs: Mapping[str, Any] | None, cache: Cache, taps: Sequence[str]
    ) -> tuple[Array, Cache, dict[str, Array]]:
        """`(params = self, hidden [B,T,D], shared, layer inputs, cache) -> (hidden, cache, the taps asked for)`."""
        inputs = layer_inputs or {}
        if "attention_dropout" in inputs:
            cache = with_dropout(cache, inputs["attention_dropout"])
        hidden = constrain(hidden, RESIDUAL)
        attention_out, cache = self.attention(self.attention_norm(hidden), shared.rope, cache, shared.meta)
        if "residual_dropout" in inputs:
            attention_out = inputs["residual_dropout"](attention_out, 0)
        hidden = constrain(hidden + attention_out, RESIDUAL)
        mlp_out = self.mlp(self.mlp_norm(hidden))
        if "residual_dropout" in inputs:
            mlp_out = inputs["residual_dropout"](mlp_out, 1)
        hidden = constrain(hidden + mlp_out, RESIDUAL)
        if "residual" in inputs:
            hidden = hidden + inputs["residual"].astype(hidden.dtype)
        seen = {"hidden": hidden, "attention_out": attention_out, "mlp_out": mlp_out}
        return hidden, cache, {name: seen[name] for name in taps}


class Decoder(nnx.Module):
    """A decoder-only transformer. Built abstract: parameters have shapes and declarations, `bind` puts arrays in.

    `segments`: how layers are grouped (see `segments.group`); it changes no number. `remat`: what the backward
    pass recomputes, a name in `remat.REMAT`. Raises UserError for sizes that do not fit together.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        segments: Grouping = "scan",
        remat: Literal["none", "full", "dots"] = "none",
    ):
        config = config.resolved()
        if remat not in REMAT:
            raise UserError(f"remat {remat!r} is not one of {', '.join(REMAT)}")
        self.config = config
        self.remat = remat
        self.groups: tuple[Segment, ...] = group(layer_specs(config), segments)
        self.embed = Embedding(config.vocab_size, config.hidden_size, config.embed_init_std)  # type: ignore[arg-type]
        self.segments = nnx.Dict(
            {
                str(s): nnx.Dict({str(i): stack(Block(config), segment.repeats) for i in range(len(segment.block))})
                for s, segment in enumerate(self.groups)
            }
        )
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        if not config.tie_embeddings:
            self.head = Linear(
                config.hidden_size,
                config.vocab_size,  # type: ignore[arg-type]
                ("embed", "vocab"),
                bias=False,
                std=config.init_std,
            )

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        caches: Sequence[Cache] | None = None,
        layer_inputs: Mapping[str, Any] | None = None,
        embedding_noise: Float[Array, "B T D"] | None = None,
        taps: Sequence[str] = (),
        meta: Meta | None = None,
    ) -> tuple[Float[Array, "B T D"], tuple[Cache, ...] | None, dict[str, dict[str, Array]]]:
        """Hidden states after the final norm, the caches with the tokens in, and `{"taps": {name: [L, ...]}}`.

        `positions` default to 0, 1, ... and `segment_ids` to one document per row. `caches` (one per layer) come with
        a `meta` in place of both. `layer_inputs`: `residual` [L, ...], added to the residual stream after each layer;
        `residual_dropout` (of both sublayers' outputs) and `attention_dropout`, `Dropout`s with keys [L, B].
        `embedding_noise` is added to the token vectors. `taps`: names in `TAPS`. Raises UserError for unknown names.
        """
        for name in [*(set(taps) - set(TAPS)), *(set(layer_inputs or ()) - set(LAYER_INPUTS))]:
            raise UserError(
                f"{name!r} is neither a tap ({', '.join(TAPS)}) nor a layer input ({', '.join(LAYER_INPUTS)})"
            )
        if meta is None:
            if caches is not None:
                raise UserError("caches need a meta: positions, segment ids and lengths of the new tokens")
            if positions is None:
                positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
            meta = Meta(positions, segment_ids)
        elif positions is not None or segment_ids is not None:
            raise UserError("positions and segment_ids are part of meta when meta is given")
        assert self.config.head_dim is not None
        shared = Shared(rotation(meta.positions, self.config.head_dim, self.config.rope_theta), meta)
        hidden = constrain(self.embed(tokens), RESIDUAL)
        if embedding_noise is not None:
            hidden = constrain(hidden + embedding_noise.astype(hidden.dtype), RESIDUAL)
        collected, new_caches = [], []
        for s, segment in enumerate(self.groups):
            blocks = [self.segments[str(s)][str(i)] for i in range(len(segment.block))]
            inputs = _inputs_of(segment, layer_inputs)
            if caches is None:
                packed = Packed(self.config.window)
                run = partial(_scan, packed=packed, repeats=segment.repeats, remat=self.remat)
                hidden, seen = run(blocks, hidden, shared, inputs, tuple(taps))
            else:
                hidden, seen, kept = _step(
                    blocks, hidden, shared, inputs, caches[segment.first :][: segment.num_layers], tuple(taps)
                )
                new_caches.extend(kept)
            collected.append(seen)
        aux = {"taps": {name: jnp.concatenate([seen[name] for seen in collected]) for name in taps}}
        return self.norm(hidden), tuple(new_caches) if caches is not None else None, aux

    def head_weight(self) -> Float[Array, "D V"]:
        """The output head in compute dtype; of tied models the transposed embedding."""
        if self.config.tie_embeddings:
            return in_compute(self.embed).weight.get_value().T
        return in_compute(self.head).weight.get_value()

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """float32 logits of hidden states that went through the final norm."""
        weight = self.head_weight()
        precision = jax.lax.Precision.HIGHEST if hidden.dtype == jnp.float32 else None
        out = jnp.einsum("btd,dv->btv", hidden, weight, precision=precision, preferred_element_type=jnp.float32)
        return constrain(out, ("batch", "length", "vocab"))


def _inputs_of(segment: Segment, layer_inputs: Any) -> Any:
    """A segment's part of the layer inputs: `[L, ...]` -> `[repeats, layers of the block, ...]`."""

    def cut(x: Array) -> Array:
        return x[segment.first :][: segment.num_layers].reshape(segment.repeats, len(segment.block), *x.shape[1:])

    return jax.tree.map(cut, layer_inputs)


def _row(tree: Any, index: int) -> Any:
    return jax.tree.map(lambda x: x[index], tree)


def _apply(block: Block, hidden: Array, shared: Shared, inputs: Any, cache: Cache, taps: tuple[str, ...]):
    return block(hidden, shared, inputs, cache, taps)


def _scan(
    blocks: list[Block],
    hidden: Array,
    shared: Shared,
    inputs: Any,
    taps: tuple[str, ...],
    *,
    packed: Packed,
    repeats: int,
    remat: str,
) -> tuple[Array, dict[str, Array]]:
    """A segment without a past: its repeats by `lax.scan`, a single one directly."""
    apply: Callable = REMAT[remat](partial(_apply, cache=packed, taps=taps), scanned=repeats > 1)

    def body(hidden: Array, xs: tuple[list[Block], Any]) -> tuple[Array, dict[str, Array]]:
        blocks, inputs = xs
        seen = []
        for i, block in enumerate(blocks):
            hidden, _, tapped = apply(block, hidden, shared, _row(inputs, i))
            seen.append(tapped)
        return hidden, {name: jnp.stack([tapped[name] for tapped in seen]) for name in taps}

    if repeats == 1:
        hidden, seen = body(hidden, _row((blocks, inputs), 0))
        return hidden, seen
    hidden, seen = jax.lax.scan(body, hidden, (blocks, inputs))
    return hidden, {name: x.reshape(-1, *x.shape[2:]) for name, x in seen.items()}


def _step(
    blocks: list[Block], hidden: Array, shared: Shared, inputs: Any, caches: Sequence[Cache], taps: tuple[str, ...]
) -> tuple[Array, dict[str, Array], list[Cache]]:
    """A segment over caches, layer by layer: caches that pass through a scan are copied at every step."""
    seen, kept = [], []
    for layer, cache in enumerate(caches):
        row, i = divmod(layer, len(blocks))
        hidden, cache, tapped = _apply(_row(blocks[i], row), hidden, shared, _row(_row(inputs, row), i), cache, taps)
        seen.append(tapped)
        kept.append(cache)
    return hidden, {name: jnp.stack([tapped[name] for tapped in seen]) for name in taps}, kept


def layout(decoder: Decoder) -> Layout:
    """The decoder's grouping for a checkpoint's metadata (see `segments.layout_of`)."""
    return layout_of(decoder.groups)


def unstack(params: Mapping[str, Any], decoder: Decoder) -> dict[str, Any]:
    """Parameters (JAX arrays, traced or not) of `Decoder(config, segments="unrolled")`: what decoding runs on."""
    return regroup(params, layout(decoder), layout_of(group(layer_specs(decoder.config), "unrolled")), jnp.stack)
