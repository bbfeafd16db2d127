"""Tensors that are read when they are needed: casts."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlxgpt.formats.tensors import Tensor, cast, to_float32


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_cast_rounds_to_the_nearest(dtype):
    values = np.random.default_rng(0).standard_normal(10000).astype(np.float32) * 10.0 ** np.arange(-8, 2).repeat(1000)
    values = np.concatenate([values.astype(np.float32), [0.0, -0.0, np.inf, -np.inf, np.nan, 1 + 2**-8, 1 + 3 * 2**-8]])
    values = values.astype(np.float32)
    tensor = cast("x", Tensor("float32", values.shape, lambda: values), dtype)
    expected = np.array(mx.array(values).astype(getattr(mx, dtype)).astype(mx.float32))
    np.testing.assert_array_equal(to_float32(tensor.read(), dtype), expected)


def test_cast_says_what_does_not_fit():
    tensor = cast("h.0.x", Tensor("float32", (2,), lambda: np.array([1, 1e6], np.float32)), "float16")
    with pytest.raises(ValueError, match=r"h\.0\.x holds 1e\+06, more than float16's 65504"):
        tensor.read()
