"""The attention kernels of mlxgpt._core against naive float64 NumPy."""

import os
import threading

import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

_core = pytest.importorskip("mlxgpt._core")


# ---- inputs ----


def strided(rng, shape, layout, fill=None):
    """A float32 (B, n_head, T, D) array in memory of the given layout, random or filled."""
    B, n_head, T, D = shape
    if layout == "packed":  # one of three (B, T, C) parts of a (B, T, 3C) array, seen by head
        base = np.full((B, T, 3, n_head, D), np.nan, np.float32)
        view = base[:, :, 1].transpose(0, 2, 1, 3)
    elif layout == "misaligned":  # begins 4 bytes past wherever NumPy aligns to
        base = np.full(B * n_head * T * D + 1, np.nan, np.float32)
        view = base[1:].reshape(shape)
    elif layout == "backwards":
        base = np.full(shape, np.nan, np.float32)
        view = base[:, ::-1, ::-1]
    else:
        view = np.full(shape, np.nan, np.float32)
    assert view.shape == shape
    view[:] = rng.standard_normal(shape) if fill is None else fill
    return view


class Problem:
    """Random inputs and what the kernels make of them."""

    def __init__(self, B, n_head, T_q, T_k, D, *, layout="plain", causal=True, dropout=0.0, seed=0, spread=1.0):
        rng = np.random.default_rng([B, n_head, T_q, T_k, D, seed])
        self.options = {"scale": D**-0.5, "causal": causal, "dropout": dropout, "seed": seed}
        q_shape, k_shape = (B, n_head, T_q, D), (B, n_head, T_k, D)
        self.q = strided(rng, q_shape, layout)
        self.k, self.v = strided(rng, k_shape, layout), strided(rng, k_shape, layout)
        self.q *= spread
        self.dout = strided(rng, q_shape, layout)
        self.out, self.dq = (strided(rng, q_shape, layout, np.nan) for _ in range(2))
        self.dk, self.dv = (strided(rng, k_shape, layout, np.nan) for _ in range(2))
        self.lse = np.full((B, n_head, T_q), np.nan, np.float32)
        self.factors = None
        if dropout:
            self.factors = np.empty((B, n_head, T_q, T_k), np.float32)
            _core.dropout_mask(self.factors, dropout, seed)

    def forward(self):
        _core.attention_forward(self.q, self.k, self.v, self.out, self.lse, **self.options)
        return self

    def backward(self):
        _core.attention_backward(
            self.q, self.k, self.v, self.out, self.lse, self.dout, self.dq, self.dk, self.dv, **self.options
        )
        return self

    def check(self, tolerance=2e-5):
        """Runs both passes and compares everything with float64."""
        self.forward().backward()
        how = {"scale": self.options["scale"], "causal": self.options["causal"], "factors": self.factors}
        out, lse, _ = reference.attention(self.q, self.k, self.v, **how)
        dq, dk, dv = reference.attention_backward(self.q, self.k, self.v, self.dout, **how)
        expected = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
        for name, value in expected.items():
            error = np.abs(getattr(self, name) - value).max() / max(1.0, np.abs(value).max())
            assert error < tolerance, f"{name} is off by {error}"
        return self


# ---- right ----


@pytest.mark.parametrize("T", [1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 47, 63, 64, 65, 80, 127, 128, 129, 131])
def test_lengths(T):
    Problem(2, 3, T, T, 16).check()


@pytest.mark.parametrize("D", [1, 2, 3, 7, 8, 9, 17, 31, 32, 33, 64, 80, 96, 100, 128, 255, 256])
def test_head_dims(D):
    Problem(1, 2, 70, 70, D).check()


@pytest.mark.parametrize(
    "T_q, T_k", [(1, 2), (1, 64), (1, 65), (1, 200), (2, 130), (16, 17), (17, 200), (64, 128), (65, 131)]
)
@pytest.mark.parametrize("causal", [True, False])
def test_fewer_queries_than_keys(T_q, T_k, causal):
    Problem(2, 2, T_q, T_k, 24, causal=causal).check()


@pytest.mark.parametrize("layout", ["packed", "misaligned", "backwards"])
@pytest.mark.parametrize("D", [5, 64])
def test_layouts(layout, D):
    Problem(2, 3, 77, 77, D, layout=layout).check()


def test_inputs_may_be_broadcast():
    p = Problem(2, 3, 20, 20, 8)
    p.k = np.broadcast_to(p.k[:1, :1], p.k.shape)
    p.check()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    B=st.integers(1, 3),
    n_head=st.integers(1, 4),
    T_q=st.integers(1, 140),
    more_keys=st.integers(0, 140),
    D=st.integers(1, 96),
    layout=st.sampled_from(["plain", "packed", "misaligned", "backwards"]),
    causal=st.booleans(),
    dropout=st.sampled_from([0.0, 0.25]),
)
def test_any_shape(B, n_head, T_q, more_keys, D, layout, causal, dropout):
    Problem(B, n_head, T_q, T_q + more_keys, D, layout=layout, causal=causal, dropout=dropout).check()


def test_nothing_else_is_written():
    p = Problem(1, 2, 33, 33, 7, layout="packed")
    p.forward().backward()
    for array in (p.out, p.dq, p.dk, p.dv):
        around = array.base.reshape(1, 33, 3, 2, 7)
        assert np.isnan(around[:, :, [0, 2]]).all()
        assert np.isfinite(around[:, :, 1]).all()


def test_gradients_against_central_differences():
    p = Problem(1, 2, 37, 70, 12, dropout=0.2, seed=5).forward().backward()
    rng = np.random.default_rng(1)
    for name in ("q", "k", "v"):
        x, gradient = getattr(p, name), getattr(p, "d" + name).astype(np.float64)
        direction = rng.standard_normal(x.shape).astype(np.float32)
        loss, step, start = [], 1e-2, x.copy()
        for sign in (1, -1):
            x[:] = start + sign * step * direction
            loss.append(float((p.forward().out.astype(np.float64) * p.dout).sum()))
        x[:] = start
        slope = (loss[0] - loss[1]) / (2 * step)
        assert slope == pytest.approx((gradient * direction).sum(), rel=2e-3, abs=2e-3), name


# ---- half precision ----


def to_bfloat16(x):
    """float32 to the bits of bfloat16, rounded to nearest even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bfloat16(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


HALF = {
    "float16": (lambda x: x.astype(np.float16), lambda x: x.astype(np.float32), 2.0**-11),
    "bfloat16": (to_bfloat16, from_bfloat16, 2.0**-8),
}


@pytest.mark.parametrize("storage", HALF)
@pytest.mark.parametrize("T_q, T_k, D", [(1, 1, 1), (70, 70, 20), (150, 150, 64), (1, 90, 64), (40, 130, 33)])
def test_half_precision_storage(storage, T_q, T_k, D):
    """The same numbers in float32 give the same results but for the last rounding."""
    narrow, widen, unit = HALF[storage]
    half, full = (Problem(1, 2, T_q, T_k, D) for _ in range(2))
    for name in ("q", "k", "v", "dout"):
        setattr(half, name, narrow(getattr(half, name)))
        getattr(full, name)[:] = widen(getattr(half, name))
    for name in ("out", "dq", "dk", "dv"):
        setattr(half, name, narrow(getattr(half, name)))
    for names in (("q", "out", "dq"), ("k", "v", "dk", "dv")):  # packed, heads side by side
        parts = np.stack([getattr(half, name).swapaxes(1, 2) for name in names], 2)  # (1, T, n, n_head, D)
        for n, name in enumerate(names):
            setattr(half, name, parts[:, :, n].swapaxes(1, 2))
    half.forward(), full.forward()
    np.testing.assert_array_equal(half.lse, full.lse)
    np.testing.assert_array_equal(half.out, narrow(full.out))
    full.out[:] = widen(half.out)  # both backward passes take the rounded output
    half.backward(), full.backward()
    for name in ("dq", "dk", "dv"):
        np.testing.assert_array_equal(getattr(half, name), narrow(getattr(full, name)))
        rounding = np.abs(widen(getattr(half, name)) - getattr(full, name)).max()
        assert rounding <= unit * np.abs(getattr(full, name)).max()


@pytest.mark.parametrize("storage", HALF)
def test_half_precision_corners(storage):
    """One key, so that out is v: every kind of value goes in and out unchanged."""
    _, widen, _ = HALF[storage]
    bits = np.arange(0, 65536, 7, dtype=np.uint16)
    v = bits[: len(bits) // 16 * 16].reshape(1, -1, 1, 16)
    v = v if storage == "bfloat16" else v.view(np.float16)
    zeros = np.zeros_like(v)
    out, lse = np.zeros_like(v), np.empty(v.shape[:3], np.float32)
    _core.attention_forward(zeros, zeros, v, out, lse, scale=1.0)
    np.testing.assert_array_equal(widen(out), widen(v))


# ---- extreme values ----


@pytest.mark.parametrize("spread", [1e2, 1e4, 1e6])
def test_extreme_scores(spread):
    p = Problem(1, 2, 140, 140, 64, spread=spread).forward().backward()
    scale = p.options["scale"]
    out, lse, _ = reference.attention(p.q, p.k, p.v, scale=scale)
    # A float32 sum of products of this size is off by a few 2^-24 of it, a score and the exponent of its
    # probability with it; from an error of 1 on, any mean of values may come out.
    error = 4 * 2.0**-24 * scale * float((np.abs(p.q) @ np.abs(p.k).swapaxes(-1, -2)).max())
    np.testing.assert_allclose(p.lse, lse, rtol=0, atol=error)
    largest = np.abs(p.v).max()
    assert np.abs(p.out - out).max() < 2 * largest * min(error, 1) + 1e-5
    assert np.abs(p.out).max() <= largest * 1.0001
    for gradient in (p.dq, p.dk, p.dv):
        assert np.isfinite(gradient).all()


def test_extreme_scores_that_are_exact():
    """Scores of 1e4, 0 and -1e4 without rounding. The backward pass takes probabilities from lse, which float32
    holds to 5e-4 there."""
    p = Problem(2, 2, 130, 130, 16)
    p.options["scale"] = 1.0
    p.q[:] = 0
    p.q[..., 0] = 1e4 * np.sign(p.dout[..., 0])
    p.k[..., 0] = np.random.default_rng(0).integers(-1, 2, p.k.shape[:3])
    p.check(1e-3)
    out, _, _ = reference.attention(p.q, p.k, p.v, scale=1.0)
    np.testing.assert_allclose(p.out, out, atol=1e-5)


def test_scores_of_minus_infinity():
    p = Problem(1, 1, 150, 150, 4)
    p.q[..., 0] = 1.0
    p.k[:, :, 1:70, 0] = -np.inf  # a whole tile of keys but the first, which keeps every query defined
    p.forward()
    out, lse, _ = reference.attention(p.q, p.k, p.v, scale=p.options["scale"])
    np.testing.assert_allclose(p.out, out, atol=1e-5)
    np.testing.assert_allclose(p.lse, lse, atol=1e-5)
    p.k[:, :, :70, 0] = -np.inf  # queries 0 .. 69 have no key left: 0 / 0
    p.forward()
    assert np.isnan(p.out[:, :, :70]).all()
    assert np.isfinite(p.out[:, :, 70:]).all()


@pytest.mark.parametrize("at", [0, 13, 16, 40, 63, 64, 100, 129])
def test_nan_stays_where_mathematics_puts_it(at):
    T, D, d = 130, 8, 3
    after, before = np.arange(T) >= at, np.arange(T) <= at  # queries that see `at`; keys that `at` sees
    itself, only_d = np.arange(T) == at, np.arange(D) == d
    everywhere = np.ones(T, bool)

    def nan_at(name, index):
        p = Problem(1, 1, T, T, D)
        getattr(p, name)[(0, 0, *index)] = np.nan
        p.forward().backward()
        return {n: np.isnan(getattr(p, n)[0, 0]) for n in ("out", "dq", "dk", "dv")}

    def rows(which, columns=None):
        return which[:, None] & (np.ones(D, bool) if columns is None else columns)

    nowhere = rows(~everywhere)
    expected = {
        "q": {"out": rows(itself), "dq": rows(itself), "dk": rows(before), "dv": rows(before)},
        "k": {"out": rows(after), "dq": rows(after), "dk": rows(everywhere), "dv": rows(everywhere)},
        "v": {"out": rows(after, only_d), "dq": rows(after), "dk": rows(everywhere), "dv": nowhere},
        "dout": {"out": nowhere, "dq": rows(itself), "dk": rows(before), "dv": rows(before, only_d)},
    }
    for name, outputs in expected.items():
        found = nan_at(name, (at, d))
        for output, where in outputs.items():
            np.testing.assert_array_equal(found[output], where, err_msg=f"NaN in {name}, seen in {output}")


def test_the_future_does_not_reach_the_past():
    p = Problem(1, 2, 130, 130, 16).forward()
    out, lse = p.out.copy(), p.lse.copy()
    for name in ("k", "v"):
        getattr(p, name)[:, :, 70:] = 1e30
    p.forward()
    np.testing.assert_array_equal(p.out[:, :, :70], out[:, :, :70])
    np.testing.assert_array_equal(p.lse[:, :, :70], lse[:, :, :70])


# ---- dropout ----


def test_philox_known_answers():
    """kat_vectors of Random123, the reference implementation."""
    zeros, ones = (np.full(4, x, np.uint32) for x in (0, 0xFFFFFFFF))
    known = [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
    np.testing.assert_array_equal(reference.philox4x32(zeros, 0), np.array(known, np.uint32))
    known = [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]
    np.testing.assert_array_equal(reference.philox4x32(ones, 2**64 - 1), np.array(known, np.uint32))


@pytest.mark.parametrize("seed", [0, 1, 2**63 + 12345])
def test_dropout_mask_is_philox(seed):
    mask = np.empty((2, 3, 35, 70), np.float32)
    _core.dropout_mask(mask, 0.3, seed)
    np.testing.assert_array_equal(mask, reference.dropout_factors(2, 3, 35, 70, 0.3, seed))


def test_dropout_rate():
    mask = np.empty((1, 4, 256, 256), np.float32)
    for p in (0.1, 0.5, 0.9):
        _core.dropout_mask(mask, p, 3)
        assert (mask == 0).mean() == pytest.approx(p, abs=4 * (p * (1 - p) / mask.size) ** 0.5)


@pytest.mark.parametrize("T_q, T_k", [(1, 1), (70, 70), (33, 131)])
def test_dropout(T_q, T_k):
    Problem(2, 2, T_q, T_k, 20, dropout=0.3, seed=11).check()


# ---- threads ----


@pytest.mark.parametrize("n_head, T", [(5, 96), (1, 200)])
def test_same_bits_every_time(n_head, T):
    runs = []
    for _ in range(4):
        p = Problem(1, n_head, T, T, 32, dropout=0.1).forward().backward()
        runs.append(np.concatenate([x.ravel() for x in (p.out, p.lse, p.dq, p.dk, p.dv)]).view(np.uint32))
    for run in runs[1:]:
        np.testing.assert_array_equal(run, runs[0])


def test_several_python_threads():
    expected = Problem(2, 3, 90, 90, 16).forward().backward()
    problems = [Problem(2, 3, 90, 90, 16) for _ in range(4)]

    def work(p):
        for _ in range(10):
            p.forward().backward()

    threads = [threading.Thread(target=work, args=(p,)) for p in problems]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for p in problems:
        for name in ("out", "lse", "dq", "dk", "dv"):
            np.testing.assert_array_equal(getattr(p, name), getattr(expected, name))


SCRIPT = """
import os, sys, threading
import numpy as np
from mlxgpt import _core

def run(T=100, H=3, D=16):
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 1, H, T, D)).astype(np.float32)
    out, lse = np.empty_like(q), np.empty(q.shape[:3], np.float32)
    _core.attention_forward(q, k, v, out, lse, scale=0.25)
    dq, dk, dv = (np.empty_like(q) for _ in range(3))
    _core.attention_backward(q, k, v, out, lse, out, dq, dk, dv, scale=0.25)
    return np.concatenate([out, dq, dk, dv])
"""


@pytest.mark.parametrize("n_threads", ["1", "2", "3", "8"])
def test_any_number_of_threads(n_threads, run_python):
    code = SCRIPT + "sys.stdout.buffer.write(b''.join(run(H=H).tobytes() for H in (1, 2, 3, 5)))"
    results = [run_python("-c", code, text=False, MLXGPT_NUM_THREADS=n) for n in ("1", n_threads)]
    one, many = (np.frombuffer(r.stdout, np.float32) for r in results)
    np.testing.assert_allclose(many, one, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_after_fork(run_python):
    code = (
        SCRIPT
        + """
def everything():
    rng = np.random.default_rng(1)
    x, weight, out = (rng.standard_normal(n).astype(np.float32) for n in ((300, 96), (500, 96), (300, 500)))
    _core.linear_forward(x, weight, None, out)  # by a BLAS, which has threads of its own
    return np.concatenate([run().ravel(), out.ravel()])

before = everything()
stop = False
def keep_busy():
    while not stop: everything()
thread = threading.Thread(target=keep_busy)  # so that forks fall into running jobs
thread.start()
for _ in range(10):
    child = os.fork()
    if child == 0:
        os._exit(0 if (everything() == before).all() else 3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert (everything() == before).all()
stop = True
thread.join()
"""
    )
    result = run_python("-W", "ignore::DeprecationWarning", "-c", code, MLXGPT_NUM_THREADS="3")
    assert result.returncode == 0, result.stderr


def test_memory_is_linear_in_length(run_python):
    code = (
        SCRIPT
        + """
import resource
run(T=64)
unit = 1 if sys.platform == "darwin" else 1024
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
T = 12000
arrays = 10 * T * 16 * 4  # inputs, their random source in float64, outputs, the concatenation
run(T=T, H=1)
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before
assert grown < 2 * arrays + 30e6, grown  # one T x T buffer would be 576 MB
"""
    )
    result = run_python("-c", code)
    assert result.returncode == 0, result.stderr


# ---- bad arguments ----


def float_array(*shape):
    return np.zeros(shape, np.float32)


def read_only(*shape):
    array = float_array(*shape)
    array.flags.writeable = False
    return array


SHAPE = (2, 3, 5, 8)
BAD = {
    "k heads": ("k", float_array(2, 4, 5, 8), r"k is \(2, 4, 5, 8\), expected \(2, 3, T_k, 8\)"),
    "k axes": ("k", float_array(5, 8), r"k is \(5, 8\), expected \(2, 3, T_k, 8\)"),
    "v length": ("v", float_array(2, 3, 6, 8), r"v is \(2, 3, 6, 8\), expected \(2, 3, 5, 8\)"),
    "q axes": ("q", float_array(2, 3, 5), r"q is \(2, 3, 5\), expected \(B, n_head, T_q, head_dim\)"),
    "q empty batch": (
        "q",
        float_array(0, 3, 5, 8),
        r"q is \(0, 3, 5, 8\), expected sizes from 1 to 1073741824",
    ),
    "q zero length": (
        "q",
        float_array(2, 3, 0, 8),
        r"q is \(2, 3, 0, 8\), expected sizes from 1 to 1073741824",
    ),
    "q head_dim": ("q", float_array(2, 3, 5, 257), "expected a head_dim of at most 256"),
    "k zero length": (
        "k",
        float_array(2, 3, 0, 8),
        r"k is \(2, 3, 0, 8\), expected sizes from 1 to 1073741824",
    ),
    "q longer than k": ("q", float_array(2, 3, 7, 8), r"q has 7 positions and k has 5, expected T_q <= T_k"),
    "q float64": ("q", np.zeros(SHAPE), r"q has buffer format 'd', expected float32"),
    "k int": ("k", np.zeros(SHAPE, np.int32), r"k has buffer format 'i', expected float32"),
    "k float16": ("k", np.zeros(SHAPE, np.float16), r"k has buffer format 'e', expected that of q, 'f'"),
    "dv bfloat16": ("dv", np.zeros(SHAPE, np.uint16), r"dv has buffer format 'H', expected that of q, 'f'"),
    "lse float16": ("lse", np.zeros(SHAPE[:3], np.float16), r"lse has buffer format 'e', expected float32"),
    "q not contiguous": (
        "q",
        float_array(2, 3, 5, 16)[..., ::2],
        "q has a stride of 2 elements along its last axis, expected 1",
    ),
    "q unaligned": (
        "q",
        np.zeros(961, np.int8)[1:].view(np.float32).reshape(SHAPE),
        "q does not begin on a multiple of 4 bytes",
    ),
    "out shape": ("out", float_array(2, 3, 5, 9), r"out is \(2, 3, 5, 9\), expected \(2, 3, 5, 8\)"),
    "lse shape": ("lse", float_array(2, 5, 3), r"lse is \(2, 5, 3\), expected \(2, 3, 5\)"),
    "lse not contiguous": ("lse", float_array(2, 5, 3).transpose(0, 2, 1), "lse is not contiguous"),
    "dout shape": ("dout", float_array(1, 3, 5, 8), r"dout is \(1, 3, 5, 8\), expected \(2, 3, 5, 8\)"),
    "dq read-only": ("dq", read_only(*SHAPE), "dq is read-only"),
    "dk shape": ("dk", float_array(2, 3, 4, 8), r"dk is \(2, 3, 4, 8\), expected \(2, 3, 5, 8\)"),
    "dv overlaps itself": (
        "dv",
        np.lib.stride_tricks.as_strided(float_array(2, 3, 5, 8), strides=(0, 160, 32, 4)),
        "dv has elements that share memory",
    ),
    "scale": ("scale", np.inf, "scale is inf, expected a finite number"),
    "dropout": ("dropout", 1.0, "dropout is 1.0*, expected 0 <= dropout < 1"),
    "dropout nan": ("dropout", np.nan, "dropout is -?nan, expected 0 <= dropout < 1"),
}


def arguments():
    p = Problem(*SHAPE[:3], SHAPE[2], SHAPE[3])
    names = ("q", "k", "v", "out", "lse", "dout", "dq", "dk", "dv")
    return {**{name: getattr(p, name) for name in names}, "scale": 1.0}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    name, value, message = BAD[case]
    given = {**arguments(), name: value}
    with pytest.raises(ValueError, match="^attention backward: .*" + message):
        _core.attention_backward(**given)
    if name not in ("dout", "dq", "dk", "dv"):
        for extra in ("dout", "dq", "dk", "dv"):
            del given[extra]
        with pytest.raises(ValueError, match="^attention: .*" + message):
            _core.attention_forward(**given)


def test_forward_writes_out_and_lse():
    for name, shape in (("out", SHAPE), ("lse", SHAPE[:3])):
        given = {n: x for n, x in arguments().items() if n in ("q", "k", "v", "out", "lse", "scale")}
        given[name] = read_only(*shape)
        with pytest.raises(ValueError, match=f"^attention: {name} is read-only, expected a writable array"):
            _core.attention_forward(**given)


def test_outputs_must_be_distinct():
    given = arguments()
    given["dq"] = given["dk"]
    with pytest.raises(ValueError, match="dq and dk share memory"):
        _core.attention_backward(**given)


def test_no_buffer_is_a_type_error():
    given = arguments()
    given["q"] = [[[[0.0]]]]
    with pytest.raises(TypeError):
        _core.attention_backward(**given)


def test_mlx_arrays_are_read_in_place():
    mx = pytest.importorskip("mlx.core")
    p = Problem(1, 2, 40, 40, 16).forward()
    expected = p.out.copy()
    p.q, p.k, p.v = (mx.array(np.ascontiguousarray(x)) for x in (p.q, p.k, p.v))
    mx.eval(p.q, p.k, p.v)
    p.forward()
    np.testing.assert_array_equal(p.out, expected)


# ---- over a cache ----

STORED = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}


def as_floats(array):
    return (array.astype(np.uint32) << 16).view(np.float32) if array.dtype == np.uint16 else array.astype(np.float32)


def rounded(array, storage):
    if storage == "bfloat16":
        bits = array.view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return array.astype(STORED[storage])


class Cached:
    """B sequences that hold different numbers of positions, and T new ones of each."""

    def __init__(self, offsets, T, capacity, D=8, n_head=3, storage="float32", seed=0):
        rng = np.random.default_rng([T, capacity, D, seed])
        B = len(offsets)
        qkv = rng.standard_normal((B, T, 3, n_head, D)).astype(np.float32)
        self.q, self.k, self.v = (qkv[:, :, n].transpose(0, 2, 1, 3) for n in range(3))
        self.keys, self.values = (
            rounded(rng.standard_normal((B, n_head, capacity, D)).astype(np.float32), storage) for _ in range(2)
        )
        self.offsets, self.storage = np.array(offsets, np.int32), storage
        self.out = np.full((B, T, n_head, D), np.nan, np.float32).transpose(0, 2, 1, 3)

    def run(self):
        _core.attention_cached(
            self.q, self.k, self.v, self.keys, self.values, self.offsets, self.out, scale=self.q.shape[-1] ** -0.5
        )
        return self.out


@pytest.mark.parametrize("storage", STORED)
@pytest.mark.parametrize(("T", "D"), [(1, 8), (1, 64), (5, 7), (16, 8), (17, 8), (40, 64)])
def test_cached_attention_sees_what_is_held_and_itself(T, D, storage):
    problem = Cached([0, 150, 3], T, 200, D, storage=storage)
    before = problem.keys.copy(), problem.values.copy()
    out = problem.run()
    for b, offset in enumerate(problem.offsets):
        held = slice(0, offset + T)
        for cache, old, new in ((problem.keys, before[0], problem.k), (problem.values, before[1], problem.v)):
            assert np.array_equal(cache[b, :, offset : offset + T], rounded(np.ascontiguousarray(new[b]), storage))
            assert np.array_equal(cache[b, :, :offset], old[b, :, :offset])
            assert np.array_equal(cache[b, :, offset + T :], old[b, :, offset + T :])
        k, v = (as_floats(cache[b : b + 1, :, held]) for cache in (problem.keys, problem.values))
        expected, _, _ = reference.attention(problem.q[b : b + 1], k, v, scale=D**-0.5, causal=True, factors=None)
        assert np.abs(out[b : b + 1] - expected).max() < 1e-5


def test_a_few_new_positions_get_the_bits_that_they_get_one_by_one():
    together, alone = (Cached([7, 90], 16, 128, 64) for _ in range(2))
    together.run()
    whole = alone.q, alone.k, alone.v
    for t in range(16):
        alone.q, alone.k, alone.v = (part[:, :, t : t + 1] for part in whole)
        alone.out = np.empty((2, 1, 3, 64), np.float32).transpose(0, 2, 1, 3)
        assert np.array_equal(alone.run(), together.out[:, :, t : t + 1])
        alone.offsets += 1


@pytest.mark.parametrize(("offset", "T"), [(-1, 1), (8, 1), (5, 4), (2**31 - 1, 1)])
def test_a_cache_is_not_written_past_its_size(offset, T):
    problem = Cached([0, offset], T, 8)
    before = problem.keys.copy()
    with pytest.raises(ValueError, match=rf"cached attention: offsets\[1\] is {offset}, expected 0 to"):
        problem.run()
    assert np.array_equal(problem.keys, before)
