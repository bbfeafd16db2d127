"""Predicted memory against what steps and evaluations took."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxgpt.cpu import extension
from mlxgpt.model import ops
from mlxgpt.model.config import GPTConfig
from mlxgpt.training import footprint
from mlxgpt.training.origin import outline
from mlxgpt.training.recipe import TrainConfig
from mlxgpt.training.trainer import Trainer

# Steps of training in a process of their own, or an evaluation, and how far its memory was above what it was before.
MEASURE = """
import json, mlx.core as mx, numpy as np, sys
from mlxgpt.model import ops
from mlxgpt.model.config import GPTConfig
from mlxgpt.training.origin import outline
from mlxgpt.training.recipe import TrainConfig
from mlxgpt.training.trainer import Trainer

def bytes_of(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))

def train(settings, **shape):
    config = TrainConfig(**settings, model=GPTConfig(**shape))
    trainer = Trainer(outline(config), config)
    ids = np.zeros((config.batch_size, config.model.block_size), np.int32)
    for _ in range(4 if sys.argv[2] == "steps" else 0):
        trainer.step([(ids, ids)]).item()
    if sys.argv[2] == "evaluation":
        mx.eval(trainer.optimizer.state)
        trainer.evaluate([(ids, ids)] * 2)

ops.use_device("cpu")
train({}, block_size=8, vocab_size=10, n_layer=1, n_head=1, n_embd=16)
before = bytes_of("VmRSS")
train(json.loads(sys.argv[1]), **json.loads(sys.argv[3]))
print(bytes_of("VmHWM") - before)
"""
SHAPE = {"block_size": 128, "vocab_size": 96, "n_layer": 6, "n_head": 4, "n_embd": 192}
SMALL = {"block_size": 128, "n_embd": 128, "n_head": 4, "n_layer": 4}  # for MLX, which is slow on a CPU
SETTINGS = [
    {},
    {"grad_checkpoint": True},
    {"lora_rank": 4},
    {"freeze": "wte,wpe,h.0,h.1,h.2"},
    {"freeze": "wte,wpe,h.0,h.1,h.2", "grad_checkpoint": True},
    {"freeze": "wte,wpe,h"},
]


def config_of(settings: dict, **shape: int) -> TrainConfig:
    return TrainConfig(**settings, model=GPTConfig(**{**SHAPE, **shape}))


@pytest.fixture
def measure_kernels(run_python):
    """What steps or an evaluation with some settings take on the kernels, measured in a process of its own."""
    if not extension.is_there():
        pytest.skip("the extension is not there")
    if not Path("/proc/self/status").exists():
        pytest.skip("only Linux says how much memory a process had")

    def measure(settings: dict, what: str) -> int:
        result = run_python("-c", MEASURE, json.dumps(settings), what, json.dumps(SHAPE))
        assert not result.returncode, result.stderr
        return int(result.stdout)

    return measure


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_steps_on_the_kernels_take_the_memory_that_is_said(measure_kernels, settings):
    config = config_of(settings)
    expected = footprint.memory_on_kernels(outline(config), config.batch_size, config.grad_checkpoint).total
    assert measure_kernels(settings, "steps") == pytest.approx(expected, rel=0.1)


def test_an_evaluation_on_the_kernels_takes_no_more_than_is_said(measure_kernels):
    ops.use_device("cpu")
    config = config_of({})
    model = outline(config)
    gradients = 4 * model.n_params()  # which training on the kernels holds between steps, too
    expected = footprint.evaluation_memory(model, config.batch_size, mx.float32) - gradients
    assert 0.8 * expected < measure_kernels({}, "evaluation") < 1.1 * expected


def measure_mlx(config: TrainConfig, evaluates: bool = False) -> int:
    gc.collect()
    mx.synchronize()
    before = mx.get_active_memory()
    trainer = Trainer(outline(config), config)
    ids = np.zeros((config.batch_size, config.model.block_size), np.int32)
    for _ in range(1 if evaluates else 2):
        mx.eval(trainer.model.parameters(), trainer.optimizer.state)
        mx.reset_peak_memory()
        if evaluates:
            trainer.evaluate([(ids, ids)])
        else:
            trainer.step([(ids, ids)] * config.gradient_accumulation_steps).item()
        mx.synchronize()
    return mx.get_peak_memory() - before


@pytest.mark.parametrize(
    "settings",
    [
        *SETTINGS,
        {"lora_rank": 4, "grad_checkpoint": True},
        {"dtype": "bfloat16"},
        {"batch_size": 2, "gradient_accumulation_steps": 3},
    ],
    ids=str,
)
def test_steps_by_mlx_take_the_memory_that_is_said(switch_off_kernels, settings):
    ops.use_device("cpu")
    switch_off_kernels()
    config = config_of(settings, **SMALL)
    dtype = getattr(mx, config.dtype)
    accumulates, size = config.gradient_accumulation_steps > 1, config.batch_size
    expected = footprint.step_memory(outline(config), size, config.grad_checkpoint, dtype, accumulates).total
    # How far MLX plans ahead, and so what it holds, is less on a machine that has nothing else to do.
    assert 0.7 * expected < measure_mlx(config) < 1.12 * expected


def test_an_evaluation_by_mlx_takes_no_more_than_is_said(switch_off_kernels):
    ops.use_device("cpu")
    switch_off_kernels()
    config = config_of({}, **SMALL)
    expected = footprint.evaluation_memory(outline(config), config.batch_size, mx.float32)
    assert 0.6 * expected < measure_mlx(config, evaluates=True) < 1.12 * expected


def test_nothing_is_allocated_for_a_prediction():
    config = TrainConfig(model=GPTConfig(n_layer=48, n_embd=1600, n_head=25))
    before = mx.get_active_memory()
    model = outline(config)
    for dtype in (mx.float32, mx.bfloat16, mx.float16):
        assert footprint.step_memory(model, 1, True, dtype).total > footprint.parameter_memory(model)
    assert footprint.weights_and_averages(model) + 4 * model.n_params() == footprint.parameter_memory(model)
    assert footprint.copied_for_checkpoint(model) == 3 * 4 * model.n_params()
    assert mx.get_active_memory() - before < 1_000_000
