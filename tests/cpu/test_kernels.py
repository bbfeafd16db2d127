"""The kernels beside attention against naive float64 NumPy."""

import mlx.core as mx
import numpy as np
import pytest
import reference
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlxgpt.cpu import memory

_core = pytest.importorskip("mlxgpt._core")

rng = np.random.default_rng(0)
ACTIVATIONS = {"gelu_new": False, "gelu": True}  # whether exact
any_shape = settings(max_examples=25, deadline=None, derandomize=True)


def normal(*shape):
    return rng.standard_normal(shape).astype(np.float32)


def nan(*shape):
    return np.full(shape, np.nan, np.float32)


def apart(array):
    """The same matrix with its rows further apart, as a part of a wider one."""
    wide = nan(array.shape[0], array.shape[1] + 5)
    wide[:, 2:-3] = array
    return wide[:, 2:-3]


def close(ours, theirs, tolerance=2e-6):
    scale = max(1.0, np.abs(theirs).max())
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * scale)


# ---- linear ----


@any_shape
@given(
    rows=st.integers(1, 300),
    n_in=st.integers(1, 130),
    n_out=st.integers(1, 130),
    epilogue=st.sampled_from(["", "bias", "residual", "bias residual", "bias gelu", "gelu"]),
    activation=st.sampled_from(list(ACTIVATIONS)),
)
def test_linear_forward(rows, n_in, n_out, epilogue, activation):
    x, weight = apart(normal(rows, n_in)), normal(n_out, n_in)
    bias = normal(n_out) if "bias" in epilogue else None
    residual = normal(rows, n_out) if "residual" in epilogue else None
    activated = nan(rows, n_out) if "gelu" in epilogue else None
    out = nan(rows, n_out)
    _core.linear_forward(x, weight, bias, out, residual=residual, activated=activated, activation=activation)
    expected = x.astype(np.float64) @ weight.T + (0 if bias is None else bias) + (0 if residual is None else residual)
    close(out, expected)
    if activated is not None:
        close(activated, reference.gelu(out.astype(np.float64), ACTIVATIONS[activation]))


@any_shape
@given(
    rows=st.integers(1, 300),
    n_in=st.integers(1, 130),
    n_out=st.integers(1, 130),
    wanted=st.sampled_from(["dx", "dweight", "dbias", "dx dweight", "dx dweight dbias"]),
    accumulate=st.booleans(),
)
def test_linear_backward(rows, n_in, n_out, wanted, accumulate):
    dout, x, weight = apart(normal(rows, n_out)), apart(normal(rows, n_in)), normal(n_out, n_in)
    start = {"dx": nan(rows, n_in), "dweight": normal(n_out, n_in), "dbias": normal(n_out)}
    outputs = {name: value.copy() if name in wanted.split() else None for name, value in start.items()}
    _core.linear_backward(dout, x, weight, *outputs.values(), accumulate=accumulate)
    d = dout.astype(np.float64)
    expected = {"dx": d @ weight, "dweight": d.T @ x, "dbias": d.sum(0)}
    for name in wanted.split():
        close(outputs[name], expected[name] + (start[name] if accumulate and name != "dx" else 0), 5e-6)


@any_shape
@given(
    rows=st.integers(1, 300),
    n_in=st.integers(1, 130),
    n_out=st.integers(1, 130),
    activation=st.sampled_from(list(ACTIVATIONS)),
)
def test_linear_backward_through_gelu(rows, n_in, n_out, activation):
    pre, dout, weight = normal(rows, n_in), normal(rows, n_out), normal(n_out, n_in)
    dx, activated = nan(rows, n_in), nan(rows, n_in)
    exact = ACTIVATIONS[activation]
    _core.linear_backward(dout, pre, weight, dx, None, None, pre=pre, activated=activated, activation=activation)
    close(dx, (dout.astype(np.float64) @ weight) * reference.gelu_derivative(pre.astype(np.float64), exact), 5e-6)
    close(activated, reference.gelu(pre.astype(np.float64), exact))


# ---- weights in any storage ----

QUANTIZED = [(bits, group, dtype) for bits in (4, 8) for group in (32, 64, 128) for dtype in ("f", "e", "H")]
storages = st.sampled_from(["f", "e", "H", *QUANTIZED])


def stored(weight, storage):
    """A matrix in some storage -> what the kernels take for it, scales and biases, and its values in float64."""
    if isinstance(storage, str):
        array, values = halved(weight, storage)
        return array, {}, values
    bits, group, dtype = storage
    words, *factors = mx.quantize(mx.array(weight), group, bits)
    (scales, s), (biases, b) = (halved(np.array(factor), dtype) for factor in factors)
    values = mx.dequantize(words, mx.array(s.astype(np.float32)), mx.array(b.astype(np.float32)), group, bits)
    return np.array(words), {"scales": scales, "biases": biases}, np.array(values).astype(np.float64)


def halved(array, dtype):
    if dtype == "H":  # cut off, not rounded
        bits = (array.view(np.uint32) >> 16).astype(np.uint16)
        return bits, (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return array.astype(dtype), array.astype(dtype).astype(np.float64)


@any_shape
@given(
    rows=st.one_of(st.integers(1, 20), st.integers(21, 200)),
    n_in=st.integers(1, 12),
    n_out=st.integers(1, 130),
    storage=storages,
    epilogue=st.sampled_from(["", "bias residual", "bias gelu"]),
)
@example(rows=1, n_in=6, n_out=3000, storage=(4, 64, "e"), epilogue="bias residual")  # in more than one task
@example(rows=70, n_in=24, n_out=700, storage=(8, 64, "e"), epilogue="")
def test_linear_of_stored_weights(rows, n_in, n_out, storage, epilogue):
    n_in = n_in * 128 if isinstance(storage, tuple) else n_in * 37
    x, (weight, factors, values) = apart(normal(rows, n_in)), stored(normal(n_out, n_in), storage)
    bias = normal(n_out) if "bias" in epilogue else None
    residual = normal(rows, n_out) if "residual" in epilogue else None
    out, activated = nan(rows, n_out), nan(rows, n_out) if "gelu" in epilogue else None
    _core.linear_forward(x, weight, bias, out, residual=residual, activated=activated, **factors)
    expected = x.astype(np.float64) @ values.T + (0 if bias is None else bias) + (0 if residual is None else residual)
    norm = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(values, axis=1)
    assert (np.abs(out - expected) <= (1e-5 if factors else 1e-6) * (norm + 1)).all()
    if activated is not None:
        close(activated, reference.gelu(out.astype(np.float64), False))


@pytest.mark.parametrize("storage", ["f", "e", "H", *QUANTIZED[::3]])
def test_a_row_among_others_gives_the_bits_it_gives_alone(storage):
    x, (weight, factors, _) = normal(16, 384), stored(normal(5003, 384), storage)
    whole, part = nan(16, 5003), nan(16, 37)
    _core.linear_forward(x, weight, None, whole, **factors)
    _core.linear_forward(x, weight[:37], None, part, **{name: f[:37] for name, f in factors.items()})
    np.testing.assert_array_equal(part, whole[:, :37])
    for first, n in ((0, 1), (15, 1), (3, 2), (1, 3), (5, 11)):
        out = nan(n, 5003)
        _core.linear_forward(x[first : first + n], weight, None, out, **factors)
        np.testing.assert_array_equal(out, whole[first : first + n])


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_so_in_its_row(odd):
    weight, factors, _ = stored(normal(9, 128), (4, 64, "e"))
    x, out = normal(3, 128), nan(3, 9)
    x[1, 77] = odd
    _core.linear_forward(x, weight, None, out, **factors)
    np.testing.assert_array_equal(np.isnan(out), np.arange(3)[:, None].repeat(9, 1) == 1)


@any_shape
@given(B=st.integers(1, 4), T=st.integers(1, 5), storage=storages, offsets=st.booleans())
def test_embedding_of_stored_tokens(B, T, storage, offsets):
    tokens, factors, values = stored(normal(11, 256), storage)
    ids = rng.integers(0, 11, (B, T)).astype(np.int32)
    at = rng.integers(0, 4, B).astype(np.int32) if offsets else np.zeros(B, np.int32)
    positions, out = normal(T + 3 if offsets else T, 256), nan(B, T, 256)
    _core.embedding_forward(ids, tokens, positions, out, offsets=at if offsets else None, **factors)
    close(out, values[ids] + positions[at[:, None] + np.arange(T)], 1e-6)


@any_shape
@given(N=st.integers(1, 100), V=st.integers(1, 300), storage=storages)
def test_linear_cross_entropy_of_stored_weights(N, V, storage):
    x, (weight, factors, values) = normal(N, 128), stored(normal(V, 128), storage)
    targets = rng.integers(0, V, N).astype(np.int32)
    expected, _ = reference.cross_entropy(x.astype(np.float64) @ values.T, targets)
    assert _core.linear_cross_entropy(x, weight, targets, **factors) == pytest.approx(expected, rel=5e-6, abs=5e-6)


# ---- gelu ----


@any_shape
@given(rows=st.integers(1, 100), n=st.integers(1, 300), activation=st.sampled_from(list(ACTIVATIONS)))
def test_gelu(rows, n, activation):
    x, dout = apart(normal(rows, n)), normal(rows, n)
    out, dx = apart(nan(rows, n)), dout.copy()
    _core.gelu_forward(x, out, activation)
    _core.gelu_backward(x, dx, activation)
    exact = ACTIVATIONS[activation]
    close(out, reference.gelu(x.astype(np.float64), exact))
    close(dx, dout * reference.gelu_derivative(x.astype(np.float64), exact))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gelu_from_tiny_to_huge(activation):
    exact = ACTIVATIONS[activation]
    sizes = np.concatenate([np.linspace(0, 12, 997), np.logspace(-45, 12, 200)])
    x = np.concatenate([sizes, -sizes]).astype(np.float32)[None]
    out, dx = nan(*x.shape), np.ones_like(x)
    _core.gelu_forward(x, out, activation)
    _core.gelu_backward(x, dx, activation)
    expected = reference.gelu(x.astype(np.float64), exact)
    np.testing.assert_allclose(out, expected, rtol=1e-6, atol=3e-7)
    np.testing.assert_allclose(dx, reference.gelu_derivative(x.astype(np.float64), exact), rtol=0, atol=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gelu_of_nan_and_infinity(activation):
    x = np.array([[1, np.nan, np.inf, -1, 2, 3, 4, 5, 6, 7]], np.float32)
    out, dx = nan(*x.shape), np.ones_like(x)
    _core.gelu_forward(x, out, activation)
    _core.gelu_backward(x, dx, activation)
    np.testing.assert_array_equal(np.isnan(out), np.isnan(x))
    np.testing.assert_array_equal(np.isnan(dx), np.isnan(x))
    assert out[0, 2] == np.inf and dx[0, 2] == 1


# ---- layer norm ----


def layer_norm(x, weight, bias, eps):
    x = x.astype(np.float64)
    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
    return normed, normed * weight + (0 if bias is None else bias)


@any_shape
@given(
    rows=st.integers(1, 200),
    C=st.integers(1, 300),
    bias=st.booleans(),
    add=st.booleans(),
    offset=st.sampled_from([0, 100]),
)
def test_layer_norm(rows, C, bias, add, offset):
    x, weight, dout = normal(rows, C) + np.float32(offset), normal(C), normal(rows, C)
    b = normal(C) if bias else None
    out, mean, rstd = nan(rows, C), nan(rows), nan(rows)
    eps = 1e-5 if C > 1 else 1.0  # one element has no variance: 1 / sqrt(eps) enlarges every error
    _core.layer_norm_forward(x, weight, b, eps, out, mean, rstd)
    normed, expected = layer_norm(x, weight, b, eps)
    loose = 2e-5 * (1 + offset) * max(1, rstd.max())
    close(out, expected, loose)
    x64 = x.astype(np.float64)
    close(mean, x64.mean(-1), 1e-6)
    start = normal(rows, C), normal(C), normal(C)
    dx, dweight, dbias = (a.copy() for a in start)
    _core.layer_norm_backward(
        dout, x, weight, mean, rstd, dx, dweight, dbias if bias else None, add_to_dx=add, accumulate=add
    )
    d = dout.astype(np.float64) * weight
    d = d - d.mean(-1, keepdims=True) - normed * (d * normed).mean(-1, keepdims=True)
    d = d / np.sqrt(x64.var(-1, keepdims=True) + eps)
    close(dx, d + (start[0] if add else 0), loose)
    close(dweight, (dout * normed).sum(0) + (start[1] if add else 0), loose)
    if bias:
        close(dbias, dout.sum(0, dtype=np.float64) + (start[2] if add else 0), 5e-6)


def test_layer_norm_keeps_nan_in_its_row():
    x, weight = normal(9, 21), normal(21)
    x[4, 20] = np.nan
    out = nan(9, 21)
    _core.layer_norm_forward(x, weight, None, 1e-5, out, nan(9), nan(9))
    np.testing.assert_array_equal(np.isnan(out).any(-1), np.arange(9) == 4)


# ---- embedding ----


@any_shape
@given(B=st.integers(1, 5), T=st.integers(1, 40), C=st.integers(1, 150), V=st.integers(1, 50), positions=st.booleans())
def test_embedding(B, T, C, V, positions):
    ids = rng.integers(0, V, (B, T)).astype(np.int32)
    tokens, at, dout, out = normal(V, C), normal(T, C), normal(B, T, C), nan(B, T, C)
    _core.embedding_forward(ids, tokens, at if positions else None, out)
    np.testing.assert_array_equal(out, tokens[ids] + (at if positions else 0))
    dtokens, dat = normal(V, C), normal(T, C)
    expected = dtokens.astype(np.float64), dat + dout.sum(0, dtype=np.float64)
    np.add.at(expected[0], ids, dout)
    _core.embedding_backward(ids, dout, dtokens, dat if positions else None)
    close(dtokens, expected[0], 1e-5)
    if positions:
        close(dat, expected[1], 1e-5)


# ---- cross entropy ----


@any_shape
@given(
    N=st.integers(1, 200), V=st.integers(1, 300), ignored=st.sampled_from([0, 0.3, 1]), spread=st.sampled_from([1, 30])
)
def test_cross_entropy(N, V, ignored, spread):
    logits = normal(N, V) * np.float32(spread)
    targets = np.where(rng.random(N) < ignored, -1, rng.integers(0, V, N)).astype(np.int32)
    loss, gradient = reference.cross_entropy(logits.astype(np.float64), targets)
    dlogits, identity = nan(N, V), np.eye(V, dtype=np.float32)  # by which x itself are the logits
    assert _core.linear_cross_entropy(logits, identity, targets) == pytest.approx(loss, rel=1e-6, abs=1e-6)
    assert _core.linear_cross_entropy(logits, identity, targets, dlogits) == pytest.approx(loss, rel=1e-6, abs=1e-6)
    close(dlogits, gradient, 3e-6)


@any_shape
@given(N=st.integers(1, 200), C=st.integers(1, 80), V=st.integers(1, 200), scale=st.sampled_from([1.0, 0.25, 0.0]))
@example(N=130, C=16, V=230_001, scale=1.0)  # in more than one chunk
def test_linear_cross_entropy(N, C, V, scale):
    x, weight, start = apart(normal(N, C)), normal(V, C), normal(V, C)
    targets = np.where(rng.random(N) < 0.2, -1, rng.integers(0, V, N)).astype(np.int32)
    logits = x.astype(np.float64) @ weight.T
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    counted = np.flatnonzero(targets >= 0)
    n = max(1, len(counted))
    expected = -np.log(p[counted, targets[counted]]).sum() / n
    p[counted, targets[counted]] -= 1
    p[targets < 0] = 0
    dx, dweight, more = nan(N, C), nan(V, C), start.copy()
    assert _core.linear_cross_entropy(x, weight, targets) == pytest.approx(expected, rel=2e-6, abs=1e-6)
    loss = _core.linear_cross_entropy(x, weight, targets, dx, dweight, scale=scale)
    assert loss == pytest.approx(expected, rel=2e-6, abs=1e-6)
    _core.linear_cross_entropy(x, weight, targets, None, more, accumulate=True, scale=scale)
    close(dx, scale * p @ weight / n, 5e-6)
    close(dweight, scale * p.T @ x / n, 5e-6)
    np.testing.assert_allclose(more, dweight + start, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n_rows, vocab_size, rows", [
    (1024, 50257, 528), (512, 50257, 512), (8192, 96, 8192), (300_000, 96, 283_984), (1024, 2_000_000, 64), (1, 1, 1),
])  # fmt: skip
def test_cross_entropy_holds_the_logits_of_some_rows_at_a_time(n_rows, vocab_size, rows):
    assert _core.cross_entropy_rows(n_rows, vocab_size) == rows


@pytest.mark.parametrize("n_rows, vocab_size, name", [(0, 96, "n_rows"), (4, -1, "vocab_size")])
def test_cross_entropy_rows_needs_sizes(n_rows, vocab_size, name):
    with pytest.raises(ValueError, match=f"^cross_entropy_rows: {name} is .*, expected 1 or more"):
        _core.cross_entropy_rows(n_rows, vocab_size)


# ---- AdamW ----


@any_shape
@given(
    shapes=st.lists(st.one_of(st.tuples(st.integers(1, 300), st.integers(1, 600)), st.tuples(st.integers(1, 50)))),
    max_norm=st.sampled_from([0.0, 1.0, 1e9]),
)
@example(shapes=[(3, 50), (7,), (1,), (300, 500), (2, 3)], max_norm=1.0)
def test_adamw(shapes, max_norm):
    p, m, v = (
        [normal(*s) for s in shapes],
        [np.zeros(s, np.float32) for s in shapes],
        [np.zeros(s, np.float32) for s in shapes],
    )
    decayed = [len(s) > 1 for s in shapes]
    P, M, V = ([a.astype(np.float64) for a in arrays] for arrays in (p, m, v))
    for step in range(1, 6):
        g = [normal(*s) for s in shapes]
        options = dict(learning_rate=1e-2 / step, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1)
        norm = _core.adamw(p, g, m, v, decayed, **options, step=step, max_norm=max_norm)
        expected = np.sqrt(sum((a.astype(np.float64) ** 2).sum() for a in g))
        assert norm == pytest.approx(expected, rel=1e-6)
        clip = min(1, max_norm / (expected + 1e-6)) if max_norm else 1
        for i, gradient in enumerate(g):
            gradient = gradient * clip
            M[i] = 0.9 * M[i] + 0.1 * gradient
            V[i] = 0.99 * V[i] + 0.01 * gradient**2
            P[i] = P[i] * (1 - options["learning_rate"] * 0.1 * decayed[i])
            P[i] -= options["learning_rate"] * M[i] / (1 - 0.9**step) / (np.sqrt(V[i] / (1 - 0.99**step)) + 1e-8)
    for ours, theirs in zip(p, P, strict=True):
        close(ours, theirs, 2e-6)


@pytest.mark.parametrize("max_norm", [0.0, 1.0])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [(0, 0), (1, 70_000), (1, 99_999)])
def test_adamw_leaves_everything_where_a_gradient_is_not_finite(at, value, max_norm):
    arrays = p, g, m, v = [[abs(normal(n)) for n in (5, 100_000)] for _ in range(4)]
    g[at[0]][at[1]] = value
    before = [a.copy() for tensors in arrays for a in tensors]
    options = dict(learning_rate=1e-2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, step=1, max_norm=max_norm)
    assert not np.isfinite(_core.adamw(p, g, m, v, [True, False], **options))
    for a, expected in zip((a for tensors in arrays for a in tensors), before, strict=True):
        np.testing.assert_array_equal(a, expected)


@pytest.mark.parametrize("size", [1e18, 1e20, 1e30, np.finfo(np.float32).max])
def test_adamw_clips_gradients_whose_squares_are_no_floats(size):
    g = [normal(5), np.float32(size) * np.sign(normal(100_000))]
    p, m, v = ([normal(len(a)) for a in g], [np.zeros_like(a) for a in g], [np.zeros_like(a) for a in g])
    before = [a.copy() for a in p]
    options = dict(learning_rate=1e-2, beta1=0.9, beta2=0.99, eps=1e-12, weight_decay=0.0, step=1, max_norm=1.0)
    norm = _core.adamw(p, g, m, v, [False, False], **options)
    assert norm == pytest.approx(float(np.float32(size)) * 100_000**0.5, rel=1e-6)
    close(p[1], before[1] - 1e-2 * np.sign(g[1]), 1e-4)
    assert all(np.isfinite(a).all() for a in (*p, *m, *v))


# ---- copies ----


@pytest.mark.parametrize("extension", [True, False])
@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize(("dtype", "into"), [("f4", "f4"), ("f2", "f4"), ("u2", "f4"), ("f2", "f2"), ("u2", "u2")])
def test_copy(switch_off_kernels, dtype, into, turned, extension):
    """Of bytes that begin anywhere, against MLX's own conversions; u2 are the bits of bfloat16."""
    if not extension:
        switch_off_kernels()
    values = mx.array(normal(70, 131)).astype({"f4": mx.float32, "f2": mx.float16, "u2": mx.bfloat16}[dtype])
    expected = np.array(values.astype(mx.float32))
    bits = np.array(values.view(mx.uint16) if dtype == "u2" else values)
    stored = np.frombuffer(b"!" + np.ascontiguousarray(bits.T if turned else bits).tobytes(), np.uint8).copy()
    x = stored[1:].view(f"<{dtype}").reshape(bits.T.shape if turned else bits.shape)
    x = x.T if turned else x
    out = np.zeros(x.shape, into)
    assert memory.copy(x, out)
    np.testing.assert_array_equal(out, expected if into == "f4" else bits)
    for value, finite in [(np.inf, False), (np.nan, False), (-np.inf, False), (65504, True)]:
        low = mx.array(value).astype(values.dtype)
        x[17, 130] = np.array(low.view(mx.uint16) if dtype == "u2" else low)
        assert memory.copy(x, out) == finite, value


@pytest.mark.parametrize(
    ("x", "out", "message"),
    [
        (normal(2, 3, 4), nan(2, 3, 4), r"x is \(2, 3, 4\), expected one axis or two"),
        (normal(4, 3), nan(3, 4), r"out is \(3, 4\), expected \(4, 3\)"),
        (normal(4, 3), np.zeros((4, 3), np.float16), "out has buffer format 'e', expected that of x, 'f'"),
        (normal(4, 3), nan(3, 4).T, "out is not contiguous"),
        (normal(8, 6)[::2, ::2], nan(4, 3), "x has no axis with a stride of 1"),
        (np.zeros((4, 3)), nan(4, 3), "x has buffer format 'd'"),
    ],
)
def test_copy_refuses(x, out, message):
    with pytest.raises(ValueError, match=f"copy: {message}"):
        _core.copy(x, out)


# ---- dropout ----


@any_shape
@given(n=st.one_of(st.integers(1, 300), st.integers(1, 200_000)), p=st.sampled_from([0.0, 0.25]))
@example(n=100_001, p=0.25)
def test_dropout(n, p):
    x, residual, out = normal(n), normal(n), nan(n)
    _core.dropout(x, residual, p, 7, out)
    factors = reference.dropout_of(n, p, 7)
    np.testing.assert_allclose(out, x * factors + residual, rtol=1e-6, atol=1e-6)
    _core.dropout(x, None, p, 7, out)
    np.testing.assert_array_equal(out, x * factors)
    if n > 50_000:
        assert (factors == 0).mean() == pytest.approx(p, abs=0.01)


# ---- the same bits each time ----


def test_same_bits_from_run_to_run():
    x, weight, targets = normal(500, 96), normal(700, 96), rng.integers(0, 700, 500).astype(np.int32)

    def everything():
        out, dx, dweight, dbias = nan(500, 700), nan(500, 96), nan(700, 96), nan(700)
        _core.linear_forward(x, weight, None, out)
        _core.linear_backward(out, x, weight, dx, dweight, dbias)
        normed, mean, rstd, dn = nan(500, 96), nan(500), nan(500), nan(96)
        _core.layer_norm_forward(x, weight[0], None, 1e-5, normed, mean, rstd)
        _core.layer_norm_backward(normed, x, weight[0], mean, rstd, dx, dn, None, add_to_dx=True)
        loss = _core.linear_cross_entropy(x, weight, targets, None, dweight, accumulate=True)
        return [out, dx, dweight, dbias, normed, dn, np.float64(loss)]

    first = everything()
    for _ in range(5):
        for a, b in zip(first, everything(), strict=True):
            np.testing.assert_array_equal(a, b)


# ---- refusals ----

X, W = np.zeros((4, 6), np.float32), np.zeros((5, 6), np.float32)
READ_ONLY = np.zeros((4, 5), np.float32)
READ_ONLY.flags.writeable = False
IDS = np.zeros((2, 3), np.int32)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: _core.linear_forward(X, W.T, None, nan(4, 5)), r"linear: weight is \(6, 5\), expected \(5, 6\)"),
        (lambda: _core.linear_forward(X, W, nan(6), nan(4, 5)), r"linear: bias is \(6,\), expected \(5,\)"),
        (lambda: _core.linear_forward(X[:, 0], W, None, nan(4, 5)), r"linear: x is \(4,\), expected \(rows, n_in\)"),
        (
            lambda: _core.linear_forward(X[:0], W, None, nan(0, 5)),
            r"linear: x is \(0, 6\), expected sizes from 1",
        ),
        (lambda: _core.linear_forward(X, W, None, READ_ONLY), "linear: out is read-only"),
        (lambda: _core.linear_forward(X[::-1], W, None, nan(4, 5)), "linear: x has rows -6 elements apart"),
        (lambda: _core.linear_forward(X.astype(np.float64), W, None, nan(4, 5)), "linear: x has buffer format 'd'"),
        (
            lambda: _core.linear_forward(X, np.asfortranarray(W), None, nan(4, 5)),
            "linear: weight has a stride of 5 elements",
        ),
        (lambda: _core.linear_forward(X, W, None, nan(4, 5), activation="relu"), "linear: activation is 'relu'"),
        (lambda: _core.linear_backward(nan(4, 5), X, W, X, None, None), "linear backward: dx and x share memory"),
        (lambda: _core.linear_backward(nan(4, 5), X, W, None, None, None, pre=X), "pre is given without dx"),
        (lambda: _core.linear_backward(nan(4, 4), X, W, None, None, None), r"weight is \(5, 6\), expected \(4, 6\)"),
        (
            lambda: _core.layer_norm_forward(X, nan(5), None, 1e-5, nan(4, 6), nan(4), nan(4)),
            r"layer_norm: weight is \(5,\)",
        ),
        (lambda: _core.layer_norm_forward(X, nan(6), None, -1, nan(4, 6), nan(4), nan(4)), "layer_norm: eps is -1"),
        (lambda: _core.layer_norm_forward(X[:, :4], nan(4), None, 0, nan(4, 4), nan(4), nan(4)), "x is not contiguous"),
        (
            lambda: _core.embedding_forward(IDS + 5, W, None, nan(2, 3, 6)),
            "embedding: ids holds 5, expected 0 <= id < 5",
        ),
        (
            lambda: _core.embedding_forward(IDS - 1, W, None, nan(2, 3, 6)),
            "embedding: ids holds -1, expected 0 <= id < 5",
        ),
        (lambda: _core.embedding_forward(IDS, W, nan(4, 6), nan(2, 3, 6)), r"positions is \(4, 6\), expected \(3, 6\)"),
        (
            lambda: _core.embedding_forward(IDS.astype(np.int64), W, None, nan(2, 3, 6)),
            "embedding: ids has buffer format 'l'",
        ),
        (lambda: _core.embedding_backward(IDS + 5, nan(2, 3, 6), nan(5, 6), None), "embedding backward: ids holds 5"),
        (
            lambda: _core.linear_cross_entropy(X, W, np.array([0, 1, 2, 5], np.int32)),
            "targets holds 5, expected -1 or 0 <= id < 5",
        ),
        (
            lambda: _core.linear_cross_entropy(X, W, np.array([0, 1, 2, -2], np.int32)),
            "cross_entropy: targets holds -2",
        ),
        (lambda: _core.linear_cross_entropy(X, W, np.zeros(3, np.int32)), r"targets is \(3,\), expected \(4,\)"),
        (lambda: _core.dropout(X, None, 1.0, 0, nan(4, 6)), "dropout: p is 1.0*, expected 0 <= p < 1"),
        (lambda: _core.dropout(X, None, 0.5, 0, nan(4, 5)), r"dropout: out is \(4, 5\), expected \(4, 6\)"),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_adamw_refuses():
    options = dict(learning_rate=1e-2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, step=1, max_norm=1.0)
    a = [normal(5)]
    with pytest.raises(ValueError, match="adamw: a list has 0 entries, expected 1"):
        _core.adamw(a, [], a, a, [True], **options)
    with pytest.raises(ValueError, match=r"adamw: gradients\[0\] is \(4,\), expected \(5,\)"):
        _core.adamw(a, [normal(4)], [normal(5)], [normal(5)], [True], **options)
    with pytest.raises(ValueError, match=r"adamw: parameters\[0\] and m\[0\] share memory"):
        _core.adamw(a, [normal(5)], a, [normal(5)], [True], **options)
    with pytest.raises(ValueError, match="adamw: step is 0"):
        _core.adamw(a, [normal(5)], [normal(5)], [normal(5)], [True], **{**options, "step": 0})
