"""The extension's vector mathematics against float64, over every kind of float32."""

import math

import numpy as np
import pytest

_core = pytest.importorskip("mlxgpt._core")

FUNCTIONS = {
    "tanh": np.tanh,
    "erf": np.vectorize(math.erf, otypes=[np.float64]),
    "log": np.log,
    "exp": np.exp,
    "exp2_nonpositive": np.exp2,
}
BOUNDS = {"exp2_nonpositive": 1.2, "exp": 1.1, "log": 1.1, "tanh": 2.0, "erf": 1.5}  # ulp, as in vector_math.h


def apply(name, x):
    out = np.full_like(x, 7)
    _core._vector_math(name, x, out)
    return out


def every_kind_of_float():
    """Every 4099th bit pattern, and the neighbours of every power of two: signs, denormals, infinities, NaN."""
    powers = np.arange(512, dtype=np.uint64)[:, None] << 23
    near = (powers + np.arange(-3, 4).astype(np.uint64)).ravel() & 0xFFFFFFFF
    return np.concatenate([np.arange(0, 2**32, 4099, dtype=np.uint64), near]).astype(np.uint32).view(np.float32)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_error_is_within_the_stated_bound(name):
    x = every_kind_of_float()
    if name == "exp2_nonpositive":
        x = x[(x <= 0) | np.isnan(x)]
    with np.errstate(all="ignore"):
        exact = FUNCTIONS[name](x.astype(np.float64))
        exact = np.where(np.isinf(exact.astype(np.float32)), np.copysign(np.inf, exact), exact)
    if name == "exp2_nonpositive":
        exact[x < -126] = 0  # below the smallest normal number
    out = apply(name, x)
    finite = np.isfinite(exact)
    ulp = np.spacing(np.abs(exact[finite].astype(np.float32))).astype(np.float64)
    error = np.abs(out[finite] - exact[finite]) / ulp
    assert error.max() <= BOUNDS[name], x[finite][error.argmax()]
    np.testing.assert_array_equal(out[~finite], exact[~finite])  # infinities, and NaN where it is due


@pytest.mark.parametrize("n", range(1, 40))
def test_any_length(n):
    x = np.linspace(-3, 3, n).astype(np.float32)
    around = np.full(n + 2, 9, np.float32)
    _core._vector_math("tanh", x, around[1:-1])
    np.testing.assert_allclose(around[1:-1], np.tanh(x), rtol=1e-6)
    assert around[0] == around[-1] == 9


def test_sign_of_zero_is_kept():
    for name in ("tanh", "erf"):
        assert (np.signbit(apply(name, np.array([-0.0, 0.0], np.float32))) == [True, False]).all()


def test_unknown_name():
    x = np.zeros(1, np.float32)
    with pytest.raises(ValueError, match="_vector_math: name is 'sin'"):
        _core._vector_math("sin", x, x.copy())
