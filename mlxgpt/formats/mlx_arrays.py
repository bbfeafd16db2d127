"""Tensors as MLX arrays in this package's layout, and arrays as tensors."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_unflatten

from ..cpu import extension, memory
from ..model.config import GPTConfig
from ..model.gpt import GPT
from . import gpt2, safetensors_file
from .tensors import Tensor


def mlx_dtype(name: str) -> mx.Dtype:
    return getattr(mx, "bool_" if name == "bool" else name)  # type: ignore[no-any-return]


def dtype_name(array: mx.array) -> str:
    return str(array.dtype).removeprefix("mlx.core.")


def to_mlx(tensor: Tensor) -> mx.array:
    """A tensor as it is, in memory of its own."""
    array = mx.array(tensor.read())
    return array.view(mx.bfloat16) if tensor.dtype == "bfloat16" else array


def to_numpy(array: mx.array) -> np.ndarray:
    """A copy of an array as Tensor.read would give it."""
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


def as_tensors(arrays: Mapping[str, mx.array]) -> dict[str, Tensor]:
    """Arrays as tensors in the arrays' own memory. The arrays are evaluated, so that any thread may read them."""
    readable = {name: a.view(mx.uint16) if a.dtype == mx.bfloat16 else a for name, a in arrays.items()}
    mx.eval(readable)
    views = {name: np.array(a, copy=False) for name, a in readable.items()}
    return {name: Tensor(dtype_name(arrays[name]), x.shape, x.view) for name, x in views.items()}


def load_arrays(
    tensors: Mapping[str, Tensor],
    path: Path,
    dtype: mx.Dtype | None = mx.float32,
) -> dict[str, mx.array]:
    """Tensors as arrays; each is read, checked and copied once.

    The arrays are of one floating-point type. If that is None they keep half precision, but on the CPU's kernels
    vectors and positions are float32. ValueError, with the path, names a tensor with a value that is not finite.
    """
    halves = [half for half in ("float16", "bfloat16") if dtype is None or dtype == mlx_dtype(half)]

    def stays(name: str, tensor: Tensor) -> bool:
        is_matrix = len(tensor.shape) == 2 and name != "wpe.weight"
        return tensor.dtype in halves and (is_matrix or dtype is not None or not extension.is_used())

    types = {name: t.dtype if stays(name, t) else "float32" for name, t in tensors.items()}
    on_cpu = mx.default_device().type == mx.cpu  # where the memory of an array that nobody else holds may be written to
    arrays = uninitialized({name: (types[name], t.shape) for name, t in tensors.items()}) if on_cpu else {}
    # The largest first: while it is read, its file's pages take memory too, and the copies of the others none yet.
    for name in sorted(tensors, key=lambda name: tensors[name].nbytes, reverse=True):
        x, is_bfloat16 = tensors[name].read(), types[name] == "bfloat16"
        if on_cpu:
            out = np.array(arrays[name].view(mx.uint16) if is_bfloat16 else arrays[name], copy=False)
        else:
            out = np.empty(x.shape, "uint16" if is_bfloat16 else types[name])
        if not memory.copy(x, out):
            raise ValueError(f"{path}: {name} holds a value that is not finite (NaN or infinity)")
        if not on_cpu:
            arrays[name] = mx.array(out).view(mx.bfloat16) if is_bfloat16 else mx.array(out)
        if dtype is not None:
            arrays[name] = arrays[name].astype(dtype)
    return arrays


def fill(model: GPT, arrays: Mapping[str, mx.array]) -> GPT:
    """Puts arrays into a model by their names, and makes it ready for evaluation."""
    model.update(tree_unflatten(list(arrays.items())))
    mx.eval(model.parameters())
    model.eval()
    return model


def model_of(config: GPTConfig, tensors: Mapping[str, Tensor], source: Path) -> GPT:
    """A float32 model of tensors by GPT-2's names and in this package's layout, ready for evaluation.

    ValueError, naming the source, lists missing, unknown and misshapen tensors, or names one with a value that is not
    finite.
    """
    gpt2.check_model(tensors, config, source)
    return fill(GPT(config), load_arrays(tensors, source))


def copy_weights(source: GPT, model: GPT) -> None:
    """Puts a model's weights into another of the same shape, which may have fewer positions."""
    weights = source.named_weights()
    weights["wpe.weight"] = weights["wpe.weight"][: model.config.block_size]
    model.update(tree_unflatten(list(weights.items())))


# ---- arrays that nobody has written to ----


class HeaderOnly:
    """A safetensors file for mx.load that has a header and no content: reading past the header leaves the reader's
    memory as it was."""

    closed = False

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._header, self._position = safetensors_file.header(tensors), 0
        self._size = len(self._header) + sum(t.nbytes for t in tensors.values())

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + (0, self._position, self._size)[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, memory: Any) -> int:
        part = self._header[self._position : self._position + len(memory)]
        memory[: len(part)] = part
        self._position += len(memory)
        return len(memory)


def uninitialized(like: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, mx.array]:
    """Arrays of some types and shapes, {name: (dtype, shape)}, that hold nothing yet: their maker writes to them.

    MLX's own functions write to every array that they make, which for a model's weights takes as long as copying them.
    But a file is read into an array that nobody has written to.
    """
    file = HeaderOnly({name: Tensor(dtype, shape, lambda: np.empty(0)) for name, (dtype, shape) in like.items()})
    held = weakref.ref(file)
    arrays = mx.load(file, format="safetensors")  # type: ignore[arg-type]
    del file
    # A thread of MLX's lets go of the file a moment later; an interpreter that had ended by then would abort.
    for _ in range(1000):
        if held() is None:
            break
        time.sleep(1e-4)
    return arrays  # type: ignore[return-value]
