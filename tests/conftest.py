"""Every test runs on MLX's GPU where there is one, else on the CPU."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlxgpt import ops


@pytest.fixture(autouse=True)
def device() -> mx.Device:
    mx.random.seed(0)
    return ops.use_device("auto")
