"""Scoring functions to begin with, and to copy: of the form that `scorer.function` names, which is TRL's."""

from typing import Any


def shortness(prompts: list[Any], completions: list[Any], **columns: list[Any]) -> list[float]:
    """The shorter the better: 1 for nothing, 1/2 for 100 characters. The length bias of a judge, turned around."""
    del prompts, columns
    texts = [said if isinstance(said, str) else said[-1]["content"] for said in completions]
    return [100 / (100 + len(text)) for text in texts]


def shorter(prompts: list[Any], completions: list[Any], **columns: list[Any]) -> list[float]:
    """The probability that the first of two answers is better, which is the shorter one's: for `scorer.pairwise`."""
    first, second = (shortness(prompts, [pair[i] for pair in completions], **columns) for i in (0, 1))
    return [0.5 + (a - b) / 2 for a, b in zip(first, second, strict=True)]
