"""What a run's speed is measured by: the device's peak FLOP/s in matrix products, and the FLOPs that a token takes."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import mlx.core as mx
import numpy as np

from ..cpu import extension, operations
from ..cpu.array import Array
from ..cpu.tape import Parameter, Tape
from ..model import ops
from ..model.config import GPTConfig


def peak_flops(dtype: str) -> float:
    """The device's FLOP/s in matrix products of a dtype of TrainConfig, measured in less than 0.4 s.

    Measured with what training uses: the extension's BLAS on a CPU, else MLX. The matrices are as large as the time
    allows, up to 1024 x 1024 on a CPU and 8192 x 8192 on a GPU. A GPU's peak memory is reset afterwards. A second call
    returns the first one's result.
    """
    compute = getattr(mx, dtype)
    return _measured_once(compute, mx.default_device().type == mx.gpu, extension.available(compute))


def measure_peak_flops(dtype: mx.Dtype, on_gpu: bool, on_kernels: bool) -> float:
    """The measurement of peak_flops, made anew by each call."""
    start, best, n = time.perf_counter(), 0.0, 256
    while True:
        product = _product(n, dtype, on_kernels)
        product()  # wakes threads, or compiles
        seconds = min(_seconds(product) for _ in range(3))
        largest = n == (8192 if on_gpu else 1024)
        while largest and time.perf_counter() - start < 0.25:  # other processes may disturb a measurement
            seconds = min(seconds, _seconds(product))
        best = max(best, 2 * n**3 / seconds)
        if largest or time.perf_counter() - start + 4 * 8 * seconds > 0.35:  # next: four products, each 8 times as long
            break
        n *= 2
    del product
    if on_gpu:
        mx.clear_cache()
        mx.reset_peak_memory()
    return best


_measured_once = functools.cache(measure_peak_flops)


def _product(n: int, dtype: mx.Dtype, on_kernels: bool) -> Callable[[], object]:
    """A function that computes the product of two (n, n) matrices of random numbers: with round ones a GPU takes less
    power and runs faster."""
    x, weight = (mx.random.normal((n, n), key=mx.random.key(seed)).astype(dtype) for seed in (0, 1))
    mx.eval(x, weight)
    if on_kernels:
        rows, matrix = Array(np.asarray(x), Tape(records=False)), Parameter(weight)
        return lambda: operations.linear(rows, matrix).values
    return lambda: mx.eval(ops.linear(x, weight))


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def training_flops(config: GPTConfig) -> int:
    """FLOPs of the matrix products per token of a full sequence, forward and backward, as inspect counts them.

    The backward pass takes twice the forward pass. Attention counts the pairs that the causal mask leaves, (T + 1) / 2
    a token; PaLM (arXiv:2204.02311), appendix B, counts all T, which makes its MFU higher. As there, recomputed blocks
    count once. Frozen weights count as if they were trained, though their gradients are not computed.
    """
    C, T = config.n_embd, config.block_size
    matrices = config.n_layer * 12 * C * C + config.vocab_size * C  # c_attn 3, c_proj 1, the MLP 8; the head
    attention = config.n_layer * 2 * C * (T + 1)  # q k^T and the weights times v: 2 * 2 C (T + 1) / 2
    return 3 * (2 * matrices + attention)
