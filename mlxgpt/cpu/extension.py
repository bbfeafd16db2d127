"""The C++ extension mlxgpt._core: found once, with what it can do here, and a switch that leaves it out.

The only importer of _core.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlx.core as mx


def _load() -> Any:
    """The module _core; None where it was not built, or MLXGPT_KERNELS=0 leaves it out."""
    if os.environ.get("MLXGPT_KERNELS") == "0" or not find_spec("mlxgpt._core"):
        return None
    try:
        return import_module("mlxgpt._core")
    except ImportError:
        # The extension looks for its BLAS beside itself. Where packages are installed in several places it may lie
        # elsewhere, and is found when it is loaded already.
        blas = find_spec("scipy_openblas32")
        if blas is None or not blas.submodule_search_locations:
            raise
        for library in Path(blas.submodule_search_locations[0], "lib").glob("libscipy_openblas.*"):
            ctypes.CDLL(str(library))
        return import_module("mlxgpt._core")


core: Any = _load()
_switched_off = False

# Types of weights that kernels read; uint32 holds quantized ones.
_READABLE = {mx.float32, mx.float16, mx.bfloat16, mx.uint32}


@contextmanager
def switched_off() -> Iterator[None]:
    """While it is entered, the whole process computes as if the extension were not there: by MLX's operations."""
    global _switched_off
    before, _switched_off = _switched_off, True
    try:
        yield
    finally:
        _switched_off = before


def is_there() -> bool:
    """Whether the extension was built and is not switched off."""
    return core is not None and not _switched_off


def is_used() -> bool:
    """Whether a model computes on the kernels: on the CPU, with the extension there."""
    return is_there() and mx.default_device().type == mx.cpu


def available(dtype: mx.Dtype = mx.float32) -> bool:
    """Whether a model of this type is trained on the kernels, which is so for float32 on the CPU."""
    return dtype == mx.float32 and is_used()


def can_read(dtypes: Iterable[mx.Dtype]) -> bool:
    """Whether a model whose weights are stored in these types runs on the kernels, without a gradient."""
    return is_used() and all(dtype in _READABLE for dtype in dtypes)


def computes_quantized(bits: int) -> bool:
    """Whether weights quantized to so many bits are computed with as they are: by the kernels, or by MLX on a GPU."""
    return bits in (4, 8) if is_used() else bits > 0
