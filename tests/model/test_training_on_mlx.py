"""Training by MLX's operations: blocks, chunks and recomputed activations beside the plain expressions."""

from __future__ import annotations

import gc
from collections.abc import Callable
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
import reference
from mlx.utils import tree_flatten, tree_map

from mlxgpt.model import attention, cross_entropy, ops
from mlxgpt.model.attention import BlockedAttention
from mlxgpt.model.config import GPTConfig
from mlxgpt.model.cross_entropy import linear_mean_loss
from mlxgpt.model.differentiable import Differentiable, dropout_mask
from mlxgpt.model.gpt import GPT
from mlxgpt.model.matrices import Quantized

rng = np.random.default_rng(0)


def normal(*shape: int) -> mx.array:
    return mx.array(rng.standard_normal(shape), mx.float32)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(cross_entropy, "LOGITS", 2000)


def assert_close(ours, theirs, tolerance: float = 1e-5) -> None:
    for n, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        a, b = np.array(a.astype(mx.float32)), np.array(b.astype(mx.float32))
        assert np.abs(a - b).max() <= tolerance * max(1e-6, np.abs(b).max()), n


def peak(function: Callable[[], object]) -> int:
    """Bytes that an evaluation of function() holds at most, beside what there was before.

    Above the memory limit, here 1 byte, MLX gives an operation its memory only when the ones before it are done.
    """
    gc.collect()
    mx.synchronize()
    before, limit = mx.get_active_memory(), mx.set_memory_limit(1)
    mx.reset_peak_memory()
    try:
        mx.eval(function())
        mx.synchronize()
        return mx.get_peak_memory() - before
    finally:
        mx.set_memory_limit(limit)


# ---- attention ----


def plain_attention(q, k, v, mask=None):
    """All scores at once, (B, n_head, T_q, T_k), with MLX's gradient."""
    T_q, T_k = q.shape[2], k.shape[2]
    scores = (q * q.shape[-1] ** -0.5) @ k.swapaxes(-1, -2)
    visible = mx.arange(T_k) <= mx.arange(T_k - T_q, T_k)[:, None]
    weights = mx.softmax(mx.where(visible, scores, -mx.inf), axis=-1)
    return (weights if mask is None else weights * mask) @ v


def blocked(q, k, v, p=0.0, key=None):
    blocks = BlockedAttention(p, key, fused_forward=False)
    return Differentiable(blocks.forward, blocks.backward)(q, k, v)


@pytest.mark.parametrize("T_q, T_k", [(1, 1), (1, 7), (5, 5), (128, 128), (129, 129), (300, 300), (130, 301), (7, 200)])
def test_attention_in_blocks_is_the_plain_one(T_q, T_k):
    arrays = [normal(2, 3, T, 16) for T in (T_q, T_k, T_k)]
    out, gradients = mx.vjp(blocked, arrays, [cotangent := normal(2, 3, T_q, 16)])
    expected, expected_gradients = mx.vjp(plain_attention, arrays, [cotangent])
    assert_close(out + gradients, expected + expected_gradients)


def test_attention_in_blocks_draws_the_same_masks_in_both_passes():
    arrays, key, T = [normal(2, 3, 200, 16) for _ in range(3)], mx.random.key(3), 200
    mask = np.zeros((2, 3, T, T), np.float32)
    keys = mx.random.split(key, 2)
    for n, (start, stop) in enumerate([(0, 128), (128, 200)]):
        mask[:, :, start:stop, :stop] = dropout_mask(0.3, (2, 3, stop - start, stop), keys[n], mx.float32)
    assert 0.25 < (mask[:, :, 128:, :128] == 0).mean() < 0.35
    cotangents = [normal(2, 3, T, 16)]
    out, gradients = mx.vjp(lambda *a: blocked(*a, 0.3, key), arrays, cotangents)
    expected = mx.vjp(lambda *a: plain_attention(*a, mx.array(mask)), arrays, cotangents)
    assert_close(out + gradients, expected[0] + expected[1])


def test_attention_holds_no_scores_of_all_pairs():
    ops.use_device("cpu")
    arrays, T = [normal(1, 2, 1024, 8) for _ in range(3)], 1024
    mx.eval(arrays)
    gradient = mx.grad(lambda *a: blocked(*a).sum(), argnums=(0, 1, 2))
    assert peak(lambda: blocked(*arrays)) < 2 * T * T * 4
    assert peak(lambda: gradient(*arrays)) < 2 * T * T * 4  # the plain one holds 2 heads' several times


@pytest.mark.parametrize(
    "device, metal, dtype, T, head_dim, p, expected",
    [
        ("cpu", False, mx.float32, 256, 64, 0.0, "blocks"),
        ("gpu", True, mx.float32, 256, 64, 0.0, "fused forward"),
        ("gpu", True, mx.bfloat16, 256, 64, 0.1, "blocks"),  # MLX's kernels have no dropout
        ("gpu", True, mx.float32, 256, 32, 0.0, "blocks"),  # nor heads of 32 on Metal
        ("gpu", True, mx.float32, 8, 64, 0.0, "blocks"),
        ("gpu", False, mx.bfloat16, 256, 64, 0.0, "mlx"),
        ("gpu", False, mx.float32, 256, 64, 0.0, "blocks"),
        ("gpu", False, mx.float16, 200, 64, 0.0, "blocks"),
    ],
)
def test_which_way_attention_takes(monkeypatch, device, metal, dtype, T, head_dim, p, expected):
    monkeypatch.setattr(mx, "default_device", lambda: SimpleNamespace(type=getattr(mx, device)))
    monkeypatch.setattr(mx.metal, "is_available", lambda: metal)
    assert attention.way(mx.zeros((1, 2, T, head_dim), dtype), p) == expected


def test_every_way_gives_the_same_gradients():
    """Where MLX has no GPU its own function is the plain expression."""
    q, k, v = (normal(2, 3, 256, 64) for _ in range(3))
    ways = ["blocks", "mlx"] + ["fused forward"] * (mx.default_device().type == mx.gpu and mx.metal.is_available())
    results = []
    for name in ways:
        with attention.forced(name):
            results.append(mx.grad(lambda *a: ops.attention(*a).square().sum(), argnums=(0, 1, 2))(q, k, v))
    for other in results[1:]:
        assert_close(results[0], other)


# ---- the loss ----


def plain_loss(x, weight, targets):
    """The logits (N, V) all at once, with MLX's gradient."""
    logits = x @ weight.T
    picked = mx.take_along_axis(logits, mx.maximum(targets, 0)[:, None], axis=-1)[:, 0]
    losses = mx.where(targets >= 0, mx.logsumexp(logits, axis=-1) - picked, 0)
    return losses.sum() / mx.maximum((targets >= 0).sum(), 1)


@pytest.mark.parametrize("ignored", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("N, C, V", [(1, 4, 3), (7, 5, 2), (1201, 8, 50), (3, 16, 50)])
def test_the_loss_in_chunks_is_the_plain_one(small_chunks, N, C, V, training, ignored):
    x, weight = normal(N, C), normal(V, C)
    targets = mx.array(np.where(rng.random(N) < ignored, -1, rng.integers(0, V, N)), mx.int32)
    loss, gradients = mx.value_and_grad(lambda x, w: 3 * linear_mean_loss(x, w, targets, training), argnums=(0, 1))(
        x, weight
    )
    expected = mx.value_and_grad(lambda x, w: 3 * plain_loss(x, w, targets), argnums=(0, 1))(x, weight)
    assert loss.item() == pytest.approx(expected[0].item(), rel=1e-6)
    assert_close(gradients, expected[1])


@pytest.mark.parametrize("training", [True, False])
def test_a_weight_that_is_not_trained_has_no_gradient(small_chunks, training):
    x, weight, targets = normal(40, 64), normal(50, 64), mx.arange(40)
    packed, scales, biases = mx.quantize(weight, group_size=64, bits=8)
    quantized = Quantized(packed, scales, biases, 64)
    dequantized = mx.dequantize(packed, scales, biases, group_size=64, bits=8)
    for matrix, plain in ((weight, weight), (quantized, dequantized)):
        gradient = mx.grad(lambda x, m=matrix: linear_mean_loss(x, m, targets, training, is_frozen=True))(x)
        assert_close([gradient], [mx.grad(plain_loss)(x, plain, targets)])


@pytest.mark.parametrize("training", [True, False])
def test_all_logits_never_exist(monkeypatch, training):
    ops.use_device("cpu")
    monkeypatch.setattr(cross_entropy, "LOGITS", 2**14)
    x, weight, targets = normal(1024, 8), normal(1024, 8), mx.zeros((1024,), mx.int32)
    mx.eval(x, weight)
    all_logits = 1024 * 1024 * 4

    def loss(x, weight):
        return linear_mean_loss(x, weight, targets, training)

    if not training:
        assert peak(lambda: loss(x, weight)) < all_logits / 2  # a few chunks of a 64th
    assert peak(lambda: mx.value_and_grad(loss, argnums=(0, 1))(x, weight)) < all_logits / 2


def test_a_float16_gradient_survives_where_its_mean_would_be_0():
    """The cotangent, which the loss scale is in, multiplies before the number of targets divides."""
    x, weight = normal(60_000, 8).astype(mx.float16), normal(4, 8).astype(mx.float16)
    targets = mx.zeros((60_000,), mx.int32)
    dx = mx.grad(lambda x: linear_mean_loss(x, weight, targets, True) * 4096.0)(x)
    exact = mx.grad(plain_loss)(x.astype(mx.float32), weight.astype(mx.float32), targets) * 4096
    assert_close([dx], [exact], 5e-3)


# ---- half precision ----


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_sums_over_many_rows_grow_beyond_half_precision(dtype):
    """Added up in bfloat16, 5000 ones make 256."""
    N, C = 5000, 4
    x, ones = mx.broadcast_to(mx.array([-1.0, 1, -1, 1]), (N, C)).astype(dtype), mx.ones((N, C), dtype)
    weight, bias = mx.ones((C,), dtype), mx.zeros((C,), dtype)
    _, (_, dweight, dbias) = mx.vjp(lambda *a: ops.layer_norm(*a, 1e-5), [x, weight, bias], [ones])
    assert_close([dweight, dbias], [mx.array([-N, N, -N, N]), mx.full((C,), N)], 5e-3)
    _, (*_, dbias) = mx.vjp(ops.linear, [x, mx.ones((C, C), dtype), bias], [ones])
    assert_close([dbias], [mx.full((C,), N)], 5e-3)


@pytest.mark.parametrize("has_bias", [True, False])
def test_layer_norm_in_half_precision_is_that_in_float32(has_bias):
    arrays = [normal(2, 7, 16), normal(16), *([normal(16)] if has_bias else [])]
    cotangents = [normal(2, 7, 16)]

    def norm(x, weight, bias=None):
        return ops.layer_norm(x, weight, bias, 1e-5)

    expected = mx.vjp(norm, arrays, cotangents)
    ours = mx.vjp(norm, *([a.astype(mx.float16) for a in group] for group in (arrays, cotangents)))
    assert_close(ours[0] + ours[1], expected[0] + expected[1], 5e-3)


# ---- the model ----


def model_of(**config) -> GPT:
    model = GPT(GPTConfig(**{**dict(block_size=300, vocab_size=50, n_layer=2, n_head=3, n_embd=48), **config}))
    model.update(tree_map(lambda p: p + 0.1 * mx.random.normal(p.shape), model.parameters()))
    mx.eval(model.parameters())
    return model


def value_and_gradients(model: GPT, ids: np.ndarray, targets: np.ndarray):
    def loss(weights):
        model.update(weights)
        return model.loss(mx.array(ids), mx.array(targets))

    weights = model.parameters()
    value, gradients = mx.value_and_grad(loss)(weights)
    model.update(weights)
    return value.item(), dict(tree_flatten(gradients))


@pytest.mark.parametrize("options", [{}, {"activation": "gelu"}, {"bias": False}, {"tied_head": False}])
@pytest.mark.parametrize("keeps", ["all", "products", "inputs"])
def test_gradients_follow_float64(small_chunks, switch_off_kernels, options, keeps):
    """300 positions are three blocks of attention, and 600 rows of 50 logits 15 chunks of the loss."""
    switch_off_kernels()
    model = model_of(**options)
    model.train(keeps != "all")
    model.grad_checkpoint = keeps == "inputs"
    ids, targets = rng.integers(0, 50, (2, 2, 300)).astype(np.int32)
    targets[rng.random(targets.shape) < 0.1] = -1
    config = model.config
    weights = {name: np.array(w).astype(np.float64) for name, w in model.named_weights().items()}
    shape = config.n_layer, config.n_head, config.activation == "gelu"
    _, expected, gradients = reference.gpt_loss_and_gradients(weights, *shape, ids, targets, config.layer_norm_epsilon)
    loss, ours = value_and_gradients(model, ids, targets)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert ours.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert np.abs(np.array(ours[name]) - gradient).max() <= 1e-5 * np.abs(gradient).max(), name


def step_memory(n_layer: int, compiled: bool, grad_checkpoint: bool = False) -> int:
    """Bytes that the loss and its gradient hold at most beside the weights."""
    model = GPT(GPTConfig(block_size=64, vocab_size=11, n_layer=n_layer, n_head=2, n_embd=64, dropout=0.1))
    model.train()
    model.grad_checkpoint = grad_checkpoint
    ids = mx.zeros((16, 64), mx.int32)

    def loss(weights):
        model.update(weights)
        return model.loss(ids, ids)

    gradient = mx.value_and_grad(loss)
    weights = model.parameters()
    function = mx.compile(gradient, mx.random.state, mx.random.state) if compiled else gradient
    mx.eval(function(weights))
    return peak(lambda: function(weights))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("grad_checkpoint, streams", [(False, 10), (True, 1)])
def test_what_a_block_keeps(switch_off_kernels, compiled, grad_checkpoint, streams):
    """For each position: the residual stream twice, q, k and v, attention's output and c_fc's, 10 times n_embd
    numbers; with grad_checkpoint its input alone. What MLX keeps by itself is 36."""
    ops.use_device("cpu")
    switch_off_kernels()
    few, many = (step_memory(n, compiled, grad_checkpoint) for n in (2, 8))
    stream, block = 16 * 64 * 64 * 4, 12 * 64 * 64 * 4  # bytes of (B, T, C), and of a block's gradient
    assert (many - few) / 6 < (streams + 1.5) * stream + block
