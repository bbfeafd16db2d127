"""Adapters of low rank: their gradients, what they leave as it is, and merging."""

from __future__ import annotations

from contextlib import nullcontext

import mlx.core as mx
import numpy as np
import pytest
from adapted_models import ALL, BATCH, SHAPE, X, Y, adapted, base_model, train
from mlx.utils import tree_flatten, tree_unflatten

from mlxgpt.cpu import extension
from mlxgpt.generation import sampling
from mlxgpt.generation.decoding import Decoder
from mlxgpt.model import lora, ops
from mlxgpt.model.gpt import GPT


def test_it_starts_as_the_base_to_the_bit(cpu_backend):
    model = base_model()
    expected = np.array(model(X))
    lora.add(model, lora.LoRA(3, 16.0, lora.LAYERS))
    np.testing.assert_array_equal(np.array(model(X)), expected)
    assert set(model.trainable_weights()) == {
        f"h.{n}.{layer}.{part}" for n in range(2) for layer in lora.LAYERS for part in ("lora_A", "lora_B")
    }
    a = np.array(model.h[0].mlp.c_proj.lora_A)
    assert a.shape == (3, 128)
    assert 0.9 / 128**0.5 < np.abs(a).max() <= 1 / 128**0.5


def gradient_of(model: GPT) -> dict[str, np.ndarray]:
    def loss(weights):
        model.update(weights)
        return model.loss(X, Y)

    weights = model.trainable_parameters()
    gradients = mx.grad(loss)(weights)
    model.update(weights)
    return {name: np.array(g) for name, g in tree_flatten(gradients)}


@pytest.mark.parametrize("targets", [*lora.LAYERS, ALL])
@pytest.mark.parametrize("training", [False, True])  # without and with a gradient made in the forward pass
def test_gradients_are_those_of_the_merged_weights(cpu_backend, targets, training):
    """d(W + s B A) = dW gives dB = s dW A^T and dA = s B^T dW."""
    model = adapted(targets, random=True)
    model.train(training)
    found = gradient_of(model)
    merged = adapted(targets, random=True)
    lora.merge(merged)
    whole = gradient_of(merged)
    assert len(found) == 4 * len(targets.split(","))
    for name, layer in lora.layers(model, model.lora).items():
        dW = layer.lora_scale * whole[f"{name}.weight"]
        expected = {"lora_A": np.array(layer.lora_B).T @ dW, "lora_B": dW @ np.array(layer.lora_A).T}
        for part, gradient in expected.items():
            actual = found[f"{name}.{part}"]
            assert np.abs(actual - gradient).max() <= 1e-5 * np.abs(gradient).max(), (name, part)


def test_gradients_with_dropout_are_the_slope():
    """The masks are drawn anew from the same seed; differences at four points in one direction of all adapters."""
    ops.use_device("cpu")
    model = adapted(random=True)
    for block in model.h:
        block.attn.dropout_p = block.mlp.dropout_p = 0.2
    model.train()

    def loss(flat):
        model.update(tree_unflatten(list(flat.items())))
        mx.random.seed(5)
        return model.loss(X, Y)

    weights = model.trainable_weights()
    gradients = mx.grad(loss)(weights)
    along = {n: np.random.default_rng(2).standard_normal(p.shape).astype(np.float32) for n, p in weights.items()}

    def difference(step: float) -> float:
        ends = [loss({n: p + at * mx.array(along[n]) for n, p in weights.items()}).item() for at in (step, -step)]
        return ends[0] - ends[1]

    slope = sum(float((np.array(gradients[n], np.float64) * along[n]).sum()) for n in weights)
    assert abs(slope) > 0.1
    assert (8 * difference(2e-3) - difference(4e-3)) / 12 / 2e-3 == pytest.approx(slope, rel=5e-3)


@pytest.mark.parametrize("targets", ["attn.c_attn,attn.c_proj", "mlp.c_fc", "mlp.c_proj", ALL])
def test_it_learns_alike_on_both_paths_and_moves_nothing_else(targets):
    ops.use_device("cpu")
    runs = []
    for kernels_there in (nullcontext(), extension.switched_off()):
        with kernels_there:
            model = adapted(targets)
            before = {n: np.array(p) for n, p in model.named_weights().items()}
            trainer, losses = train(model, grad_clip=0.5)
            runs.append(losses)
        assert losses[-1] < losses[0] - 0.02
        averages = {n.split(".", 1)[1] for n in trainer.optimizer.averages(model)}
        assert averages == set(model.trainable_weights()) == set(lora.names(model))
        for name, p in model.named_weights().items():
            assert np.array_equal(np.array(p), before[name]) == (name not in averages), name
    np.testing.assert_allclose(*runs, rtol=2e-5)


def test_bfloat16_leaves_the_weights_float32():
    """The frozen ones too, which are cast for the step without a gradient."""
    model = adapted()
    trainer, losses = train(model, 6, dtype="bfloat16")
    assert losses[-1] < losses[0] - 0.02
    assert all(p.dtype == mx.float32 for p in model.named_weights().values())
    assert trainer.evaluate([BATCH]) == pytest.approx(losses[-1], abs=0.1)


def test_merged_logits_are_the_unmerged(cpu_backend):
    model = adapted(random=True, rank=2, alpha=3.0)
    model.eval()
    before = np.array(model(X))
    assert np.abs(before - np.array(base_model()(X))).max() > 0.01
    lora.merge(model)
    assert np.abs(np.array(model(X)) - before).max() < 1e-5
    assert model.lora is None
    assert set(model.trainable_weights()) == set(GPT(SHAPE).named_weights())


def test_decoding_runs_through_adapters():
    """By calls that are recorded once and made again."""
    ops.use_device("cpu")
    model = adapted(random=True)
    model.eval()

    def greedy():
        steps = Decoder(model, [[1, 2]], sampling.Sampler(temperature=0))
        return [int(next(steps).tokens[0]) for _ in range(10)]

    unmerged = greedy()
    lora.merge(model)
    assert unmerged == greedy()
    assert len(set(unmerged)) > 1
