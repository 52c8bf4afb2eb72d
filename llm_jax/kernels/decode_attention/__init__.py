"""Attention of one new token per row over the slots of its cache."""

from jaxtyping import Array, Float, Int

from llm_jax.kernels.choice import Op, choose
from llm_jax.kernels.decode_attention import reference, xla
from llm_jax.kernels.decode_attention.spec import Extras, decode_attention_spec

OP = Op("decode_attention", decode_attention_spec, {"xla": xla, "reference": reference}, order=("xla",))


def decode_attention(
    q: Float[Array, "B N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S Hv"],
    lengths: Int[Array, "B"],
    *,
    scale: float | None = None,
    softcap: float | None = None,
    starts: Int[Array, "B"] | None = None,
    alibi_slopes: Float[Array, " N"] | None = None,
    sinks: Float[Array, " N"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B N Hv"]:
    """softmax(softcap(scale · q kᵀ) + alibi, over slots starts[b] to lengths[b], and the sink) · v, in float32.

    Without `alibi_slopes` slots come in any order: a softmax has none. Heads lie before slots, unlike in
    `flash_attention`, so that a head's keys are one piece of memory; that is what a step of one token waits for. No
    gradient is defined.

    Args:
        q, k, v: one dtype of float32, bfloat16, float16. K divides N; query head n reads head n // (N / K).
        lengths: one past the last slot that is seen, at least 1.
        scale: of the scores; default H^-0.5.
        softcap: scores become softcap · tanh(scores / softcap).
        starts: first slot that is seen, below lengths; default 0.
        alibi_slopes: adds -slope · (lengths[b] - 1 - s) to slot s, the token at position s.
        sinks: a further logit per head that takes part in the softmax and has no value.
        implementation: "xla" or "reference"; None takes the best one for the machine.

    Returns:
        [B, N, Hv] in q's dtype.

    Raises:
        ArgumentError: shapes or dtypes that do not fit, or an unknown implementation.
    """
    extras = Extras(starts, alibi_slopes, sinks)
    spec = decode_attention_spec(q, k, v, lengths, scale=scale, softcap=softcap, **extras._asdict())
    name = choose(OP, spec, implementation)
    return OP.implementations[name].attention(spec, q, k, v, lengths, extras)
