"""Iterators that go on side by side."""

from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait


def in_parallel[T](iterators: Sequence[Iterator[T]]) -> Iterator[tuple[int, T]]:
    """`(i, item of iterators[i])` as they come, each iterator on a thread.

    The caller has done with an item before its iterator goes on; the others go on meanwhile.
    """
    with ThreadPoolExecutor(len(iterators)) as pool:
        asked = {pool.submit(next, iterator, None): i for i, iterator in enumerate(iterators)}
        while asked:
            for future in wait(asked, return_when=FIRST_COMPLETED).done:
                i, item = asked.pop(future), future.result()
                if item is not None:
                    yield i, item
                    asked[pool.submit(next, iterators[i], None)] = i
