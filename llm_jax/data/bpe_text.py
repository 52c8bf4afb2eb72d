"""The text that a job's own tokenizer is trained on: bounded, and the same for the same data."""

import heapq
import math
from collections.abc import Iterable, Iterator

from llm_jax.data.config import DataConfig
from llm_jax.data.corpus import examples
from llm_jax.data.examples import Text
from llm_jax.data.holdout import place

CHOICE = 1
"""Version of what is below: another choice of texts is another tokenizer."""
# Enough text for any vocabulary: merges hardly change beyond it. Bounded, as all of it is held in memory.
BPE_CHARACTERS = 64_000_000
# Per character of stories in the embedded mixture, whose text would otherwise be read whole.
EMBEDDED_BPE_CHARACTERS = 4_000_000


def pretrain_texts(data: DataConfig) -> Iterator[str]:
    """The training texts that a tokenizer is trained on; never a held-out one.

    Of more text than `BPE_CHARACTERS` those documents whose hashes are lowest, in their order; of a mixture's sources
    each its share.
    """
    if data.path is None and not data.mixture:
        sources = examples("pretrain", data, "train")
        for name in sorted(sources, reverse=True):
            left = EMBEDDED_BPE_CHARACTERS
            for _, example in sources[name]:
                if left > 0 and isinstance(example, Text):
                    left -= len(example.text)
                    yield example.text
        return
    total = sum(source.weight for source in data.mixture) or 1.0
    shares = [source.weight / total for source in data.mixture] or [1.0]
    for share, source in zip(shares, examples("pretrain", data, "train").values(), strict=True):
        yield from sample((example.text for _, example in source if isinstance(example, Text)), share * BPE_CHARACTERS)


def sample(texts: Iterable[str], characters: float) -> list[str]:
    """Texts in their order: all, or if they have more characters in all those whose hashes are lowest."""
    kept: list[tuple[float, int, str]] = []  # a heap, the highest hash on top
    size, dropped = 0, math.inf
    for number, text in enumerate(texts):
        here = place(Text(text))
        # What lies above a text that had no room has none either, however short it is.
        if here >= dropped:
            continue
        heapq.heappush(kept, (-here, number, text))
        size += len(text)
        while size > characters and len(kept) > 1:
            highest, _, out = heapq.heappop(kept)
            size, dropped = size - len(out), -highest
    return [text for _, _, text in sorted(kept, key=lambda entry: entry[1])]
