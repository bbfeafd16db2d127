"""What a run's speed is measured by: FLOPs, equal to those that inspect counts, and the measured peak."""

from __future__ import annotations

import time

import mlx.core as mx
import numpy as np
import pytest

from mlxgpt import inspect
from mlxgpt.cpu import extension
from mlxgpt.cpu.array import Array
from mlxgpt.cpu.tape import Parameter, Tape
from mlxgpt.model import ops
from mlxgpt.model.config import GPTConfig
from mlxgpt.model.gpt import GPT
from mlxgpt.training import device


@pytest.mark.parametrize(
    "config",
    [
        GPTConfig(),
        GPTConfig(block_size=64, vocab_size=65, n_layer=4, n_head=4, n_embd=128),
        GPTConfig(block_size=7, vocab_size=11, n_layer=3, n_head=2, n_embd=6, tied_head=False, bias=False),
    ],
)
def test_flops_are_those_that_inspect_counts(config):
    calls = inspect.trace(GPT(config), mx.zeros((2, config.block_size), mx.int32))
    assert device.training_flops(config) * 2 * config.block_size == 3 * sum(call.matmul_flops() for call in calls)


@pytest.mark.parametrize("on_kernels", [True, False])
def test_the_peak_is_a_speed_that_a_product_can_have(switch_off_kernels, on_kernels):
    if not on_kernels:
        switch_off_kernels()
    random = mx.random.state[0].tolist()
    start = time.perf_counter()
    on_gpu = mx.default_device().type == mx.gpu
    peak = device.measure_peak_flops(mx.float32, on_gpu, extension.available())
    assert time.perf_counter() - start < 2  # 0.4 s on a machine that does nothing else
    assert mx.random.state[0].tolist() == random
    n = 256
    x, weight = np.ones((n, n), np.float32), mx.ones((n, n))
    rows = Array(x, Tape(records=False)) if extension.available() else mx.array(x)
    matrix = Parameter(weight) if extension.available() else weight
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        product = ops.linear(rows, matrix)
        mx.eval(product) if isinstance(product, mx.array) else product.compute()
        seconds.append(time.perf_counter() - start)
    assert peak > 0.2 * 2 * n**3 / min(seconds)
    peak = device.peak_flops("float32")
    start = time.perf_counter()
    assert device.peak_flops("float32") == peak  # it is measured once
    assert time.perf_counter() - start < 0.01
