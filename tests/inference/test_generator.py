"""Batches, buckets, seeds, samples, stops; and that nothing is compiled after warm-up."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.base.errors import RunError, UserError
from llm_jax.inference import Completion, Generator, SamplingParams
from llm_jax.inference import batch as batch_module
from llm_jax.inference import decode as decode_module
from llm_jax.inference.generator import default_buckets
from llm_jax.models.config import ModelConfig
from llm_jax.models.decoder import Decoder
from llm_jax.models.init import init_params
from llm_jax.models.loading import Model
from llm_jax.models.mamba_config import MambaConfig
from llm_jax.models.parameter import bind, declarations
from llm_jax.sharding import make_plan, storage_shardings
from llm_jax.sharding.config import MeshConfig

GREEDY = SamplingParams(max_tokens=12, temperature=0.0)
DRAWN = SamplingParams(max_tokens=12, temperature=1.2, top_p=0.95, min_p=0.01, repetition_penalty=1.1, ignore_eos=True)


def make_prompts(count: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(5, 280, rng.integers(1, 31)).tolist() for _ in range(count)]


PROMPTS = make_prompts(7)


@pytest.fixture(scope="module")
def generator(tiny) -> Generator:
    return Generator(tiny, tiny.tokenizer, max_batch=8, buckets=(32, 64), chunk=5)


@pytest.fixture(scope="module")
def mixed() -> list[SamplingParams]:
    """Greedy and sampled requests side by side, each with its own seed and parameters."""
    return [dataclasses.replace(DRAWN if i % 2 else GREEDY, seed=i, top_k=i * 3) for i in range(7)]


@pytest.fixture(scope="module")
def together(generator, mixed) -> list[Completion]:
    return generator.generate(PROMPTS, mixed)


def test_ragged_batch_equals_each_alone(generator, mixed, together):
    for i, expected in enumerate(together):
        (alone,) = generator.generate([PROMPTS[i]], mixed[i])
        assert alone.tokens == expected.tokens
        assert alone.text == expected.text
        np.testing.assert_allclose(alone.logprobs, expected.logprobs, atol=1e-5)


def test_batch_bucket_and_neighbours_change_no_token(tiny, generator, mixed, together):
    other = Generator(tiny, tiny.tokenizer, max_batch=3, buckets=(48, 96), chunk=7)
    order = [4, 0, 6, 2, 5, 1, 3]
    shuffled = other.generate([PROMPTS[i] for i in order], [mixed[i] for i in order])
    assert [c.tokens for c in shuffled] == [together[i].tokens for i in order]
    assert [c.prompt for c in shuffled] == list(range(7))


def test_greedy_is_the_full_forwards_argmax(tiny, generator):
    prompt = PROMPTS[2]
    (out,) = generator.generate([prompt], dataclasses.replace(GREEDY, ignore_eos=True))
    sequence = jnp.asarray([prompt + out.tokens])
    bound = bind(tiny.decoder, tiny.params)
    logits = bound.logits(bound(sequence)[0])[0, len(prompt) - 1 : -1]
    np.testing.assert_array_equal(jnp.argmax(logits, axis=-1), out.tokens)
    expected = jax.nn.log_softmax(logits)[np.arange(12), np.asarray(out.tokens)]
    np.testing.assert_allclose(out.logprobs, expected, atol=1e-5)
    assert out.finish_reason == "length"


def test_seed_decides_and_samples_are_a_function_of_their_number(generator):
    def tokens(**changes):
        return [c.tokens for c in generator.generate([PROMPTS[0]], dataclasses.replace(DRAWN, **changes))]

    five = tokens(n=5)
    assert len({tuple(t) for t in five}) == 5
    assert tokens(n=3) == five[:3]
    assert tokens() == five[:1]
    assert tokens(seed=1) != five[:1]
    numbered = generator.generate(PROMPTS[:2], dataclasses.replace(DRAWN, n=2))
    assert [(c.prompt, c.sample) for c in numbered] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_stream_adds_up_to_generate(generator, mixed, together):
    text, tokens, reasons = [""] * 7, [[] for _ in range(7)], {}
    for delta in generator.stream(PROMPTS, mixed, every=2):
        assert delta.prompt not in reasons
        text[delta.prompt] += delta.text
        tokens[delta.prompt] += delta.tokens
        if delta.finish_reason is not None:
            reasons[delta.prompt] = delta.finish_reason
    assert text == [c.text for c in together]
    assert tokens == [c.tokens for c in together]
    assert reasons == {c.prompt: c.finish_reason for c in together}


def test_stop_string_across_chunk_borders(tiny, generator):
    (whole,) = generator.generate([PROMPTS[3]], DRAWN)
    for at in range(1, len(whole.text) - 3):
        stop = whole.text[at : at + 3]
        if "\ufffd" in stop:
            continue
        (cut,) = generator.generate([PROMPTS[3]], dataclasses.replace(DRAWN, stop=(stop,)))
        assert cut.finish_reason == "stop"
        assert cut.text == whole.text[: whole.text.index(stop)]
        assert cut.tokens == whole.tokens[: len(cut.tokens)]
        assert len(cut.logprobs) == len(cut.tokens)


def test_end_token_ends_the_output_and_is_no_text(tiny):
    """The token that greedy decoding would give third is made the end token."""
    plain = Generator(tiny, tiny.tokenizer, max_batch=1, buckets=(64,), chunk=5)
    (whole,) = plain.generate([PROMPTS[1]], dataclasses.replace(GREEDY, ignore_eos=True))
    first = whole.tokens.index(whole.tokens[2])
    ending = Generator(tiny, tiny.tokenizer, max_batch=1, buckets=(64,), chunk=5, stop_ids=[whole.tokens[2]])
    (out,) = ending.generate([PROMPTS[1]], GREEDY)
    assert out.tokens == whole.tokens[: first + 1]
    assert out.finish_reason == "stop"
    assert out.text == tiny.tokenizer.decode(whole.tokens[:first], skip_special_tokens=True)
    (ignored,) = ending.generate([PROMPTS[1]], dataclasses.replace(GREEDY, ignore_eos=True))
    assert ignored.tokens == whole.tokens


def test_output_ends_where_the_models_positions_end(tiny, generator):
    prompt = make_prompts(1)[0][:1] * 90
    (out,) = generator.generate([prompt], dataclasses.replace(GREEDY, ignore_eos=True, max_tokens=50))
    assert len(out.tokens) == 6
    assert out.finish_reason == "length"


def test_nothing_is_compiled_after_warm_up(tiny, monkeypatch):
    """Other prompts, parameters, stops, weights and a stream: the same programs, traced once each; prefill also for
    samples that share it."""
    chex.clear_trace_counter()

    def counted(function, n=1, **options):
        return jax.jit(chex.assert_max_traces(function.__wrapped__, n=n), **options)

    static = {"static_argnames": ("decoder", "cache_len", "dtype", "top")}
    monkeypatch.setattr(batch_module, "start", counted(decode_module.start, n=2, **static))
    static = {"static_argnames": ("decoder", "size", "top"), "donate_argnames": ("caches", "state")}
    monkeypatch.setattr(batch_module, "decode_chunk", counted(decode_module.decode_chunk, **static))
    generator = Generator(tiny, tiny.tokenizer, max_batch=4, buckets=(64,), chunk=4)
    generator.generate(PROMPTS, GREEDY)
    generator.generate(PROMPTS[:1], dataclasses.replace(GREEDY, n=4))
    other = init_params(tiny.decoder, 1)
    compiled: list[str] = []

    def listener(event: str, duration_secs: float, **_) -> None:
        if "compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        generator.generate(PROMPTS[2:6], DRAWN)
        generator.update_params(other)
        generator.generate(make_prompts(1, seed=3), dataclasses.replace(DRAWN, n=4, seed=2**40, stop=("a", "of it")))
        list(generator.stream(PROMPTS[:4], dataclasses.replace(DRAWN, max_tokens=3, top_k=4)))
        assert compiled == []
        jax.jit(lambda x: x + 1)(0)  # the listener does hear of compilations
        assert compiled != []
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)


def test_updated_weights_are_used(tiny, generator, together, mixed):
    other = init_params(tiny.decoder, 7)
    generator.update_params(other)
    try:
        changed = generator.generate(PROMPTS, mixed)
    finally:
        generator.update_params(tiny.params)
    fresh = Generator(dataclasses.replace(tiny, params=other), tiny.tokenizer, max_batch=8, buckets=(32, 64), chunk=5)
    assert [c.tokens for c in changed] == [c.tokens for c in fresh.generate(PROMPTS, mixed)]
    assert [c.tokens for c in changed] != [c.tokens for c in together]


@pytest.mark.parametrize("zero", [0, 3])
def test_a_mesh_changes_no_token(tiny, mixed, together, zero):
    """Weights as training stores them; seven rows on a data axis of two."""
    plan = make_plan(MeshConfig(data=2, tensor=2, zero=zero), devices=jax.devices()[:4])
    shardings = storage_shardings(declarations(tiny.decoder), tiny.params, plan)
    model = dataclasses.replace(tiny, params=jax.device_put(tiny.params, shardings))
    spread = Generator(model, tiny.tokenizer, max_batch=7, buckets=(32, 64), chunk=5, plan=plan)
    assert [c.tokens for c in spread.generate(PROMPTS, mixed)] == [c.tokens for c in together]


def test_bfloat16_and_no_tokenizer(tiny):
    generator = Generator(tiny, max_batch=8, buckets=(64,), chunk=5, dtype="bfloat16")
    out = generator.generate(PROMPTS, dataclasses.replace(DRAWN, seed=4))
    assert all(len(c.tokens) == 12 and c.text == "" for c in out)
    with pytest.raises(UserError, match="tokenizer"):
        generator.generate(PROMPTS, SamplingParams(stop=("x",)))


def test_cache_bytes(tiny, generator):
    """2 (k, v) x 2 layers x 2 kv heads x 8 numbers x 4 bytes = 256; 31 + 12 tokens take the bucket of 64."""
    assert generator.cache_bytes([31], GREEDY) == (256, 64 * 256)
    assert generator.cache_bytes([31, 5, 4], GREEDY) == (256, 4 * 64 * 256)


def test_cache_bytes_of_states():
    """In each of 2 layers 3 inputs of 32 + 2 x 8 channels, and a state of 32 x 8: 400 numbers, for every row."""
    mamba = MambaConfig(inner_size=32, state_size=8, num_heads=4, conv_width=4)
    layers = {"num_layers": 2, "mixers": ("mamba2",) * 2, "feed_forwards": ("none",) * 2}
    config = ModelConfig(family="llm_jax", vocab_size=32, hidden_size=16, positions="none", mamba=mamba, **layers)
    decoder = Decoder(config)
    generator = Generator(Model(decoder, init_params(decoder, 0), decoder.config), buckets=(32, 64))
    assert generator.cache_bytes([5], GREEDY) == (0, 2 * 400 * 4)
    assert generator.cache_bytes([31, 5, 4], GREEDY) == (0, 4 * 2 * 400 * 4)


def test_default_buckets():
    assert default_buckets(400) == (64, 96, 128, 192, 256, 384, 400)
    assert default_buckets(50) == (50,)


def test_logits_that_are_not_finite_are_an_error(tiny, generator):
    generator.update_params(jax.tree.map(lambda x: x * jnp.nan, tiny.params))
    try:
        with pytest.raises(RunError, match="not finite"):
            generator.generate(PROMPTS[:1], GREEDY)
    finally:
        generator.update_params(tiny.params)


@pytest.mark.parametrize(
    ("prompts", "changes", "message"),
    [
        ([[]], {}, "prompt 0 has no tokens"),
        ([[1], [1] * 96], {}, "prompt 1 has 96 tokens"),
        ([[288]], {}, "vocabulary of 288"),
        ([[1]], {"temperature": -1.0}, "temperature is -1.0"),
        ([[1]], {"temperature": float("nan")}, "temperature is nan"),
        ([[1]], {"top_p": 0.0}, "top_p"),
        ([[1]], {"top_p": 1.5}, "top_p"),
        ([[1]], {"top_k": -1}, "top_k"),
        ([[1]], {"min_p": 2.0}, "min_p"),
        ([[1]], {"repetition_penalty": 0.0}, "repetition_penalty"),
        ([[1]], {"max_tokens": 0}, "max_tokens"),
        ([[1]], {"n": 0}, "n is 0"),
        ([[1]], {"seed": -1}, "seed"),
        ([[1]], {"stop": ("",)}, "stop"),
    ],
)
def test_bad_requests_name_the_thing(generator, prompts, changes, message):
    with pytest.raises(UserError, match=message):
        generator.generate(prompts, dataclasses.replace(GREEDY, **changes))


def test_one_set_of_parameters_per_prompt(generator):
    with pytest.raises(UserError, match="2 prompts came with 1 sampling"):
        generator.generate(PROMPTS[:2], [GREEDY])
