"""Models whose parameters are all different, for the tests of formats, and comparisons of what becomes of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlxgpt.formats import model_directory
from mlxgpt.formats.foreign import ForeignModel
from mlxgpt.formats.tensors import Tensor, cast
from mlxgpt.model.config import GPTConfig
from mlxgpt.model.gpt import GPT

SHAPE = GPTConfig(block_size=16, vocab_size=29, n_layer=2, n_head=3, n_embd=12)
TINY = GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=8)


def logits_of(directory: Path, ids: np.ndarray) -> np.ndarray:
    return np.array(model_directory.load_model(directory)(mx.array(ids.astype(np.int32))))


def arrays(tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: np.array(t.read()) for name, t in tensors.items()}


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert {n: (t.dtype, t.shape) for n, t in a.items()} == {n: (t.dtype, t.shape) for n, t in b.items()}
    for name, tensor in a.items():
        np.testing.assert_array_equal(np.array(tensor.read()), np.array(b[name].read()), err_msg=name)


def foreign_model(config: GPTConfig = SHAPE, dtype: str = "float32", seed: int = 0) -> ForeignModel:
    """A model as another program may have left it, with values that are all different, so that no mistake of layout
    hides."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, p in GPT(config).named_weights().items():
        values = rng.standard_normal(p.shape).astype(np.float32) * 0.1
        tensors[name] = cast(name, Tensor("float32", values.shape, lambda v=values: v), dtype)
    return ForeignModel("made", config, tensors)


def random_gpt(config: GPTConfig = TINY) -> GPT:
    """A GPT without the zeros and ones of a new one, so that a swapped or forgotten tensor shows."""
    model = GPT(config)
    for name, p in tree_flatten(model.parameters()):
        if p.ndim == 1:
            module = model
            *path, leaf = name.split(".")
            for part in path:
                module = module[int(part)] if part.isdigit() else module[part]
            module[leaf] = p + mx.random.normal(p.shape)
    return model


def rewrite(directory: Path, change: Callable[[dict[str, mx.array]], object]) -> None:
    """Changes the weights of a model directory in place."""
    weights = mx.load(str(directory / "model.safetensors"))
    mx.eval(weights)
    change(weights)
    mx.save_safetensors(str(directory / "model.safetensors"), weights, {"format": "pt"})
