"""Attention of new tokens of several requests over keys and values in pages: decoding, prefill, both at once."""

from typing import Any

from jaxtyping import Array, Float, Int

from llm_jax.kernels import debug, manual_axes
from llm_jax.kernels.choice import Op, choose
from llm_jax.kernels.ragged_paged_attention import gpu, reference, tpu, xla
from llm_jax.kernels.ragged_paged_attention.pages import Pages as Pages
from llm_jax.kernels.ragged_paged_attention.pages import init_pages as init_pages
from llm_jax.kernels.ragged_paged_attention.pages import write_pages as write_pages
from llm_jax.kernels.ragged_paged_attention.spec import (
    Batch,
    Extras,
    check_batch,
    ragged_paged_attention_spec,
    within_bounds,
)

OP = Op(
    "ragged_paged_attention",
    ragged_paged_attention_spec,
    {"tpu": tpu, "gpu": gpu, "xla": xla, "reference": reference},
    order=("tpu", "gpu", "xla"),
)


def ragged_paged_attention(
    q: Float[Array, "T N H"],
    pages: Pages,
    kv_lens: Int[Array, " R"],
    page_tables: Int[Array, "R M"],
    cu_q_lens: Int[Array, " R1"],
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: Float[Array, " N"] | None = None,
    sinks: Float[Array, " N"] | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Any:
    """softmax(softcap(scale · q kᵀ) + alibi, over the visible keys and the sink) · v, with softmax in float32.

    R requests have their new tokens back to back in `q`: one each in decoding, many in prefill, or mixed. Their keys
    and values, those of the new tokens among them (`write_pages` first), lie in pages; slot j of a request is in page
    page_tables[r, j // S], at j % S. Token i of a request (position i, the last at kv_lens[r] - 1) sees slot j iff
    i - window < j <= i. No gradient is defined.

    Args:
        q: float32, bfloat16 or float16. K divides N; query head n reads key head n // (N / K).
        pages: of q's dtype, or int8 or float8_e4m3fn with scales; or latent (DeepSeek-V2's attention, with one key for
            all heads whose first numbers are the value).
        kv_lens: tokens of each request, this step's included.
        page_tables: pages of each request in order; entries past its last page may be anything.
        cu_q_lens: request r has the tokens cu_q_lens[r] to cu_q_lens[r + 1], from 0 upwards. R and T may be larger
            than the batch: the rest of the requests have no tokens, and the rest of the tokens give 0.
        scale: of the scores; default H^-0.5.
        softcap: scores become softcap · tanh(scores / softcap).
        alibi_slopes: adds -slope · (i - j).
        sinks: a further logit per head that takes part in the softmax and has no value.
        return_lse: also return float32[T, N], the log-sum-exp of the row with its sink, in nats.
        implementation: "tpu", "gpu", "xla" or "reference"; None takes the best for the machine. See `kernels.explain`.

    Returns:
        [T, N, Hv] in q's dtype, or that and the log-sum-exp. A token that sees no key gives 0 and log-sum-exp -inf (its
        sink's logit where there is one); a token of no request gives 0 and -inf.

    Raises:
        ArgumentError: shapes, dtypes or options that do not fit, or an implementation that can't run them; in debug
            mode (`kernels.debug`) also pages that are not there, lengths beyond the table or below the request's new
            tokens, and cu_q_lens that go down. Out of debug mode these are moved to the nearest valid value.

    Source: vLLM's paged attention (https://arxiv.org/abs/2309.06180); ragged paged attention
    (https://arxiv.org/abs/2604.15464).
    """
    extras = Extras(alibi_slopes, sinks)
    options: dict[str, Any] = dict(scale=scale, window=window, softcap=softcap, return_lse=return_lse)
    spec = ragged_paged_attention_spec(q, pages, kv_lens, page_tables, cu_q_lens, **options, **extras._asdict())
    debug.check_values(lambda *arrays: check_batch(spec, *arrays), kv_lens, page_tables, cu_q_lens)
    name = choose(OP, spec, implementation)
    arrays = q, pages, within_bounds(spec, Batch(kv_lens, page_tables, cu_q_lens)), extras
    out, lse = OP.implementations[name].attention(spec, *manual_axes.vary(arrays, manual_axes.axes_of(arrays)))
    return (out, lse) if return_lse else out
