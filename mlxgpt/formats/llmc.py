"""llm.c's model file, read: 256 int32, then one array after the other (train_gpt2.py, write_model).

There are no names: the embeddings, then each kind of parameter for all layers, then the last layer norm. Linear weights
are (n_out, n_in), the activation is the tanh GELU, and the vocabulary is padded.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..common.settings import from_dict
from ..model.config import GPTConfig
from . import gpt2, nanogpt
from .foreign import ForeignModel, checked
from .tensors import Tensor, first_rows, in_file, numpy_dtype

_MAGIC = 20240326
_HEADER_BYTES = 1024


def is_model(path: Path) -> bool:
    """Whether a file begins as llm.c's do."""
    with open(path, "rb") as file:
        return int.from_bytes(file.read(4), "little") == _MAGIC


def read(path: Path) -> ForeignModel:
    """The model in a file. ValueError for a version that is not known, and for a size that the header doesn't give."""
    with open(path, "rb") as file:
        header = np.frombuffer(file.read(_HEADER_BYTES), "<i4")
    if header.size < 256:
        raise ValueError(f"{path}: cut short inside llm.c's header")
    version, T, V, L, n_head, C, padded = (int(n) for n in header[1:8])
    if version not in (3, 5):
        raise ValueError(f"{path}: llm.c's format {version}, expected 3 (float32) or 5 (bfloat16)")
    sizes = {"block_size": T, "vocab_size": V, "n_layer": L, "n_head": n_head, "n_embd": C}
    config = from_dict(GPTConfig, sizes, source=str(path))
    if padded < V:
        raise ValueError(f"{path}: the padded vocabulary is {padded}, expected at least vocab_size = {V}")
    dtype = "float32" if version == 3 else "bfloat16"
    one_layer = gpt2.shapes(replace(config, vocab_size=padded, n_layer=1))
    of_layer = {name.removeprefix("h.0."): shape for name, shape in one_layer.items() if name.startswith("h.0.")}
    n_elements = sum(map(math.prod, one_layer.values())) + (L - 1) * sum(map(math.prod, of_layer.values()))
    expected = _HEADER_BYTES + n_elements * numpy_dtype(dtype).itemsize
    if (size := path.stat().st_size) != expected:  # before a lying header makes many layers
        raise ValueError(f"{path}: {size} bytes, expected {expected} for its header's sizes")

    order = ["wte.weight", "wpe.weight", *(f"h.{layer}.{kind}" for kind in of_layer for layer in range(L))]
    shapes, offset = gpt2.shapes(replace(config, vocab_size=padded)), _HEADER_BYTES
    tensors: dict[str, Tensor] = {}
    for name in [*order, "ln_f.weight", "ln_f.bias"]:
        tensors[name] = in_file(path, offset, dtype, shapes[name])
        offset += tensors[name].nbytes
    tensors["wte.weight"] = first_rows(tensors["wte.weight"], V)
    left_out = {f"wte.weight, rows {V} to {padded}": "padding of the vocabulary"} if padded > V else {}
    model = checked(ForeignModel("llm.c", config, tensors, left_out=left_out), path)
    nanogpt.add_tokenizer(model, path.parent)
    return model
