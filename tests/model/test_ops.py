"""The model on the kernels against the model on MLX's own operations, which are the plain mathematics."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlxgpt.cpu import extension, memory
from mlxgpt.cpu.array import Array
from mlxgpt.cpu.tape import Tape
from mlxgpt.model import ops
from mlxgpt.model.cache import KVCache
from mlxgpt.model.config import GPTConfig
from mlxgpt.model.gpt import GPT

if not extension.is_there():
    pytest.skip("the extension is not there", allow_module_level=True)

rng = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def cpu():
    ops.use_device("cpu")


def model_of(**config) -> GPT:
    model = GPT(GPTConfig(**{**dict(block_size=40, vocab_size=50, n_layer=2, n_head=3, n_embd=48), **config}))
    model.update(tree_map(lambda p: p + 0.1 * mx.random.normal(p.shape), model.parameters()))
    mx.eval(model.parameters())
    return model


def batch(B: int = 3, T: int = 33, V: int = 50) -> tuple[mx.array, mx.array]:
    ids, targets = rng.integers(0, V, (2, B, T)).astype(np.int32)
    return mx.array(ids), mx.array(np.where(rng.random((B, T)) < 0.2, -1, targets).astype(np.int32))


def value_and_gradients(model: GPT, function) -> tuple[float, dict[str, np.ndarray]]:
    def of_weights(weights):
        model.update(weights)
        return function()

    weights = model.parameters()
    value, gradients = mx.value_and_grad(of_weights)(weights)
    model.update(weights)
    return value.item(), {name: np.array(g) for name, g in tree_flatten(gradients)}


def with_mlx(function):
    with extension.switched_off():
        return function()


def assert_same(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], tolerance: float = 2e-5) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert np.abs(ours[name] - gradient).max() <= tolerance * max(1e-3, np.abs(gradient).max()), name


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"activation": "gelu"}, {"n_head": 1, "n_layer": 1, "n_embd": 7}]
)
def test_loss_and_gradients_are_mlxs(training, options):
    model, (ids, targets) = model_of(**options), batch()
    model.train(training)
    value, gradients = value_and_gradients(model, lambda: 3 * model.loss(ids, targets))
    expected = with_mlx(lambda: value_and_gradients(model, lambda: 3 * model.loss(ids, targets)))
    assert value == pytest.approx(expected[0], rel=1e-6)
    assert_same(gradients, expected[1])


def test_gradients_of_logits_are_mlxs():
    model, (ids, _) = model_of(), batch(T=17)
    weights = mx.random.normal((3, 17, 50))
    value, gradients = value_and_gradients(model, lambda: (model(ids) * weights).sum())
    expected = with_mlx(lambda: value_and_gradients(model, lambda: (model(ids) * weights).sum()))
    assert value == pytest.approx(expected[0], rel=1e-4)
    assert_same(gradients, expected[1], 1e-4)


@pytest.mark.parametrize("chunk", [1, 7, 40])
def test_logits_with_a_cache_are_mlxs(chunk):
    model, (ids, _) = model_of(), batch(T=40)

    def logits():
        cache = KVCache(2, 40, len(ids))
        return np.concatenate([np.array(model(ids[:, n : n + chunk], cache)) for n in range(0, 40, chunk)], axis=1)

    np.testing.assert_allclose(logits(), with_mlx(logits), rtol=1e-4, atol=1e-4)


def test_dropout_draws_the_same_mask_in_both_passes():
    model, (ids, targets) = model_of(dropout=0.3), batch()
    model.train()

    def loss():
        mx.random.seed(5)
        return model.loss(ids, targets)

    value, gradients = value_and_gradients(model, loss)
    assert value == loss().item() != with_mlx(loss).item()
    start = model.parameters()
    direction = [(name, mx.random.normal(p.shape)) for name, p in tree_flatten(start)]
    slope = sum((gradients[name] * np.array(d)).sum() for name, d in direction)
    losses = []
    for step in (3e-4, -3e-4):
        model.update(tree_map(lambda p, d, s=step: p + s * d, start, tree_unflatten(direction)))
        losses.append(loss().item())
    assert (losses[0] - losses[1]) / 6e-4 == pytest.approx(slope, rel=2e-2)


def test_dropout_keeps_the_mean():
    x = np.ones((64, 1000), np.float32)
    y = ops.dropout(Array(x, Tape()), 0.25).values
    assert set(np.unique(y)) == {0, np.float32(1 / 0.75)}
    assert y.mean() == pytest.approx(1, abs=0.02)


def test_same_bits_each_time():
    model, (ids, targets) = model_of(), batch()
    first = value_and_gradients(model, lambda: model.loss(ids, targets))
    for _ in range(3):
        value, gradients = value_and_gradients(model, lambda: model.loss(ids, targets))
        assert value == first[0]
        for name, gradient in gradients.items():
            np.testing.assert_array_equal(gradient, first[1][name], err_msg=name)


def test_memory_is_used_again():
    model, (ids, targets) = model_of(), batch()
    for _ in range(3):
        value_and_gradients(model, lambda: model.loss(ids, targets))
    held = memory.pool.nbytes
    for _ in range(5):
        value_and_gradients(model, lambda: model.loss(ids, targets))
    assert memory.pool.nbytes == held
    for _ in range(2):
        model(ids[:1, :1])  # asks for little: the rest is given back
    assert memory.pool.nbytes < held / 10


def test_results_are_not_overwritten_by_later_calls():
    model, (ids, _) = model_of(), batch()
    logits = model(ids)
    before = np.array(logits)
    for _ in range(3):
        model((ids + 1) % 50)
    np.testing.assert_array_equal(np.array(logits), before)


def test_errors_of_the_kernels_reach_the_caller():
    model, (ids, targets) = model_of(), batch()
    with pytest.raises(ValueError, match="embedding: ids holds 50, expected 0 <= id < 50"):
        model(mx.full(ids.shape, 50, mx.int32))
    with pytest.raises(ValueError, match="linear_cross_entropy: targets holds -2"):
        mx.eval(model.loss(ids, targets * 0 - 2))


def test_other_types_run_on_mlx():
    model, (ids, targets) = model_of(), batch()
    expected = model.loss(ids, targets).item()
    model.update(tree_map(lambda p: p.astype(mx.bfloat16), model.parameters()))
    assert model.loss(ids, targets).item() == pytest.approx(expected, rel=0.02)
    assert model(ids).dtype == mx.bfloat16
