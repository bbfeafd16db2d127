"""Adapters in files: to the bit, merged with their base, and opened by PEFT."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from adapted_models import ALL, BATCH, SHAPE, TOKENIZER, X, adapted, base_model, train
from mlx.utils import tree_unflatten

from mlxgpt import convert
from mlxgpt.formats import adapters, model_directory, sources
from mlxgpt.model import lora
from mlxgpt.model.config import GPTConfig
from mlxgpt.model.gpt import GPT
from mlxgpt.training import checkpoints
from mlxgpt.training.recipe import TrainConfig
from mlxgpt.training.trainer import Trainer


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("adapters") / "base"
    model_directory.save_model(directory, base_model(), TOKENIZER)
    return directory


def test_a_saved_adapter_comes_back_to_the_bit_and_training_resumed(cpu_backend, base, tmp_path):
    model = adapted("mlp.c_fc,attn.c_attn", base=base)
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

    other = model_directory.load_adapted(tmp_path / "last")
    for name, p in other.named_weights().items():
        np.testing.assert_array_equal(np.array(p), saved[name], err_msg=name)
    resumed = Trainer(other, TrainConfig(learning_rate=1e-2, warmup_iters=0, model=SHAPE))
    checkpoints.restore_optimizer(tmp_path / "last", other, resumed.optimizer)
    resumed.steps = 3
    assert [resumed.step([BATCH]).item() for _ in range(3)] == expected
    assert other.lora == model.lora


def test_saving_a_whole_model_over_adapters_leaves_none(base, tmp_path):
    model = adapted(random=True, base=base)
    model_directory.save_model(tmp_path / "m", model)
    lora.merge(model)
    model_directory.save_model(tmp_path / "m", model)
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["config.json", "model.safetensors"]


def test_a_directory_of_adapters_is_opened_merged_and_cropped(base, tmp_path):
    source = sources.open_model(base)
    assert (source.config, source.tokenizer.vocab_size, source.directory) == (SHAPE, 30, base)
    config = GPTConfig(**{**vars(SHAPE), "block_size": 8, "dropout": 0.1})
    model = GPT(config)
    weights = source.load().named_weights()
    weights["wpe.weight"] = weights["wpe.weight"][:8]
    model.update(tree_unflatten(list(weights.items())))
    lora.add(model, adapters.new(4, None, ALL, source.directory))
    train_batch = tuple(a[:, :8] for a in BATCH)
    Trainer(model, TrainConfig(learning_rate=1e-2, warmup_iters=0, model=config)).step([train_batch])
    model.eval()
    expected = np.array(model(X[:, :8]))
    model_directory.save_model(tmp_path / "run" / "best", model, TOKENIZER)
    for dtype in (mx.float32, None):  # training's and generation's
        opened = model_directory.load_model(tmp_path / "run" / "best", dtype)
        assert opened.config == config
        assert np.abs(np.array(opened(X[:, :8])) - expected).max() < 1e-5
    half = model_directory.load_model(tmp_path / "run" / "best", mx.float16)
    assert {p.dtype for p in half.named_weights().values()} == {mx.float16}

    convert.main([str(tmp_path / "run" / "best"), str(tmp_path / "merged")])
    assert not adapters.is_in(tmp_path / "merged")
    merged = model_directory.load_model(tmp_path / "merged")
    assert np.abs(np.array(merged(X[:, :8])) - expected).max() < 1e-5
    run = sources.open_model(tmp_path / "run")  # training starts from the merged model
    assert np.abs(np.array(run.load()(X[:, :8])) - expected).max() < 1e-5


def test_a_base_that_is_gone_or_another_is_named(base, tmp_path):
    own, directory = tmp_path / "base", tmp_path / "adapter"
    model_directory.save_model(own, model_directory.load_model(base), TOKENIZER)
    model_directory.save_model(directory, adapted(base=own), TOKENIZER)
    model_directory.load_model(directory)
    model_directory.save_model(own, GPT(SHAPE), TOKENIZER)
    for opened in (model_directory.load_model, sources.read_model):
        with pytest.raises(ValueError, match=rf"adapter: its base {own} has changed since: model.safetensors is"):
            opened(directory)
    own.rename(tmp_path / "elsewhere")
    for opened in (model_directory.load_model, sources.read_model):
        with pytest.raises(FileNotFoundError, match=rf"adapter: its base, the model directory {own}, is not there"):
            opened(directory)


def test_adapters_of_another_shape_are_listed(base, tmp_path):
    model_directory.save_model(tmp_path / "a", adapted("mlp.c_fc", base=base))
    with pytest.raises(ValueError, match=r"missing base_model.*attn.c_proj.lora_A.weight; .*unknown .*mlp.c_fc"):
        adapters.load(tmp_path / "a", adapted("attn.c_proj", base=base))
    with pytest.raises(ValueError, match=r"h.0.mlp.c_fc.lora_A.weight is \(4, 32\), expected \(2, 32\)"):
        adapters.load(tmp_path / "a", adapted("mlp.c_fc", rank=2, base=base))


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "not JSON"),
        ("[]", "it holds a JSON list, expected an object"),
        ({"peft_type": "IA3"}, "not the configuration of a LoRA adapter"),
        ({"use_dora": True}, "use_dora is True, expected False"),
        ({"r": None}, "r, lora_alpha or target_modules is missing"),
        ({"r": 0}, "lora_rank is 0, expected at least 1"),
        ({"target_modules": ["c_attn"]}, r"lora_targets: unknown layer 'c_attn' \(did you mean 'attn.c_attn'"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path is None, expected a model directory"),
    ],
)
def test_a_bad_adapter_config_is_named(base, tmp_path, content, message):
    model_directory.save_model(tmp_path / "a", adapted(base=base))
    file = tmp_path / "a" / adapters.CONFIG
    if isinstance(content, dict):
        content = json.dumps({**json.loads(file.read_text()), **content})
    file.write_text(content)
    with pytest.raises(ValueError, match=f"^{file}: {message}"):
        model_directory.load_model(tmp_path / "a")


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
        adapters.new(*settings, base)
    with pytest.raises(ValueError, match=r"^lora_rank is 4, expected 0 unless init_from is a model directory"):
        adapters.new(*settings, None)


def test_transformers_opens_the_merged_model(base, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    model = adapted(random=True, base=base)
    model.eval()
    model_directory.save_model(tmp_path / "a", model, TOKENIZER)
    convert.main([str(tmp_path / "a"), str(tmp_path / "merged")])
    opened = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        logits = opened(torch.tensor(BATCH[0]).long()).logits.numpy()
    assert np.abs(logits - np.array(model(X))).max() < 1e-5


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT calls what transformers has deprecated
def test_peft_opens_an_adapter(base, tmp_path):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    model = adapted(random=True, alpha=3.0, base=base)
    model.eval()
    model_directory.save_model(tmp_path / "a", model, TOKENIZER)
    gpt2 = transformers.GPT2LMHeadModel.from_pretrained(adapters.read(tmp_path / "a").base)
    opened = peft.PeftModel.from_pretrained(gpt2, tmp_path / "a").eval()
    with torch.no_grad():
        logits = opened(torch.tensor(BATCH[0]).long()).logits.numpy()
    assert np.abs(logits - np.array(model(X))).max() < 1e-5
