"""Values and gradients beside TRL 1.16's own code on the same log-probabilities (`tests/oracles/trl_losses.py`)."""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import objectives
from llm_jax.objectives.preference.named import LOSSES

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden" / "trl" / "losses.npz")
CASES = json.loads(str(GOLDEN["cases"]))
# TRL's `sigmoid` has no label smoothing: the case that sets it is among the disagreements below.
SAME = [name for name in CASES if name != "sigmoid_smoothed"]
# What TRL computes in float32 whatever it is given.
SINGLE = {name for name, case in CASES.items() if "alpha_divergence" in name or case["trainer"] == "orpo"}


def inputs_of(kind: str) -> dict[str, jax.Array]:
    return {key.partition("/")[2]: jnp.array(GOLDEN[key]) for key in GOLDEN.files if key.startswith(f"{kind}/")}


def lengths_of(x: dict[str, jax.Array]) -> dict[str, Any]:
    return dict(zip(("chosen_lengths", "rejected_lengths"), x["lengths"], strict=True))


def paired(case: dict, x: dict, logps: jax.Array) -> jax.Array:
    """Losses of the pairs of a DPOTrainer's case, by the registry."""
    named, options = LOSSES[case["loss_type"]], dict(case["options"])
    weighted, ld_alpha = options.pop("use_weighting", False), options.pop("ld_alpha", None)
    lengths = lengths_of(x)
    if ld_alpha is not None:
        logps = ld_transformed(logps, x["lengths"], ld_alpha)
        x = x | {"ref_logps": ld_transformed(x["ref_logps"], x["lengths"], ld_alpha)}
    passed = {name: lengths[name] for name in named.lengths} | named.fixed
    passed |= {name: value for name, value in options.items() if name in (*named.options, "beta") and named.has_beta}
    if named.nll:
        passed["chosen_nll"] = objectives.nll_shares(-logps[0], x["lengths"][0].sum(), logps.shape[1])
    arrays = (*logps, *x["ref_logps"]) if named.reference else tuple(logps)
    losses, _ = getattr(objectives, named.function)(*arrays, **passed)
    return losses * objectives.wpo(*logps, *x["log_sum_sq_probs"], **lengths) if weighted else losses


def ld_transformed(sums: jax.Array, lengths: jax.Array, alpha: float) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(16), (*sums.shape, 16))
    tokens = jnp.where(positions < lengths[..., None], (sums / lengths)[..., None], 0.0)
    shared = jnp.broadcast_to(lengths.min(0)[None, :, None], tokens.shape)
    return objectives.ld_dpo(tokens, positions, shared, alpha).sum(-1)


def single(case: dict, x: dict, logps: jax.Array) -> jax.Array:
    """Losses of the single answers of a KTOTrainer's case."""
    named = LOSSES[case["loss_type"]]
    passed = dict(case["options"])
    if named.statistics:
        passed["kl"] = objectives.kto_kl(x["kl_ratios"], jnp.zeros_like(x["kl_ratios"]))
    return getattr(objectives, named.function)(logps, x["ref_logps"][0], x["labels"], **passed)[0]


def reference_free(case: dict, x: dict, logps: jax.Array) -> jax.Array:
    """Losses of a CPOTrainer's case without its likelihood term."""
    name, options = case["loss_type"], dict(case["options"])
    chosen, rejected = logps
    if name == "simpo":
        function = objectives.alpha_po if "alpha" in options else objectives.simpo
        return function(chosen, rejected, **options, **lengths_of(x))[0]
    if name == "sigmoid":
        return objectives.cpo(chosen, rejected, **options, cpo_alpha=0.0)[0]
    if name == "hinge":
        return objectives.cpo_hinge(chosen, rejected, **options, cpo_alpha=0.0)[0]
    return objectives.cpo_ipo(chosen, rejected, **options, cpo_alpha=0.0, **lengths_of(x))[0]


def orpo(case: dict, x: dict, logps: jax.Array) -> jax.Array:
    chosen, rejected = logps
    options = case["options"] | lengths_of(x)
    return objectives.orpo(chosen, rejected, **options, chosen_nll=jnp.zeros_like(chosen))[0]


def reward(case: dict, x: dict, rewards: jax.Array) -> jax.Array:
    options = dict(case["options"])
    margin = x["margin"] if options.pop("margin", False) else 0.0
    chosen, rejected = rewards
    return objectives.bradley_terry(chosen, rejected, margin, **options)[0]


def dft(case: dict, x: dict, logps: jax.Array) -> jax.Array:
    return objectives.dft(logps / 10, jnp.ones(logps.shape, bool))[0]


OURS = {"dpo": paired, "kto": single, "cpo": reference_free, "orpo": orpo, "reward": reward, "sft": dft}


def value_and_grad(case: dict, x: dict, each: bool) -> tuple[jax.Array, jax.Array]:
    """Losses, or their mean, and the gradient of their sum by log-probabilities (or rewards)."""
    at = x["rewards"] if case["trainer"] == "reward" else x["logps"]

    def loss(at: jax.Array) -> tuple[jax.Array, jax.Array]:
        losses = OURS[case["trainer"]](case, x, at)
        losses = losses if each else losses.mean()
        return losses.sum(), losses

    grads, losses = jax.grad(loss, has_aux=True)(at[0] if case["trainer"] == "kto" else at)
    return losses, grads


@pytest.mark.parametrize("kind", ["random", "extreme"])
@pytest.mark.parametrize("name", SAME)
def test_equals_trl(name, kind):
    """To 1e-6 wherever TRL's number is one, in float64 where TRL computes in that."""
    case = CASES[name]
    values, grads = GOLDEN[f"{name}|{kind}|values"], GOLDEN[f"{name}|{kind}|grads"]
    with jax.enable_x64(name not in SINGLE):
        own, ours = value_and_grad(case, inputs_of(kind), each=values.ndim > 0)
    assert np.isfinite(own).all() and np.isfinite(ours).all()
    known = np.isfinite(values)
    if name == "ipo_alpha_divergence":
        # Half of our bound on the exponent, 40 in float32, is what squares to a finite number with certainty.
        known &= np.abs(values) < 1e34
    known_grads = np.isfinite(grads) & known
    ours, grads = np.where(known_grads, ours, 0), np.where(known_grads, grads, 0)
    np.testing.assert_allclose(np.where(known, own, 0), np.where(known, values, 0), rtol=1e-6, atol=1e-12)
    if name in SINGLE:
        assert np.linalg.norm(ours - grads) <= 1e-6 * np.linalg.norm(grads)
    else:
        np.testing.assert_allclose(ours, grads, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", SAME)
def test_log_ratios_of_ten_thousand_in_float32(name):
    """Finite forward and backward, and what float64 has up to rounding, where no exponential is cut off."""
    values = GOLDEN[f"{name}|extreme|values"]
    losses, grads = value_and_grad(CASES[name], inputs_of("extreme"), each=values.ndim > 0)
    assert losses.dtype == jnp.float32
    assert np.isfinite(losses).all() and np.isfinite(grads).all()
    known = np.isfinite(values) & (np.abs(values) < 1e15)
    if name == "sigmoid_ld":
        # Its tokens' log-probabilities, 11000 over a number of tokens, are rounded before any loss sees them.
        return
    np.testing.assert_allclose(np.where(known, losses, 0), np.where(known, values, 0), rtol=1e-6, atol=1e-9)
