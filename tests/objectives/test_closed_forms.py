"""Every loss against its paper's equation in numpy float64, values and gradients, and the reference's vectors.

Gradients of the equations are by complex step: f(x + ih).imag / h has no rounding of its own.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import objectives as o

RNG = np.random.default_rng(11)
N = 5
# log-ratios of a few nats, and one pair each of +-60.
LOGPS = -RNG.uniform(5, 60, (4, N))
LOGPS[0, 3:], LOGPS[2, 3:] = [-5, -66], [-65, -6]
LENGTHS = RNG.integers(3, 14, (2, N)).astype(float)
SCORES = RNG.uniform(0, 1, (2, N))
LABELS = np.array([True, False, False, True, False])
BY_LENGTH: dict[str, Any] = {"chosen_lengths": LENGTHS[0], "rejected_lengths": LENGTHS[1]}


def log_sigmoid(x):
    with np.errstate(over="ignore", invalid="ignore"):
        return np.where(x.real > 0, -np.log1p(np.exp(-x)), x - np.log1p(np.exp(x)))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def ratios(x):
    return x[0] - x[2], x[1] - x[3]


def margin(x):
    chosen, rejected = ratios(x)
    return chosen - rejected


def positive(x):
    return np.where(x.real > 0, x, 0)


def smoothed(x, eps):
    return -(1 - eps) * log_sigmoid(x) - eps * log_sigmoid(-x)


def f_margin(x, f):
    chosen, rejected = ratios(x)
    return f(np.exp(chosen)) - f(np.exp(rejected))


def normalized(x):
    w, l = ratios(x)
    return w / LENGTHS[0] - l / LENGTHS[1]


def means(x):
    return x[0] / LENGTHS[0], x[1] / LENGTHS[1]


def log_odds(mean):
    return mean - np.log(1 - np.exp(mean))


def sorted_by_value(x):
    return x[np.argsort(x.real)]


def discopop(x, tau=0.05):
    mixed = sigmoid(0.1 * margin(x) / tau)
    return (1 - mixed) * -log_sigmoid(0.1 * margin(x)) + mixed * np.exp(-0.1 * margin(x))


def exo(x, eps=0.01):
    q = sigmoid(0.1 * margin(x))
    return q * (np.log(q) - np.log(1 - eps)) + (1 - q) * (np.log(1 - q) - np.log(eps))


def nca(x):
    w, l = ratios(x)
    return -log_sigmoid(0.1 * w) - 0.5 * log_sigmoid(-0.1 * w) - 0.5 * log_sigmoid(-0.1 * l)


def bco(x, delta):
    w, l = ratios(x)
    return -log_sigmoid(0.1 * w - delta) - log_sigmoid(delta - 0.1 * l)


def by_label(x, desirable, undesirable):
    """Of single answers: the first row of log-probabilities with the third as its reference."""
    r = x[0] - x[2]
    return np.where(LABELS, desirable(r), undesirable(r))


def orpo(x):
    w, l = means(x)
    return -w - 0.2 * log_sigmoid(log_odds(w) - log_odds(l))


def sppo(x, scores, factor, beta=0.02):
    w, l = ratios(x)
    return factor * ((w - (scores[0] - 0.5) / beta) ** 2 + (l - (scores[1] - 0.5) / beta) ** 2)


def aot(x):
    return smoothed(0.1 * (sorted_by_value(x[0] - x[1]) - np.sort((x[2] - x[3]).real)), 0.1)


def aot_unpaired(x):
    w, l = ratios(x)
    return smoothed(0.1 * (sorted_by_value(w) - sorted_by_value(l)), 0.1)


CASES: dict[str, tuple[Callable, dict[str, Any], Callable]] = {
    "dpo": (o.dpo, {}, lambda x: -log_sigmoid(0.1 * margin(x))),
    "dpo smoothed": (o.dpo, {"label_smoothing": 0.2}, lambda x: smoothed(0.1 * margin(x), 0.2)),
    "forward_kl": (
        o.dpo,
        {"f_divergence_type": "forward_kl"},
        lambda x: -log_sigmoid(0.1 * f_margin(x, lambda r: 1 - 1 / r)),
    ),
    "js": (
        o.dpo,
        {"f_divergence_type": "js"},
        lambda x: -log_sigmoid(0.1 * f_margin(x, lambda r: np.log(2 * r / (1 + r)))),
    ),
    "alpha": (
        o.dpo,
        {"f_divergence_type": "alpha", "f_alpha_divergence_coef": 0.3},
        lambda x: -log_sigmoid(0.1 * f_margin(x, lambda r: (1 - r**-0.3) / 0.3)),
    ),
    "robust_dpo": (
        o.robust_dpo,
        {"label_smoothing": 0.2},
        lambda x: (-0.8 * log_sigmoid(0.1 * margin(x)) + 0.2 * log_sigmoid(-0.1 * margin(x))) / 0.6,
    ),
    "hinge": (o.hinge, {}, lambda x: positive(1 - 0.1 * margin(x))),
    "ipo": (o.ipo, BY_LENGTH, lambda x: (normalized(x) - 5) ** 2),
    "ipo of sums": (o.ipo, {"length_normalized": False}, lambda x: (margin(x) - 5) ** 2),
    "sigmoid_norm": (o.sigmoid_norm, BY_LENGTH, lambda x: -log_sigmoid(0.1 * normalized(x))),
    "exo": (o.exo, {"label_smoothing": 0.01}, exo),
    "nca": (o.nca, {}, nca),
    "bco": (o.bco, {"delta": 0.3}, lambda x: bco(x, 0.3)),
    "bco of these": (o.bco, {}, lambda x: bco(x, 0.05 * sum(r.real.mean() for r in ratios(x)))),
    "apo_zero": (o.apo_zero, {}, lambda x: 1 - sigmoid(0.1 * ratios(x)[0]) + sigmoid(0.1 * ratios(x)[1])),
    "apo_down": (o.apo_down, {}, lambda x: sigmoid(0.1 * ratios(x)[0]) + 1 - sigmoid(0.1 * margin(x))),
    "dpop": (
        o.dpop,
        {"dpop_lambda": 5.0},
        lambda x: -log_sigmoid(0.1 * (margin(x) - 5 * positive(-ratios(x)[0]))),
    ),
    "discopop": (o.discopop, {}, discopop),
    "rpo": (
        o.rpo,
        {"rpo_alpha": 0.5, "chosen_lengths": BY_LENGTH["chosen_lengths"]},
        lambda x: -log_sigmoid(0.1 * margin(x)) - 0.5 * x[0] / LENGTHS[0],
    ),
    "sppo": (
        o.sppo,
        {"chosen_scores": SCORES[0], "rejected_scores": SCORES[1], "beta": 0.02},
        lambda x: sppo(x, SCORES, 0.5),
    ),
    "sppo_hard": (o.sppo_hard, {"beta": 0.02}, lambda x: sppo(x, (1.0, 0.0), 1.0)),
    "sppo_hard halved": (o.sppo_hard, {"beta": 0.02, "halved": True}, lambda x: sppo(x, (1.0, 0.0), 0.5)),
    "spin": (o.spin, {}, lambda x: -log_sigmoid(0.1 * margin(x))),
    "aot": (o.aot, {"label_smoothing": 0.1}, aot),
    "aot_unpaired": (o.aot_unpaired, {"label_smoothing": 0.1}, aot_unpaired),
    "simpo": (
        o.simpo,
        {"beta": 2.0, "simpo_gamma": 0.7, "label_smoothing": 0.1, **BY_LENGTH},
        lambda x: smoothed(2 * (means(x)[0] - means(x)[1]) - 0.7, 0.1),
    ),
    "alpha_po": (
        o.alpha_po,
        {"beta": 2.0, "simpo_gamma": 0.7, "alpha": 0.25, **BY_LENGTH},
        lambda x: -log_sigmoid(8 * (np.exp(-0.25 * means(x)[1]) - np.exp(-0.25 * means(x)[0])) - 0.7),
    ),
    "cpo": (o.cpo, {"cpo_alpha": 0.5}, lambda x: -log_sigmoid(0.1 * (x[0] - x[1])) - 0.5 * x[0]),
    "cpo_hinge": (
        o.cpo_hinge,
        {"cpo_alpha": 0.5},
        lambda x: np.where(x[0].real - x[1].real < 10, 1 - 0.1 * (x[0] - x[1]), 0) - 0.5 * x[0],
    ),
    "cpo_ipo": (
        o.cpo_ipo,
        {"cpo_alpha": 0.5, **BY_LENGTH},
        lambda x: (means(x)[0] - means(x)[1] - 5) ** 2 - 0.5 * x[0],
    ),
    "orpo": (o.orpo, {"beta": 0.2, **BY_LENGTH}, orpo),
    "kto": (
        o.kto,
        {"kl": 0.4, "desirable_weight": 1.5, "undesirable_weight": 0.7},
        lambda x: by_label(
            x, lambda r: 1.5 * (1 - sigmoid(0.1 * (r - 0.4))), lambda r: 0.7 * (1 - sigmoid(0.1 * (0.4 - r)))
        ),
    ),
    "apo_zero_unpaired": (
        o.apo_zero_unpaired,
        {},
        lambda x: by_label(x, lambda r: 1 - sigmoid(0.1 * r), lambda r: sigmoid(0.1 * r)),
    ),
    "bco_unpaired": (
        o.bco_unpaired,
        {"delta": 0.3},
        lambda x: by_label(x, lambda r: -log_sigmoid(0.1 * r - 0.3), lambda r: -log_sigmoid(0.3 - 0.1 * r)),
    ),
}
TWO = {"simpo", "alpha_po", "cpo", "cpo_hinge", "cpo_ipo", "orpo"}
UNPAIRED = {"kto", "apo_zero_unpaired", "bco_unpaired"}


def complex_step(equation) -> np.ndarray:
    """Gradient of the sum by the policy's log-probabilities [2, N]."""
    grads = np.zeros((2, N))
    for i, j in np.ndindex(2, N):
        x = LOGPS.astype(complex)
        x[i, j] += 1e-30j
        grads[i, j] = equation(x).sum().imag / 1e-30
    return grads


@pytest.mark.parametrize("name", CASES)
def test_equals_the_equation(name):
    function, options, equation = CASES[name]
    with jax.enable_x64(True):
        options = {key: jnp.array(x) if isinstance(x, np.ndarray) else x for key, x in options.items()}

        def losses(policy: jax.Array) -> jax.Array:
            if name in UNPAIRED:
                return function(policy[0], jnp.array(LOGPS[2]), jnp.array(LABELS), **options)[0]
            given = tuple(policy) if name in TWO else (*policy, *jnp.array(LOGPS[2:]))
            return function(*given, **({"beta": 0.1} | options if name not in TWO else options))[0]

        at = jnp.array(LOGPS[:2])
        own, grads = losses(at), jax.grad(lambda x: losses(x).sum())(at)
    expected = equation(LOGPS.astype(complex)).real
    # The optimal-transport losses give them in the pairs' order, the equations in the order of rank.
    order = np.argsort if name.startswith("aot") else lambda x: slice(None)
    np.testing.assert_allclose(np.asarray(own)[order(own)], expected[order(expected)], rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose(grads, complex_step(equation), rtol=1e-9, atol=1e-14)


VECTOR_LOGPS = jnp.array([[-12.0, -30.0, -7.5], [-14.0, -25.0, -9.0], [-13.0, -29.0, -8.0], [-13.5, -26.0, -8.5]])
VECTOR_LENGTHS: dict[str, Any] = {
    "chosen_lengths": jnp.array([10.0, 20.0, 5.0]),
    "rejected_lengths": jnp.array([12.0, 18.0, 6.0]),
}
WON: dict[str, Any] = {"chosen_scores": jnp.full(3, 0.9), "rejected_scores": jnp.full(3, 0.2)}
ANSWERS = jnp.concatenate(VECTOR_LOGPS[:2]), jnp.concatenate(VECTOR_LOGPS[2:]), jnp.arange(6) < 3


# Means of numpy evaluations made apart from this project, on these three pairs, beta 0.1 where nothing else is said.
@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        (lambda x: o.robust_dpo(*x, label_smoothing=0.1), 0.6857475257482317),
        (lambda x: o.hinge(*x), 0.9833333333333333),
        (lambda x: o.sppo_hard(*x, beta=0.1), 49.583333333333336),
        (
            lambda x: o.sppo(*x, **WON, beta=0.1),
            12.458333333333334,
        ),
        (lambda x: o.simpo(x[0], x[1], beta=2.0, simpo_gamma=1.0, **VECTOR_LENGTHS), 1.385365853349744),
        (lambda x: o.cpo(x[0], x[1], cpo_alpha=0.0), 0.7310576337837436),
        (lambda x: o.orpo(x[0], x[1], chosen_nll=jnp.zeros(3), **VECTOR_LENGTHS), 0.07263736695072841),
        (lambda x: o.kto(*ANSWERS, 0.25), 0.4979128778528626),
        (lambda x: o.apo_zero(*x), 0.9958289993421029),
        (lambda x: o.bradley_terry(x[0] / 10, x[1] / 10), 0.7310576337837436),
    ],
    ids=["robust", "hinge", "sppo_hard", "sppo", "simpo", "cpo", "orpo", "kto", "apo_zero", "bradley_terry"],
)
def test_equals_the_vectors_of_the_reference(losses, expected):
    np.testing.assert_allclose(losses(tuple(VECTOR_LOGPS))[0].mean(), expected, rtol=1e-6)


RANKING = np.array([[1.5, 0.2, 0.9, -2.0], [300.0, -1e4, 1e4, 3.0], [0.1, 0.4, 7.0, 7.0]])
PRESENT = np.array([[True] * 4, [True] * 4, [True, True, False, False]])


def by_hand(ranking, count):
    """Plackett-Luce, and the mean over pairs of Bradley-Terry, of the first `count`."""
    ranking = np.asarray(ranking[:count], np.float64)
    luce = sum(np.logaddexp.reduce(ranking[i:]) - ranking[i] for i in range(count))
    pairs = [np.logaddexp(0, ranking[j] - ranking[i]) for i in range(count) for j in range(i + 1, count)]
    return luce, np.mean(pairs)


def test_rankings_by_hand():
    by_luce, by_pairs = zip(*(by_hand(r, count) for r, count in zip(RANKING, [4, 4, 2], strict=True)), strict=True)
    given = jnp.array(RANKING), jnp.array(PRESENT)
    (luce, _), (pairs, metrics) = (jax.jit(f)(*given) for f in (o.plackett_luce, o.ranked_pairs))
    np.testing.assert_allclose(luce, by_luce, rtol=1e-6)
    np.testing.assert_allclose(pairs, by_pairs, rtol=1e-6)
    last = {name: np.asarray(values)[2] for name, values in metrics.items()}
    known = {"accuracy": 0, "margin": -0.3, "mean_reward": 0.25, "min_reward": 0.1, "max_reward": 0.4}
    np.testing.assert_allclose([last[name] for name in known], list(known.values()), rtol=1e-6)
    np.testing.assert_allclose(metrics["accuracy"], [5 / 6, 3 / 6, 0], rtol=1e-6)
    for function in (o.plackett_luce, o.ranked_pairs):
        grads = jax.jit(jax.grad(lambda r, p, f=function: f(r, p)[0].sum()))(*given)
        np.testing.assert_array_equal(np.asarray(grads)[2, 2:], 0)
        # A reward counts only beside others: the gradients of a ranking add up to nothing.
        np.testing.assert_allclose(grads.sum(-1), 0, atol=1e-6)


def test_dft_weighs_each_token_by_its_probability():
    logps, mask = jnp.array([-1.5, -1e4, -0.25, jnp.nan]), jnp.array([True, True, True, False])
    losses, metrics = o.dft(logps, mask, entropy=jnp.ones(4))
    np.testing.assert_allclose(losses, [1.5 * np.exp(-1.5), 0, 0.25 * np.exp(-0.25), 0], rtol=1e-6)
    np.testing.assert_array_equal(metrics["entropy"], [1, 1, 1, 0])
    grads = jax.grad(lambda x: o.dft(x, mask)[0].sum())(logps)
    np.testing.assert_allclose(grads, [-np.exp(-1.5), 0, -np.exp(-0.25), 0], rtol=1e-6)
