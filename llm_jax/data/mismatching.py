"""KTO's estimate of the KL wants answers that were given to other prompts: each prompt with its neighbour's answer."""

from collections.abc import Sequence

import numpy as np

from llm_jax.data.encode import Sequence as TokenSequence
from llm_jax.data.fitting import Item


def mismatched(items: Sequence[Item], window: int) -> list[Item]:
    """Unpaired answers, each with a second sequence: its prompt before the answer of the item before it.

    As in TRL's KTO (Ethayarajh et al. 2024, arXiv:2402.01306, section 4.1) answers are rotated by one: the first gets
    the last one's. TRL rotates within each device's batch as the file has it and so refuses to shuffle; here they are
    rotated over the records that are packed together (a buffer of `data/build.py`), once, before the rows are shuffled:
    which answer is beside which prompt then depends on the data alone, and not on batch size, devices or order. On a
    set of one TRL batch both are the same. Answers to the same prompt in a row (as from `data.unpair`) are no mismatch:
    they are stepped over, where TRL would take them.

    Args:
      items: one sequence each, in the order of their records.
      window: what is longer is cut at the end, as TRL cuts at `max_length`.
    """
    prompts = [item.sequences[0].ids[: _prompt_length(item.sequences[0])] for item in items]
    answers = [item.sequences[0].ids[len(prompt) :] for item, prompt in zip(items, prompts, strict=True)]
    names = [prompt.tobytes() for prompt in prompts]
    # Where the run of equal prompts that an item belongs to begins; the item before that has another prompt.
    begins = list(range(len(items)))
    for i in range(1, len(items)):
        if names[i] == names[i - 1]:
            begins[i] = begins[i - 1]
    others = [begin - 1 for begin in begins]
    if names and names[0] == names[-1]:
        others = [begins[-1] - 1 if begins[i] == 0 else other for i, other in enumerate(others)]
    return [
        item._replace(sequences=(item.sequences[0], _joined(prompt, answers[other], window)))
        for item, prompt, other in zip(items, prompts, others, strict=True)
    ]


def _prompt_length(sequence: TokenSequence) -> int:
    return int(np.argmax(sequence.mask == 1))


def _joined(prompt: np.ndarray, answer: np.ndarray, window: int) -> TokenSequence:
    ids = np.concatenate([prompt, answer])[:window]
    mask = (np.arange(len(ids)) >= len(prompt)).astype(np.uint8)
    return TokenSequence(ids, mask)
