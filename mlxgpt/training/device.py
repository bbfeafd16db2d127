"""The yardsticks of a run on its device: the peak of matrix products, the arithmetic that a token takes, memory."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import mlx.core as mx
import numpy as np

from ..cpu import extension
from ..cpu import operations as kernels
from ..cpu.array import Array
from ..cpu.tape import Parameter, Tape
from ..model import ops
from ..model.config import GPTConfig


def peak_flops(dtype: str) -> float:
    """FLOP/s of the device's matrix products in a type of TrainConfig, measured in less than 0.4 s.

    Through what training computes with: the kernels' BLAS on a CPU, else MLX. A matrix is as large as the time
    allows, up to 1024 x 1024 on a CPU and 8192 x 8192 on a GPU, whose peak memory counts anew afterwards.
    A second call gives the first one's answer.
    """
    compute = getattr(mx, dtype)
    return _peak_flops(compute, mx.default_device().type == mx.gpu, extension.available(compute))


@functools.cache
def _peak_flops(dtype: mx.Dtype, on_gpu: bool, on_kernels: bool) -> float:
    start, best, n = time.perf_counter(), 0.0, 256
    while True:
        product = _product(n, dtype, on_kernels)
        product()  # wakes threads, or compiles
        seconds = min(_seconds(product) for _ in range(3))
        largest = n == (8192 if on_gpu else 1024)
        while largest and time.perf_counter() - start < 0.25:  # a shared machine is seldom quiet
            seconds = min(seconds, _seconds(product))
        best = max(best, 2 * n**3 / seconds)
        if largest or time.perf_counter() - start + 4 * 8 * seconds > 0.35:  # four times eight times the work
            break
        n *= 2
    del product
    if on_gpu:
        mx.clear_cache()
        mx.reset_peak_memory()
    return best


def _product(n: int, dtype: mx.Dtype, on_kernels: bool) -> Callable[[], object]:
    """Computes the product of two (n, n) matrices of numbers that are not round: on a GPU those take less power."""
    x, weight = (mx.random.normal((n, n), key=mx.random.key(seed)).astype(dtype) for seed in (0, 1))
    mx.eval(x, weight)
    if on_kernels:
        rows, matrix = Array(np.asarray(x), Tape(records=False)), Parameter(weight)
        return lambda: kernels.linear(rows, matrix).values
    return lambda: mx.eval(ops.linear(x, weight))


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def training_flops(config: GPTConfig) -> int:
    """FLOPs of the matrix products per token of a full sequence, forward and backward, as inspect counts them.

    Backward takes twice forward. Attention counts the pairs that the causal mask shows, (T + 1) / 2 for a token;
    PaLM (arXiv:2204.02311), appendix B, counts all T, so that its MFU is higher. Recomputed blocks count once, as
    there; frozen weights count as if they were trained, though their gradients are not computed.
    """
    C, T = config.n_embd, config.block_size
    matrices = config.n_layer * 12 * C * C + config.vocab_size * C  # c_attn 3, c_proj 1, the MLP 8; the head
    attention = config.n_layer * 2 * C * (T + 1)  # q k^T and the weights times v: 2 * 2 C (T + 1) / 2
    return 3 * (2 * matrices + attention)
