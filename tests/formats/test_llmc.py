"""llm.c's model files: read, and refused where the header lies."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from random_models import SHAPE, arrays, assert_same_bits, foreign_model

from mlxgpt.formats import sources
from mlxgpt.formats.foreign import ForeignModel


def write_llmc(path: Path, model: ForeignModel, version: int, padded: int) -> None:
    """As llm.c's train_gpt2.py does."""
    c = model.config
    header = np.zeros(256, np.int32)
    header[:8] = 20240326, version, c.block_size, c.vocab_size, c.n_layer, c.n_head, c.n_embd, padded
    kinds = [f"{m}.{p}" for m in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
             for p in ("weight", "bias")]  # fmt: skip
    names = ["wte.weight", "wpe.weight"]
    names += [f"h.{layer}.{kind}" for kind in kinds for layer in range(c.n_layer)]
    values = arrays(model.tensors)
    values["wte.weight"] = np.pad(values["wte.weight"], ((0, padded - c.vocab_size), (0, 0)))
    with open(path, "wb") as file:
        file.write(header.tobytes())
        for name in [*names, "ln_f.weight", "ln_f.bias"]:
            file.write(values[name].tobytes())


@pytest.mark.parametrize(("version", "dtype"), [(3, "float32"), (5, "bfloat16")])
def test_llmc(tmp_path, version, dtype):
    model = foreign_model(dtype=dtype)
    path = tmp_path / "gpt2.bin"
    write_llmc(path, model, version, padded=64)
    read = sources.read_model(path)
    assert read.config == SHAPE
    assert_same_bits(read.tensors, model.tensors)
    data = path.read_bytes()
    path.write_bytes(data[:-4])
    with pytest.raises(ValueError, match="bytes, expected"):
        sources.read_model(path)
    path.write_bytes(data[:4] + struct.pack("<i", 1) + data[8:])
    with pytest.raises(ValueError, match="format 1, expected 3"):
        sources.read_model(path)


def test_llmc_headers_that_claim_too_much(tmp_path):
    write_llmc(tmp_path / "gpt2.bin", foreign_model(), 3, padded=64)
    data = bytearray((tmp_path / "gpt2.bin").read_bytes())
    for field in range(2, 8):
        for value in (0, -1, 2**31 - 1):
            lie = bytearray(data)
            lie[4 * field : 4 * field + 4] = struct.pack("<i", value)
            (tmp_path / "lie.bin").write_bytes(lie)
            with pytest.raises(ValueError, match=r"lie\.bin"):
                sources.read_model(tmp_path / "lie.bin")
