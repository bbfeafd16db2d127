"""Training's steps: the curve beside PyTorch's, accumulation, clipping, and the same when compiled."""

from __future__ import annotations

import golden
import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from mlxgpt import kernels, training
from mlxgpt.config import GPTConfig, TrainConfig
from mlxgpt.model import GPT
from mlxgpt.optim import AdamW, learning_rate

TINY = GPTConfig(block_size=16, vocab_size=32, n_layer=2, n_head=2, n_embd=32)


def batches(seed: int, n: int, config: GPTConfig = TINY, size: int = 4) -> list[training.Batch]:
    ids = np.random.default_rng(seed).integers(0, config.vocab_size, (n, size, config.block_size + 1)).astype(np.int32)
    return [(a[:, :-1], a[:, 1:]) for a in ids]


def weights_of(trainer: training.Trainer) -> dict[str, np.ndarray]:
    return {name: np.array(p) for name, p in tree_flatten(trainer.model.parameters())}


def test_the_loss_curve_follows_pytorchs_for_100_steps():
    file = golden.load("curve.npz")
    config = TrainConfig(**golden.CURVE_SCHEDULE, **golden.CURVE_ADAMW, model=GPTConfig(**golden.CURVE_SHAPE))
    model = GPT(config.model)
    model.update(tree_unflatten([(n, mx.array(w)) for n, w in golden.group(file, "weight").items()]))
    trainer = training.Trainer(model, config)
    losses = [trainer.step([batch]).item() for batch in golden.curve_batches(file["tokens"])]
    assert file["losses"][0] - file["losses"][-1] > 1
    assert np.abs(np.array(losses) - file["losses"]).max() < 1e-3


def test_the_schedule_is_nanogpts():
    config = TrainConfig(**golden.CURVE_SCHEDULE)
    assert [learning_rate(config, step) for step in range(100)] == pytest.approx(golden.curve_rates(), rel=1e-12)
    assert learning_rate(TrainConfig(max_iters=100), 1000) == pytest.approx(1e-4)
    assert learning_rate(TrainConfig(decay_lr=False, warmup_iters=4), 900) == 1e-3
    assert learning_rate(TrainConfig(warmup_iters=0, max_iters=1), 0) == 1e-3


def test_one_batch_is_learnt_by_heart():
    trainer = training.Trainer(GPT(TINY), TrainConfig(learning_rate=3e-3, warmup_iters=0, max_iters=200, model=TINY))
    (batch,) = batches(0, 1)
    for _ in range(150):
        loss = trainer.step([batch])
    assert loss.item() < 0.1


def test_only_matrices_decay():
    config = TrainConfig(weight_decay=0.5, learning_rate=0.1, warmup_iters=0, model=TINY)
    model = GPT(TINY)
    before = {name: np.array(p) for name, p in tree_flatten(model.parameters())}
    optimizer = AdamW(config)
    zeros = tree_unflatten([(name, mx.zeros_like(p)) for name, p in tree_flatten(model.parameters())])
    optimizer.update(model, zeros)
    for name, p in tree_flatten(model.parameters()):
        expected = before[name] * (0.95 if before[name].ndim == 2 else 1)
        assert np.abs(np.array(p) - expected).max() < 1e-7, name


def test_accumulated_micro_batches_are_one_large_batch(monkeypatch):
    monkeypatch.setattr(kernels, "_core", None)  # the kernels are tested in test_optim.py
    trainer = training.Trainer(GPT(TINY), TrainConfig(model=TINY))
    seen = []
    monkeypatch.setattr(trainer, "_update", lambda gradients: seen.append(dict(tree_flatten(gradients))))
    parts = batches(1, 3)
    whole = tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    losses = [trainer.step(micro_batches).item() for micro_batches in (parts, [whole])]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for name, gradient in seen[0].items():
        assert np.abs(np.array(gradient - seen[1][name])).max() < 1e-6, name
        assert mx.abs(gradient).max().item() > 1e-4, name


def test_clipping_bounds_the_gradient(monkeypatch):
    monkeypatch.setattr(kernels, "_core", None)  # the kernels are tested in test_optim.py
    norms = []

    def observe(gradients, limit):
        clipped, norm = train_clip(gradients, limit)
        squares = sum((g * g).sum() for _, g in tree_flatten(clipped))
        norms.append((norm.item(), squares.item() ** 0.5))
        return clipped, norm

    train_clip = training.clip_grad_norm
    monkeypatch.setattr(training, "clip_grad_norm", observe)
    training.Trainer(GPT(TINY), TrainConfig(grad_clip=1e-3, compile=False, model=TINY)).step(batches(2, 1))
    ((before, after),) = norms
    assert before > 0.1
    assert after == pytest.approx(1e-3, rel=1e-3)


def test_bfloat16_keeps_float32_weights_and_learns():
    config = TrainConfig(dtype="bfloat16", learning_rate=3e-3, warmup_iters=0, model=TINY)
    trainer = training.Trainer(GPT(TINY), config)
    (batch,) = batches(0, 1)
    losses = [trainer.step([batch]).item() for _ in range(30)]
    assert losses[-1] < losses[0] - 1
    for name, value in weights_of(trainer).items():
        assert value.dtype == np.float32, name
    float32 = training.Trainer(trainer.model, TrainConfig(model=TINY))
    assert trainer.evaluate([batch]) == pytest.approx(float32.evaluate([batch]), rel=0.02)
    assert trainer.evaluate([batch]) != float32.evaluate([batch])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_compiled_step_is_the_step(monkeypatch, dtype):
    """What a GPU runs, here on any device: MLX compiles for the CPU too, if a C++ compiler is there."""
    monkeypatch.setattr(kernels, "_core", None)
    model_config = GPTConfig(block_size=16, vocab_size=32, n_layer=1, n_head=2, n_embd=16)
    start = GPT(model_config).parameters()
    losses = {}
    for compiled in (False, True):
        model = GPT(model_config)
        model.update(start)
        config = TrainConfig(compile=compiled, learning_rate=1e-2, warmup_iters=2, dtype=dtype, model=model_config)
        monkeypatch.setattr(training, "_compiles", lambda config: config.compile)
        trainer = training.Trainer(model, config)
        losses[compiled] = [trainer.step(batches(n, 2, model_config)).item() for n in range(6)]
        losses[compiled].append(trainer.evaluate(batches(9, 1, model_config)))
    assert losses[True] == pytest.approx(losses[False], rel=1e-4 if dtype == "float32" else 2e-2)
    assert len(set(losses[True])) == 7


def test_compiled_dropout_draws_anew_at_each_step(monkeypatch):
    monkeypatch.setattr(kernels, "_core", None)
    monkeypatch.setattr(training, "_compiles", lambda config: True)
    model_config = GPTConfig(block_size=16, vocab_size=32, n_layer=1, n_head=2, n_embd=16, dropout=0.5)
    config = TrainConfig(learning_rate=1e-12, warmup_iters=0, model=model_config)
    trainer = training.Trainer(GPT(model_config), config)
    (batch,) = batches(0, 1, model_config)
    assert len({trainer.step([batch]).item() for _ in range(5)}) == 5
    assert len({trainer.evaluate([batch]) for _ in range(3)}) == 1


@pytest.mark.parametrize("restored_after", [0, 2])
@pytest.mark.parametrize("compiled", [True, False])
def test_steps_go_on_from_a_restored_state(monkeypatch, compiled, restored_after):
    """Compiled as on a GPU, and in place on the CPU's kernels, where they are."""
    if compiled:
        monkeypatch.setattr(kernels, "_core", None)
        monkeypatch.setattr(training, "_compiles", lambda config: True)
    model_config = GPTConfig(block_size=16, vocab_size=32, n_layer=1, n_head=2, n_embd=16)
    config = TrainConfig(learning_rate=1e-2, warmup_iters=2, model=model_config)
    some = batches(5, 8, model_config)
    trainer, other = (training.Trainer(GPT(model_config), config) for _ in range(2))
    for batch in some[:4]:
        trainer.step([batch])
    for batch in some[:restored_after]:
        other.step([batch])
    weights, averages = (  # copied, since the trainer updates its own in place
        {name: mx.array(np.array(a)) for name, a in arrays.items()}
        for arrays in (trainer.model.named_weights(), trainer.optimizer.averages(trainer.model))
    )
    other.model.update(tree_unflatten(list(weights.items())))
    other.optimizer.restore(other.model, 4, averages)
    other.steps = 4
    losses = [[t.step([batch]).item() for batch in some[4:]] for t in (trainer, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("how", ["kernels", "eager", "compiled"])
def test_dropout_masks_are_those_of_the_step_and_the_micro_batch(monkeypatch, how):
    """Whatever was drawn before, and whoever computes them."""
    if how != "kernels":
        monkeypatch.setattr(kernels, "_core", None)
        monkeypatch.setattr(training, "_compiles", lambda config: how == "compiled")
    model_config = GPTConfig(block_size=16, vocab_size=32, n_layer=1, n_head=2, n_embd=16, dropout=0.5)
    config = TrainConfig(learning_rate=1e-12, warmup_iters=0, model=model_config)
    start, parts = GPT(model_config).parameters(), batches(0, 4, model_config)

    def loss(some: list[training.Batch], **share: int) -> float:
        model = GPT(model_config)
        model.update(start)
        trainer = training.Trainer(model, config)
        trainer.steps = 7
        mx.random.uniform()
        return trainer.step(some, **share).item()

    whole = loss(parts)
    assert whole == loss(parts)
    halves = loss(parts[::2], first=0, apart=2), loss(parts[1::2], first=1, apart=2)
    assert sum(halves) / 2 == pytest.approx(whole, rel=1e-6)
    assert loss(parts[:1]) != loss(parts[:1], first=1)
