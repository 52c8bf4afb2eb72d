"""Prompts and sampling parameters, checked and spread into the rows of a batch."""

from collections.abc import Sequence
from dataclasses import dataclass

from llm_jax.base.errors import UserError
from llm_jax.inference.config import SamplingParams


@dataclass(frozen=True)
class Row:
    """One sample of one prompt."""

    prompt: int
    sample: int
    ids: Sequence[int]
    params: SamplingParams
    max_new: int
    choice: tuple[float, ...] = ()
    """How much it has of each of the model's adapters; empty: all of them whole."""


def check_sampling(params: SamplingParams) -> None:
    """Raises UserError naming the first parameter outside its range."""
    limits = {
        "max_tokens": (1 <= params.max_tokens < 2**31, "at least 1 and below 2**31"),
        "temperature": (0 <= params.temperature < float("inf"), "0 or more"),
        "top_k": (0 <= params.top_k < 2**31, "0 or more and below 2**31"),
        "top_p": (0 < params.top_p <= 1, "above 0 and at most 1"),
        "min_p": (0 <= params.min_p <= 1, "between 0 and 1"),
        "repetition_penalty": (0 < params.repetition_penalty < float("inf"), "above 0"),
        "n": (1 <= params.n < 2**31, "at least 1"),
        "seed": (0 <= params.seed < 2**64, "between 0 and 2**64 - 1"),
        "logprobs": (0 <= params.logprobs < 2**31, "0 or more and below 2**31"),
        "stop": (all(params.stop), "strings that are not empty"),
    }
    for name, (fine, wanted) in limits.items():
        if not fine:
            raise UserError(f"sampling parameter {name} is {getattr(params, name)!r}; it must be {wanted}")


def check_prompt(ids: Sequence[int], name: str, max_positions: int, vocab_size: int) -> None:
    """Raises UserError for a prompt that is empty, leaves no room for a token, or has an id that the model lacks."""
    if not ids:
        raise UserError(f"{name} has no tokens")
    if len(ids) >= max_positions:
        raise UserError(f"{name} has {len(ids)} tokens; the model's {max_positions} positions leave no room for more")
    if min(ids) < 0 or max(ids) >= vocab_size:
        raise UserError(f"{name} has token ids outside the model's vocabulary of {vocab_size}")


def make_rows(
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams],
    choices: Sequence[tuple[float, ...]],
    *,
    max_positions: int,
    vocab_size: int,
) -> list[Row]:
    """A row per prompt and sample, in that order; `max_new` is cut where the model's positions end. `choices`: by
    prompt, see `Row`.

    Raises UserError for a prompt that is empty, leaves no room, or has an id that the model lacks, and for parameters
    out of range or not one per prompt.
    """
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
    if len(each) != len(prompts):
        raise UserError(f"{len(prompts)} prompts came with {len(each)} sampling parameters")
    for p in dict.fromkeys(each):
        check_sampling(p)
        if p.logprobs > vocab_size:
            raise UserError(f"sampling parameter logprobs is {p.logprobs}; the vocabulary has {vocab_size} tokens")
    rows = []
    for number, (ids, p, choice) in enumerate(zip(prompts, each, choices, strict=True)):
        check_prompt(ids, f"prompt {number}", max_positions, vocab_size)
        max_new = min(p.max_tokens, max_positions - len(ids))
        rows += [Row(number, sample, ids, p, max_new, choice) for sample in range(p.n)]
    return rows
