"""Several adapters into one: sums, concatenation, the best of a rank, TIES. As PEFT's `add_weighted_adapter`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from llm_jax.adapters.config import LoraConfig
from llm_jax.adapters.peft_files import Adapter, from_tensors, to_tensors
from llm_jax.adapters.sites import Adaptation
from llm_jax.base.errors import UserError

Method = Literal["linear", "cat", "svd", "ties", "ties_svd"]
METHODS = ("linear", "cat", "svd", "ties", "ties_svd")
Factors = tuple[np.ndarray, np.ndarray]
"""A `[rank, inputs]` and B `[outputs, rank]` as PEFT has them, their scale in them where a text says so."""


def combine(
    adapters: Sequence[tuple[Adaptation, Adapter]],
    weights: Sequence[float],
    method: Method = "svd",
    *,
    rank: int | None = None,
    density: float | None = None,
    majority_sign: Literal["total", "frequency"] = "total",
) -> tuple[Adaptation, Adapter]:
    """One adapter for the weighted sum of several on one model; its scale is 1.

    - `cat`: exactly the sum, with the sum of ranks;
    - `svd`: of the sum's singular values the `rank` largest (None: the largest rank of the adapters);
    - `linear`: sums of A and of B apart, each by the roots of weight times scale, a rough approximation;
    - `ties`: TIES (Yadav et al. 2023, arXiv:2306.01708) of A and of B apart: the `density` largest of each adapter,
      the sign of the greater total (or the more frequent one, `majority_sign`), and of what has it the mean;
    - `ties_svd`: TIES of the updates, then as `svd`.

    PEFT with rsLoRA gives the new adapter a scale of sqrt(rank); here it is 1. Raises UserError for ranks that differ
    (`linear`, `ties`), a density missing or out of [0, 1], and adapters that are no sums of updates: DoRA, parameters
    (`target_parameters`), ones that train modules whole, PiSSA and OLoRA.
    """
    _check(adapters, weights, method, rank, density)
    found: dict[str, Factors] = {}
    for module, own in _by_module(adapters).items():
        scaled = [(w, s, A, B) for k, s, A, B in own for w in [weights[k]]]
        found[module] = _combined(scaled, method, rank, density, majority_sign)
    new = max(A.shape[0] for A, _ in found.values())
    config = LoraConfig(r=new, lora_alpha=float(new), target_modules=tuple(found))
    adaptation = Adaptation(adapters[0][0].decoder, config)
    tensors = {}
    for name, shape in to_tensors(adaptation).items():
        module, _, kind = name.rpartition(".lora_")
        A, B = found[module.removeprefix("base_model.model.")]
        tensors[name] = np.zeros(shape, np.float32)
        factor = A if "A" in kind else B
        tensors[name][: factor.shape[0], : factor.shape[1]] = factor
    return adaptation, Adapter(config, from_tensors(adaptation, tensors))


def ties(
    tensors: Sequence[np.ndarray],
    weights: Sequence[float],
    density: float,
    majority_sign: Literal["total", "frequency"] = "total",
) -> np.ndarray:
    """TIES of arrays of one shape: trimmed to the `density` largest, signs elected, the mean of those that agree.

    The signs are those of the sums without weights, and what is averaged has them, as in PEFT.
    """
    stacked = np.stack([trimmed(tensor, density) for tensor in tensors])
    total = stacked.sum(0) if majority_sign == "total" else np.sign(stacked).sum(0)
    agrees = np.sign(stacked) == np.where(total >= 0, 1, -1)
    scaled = stacked * np.asarray(weights, np.float32).reshape(-1, *[1] * (stacked.ndim - 1))
    return (scaled * agrees).sum(0) / np.maximum(agrees.sum(0), 1)


def trimmed(tensor: np.ndarray, density: float) -> np.ndarray:
    """The `density` largest by magnitude, zeros for the others."""
    if density >= 1:
        return tensor
    kept = np.zeros(tensor.size, bool)
    kept[np.argsort(-np.abs(tensor).reshape(-1), kind="stable")[: int(density * tensor.size)]] = True
    return np.where(kept.reshape(tensor.shape), tensor, 0)


def _combined(own: Any, method: Method, rank: int | None, density: float | None, sign: Any) -> Factors:
    """Of one module: `(weight, scale, A, B)` of each adapter that is on it."""
    if method == "cat":
        return np.concatenate([A * (w * s) for w, s, A, _ in own]), np.concatenate([B for *_, B in own], axis=1)
    if method in ("linear", "ties"):
        # A negative weight goes to one of the factors.
        roots = [math.sqrt(abs(w * s)) for w, s, *_ in own]
        signed = [math.copysign(root, w) for root, (w, *_) in zip(roots, own)]
        sides = (([A for *_, A, _ in own], signed), ([B for *_, B in own], roots))
        if method == "linear":
            A, B = (sum(x * np.float32(r) for x, r in zip(side, by)) for side, by in sides)
        else:
            assert density is not None
            A, B = (ties(side, by, density, sign) for side, by in sides)
        return np.asarray(A), np.asarray(B)
    updates = [np.float32(s) * (B @ A) for _, s, A, B in own]
    if method == "svd":
        update = np.sum([np.float32(w) * x for (w, *_), x in zip(own, updates)], axis=0)
    else:
        assert density is not None
        update = ties(updates, [w for w, *_ in own], density, sign)
    # In float64: neighbours among the singular values make their vectors inexact.
    u, values, vh = np.linalg.svd(update.astype(np.float64), full_matrices=False)
    new = rank or max(A.shape[0] for _, _, A, _ in own)
    return vh[:new], u[:, :new] * values[:new]


def _by_module(
    adapters: Sequence[tuple[Adaptation, Adapter]],
) -> dict[str, list[tuple[int, float, np.ndarray, np.ndarray]]]:
    """`(number, scale, A, B)` of each adapter that is on a module, by module."""
    found: dict[str, list[Any]] = {}
    for k, (adaptation, adapter) in enumerate(adapters):
        tensors = to_tensors(adaptation, adapter.params)
        for site in adaptation.sites:
            for _, row in site.chosen:
                start = f"base_model.model.{row.place.module}.lora_"
                a, b = ("embedding_A", "embedding_B") if site.place.kind == "embedding" else ("A.weight", "B.weight")
                found.setdefault(row.place.module, []).append((k, row.scale, tensors[start + a], tensors[start + b]))
    return found


def _check(adapters: Any, weights: Any, method: str, rank: int | None, density: float | None) -> None:
    if method not in METHODS:
        raise UserError(f"method {method!r} is not one of {', '.join(METHODS)}")
    if not adapters or len(adapters) != len(weights):
        raise UserError(f"{len(weights)} weights are given for {len(adapters)} adapters")
    for adaptation, _ in adapters:
        config = adaptation.config
        reasons = {
            "DoRA": config.use_dora,
            "target_parameters": config.target_parameters,
            "modules that are trained whole": adaptation.saved,
            f"init_lora_weights={config.init_lora_weights}": config.init_lora_weights in ("pissa", "olora"),
        }
        for reason, there in reasons.items():
            if there:
                raise UserError(f"adapters with {reason} are no sums of updates, and can't be combined; merge them")
    if method.startswith("ties") and (density is None or not 0 <= density <= 1):
        raise UserError(f"density is {density}; {method} needs one in [0, 1]")
    if density is not None and not method.startswith("ties"):
        raise UserError(f"density={density} is for ties and ties_svd, not for {method}")
    if rank is not None and (rank < 1 or not method.endswith("svd")):
        raise UserError(f"rank={rank} is for svd and ties_svd, and at least 1")
    ranks = {max(site.rank for site in adaptation.sites) for adaptation, _ in adapters}
    if method in ("linear", "ties") and len(ranks) > 1:
        raise UserError(f"the adapters have the ranks {sorted(ranks)}: {method} needs equal ones")
