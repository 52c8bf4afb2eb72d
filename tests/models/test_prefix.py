"""Prefix language models: attention against JAX's own under an explicit mask, what each token of a model sees, and
prompts in caches."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.base.errors import UserError
from llm_jax.inference import decode_step, decoding_decoder, extend, prefill
from llm_jax.models import Meta, ModelConfig, Packed, bind, init_caches, init_params, unstack
from llm_jax.models.decoder import Decoder
from llm_jax.models.latent_config import LatentConfig
from llm_jax.models.mamba_config import MambaConfig
from llm_jax.models.prefix import sight_ends
from llm_jax.sharding import MeshConfig, make_plan, use

CONFIG = ModelConfig(
    family="llm_jax",
    vocab_size=32,
    hidden_size=24,
    intermediate_size=20,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    window=6,
    sights=("sliding", "full"),
    init_std=0.3,
)
DECODER = Decoder(CONFIG)
PARAMS = init_params(DECODER, 0)
TOKENS = jnp.array(np.random.default_rng(0).integers(0, 32, (2, 20)), jnp.int32)
SEGMENTS = jnp.array([[1] * 8 + [0] + [2] * 10 + [0], [1] * 20])
POSITIONS = jnp.array([[*range(8), 0, *range(10), 0], [*range(20)]])
PREFIX = jnp.array([[1] * 5 + [0] * 4 + [1] * 3 + [0] * 8, [0] * 20], bool)


def run(tokens, *, params=PARAMS, decoder=DECODER, plan=None, **options):
    with use(plan):
        return jax.jit(lambda p, t: bind(decoder, p)(t, **options)[0])(params, tokens)


@pytest.mark.parametrize("window", [None, 4])
def test_equals_jax_under_the_mask(window):
    rng = np.random.default_rng(1)
    q, k, v = (jnp.array(rng.standard_normal((2, 20, n, 8)), jnp.float32) for n in (4, 2, 2))
    i, j = np.arange(20)[:, None], np.arange(20)
    seen = np.zeros((2, 1, 20, 20), bool)
    for row, start, stop, length in ((0, 0, 8, 5), (0, 9, 19, 3), (1, 0, 20, 0)):
        inside = (i >= start) & (i < stop) & (j >= start) & (j < stop)
        near = np.abs(i - j) < (window or 20)
        seen[row, 0] |= inside & near & ((j <= i) | (j < start + length) & (i < start + length))
    packed = Packed(window, ends=sight_ends(PREFIX, SEGMENTS))
    ours, _ = packed.attend(q, k, v, Meta(POSITIONS, SEGMENTS))
    theirs = jax.nn.dot_product_attention(q, k, v, mask=jnp.array(seen), implementation="xla")
    real = np.asarray(SEGMENTS > 0)
    np.testing.assert_allclose(ours[real], theirs[real], atol=1e-5)


def test_all_or_nothing():
    """No prefix is the causal model, a prefix of all tokens the encoder of the same weights."""
    where: Any = {"positions": POSITIONS, "segment_ids": SEGMENTS}
    real = np.asarray(SEGMENTS > 0)
    nothing = run(TOKENS, prefix=jnp.zeros_like(PREFIX), **where)
    np.testing.assert_allclose(nothing[real], run(TOKENS, **where)[real], atol=1e-5)
    everything = run(TOKENS, prefix=jnp.ones_like(PREFIX), **where)
    encoder = run(TOKENS, decoder=Decoder(dataclasses.replace(CONFIG, causal=False)), **where)
    np.testing.assert_allclose(everything[real], encoder[real], atol=1e-5)


def test_packed_alone_and_on_a_mesh():
    packed = run(TOKENS, prefix=PREFIX, positions=POSITIONS, segment_ids=SEGMENTS)
    for start, stop in ((0, 8), (9, 19)):
        alone = run(TOKENS[:1, start:stop], prefix=PREFIX[:1, start:stop])
        np.testing.assert_allclose(packed[0, start:stop], alone[0], atol=1e-5)
    plan = make_plan(MeshConfig(data=2, tensor=2))
    sharded = run(TOKENS, plan=plan, prefix=PREFIX, positions=POSITIONS, segment_ids=SEGMENTS)
    real = np.asarray(SEGMENTS > 0)
    np.testing.assert_allclose(sharded[real], packed[real], atol=1e-5)


LATENT = {
    "head_dim": 4,
    "num_kv_heads": 4,
    "window": None,
    "sights": None,
    "latent": LatentConfig(kv_rank=10, q_rank=8, nope_dim=6, rope_dim=4, value_dim=5),
}
LENGTHS, PREFIXES, STEPS = np.array([9, 3, 12]), np.array([7, 3, 12]), 5


@pytest.mark.parametrize(
    "change",
    [{"num_layers": 3, "sights": ("sliding", "full", "chunked"), "chunk": 8}, {"positions": "alibi"}, LATENT],
    ids=["sights", "alibi", "latent"],
)
def test_cached_equals_the_full_forward(change):
    """Ragged prompts of which the first tokens are a prefix, the whole one of two; then token by token; and the same
    where more of what follows on the prefix comes in a second call. Windows and chunks are shorter than a prefix."""
    decoder = Decoder(dataclasses.replace(CONFIG, **change))
    params, unrolled = init_params(decoder, 0), decoding_decoder(decoder.config)
    unstacked, rows = unstack(params, decoder), np.arange(3)
    tokens = np.random.default_rng(2).integers(0, 32, (3, 17)).astype(np.int32)
    within = jnp.arange(17) < PREFIXES[:, None]
    bound = bind(decoder, params)
    full = np.asarray(jax.jit(lambda t: bound.logits(bound(t, prefix=within)[0]))(tokens))

    def close(logits, lengths):
        np.testing.assert_allclose(logits, full[rows, lengths - 1], atol=1e-5 * max(1.0, np.abs(full).max()))

    # The prompts' ends are filled with tokens that would show if they were seen.
    empty = init_caches(decoder.config, 3, 17)
    logits, caches = prefill(unrolled, unstacked, empty, tokens[:, :12], LENGTHS, prefix=PREFIXES)
    close(logits, LENGTHS)
    for lengths in LENGTHS + np.arange(STEPS)[:, None]:
        logits, caches = decode_step(unrolled, unstacked, caches, tokens[rows, lengths], lengths)
        close(logits, lengths + 1)
    empty = init_caches(decoder.config, 3, 17)
    _, caches = prefill(unrolled, unstacked, empty, tokens[:, :12], PREFIXES, prefix=PREFIXES)
    rest = np.take_along_axis(tokens, PREFIXES[:, None] + np.arange(STEPS), axis=1)
    logits, _ = extend(unrolled, unstacked, caches, rest, PREFIXES, np.full(3, STEPS))
    close(logits, PREFIXES + STEPS)


def test_refused():
    with pytest.raises(UserError, match=r"a prefix has to come whole in the first call over caches \(prefill\)"):
        run(TOKENS, prefix=PREFIX, caches=init_caches(CONFIG, 2, 20), meta=Meta(POSITIONS))
    mamba = MambaConfig(inner_size=48, state_size=4, dt_rank=2)
    for change in ({"causal": False}, {"mixers": ("mamba", "attention"), "mamba": mamba}):
        decoder = Decoder(dataclasses.replace(CONFIG, **change))
        with pytest.raises(UserError, match="a prefix is for causal attention in all layers"):
            run(TOKENS, prefix=PREFIX, decoder=decoder, params=init_params(decoder, 0))
