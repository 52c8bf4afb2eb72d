"""Pairs whose two answers share their prompt's tokens within a row, which then stand there once.

The row has the chosen answer, then the prompt, then the rejected one, each answer behind a copy of the prompt's last
token, which predicts its first. Positions go on from the prompt's in both. So what each token sees is one stretch of
the row: a token of the chosen answer its own side and the prompt behind it, one of the rejected answer the prompt
before it and its own side; that it sees none after its own position is the causal mask's (Wang and Hegde 2024,
arXiv:2410.20305, with a mask of two parts in place of this order).
"""

import numpy as np

from llm_jax.data.encode import Sequence


def shared_tokens(first: Sequence, second: Sequence) -> int:
    """How many tokens two sequences begin with alike, before the first target of either; less the last such token."""
    length = min(len(first.ids), len(second.ids), *(_context(sequence) for sequence in (first, second)))
    apart = np.flatnonzero(first.ids[:length] != second.ids[:length])
    return max(int(apart[0]) if apart.size else length, 1) - 1


def _context(sequence: Sequence) -> int:
    """Tokens before the first target; all where there is none."""
    targets = np.flatnonzero(sequence.mask)
    return int(targets[0]) if targets.size else len(sequence.ids)
