"""The decoder: embedding, segments of stacked blocks, final norm, head."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from llm_jax.base.errors import UserError
from llm_jax.models.block import Block
from llm_jax.models.cache import Cache, Meta, Packed
from llm_jax.models.config import ModelConfig
from llm_jax.models.layers import RESIDUAL, Bias, Embedding, Linear
from llm_jax.models.mtp import FurtherToken, ahead, same_document
from llm_jax.models.norms import make_norm
from llm_jax.models.parameter import stack
from llm_jax.models.pooling import pool
from llm_jax.models.prefix import sight_ends, with_sight
from llm_jax.models.remat import REMAT
from llm_jax.models.rope import Rope, Rotation, rotation
from llm_jax.models.segments import (
    Grouping,
    LayerSpec,
    Layout,
    Segment,
    further_spec,
    group,
    layer_specs,
    layout_of,
    regroup,
)
from llm_jax.models.shared import Shared
from llm_jax.models.transform import Transform
from llm_jax.models.weights import in_compute
from llm_jax.sharding import constrain

TAPS = ("hidden", "attention_out", "mlp_out")
LAYER_INPUTS = ("residual", "residual_dropout", "attention_dropout", "router_noise")


class Decoder(nnx.Module):
    """A decoder-only transformer, or an encoder (`config.causal`).

    Built abstract: parameters have shapes and declarations, `bind` puts arrays in.

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
        if config.positions == "learned":
            self.position_embed = Embedding(config.max_position_embeddings, config.hidden_size, config.init_std)
        self.embed_norm = make_norm(config) if config.embed_norm else None
        self.segments = nnx.Dict(
            {
                str(s): nnx.Dict(
                    {str(i): stack(Block(config, spec), segment.repeats) for i, spec in enumerate(segment.block)}
                )
                for s, segment in enumerate(self.groups)
            }
        )
        self.norm = make_norm(config)
        if config.mtp:
            spec = further_spec(config)
            self.mtp = nnx.Dict({str(k): FurtherToken(config, Block(config, spec)) for k in range(config.mtp)})
        D, V, head = config.hidden_size, config.vocab_size, config.head
        assert V is not None
        self.transform = Transform(config) if head.transform else None
        if head.labels is not None:
            self.score = Linear(D, head.labels, ("embed", "labels"), bias=head.bias, std=config.init_std)
        elif not config.tie_embeddings:
            self.head = Linear(D, V, ("embed", "vocab"), bias=False, std=config.init_std)
        self.vocab_bias = Bias(V, "vocab") if head.labels is None and head.bias else None

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        caches: Sequence[Cache] | None = None,
        layer_inputs: Mapping[str, Any] | None = None,
        embedding_noise: Float[Array, "B T D"] | None = None,
        prefix: Bool[Array, "B T"] | None = None,
        visible: Int[Array, "B T 2"] | None = None,
        taps: Sequence[str] = (),
        meta: Meta | None = None,
    ) -> tuple[Float[Array, "B T D"], tuple[Cache, ...] | None, dict[str, dict[str, Array]]]:
        """Hidden states after the final norm, the caches with the tokens in, and `{"taps": {name: [L, ...]}}`; of a
        model with experts also `{"experts": {name: [layers with experts, ...]}}`, sums over the tokens (see `Router`).

        `positions` default to 0, 1, ... and `segment_ids` to one document per row. `caches` (one per layer) come with
        a `meta` in place of both. `layer_inputs`: `residual` [L, ...], added to the residual stream after each layer;
        `residual_dropout` (of both sublayers' outputs) and `attention_dropout`, `Dropout`s with keys [L, B];
        `router_noise`, keys [L, B], for noisy routers in training. `embedding_noise` is added to the token vectors.
        `prefix`: the tokens up to a document's last True one see each other from both sides (a prefix language model);
        over caches, of the first call (`prefix.with_sight`): later ones see all that is kept, and name no prefix.
        `visible`: in place of its document, the places [start, end) in the row that each token attends to as far as
        their positions are not beyond its own: for documents that share their first tokens.
        `taps`: names in `TAPS`. Raises UserError for unknown names, for a prefix of layers that have none, for one
        behind tokens that are kept, and for `visible` over caches or in layers that do not attend (`check_visible`).
        """
        for name in [*(set(taps) - set(TAPS)), *(set(layer_inputs or ()) - set(LAYER_INPUTS))]:
            raise UserError(
                f"{name!r} is neither a tap ({', '.join(TAPS)}) nor a layer input ({', '.join(LAYER_INPUTS)})"
            )
        if "router_noise" in (layer_inputs or ()) and not self.config.experts.noisy:
            raise UserError("router_noise is for models with noisy routers (model.experts.noisy)")
        if meta is None:
            if caches is not None:
                raise UserError("caches need a meta: positions, segment ids and lengths of the new tokens")
            if positions is None:
                positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
            meta = Meta(positions, segment_ids, visible=visible)
        elif positions is not None or segment_ids is not None or visible is not None:
            raise UserError("positions, segment_ids and visible are part of meta when meta is given")
        if meta.visible is not None:
            if caches is not None or prefix is not None:
                raise UserError("documents that share tokens (visible) are read without caches and without a prefix")
            self.config.check_visible()
        ends = None
        if prefix is not None:
            self.config.check_prefix()
            ends = sight_ends(prefix, meta.segment_ids)
            caches = None if caches is None else with_sight(caches, ends)
        shared = self._shared(meta)
        hidden = self._embedded(tokens, meta)
        if embedding_noise is not None:
            hidden = constrain(hidden + embedding_noise.astype(hidden.dtype), RESIDUAL)
        collected, new_caches = [], []
        for s, segment in enumerate(self.groups):
            blocks = [self.segments[str(s)][str(i)] for i in range(len(segment.block))]
            inputs = _inputs_of(segment, layer_inputs)
            if caches is None:
                packed = [replace(self._packed(spec), ends=ends) for spec in segment.block]
                run = partial(_scan, packed=packed, repeats=segment.repeats, remat=self.remat)
                hidden, seen = run(blocks, hidden, shared, inputs, tuple(taps))
            else:
                hidden, seen, kept = _step(
                    blocks, hidden, shared, inputs, caches[segment.first :][: segment.num_layers], tuple(taps)
                )
                new_caches.extend(kept)
            collected.append(seen)
        aux = {"taps": {name: jnp.concatenate([seen[name] for seen in collected]) for name in taps}}
        experts = [seen["experts"] for seen in collected if "experts" in seen]
        if experts:
            aux["experts"] = jax.tree.map(lambda *layers: jnp.concatenate(layers), *experts)
        return self.norm(hidden), tuple(new_caches) if caches is not None else None, aux

    def further(
        self,
        hidden: Float[Array, "B T D"],
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        layer_inputs: Mapping[str, Any] | None = None,
    ) -> tuple[list[Float[Array, "B T D"]], dict[str, Array]]:
        """Of a model with `mtp`: for k = 1, 2, … the states that the head predicts the token 1 + k ahead from, and the
        statistics of their routers `{name: [mtp, ...]}`, empty where they have none.

        `hidden` is what a call gave. Positions that have no token k ahead in their document hold nothing of use.
        `layer_inputs` as of a call, [mtp, ...].
        """
        found, seen = [], []
        spec = further_spec(self.config)
        apply = REMAT[self.remat](partial(_apply, cache=self._packed(spec), taps=()), scanned=False)
        for k in range(self.config.mtp):
            layer = self.mtp[str(k)]
            meta = Meta(positions, jnp.where(same_document(segment_ids, k + 1), segment_ids, 0))
            own = Meta(ahead(positions, k + 1), meta.segment_ids)
            embedded = self._embedded(ahead(tokens, k + 1), own)
            inputs = _row(layer_inputs or {}, k)
            hidden, _, statistics = apply(layer.block, layer.combined(hidden, embedded), self._shared(meta), inputs)
            seen.append(statistics)
            found.append(layer.norm(hidden))
        return found, _stacked(seen, ()).get("experts", {})

    def _shared(self, meta: Meta) -> Shared:
        used = {spec.rope for segment in self.groups for spec in segment.block}

        def turn(name: str, local: bool) -> Rotation | None:
            if name not in used:
                return None
            return rotation(Rope.of(self.config, local=local), meta.positions, meta.segment_ids, meta.horizon)

        if self.config.positions != "rope":
            return Shared(meta, None, None)
        return Shared(meta, turn("all", False), turn("local", True))

    def _embedded(self, tokens: Array, meta: Meta) -> Float[Array, "B T D"]:
        """Token vectors as they enter the first layer."""
        config = self.config
        hidden = self.embed(tokens)
        if config.embed_scale != 1.0:
            hidden = hidden * jnp.array(config.embed_scale, hidden.dtype)
        if config.positions == "learned":
            if tokens.shape[1] > config.max_position_embeddings:
                raise UserError(
                    f"{tokens.shape[1]} tokens are more than the {config.max_position_embeddings} learned positions"
                )
            hidden = hidden + self.position_embed(meta.positions)
        if config.positions == "sinusoidal":
            hidden = hidden + sinusoids(meta.positions, config.hidden_size).astype(hidden.dtype)
        hidden = constrain(hidden, RESIDUAL)
        return hidden if self.embed_norm is None else self.embed_norm(hidden)

    def _packed(self, spec: LayerSpec) -> Packed:
        window = self.config.window if spec.sees == "sliding" else None
        chunk = self.config.chunk if spec.sees == "chunked" else None
        return Packed(window, chunk, causal=self.config.causal)

    def head_inputs(self, hidden: Float[Array, "B T D"]) -> tuple[Float[Array, "B T E"], Float[Array, "E V"]]:
        """Two factors, in compute dtype, whose product is the logits before `logit_scale` and `logit_softcap`.

        Of tied models the second is the transposed embedding; a bias is one more row of it, and of the first a column
        of ones. Raises UserError for a model that ends in scores.
        """
        labels = self.config.head.labels
        if labels is not None:
            raise UserError(f"the model ends in scores (model.head.labels={labels}) and has no logits of tokens")
        hidden = hidden if self.transform is None else self.transform(hidden)
        if self.config.tie_embeddings:
            weight = in_compute(self.embed).weight.get_value().T
        else:
            hidden, weight = in_compute(self.head).factors(hidden)
        if self.vocab_bias is not None:
            bias = in_compute(self.vocab_bias).bias.get_value()
            weight = jnp.concatenate([weight, bias[None]])
            hidden = jnp.concatenate([hidden, jnp.ones_like(hidden[..., :1])], axis=-1)
        return hidden, weight

    def scores(
        self, hidden: Float[Array, "B T D"], segment_ids: Int[Array, "B T"] | None = None, documents: int = 1
    ) -> Float[Array, "B documents labels"] | Float[Array, "B T labels"]:
        """float32 scores of hidden states that went through the final norm, of a model with `config.head.labels`.

        Those of the documents 1, …, `documents` of each row, zeros for one that is not there; `segment_ids` None: the
        row is one. Where the head's pooling is `none`, those of each token. Raises UserError for a model that ends in
        logits.
        """
        head = self.config.head
        if head.labels is None:
            raise UserError("the model ends in logits of tokens and has no scores (model.head.labels is None)")
        there = None
        if head.pooling != "none":
            hidden, there = pool(hidden, segment_ids, documents, head.pooling)
        hidden = hidden if self.transform is None else self.transform(hidden)
        score = in_compute(self.score)
        out = _product(*score.factors(hidden))
        if score.bias is not None:
            out = out + score.bias.get_value().astype(jnp.float32)
        return out if there is None else jnp.where(there[..., None], out, 0.0)

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """float32 logits of hidden states that went through the final norm; raises UserError as `head_inputs`."""
        out = _product(*self.head_inputs(hidden))
        if self.config.logit_scale != 1.0:
            out = out * self.config.logit_scale
        if self.config.logit_softcap is not None:
            out = self.config.logit_softcap * jnp.tanh(out / self.config.logit_softcap)
        return constrain(out, ("batch", "length", "vocab"))


def _product(x: Array, weight: Array) -> Float[Array, "B T O"]:
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum("btd,do->bto", x, weight, precision=precision, preferred_element_type=jnp.float32)


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
    packed: Sequence[Packed],
    repeats: int,
    remat: str,
) -> tuple[Array, dict[str, Any]]:
    """A segment without a past: its repeats by `lax.scan`, a single one directly."""
    apply: list[Callable] = [
        REMAT[remat](partial(_apply, cache=cache, taps=taps), scanned=repeats > 1) for cache in packed
    ]

    def body(hidden: Array, xs: tuple[list[Block], Any]) -> tuple[Array, dict[str, Any]]:
        blocks, inputs = xs
        seen = []
        for i, block in enumerate(blocks):
            hidden, _, tapped = apply[i](block, hidden, shared, _row(inputs, i))
            seen.append(tapped)
        return hidden, _stacked(seen, taps)

    if repeats == 1:
        hidden, seen = body(hidden, _row((blocks, inputs), 0))
        return hidden, seen
    hidden, seen = jax.lax.scan(body, hidden, (blocks, inputs))
    return hidden, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), seen)


def _stacked(seen: Sequence[Mapping[str, Any]], taps: tuple[str, ...]) -> dict[str, Any]:
    """Of layers one after another: the taps of all, and the statistics of those that have experts."""
    out: dict[str, Any] = {name: jnp.stack([layer[name] for layer in seen]) for name in taps}
    experts = [layer["experts"] for layer in seen if "experts" in layer]
    return out | ({"experts": jax.tree.map(lambda *layers: jnp.stack(layers), *experts)} if experts else {})


def _step(
    blocks: list[Block], hidden: Array, shared: Shared, inputs: Any, caches: Sequence[Cache], taps: tuple[str, ...]
) -> tuple[Array, dict[str, Any], list[Cache]]:
    """A segment over caches, layer by layer: caches that pass through a scan are copied at every step."""
    seen, kept = [], []
    for layer, cache in enumerate(caches):
        row, i = divmod(layer, len(blocks))
        hidden, cache, tapped = _apply(_row(blocks[i], row), hidden, shared, _row(_row(inputs, row), i), cache, taps)
        seen.append(tapped)
        kept.append(cache)
    return hidden, _stacked(seen, taps), kept


def sinusoids(positions: Int[Array, "B T"], width: int) -> Float[Array, "B T D"]:
    """Vaswani et al. 2017 (arXiv:1706.03762), section 3.5: sines at even places, cosines at odd ones."""
    angles = positions[..., None].astype(jnp.float32) / 10000.0 ** (jnp.arange(0, width, 2) / width)
    waves = jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return waves.reshape(*positions.shape, -1)[..., :width]


def layout(decoder: Decoder) -> Layout:
    """The decoder's grouping for a checkpoint's metadata (see `segments.layout_of`)."""
    return layout_of(decoder.groups)


def unstack(params: Mapping[str, Any], decoder: Decoder) -> dict[str, Any]:
    """Parameters (JAX arrays, traced or not) of `Decoder(config, segments="unrolled")`: what decoding runs on."""
    return regroup(params, layout(decoder), layout_of(group(layer_specs(decoder.config), "unrolled")), jnp.stack)
