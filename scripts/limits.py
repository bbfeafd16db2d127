"""What the machine can do, for the benchmarks to be read against: multiply-adds, matrix products, reading memory.

python scripts/limits.py
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from mlxgpt import _core


def best(function: Callable[[], object], repeats: int = 5) -> float:
    """The shortest time of a few calls, in seconds: a limit is what is reached when nothing disturbs."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def sgemm() -> float:
    """GFLOP/s of a large float32 matrix product through the extension's BLAS, all threads."""
    n = 1536
    x, weight, out = (np.ones((n, n), np.float32) for _ in range(3))
    return 2 * n**3 / best(lambda: _core.linear_forward(x, weight, None, out)) / 1e9


def read_bandwidth() -> float:
    """GB/s read by all threads from arrays far larger than the caches.

    By a maximum of integers, for which NumPy keeps many loads in flight (a dot product reached half as much).
    """
    threads = _core.num_threads()
    parts = [np.ones(2**26, np.int32) for _ in range(threads)]  # 256 MiB each
    with ThreadPoolExecutor(threads) as pool:
        seconds = best(lambda: list(pool.map(np.max, parts)), 8)
    return sum(part.nbytes for part in parts) / seconds / 1e9


if __name__ == "__main__":
    peak = max(_core.fma_peak() for _ in range(50))  # 10 ms each: the first ones wake processors that sleep
    print(
        f"{_core.isa()}, {_core.num_threads()} threads: multiply-add peak {peak:.0f} GFLOP/s, "
        f"matrix product {sgemm():.0f} GFLOP/s, reading {read_bandwidth():.0f} GB/s"
    )
