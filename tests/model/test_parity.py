"""Live comparisons with PyTorch and transformers; they run where the extra `parity` is installed."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_unflatten

from mlxgpt.data.tokenizer import BPETokenizer, CharTokenizer
from mlxgpt.formats import gpt2, quantized, training_state
from mlxgpt.formats import model_directory as checkpoint
from mlxgpt.model.config import GPTConfig
from mlxgpt.model.gpt import GPT
from mlxgpt.training import trainer as training
from mlxgpt.training.checkpoints import restore_optimizer
from mlxgpt.training.optim import learning_rate
from mlxgpt.training.recipe import TrainConfig

torch = pytest.importorskip("torch")
torch_gpt = pytest.importorskip("torch_gpt")


def torch_model(config: GPTConfig, scale: float = 1.0):
    torch.manual_seed(0)
    shape = {n: v for n, v in vars(config).items() if n not in ("dropout", "layer_norm_epsilon")}
    model = torch_gpt.GPT(**shape)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale).add_(torch.randn_like(p) * 0.02 * scale)
    return model


def ours(model, config: GPTConfig) -> GPT:
    gpt = GPT(config)
    gpt.update(tree_unflatten([(name, mx.array(w)) for name, w in model.weights().items()]))
    gpt.eval()
    return gpt


@pytest.mark.parametrize(
    "config",
    [
        GPTConfig(block_size=33, vocab_size=101, n_layer=3, n_head=5, n_embd=60),
        GPTConfig(block_size=64, vocab_size=65, n_layer=2, n_head=1, n_embd=48, bias=False),
        GPTConfig(block_size=130, vocab_size=65, n_layer=2, n_head=2, n_embd=128, activation="gelu"),
        GPTConfig(block_size=7, vocab_size=20, n_layer=1, n_head=4, n_embd=12, activation="gelu", bias=False),
        GPTConfig(block_size=9, vocab_size=31, n_layer=2, n_head=3, n_embd=24, tied_head=False),
        GPTConfig(block_size=9, vocab_size=24, n_layer=1, n_head=3, n_embd=24, tied_head=False, bias=False),
    ],
)
def test_logits_and_transformers_reading_our_directory(config, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = torch_model(config, scale=2)
    ids = np.random.default_rng(1).integers(0, config.vocab_size, (2, config.block_size))
    with torch.no_grad():
        model.ln_f.weight.mul_(10 / model(torch.tensor(ids)).abs().max())  # logits of order 10
        theirs = model(torch.tensor(ids)).numpy()
    gpt = ours(model, config)
    logits = np.array(gpt(mx.array(ids.astype(np.int32))))
    assert np.abs(theirs).max() > 5
    assert np.abs(logits - theirs).max() < 1e-4

    checkpoint.save_model(tmp_path / "m", gpt)
    hf, report = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not any(report.values())
    with torch.no_grad():
        theirs = hf.eval()(torch.tensor(ids)).logits.numpy()
    assert np.abs(logits - theirs).max() < 1e-4

    if config.bias:  # and the other way
        hf.save_pretrained(tmp_path / "hf")
        again = np.array(checkpoint.load_model(tmp_path / "hf")(mx.array(ids.astype(np.int32))))
        assert np.array_equal(again, logits)


def test_the_default_model_in_transformers(tmp_path):
    """GPT-2's own size: 512 positions, 12 layers, 12 heads of 64."""
    transformers = pytest.importorskip("transformers")
    mx.random.seed(1)
    gpt = GPT(GPTConfig())
    gpt.ln_f.weight = gpt.ln_f.weight * 8
    gpt.eval()
    checkpoint.save_model(tmp_path / "m", gpt)
    ids = np.random.default_rng(2).integers(0, 50257, (1, 24))
    logits = np.array(gpt(mx.array(ids.astype(np.int32))))
    with torch.no_grad():
        theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "m").eval()(torch.tensor(ids)).logits.numpy()
    assert np.abs(theirs).max() > 3
    assert np.abs(logits - theirs).max() < 1e-4


def test_transformers_reads_our_tokenizers(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = GPTConfig(block_size=8, vocab_size=50257, n_layer=1, n_head=1, n_embd=4)
    text = 'def f(x):\n\treturn "é😀"  + x\n\n'
    for n, tokenizer in enumerate((CharTokenizer.of(text), BPETokenizer.gpt2())):
        checkpoint.save_model(tmp_path / str(n), GPT(config), tokenizer)
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / str(n))
        assert theirs(text)["input_ids"] == tokenizer.encode(text).tolist()
        assert theirs.decode(theirs(text)["input_ids"]) == text


@pytest.mark.filterwarnings("default")  # of mlx_lm's own
@pytest.mark.parametrize(("bits", "bias"), [(None, True), (None, False), (8, True), (4, False)])
def test_mlx_lm_reads_our_directories_and_we_read_mlx_lms(bits, bias, tmp_path):
    mlx_lm = pytest.importorskip("mlx_lm")
    config = GPTConfig(block_size=12, vocab_size=20, n_layer=2, n_head=4, n_embd=64, bias=bias)
    tokenizer = CharTokenizer("abcdefghijklmnopqrst")
    gpt = ours(torch_model(config, scale=4), config)
    checkpoint.save_model(tmp_path / "m", gpt, tokenizer)
    if bits:
        quantization = {"group_size": 64, "bits": bits}
        (tmp_path / "m" / "config.json").write_bytes(gpt2.config_json(config, tokenizer, quantization=quantization))
        weights = quantized.quantize(checkpoint.with_zero_biases(gpt.named_weights(), config), bits)
        mx.save_safetensors(str(tmp_path / "m" / "model.safetensors"), weights, {"format": "mlx"})
    ids = mx.array(np.random.default_rng(1).integers(0, 20, (2, 12)).astype(np.int32))
    logits = checkpoint.load_model(tmp_path / "m")(ids)
    model, _, their_config = mlx_lm.load(str(tmp_path / "m"), return_config=True)
    assert mx.abs(logits).max().item() > 3
    assert mx.abs(model(ids) - logits).max().item() < 1e-4
    mlx_lm.utils.save_model(tmp_path / "theirs", model)
    mlx_lm.utils.save_config(their_config, tmp_path / "theirs" / "config.json")
    again = checkpoint.load_model(tmp_path / "theirs")
    assert again.config == config
    assert mx.array_equal(again(ids), logits).item()


@pytest.mark.parametrize("options", [{}, dict(bias=False, activation="gelu"), dict(tied_head=False)])
def test_the_training_curve_for_100_steps(options):
    config = TrainConfig(
        learning_rate=2e-3, warmup_iters=20, max_iters=100,
        model=GPTConfig(block_size=32, vocab_size=40, n_layer=2, n_head=2, n_embd=32, **options),
    )  # fmt: skip
    rng = np.random.default_rng(3)
    tokens = np.cumsum(rng.integers(0, 3, 3000)) % 40  # something to learn: small steps up
    windows = tokens[rng.integers(0, len(tokens) - 33, (100, 4))[..., None] + np.arange(33)].astype(np.int32)
    batches = [(w[:, :-1], w[:, 1:]) for w in windows]
    model = torch_model(config.model)
    trainer = training.Trainer(ours(model, config.model), config)
    losses = [trainer.step([batch]).item() for batch in batches]
    rates = [learning_rate(config, step) for step in range(100)]
    theirs = torch_gpt.train(model, batches, rates, weight_decay=0.1, beta1=0.9, beta2=0.99)
    assert theirs[0] - theirs[-1] > 1
    assert np.abs(np.array(losses) - theirs).max() < 1e-3


@pytest.mark.parametrize("options", [{}, dict(bias=False, activation="gelu", tied_head=False)])
def test_training_goes_on_where_pytorch_stopped(options, tmp_path):
    adamw = dict(weight_decay=0.1, beta1=0.9, beta2=0.99)
    config = TrainConfig(
        **adamw, learning_rate=2e-3, warmup_iters=5, max_iters=40,
        model=GPTConfig(block_size=16, vocab_size=40, n_layer=2, n_head=2, n_embd=32, **options),
    )  # fmt: skip
    ids = np.random.default_rng(4).integers(0, 40, (40, 4, 17)).astype(np.int32)
    batches = [(a[:, :-1], a[:, 1:]) for a in ids]
    rates = [learning_rate(config, step) for step in range(40)]
    theirs = torch_model(config.model)
    optimizer = theirs.adamw(learning_rate=rates[0], **adamw)
    torch_gpt.train(theirs, batches[:20], rates[:20], optimizer)

    checkpoint.save_model(tmp_path / "m", ours(theirs, config.model))
    averages = {
        f"{ours_}.{name}": mx.array(optimizer.state[p][their_name].numpy())
        for ours_, their_name in {"m": "exp_avg", "v": "exp_avg_sq"}.items()
        for name, p in theirs.named_parameters()
    }
    mx.save_safetensors(str(tmp_path / "m" / training_state.OPTIMIZER), averages)
    record = dict(step=20, learning_rate=rates[19], beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1)
    record = training_state.training_json(**record, best_val_loss=None, settings={})
    (tmp_path / "m" / training_state.TRAINING).write_bytes(record)

    trainer = training.Trainer(checkpoint.load_model(tmp_path / "m"), config)
    trainer.steps = restore_optimizer(tmp_path / "m", trainer.model, trainer.optimizer)["step"]
    losses = [trainer.step([batch]).item() for batch in batches[20:]]
    expected = torch_gpt.train(theirs, batches[20:], rates[20:], optimizer)
    assert np.abs(np.array(losses) - expected).max() < 1e-5
    fresh = training.Trainer(checkpoint.load_model(tmp_path / "m"), config)
    fresh.steps = 20
    others = [fresh.step([batch]).item() for batch in batches[20:]]
    assert np.abs(np.array(others) - expected).max() > 1e-3  # the optimizer's state matters
