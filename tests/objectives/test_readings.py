"""Where implementations disagree: both readings, each against its own closed form, and identities between losses."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chex import assert_trees_all_close

from llm_jax import objectives as o
from llm_jax.base.errors import UserError
from llm_jax.objectives.preference.named import LOSSES

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "trl" / "losses.npz"
RNG = np.random.default_rng(3)
C, R, RC, RR = (jnp.array(-RNG.uniform(5, 40, 7)) for _ in range(4))
LOGPS: Any = (C, R, RC, RR)
CHOSEN_LENGTHS, REJECTED_LENGTHS = jnp.array(RNG.integers(2, 20, 7)), jnp.array(RNG.integers(2, 20, 7))
LENGTHS: Any = {"chosen_lengths": CHOSEN_LENGTHS, "rejected_lengths": REJECTED_LENGTHS}


def f64(x) -> np.ndarray:
    return np.asarray(x, np.float64)


def log_sigmoid(x):
    return -np.logaddexp(0, -f64(x))


D = f64((C - RC) - (R - RR))


def close(ours, expected):
    np.testing.assert_allclose(ours, expected, rtol=2e-6)


def test_label_smoothing_of_sigmoid():
    """The paper's cDPO uses it; TRL's `sigmoid` does not (`losses.npz` holds TRL's numbers with it set)."""
    golden = np.load(GOLDEN)
    logps: Any = jnp.concatenate([golden["random/logps"], golden["random/ref_logps"]])
    close(o.dpo(*logps)[0], golden["sigmoid_smoothed|random|values"])
    close(o.dpo(*LOGPS, label_smoothing=0.2)[0], -0.8 * log_sigmoid(0.1 * D) - 0.2 * log_sigmoid(-0.1 * D))


def test_ipo_of_sums_and_of_means():
    means = f64((C - RC) / CHOSEN_LENGTHS) - f64((R - RR) / REJECTED_LENGTHS)
    close(o.ipo(*LOGPS, beta=0.1, **LENGTHS)[0], (means - 5) ** 2)
    close(o.ipo(*LOGPS, beta=0.1, length_normalized=False)[0], (D - 5) ** 2)


def test_the_alpha_of_the_f_divergence_paper_and_of_trl():
    r = np.exp(f64(C - RC))
    close(o.f_divergence(C - RC, "alpha", 0.3), (1 - r**-0.3) / 0.3)
    close(o.f_divergence(C - RC, "alpha_divergence", 0.3), (r**-0.7 - 1) / -0.7)
    # They meet at one half, and swap ends: the paper's 0 is reverse KL and its 1 forward KL.
    assert_trees_all_close(o.f_divergence(C - RC, "alpha"), o.f_divergence(C - RC, "alpha_divergence"), rtol=1e-6)
    np.testing.assert_array_equal(o.f_divergence(C - RC, "alpha", 0.0), C - RC)
    np.testing.assert_array_equal(o.f_divergence(C - RC, "alpha_divergence", 1.0), C - RC)
    close(o.f_divergence(C - RC, "alpha", 1.0), 1 - 1 / r)
    close(o.f_divergence(C - RC, "alpha_divergence", 0.0), 1 - 1 / r)
    assert_trees_all_close(o.f_divergence(C - RC, "js"), o.f_divergence(C - RC, "js_divergence"))


def test_bco_with_its_shift_and_without():
    """The paper's δ, and TRL's `bco_pair`, which has none."""
    w, l = 0.1 * f64(C - RC), 0.1 * f64(R - RR)
    delta = (w.mean() + l.mean()) / 2
    close(o.bco(*LOGPS)[0], -log_sigmoid(w - delta) - log_sigmoid(delta - l))
    close(o.bco(*LOGPS, **LOSSES["bco_pair"].fixed)[0], -log_sigmoid(w) - log_sigmoid(-l))


def test_sppo_as_a_mean_and_as_a_sum_over_answers():
    """The authors' ½ stands in front of `sppo`; TRL's `sppo_hard` has none."""
    ones, zeros = jnp.ones(7), jnp.zeros(7)
    soft = o.sppo(*LOGPS, chosen_scores=ones, rejected_scores=zeros, beta=0.1)[0]
    assert_trees_all_close(soft, o.sppo_hard(*LOGPS, beta=0.1, halved=True)[0])
    close(soft, o.sppo_hard(*LOGPS, beta=0.1)[0] / 2)
    close(o.sppo_hard(*LOGPS, beta=0.1)[0], f64(C - RC - 5) ** 2 + f64(R - RR + 5) ** 2)


def test_simpo_gamma_and_the_authors_ratio():
    """The paper's and TRL's γ is a margin of rewards; the authors' code writes it as a share of β."""
    beta, ratio = 2.5, 0.55
    means = f64(C / CHOSEN_LENGTHS) - f64(R / REJECTED_LENGTHS)
    close(o.simpo(C, R, beta, simpo_gamma=ratio * beta, **LENGTHS)[0], -log_sigmoid(beta * (means - ratio)))


def test_likelihood_of_the_chosen_answer_by_pair_and_by_token():
    """CPO's equation sums it, TRL divides by the tokens of all chosen answers, RPO by each answer's own."""
    n, tokens = 7, f64(CHOSEN_LENGTHS).sum()
    shares = o.nll_shares(-C, jnp.float32(tokens), jnp.float32(n))
    close(shares.mean(), -f64(C).sum() / tokens)
    contrast = -log_sigmoid(0.1 * f64(C - R))
    close(o.cpo(C, R)[0], contrast - f64(C))
    close(o.cpo(C, R, chosen_nll=shares)[0].mean(), contrast.mean() - f64(C).sum() / tokens)
    close(o.sft_pair(C, R, shares)[0].mean(), -f64(C).sum() / tokens)
    rpo = o.rpo(*LOGPS, rpo_alpha=0.5, chosen_lengths=CHOSEN_LENGTHS)[0]
    close(rpo, -log_sigmoid(0.1 * D) - 0.5 * f64(C / CHOSEN_LENGTHS))


def test_orpo_over_the_answer_and_over_prompt_and_answer():
    ratio = o.orpo(C, R, **LENGTHS, chosen_nll=jnp.zeros(7))[0]
    close(o.orpo(C, R, **LENGTHS)[0], ratio - C / CHOSEN_LENGTHS)
    shares = jnp.linspace(1.0, 2.0, 7)
    close(o.orpo(C, R, **LENGTHS, chosen_nll=shares)[0], ratio + shares)


def test_orpo_of_a_certain_answer_is_finite():
    one = jnp.ones(2)
    both = jnp.array([0.0, -3.0])

    def loss(x):
        return o.orpo(x, x[::-1], chosen_lengths=one, rejected_lengths=one)[0].sum()

    value, grads = jax.value_and_grad(loss)(both)
    assert np.isfinite(value) and np.isfinite(grads).all()


def test_kto_reference_point_of_all_and_of_nonzero_examples():
    """TRL's mean counts every example; HALOs' those whose log-ratio is not 0."""
    ratios, zeros = jnp.array([3.0, 0.0, 2.0, 0.0, 50.0]), jnp.zeros(5)
    present = jnp.array([True, True, True, True, False])
    close(o.kto_kl(ratios, zeros, present), 5 / 4)
    close(o.kto_kl(ratios, zeros, present, nonzero_only=True), 5 / 2)
    assert o.kto_kl(zeros, ratios) == 0 and o.kto_kl(zeros, zeros, nonzero_only=True) == 0
    assert (jax.grad(lambda x: o.kto_kl(x, zeros))(ratios) == 0).all()


def test_ld_dpo_of_the_policy_alone_and_of_both():
    """TRL scales the reference's tail too; LLaMA-Factory leaves it whole. The caller chooses what to transform."""
    tokens, positions = jnp.array([-1.0, -2.0, -4.0, -8.0]), jnp.arange(4)
    shared = jnp.full(4, 3)
    np.testing.assert_array_equal(o.ld_dpo(tokens, positions, shared, 0.25), [-1, -2, -4, -2])
    np.testing.assert_array_equal(o.ld_dpo(tokens, positions, shared, 1.0), tokens)
    np.testing.assert_array_equal(o.ld_dpo(tokens, positions, shared, 0.0), [-1, -2, -4, 0])


def test_discopop_where_trl_is_nan():
    """At β d = -1000 TRL computes inf · 0; the product's limit is 0, and the loss its logistic part, 1000."""
    golden = np.load(GOLDEN)["discopop|extreme|values"]
    zero = jnp.zeros(1)
    value, grad = jax.value_and_grad(lambda x: o.discopop(x, zero, zero, zero)[0].sum())(jnp.array([-1e4]))
    assert np.isnan(golden[1])
    close(value, 1000.0)
    close(grad, -0.1)


def test_dpo_positive_holds_the_chosen_answer():
    assert_trees_all_close(o.dpop(*LOGPS, dpop_lambda=0.0)[0], o.dpo(*LOGPS)[0], rtol=1e-6)
    above: Any = (RC + 1, R, RC, RR)
    assert_trees_all_close(o.dpop(*above)[0], o.dpo(*above)[0], rtol=1e-6)
    # Below the reference, raising the chosen answer's likelihood is worth 1 + λ times as much as lowering the other's.
    grads = jax.grad(lambda c, r: o.dpop(c, r, RC, RR, 0.1, 4.0)[0].sum(), (0, 1))(RC - 0.1, RR)
    close(grads[0], -5 * grads[1])


def test_robust_dpo_is_unbiased():
    flipped: Any = (R, C, RR, RC)
    mean = 0.8 * o.robust_dpo(*LOGPS, label_smoothing=0.2)[0] + 0.2 * o.robust_dpo(*flipped, label_smoothing=0.2)[0]
    np.testing.assert_allclose(mean, o.dpo(*LOGPS)[0], rtol=1e-5)


def test_exo_is_least_where_the_policy_agrees_with_the_label():
    eps = 0.1
    best = jnp.array([np.log((1 - eps) / eps) / 0.1])
    value, grad = jax.value_and_grad(lambda x: o.exo(x, x * 0, x * 0, x * 0, 0.1, eps)[0].sum())(best)
    np.testing.assert_allclose([value, grad[0]], [0, 0], atol=1e-7)


def test_losses_that_are_others_in_a_limit():
    assert_trees_all_close(o.spin(*LOGPS)[0], o.dpo(*LOGPS)[0])
    lengths = {name: jnp.ones(7) for name in LENGTHS}
    assert_trees_all_close(o.sigmoid_norm(*LOGPS, **lengths)[0], o.dpo(*LOGPS)[0])
    assert_trees_all_close(o.alpha_po(C, R, alpha=0.0, **LENGTHS)[0], o.simpo(C, R, **LENGTHS)[0])
    one: Any = tuple(x[:1] for x in LOGPS)
    for loss in (o.aot, o.aot_unpaired):
        assert_trees_all_close(loss(*one)[0], o.dpo(*one)[0], rtol=1e-6)
    both = jnp.stack([C, R], -1)
    for loss in (o.plackett_luce, o.ranked_pairs):
        assert_trees_all_close(loss(both)[0], o.bradley_terry(C, R)[0], rtol=1e-6)
    labels = jnp.array([True, False] * 3 + [True])
    halves = o.apo_zero_unpaired(C, RC, labels)[0], o.apo_zero_unpaired(R, RR, ~labels)[0]
    assert_trees_all_close(jnp.where(labels, sum(halves), 0), jnp.where(labels, o.apo_zero(*LOGPS)[0], 0), rtol=1e-5)


def test_every_loss_with_a_reference_at_the_reference():
    """Policy = reference: ln 2 and zero rewards for DPO, and no loss sees more of the answers than their lengths."""
    for name, named in LOSSES.items():
        if named.unpaired or not named.reference or named.scores:
            continue
        passed = dict(named.fixed)
        passed |= {key: jnp.full(7, 4.0) for key in named.lengths}
        losses, metrics = getattr(o, named.function)(RC, RR, RC, RR, **passed)
        assert (metrics["rewards/margins"] == 0).all() and (metrics["rewards/accuracies"] == 0).all(), name
        if name != "rpo":
            np.testing.assert_allclose(losses, losses[0], rtol=1e-6, err_msg=name)
    close(o.dpo(RC, RR, RC, RR)[0], np.log(2))


def test_wpo_weighs_a_uniform_policy_by_one():
    uniform = -np.log(50.0)
    sums = jnp.array([uniform * 6]), jnp.array([uniform * 3])
    lengths = jnp.array([6]), jnp.array([3])
    close(o.wpo(*sums, *sums, *lengths), 1.0)
    assert (jax.grad(lambda x: o.wpo(x, sums[1], *sums, *lengths).sum())(sums[0]) == 0).all()


def test_bradley_terry_with_its_margin_inside_and_centring():
    r, l = f64(C) / 10, f64(R) / 10
    ours, metrics = o.bradley_terry(C / 10, R / 10, jnp.float32(0.5) * jnp.ones(7), 0.01)
    close(ours, -log_sigmoid(r - l - 0.5) + 0.01 * (r + l) ** 2)
    close(metrics["accuracy"], r > l)
    close(metrics["mean_reward"], (r + l) / 2)
    close(metrics["max_reward"] - metrics["min_reward"], np.abs(r - l))


def test_metrics_of_single_answers_keep_to_their_label():
    labels = jnp.array([True, False, True, False, False, True, True])
    losses, metrics = o.kto(C, RC, labels, 0.5)
    assert losses.shape == (7,)
    np.testing.assert_allclose(metrics["rewards/chosen"], np.where(labels, 0.1 * (C - RC), 0), rtol=1e-6)
    np.testing.assert_allclose(metrics["rewards/rejected"], np.where(labels, 0, 0.1 * (C - RC)), rtol=1e-6)
    np.testing.assert_array_equal(metrics["logps/chosen"], np.where(labels, C, 0))
    np.testing.assert_array_equal(metrics["kl"], np.full(7, 0.5, np.float32))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: o.robust_dpo(*LOGPS, label_smoothing=0.5), "robust_dpo: label_smoothing"),
        (lambda: o.exo(*LOGPS, label_smoothing=0.0), "exo: label_smoothing"),
        (lambda: o.exo(*LOGPS, label_smoothing=0.6), "exo: label_smoothing"),
        (lambda: o.aot(*LOGPS, label_smoothing=-0.1), "aot: label_smoothing"),
        (lambda: o.discopop(*LOGPS, discopop_tau=0.0), "discopop: discopop_tau"),
        (lambda: o.dpop(*LOGPS, dpop_lambda=-1.0), "dpop: dpop_lambda"),
        (lambda: o.simpo(C, R), "simpo needs chosen_lengths and rejected_lengths"),
        (lambda: o.orpo(C, R), "orpo needs chosen_lengths"),
        (lambda: o.sigmoid_norm(*LOGPS), "sigmoid_norm needs chosen_lengths"),
        (lambda: o.rpo(*LOGPS), "rpo needs chosen_lengths"),
        (lambda: o.wpo(*LOGPS), "wpo needs chosen_lengths"),
        (lambda: o.ld_dpo(C, jnp.arange(7), jnp.arange(7), 1.5), "ld_dpo: ld_alpha"),
        (lambda: o.dpo(*LOGPS, f_divergence_type="kl"), "unknown f_divergence_type 'kl'; known: reverse_kl"),  # type: ignore
        (lambda: o.kto(C, RC, C > 0, 0.0, beta=0.0), "kto: beta"),
        (lambda: o.bco_unpaired(C, RC, C > 0, 0.0, beta=-1.0), "bco_unpaired: beta"),
        (lambda: o.apo_zero_unpaired(C, RC, C > 0, beta=0.0), "apo_zero_unpaired: beta"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(UserError, match=message):
        call()


@pytest.mark.parametrize("name", LOSSES)
def test_beta_must_be_positive(name):
    named = LOSSES[name]
    if not named.has_beta or named.unpaired:
        return
    passed = {key: LENGTHS[key] for key in named.lengths} | named.fixed
    passed |= {"chosen_scores": C, "rejected_scores": R} if named.scores else {}
    with pytest.raises(UserError, match="beta must be greater than 0"):
        getattr(o, named.function)(*(LOGPS if named.reference else (C, R)), **passed, beta=0.0)
