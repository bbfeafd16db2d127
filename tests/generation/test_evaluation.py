"""A model's loss on a whole text, against a float64 computation of each token by itself."""

from __future__ import annotations

import math

import golden
import mlx.core as mx
import numpy as np
import pytest
import reference
from mlx.utils import tree_unflatten

from mlxgpt.cpu import extension
from mlxgpt.generation import evaluation
from mlxgpt.model.config import GPTConfig
from mlxgpt.model.gpt import GPT

T, V = golden.SHAPE["block_size"], golden.SHAPE["vocab_size"]
TOKENS = np.random.default_rng(7).integers(0, V, 45).astype(np.uint8)


def model_with(weights: dict[str, np.ndarray], config: GPTConfig) -> GPT:
    model = GPT(config)
    model.update(tree_unflatten([(name, mx.array(np.asarray(w))) for name, w in weights.items()]))
    return model


@pytest.fixture
def model() -> GPT:
    rng = np.random.default_rng(3)
    drawn = GPT(GPTConfig(**golden.SHAPE)).named_weights()
    weights = {name: np.array(w) + rng.normal(0, 0.3, w.shape).astype(np.float32) for name, w in drawn.items()}
    return model_with(weights, GPTConfig(**golden.SHAPE))


@pytest.fixture(params=["kernels", "mlx"])
def backend(request, switch_off_kernels):
    if request.param == "mlx":
        switch_off_kernels()
    elif not extension.available():
        pytest.skip("without the extension, or on a GPU")


def naive(model: GPT, tokens: np.ndarray, stride: int) -> list[float]:
    """-log p of each token but the first, from the context that its window gives it."""
    weights = {name: np.array(w.astype(mx.float32)) for name, w in model.named_weights().items()}
    shape = (model.config.n_layer, model.config.n_head, False)
    losses = []
    for at in range(1, len(tokens)):
        window = max(0, math.ceil((at - T) / stride))  # the first window that predicts it
        context = tokens[None, window * stride : at].astype(int)
        logits = reference.gpt_loss_and_gradients(
            weights, *shape, context, np.zeros_like(context), model.config.layer_norm_epsilon
        )[0][0, -1]
        losses.append(float(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[tokens[at]]))
    return losses


@pytest.mark.parametrize("stride", [1, 5, T // 2, T])
@pytest.mark.parametrize("n", [2, 5, T + 1, T + 2, 45])
def test_every_token_but_the_first_is_predicted_once(backend, model, n, stride):
    expected = naive(model, TOKENS[:n], stride)
    result = evaluation.evaluate(model, TOKENS[:n], stride=stride, batch_size=3)
    assert result.loss == pytest.approx(np.mean(expected), rel=2e-6)
    assert result.nats == pytest.approx(sum(expected), rel=2e-6)
    assert result.tokens == n - 1
    assert result.counts.tolist() == np.bincount(TOKENS[1:n], minlength=V).tolist()
    assert result.perplexity == pytest.approx(math.exp(np.mean(expected)), rel=1e-5)


@pytest.mark.parametrize("stride", [1, 5, T // 2, T])
def test_windows_give_each_token_the_context_that_the_stride_promises(stride):
    tokens = np.arange(100)
    context = {}
    for ids, targets in evaluation.windows(tokens, T, stride):
        assert ids.shape == targets.shape == (T,)
        for at in np.flatnonzero(targets >= 0):
            assert ids[: at + 1].tolist() == list(range(ids[0], targets[at]))
            assert targets[at] not in context
            context[int(targets[at])] = at + 1
    assert list(context) == list(range(1, 100))
    assert all(n >= min(token, T - stride + 1) for token, n in context.items())


def test_the_default_stride_is_half_of_block_size_and_each_stride_gives_another_loss(model):
    losses = {stride: evaluation.evaluate(model, TOKENS, stride=stride).loss for stride in (None, 1, T // 2, T)}
    assert losses[None] == losses[T // 2]
    assert len(set(losses.values())) == 3


def test_the_loss_does_not_depend_on_the_batch_size(backend, model):
    losses = [evaluation.evaluate(model, TOKENS, stride=5, batch_size=size).loss for size in (1, 2, 7, 100)]
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-6)


@pytest.mark.parametrize("storage", [mx.float16, mx.bfloat16, 8, 4])
def test_matrices_in_low_precision_are_evaluated_as_they_are_stored(backend, storage):
    model = GPT(GPTConfig(**{**golden.SHAPE, "n_head": 2, "n_embd": 32}))
    modules = [model.wte] + [m for b in model.h for m in (b.attn.c_attn, b.attn.c_proj, b.mlp.c_fc, b.mlp.c_proj)]
    read = {}  # each matrix as it is read back, by its parameter's name
    for module in modules:
        module.weight = module.weight + mx.random.normal(module.weight.shape, scale=0.3)
    for name, w in model.named_weights().items():
        if w.ndim == 2 and name != "wpe.weight":
            parts = None if isinstance(storage, mx.Dtype) else mx.quantize(w, 32, storage)
            read[name] = mx.dequantize(*parts, 32, storage) if parts else w.astype(storage).astype(mx.float32)
    expected = np.mean(naive(model_with(model.named_weights() | read, model.config), TOKENS, 6))
    assert abs(expected - evaluation.evaluate(model, TOKENS).loss) > 1e-5
    for module in modules:
        if isinstance(storage, mx.Dtype):
            module.weight = module.weight.astype(storage)
        else:
            module.weight, module.scales, module.biases = mx.quantize(module.weight, 32, storage)
            module.group_size = 32
    result = evaluation.evaluate(model, TOKENS).loss
    assert result == pytest.approx(expected, rel=5e-3 if storage == mx.bfloat16 and not extension.available() else 1e-5)


def test_dropout_is_switched_off():
    model = GPT(GPTConfig(**golden.SHAPE, dropout=0.5))
    model.train()
    assert evaluation.evaluate(model, TOKENS).loss == evaluation.evaluate(model, TOKENS).loss


def test_the_batches_reported_sum_to_the_result(model):
    reported = []
    result = evaluation.evaluate(model, TOKENS, batch_size=2, on_batch=lambda *part: reported.append(part))
    assert len(reported) > 2
    assert sum(tokens for tokens, _ in reported) == result.tokens
    assert sum(nats for _, nats in reported) == pytest.approx(result.nats)


@pytest.mark.parametrize(
    ("tokens", "stride", "message"),
    [
        ([], None, "data: 0 tokens, expected at least 2"),
        ([1], None, "data: 1 tokens, expected at least 2"),
        ([1, 2], 0, "stride is 0, expected 1 to block_size = 12"),
        ([1, 2], 13, "stride is 13, expected 1 to block_size = 12"),
    ],
)
def test_bad_arguments_are_named(model, tokens, stride, message):
    with pytest.raises(ValueError, match=message):
        evaluation.evaluate(model, np.array(tokens, np.int32), stride=stride)


def test_a_loss_that_is_not_finite_is_an_error(model):
    model.ln_f.weight = mx.full(model.ln_f.weight.shape, 3e38)
    with pytest.raises(ValueError, match=r"model: the loss is (nan|inf) after 0 tokens, expected a finite number"):
        evaluation.evaluate(model, TOKENS)
