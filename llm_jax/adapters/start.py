"""What an adapter's parameters start as, by PEFT's names of the ways."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from llm_jax.adapters.adapters import starts_at_weight
from llm_jax.adapters.matching import Chosen
from llm_jax.adapters.sites import Adaptation, Site
from llm_jax.base.trees import flatten, unflatten

Tree = Mapping[str, Any]


def init_adapter(adaptation: Adaptation, base: Tree, seed: int) -> dict[str, Any]:
    """float32 parameters of step 0, NumPy arrays; equal under every grouping of layers.

    With True (the default) `a` is uniform in ± 1 / sqrt(inputs) and `b` zero, of an embedding `a` zero and `b` standard
    normal, as PEFT's. `base`: the model's parameters, read for saved modules, DoRA, PiSSA and OLoRA.
    """
    flat, found = flatten(base), {}
    for path in adaptation.saved:
        found[path] = whole(flat[path])
    for site in adaptation.sites:
        a = np.zeros(flatten(adaptation.abstract)[f"{site.path}/a"].shape, np.float32)
        b = np.zeros(flatten(adaptation.abstract)[f"{site.path}/b"].shape, np.float32)
        for i, row in site.chosen:
            at = (i,) if site.layers is not None else ()
            a[(*at, ..., slice(row.rank))], b[(*at, ..., slice(row.rank), slice(None))] = _start(
                adaptation, site, i, row, flat, seed
            )
        found[f"{site.path}/a"], found[f"{site.path}/b"] = a, b
        if adaptation.config.use_dora:
            found[f"{site.path}/magnitude"] = _lengths(site, flat, a, b, adaptation)
    return unflatten(found)


def start_of(adaptation: Adaptation, base: Tree) -> dict[str, Any]:
    """Of an adapter that starts at parts of the weights themselves (PiSSA, OLoRA): the `a` and `b` that its updates
    count less; nothing of others. PEFT takes these out of the model's weights instead: there the model without its
    adapter is another one than before."""
    flat = flatten(base)
    found = {path: np.zeros(leaf.shape, np.float32) for path, leaf in flatten(abstract_start(adaptation)).items()}
    for site in adaptation.sites if found else ():
        for i, row in site.chosen if starts_at_weight(adaptation, site) else ():
            at = (i,) if site.layers is not None else ()
            a, b = _from_weight(adaptation, site, i, row, flat)
            found[f"{site.path}/a"][(*at, ..., slice(row.rank))] = a
            found[f"{site.path}/b"][(*at, ..., slice(row.rank), slice(None))] = b
    return unflatten(found)


def abstract_start(adaptation: Adaptation) -> dict[str, Any]:
    """Shapes of `start_of`."""
    shapes = flatten(adaptation.abstract)
    sites = [site for site in adaptation.sites if starts_at_weight(adaptation, site)]
    return unflatten({f"{site.path}/{name}": shapes[f"{site.path}/{name}"] for site in sites for name in "ab"})


def whole(x: Any) -> np.ndarray:
    """float32 on the host of each process, of an array whose parts lie on devices of several."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        x = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x, np.float32)


def _start(adaptation: Adaptation, site: Site, i: int, row: Chosen, flat: Tree, seed: int) -> tuple[Any, Any]:
    """`a` `[experts, inputs, r]` and `b` `[experts, r, outputs]` of one layer, as far as there are experts."""
    if starts_at_weight(adaptation, site):
        return _from_weight(adaptation, site, i, row, flat)
    place, way = site.place, adaptation.config.init_lora_weights
    layer = 0 if site.layers is None else site.layers[i]

    def draws(what: str) -> Any:
        """The numbers of one array: named by the site and the layer."""
        name = f"{site.path.partition('lora/')[2]}/{what}"
        key = jax.random.fold_in(jax.random.key(seed), np.uint32(zlib.crc32(name.encode())))
        return jax.random.fold_in(key, np.uint32(layer))

    lead = () if place.experts is None else (place.experts,)
    # The factor at the side that PEFT takes for the inputs is theirs A.
    sizes = (place.outputs, place.inputs) if place.turned else (place.inputs, place.outputs)
    inputs, outputs, r = *sizes, row.rank
    if place.kind == "embedding":
        A = jax.random.normal(draws("a"), (inputs, r)) if way is False else np.zeros((inputs, r))
        B = jax.random.normal(draws("b"), (r, outputs))
    elif way == "orthogonal":
        q = np.linalg.qr(np.asarray(jax.random.normal(draws("q"), (r, r))))[0]
        A = np.asarray(jax.random.normal(draws("a"), (inputs, r // 2))) @ q[0::2] / 10.0
        B = q[1::2].T @ np.asarray(jax.random.normal(draws("b"), (r // 2, outputs))) / 10.0
    else:
        A = _uniform(draws("a"), (*lead, inputs, r), inputs)
        B = np.zeros((*lead, r, outputs))
        if way == "gaussian":
            A = jax.random.normal(draws("a"), (*lead, inputs, r)) / r
        if way is False:
            B = _uniform(draws("b"), (*lead, r, outputs), r * (place.experts or 1))
    A, B = np.asarray(A, np.float32), np.asarray(B, np.float32)
    return (np.swapaxes(B, -1, -2), np.swapaxes(A, -1, -2)) if place.turned else (A, B)


def _uniform(key: Any, shape: tuple[int, ...], inputs: int) -> Any:
    """As torch starts a linear layer of so many inputs."""
    return jax.random.uniform(key, shape, jnp.float32, -1 / math.sqrt(inputs), 1 / math.sqrt(inputs))


def _from_weight(adaptation: Adaptation, site: Site, i: int, row: Chosen, flat: Tree) -> tuple[np.ndarray, np.ndarray]:
    """PiSSA (Meng et al. 2024, arXiv:2404.02948, eq. 2-3): the largest singular values and their vectors, halves of
    the former's roots in each factor. OLoRA (Büyükakyüz 2024, arXiv:2406.01775): the first rows of a QR."""
    weight = _weight(site, i, flat)
    if adaptation.config.init_lora_weights == "pissa":
        u, s, vh = np.linalg.svd(weight, full_matrices=False)
        roots = np.sqrt(s[: row.rank] / np.float32(row.scale))
        return u[:, : row.rank] * roots, roots[:, None] * vh[: row.rank]
    q, r = np.linalg.qr(weight.T)
    return r[: row.rank].T, q[:, : row.rank].T


def _weight(site: Site, i: int, flat: Tree) -> np.ndarray:
    """float32[inputs, outputs] of one layer: outputs in their order."""
    found = np.zeros((site.place.inputs, site.place.outputs), np.float32)
    for part, columns in zip(site.parts, site.place.columns):
        weight = flat[f"{part}/weight"]
        found[:, list(columns)] = whole(weight if site.layers is None else weight[i])
    return found


def _lengths(site: Site, flat: Tree, a: np.ndarray, b: np.ndarray, adaptation: Adaptation) -> np.ndarray:
    """DoRA's magnitude at the start: the length of each output's weights, update included."""
    lengths, changed = [], not starts_at_weight(adaptation, site)
    for i in range(len(site.rows)):
        at = i if site.layers is not None else ...
        weight, scale = _weight(site, i, flat), site.scales[at]
        lengths.append(np.linalg.norm(weight + (a[at] * scale) @ b[at] if changed else weight, axis=0))
    return np.stack(lengths) if site.layers is not None else lengths[0]
