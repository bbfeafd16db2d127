"""The model against float64 NumPy, against PyTorch's golden files, and against itself with a cache."""

from __future__ import annotations

import golden
import mlx.core as mx
import numpy as np
import pytest
import reference
from mlx.utils import tree_flatten, tree_unflatten

from mlxgpt.model.cache import KVCache
from mlxgpt.model.config import GPTConfig
from mlxgpt.model.gpt import GPT

VARIANTS = golden.VARIANTS


def model_with(weights: dict[str, np.ndarray], config: GPTConfig) -> GPT:
    model = GPT(config)
    model.update(tree_unflatten([(name, mx.array(value.astype(np.float32))) for name, value in weights.items()]))
    return model.eval() or model


def loss_and_gradients(model: GPT, ids: np.ndarray, targets: np.ndarray) -> tuple[float, dict[str, np.ndarray]]:
    def loss(weights):
        model.update(weights)
        return model.loss(mx.array(ids.astype(np.int32)), mx.array(targets.astype(np.int32)))

    value, gradients = mx.value_and_grad(loss)(model.parameters())
    return value.item(), {name: np.array(g) for name, g in tree_flatten(gradients)}


def assert_close(ours: np.ndarray, theirs: np.ndarray, tolerance: float, name: str = "") -> None:
    scale = max(1e-6, np.abs(theirs).max())
    assert np.abs(ours - theirs).max() <= tolerance * scale, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_every_gradient_follow_pytorchs(cpu_backend, variant):
    file = golden.load(f"gpt_{variant}.npz")
    config = GPTConfig(**golden.SHAPE, **VARIANTS[variant])
    model = model_with(golden.group(file, "weight"), config)
    logits = np.array(model(mx.array(file["ids"].astype(np.int32))))
    assert np.abs(file["logits"]).max() > 5
    assert_close(logits, file["logits"], 1e-5)
    loss, gradients = loss_and_gradients(model, file["ids"], file["targets"])
    assert loss == pytest.approx(file["loss"], rel=1e-5)
    theirs = golden.group(file, "gradient")
    assert gradients.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert_close(gradients[name], gradient, 1e-5, name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_reference_follows_pytorch_and_model_follows_reference(variant):
    config = GPTConfig(**golden.SHAPE, **VARIANTS[variant])
    file = golden.load(f"gpt_{variant}.npz")
    exact = config.activation == "gelu"
    shape = (config.n_layer, config.n_head, exact)
    _, loss, gradients = reference.gpt_loss_and_gradients(
        golden.group(file, "weight"), *shape, file["ids"], file["targets"], config.layer_norm_epsilon
    )
    assert loss == pytest.approx(file["loss"], rel=1e-6)
    for name, gradient in golden.group(file, "gradient").items():
        assert_close(gradients[name], gradient, 2e-6, name)

    rng = np.random.default_rng(1)  # other data, another T
    ids, targets = rng.integers(0, config.vocab_size, (2, 3, 7))
    model = GPT(config)
    weights = {name: np.array(p) + rng.normal(0, 0.2, p.shape) for name, p in tree_flatten(model.parameters())}
    model = model_with(weights, config)
    logits, loss, gradients = reference.gpt_loss_and_gradients(weights, *shape, ids, targets, config.layer_norm_epsilon)
    assert_close(np.array(model(mx.array(ids.astype(np.int32)))), logits, 1e-5)
    ours, our_gradients = loss_and_gradients(model, ids, targets)
    assert ours == pytest.approx(loss, rel=1e-5)
    for name, gradient in gradients.items():
        assert_close(our_gradients[name], gradient, 1e-5, name)


def test_a_head_of_its_own_follows_reference():
    config = GPTConfig(**golden.SHAPE, tied_head=False)
    rng = np.random.default_rng(4)
    ids, targets = rng.integers(0, config.vocab_size, (2, 3, 7))
    drawn = {name: np.array(p) for name, p in GPT(config).named_weights().items()}
    assert drawn["lm_head.weight"].std() == pytest.approx(0.02, rel=0.1)
    weights = {name: p + rng.normal(0, 0.2, p.shape) for name, p in drawn.items()}
    logits, loss, gradients = reference.gpt_loss_and_gradients(
        weights, config.n_layer, config.n_head, False, ids, targets, config.layer_norm_epsilon
    )
    model = model_with(weights, config)
    assert_close(np.array(model(mx.array(ids.astype(np.int32)))), logits, 1e-5)
    ours, our_gradients = loss_and_gradients(model, ids, targets)
    assert ours == pytest.approx(loss, rel=1e-5)
    assert our_gradients.keys() == gradients.keys() >= {"lm_head.weight"}
    for name, gradient in gradients.items():
        assert_close(our_gradients[name], gradient, 1e-5, name)
    assert model.n_params() == GPT(GPTConfig(**golden.SHAPE)).n_params() + weights["wte.weight"].size


def test_parameters_are_gpt2s():
    model = GPT(GPTConfig(block_size=1024))
    assert model.n_params() == 124_439_808
    names = {name for name, _ in tree_flatten(model.parameters())}
    assert {"wte.weight", "wpe.weight", "ln_f.bias", "h.11.mlp.c_proj.weight", "h.0.attn.c_attn.bias"} <= names
    assert len(names) == 4 + 12 * 12
    without = GPT(GPTConfig(bias=False, n_layer=2, n_embd=24))
    assert not [name for name, _ in tree_flatten(without.parameters()) if name.endswith("bias")]


def test_initial_weights_are_gpt2s():
    model = GPT(GPTConfig(n_layer=8, n_embd=192, vocab_size=500, block_size=64))
    for name, p in tree_flatten(model.parameters()):
        value = np.array(p)
        if value.ndim == 1:
            assert (value == (1 if "ln_" in name and name.endswith("weight") else 0)).all()
        else:
            std = 0.02 / 4 if name.endswith("c_proj.weight") else 0.02
            assert value.std() == pytest.approx(std, rel=0.05), name
            assert abs(value.mean()) < std * 0.05


def test_no_position_sees_a_later_one():
    config = GPTConfig(**golden.SHAPE)
    model = model_with(golden.group(golden.load("gpt_tanh.npz"), "weight"), config)
    ids = np.random.default_rng(2).integers(0, config.vocab_size, (1, 12)).astype(np.int32)
    logits = np.array(model(mx.array(ids)))
    for changed in range(12):
        other = ids.copy()
        other[0, changed] = (other[0, changed] + 1) % config.vocab_size
        moved = np.abs(np.array(model(mx.array(other))) - logits).max(axis=(0, 2))
        assert moved[:changed].max(initial=0) < 1e-5
        assert (moved[changed:] > 1e-4).all()  # and every later one sees it


@pytest.mark.parametrize("chunk", [1, 5, 12])
def test_cached_logits_agree_at_every_position(chunk):
    config = GPTConfig(**golden.SHAPE)
    model = model_with(golden.group(golden.load("gpt_tanh.npz"), "weight"), config)
    ids = mx.array(np.random.default_rng(3).integers(0, config.vocab_size, (2, 12)).astype(np.int32))
    whole = np.array(model(ids))
    cache = KVCache(config.n_layer, config.block_size, 2)
    parts = [np.array(model(ids[:, n : n + chunk], cache)) for n in range(0, 12, chunk)]
    assert_close(np.concatenate(parts, axis=1), whole, 1e-5)
    assert cache.offsets.tolist() == [12, 12]
    with pytest.raises(ValueError, match=r"12 \+ 1 positions, at most block_size = 12"):
        model(ids[:, :1], cache)


def test_positions_past_block_size_are_refused():
    model = GPT(GPTConfig(**golden.SHAPE))
    with pytest.raises(ValueError, match="GPT: 13 positions, at most block_size = 12"):
        model(mx.zeros((1, 13), mx.int32))


def test_dropout_acts_in_training_only():
    model = GPT(GPTConfig(**golden.SHAPE, dropout=0.5))
    ids = mx.array([[1, 2, 3]], mx.int32)
    model.train()
    assert not mx.array_equal(model(ids), model(ids)).item()
    model.eval()
    assert mx.array_equal(model(ids), model(ids)).item()
