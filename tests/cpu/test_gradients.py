"""The gradients of every kernel against central differences and PyTorch (where it is installed); where NaN goes."""

from __future__ import annotations

import numpy as np
import pytest

_core = pytest.importorskip("mlxgpt._core")

try:
    import torch
    from torch.nn import functional
except ImportError:
    torch = None

rng = np.random.default_rng(0)
TOKENS = rng.integers(0, 9, (4, 6)).astype(np.int32)
TARGETS = rng.integers(0, 30, 21).astype(np.int32)
RESIDUAL = rng.standard_normal((19, 40)).astype(np.float32)


def normal(*shape):
    return rng.standard_normal(shape).astype(np.float32)


def nan(*shape):
    return np.full(shape, np.nan, np.float32)


def attention_forward(q, k, v):
    out, lse = nan(*q.shape), nan(*q.shape[:3])
    _core.attention_forward(q, k, v, out, lse, scale=q.shape[-1] ** -0.5)
    return out, lse


def attention_backward(dout, q, k, v):
    gradients = nan(*q.shape), nan(*k.shape), nan(*v.shape)
    _core.attention_backward(q, k, v, *attention_forward(q, k, v), dout, *gradients, scale=q.shape[-1] ** -0.5)
    return gradients


def linear_with(residual=None, activation=None):
    def forward(x, weight, bias):
        out = nan(len(x), len(weight))
        activated = None if activation is None else nan(*out.shape)
        more = dict(residual=residual, activated=activated, activation=activation or "gelu")
        _core.linear_forward(x, weight, bias, out, **more)
        return out if activated is None else activated

    def backward(dout, x, weight, bias):
        if activation is not None:
            pre, dout = nan(*dout.shape), dout.copy()
            _core.linear_forward(x, weight, bias, pre)
            _core.gelu_backward(pre, dout, activation)
        dx, dweight, dbias = nan(*x.shape), nan(*weight.shape), nan(*bias.shape)
        _core.linear_backward(dout, x, weight, dx, dweight, dbias)
        return dx, dweight, dbias

    return forward, backward, [(19, 33), (40, 33), (40,)]


def layer_norm_forward(x, weight, bias):
    out, mean, rstd = nan(*x.shape), nan(len(x)), nan(len(x))
    _core.layer_norm_forward(x, weight, bias, 1e-5, out, mean, rstd)
    return out, mean, rstd


def layer_norm_backward(dout, x, weight, bias):
    _, mean, rstd = layer_norm_forward(x, weight, bias)
    gradients = nan(*x.shape), nan(*weight.shape), nan(*bias.shape)
    _core.layer_norm_backward(dout, x, weight, mean, rstd, *gradients)
    return gradients


def embedding_forward(tokens, positions):
    out = nan(4, *positions.shape)
    _core.embedding_forward(TOKENS, tokens, positions, out)
    return out


def embedding_backward(dout, tokens, positions):
    gradients = np.zeros_like(tokens), np.zeros_like(positions)
    _core.embedding_backward(TOKENS, dout, *gradients)
    return gradients


def cross_entropy_of_linear(x, weight):
    return np.array([_core.linear_cross_entropy(x, weight, TARGETS)])


def cross_entropy_of_linear_backward(dout, x, weight):
    gradients = nan(*x.shape), nan(*weight.shape)
    _core.linear_cross_entropy(x, weight, TARGETS, *gradients, scale=dout.item())
    return gradients


def dropped(x):
    out = nan(*x.shape)
    _core.dropout(x, None, 0.3, 7, out)  # by which the NaN of the test below is kept
    return out


def torch_dropped(x):
    return x * torch.tensor(dropped(np.ones(x.shape, np.float32)))


# name -> forward(*inputs), backward(dout, *inputs), the inputs' shapes, and PyTorch's forward
OPERATIONS = {
    "attention": (
        lambda *x: attention_forward(*x)[0], attention_backward, [(1, 2, 70, 20)] * 3,
        lambda q, k, v: functional.scaled_dot_product_attention(q, k, v, is_causal=True),
    ),
    "linear": (*linear_with(), lambda x, w, b: functional.linear(x, w, b)),
    "linear and residual": (
        *linear_with(residual=RESIDUAL), lambda x, w, b: functional.linear(x, w, b) + torch.tensor(RESIDUAL),
    ),
    "linear and gelu_new": (
        *linear_with(activation="gelu_new"),
        lambda x, w, b: functional.gelu(functional.linear(x, w, b), approximate="tanh"),
    ),
    "linear and gelu": (*linear_with(activation="gelu"), lambda x, w, b: functional.gelu(functional.linear(x, w, b))),
    "layer norm": (
        lambda *x: layer_norm_forward(*x)[0], layer_norm_backward, [(19, 33), (33,), (33,)],
        lambda x, w, b: functional.layer_norm(x, (33,), w, b, 1e-5),
    ),
    "embedding": (
        embedding_forward, embedding_backward, [(9, 33), (6, 33)],
        lambda tokens, positions: functional.embedding(torch.tensor(TOKENS), tokens) + positions,
    ),
    "linear cross entropy": (
        cross_entropy_of_linear, cross_entropy_of_linear_backward, [(21, 7), (30, 7)],
        lambda x, w: functional.cross_entropy(functional.linear(x, w), torch.tensor(TARGETS).long())[None],
    ),
    "dropout": (dropped, lambda dout, x: (dropped(dout),), [(19, 33)], torch_dropped),
}  # fmt: skip


@pytest.mark.skipif(torch is None, reason="PyTorch is not installed")
@pytest.mark.parametrize("name", OPERATIONS)
def test_gradients_are_pytorchs(name):
    forward, backward, shapes, theirs = OPERATIONS[name]
    inputs = [normal(*shape) for shape in shapes]
    out = forward(*inputs)
    dout = normal(*out.shape)
    leaves = [torch.tensor(x, requires_grad=True) for x in inputs]
    expected = theirs(*leaves)
    expected.backward(torch.tensor(dout))
    gradients = [leaf.grad.numpy() for leaf in leaves]
    for a, b in zip((out, *backward(dout, *inputs)), (expected.detach().numpy(), *gradients), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1, np.abs(b).max()))


@pytest.mark.parametrize("name", OPERATIONS)
def test_gradients_against_central_differences(name):
    forward, backward, shapes, _ = OPERATIONS[name]
    inputs = [normal(*shape) for shape in shapes]
    dout = normal(*forward(*inputs).shape)
    for i, gradient in enumerate(backward(dout, *inputs)):
        direction = normal(*inputs[i].shape)
        direction /= np.linalg.norm(direction)
        ends = []
        for step in (1e-2, -1e-2):
            moved = [x + np.float32(step) * direction if i == j else x for j, x in enumerate(inputs)]
            ends.append((forward(*moved).astype(np.float64) * dout).sum())
        slope = (gradient.astype(np.float64) * direction).sum()
        assert (ends[0] - ends[1]) / 2e-2 == pytest.approx(slope, rel=2e-3, abs=2e-3), i


@pytest.mark.parametrize("name", OPERATIONS)
def test_nan_stays_where_mathematics_puts_it(name):
    """In every result that another number in the NaN's place changes, and in no row or column without one.

    (A number may depend on another by less than its last digit, so rows and columns are as near as that gets.)
    """
    forward, backward, shapes, _ = OPERATIONS[name]
    inputs = [normal(*shape) / 2 for shape in shapes]
    dout = normal(*forward(*inputs).shape)
    for i, shape in enumerate(shapes):

        def results(value, i=i, at=tuple(n // 2 for n in shape)):
            changed = [x.copy() for x in inputs]
            changed[i][at] = value
            return forward(*changed), *backward(dout, *changed)

        before, found = results(0), results(np.nan)
        changed = [[a != b for a, b in zip(before, results(x), strict=True)] for x in (-2, -1, -0.1, 0.1, 1, 2)]
        for a, *others in zip(found, *changed, strict=True):
            expected = np.logical_or.reduce(others).reshape(-1, a.shape[-1])
            isnan = np.isnan(a).reshape(expected.shape)
            assert isnan[expected].all()
            for axis in (0, 1):
                np.testing.assert_array_equal(isnan.any(axis), expected.any(axis))
