"""Training's steps: the curve beside PyTorch's, accumulation, clipping, and the same when compiled."""

from __future__ import annotations

import dataclasses

import golden
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlxgpt.cpu import extension
from mlxgpt.cpu.array import Array
from mlxgpt.model import ops
from mlxgpt.model.config import GPTConfig
from mlxgpt.model.gpt import GPT
from mlxgpt.training import trainer as training
from mlxgpt.training.distributed import Group
from mlxgpt.training.optim import AdamW, clip_factor, global_norm, learning_rate
from mlxgpt.training.recipe import TrainConfig

TINY = GPTConfig(block_size=16, vocab_size=32, n_layer=2, n_head=2, n_embd=32)


def batches(seed: int, n: int, config: GPTConfig = TINY, size: int = 4) -> list[training.Batch]:
    ids = np.random.default_rng(seed).integers(0, config.vocab_size, (n, size, config.block_size + 1)).astype(np.int32)
    return [(a[:, :-1], a[:, 1:]) for a in ids]


def weights_of(trainer: training.Trainer) -> dict[str, np.ndarray]:
    return {name: np.array(p) for name, p in tree_flatten(trainer.model.parameters())}


def arrays_of(trainer: training.Trainer) -> dict[str, np.ndarray]:
    """Weights, averages and the optimizer's step."""
    tree = {"model": trainer.model.parameters(), "optimizer": trainer.optimizer.state}
    return {name: np.array(a) for name, a in tree_flatten(tree) if name != "optimizer.learning_rate"}


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


def test_accumulated_micro_batches_are_one_large_batch(monkeypatch, switch_off_kernels):
    switch_off_kernels()  # the kernels are tested in test_optim.py
    trainer = training.Trainer(GPT(TINY), TrainConfig(model=TINY), compiled=False)
    seen = []

    def update(self, model, gradients, loss, max_norm):
        seen.append(dict(tree_flatten(gradients)))
        return mx.array(0.0)

    monkeypatch.setattr(AdamW, "update_if_finite", update)
    parts = batches(1, 3)
    whole = tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    losses = [trainer.step(micro_batches).item() for micro_batches in (parts, [whole])]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for name, gradient in seen[0].items():
        assert np.abs(np.array(gradient - seen[1][name])).max() < 1e-6, name
        assert mx.abs(gradient).max().item() > 1e-4, name


def test_clipping_bounds_the_gradient(switch_off_kernels):
    switch_off_kernels()  # the kernels are tested in test_optim.py
    config = TrainConfig(grad_clip=1e-3, beta1=0.0, compile=False, model=TINY)
    trainer = training.Trainer(GPT(TINY), config)
    trainer.step(batches(2, 1))
    averages = trainer.optimizer.averages(trainer.model)  # without beta1 of the clipped gradient alone
    squares = sum(mx.square(a).sum().item() for name, a in averages.items() if name.startswith("m."))
    assert trainer.norm.item() > 0.1
    assert squares**0.5 == pytest.approx(1e-3, rel=1e-3)


def trainer_on(path: str, switch_off_kernels, model: GPT, config: TrainConfig, *group: Group) -> training.Trainer:
    """A trainer whose steps are taken on the CPU's kernels, or by MLX's operations, compiled as on a GPU or not."""
    if path == "kernels":
        ops.use_device("cpu")
        if not extension.available():
            pytest.skip("the extension is not there")
    else:
        switch_off_kernels()
    return training.Trainer(model, config, *group, compiled=path == "compiled")


SMALL = GPTConfig(block_size=16, vocab_size=32, n_layer=1, n_head=2, n_embd=16)


@pytest.mark.parametrize("path", ["kernels", "eager"])
@pytest.mark.parametrize("fault", ["gradient", "loss"])
def test_a_step_that_is_not_finite_changes_nothing(monkeypatch, switch_off_kernels, path, fault):
    config = TrainConfig(warmup_iters=0, model=SMALL)
    trainer, other = (trainer_on(path, switch_off_kernels, GPT(SMALL), config) for _ in range(2))
    other.model.update(tree_map(lambda p: mx.array(np.array(p)), trainer.model.parameters()))
    some = batches(3, 4, SMALL)
    for t in (trainer, other):
        t.step(some[:1])
    before = arrays_of(trainer)
    with monkeypatch.context() as faulty:
        spoil(faulty, fault)
        loss = trainer.step(some[1:2]).item()
    assert (np.isfinite(loss), np.isfinite(trainer.norm.item())) == (fault == "gradient", False)
    for name, a in arrays_of(trainer).items():
        np.testing.assert_array_equal(a, before[name], err_msg=name)
    trainer.steps = other.steps  # of the learning rate; the optimizer's own did not count it
    losses = [[t.step([batch]).item() for batch in some[2:]] for t in (trainer, other)]
    assert losses[0] == losses[1]
    assert np.isfinite(trainer.norm.item()) and np.isfinite(losses[0]).all()


def spoil(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """Makes the loss infinite, or its gradient NaN."""
    loss_of = GPT.loss

    def spoilt(model, ids, targets):
        loss = loss_of(model, ids, targets)
        if isinstance(loss, mx.array):  # the slope of a square root at 0 is infinite
            return loss * mx.inf if fault == "loss" else loss + mx.sqrt(loss - loss)
        gradient = loss.tape.gradient_for((), loss)
        loss.tape.record(gradient, lambda dloss: loss.gradient.add(dloss * np.float32(np.nan)))
        return Array(loss.values * np.inf if fault == "loss" else loss.values, loss.tape, gradient)

    monkeypatch.setattr(GPT, "loss", spoilt)


@pytest.mark.parametrize("path", ["kernels", "eager", "compiled"])
def test_blocks_that_are_computed_again_give_the_same_gradients(switch_off_kernels, path):
    """With dropout, whose masks are the same both times; compiled, against what is not."""
    config = dataclasses.replace(SMALL, n_layer=2 if path != "compiled" else 1, dropout=0.3)
    start = GPT(config).parameters()
    runs = []
    for again in (False, True):
        how = path if again or path != "compiled" else "eager"
        mx.random.seed(3)
        model = GPT(config)
        model.update(tree_map(lambda p: mx.array(np.array(p)), start))
        options = TrainConfig(grad_checkpoint=again, warmup_iters=0, model=config)
        trainer = trainer_on(how, switch_off_kernels, model, options)
        assert model.grad_checkpoint == again
        losses = [trainer.step(batches(n, 2, config)).item() for n in range(3)]
        runs.append((losses, trainer.norm.item(), arrays_of(trainer), trainer.evaluate(batches(9, 1, config))))
    (losses, norm, arrays, evaluated), again = runs
    exact = 0 if path == "kernels" else 1e-5
    assert again[:2] == (pytest.approx(losses, rel=exact), pytest.approx(norm, rel=exact))
    assert again[3] == pytest.approx(evaluated, rel=exact)
    for name, a in again[2].items():
        assert np.abs(a - arrays[name]).max() <= exact, name
    assert len(set(losses)) == 3


@pytest.mark.parametrize("loss", [1.0, np.nan])
@pytest.mark.parametrize("element", [1.0, np.nan, np.inf])
def test_the_compiled_update_skips_what_is_not_finite(loss, element):
    model, optimizer = nn.Linear(2, 3), AdamW(TrainConfig())
    optimizer.init(model.parameters())
    state = [model.state, optimizer.state]
    update = mx.compile(lambda *args: optimizer.update_if_finite(model, *args, 1.0), state, state)
    before = {name: np.array(a) for name, a in tree_flatten(state)}
    gradients = {"weight": mx.ones((3, 2)), "bias": mx.array([1.0, element, 1.0])}
    norm = update(gradients, mx.array(loss))
    finite = bool(np.isfinite(loss + element))
    assert np.isfinite(norm.item()) == finite
    assert optimizer.step.item() == finite
    for name, a in tree_flatten(state):
        assert np.array_equal(a, before[name]) == (not finite or name == "1.learning_rate"), name


@pytest.mark.parametrize("size", [0.0, 1e-3, 1e25])
def test_the_norm_is_of_gradients_of_any_size(size):
    gradients = {"a": mx.array([3.0, 0.0]) * size, "b": [mx.array([[-4.0]]) * size]}
    norm = global_norm(gradients)
    assert norm.item() == pytest.approx(5 * size, rel=1e-6)
    assert clip_factor(norm, 1.0).item() == pytest.approx(min(1, 1 / (5 * size + 1e-6)), rel=1e-6)
    assert clip_factor(norm, 0.0).item() == 1


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
def test_the_compiled_step_is_the_step(switch_off_kernels, dtype):
    """What a GPU runs, here on any device: MLX compiles for the CPU too, if a C++ compiler is there."""
    switch_off_kernels()
    model_config = GPTConfig(block_size=16, vocab_size=32, n_layer=1, n_head=2, n_embd=16)
    start = GPT(model_config).parameters()
    losses = {}
    for compiled in (False, True):
        model = GPT(model_config)
        model.update(start)
        config = TrainConfig(learning_rate=1e-2, warmup_iters=2, dtype=dtype, model=model_config)
        trainer = training.Trainer(model, config, compiled=compiled)
        losses[compiled] = [trainer.step(batches(n, 2, model_config)).item() for n in range(6)]
        losses[compiled].append(trainer.evaluate(batches(9, 1, model_config)))
    assert losses[True] == pytest.approx(losses[False], rel=1e-4 if dtype == "float32" else 2e-2)
    assert len(set(losses[True])) == 7


def test_compiled_dropout_draws_anew_at_each_step(switch_off_kernels):
    switch_off_kernels()
    model_config = GPTConfig(block_size=16, vocab_size=32, n_layer=1, n_head=2, n_embd=16, dropout=0.5)
    config = TrainConfig(learning_rate=1e-12, warmup_iters=0, model=model_config)
    trainer = training.Trainer(GPT(model_config), config, compiled=True)
    (batch,) = batches(0, 1, model_config)
    assert len({trainer.step([batch]).item() for _ in range(5)}) == 5
    assert len({trainer.evaluate([batch]) for _ in range(3)}) == 1


@pytest.mark.parametrize("restored_after", [0, 2])
@pytest.mark.parametrize("compiled", [True, False])
def test_steps_go_on_from_a_restored_state(switch_off_kernels, compiled, restored_after):
    """Compiled as on a GPU, and in place on the CPU's kernels, where they are."""
    if compiled:
        switch_off_kernels()
    model_config = GPTConfig(block_size=16, vocab_size=32, n_layer=1, n_head=2, n_embd=16)
    config = TrainConfig(learning_rate=1e-2, warmup_iters=2, model=model_config)
    some = batches(5, 8, model_config)
    trainer, other = (training.Trainer(GPT(model_config), config, compiled=compiled) for _ in range(2))
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
def test_dropout_masks_are_those_of_the_step_and_the_micro_batch(switch_off_kernels, how):
    """Whatever was drawn before, and whoever computes them."""
    model_config = GPTConfig(block_size=16, vocab_size=32, n_layer=1, n_head=2, n_embd=16, dropout=0.5)
    config = TrainConfig(learning_rate=1e-12, warmup_iters=0, model=model_config)
    start, parts = GPT(model_config).parameters(), batches(0, 4, model_config)

    def loss(some: list[training.Batch], rank: int = 0, size: int = 1) -> float:
        model, group = GPT(model_config), Group()
        model.update(start)
        group.rank, group.size = rank, size
        trainer = trainer_on(how, switch_off_kernels, model, config, group)
        trainer.steps = 7
        mx.random.uniform()
        return trainer.step(some).item()

    whole = loss(parts)
    assert whole == loss(parts)
    halves = loss(parts[::2], 0, 2), loss(parts[1::2], 1, 2)
    assert sum(halves) / 2 == pytest.approx(whole, rel=1e-6)
    assert loss(parts[:1]) != loss(parts[:1], 1, 2)
