"""The converter on its command line: sources, destinations, and what must be refused.

The cases here run without PyTorch, on files that it made (make_golden.py); those at the end make their own with it.
"""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from golden import GOLDEN
from random_models import SHAPE, foreign_model, logits_of

from mlxgpt.data import tokenizer
from mlxgpt.formats import hugging_face, model_directory, nanogpt, safetensors_file, sources, torch_file, training_state
from mlxgpt.formats.foreign import ForeignModel
from mlxgpt.formats.tensors import Tensor
from mlxgpt.model.gpt import GPT
from mlxgpt.training import trainer as training
from mlxgpt.training.recipe import TrainConfig

SCRIPT = Path(__file__).parents[1] / "scripts" / "convert_weights.py"


def command(*args: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPT, *map(str, args)], capture_output=True, text=True)


def converted(source: Path, destination: Path, *options: object) -> Path:
    result = command(source, destination, *options)
    assert result.returncode == 0, result.stderr
    return destination


@pytest.fixture
def ids() -> np.ndarray:
    return np.random.default_rng(1).integers(0, SHAPE.vocab_size, (2, 16))


def test_hugging_face_directory(tmp_path):
    golden = np.load(GOLDEN / "hf_gpt2.npz")
    directory = converted(GOLDEN / "hf_gpt2", tmp_path / "model")
    np.testing.assert_allclose(logits_of(directory, golden["ids"]), golden["logits"], atol=2e-5)


def test_nanogpt_as_pytorch_left_it(tmp_path):
    """A model that torch.compile had wrapped, after two steps, and its optimizer."""
    golden = np.load(GOLDEN / "nanogpt.npz")
    source = sources.read_model(GOLDEN / "nanogpt.pt")
    assert (source.config.activation, source.config.n_head, source.config.bias) == ("gelu", 3, True)
    assert source.training["step"] == 2 and source.nanogpt["config"] == {"dataset": "made"}
    for name in ("wpe.weight", "h.1.attn.c_proj.weight", "ln_f.bias"):
        np.testing.assert_array_equal(source.averages[f"m.{name}"].read(), golden[f"m.{name}"])
        np.testing.assert_array_equal(source.averages[f"v.{name}"].read(), golden[f"v.{name}"])
    directory = converted(GOLDEN / "nanogpt.pt", tmp_path / "model")
    np.testing.assert_allclose(logits_of(directory, golden["ids"]), golden["logits"], atol=2e-5)


def test_a_safetensors_file_alone_says_its_shape_but_for_the_heads(tmp_path):
    source = tmp_path / "alone.safetensors"
    source.write_bytes((GOLDEN / "hf_gpt2" / "model.safetensors").read_bytes())
    assert "say --n_head" in command(source, tmp_path / "model").stderr
    golden = np.load(GOLDEN / "hf_gpt2.npz")
    directory = converted(source, tmp_path / "model", "--n_head", 2)
    np.testing.assert_allclose(logits_of(directory, golden["ids"]), golden["logits"], atol=2e-5)


def test_a_converted_model_computes_the_same(tmp_path, ids):
    model = foreign_model()
    ours = GPT(SHAPE)
    ours.load_weights([(name, mx.array(t.read())) for name, t in model.tensors.items()])
    ours.eval()
    expected = np.array(ours(mx.array(ids.astype(np.int32))))
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


# ---- beside PyTorch and transformers, where they are installed ----

RANDOM = [
    dict(block_size=24, vocab_size=50, n_layer=2, n_head=5, n_embd=40),
    dict(block_size=16, vocab_size=64, n_layer=3, n_head=1, n_embd=24, bias=False),
    dict(block_size=32, vocab_size=31, n_layer=1, n_head=7, n_embd=56),
]


def spread(torch, model) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.3)


def nanogpt_checkpoint(torch, shape: dict, steps: int = 0, prefix: str = "transformer."):
    """A model as nanoGPT's train.py saves it after some steps, the model and its optimizer."""
    import torch_gpt

    torch.manual_seed(0)
    model = torch_gpt.GPT(**shape, activation="gelu")
    spread(torch, model)
    optimizer = model.adamw(learning_rate=1e-3, weight_decay=0.1, beta1=0.9, beta2=0.95)
    for _ in range(steps):
        ids = torch.randint(0, shape["vocab_size"], (2, shape["block_size"]))
        optimizer.zero_grad()
        model.loss(ids, ids.roll(-1, 1)).backward()
        optimizer.step()
    weights = {prefix + name: p for name, p in model.state_dict().items()}
    weights[prefix.removesuffix("transformer.") + "lm_head.weight"] = model.wte.weight
    arguments = {"dropout": 0.0, "bias": True, **shape}
    content = dict(model=weights, optimizer=optimizer.state_dict(), model_args=arguments, iter_num=steps,
                   best_val_loss=torch.tensor(2.5), config={"dataset": "made"})  # fmt: skip
    return content, model, optimizer


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
@pytest.mark.parametrize("prefix", ["transformer.", "_orig_mod.transformer."])
@pytest.mark.parametrize("shape", RANDOM, ids=str)
def test_nanogpt_computes_the_same(tmp_path, shape, prefix, zipped):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    content, model, _ = nanogpt_checkpoint(torch, shape, prefix=prefix)
    torch.save(content, tmp_path / "ckpt.pt", _use_new_zipfile_serialization=zipped)
    source = sources.read_model(tmp_path / "ckpt.pt")
    hugging_face.write(tmp_path / "model", source)
    ids = np.random.default_rng(0).integers(0, shape["vocab_size"], (2, shape["block_size"]))
    theirs = model(torch.tensor(ids)).detach().numpy()
    assert np.abs(theirs).max() > 1
    np.testing.assert_allclose(logits_of(tmp_path / "model", ids), theirs, atol=1e-4)


def test_nanogpt_comes_back_as_it_was(tmp_path):
    """Weights and optimizer state, loaded by PyTorch without running pickle code, and by its optimizer."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    content, _, _ = nanogpt_checkpoint(torch, RANDOM[0], steps=3)
    torch.save(content, tmp_path / "ckpt.pt")
    converted(tmp_path / "ckpt.pt", tmp_path / "model")
    converted(tmp_path / "model", tmp_path / "back", "--to", "nanogpt")
    back = torch.load(tmp_path / "back" / "ckpt.pt", weights_only=True)
    assert back["model"].keys() == content["model"].keys()
    for name, tensor in content["model"].items():
        assert torch.equal(back["model"][name], tensor), name
    head, embedding = back["model"]["lm_head.weight"], back["model"]["transformer.wte.weight"]
    assert head.data_ptr() == embedding.data_ptr()
    assert back["model_args"] == content["model_args"] and back["iter_num"] == 3 and back["best_val_loss"] == 2.5
    _, _, fresh = nanogpt_checkpoint(torch, RANDOM[0])
    fresh.load_state_dict(back["optimizer"])
    for number, state in content["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(fresh.state_dict()["state"][number][name], value), (number, name)
    groups = zip(back["optimizer"]["param_groups"], content["optimizer"]["param_groups"], strict=True)
    for ours, theirs in groups:
        assert {k: ours[k] for k in ("lr", "betas", "eps", "weight_decay", "params")} == {
            k: theirs[k] for k in ("lr", "betas", "eps", "weight_decay", "params")
        }


@pytest.mark.parametrize("form", ["bin", "bin shards", "safetensors shards", "one .bin", "masks and prefix"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_hugging_face_computes_the_same(tmp_path, form, tied):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=2, n_head=5, n_embd=40, n_positions=24, vocab_size=50, tie_word_embeddings=tied
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    spread(torch, model)
    source = tmp_path / "source"
    model.save_pretrained(source, max_shard_size="30KB" if "shards" in form else "5GB")
    if form != "safetensors shards":
        weights = dict(model.state_dict())
        for path in source.glob("model*.safetensors*"):
            path.unlink()
        if form == "masks and prefix":
            for layer in range(2):
                weights[f"transformer.h.{layer}.attn.bias"] = torch.ones(24, 24, dtype=torch.bool).tril()[None, None]
                weights[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
        if form == "bin shards":
            names = sorted(weights)
            parts = {f"part{i}.bin": names[i::3] for i in range(3)}
            for part, some in parts.items():
                torch.save({n: weights[n] for n in some}, source / part)
            index = {"weight_map": {n: part for part, some in parts.items() for n in some}}
            (source / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        else:
            torch.save(weights, source / "pytorch_model.bin")
    ids = np.random.default_rng(0).integers(0, 50, (2, 24))
    theirs = model(torch.tensor(ids)).logits.detach().numpy()
    assert np.abs(theirs).max() > 1
    directory = converted(source / "pytorch_model.bin" if form == "one .bin" else source, tmp_path / "model")
    np.testing.assert_allclose(logits_of(directory, ids), theirs, atol=1e-4)
    again = transformers.GPT2LMHeadModel.from_pretrained(directory).eval()
    np.testing.assert_array_equal(again(torch.tensor(ids)).logits.detach().numpy(), theirs)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_sources_keep_their_bits(tmp_path, dtype):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    content, model, _ = nanogpt_checkpoint(torch, RANDOM[0])
    model.to(getattr(torch, dtype))
    content["model"] = {f"transformer.{n}": p for n, p in model.state_dict().items()}
    torch.save(content, tmp_path / "ckpt.pt")
    converted(tmp_path / "ckpt.pt", tmp_path / "model")
    converted(tmp_path / "model", tmp_path / "back", "--to", "nanogpt")
    back = torch.load(tmp_path / "back" / "ckpt.pt", weights_only=True)["model"]
    for name, tensor in content["model"].items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor), name


def test_training_goes_on_where_pytorch_stopped(tmp_path):
    """The losses of the next steps, on the same batches."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    shape = RANDOM[0]
    content, model, optimizer = nanogpt_checkpoint(torch, shape, steps=3)
    torch.save(content, tmp_path / "ckpt.pt")
    directory = converted(tmp_path / "ckpt.pt", tmp_path / "model")
    config = TrainConfig(learning_rate=1e-3, weight_decay=0.1, beta1=0.9, beta2=0.95, grad_clip=0.0, decay_lr=False,
                         warmup_iters=0, model=model_directory.load_config(directory))  # fmt: skip
    trainer = training.Trainer(model_directory.load_model(directory), config)
    training_state.load_training_state(directory, trainer.model, trainer.optimizer)
    for seed in range(5):
        x, y = np.random.default_rng(seed).integers(0, shape["vocab_size"], (2, 3, shape["block_size"]), np.int32)
        loss = model.loss(torch.tensor(x, dtype=torch.long), torch.tensor(y, dtype=torch.long))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert trainer.step([(x, y)]).item() == pytest.approx(loss.item(), abs=1e-5)
