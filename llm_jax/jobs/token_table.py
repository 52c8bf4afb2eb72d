"""Tokens with their log-probabilities, as a table for the terminal."""

from collections.abc import Sequence

from llm_jax.data.tokenizers import Tokenizer


def token_table(
    tokenizer: Tokenizer,
    tokens: Sequence[int],
    logprobs: Sequence[float],
    top_logprobs: Sequence[Sequence[tuple[int, float]]],
) -> str:
    """A line per token: id, text, log-probability in nats, and the likeliest tokens at its place with theirs."""

    def shown(token: int) -> str:
        return repr(tokenizer.decode([token]))

    rows = [("id", "token", "logprob", "likeliest")]
    for token, logprob, top in zip(tokens, logprobs, top_logprobs, strict=True):
        likeliest = "  ".join(f"{shown(other)} {value:.3f}" for other, value in top)
        rows.append((str(token), shown(token), f"{logprob:.4f}", likeliest))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join(
        f"{row[0].rjust(widths[0])}  {row[1].ljust(widths[1])}  {row[2].rjust(widths[2])}  {row[3]}" for row in rows
    )
