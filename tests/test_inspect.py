"""python -m mlxgpt.inspect: its numbers against counts made by hand."""

from __future__ import annotations

import re

import mlx.core as mx
import pytest

from mlxgpt import inspect
from mlxgpt.formats import model_directory as checkpoint
from mlxgpt.model.cache import KVCache
from mlxgpt.model.config import GPTConfig
from mlxgpt.model.gpt import GPT
from mlxgpt.training import device_memory


@pytest.fixture
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")


def screen(capsys, *args: str) -> str:
    inspect.main(args)
    return capsys.readouterr().out


def row(text: str, name: str) -> str:
    (line,) = (line for line in text.splitlines() if line.strip().startswith(name))
    return " ".join(line.split())


def test_the_default_answers_the_newcomers_question(capsys, wide):
    text = screen(capsys)
    words = " ".join(text.split())
    assert "12 heads x 64 = 768" in words
    assert "Every head sees all 512 positions" in words
    for name, shapes in {
        "tokens": "[1, 512]",
        "wte ": "[50257, 768] [1, 512, 768]",
        "h.0.attn.c_attn": "[2304, 768] [1, 512, 2304]",
        "h.0.attn q ": "[1, 12, 512, 64]",
        "h.0.attn q k^T": "[1, 12, 512, 512]",
        "h.0.mlp.c_fc": "[3072, 768] [1, 512, 3072]",
        "h.1 ... h.11": "11 more blocks",
        "head": "[50257, 768] [1, 512, 50257]",
    }.items():
        squeezed = "\n".join(" ".join(line.split()) for line in text.split("Parameters")[0].splitlines())
        assert any(line.startswith(name) and shapes in line for line in squeezed.splitlines()), name


def test_gpt2_small_has_the_published_count(capsys, wide):
    text = screen(capsys, "gpt2", "--block_size", "1024")
    assert "124,439,808" in row(text, "total")
    assert "123,653,376" in row(text, "without wpe")
    assert "85,056,000" in row(text, "without wte and wpe")
    assert "163,037,184" in row(text, "with a head of its own")


def test_a_head_of_its_own_is_counted(capsys, wide):
    text = screen(capsys, "gpt2", "--block_size", "1024", "--no-tied_head")
    assert "163,037,184" in row(text, "total")
    assert "124,439,808" in row(text, "with a tied head")
    assert "123,653,376" in row(text, "without wte and wpe")
    shapes, parameters = text.split("Parameters")[:2]
    assert "[50257, 768] [1, 1024, 50257]" in row(shapes, "lm_head")
    assert "38,597,376" in row(parameters.split("Arithmetic")[0], "lm_head")
    assert "77.19 MFLOP" in row(parameters.split("Arithmetic")[1], "head")


@pytest.mark.parametrize(
    ("name", "total"), [("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)]
)
def test_larger_presets_have_the_published_counts(capsys, wide, name, total):
    assert f"{total:,}" in row(screen(capsys, name), "total")


def test_flops_and_memory_are_those_of_the_shapes(capsys, wide):
    B, T, C, L, V, H = 2, 16, 32, 3, 50, 4
    model = GPT(GPTConfig(block_size=T, vocab_size=V, n_layer=L, n_head=H, n_embd=C))
    ids, cache = mx.zeros((B, T), mx.int32), KVCache(L, T, B)
    calls = inspect.trace(model, ids)
    inspect.trace(model, ids, cache)
    matrices = L * (3 * C * C + C * C + 8 * C * C) + V * C
    attention = L * 4 * C * (T + 1) / 2  # per token, mean over positions
    assert sum(call.matmul_flops() for call in calls) == B * T * (2 * matrices + attention)
    assert cache.nbytes == 2 * L * B * T * C * 4
    # per layer: ln_1's and c_attn's inputs, q k v, c_proj's, ln_2's and c_fc's inputs, gelu's and c_proj's
    saved = {id(a): a for call in calls for a in call.inputs if a.dtype != mx.int32 and call.op != "cross_entropy"}
    assert sum(a.nbytes for a in saved.values()) == 4 * B * T * C * (L * (1 + 1 + 3 + 1 + 1 + 1 + 4 + 4) + 2)


def test_memory_with_and_without_checkpointed_blocks(capsys, wide):
    without, checkpointed = (screen(capsys, "shakespeare-char", *flags) for flags in ([], ["--grad_checkpoint"]))

    def sizes(text: str, title: str) -> list[str]:
        return re.findall(r"[\d.]+ [MG]B", row(text, title))  # the kernels', where they are there, and MLX's

    assert sizes(without, "training in total") == sizes(checkpointed, "without grad_checkpoint")
    assert sizes(without, "with grad_checkpoint") == sizes(checkpointed, "training in total") != []
    assert row(without, "activations") != row(checkpointed, "activations")


@pytest.mark.parametrize(
    ("free", "note"), [(64 * 10**9, "64.00 GB free: a run fits"), (10**9, "too little for a run by")]
)
def test_it_says_whether_a_run_fits_here(capsys, wide, monkeypatch, free, note):
    monkeypatch.setattr(device_memory, "available", lambda: device_memory.DeviceMemory(64 * 10**9, free))
    text = screen(capsys, "gpt2", "--batch_size", "4", "--dtype", "float16")
    assert note in row(text, "this ")
    assert row(text, "a checkpoint's copies").split()[3:5] == ["1.49", "GB"]


def test_memory_that_cant_be_asked_for_is_not_shown(capsys, wide, monkeypatch):
    monkeypatch.setattr(device_memory, "available", lambda: None)
    assert "this CPU" not in screen(capsys)


def test_nothing_is_computed():
    """A model of a trillion parameters is inspected as fast as a small one."""
    config = GPTConfig(block_size=2048, vocab_size=50257, n_layer=2, n_head=128, n_embd=204_800)
    calls = inspect.trace(GPT(config), mx.zeros((1, 2048), mx.int32))
    assert (calls[-1].op, calls[-1].path) == ("linear", "wte")


def test_a_model_directory(capsys, wide, tmp_path):
    checkpoint.save_model(tmp_path / "m", GPT(GPTConfig(block_size=8, vocab_size=9, n_layer=1, n_head=2, n_embd=8)))
    text = screen(capsys, str(tmp_path / "m"), "--batch_size", "3", "--dtype", "bfloat16")
    assert "[3, 8, 24]" in text
    assert "Memory in bfloat16" in text
    assert "master weights" in text


def test_an_unknown_name_says_what_there_is():
    with pytest.raises(ValueError, match=r"neither a preset \(did you mean 'gpt2-xl'\?\) nor a directory"):
        inspect.main(["gpt2xl"])
