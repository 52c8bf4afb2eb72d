"""Which pieces share a window: best-fit decreasing, one each, or all in a line that is cut every window."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Int


def best_fit_decreasing(
    lengths: Sequence[int] | Int[np.ndarray, "n"], window: int, max_items: int | None = None
) -> list[list[int]]:
    """Packs items into windows: longest first, each into the fullest window that still holds it.

    Never needs more than 11/9 of the fewest windows, and 6/9 of one more (Dosa 2007). Deterministic: items of equal
    length go in order of index, and of equally full windows the one filled last takes the item.

    Args:
      lengths: int[n], each between 1 and window.
      window: capacity of a window.
      max_items: at most so many items in a window; None for no limit.

    Returns:
      Indices of the items of each window, in the order they were put in.

    Raises:
      ValueError: a length is out of range.
    """
    sizes = np.asarray(lengths, np.int64)
    if sizes.size and (sizes.min() < 1 or sizes.max() > window):
        raise ValueError(f"lengths from {sizes.min()} to {sizes.max()} do not fit a window of {window}")
    order = np.argsort(-sizes, kind="stable")
    windows: list[list[int]] = []
    # Windows by the room they have left, and an integer whose bit r says whether any window has room r: the fullest
    # window that fits is then its lowest bit at or above the length, without a search.
    by_room: list[list[int]] = [[] for _ in range(window + 1)]
    nonempty = 0
    for index, size in zip(order.tolist(), sizes[order].tolist()):
        fitting = nonempty >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            target = by_room[room].pop()
            if not by_room[room]:
                nonempty &= ~(1 << room)
        else:
            room, target = window, len(windows)
            windows.append([])
        windows[target].append(index)
        left = room - size
        if left and (max_items is None or len(windows[target]) < max_items):
            by_room[left].append(target)
            nonempty |= 1 << left
    return windows


def split_lengths(length: int, window: int) -> list[tuple[int, int]]:
    """Cuts `length` tokens into consecutive (start, stop) pieces of at most `window`, each token once."""
    return [(start, min(start + window, length)) for start in range(0, length, window)]


def cut_every(lengths: Iterable[int], window: int) -> Iterator[list[tuple[int, int, int]]]:
    """Items laid one behind the other and cut every `window` tokens: for each window its pieces (item, start, stop).

    All windows but the last are full.
    """
    pieces: list[tuple[int, int, int]] = []
    room = window
    for item, length in enumerate(lengths):
        start = 0
        while start < length:
            stop = min(length, start + room)
            pieces.append((item, start, stop))
            room -= stop - start
            start = stop
            if not room:
                yield pieces
                pieces, room = [], window
    if pieces:
        yield pieces
