"""Model directories: written whole, read strictly, opened by Hugging Face's names and layouts."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import golden
import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from random_models import TINY, random_gpt, rewrite

from mlxgpt.cpu import extension
from mlxgpt.data import tokenizer
from mlxgpt.data.tokenizer import BPETokenizer, CharTokenizer
from mlxgpt.formats import mlx_arrays, model_directory
from mlxgpt.model.config import GPTConfig
from mlxgpt.model.gpt import GPT

CHARS = CharTokenizer("abcdefghijk")


@pytest.fixture
def saved(tmp_path) -> Path:
    model_directory.save_model(tmp_path / "model", random_gpt(), CHARS)
    return tmp_path / "model"


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("activation", "tied_head"), [("gelu", True), ("gelu_new", True), ("gelu", False)])
def test_there_and_back_to_the_bit(tmp_path, bias, activation, tied_head):
    config = replace(TINY, bias=bias, activation=activation, tied_head=tied_head)
    model = random_gpt(config)
    model_directory.save_model(tmp_path / "m", model, CHARS)
    again = model_directory.load_model(tmp_path / "m")
    assert again.config == config
    assert tokenizer.load(tmp_path / "m").encode("cab").tolist() == [2, 0, 1]
    found = dict(tree_flatten(again.parameters()))
    for name, p in tree_flatten(model.parameters()):
        assert np.array_equal(np.array(p), np.array(found.pop(name))), name
    assert not found
    assert not [p for p in tmp_path.iterdir() if p.name != "m"]


def test_files_are_hugging_faces(saved):
    assert sorted(p.name for p in saved.iterdir()) == [
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    config = json.loads((saved / "config.json").read_text())
    assert config["model_type"] == "gpt2"
    assert (config["n_positions"], config["activation_function"]) == (8, "gelu_new")
    weights = mx.load(str(saved / "model.safetensors"))
    assert weights["h.0.attn.c_attn.weight"].shape == (8, 24)  # Conv1D: (n_in, n_out)
    assert weights["h.0.mlp.c_fc.weight"].shape == (8, 32)
    assert "lm_head.weight" not in weights


def test_a_directory_made_by_transformers_gives_its_logits():
    file = golden.load("hf_gpt2.npz")
    model = model_directory.load_model(golden.GOLDEN / "hf_gpt2")
    logits = np.array(model(mx.array(file["ids"].astype(np.int32))))
    assert np.abs(file["logits"]).max() > 5
    assert np.abs(logits - file["logits"]).max() < 1e-4


def test_models_without_biases_are_written_with_zero_ones(tmp_path):
    model = random_gpt(GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=2, n_embd=8, bias=False))
    model_directory.save_model(tmp_path / "m", model)
    weights = mx.load(str(tmp_path / "m" / "model.safetensors"))
    for name, size in {"ln_f.bias": 8, "h.0.attn.c_attn.bias": 24, "h.0.mlp.c_proj.bias": 8}.items():
        assert weights[name].shape == (size,)
        assert not mx.any(weights[name]).item()
    assert "wte.bias" not in weights


def test_saving_again_replaces_the_weights(saved):
    model = random_gpt()
    model_directory.save_model(saved, model, CHARS)
    assert mx.array_equal(model_directory.load_model(saved).wte.weight, model.wte.weight).item()
    other = random_gpt(GPTConfig(block_size=4, vocab_size=50257, n_layer=1, n_head=1, n_embd=4))
    model_directory.save_model(saved, other, BPETokenizer.gpt2())
    assert model_directory.load_model(saved).config == other.config
    assert tokenizer.load(saved).vocab_size == 50257
    assert [p.name for p in saved.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("same_shape", [True, False])
def test_a_save_that_fails_leaves_the_old_model(saved, monkeypatch, same_shape):
    before = {p.name: p.read_bytes() for p in saved.iterdir()}

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    model = random_gpt(TINY if same_shape else GPTConfig(block_size=4, vocab_size=11, n_layer=1, n_head=1, n_embd=4))
    with pytest.raises(OSError, match="No space left"):
        model_directory.save_model(saved, model, CHARS)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
    assert [p.name for p in saved.parent.iterdir()] == ["model"]


def test_a_full_disk_leaves_the_old_model(saved):
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)  # a file that can't grow fails as one on a full disk does
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(OSError, match="model: the model can't be written"):
            model_directory.save_model(saved, random_gpt(), CHARS)
        with pytest.raises(OSError):
            model_directory.save_model(saved.with_name("new"), random_gpt(), CHARS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
    assert [p.name for p in saved.parent.iterdir()] == ["model"]


def test_find_model_takes_a_run_or_a_model(saved, tmp_path):
    assert model_directory.find_model(saved) == saved
    (tmp_path / "run").mkdir()
    shutil.copytree(saved, tmp_path / "run" / "best")
    assert model_directory.find_model(tmp_path / "run") == tmp_path / "run" / "best"
    with pytest.raises(FileNotFoundError, match=r"it has no config\.json"):
        model_directory.find_model(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no directory"):
        model_directory.find_model(tmp_path / "nowhere")


def test_missing_unknown_and_misshapen_tensors_are_listed(saved):
    def change(weights):
        del weights["ln_f.weight"]
        weights["h.9.ln_1.weight"] = mx.ones((8,))
        weights["wpe.weight"] = mx.ones((9, 8))

    rewrite(saved, change)
    with pytest.raises(ValueError) as error:
        model_directory.load_model(saved)
    for part in ("missing ln_f.weight", "unknown h.9.ln_1.weight", "wpe.weight is (9, 8), expected (8, 8)"):
        assert part in str(error.value)


def test_a_tied_head_in_the_file_is_dropped_when_it_is_wte(saved):
    rewrite(saved, lambda weights: weights.update({"lm_head.weight": weights["wte.weight"]}))
    assert "lm_head.weight" not in model_directory.load_model(saved).named_weights()
    rewrite(saved, lambda weights: weights.update({"lm_head.weight": weights["wte.weight"] * 2}))
    with pytest.raises(ValueError, match=r"lm_head\.weight is not wte\.weight, but tie_word_embeddings says"):
        model_directory.load_model(saved)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_low_precision_is_read_as_float32(saved, dtype):
    low = {name: p.astype(dtype) for name, p in model_directory.load_model(saved).named_weights().items()}
    rewrite(saved, lambda weights: weights.update({name: t.astype(dtype) for name, t in weights.items()}))
    path = saved / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": str(dtype).removeprefix("mlx.core.")}))
    for name, p in model_directory.load_model(saved).named_weights().items():
        assert p.dtype == mx.float32
        assert mx.array_equal(p, low[name].astype(mx.float32)).item(), name


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_weights_stay_in_the_type_of_the_file_if_none_is_asked_for(saved, dtype):
    original = model_directory.load_model(saved).named_weights()
    rewrite(saved, lambda weights: weights.update({name: t.astype(dtype) for name, t in weights.items()}))
    for name, p in model_directory.load_model(saved, dtype=None).named_weights().items():
        # the kernels read matrices of any type, and positions and vectors of float32
        widened = extension.is_used() and (p.ndim == 1 or name == "wpe.weight")
        assert p.dtype == (mx.float32 if widened else dtype)
        assert mx.array_equal(p, original[name].astype(dtype)).item(), name
    for name, p in model_directory.load_model(saved, dtype=mx.bfloat16).named_weights().items():
        assert p.dtype == mx.bfloat16
        assert mx.array_equal(p, original[name].astype(dtype).astype(mx.bfloat16)).item(), name


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_loading_takes_the_memory_of_one_model(tmp_path):
    """And of the largest tensor's part of the file, while it is the only one that is there."""
    model = GPT(replace(TINY, n_embd=256, vocab_size=40000, n_layer=8))
    model_directory.save_model(tmp_path / "m", model)
    program = (
        "import re, sys; from pathlib import Path; from mlxgpt.formats import model_directory\n"
        "def peak(): return int(re.search(r'VmHWM:\\s+(\\d+) kB', Path('/proc/self/status').read_text())[1])\n"
        "before = peak(); model = model_directory.load_model(Path(sys.argv[1])); print(peak() - before)"
    )
    run = [sys.executable, "-c", program, tmp_path / "m"]
    peak = int(subprocess.run(run, capture_output=True, text=True, check=True).stdout) * 1024
    size = sum(p.nbytes for p in model.named_weights().values())
    assert size < peak < 1.4 * size


def test_mlx_has_let_go_of_what_it_read_from(monkeypatch):
    """A thread of MLX's that has yet to, when the interpreter ends, aborts it. Threads switch only where asked to."""
    files = []

    class File(mlx_arrays.HeaderOnly):
        def __init__(self, tensors) -> None:
            super().__init__(tensors)
            files.append(weakref.ref(self))

    monkeypatch.setattr(mlx_arrays, "HeaderOnly", File)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        for _ in range(3000):
            mlx_arrays.uninitialized({"a": ("float32", (2, 3)), "b": ("bfloat16", (5,))})
            assert files.pop()() is None
    finally:
        sys.setswitchinterval(interval)


def test_numbers_that_are_no_floats_are_refused(saved):
    rewrite(saved, lambda weights: weights.update({"wte.weight": mx.zeros((11, 8), mx.int8)}))
    with pytest.raises(ValueError, match=r"wte\.weight is int8, expected a floating-point type"):
        model_directory.load_model(saved)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_named(saved, value):
    def change(weights):
        weights["h.1.mlp.c_fc.weight"][3, 5] = value

    rewrite(saved, change)
    with pytest.raises(ValueError, match=r"h\.1\.mlp\.c_fc\.weight holds a value that is not finite"):
        model_directory.load_model(saved)


def test_large_finite_values_are_fine(saved):
    def change(weights):
        weights["wte.weight"] = mx.full((11, 8), 3e38)  # whose sum is not finite

    rewrite(saved, change)
    assert model_directory.load_model(saved).wte.weight.max().item() == pytest.approx(3e38)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(model_type="llama"), "model_type is 'llama', expected 'gpt2'"),
        (dict(activation_function="relu"), "activation_function is 'relu'"),
        (dict(n_inner=7), "n_inner is 7, expected 4 n_embd = 32"),
        (dict(tie_word_embeddings=False), r"missing lm_head\.weight"),
        (dict(tie_word_embeddings="no"), "tied_head is 'no', expected bool"),
        (dict(n_head=3), "n_embd is 8, expected a multiple of n_head = 3"),
        (dict(n_embd=None), "n_embd is None, expected int"),
        (dict(n_layer="two"), "n_layer is 'two', expected int"),
        (dict(mlxgpt={"format": 2}), "mlxgpt.format is 2, this version reads up to 1; nothing was changed"),
        (dict(mlxgpt=3), "not the configuration of a model"),
        (dict(quantization=4), "not the configuration of a model"),
        (dict(quantization={"bits": 4}), "quantization.group_size is None"),
        (dict(quantization={"bits": 1, "group_size": 64}), "quantization.bits is 1, expected 2 or 3"),
        (dict(quantization={"bits": 4, "group_size": 32, "mode": "mxfp4"}), "quantization.mode is 'mxfp4'"),
    ],
)
def test_a_config_that_is_not_ours_is_refused(saved, change, message):
    path = saved / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        model_directory.load_model(saved)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"model_type": "gpt2"}', "\x00\x01"])
def test_a_broken_config_is_named(saved, content):
    (saved / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json: "):
        model_directory.load_config(saved)


@pytest.mark.parametrize("cut", [0, 1, 7, 8, 100, -1])
def test_weights_cut_short_are_refused(saved, cut):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a safetensors file, or cut short"):
        model_directory.load_model(saved)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        model_directory.load_model(saved)
