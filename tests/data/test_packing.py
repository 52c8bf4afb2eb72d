import time

import numpy as np
import pytest

from llm_jax.data.packing import best_fit_decreasing, cut_every, split_lengths


def plain_best_fit(lengths, window):
    """The definition, by looking at every window: how full each ends up."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=lambda i: rooms[i])] -= length
        else:
            rooms.append(window - length)
    return sorted(window - room for room in rooms)


@pytest.mark.parametrize("seed", range(8))
def test_equals_the_definition(seed):
    rng = np.random.default_rng(seed)
    window = int(rng.integers(2, 60))
    lengths = rng.integers(1, window + 1, int(rng.integers(0, 120)))
    packed = best_fit_decreasing(lengths, window)
    assert sorted(i for items in packed for i in items) == list(range(len(lengths)))
    assert sorted(int(lengths[items].sum()) for items in packed) == plain_best_fit(lengths.tolist(), window)
    assert packed == best_fit_decreasing(lengths, window)


def test_at_most_so_many_items():
    packed = best_fit_decreasing([1] * 10, 8, max_items=3)
    assert sorted(map(len, packed)) == [1, 3, 3, 3]


def test_a_hundred_thousand_documents_take_seconds():
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(6, 1.2, 100_000).astype(int) + 1, 4096)
    start = time.perf_counter()
    packed = best_fit_decreasing(lengths, 4096)
    assert time.perf_counter() - start < 10
    assert lengths.sum() / (len(packed) * 4096) > 0.99


def test_lengths_out_of_range():
    for bad in ([5], [0]):
        with pytest.raises(ValueError, match="do not fit a window of 4"):
            best_fit_decreasing(bad, 4)


def test_split():
    assert split_lengths(10, 4) == [(0, 4), (4, 8), (8, 10)]
    assert split_lengths(4, 4) == [(0, 4)]


def test_cutting_every_window():
    rows = list(cut_every([3, 5, 1, 9], 4))
    assert rows == [[(0, 0, 3), (1, 0, 1)], [(1, 1, 5)], [(2, 0, 1), (3, 0, 3)], [(3, 3, 7)], [(3, 7, 9)]]
    assert list(cut_every([], 4)) == [] and list(cut_every([4], 4)) == [[(0, 0, 4)]]
