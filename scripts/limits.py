"""What the machine can do, for the benchmarks to be read against: multiply-adds, matrix products, reading memory.

    python scripts/limits.py [--device auto|cpu|gpu] [--dtype float32 ...]

On a GPU MLX does the work, on a CPU the extension where it is there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import report
import turns
from report import Row, Settings

TITLE = "What the machine can do"
NOTE = "The best of several tries. Matrix products in half precision go by MLX, on a CPU too."
COLUMNS = [("", "what", "{}"), ("GFLOP/s", "gflop_per_s", "{:,.0f}"), ("GB/s", "gb_per_s", "{:,.1f}")]
READ = 2**30  # bytes: far more than caches hold


def read_bandwidth(threads: int, size: int = READ) -> float:
    """GB/s at which the default device reads arrays of `size` bytes, far larger than its caches."""
    import mlx.core as mx

    if mx.default_device().type == mx.gpu:
        array = mx.ones(size // 4, mx.int32)
        mx.eval(array)
        seconds = _shortest(lambda: mx.eval(mx.max(array)))
        del array
        mx.clear_cache()
    else:  # a maximum of integers: NumPy keeps many loads in flight (a dot product reached half as much)
        parts = [np.ones(size // 4 // threads, np.int32) for _ in range(threads)]
        with ThreadPoolExecutor(threads) as pool:
            seconds = _shortest(lambda: list(pool.map(np.max, parts)))
    return size / seconds / 1e9


def _shortest(function: Callable[[], object]) -> float:
    """The shortest time of a few calls, in seconds: a limit is what is reached when nothing disturbs."""
    times = []
    for _ in range(8):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def matrix_product(dtype: str) -> float:
    """GFLOP/s of large matrix products on the default device, by what a model of this type is trained with."""
    import mlx.core as mx

    from mlxgpt.cpu import extension
    from mlxgpt.training import device

    compute, on_gpu = getattr(mx, dtype), mx.default_device().type == mx.gpu
    return device.measure_peak_flops(compute, on_gpu, extension.available(compute)) / 1e9


def multiply_adds(bursts: int) -> float:
    """GFLOP/s of the CPU's float32 multiply-add units: the best of some bursts of 10 ms, of which the first wake
    processors that sleep."""
    from mlxgpt.cpu import extension

    return max(float(extension.core.fma_peak()) for _ in range(bursts))


MEASURES: dict[str, Callable[..., float]] = {
    "reading": read_bandwidth,
    "matrix product": matrix_product,
    "multiply-adds": multiply_adds,
}


def measuring(settings: Settings) -> turns.Contender:
    """A process that answers ["reading", threads], ["matrix product", dtype] and ["multiply-adds", bursts]."""
    return turns.Contender("limits", turns.command(__file__, device=settings.device), is_ours=True)


def rows(settings: Settings) -> Iterator[Row]:
    questions: dict[str, tuple[str, list[Any]]] = {}
    if settings.machine["kernels"]:
        questions["multiply-adds, float32"] = "gflop_per_s", ["multiply-adds", 5 if settings.toy else 50]
    for dtype in settings.dtypes or report.DTYPES:
        questions[f"matrix product, {dtype}"] = "gflop_per_s", ["matrix product", dtype]
    questions["reading memory"] = "gb_per_s", ["reading", settings.machine["threads"], 2**22 if settings.toy else READ]
    asked = measuring(settings)
    with turns.started([asked], settings.environment):
        for what, (unit, question) in questions.items():
            settings.tell(what)
            value = asked.ask(question, 120)
            yield {"what": what, **({unit: value} if value else asked.why())}


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument(
        "--dtype", nargs="+", choices=report.DTYPES, default=(), help="of matrix products (default: all)"
    )
    options = parser.parse_args()
    if options.work:
        return turns.serve(lambda: _make(**options.work))
    settings = report.settings(parser, options, dtypes=options.dtype)
    report.run_alone(settings, rows(settings), COLUMNS)


def _make(device: str) -> tuple[Any, Callable[[Any], Any]]:
    from mlxgpt.model import ops

    ops.use_device(device)
    return "ready", lambda question: MEASURES[question[0]](*question[1:])


if __name__ == "__main__":
    main()
