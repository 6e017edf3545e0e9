"""The cells of a layer side by side: numpy and torch release the interpreter lock in all that takes time here."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def chunks(by_cell: Mapping[tuple[int, int], Sequence[Item]], size: int) -> list[tuple[tuple[int, int], list[Item]]]:
    """Pieces of at most `size` items of one cell, in order: a dense layer is one cell and must not be one task."""
    return [
        (at, list(items[start : start + size]))
        for at, items in sorted(by_cell.items())
        for start in range(0, len(items), size)
    ]


def in_threads(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """``map``, with as many threads as torch may use; each runs torch on one. Results come in the order of `items`.

    At most two results a thread wait to be taken. The result of one item must not depend on another: then it is the
    same for every number of threads.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        yield from map(work, items)
        return
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            waiting: deque[Future[Result]] = deque()
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    finally:
        torch.set_num_threads(threads)
