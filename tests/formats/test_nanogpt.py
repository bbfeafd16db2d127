"""nanoGPT's checkpoints: as PyTorch left them, and, where PyTorch is installed, made by it and loaded by it."""

from __future__ import annotations

import numpy as np
import pytest
from conversion import converted, spread
from golden import GOLDEN
from random_models import logits_of

from mlxgpt.formats import hugging_face, model_directory, sources
from mlxgpt.training import trainer as training
from mlxgpt.training.checkpoints import restore_optimizer
from mlxgpt.training.recipe import TrainConfig


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


RANDOM = [
    dict(block_size=24, vocab_size=50, n_layer=2, n_head=5, n_embd=40),
    dict(block_size=16, vocab_size=64, n_layer=3, n_head=1, n_embd=24, bias=False),
    dict(block_size=32, vocab_size=31, n_layer=1, n_head=7, n_embd=56),
]


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
    expected = model(torch.tensor(ids)).detach().numpy()
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(logits_of(tmp_path / "model", ids), expected, atol=1e-4)


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
    for group, expected in groups:
        assert {k: group[k] for k in ("lr", "betas", "eps", "weight_decay", "params")} == {
            k: expected[k] for k in ("lr", "betas", "eps", "weight_decay", "params")
        }


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
    restore_optimizer(directory, trainer.model, trainer.optimizer)
    for seed in range(5):
        x, y = np.random.default_rng(seed).integers(0, shape["vocab_size"], (2, 3, shape["block_size"]), np.int32)
        loss = model.loss(torch.tensor(x, dtype=torch.long), torch.tensor(y, dtype=torch.long))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert trainer.step([(x, y)]).item() == pytest.approx(loss.item(), abs=1e-5)
