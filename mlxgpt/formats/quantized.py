"""Quantized weights, as mlx_lm writes and reads them.

In a quantized model directory config.json holds "quantization": {"group_size": 64, "bits": 4}. Names begin with
`model.`, and linear weights are (n_out, n_in). Of each matrix (n_out, n_in) whose rows can be cut into groups, wte and
wpe among them, model.safetensors holds three tensors: NAME.weight, uint32 (n_out, n_in bits / 32), and NAME.scales and
NAME.biases, (n_out, n_in / group_size). A weight is scale * number + bias.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..cpu import memory
from ..model.gpt import GPT
from .mlx_arrays import dtype_name, mlx_dtype, to_mlx, to_numpy
from .tensors import Tensor, row_blocks, to_float32

GROUP_SIZE = 64
_PARTS = ("weight", "scales", "biases")


def quantize(weights: Mapping[str, mx.array], bits: int, group_size: int = GROUP_SIZE) -> dict[str, mx.array]:
    """What a quantized directory's model.safetensors holds for some of a model's weights, of any floating type.

    Names and layouts are this package's on the way in, mlx_lm's on the way out. Matrices whose rows are no multiple of
    group_size, and vectors, stay as they are. ValueError for bits or a group_size that MLX doesn't have.
    """
    tensors: dict[str, mx.array] = {}
    for name, p in weights.items():
        file_name = name if name.startswith("lm_head.") else f"model.{name}"
        if p.ndim == 2 and p.shape[1] % group_size == 0:
            module = file_name.removesuffix(".weight")
            parts = mx.quantize(p, group_size, bits)
            tensors |= {f"{module}.{part}": t for part, t in zip(_PARTS, parts, strict=True)}
        else:
            tensors[file_name] = p
    return tensors


def quantized_tensors(weights: Mapping[str, Tensor], bits: int) -> dict[str, Tensor]:
    """What `quantize` makes, as tensors: a matrix is read and quantized when the first of its parts is read."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        tensors |= _quantized(name, tensor, bits)
    return tensors


def _quantized(name: str, tensor: Tensor, bits: int) -> dict[str, Tensor]:
    unread: dict[str, np.ndarray] = {}  # the parts that have not been read yet

    def make() -> None:
        parts: dict[str, list[np.ndarray]] = {}
        for rows in row_blocks(tensor):  # each row has groups of its own
            # by way of float32, since NumPy has no bfloat16
            block = mx.array(to_float32(tensor.read()[rows], tensor.dtype)).astype(mlx_dtype(tensor.dtype))
            for part, array in quantize({name: block}, bits).items():
                parts.setdefault(part, []).append(to_numpy(array))
        unread.update({part: np.concatenate(arrays) for part, arrays in parts.items()})

    def reader(part: str) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            if part not in unread:
                make()
            return unread.pop(part)

        return read

    # MLX is lazy: this tells shapes and types, and computes nothing
    like = quantize({name: mx.zeros(tensor.shape, mlx_dtype(tensor.dtype))}, bits)
    return {part: Tensor(dtype_name(a), tuple(a.shape), reader(part)) for part, a in like.items()}


def dequantized(
    tensors: Mapping[str, Tensor], bits: int, group_size: int, path: Path
) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, ...]]]:
    """The tensors of a quantized file with each quantized matrix as one tensor in float32, which is computed when it is
    read; and the three parts of each such matrix, by its name.

    ValueError for parts that are missing or don't fit together.
    """
    tensors = dict(tensors)
    parts_of: dict[str, tuple[Tensor, ...]] = {}
    for module in [name.removesuffix(".scales") for name in tensors if name.endswith(".scales")]:
        packed, scales, biases = (tensors.pop(f"{module}.{part}", None) for part in _PARTS)
        if packed is None or scales is None or biases is None:
            raise ValueError(f"{path}: of {module}'s weight, scales and biases one is missing")
        parts = (packed, scales, biases)

        def weight(parts: tuple[Tensor, ...], to_array: Callable[[Tensor], mx.array]) -> mx.array:
            packed, scales, biases = map(to_array, parts)
            return mx.dequantize(packed, scales.astype(mx.float32), biases.astype(mx.float32), group_size, bits)

        def read(parts: tuple[Tensor, ...] = parts) -> np.ndarray:
            return np.array(weight(parts, to_mlx), copy=False)

        try:
            if scales.shape != biases.shape:  # MLX would read past the end
                raise ValueError(f"scales are {scales.shape}, but biases {biases.shape}")
            shape = weight(parts, lambda t: mx.zeros(t.shape, mlx_dtype(t.dtype))).shape  # never evaluated
        except ValueError as error:
            raise ValueError(f"{path}: {module} can't be dequantized: {error}") from None
        tensors[f"{module}.weight"] = Tensor("float32", tuple(shape), read)
        parts_of[f"{module}.weight"] = parts
    return tensors, parts_of


def fill_quantized(model: GPT, name: str, parts: tuple[Tensor, ...], group_size: int, path: Path) -> None:
    """Puts the parts of a quantized matrix into the module that has the weight of this name. ValueError for a value
    that is not finite."""
    module_name = name.removesuffix(".weight")
    (module,) = (module for name, module in model.named_modules() if name == module_name)
    for part, tensor in zip(_PARTS[1:], parts[1:], strict=True):
        x = tensor.read()
        if not memory.copy(x, np.empty(x.shape, x.dtype.newbyteorder("="))):
            raise ValueError(f"{path}: {module_name}.{part} holds a value that is not finite (NaN or infinity)")
    module.weight, module.scales, module.biases = map(to_mlx, parts)
    module.group_size = group_size
