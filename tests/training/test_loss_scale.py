"""Half precision: how near it comes to float32, and the scale that float16 needs."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxgpt import train
from mlxgpt.model import ops
from mlxgpt.model.config import GPTConfig
from mlxgpt.model.gpt import GPT
from mlxgpt.training import loss_scale
from mlxgpt.training.loss_scale import LossScale, is_overflow
from mlxgpt.training.optim import AdamW
from mlxgpt.training.recipe import TrainConfig
from mlxgpt.training.trainer import Batch, Trainer

SHAPE = GPTConfig(block_size=16, vocab_size=32, n_layer=2, n_head=2, n_embd=32)
TEXT = "the quick brown fox jumps over the lazy dog\n" * 40


def batches(n: int) -> list[Batch]:
    """Tokens with something to learn: each is its predecessor plus 1 or 2."""
    steps = np.random.default_rng(0).integers(1, 3, (n, 4, SHAPE.block_size + 1))
    ids = (np.cumsum(steps, axis=-1) % SHAPE.vocab_size).astype(np.int32)
    return [(a[:, :-1], a[:, 1:]) for a in ids]


def trainer(dtype: str, **options) -> Trainer:
    mx.random.seed(0)
    config = TrainConfig(dtype=dtype, learning_rate=3e-3, warmup_iters=10, max_iters=200, model=SHAPE, **options)
    return Trainer(GPT(SHAPE), config)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_scale_adapts(monkeypatch, compiled):
    monkeypatch.setattr(loss_scale, "FIRST", 2.0**16)
    monkeypatch.setattr(loss_scale, "INTERVAL", 3)
    scale = LossScale()
    update = mx.compile(scale.update, scale.state, scale.state) if compiled else scale.update

    def after(loss: float, norm: float) -> tuple[float, int]:
        update(mx.array(loss), mx.array(norm))
        return scale.state["scale"].item(), scale.state["good_steps"].item()

    assert [after(1, 1) for _ in range(4)] == [(2**16, 1), (2**16, 2), (2**17, 0), (2**17, 1)]
    assert after(np.nan, np.nan) == (2**17, 1)  # this is not the scale's fault
    assert after(np.inf, np.nan) == (2**17, 1)
    assert after(1, np.nan) == (2**16, 0)
    assert after(1, np.inf) == (2**15, 0)
    assert [after(1, np.nan)[0] for _ in range(20)] == [max(1, 2**n) for n in range(14, -6, -1)]
    other = LossScale()
    other.restore(json.loads(json.dumps({**scale.saved(), "good_steps": 2})))
    assert other.saved() == {"scale": 1, "good_steps": 2}
    other.update(mx.array(1.0), mx.array(1.0))
    assert other.saved() == {"scale": 2, "good_steps": 0}
    other.restore({"scale": 2**24, "good_steps": 2})
    other.update(mx.array(1.0), mx.array(1.0))
    assert other.saved() == {"scale": 2**24, "good_steps": 0}


def test_only_a_scale_above_the_least_is_an_overflow():
    assert is_overflow(1.0, np.nan, 2.0)
    assert not is_overflow(1.0, np.nan, 1.0)
    assert not is_overflow(np.nan, np.nan, 2.0)
    assert not is_overflow(1.0, 1.0, 2.0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_learns_as_float32_does(dtype):
    """After 200 steps, by the validation loss in its own precision."""
    *some, last = batches(201)
    losses = {}
    for kind in ("float32", dtype):
        one = trainer(kind)
        for batch in some:
            one.step([batch])
        assert {w.dtype for w in one.model.named_weights().values()} == {mx.float32}
        losses[kind] = one.evaluate([last])
    assert losses["float32"] < 1  # from ln 32 = 3.5
    assert losses[dtype] == pytest.approx(losses["float32"], abs=0.01)
    assert losses[dtype] != losses["float32"]


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_a_frequent_ids_gradient_is_summed_in_float32(dtype):
    """In bfloat16 a sum of 1000 equal terms stops at 256 of them."""
    ids, weight = mx.arange(4000).reshape(40, 100) % 4, mx.zeros((4, 8))

    def loss(weight: mx.array) -> mx.array:
        return (ops.embedding(ids, weight.astype(dtype)) * mx.arange(8)).astype(mx.float32).sum()

    np.testing.assert_allclose(mx.grad(loss)(weight), 1000 * np.arange(8) * np.ones((4, 1)), rtol=4e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_micro_batches_are_summed_in_float32(monkeypatch, dtype):
    seen = []

    def update(self, model, gradients, loss, max_norm):
        seen.append({name: np.array(g) for name, g in tree_flatten({"loss": loss, **gradients})})
        return mx.array(1.0)

    monkeypatch.setattr(AdamW, "update_if_finite", update)
    parts, one = batches(3), trainer(dtype)
    for some in (parts, *([part] for part in parts)):
        one.step(some)
    for name, mean in seen[0].items():
        assert mean.dtype == np.float32, name
        np.testing.assert_allclose(mean, np.mean([s[name] for s in seen[1:]], axis=0), rtol=1e-4, atol=1e-8)


def test_an_overflow_changes_nothing_but_the_scale():
    one = trainer("float16")
    one.loss_scale.restore({"scale": 2.0**30, "good_steps": 5})
    before = {name: np.array(w) for name, w in one.model.named_weights().items()}
    some = batches(40)
    loss = one.step(some[:2])
    assert np.isfinite(loss.item()) and not np.isfinite(one.norm.item())
    assert (one.scale.item(), one.loss_scale.saved()) == (2.0**30, {"scale": 2.0**29, "good_steps": 0})
    assert one.optimizer.step.item() == 0
    for name, w in one.model.named_weights().items():
        np.testing.assert_array_equal(w, before[name], err_msg=name)
    for batch in some:
        one.step([batch])
    taken = one.optimizer.step.item()
    assert 10 < taken < 40
    assert one.scale.item() == 2.0 ** (29 - (40 - taken))


def test_the_norm_does_not_depend_on_the_scale_unless_elements_are_lost():
    norms = []
    for scale in (2.0**8, 2.0**12, 2.0**-16):
        one = trainer("float16")
        one.loss_scale.restore({"scale": scale, "good_steps": 0})
        one.step(batches(2))
        norms.append(one.norm.item())
    reference = trainer("float32")
    reference.step(batches(2))
    assert norms[:2] == pytest.approx([reference.norm.item()] * 2, rel=5e-3)
    assert norms[2] < 0.9 * reference.norm.item()


FLAGS = (
    "--data text.txt --dtype float16 --device cpu --n_layer 1 --n_head 2 --n_embd 16 --block_size 16 --batch_size 4 "
    "--gradient_accumulation_steps 2 --eval_interval 3 --eval_iters 2 --log_interval 1 --sample_tokens 0 "
    "--lr_decay_iters 9 --learning_rate 0.01 --max_skipped 2"
).split()


@pytest.fixture
def directory(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def lines_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_with_overflows_goes_on_and_is_resumed_exactly(directory, monkeypatch, capsys):
    monkeypatch.setattr(loss_scale, "FIRST", 2.0**24)
    monkeypatch.setattr(loss_scale, "INTERVAL", 4)
    train.main([*FLAGS, "--out_dir", "whole", "--max_iters", "12"])
    train.main([*FLAGS, "--out_dir", "half", "--max_iters", "7"])
    train.main(["--resume", "half", "--max_iters", "12"])
    whole, half = (
        [{name: line.get(name) for name in ("step", "loss", "val_loss", "event", "loss_scale")} for line in lines]
        for lines in (lines_of(directory / "whole"), lines_of(directory / "half"))
    )
    overflows = [line["loss_scale"] for line in whole if line["event"]]
    assert len(overflows) > 2 and overflows[:3] == [2.0**24, 2.0**23, 2.0**22]
    assert {line["event"] for line in whole} == {None, "overflow"}
    assert any(line["loss"] and line["loss_scale"] > min(overflows) / 2 for line in whole)  # it has grown again
    assert "step 1 is skipped: its gradient overflows at a loss scale of 1.67772e+07" in capsys.readouterr().out
    assert [line for line in half if line["step"] != 7 or not line["val_loss"]] == whole
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (directory / "half/last" / name).read_bytes() == (directory / "whole/last" / name).read_bytes()


def test_overflows_at_the_least_scale_end_the_run(directory, monkeypatch):
    for name in ("FIRST", "FLOOR"):
        monkeypatch.setattr(loss_scale, name, 2.0**40)
    message = r"2 steps in a row, to step 2, had no finite loss and gradient: .* below 0.01, or --dtype bfloat16"
    with pytest.raises(ValueError, match=message):
        train.main([*FLAGS, "--out_dir", "run", "--max_iters", "12"])


def test_half_precision_on_a_cpu_says_that_it_is_slow(directory, capsys, cpu_backend):
    train.main([*FLAGS, "--out_dir", "run", "--max_iters", "1"])
    said = capsys.readouterr().out
    assert "device: CPU with MLX alone, float16" in said
    hint = "float16 has no C++ kernels: on a CPU, --dtype float32 is many times faster"
    assert (hint in said) == (cpu_backend == "kernels")
