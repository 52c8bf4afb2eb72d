"""Adapters on a model, in use: the decoder with updates beside its weights, and the values that it is bound with."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key

from llm_jax.adapters.lora import adapted
from llm_jax.adapters.places import module_at
from llm_jax.adapters.sites import Adaptation, Site
from llm_jax.base.errors import UserError
from llm_jax.base.trees import flatten
from llm_jax.models.decoder import Decoder
from llm_jax.sharding import Gathered

Tree = Mapping[str, Any]


class Adapters:
    """One adapter or several on one model. Several add up, or each row of a batch chooses among them.

    Attributes:
        decoder: abstract, with updates beside the weights of all sites.
        all: the adapters.
    """

    def __init__(self, decoder: Decoder, adaptations: Sequence[Adaptation]):
        """`decoder`: the model's own, abstract. Raises UserError for several adapters where one has what rows can't
        choose among: DoRA, or parameters that are trained whole."""
        self.all = tuple(adaptations)
        if len(self.all) > 1:
            for one in self.all:
                if one.config.use_dora or one.saved:
                    reason = "use_dora" if one.config.use_dora else f"its own {one.saved[0]}"
                    raise UserError(
                        f"an adapter with {reason} can't be together with others; merge it, or load it alone"
                    )
        graph, state = nnx.split(decoder)
        self.decoder: Decoder = nnx.merge(graph, state)
        self._by_part: dict[str, list[tuple[int, Site, int]]] = {}
        for k, adaptation in enumerate(self.all):
            for site in adaptation.sites:
                for i, part in enumerate(site.parts):
                    self._by_part.setdefault(part, []).append((k, site, i))
        for part in self._by_part:
            self._adapt(self.decoder, part, part)

    def _adapt(self, decoder: Decoder, part: str, path: str) -> None:
        """Puts the updates of `part` beside the weight that lies in `decoder` at `path`."""
        own, (parent, _, name) = self._by_part[part], path.rpartition("/")
        holder = module_at(decoder, parent) if parent else decoder
        rank = sum(site.rank * self._copies(k, site) for k, site, _ in own)
        setattr(holder, name, adapted(getattr(holder, name), rank, **self._options(own[0][1])))

    def unrolled(self) -> Decoder:
        """`decoder` with a segment for each layer: what its parameters belong to after `models.unstack`."""
        found = Decoder(self.decoder.config, segments="unrolled")
        for part in self._by_part:
            place = part.split("/", 3)
            if place[0] != "segments":
                self._adapt(found, part, part)
                continue
            for layer in self.decoder.groups[int(place[1])].layers(int(place[2])):
                self._adapt(found, part, f"segments/{layer}/0/{place[3]}")
        return found

    def _options(self, site: Site) -> dict[str, Any]:
        if site.place.kind in ("experts", "router"):
            return {}
        return {
            "dora": any(one.config.use_dora for one in self.all),
            "dropout": max((one.config.lora_dropout for one in self.all), default=0.0),
        }

    def _copies(self, k: int, site: Site) -> int:
        return 2 if starts_at_weight(self.all[k], site) else 1

    def expand(
        self,
        base: Tree,
        trees: Sequence[Tree],
        starts: Sequence[Tree] = (),
        *,
        choice: Float[Array, "B K"] | None = None,
        keys: Key[Array, " B"] | None = None,
    ) -> dict[str, Any]:
        """Flat parameters of `decoder`, pure.

        Args:
            base: the model's, nested.
            trees: each adapter's.
            starts: of each adapter whose updates are less what they started as (PiSSA): that (see `start_of`).
            choice: by row of the batch, which adapters it has; None: every row has all.
            keys: of the batch's rows, for dropout, in training.

        Leaves may be `Gathered`. Raises UserError for a choice where experts or routers have an adapter.
        """
        values, flat = flatten(base), [flatten(tree) for tree in trees]
        begun = [flatten(tree) for tree in starts] or [{} for _ in trees]
        for one, own in zip(self.all, flat):
            values |= {path: own[path] for path in one.saved}
        for part, sites in self._by_part.items():
            a, b = [], []
            for k, site, i in sites:
                columns = site.place.columns[i]
                a.append(flat[k][f"{site.path}/a"])
                b.append(_columns(flat[k][f"{site.path}/b"], columns, site.place.outputs))
                if starts_at_weight(self.all[k], site):
                    a.append(begun[k][f"{site.path}/a"])
                    b.append(-_columns(begun[k][f"{site.path}/b"], columns, site.place.outputs))
            values[f"{part}/lora/a"], values[f"{part}/lora/b"] = _joined(a, -1), _joined(b, -2)
            values |= self._vectors(part, flat[0], sites[0][1], sites[0][2], keys)
        return values | self.scales(choice)

    def scales(self, choice: Float[Array, "B K"] | None = None) -> dict[str, Array]:
        """Of the flat parameters those that say which rows have which adapters, arguments as of `expand`, pure: the
        others hold all adapters side by side."""
        found = {}
        for part, sites in self._by_part.items():
            scales = []
            for k, site, _ in sites:
                scale = jnp.asarray(site.scales)
                if choice is not None:
                    if site.place.kind in ("experts", "router"):
                        raise UserError(
                            f"{site.place.name} has an adapter: rows can't choose among adapters of {site.place.kind}"
                        )
                    scale = scale[..., None, None, :] * choice[:, k, None, None]
                scales += [scale] * self._copies(k, site)
            found[f"{part}/lora/scale"] = jnp.concatenate(scales, axis=-1)
        return found

    def _vectors(self, part: str, tree: Tree, site: Site, i: int, keys: Any) -> dict[str, Any]:
        options, found = self._options(site), {}
        if options.get("dora"):
            magnitude = tree[f"{site.path}/magnitude"]
            found[f"{part}/lora/magnitude"] = _columns(magnitude, site.place.columns[i], site.place.outputs)
        if options.get("dropout"):
            found[f"{part}/lora/keys"] = _site_keys(site, keys)
        return found


def starts_at_weight(adaptation: Adaptation, site: Site) -> bool:
    """Whether the update counts less what it started as, so that the model starts unchanged."""
    return adaptation.config.init_lora_weights in ("pissa", "olora") and site.place.kind == "linear"


def _site_keys(site: Site, keys: Key[Array, " B"] | None) -> Array:
    """uint32 `[layers, B, 2]`, or `[B, 2]`: of each place and row another key, whatever the grouping; B 0 without."""
    lead = () if site.layers is None else (len(site.layers),)
    if keys is None:
        return jnp.zeros((*lead, 0, 2), jnp.uint32)
    name = site.path.partition("lora/")[2]
    own = jax.vmap(jax.random.fold_in, (0, None))(keys, np.uint32(zlib.crc32(name.encode())))
    if site.layers is not None:
        fold = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (None, 0))
        own = fold(own, jnp.asarray(site.layers, jnp.uint32))
    return jax.random.key_data(own)


def _columns(leaf: Any, columns: tuple[int, ...], outputs: int) -> Any:
    """The outputs of one part of a weight."""
    first = columns[0]
    if columns == tuple(range(outputs)):
        return leaf
    if columns == tuple(range(first, first + len(columns))):
        return jax.tree.map(lambda x: x[..., first : first + len(columns)], leaf)
    return jax.tree.map(lambda x: x[..., np.array(columns)], leaf)


def _joined(leaves: Sequence[Any], axis: int) -> Any:
    """Side by side; of `Gathered` ones the slots too."""
    if len(leaves) == 1:
        return leaves[0]
    if not any(isinstance(leaf, Gathered) for leaf in leaves):
        return jnp.concatenate(leaves, axis)
    values = [leaf.value if isinstance(leaf, Gathered) else leaf for leaf in leaves]
    slots = [leaf.slot if isinstance(leaf, Gathered) else jnp.zeros(leaf.shape, jnp.float32) for leaf in leaves]
    return Gathered(jnp.concatenate(values, axis), jnp.concatenate(slots, axis))
