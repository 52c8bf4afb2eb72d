"""How tokens are drawn."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SamplingParams:
    max_tokens: int = 128
    """New tokens at most."""
    temperature: float = 1.0
    """Divides the logits; 0 is greedy."""
    top_k: int = 0
    """Keeps the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keeps the likeliest tokens up to this total probability."""
    min_p: float = 0.0
    """Drops tokens less likely than this share of the likeliest."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens seen before (CTRL, Keskar et al. 2019)."""
    n: int = 1
    """Samples per prompt."""
    seed: int = 0
    """Seed of the request; equal seeds give equal samples in any batch."""
    stop: tuple[str, ...] = ()
    """Strings that end the output; not part of it."""
    ignore_eos: bool = False
    """Goes on after an end token."""
    logprobs: int = 0
    """How many of the likeliest tokens come with each new one, with their log-probabilities."""
