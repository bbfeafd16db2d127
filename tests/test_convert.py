"""The converter on its command line: sources, destinations, and what must be refused."""

from __future__ import annotations

import json
import pickle

import mlx.core as mx
import numpy as np
import pytest
from conversion import command, converted
from random_models import SHAPE, foreign_model, logits_of

from mlxgpt.data import tokenizer
from mlxgpt.formats import hugging_face, model_directory, nanogpt, safetensors_file, torch_file
from mlxgpt.formats.foreign import ForeignModel
from mlxgpt.formats.tensors import Tensor
from mlxgpt.model.gpt import GPT


@pytest.fixture
def ids() -> np.ndarray:
    return np.random.default_rng(1).integers(0, SHAPE.vocab_size, (2, 16))


def test_a_converted_model_computes_the_same(tmp_path, ids):
    model = foreign_model()
    gpt = GPT(SHAPE)
    gpt.load_weights([(name, mx.array(t.read())) for name, t in model.tensors.items()])
    gpt.eval()
    expected = np.array(gpt(mx.array(ids.astype(np.int32))))
    nanogpt.write(tmp_path / "nanogpt", model)
    result = converted(tmp_path / "nanogpt", tmp_path / "model")
    config = json.loads((result / "config.json").read_text())
    assert config["activation_function"] == "gelu"  # what nanoGPT computes
    config["activation_function"] = "gelu_new"
    (result / "config.json").write_text(json.dumps(config))
    np.testing.assert_allclose(logits_of(result, ids), expected, atol=1e-5)


def test_cropped(tmp_path, ids):
    hugging_face.write(tmp_path / "whole", foreign_model())
    crop = converted(tmp_path / "whole", tmp_path / "crop", "--block_size", 10)
    assert model_directory.load_config(crop).block_size == 10
    np.testing.assert_array_equal(logits_of(crop, ids[:, :10]), logits_of(tmp_path / "whole", ids[:, :10]))
    assert "expected 1 to the source's 16" in command(tmp_path / "whole", tmp_path / "x", "--block_size", 17).stderr


def test_characters_come_along(tmp_path):
    characters = [*"\n !abcdefghijklmnopqrstuvwxyé"]
    meta = {"vocab_size": 29, "itos": dict(enumerate(characters)), "stoi": {c: i for i, c in enumerate(characters)}}
    nanogpt.write(tmp_path / "run", foreign_model())
    (tmp_path / "run" / "meta.pkl").write_bytes(pickle.dumps(meta))
    directory = converted(tmp_path / "run", tmp_path / "model")
    assert tokenizer.load(directory).characters == characters
    back = converted(directory, tmp_path / "back", "--to", "nanogpt")
    assert pickle.loads((back / "meta.pkl").read_bytes()) == meta


def test_a_tokenizer_of_another_kind_comes_along_with_a_note(tmp_path):
    hugging_face.write(tmp_path / "model", foreign_model())
    other = json.dumps({"model": {"type": "Unigram", "vocab": [["a", 0.0]]}})
    (tmp_path / "model" / "tokenizer.json").write_text(other)
    result = command(tmp_path / "model", tmp_path / "again")
    assert result.returncode == 0 and "not a tokenizer that this package reads" in " ".join(result.stderr.split())
    assert (tmp_path / "again" / "tokenizer.json").read_text() == other
    result = command(tmp_path / "model", tmp_path / "nanogpt", "--to", "nanogpt")
    assert result.returncode == 0 and "not a tokenizer that this package reads" in " ".join(result.stderr.split())


# ---- what is refused ----


def test_an_evil_meta_pkl_runs_nothing(tmp_path):
    class Evil:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    nanogpt.write(tmp_path / "run", foreign_model())
    (tmp_path / "run" / "meta.pkl").write_bytes(pickle.dumps({"itos": Evil()}))
    result = command(tmp_path / "run", tmp_path / "model")
    assert result.returncode == 1 and "exec" in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "ran").exists() and not (tmp_path / "model").exists()


def test_a_destination_that_is_there_stays(tmp_path):
    hugging_face.write(tmp_path / "model", foreign_model())
    other = tmp_path / "other"
    hugging_face.write(other, foreign_model(seed=1))
    before = (other / "model.safetensors").read_bytes()
    assert "say --force" in command(tmp_path / "model", other).stderr
    assert (other / "model.safetensors").read_bytes() == before
    converted(tmp_path / "model", other, "--force")
    assert (other / "model.safetensors").read_bytes() == (tmp_path / "model" / "model.safetensors").read_bytes()
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    assert "is not replaced" in command(tmp_path / "model", mine, "--force").stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "model", "other"]  # nothing half-written


def test_a_source_that_fails_midway_leaves_nothing(tmp_path):
    values = foreign_model()
    large = np.full((29, 12), 1e6, np.float32)
    values.tensors["wte.weight"] = Tensor("float32", large.shape, lambda: large)
    hugging_face.write(tmp_path / "model", values)
    result = command(tmp_path / "model", tmp_path / "half", "--dtype", "float16")
    assert result.returncode == 1 and "more than float16's 65504" in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def change(model: ForeignModel, **tensors: Tensor | None) -> dict[str, Tensor]:
    all_tensors = {**hugging_face.tensors_of(model), **{k.replace("__", "."): t for k, t in tensors.items()}}
    return {k: t for k, t in all_tensors.items() if t is not None}


BAD = {
    "missing ln_f.bias": dict(ln_f__bias=None),
    "unknown extra.weight": dict(extra__weight=Tensor("float32", (2,), lambda: np.zeros(2, np.float32))),
    "ln_f.weight is (13,), expected (12,)": dict(
        ln_f__weight=Tensor("float32", (13,), lambda: np.zeros(13, np.float32))
    ),
    "wte.weight is int64, expected float32": dict(
        wte__weight=Tensor("int64", (29, 12), lambda: np.zeros((29, 12), np.int64))
    ),
    "it has no matrix h.0.attn.c_attn.weight": dict(h__0__attn__c_attn__weight=None),
    "expected (3C, C) or (C, 3C)": dict(
        h__0__attn__c_attn__weight=Tensor("float32", (12, 12), lambda: np.zeros((12, 12), np.float32))
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_strict(tmp_path, message):
    path = tmp_path / "bad.safetensors"
    safetensors_file.write(path, change(foreign_model(), **BAD[message]))
    result = command(path, tmp_path / "model", "--n_head", 3)
    assert result.returncode == 1 and message in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "model").exists()


def test_usage(tmp_path):
    for args, status, message in [
        ([tmp_path / "none", tmp_path / "x"], 1, "there is no file or directory"),
        ([tmp_path, tmp_path / "x"], 1, "holds none of model.safetensors"),
        ([tmp_path, tmp_path / "x", "--to", "onnx"], 2, "onnx"),
        ([tmp_path, tmp_path / "x", "--quantize", "8", "--to", "gguf"], 2, "quantize is 8, expected 0 unless"),
        ([tmp_path], 2, "DST"),
    ]:
        result = command(*args)
        assert result.returncode == status and message in result.stderr, result.stderr
        assert "Traceback" not in result.stderr


def test_torch_files_are_not_anything(tmp_path):
    torch_file.write(tmp_path / "x.pt", {"a": 1})
    assert "it holds no tensors by name" in command(tmp_path / "x.pt", tmp_path / "m").stderr
    torch_file.write(tmp_path / "x.pt", [1, 2])
    assert "it holds no tensors by name" in command(tmp_path / "x.pt", tmp_path / "m").stderr
