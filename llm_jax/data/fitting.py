"""Sequences made to fit their window, and what was cut or left out on the way."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from llm_jax.base.errors import UserError
from llm_jax.data.encode import Encoded, Sequence
from llm_jax.data.packing import split_lengths
from llm_jax.data.sharing import shared_tokens

OnLong = Literal["error", "truncate", "drop"]
OnUnusable = Literal["error", "drop"]


class Item(NamedTuple):
    """What is laid into a row together: a document, a pair's two sides, an answer; and numbers that go with it."""

    sequences: tuple[Sequence, ...]
    columns: Mapping[str, float] = {}
    shared: int = 0
    """First tokens of a pair's two sequences that stand in the row once."""

    @property
    def tokens(self) -> int:
        """How many tokens of a row it takes."""
        return sum(len(sequence.ids) for sequence in self.sequences) - self.shared


@dataclass
class Counts:
    """What became of a source's examples. `tokens_read` = tokens in rows + `tokens_truncated` + `tokens_dropped`."""

    documents: int = 0
    tokens_read: int = 0
    truncated: int = 0
    tokens_truncated: int = 0
    dropped: int = 0
    tokens_dropped: int = 0
    identical: int = 0  # pairs whose answers are equal, dropped
    blank: int = 0  # pairs and answers without a word in an answer, dropped
    merged: int = 0  # prompts whose last tokens change when the answer follows


def split(encoded: Iterable[Encoded], window: int, counts: Counts) -> Iterator[Item]:
    """Pretraining: documents longer than a window as consecutive pieces, every token once."""
    for example in encoded:
        (document,) = example.sequences
        counts.documents += 1
        counts.tokens_read += len(document.ids)
        for start, stop in split_lengths(len(document.ids), window):
            yield Item((Sequence(document.ids[start:stop], document.mask[start:stop]),))


def whole(encoded: Iterable[Encoded], counts: Counts) -> Iterator[Item]:
    """Sequences of any length, which are cut when they are laid into rows."""
    for example in encoded:
        (sequence,) = example.sequences
        counts.documents += 1
        counts.merged += example.merged
        counts.tokens_read += len(sequence.ids)
        yield Item((sequence,))


def fit(
    encoded: Iterable[Encoded],
    window: int,
    on_long: OnLong,
    counts: Counts,
    on_unusable: OnUnusable = "drop",
    share: bool = False,
) -> Iterator[Item]:
    """SFT and preference: what fits the window, whole; a pair's two sequences share one window.

    Args:
      encoded: examples.
      window: tokens per row.
      on_long: what becomes of a longer example: `truncate` cuts ends (of a pair, the longer answer's first).
      counts: is added to.
      on_unusable: what becomes of a pair whose answers are equal, as they are or cut, and of an empty answer.
      share: whether the two sequences of a pair share their first tokens, which are then counted once.

    Raises:
      UserError: an example is too long under `error`; a prompt leaves no room for an answer, except under `drop`;
        nothing can be learned of an example, under `on_unusable=error`.
    """
    for example in encoded:
        counts.documents += 1
        counts.merged += example.merged
        shared = shared_tokens(*example.sequences) if share else 0
        lengths = [len(sequence.ids) - shared for sequence in example.sequences]
        whole = sum(lengths) + shared
        counts.tokens_read += whole
        kept, too_long = example.sequences, whole > window
        why = f"`{example.blank}` is empty" if example.blank else _equal(kept)
        if too_long and not why:
            ends = [shared + limit for limit in _limits(lengths, max(window - shared, 0))]
            kept = tuple(Sequence(s.ids[:n], s.mask[:n]) for s, n in zip(kept, ends, strict=True))
            hopeless = not all(sequence.mask[1:].any() for sequence in kept)
            if on_long == "error" or (on_long == "truncate" and hopeless):
                raise UserError(_too_long(example, [shared + n for n in lengths], window, hopeless))
            why = _equal(kept, " once cut to fit the window") if on_long == "truncate" else ""
        if why and on_unusable == "error":
            raise UserError(f"{example.where}: {why}, so nothing can be learned of it (data.on_unusable=drop skips it)")
        if why or (too_long and on_long == "drop"):
            counts.blank += bool(example.blank)
            counts.identical += bool(why) and not example.blank
            counts.dropped += not why
            counts.tokens_dropped += whole
            continue
        item = Item(kept, example.columns, shared)
        if too_long:
            counts.truncated += 1
            counts.tokens_truncated += whole - item.tokens
        yield item


def _equal(sequences: tuple[Sequence, ...], cut: str = "") -> str:
    """What is wrong with equal answers; nothing where they differ, or there is one sequence."""
    if len({tuple(sequence.ids.tolist()) for sequence in sequences}) == len(sequences):
        return ""
    return f"{'`chosen` and `rejected`' if len(sequences) == 2 else 'two of its answers'} are equal{cut}"


def _limits(lengths: list[int], window: int) -> list[int]:
    """How long each sequence may be so that together they fit: the longest are cut down to one length."""
    if len(lengths) == 1:
        return [window]
    if len(lengths) > 2:
        most = max(n for n in range(window + 1) if sum(min(length, n) for length in lengths) <= window)
        return [min(length, most) for length in lengths]
    first, second = lengths
    most = window - min(first, second, window // 2)
    return [min(first, most), min(second, window - min(first, most))]


def _too_long(example: Encoded, lengths: list[int], window: int, hopeless: bool) -> str:
    remedy = "raise data.window, or set data.on_long to drop"
    if len(lengths) == 2:
        shown = f"pair of {lengths[0]} + {lengths[1]} tokens (prompt {example.prompt_length} in each)"
    elif len(lengths) > 2:
        shown = f"ranking of {' + '.join(map(str, lengths))} tokens (prompt {example.prompt_length} in each)"
    else:
        shown = f"record of {lengths[0]} tokens (prompt {example.prompt_length})"
    if hopeless:
        return f"{example.where}: the prompt leaves no room for an answer in a window of {window}: {shown}; {remedy}"
    return f"{example.where}: {shown} is longer than the window of {window}; {remedy} or truncate"
