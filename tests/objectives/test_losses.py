"""The losses against numbers that others produced: numpy float64 evaluations of the papers' equations, closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chex import assert_trees_all_close

from llm_jax.base.errors import UserError
from llm_jax.objectives import dpo, ipo, sft

CHOSEN, REJECTED = jnp.array([-12.0, -30.0, -7.5]), jnp.array([-14.0, -25.0, -9.0])
REF_CHOSEN, REF_REJECTED = jnp.array([-13.0, -29.0, -8.0]), jnp.array([-13.5, -26.0, -8.5])
CHOSEN_LENGTHS, REJECTED_LENGTHS = jnp.array([10, 20, 5]), jnp.array([12, 18, 6])
LOGPS = (CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED)


# Means of numpy float64 evaluations of the equations, made apart from this code, on the inputs above with beta 0.1.
@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        (lambda: dpo(*LOGPS, beta=0.1)[0], 0.6878308590815649),
        (lambda: dpo(*LOGPS, beta=0.1, label_smoothing=0.1)[0], 0.6894975257482315),
        (lambda: ipo(*LOGPS, 0.1, True, CHOSEN_LENGTHS, REJECTED_LENGTHS)[0], 24.290126028806583),
        (lambda: ipo(*LOGPS, beta=0.1, length_normalized=False)[0], 25.75),
    ],
    ids=["dpo", "dpo smoothed", "ipo", "ipo of sums"],
)
def test_equals_the_equation_in_float64(losses, expected):
    values = losses()
    assert values.shape == (3,) and values.dtype == jnp.float32
    np.testing.assert_allclose(values.mean(), expected, rtol=1e-6)


def test_dpo_at_the_reference_is_log_two_with_gradient_half_beta():
    # Eq. 7 at d = 0: -log σ(0) = ln 2; its derivative by log π(y_w) is -β σ(-β d) = -β / 2 (below eq. 7).
    loss, grads = jax.value_and_grad(
        lambda w, l: dpo(w, l, REF_CHOSEN, REF_REJECTED, beta=0.3)[0].sum(), argnums=(0, 1)
    )(REF_CHOSEN, REF_REJECTED)
    np.testing.assert_allclose(loss, 3 * np.log(2), rtol=1e-6)
    assert_trees_all_close(grads, (jnp.full(3, -0.15), jnp.full(3, 0.15)), rtol=1e-6)


def test_label_smoothing_is_the_expectation_over_flipped_labels():
    flipped = (REJECTED, CHOSEN, REF_REJECTED, REF_CHOSEN)
    expected = 0.8 * dpo(*LOGPS, beta=0.5)[0] + 0.2 * dpo(*flipped, beta=0.5)[0]
    assert_trees_all_close(dpo(*LOGPS, beta=0.5, label_smoothing=0.2)[0], expected, rtol=1e-6)


def test_no_gradient_reaches_the_reference_or_the_metrics():
    for loss in (lambda *a: dpo(*a, label_smoothing=0.1), lambda *a: ipo(*a, length_normalized=False)):
        grads = jax.grad(lambda *a, f=loss: f(*a)[0].sum(), argnums=(2, 3))(*LOGPS)
        assert_trees_all_close(grads, (jnp.zeros(3), jnp.zeros(3)), atol=0)
        grads = jax.grad(lambda *a, f=loss: sum(m.sum() for m in f(*a)[1].values()), argnums=(0, 1))(*LOGPS)
        assert_trees_all_close(grads, (jnp.zeros(3), jnp.zeros(3)), atol=0)


def test_preference_metrics_by_hand():
    metrics = dpo(*LOGPS, beta=0.1)[1]
    np.testing.assert_allclose(metrics["rewards/chosen"], [0.1, -0.1, 0.05], rtol=1e-6)
    np.testing.assert_allclose(metrics["rewards/rejected"], [-0.05, 0.1, -0.05], rtol=1e-6)
    np.testing.assert_allclose(metrics["rewards/margins"], [0.15, -0.2, 0.1], rtol=1e-6)
    np.testing.assert_array_equal(metrics["rewards/accuracies"], [1, 0, 1])
    np.testing.assert_array_equal(metrics["logps/chosen"], CHOSEN)
    np.testing.assert_array_equal(metrics["logps/rejected"], REJECTED)
    tie = dpo(CHOSEN, CHOSEN, CHOSEN, CHOSEN)[1]
    np.testing.assert_array_equal(tie["rewards/accuracies"], [0, 0, 0])


def test_large_differences_stay_finite():
    values, grads = jax.value_and_grad(lambda d: dpo(d, -d, jnp.zeros(2), jnp.zeros(2), beta=1.0)[0].sum())(
        jnp.array([-1e4, 1e4])
    )
    np.testing.assert_allclose(values, 2e4)
    np.testing.assert_allclose(grads, [-2.0, 0.0])


def test_sft_is_zero_where_masked_whatever_is_there():
    logps, mask = jnp.array([-1.5, jnp.nan, -0.25]), jnp.array([True, False, True])
    losses, metrics = sft(logps, mask, entropy=jnp.array([0.5, jnp.nan, 2.0]), is_top1=jnp.array([True, True, False]))
    np.testing.assert_array_equal(losses, [1.5, 0.0, 0.25])
    np.testing.assert_array_equal(metrics["entropy"], [0.5, 0.0, 2.0])
    np.testing.assert_array_equal(metrics["mean_token_accuracy"], [1.0, 0.0, 0.0])
    np.testing.assert_array_equal(jax.grad(lambda x: sft(x, mask)[0].sum())(logps), [-1.0, 0.0, -1.0])
    assert sft(logps, mask)[1] == {}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dpo(*LOGPS, beta=0.0), "dpo: beta"),
        (lambda: dpo(*LOGPS, label_smoothing=0.6), "dpo: label_smoothing"),
        (lambda: ipo(*LOGPS, beta=-1.0, length_normalized=False), "ipo: beta"),
        (lambda: ipo(*LOGPS), "ipo: length_normalized=True needs chosen_lengths"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_the_package_gives_functions_even_after_its_modules_are_imported():
    import llm_jax.objectives.preference.dpo
    import llm_jax.objectives.tokens

    assert callable(llm_jax.objectives.dpo) and callable(llm_jax.objectives.sft)
