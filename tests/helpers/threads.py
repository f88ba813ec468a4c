"""Run a function in several threads at once."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor


def run_in_threads(count: int, work: Callable[[int], None]) -> None:
    """Run ``work(number)`` in ``count`` threads, and wait for them."""
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(work, range(count)))
