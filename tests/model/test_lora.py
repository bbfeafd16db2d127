"""Adapters of low rank: their gradients, what they leave as it is, merging, and PEFT's files."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from mlxgpt import convert as convert_weights
from mlxgpt.cpu import extension
from mlxgpt.data.tokenizer import CharTokenizer
from mlxgpt.formats import foreign as convert
from mlxgpt.formats import model_directory as checkpoint
from mlxgpt.generation import sampling
from mlxgpt.generation.decoding import Decoder
from mlxgpt.model import lora, ops
from mlxgpt.model.config import GPTConfig
from mlxgpt.model.gpt import GPT
from mlxgpt.training import checkpoints
from mlxgpt.training.recipe import TrainConfig
from mlxgpt.training.trainer import Trainer

SHAPE = GPTConfig(block_size=16, vocab_size=30, n_layer=2, n_head=2, n_embd=32)
ALL = ",".join(lora.LAYERS)
TOKENIZER = CharTokenizer("abcdefghijklmnopqrstuvwxyz0123")
rng = np.random.default_rng(0)
BATCH = tuple(rng.integers(0, 30, (2, 4, 16)).astype(np.int32))
X, Y = map(mx.array, BATCH)


@pytest.fixture(params=["kernels", "mlx"])
def path(request, switch_off_kernels):
    ops.use_device("cpu")
    if request.param == "mlx":
        switch_off_kernels()
    elif not extension.is_there():
        pytest.skip("the extension is not there")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("lora") / "base"
    mx.random.seed(3)
    checkpoint.save_model(directory, GPT(SHAPE), TOKENIZER)
    return directory


def adapted(base: Path, targets: str = ALL, random: bool = False, rank: int = 4, alpha: float | None = None) -> GPT:
    """A model with adapters; with `random` such that already correct something."""
    model = checkpoint.load_model(base)
    mx.random.seed(1)
    lora.add(model, lora.LoRA.of(rank, alpha, targets, base))
    if random:
        b = {n: mx.random.normal(p.shape, scale=0.1) for n, p in model.trainable_weights().items() if "lora_B" in n}
        model.update(tree_unflatten(list(b.items())))
    return model


def gradient_of(model: GPT) -> dict[str, np.ndarray]:
    def loss(weights):
        model.update(weights)
        return model.loss(X, Y)

    weights = model.trainable_parameters()
    gradients = mx.grad(loss)(weights)
    model.update(weights)
    return {name: np.array(g) for name, g in tree_flatten(gradients)}


def train(model: GPT, n: int = 12, **options) -> tuple[Trainer, list[float]]:
    trainer = Trainer(model, TrainConfig(learning_rate=1e-2, warmup_iters=0, model=SHAPE, **options))
    return trainer, [trainer.step([BATCH]).item() for _ in range(n)]


def test_it_starts_as_the_base_to_the_bit(path, base):
    model = checkpoint.load_model(base)
    expected = np.array(model(X))
    lora.add(model, lora.LoRA.of(3, 16.0, ALL, base))
    np.testing.assert_array_equal(np.array(model(X)), expected)
    assert set(model.trainable_weights()) == {
        f"h.{n}.{layer}.{part}" for n in range(2) for layer in lora.LAYERS for part in ("lora_A", "lora_B")
    }
    a = np.array(model.h[0].mlp.c_proj.lora_A)
    assert a.shape == (3, 128)
    assert 0.9 / 128**0.5 < np.abs(a).max() <= 1 / 128**0.5


@pytest.mark.parametrize("targets", [*lora.LAYERS, ALL])
@pytest.mark.parametrize("training", [False, True])  # without and with a gradient made in the forward pass
def test_gradients_are_those_of_the_merged_weights(path, base, targets, training):
    """d(W + s B A) = dW gives dB = s dW A^T and dA = s B^T dW."""
    model = adapted(base, targets, random=True)
    model.train(training)
    found = gradient_of(model)
    merged = adapted(base, targets, random=True)
    lora.merge(merged)
    whole = gradient_of(merged)
    assert len(found) == 4 * len(targets.split(","))
    for name, layer in lora.layers(model, model.lora).items():
        dW = layer.lora_scale * whole[f"{name}.weight"]
        expected = {"lora_A": np.array(layer.lora_B).T @ dW, "lora_B": dW @ np.array(layer.lora_A).T}
        for part, gradient in expected.items():
            ours = found[f"{name}.{part}"]
            assert np.abs(ours - gradient).max() <= 1e-5 * np.abs(gradient).max(), (name, part)


def test_gradients_with_dropout_are_the_slope(base):
    """The masks are drawn anew from the same seed; central differences in one direction of all adapters."""
    ops.use_device("cpu")
    model = adapted(base, random=True)
    for block in model.h:
        block.attn.dropout = block.mlp.dropout = 0.2
    model.train()

    def loss(flat):
        model.update(tree_unflatten(list(flat.items())))
        mx.random.seed(5)
        return model.loss(X, Y)

    weights = model.trainable_weights()
    gradients = mx.grad(loss)(weights)
    along = {n: np.random.default_rng(2).standard_normal(p.shape).astype(np.float32) for n, p in weights.items()}
    ends = [loss({n: p + step * mx.array(along[n]) for n, p in weights.items()}).item() for step in (2e-3, -2e-3)]
    slope = sum(float((np.array(gradients[n], np.float64) * along[n]).sum()) for n in weights)
    assert abs(slope) > 0.1
    assert (ends[0] - ends[1]) / 4e-3 == pytest.approx(slope, rel=5e-3)


@pytest.mark.parametrize("targets", ["attn.c_attn,attn.c_proj", "mlp.c_fc", "mlp.c_proj", ALL])
def test_it_learns_alike_on_both_paths_and_moves_nothing_else(base, targets):
    ops.use_device("cpu")
    runs = []
    for kernels_there in (nullcontext(), extension.switched_off()):
        with kernels_there:
            model = adapted(base, targets)
            before = {n: np.array(p) for n, p in model.named_weights().items()}
            trainer, losses = train(model, grad_clip=0.5)
            runs.append(losses)
        assert losses[-1] < losses[0] - 0.02
        averages = {n.split(".", 1)[1] for n in trainer.optimizer.averages(model)}
        assert averages == set(model.trainable_weights()) == set(lora.names(model))
        for name, p in model.named_weights().items():
            assert np.array_equal(np.array(p), before[name]) == (name not in averages), name
    np.testing.assert_allclose(*runs, rtol=2e-5)


def test_bfloat16_leaves_the_weights_float32(base):
    """The frozen ones too, which are cast for the step without a gradient."""
    model = adapted(base)
    trainer, losses = train(model, 6, dtype="bfloat16")
    assert losses[-1] < losses[0] - 0.02
    assert all(p.dtype == mx.float32 for p in model.named_weights().values())
    assert trainer.evaluate([BATCH]) == pytest.approx(losses[-1], abs=0.1)


def test_merged_logits_are_the_unmerged(path, base):
    model = adapted(base, random=True, rank=2, alpha=3.0)
    model.eval()
    before = np.array(model(X))
    assert np.abs(before - np.array(checkpoint.load_model(base)(X))).max() > 0.01
    lora.merge(model)
    assert np.abs(np.array(model(X)) - before).max() < 1e-5
    assert model.lora is None
    assert set(model.trainable_weights()) == set(GPT(SHAPE).named_weights())


def test_decoding_runs_through_adapters(base):
    """By calls that are recorded once and made again."""
    ops.use_device("cpu")
    model = adapted(base, random=True)
    model.eval()

    def greedy():
        steps = Decoder(model, [[1, 2]], sampling.Sampler(temperature=0))
        return [int(next(steps).tokens[0]) for _ in range(10)]

    unmerged = greedy()
    lora.merge(model)
    assert unmerged == greedy()
    assert len(set(unmerged)) > 1


def test_a_saved_adapter_comes_back_to_the_bit_and_training_goes_on(path, base, tmp_path):
    model = adapted(base, "mlp.c_fc,attn.c_attn")
    trainer, _ = train(model, 3)
    saved = {n: np.array(p) for n, p in model.named_weights().items()}
    writer = checkpoints.Checkpoints(tmp_path, 1)
    writer.save(model, TOKENIZER, checkpoints.TrainingState(trainer.optimizer, 3, None, {}), best=False)
    writer.wait()
    assert checkpoints.find_damage(tmp_path / "last") is None
    assert sorted(p.name for p in (tmp_path / "last").iterdir()) == [
        "SHA256SUMS", "adapter_base.json", "adapter_config.json", "adapter_model.safetensors", "config.json",
        "optimizer.safetensors", "tokenizer.json", "tokenizer_config.json", "training.json",
    ]  # fmt: skip
    expected = [trainer.step([BATCH]).item() for _ in range(3)]

    other = checkpoint.load_base(tmp_path / "last")
    lora.add(other, lora.read(tmp_path / "last"))
    checkpoint.load_adapters(tmp_path / "last", other)
    for name, p in other.named_weights().items():
        np.testing.assert_array_equal(np.array(p), saved[name], err_msg=name)
    goes_on = Trainer(other, TrainConfig(learning_rate=1e-2, warmup_iters=0, model=SHAPE))
    checkpoints.restore_optimizer(tmp_path / "last", other, goes_on.optimizer)
    goes_on.steps = 3
    assert [goes_on.step([BATCH]).item() for _ in range(3)] == expected
    assert other.lora == model.lora


def test_saving_a_whole_model_over_adapters_leaves_none(base, tmp_path):
    model = adapted(base, random=True)
    checkpoint.save_model(tmp_path / "m", model)
    lora.merge(model)
    checkpoint.save_model(tmp_path / "m", model)
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["config.json", "model.safetensors"]


def test_a_directory_of_adapters_is_opened_merged_and_cropped(base, tmp_path):
    start = convert.start(base)
    assert (start.config, start.tokenizer.vocab_size, start.directory) == (SHAPE, 30, base)
    config = GPTConfig(**{**vars(SHAPE), "block_size": 8, "dropout": 0.1})
    model = GPT(config)
    weights = start.load().named_weights()
    weights["wpe.weight"] = weights["wpe.weight"][:8]
    model.update(tree_unflatten(list(weights.items())))
    lora.add(model, lora.LoRA.of(4, None, ALL, start.directory))
    train_batch = tuple(a[:, :8] for a in BATCH)
    Trainer(model, TrainConfig(learning_rate=1e-2, warmup_iters=0, model=config)).step([train_batch])
    model.eval()
    expected = np.array(model(X[:, :8]))
    checkpoint.save_model(tmp_path / "run" / "best", model, TOKENIZER)
    for dtype in (mx.float32, None):  # training's and generation's
        opened = checkpoint.load_model(tmp_path / "run" / "best", dtype)
        assert opened.config == config
        assert np.abs(np.array(opened(X[:, :8])) - expected).max() < 1e-5
    half = checkpoint.load_model(tmp_path / "run" / "best", mx.float16)
    assert {p.dtype for p in half.named_weights().values()} == {mx.float16}

    convert_weights.main([str(tmp_path / "run" / "best"), str(tmp_path / "merged")])
    assert not lora.is_in(tmp_path / "merged")
    merged = checkpoint.load_model(tmp_path / "merged")
    assert np.abs(np.array(merged(X[:, :8])) - expected).max() < 1e-5
    again = convert.start(tmp_path / "run")  # adapters are something to start from, merged
    assert np.abs(np.array(again.load()(X[:, :8])) - expected).max() < 1e-5


def test_a_base_that_is_gone_or_another_is_named(base, tmp_path):
    ours, directory = tmp_path / "base", tmp_path / "adapter"
    checkpoint.save_model(ours, checkpoint.load_model(base), TOKENIZER)
    checkpoint.save_model(directory, adapted(ours), TOKENIZER)
    checkpoint.load_model(directory)
    changed = GPT(SHAPE)
    checkpoint.save_model(ours, changed, TOKENIZER)
    for opened in (checkpoint.load_model, convert.read):
        with pytest.raises(ValueError, match=rf"adapter: its base {ours} has changed since: model.safetensors is"):
            opened(directory)
    ours.rename(tmp_path / "elsewhere")
    for opened in (checkpoint.load_model, convert.read):
        with pytest.raises(FileNotFoundError, match=rf"adapter: its base, the model directory {ours}, is not there"):
            opened(directory)


def test_adapters_of_another_shape_are_listed(base, tmp_path):
    checkpoint.save_model(tmp_path / "a", adapted(base, "mlp.c_fc"))
    with pytest.raises(ValueError, match=r"missing base_model.*attn.c_proj.lora_A.weight; .*unknown .*mlp.c_fc"):
        checkpoint.load_adapters(tmp_path / "a", adapted(base, "attn.c_proj"))
    with pytest.raises(ValueError, match=r"h.0.mlp.c_fc.lora_A.weight is \(4, 32\), expected \(2, 32\)"):
        checkpoint.load_adapters(tmp_path / "a", adapted(base, "mlp.c_fc", rank=2))


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "not JSON"),
        ("[]", "not an object of settings"),
        ({"peft_type": "IA3"}, "not the configuration of a LoRA adapter"),
        ({"use_dora": True}, "use_dora is True, expected False"),
        ({"r": None}, "r, lora_alpha or target_modules is missing"),
        ({"r": 0}, "lora_rank is 0, expected at least 1"),
        ({"target_modules": ["c_attn"]}, r"lora_targets: unknown layer 'c_attn' \(did you mean 'attn.c_attn'"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path is None, expected a model directory"),
    ],
)
def test_a_bad_adapter_config_is_named(base, tmp_path, content, message):
    checkpoint.save_model(tmp_path / "a", adapted(base))
    file = tmp_path / "a" / lora.CONFIG
    if isinstance(content, dict):
        content = json.dumps({**json.loads(file.read_text()), **content})
    file.write_text(content)
    with pytest.raises(ValueError, match=f"^{file}: {message}"):
        checkpoint.load_model(tmp_path / "a")


@pytest.mark.parametrize(
    "settings, message",
    [
        ((4, 0.0, ALL), "lora_alpha is 0.0, expected a finite number above 0"),
        ((4, None, "mlp.fc"), r"lora_targets: unknown layer 'mlp.fc' \(did you mean 'mlp.c_fc'"),
        ((4, None, " ,"), "lora_targets is empty, expected some of attn.c_attn, "),
    ],
)
def test_bad_settings_are_named(base, settings, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        lora.LoRA.of(*settings, base)
    with pytest.raises(ValueError, match=r"^lora_rank is 4, expected 0 unless init_from is a model directory"):
        lora.LoRA.of(*settings, None)


def test_training_starts_from_nanogpts_file_as_it_does_from_the_converted(base, tmp_path):
    exact = GPTConfig(**{**vars(SHAPE), "activation": "gelu"})
    model = GPT(exact)
    model.eval()
    checkpoint.save_model(tmp_path / "model", model, TOKENIZER)
    convert_weights.main([str(tmp_path / "model"), str(tmp_path / "out"), "--to", "nanogpt"])
    for source in (tmp_path / "out" / "ckpt.pt", tmp_path / "out"):
        start = convert.start(source)
        assert (start.config, start.directory) == (exact, None)
        assert start.tokenizer.characters == TOKENIZER.characters
        np.testing.assert_array_equal(np.array(start.load()(X)), np.array(model(X)))
    (tmp_path / "out" / "meta.pkl").unlink()
    with pytest.raises(ValueError, match=r"^init_from: .*ckpt.pt comes without a tokenizer: put nanoGPT's meta.pkl"):
        convert.start(tmp_path / "out" / "ckpt.pt")
    with pytest.raises(FileNotFoundError, match=r"^init_from: there is no file or directory .*nothing.pt"):
        convert.start(tmp_path / "nothing.pt")
    with pytest.raises(FileNotFoundError, match=r"^init_from: .* is not a model directory: it has no config.json"):
        convert.start(tmp_path)


def test_transformers_opens_the_merged_model(base, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    model = adapted(base, random=True)
    model.eval()
    checkpoint.save_model(tmp_path / "a", model, TOKENIZER)
    convert_weights.main([str(tmp_path / "a"), str(tmp_path / "merged")])
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        logits = theirs(torch.tensor(BATCH[0]).long()).logits.numpy()
    assert np.abs(logits - np.array(model(X))).max() < 1e-5


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT calls what transformers has deprecated
def test_peft_opens_an_adapter(base, tmp_path):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    model = adapted(base, random=True, alpha=3.0)
    model.eval()
    checkpoint.save_model(tmp_path / "a", model, TOKENIZER)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(lora.read(tmp_path / "a").base)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "a").eval()
    with torch.no_grad():
        logits = theirs(torch.tensor(BATCH[0]).long()).logits.numpy()
    assert np.abs(logits - np.array(model(X))).max() < 1e-5
