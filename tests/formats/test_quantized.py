"""Quantized weights: the layout that mlx_lm reads, and parts that do not fit."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from random_models import SHAPE, TINY, foreign_model, logits_of, random_gpt, rewrite

from mlxgpt.formats import gpt2, hugging_face, model_directory, quantized, safetensors_file
from mlxgpt.model.gpt import GPT

WIDE = replace(TINY, n_embd=96)  # of which only mlp.c_proj's rows, 384 long, are a multiple of 64


def save_quantized(directory: Path, model: GPT, bits: int, group_size: int = 64) -> Path:
    directory.mkdir()
    quantization = {"group_size": group_size, "bits": bits}
    (directory / "config.json").write_bytes(gpt2.config_json(model.config, quantization=quantization))
    weights = model_directory.with_zero_biases(model.named_weights(), model.config)
    mx.save_safetensors(str(directory / "model.safetensors"), quantized.quantize(weights, bits, group_size))
    return directory


@pytest.mark.parametrize("options", [{}, dict(bias=False), dict(tied_head=False)])
@pytest.mark.parametrize(("bits", "group_size"), [(4, 64), (8, 64), (4, 32)])
def test_quantized_weights_are_scale_times_number_plus_bias(tmp_path, bits, group_size, options):
    model = random_gpt(replace(WIDE, **options))
    directory = save_quantized(tmp_path / "q", model, bits, group_size)
    file = {name: np.array(t) for name, t in mx.load(str(directory / "model.safetensors")).items()}
    loaded, original = model_directory.load_model(directory).named_weights(), model.named_weights()
    assert loaded.keys() == original.keys()
    packed = []
    for name, p in loaded.items():
        file_name = name if name == "lm_head.weight" else f"model.{name}"
        module = file_name.removesuffix(".weight")
        if f"{module}.scales" not in file:
            assert np.array_equal(np.array(p), file[file_name]), name
            continue
        packed.append(name)
        words, scales, biases = (file[f"{module}.{part}"] for part in ("weight", "scales", "biases"))
        numbers = (words[..., None] >> np.arange(0, 32, bits, dtype=np.uint32)) & (2**bits - 1)  # lowest bits first
        numbers = numbers.reshape(len(words), -1, group_size)  # (n_out, n_in / group_size, group_size)
        expected = (scales[..., None] * numbers + biases[..., None]).reshape(p.shape)
        assert np.abs(np.array(p) - expected).max() < 1e-6, name
        assert np.abs(np.array(p - original[name])).max() < (0.02 if bits == 4 else 0.002), name
    matrices = [name for name, p in original.items() if p.ndim == 2]
    assert packed == (matrices if group_size == 32 else ["h.0.mlp.c_proj.weight", "h.1.mlp.c_proj.weight"])


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("scales", None, "unknown h.0.mlp.c_proj.biases"),
        ("biases", None, "of h.0.mlp.c_proj's weight, scales and biases one is missing"),
        ("biases", mx.zeros((96, 7)), r"h.0.mlp.c_proj can't be dequantized: scales are \(96, 6\), but"),
        ("weight", mx.zeros((96, 47), mx.uint32), r"h.0.mlp.c_proj can't be dequantized: "),
        ("weight", mx.zeros((96, 48)), r"h.0.mlp.c_proj can't be dequantized: "),
        ("scales", mx.full((96, 6), np.inf), "h.0.mlp.c_proj.weight holds a value that is not finite"),
    ],
)
def test_quantized_tensors_that_do_not_fit_are_named(tmp_path, name, tensor, message):
    def change(weights):
        weights[f"model.h.0.mlp.c_proj.{name}"] = tensor
        if tensor is None:
            del weights[f"model.h.0.mlp.c_proj.{name}"]

    directory = save_quantized(tmp_path / "q", random_gpt(WIDE), 4)
    rewrite(directory, change)
    with pytest.raises(ValueError, match=message):
        model_directory.load_model(directory)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized(tmp_path, bits):
    config = dataclasses.replace(SHAPE, n_embd=192)
    model = foreign_model(config)
    hugging_face.write(tmp_path / "model", model, bits)
    tensors = safetensors_file.read(tmp_path / "model" / "model.safetensors")
    groups = json.loads((tmp_path / "model" / "config.json").read_text())["quantization"]
    assert groups == {"group_size": 64, "bits": bits}
    for name in ("wte", "wpe", "h.1.attn.c_proj", "h.0.mlp.c_proj"):
        part = [mx.array(tensors[f"model.{name}.{kind}"].read()) for kind in ("weight", "scales", "biases")]
        back = np.array(mx.dequantize(*part, group_size=64, bits=bits))
        step = np.abs(np.array(part[1])).max()
        np.testing.assert_allclose(back, model.tensors[f"{name}.weight"].read(), atol=step)
    logits = logits_of(tmp_path / "model", np.arange(16)[None])
    hugging_face.write(tmp_path / "whole", model)
    expected = logits_of(tmp_path / "whole", np.arange(16)[None])
    assert 0 < np.abs(logits - expected).max() < {8: 0.1, 4: 1.5}[bits]
