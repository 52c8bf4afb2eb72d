"""Scan = unrolled, taps and layer inputs without effect on numbers, documents of a row apart."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.base.errors import UserError
from llm_jax.models.cache import Meta, Packed
from llm_jax.models.config import ModelConfig
from llm_jax.models.decoder import Decoder, Shared, layout, unstack
from llm_jax.models.init import init_params
from llm_jax.models.parameter import abstract_params, bind, declarations
from llm_jax.models.rope import Rope, rotation
from llm_jax.models.segments import regroup

CONFIG = ModelConfig(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=12,
    attention_bias=True,
    mlp_bias=True,
    init_std=0.2,
)
TOKENS = jax.random.randint(jax.random.key(1), (2, 16), 0, 61)
SEGMENTS = jnp.array([[1] * 5 + [2] * 8 + [3] * 2 + [0], [1] * 16])
POSITIONS = jnp.array([[*range(5), *range(8), *range(2), 0], [*range(16)]])


def drawn(decoder: Decoder) -> dict:
    """Initial values with norms and biases moved away from ones and zeros, equally under any grouping."""
    params = init_params(decoder, 0)
    return jax.tree.map(lambda x, y: x + 0.1 * jnp.cos(y) if x.ndim < 3 else x, params, init_params(decoder, 1))


@pytest.fixture(scope="module")
def decoder():
    return Decoder(CONFIG)


@pytest.fixture(scope="module")
def params(decoder):
    return drawn(decoder)


def loss_and_grads(decoder: Decoder, params: dict):
    def loss(params):
        bound = bind(decoder, params)
        hidden, _, _ = bound(TOKENS, POSITIONS, SEGMENTS)
        logps = jax.nn.log_softmax(bound.logits(hidden))
        return -jnp.take_along_axis(logps, TOKENS[..., None], -1).mean(), hidden

    (value, hidden), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return jax.tree.map(np.asarray, (value, hidden, grads))


@pytest.fixture(scope="module")
def expected(decoder, params):
    return loss_and_grads(decoder, params)


@pytest.mark.parametrize("grouping", ["unrolled", [2, 2], [1, 3]])
@pytest.mark.parametrize("remat", ["none", "full", "dots"])
def test_grouping_and_remat_change_no_bit(decoder, params, expected, grouping, remat):
    other = Decoder(CONFIG, segments=grouping, remat=remat)
    moved = regroup(jax.tree.map(np.asarray, params), layout(decoder), layout(other))
    value, hidden, grads = loss_and_grads(other, moved)
    grads = regroup(grads, layout(other), layout(decoder))
    jax.tree.map(np.testing.assert_array_equal, (value, hidden, grads), expected)


def forward(decoder, params, **options):
    return jax.jit(lambda params: bind(decoder, params)(TOKENS, POSITIONS, SEGMENTS, **options))(params)


def test_taps_change_no_bit(decoder, params, expected):
    hidden, _, aux = forward(decoder, params, taps=("hidden", "attention_out", "mlp_out"))
    np.testing.assert_array_equal(hidden, expected[1])
    assert {name: x.shape for name, x in aux["taps"].items()} == dict.fromkeys(aux["taps"], (4, 2, 16, 24))
    other = Decoder(CONFIG, segments=[1, 3])
    moved = regroup(params, layout(decoder), layout(other), jnp.stack)
    _, _, elsewhere = forward(other, moved, taps=("hidden", "attention_out", "mlp_out"))
    jax.tree.map(np.testing.assert_array_equal, elsewhere, aux)


def test_layer_inputs(decoder, params, expected):
    """Zeros change nothing; a vector at layer 2 shows in that layer's tap, and in none before."""
    hidden, _, _ = forward(decoder, params, layer_inputs={"residual": jnp.zeros((4, 24))})
    np.testing.assert_array_equal(hidden, expected[1])
    _, _, plain = forward(decoder, params, taps=("hidden",))
    steering = jnp.zeros((4, 24)).at[2].set(1.5)
    for grouping in ("scan", "unrolled", [3, 1]):
        other = Decoder(CONFIG, segments=grouping)
        moved = regroup(params, layout(decoder), layout(other), jnp.stack)
        _, _, steered = forward(other, moved, taps=("hidden",), layer_inputs={"residual": steering})
        np.testing.assert_array_equal(steered["taps"]["hidden"][:2], plain["taps"]["hidden"][:2])
        np.testing.assert_array_equal(steered["taps"]["hidden"][2], plain["taps"]["hidden"][2] + 1.5)
        assert (steered["taps"]["hidden"][3] != plain["taps"]["hidden"][3]).any()


def test_without_taps_and_layer_inputs_the_program_is_the_plain_one(decoder, params):
    """The compiled text is that of a decoder written down without either."""

    def plain(params):
        bound = bind(decoder, params)
        hidden = bound.embed(TOKENS)
        shared = Shared(Meta(POSITIONS, SEGMENTS), rotation(Rope.of(CONFIG), POSITIONS), None)

        def body(hidden, block):
            return block(hidden, shared, None, Packed(), ())[0], None

        return bound.norm(jax.lax.scan(body, hidden, bound.segments["0"]["0"])[0])

    def text(f):
        compiled = re.sub(r"metadata=\{[^}]*\}", "", str(jax.jit(f).lower(params).compile().as_text()))
        # After the program, tables of files, functions and stack frames follow. Names are numbered as they come.
        program = [line for line in compiled.split("\n") if " = " in line or line.startswith(("%", "ENTRY", "}"))]
        names: dict[str, str] = {}
        return [re.sub(r"%[\w.-]+", lambda m: names.setdefault(m[0], f"%{len(names)}"), line) for line in program]

    ours = text(lambda params: bind(decoder, params)(TOKENS, POSITIONS, SEGMENTS)[0])
    assert len(ours) > 100
    assert ours == text(plain)


def test_documents_of_a_row_do_not_see_each_other(decoder, params, expected):
    """Bit for bit, and as each document alone in a row (1e-5)."""
    changed = TOKENS.at[0, :5].set(3)
    hidden = jax.jit(lambda p: bind(decoder, p)(changed, POSITIONS, SEGMENTS)[0])(params)
    np.testing.assert_array_equal(hidden[0, 5:15], expected[1][0, 5:15])
    alone = jax.jit(lambda p: bind(decoder, p)(TOKENS[:1, 5:13])[0])(params)
    np.testing.assert_allclose(alone[0], expected[1][0, 5:13], atol=1e-5)


def test_parameters_follow_the_weights_dtype(decoder, params):
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    hidden, _, _ = forward(decoder, low)
    assert hidden.dtype == jnp.bfloat16
    assert jax.eval_shape(lambda p, h: bind(decoder, p).logits(h), low, hidden).dtype == jnp.float32


def test_declarations(decoder):
    declared, shapes = declarations(decoder), abstract_params(decoder)
    q = declared["segments"]["0"]["0"]["attention"]["q"]
    assert q["weight"].axes == ("layers", "embed", "heads") and q["weight"].matrix == ((1,), (2,))
    assert q["bias"].axes == ("layers", "heads") and q["bias"].matrix is None and not q["bias"].decay
    assert declared["embed"]["weight"].axes == ("vocab", "embed") and declared["embed"]["weight"].decay
    jax.tree.map(lambda d, s: len(d.axes) == len(s.shape) or pytest.fail(str(d)), declared, shapes)
    assert shapes["head"]["weight"].shape == (24, 61)
    tied = abstract_params(Decoder(dataclasses.replace(CONFIG, tie_embeddings=True)))
    assert tied.keys() == {"embed", "segments", "norm"}


def test_unstack_is_the_unrolled_layout(decoder, params):
    unrolled = Decoder(CONFIG, segments="unrolled")
    jax.tree.map(np.testing.assert_array_equal, unstack(params, decoder), drawn(unrolled))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d, p: Decoder(CONFIG, remat="some"), "remat 'some' is not one of none, full, dots"),  # type: ignore[arg-type]
        (lambda d, p: Decoder(dataclasses.replace(CONFIG, num_kv_heads=3)), "num_kv_heads=3 does not divide"),
        (lambda d, p: Decoder(dataclasses.replace(CONFIG, head_dim=5)), "head_dim is 5"),
        (lambda d, p: Decoder(dataclasses.replace(CONFIG, vocab_size=None)), "vocab_size is None"),
        (lambda d, p: bind(d, p)(TOKENS, taps=("logits",)), "'logits' is neither a tap"),
        (lambda d, p: bind(d, p)(TOKENS, layer_inputs={"prefix": TOKENS}), "'prefix' is neither"),
        (lambda d, p: bind(d, {**p, "extra": p["norm"]}), "extra/weight is not one of the model"),
        (lambda d, p: bind(d, {k: v for k, v in p.items() if k != "norm"}), "norm/weight is missing"),
        (lambda d, p: bind(d, {**p, "norm": {"weight": TOKENS}}), r"norm/weight has shape \(2, 16\)"),
    ],
)
def test_errors(decoder, params, call, message):
    with pytest.raises(UserError, match=message):
        call(decoder, params)
