"""Settings of a training run, and the presets that stand for many of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from ..common.settings import nearest, require, require_at_least, require_seed
from ..model.config import GPTConfig


@dataclass(frozen=True)
class TrainConfig:
    """Train a GPT on text. With no arguments: a small model on Python's own standard library."""

    preset: str = ""
    """cpu, shakespeare-char, gpt2, gpt2-medium, gpt2-large or gpt2-xl: where the other defaults come from;
    unset, cpu on the CPU and shakespeare-char on the GPU"""
    config: str = ""
    """a TOML file that sets any of these names; the command line wins over it"""

    data: str = "stdlib"
    """a text file, a directory, a glob, or a named corpus: stdlib (the Python standard library's source, found
    on this machine) or shakespeare (1.1 MB, downloaded once)"""
    tokenizer: Literal["char", "gpt2"] = "char"
    """char: one token per character; gpt2: GPT-2's byte-pair encoding"""
    out_dir: str = ""
    """where the run is written; unset, runs/PRESET, numbered when that is taken"""
    overwrite: bool = False
    """write into an out_dir that already holds a run"""
    init_from: str = ""
    """what to start from, its weights, shape and tokenizer: a model directory, a run, nanoGPT's ckpt.pt, or what else
    the converter reads"""
    resume: str = ""
    """a run, or a model directory with training state, to go on with; its settings hold unless others are given"""

    batch_size: int = 12
    """sequences per micro-batch"""
    gradient_accumulation_steps: int = 1
    """micro-batches per optimizer step, each of other text"""
    max_iters: int = 2000
    """optimizer steps"""
    learning_rate: float = 1e-3
    """peak learning rate"""
    min_lr: float | None = None
    """learning rate at the end of the decay; None is learning_rate / 10"""
    warmup_iters: int = 100
    """steps of linear warm-up"""
    lr_decay_iters: int | None = None
    """step at which the cosine decay ends; None is max_iters"""
    decay_lr: bool = True
    """decay the learning rate; False holds it at learning_rate after the warm-up"""
    weight_decay: float = 0.1
    """AdamW's decay, on matrices only"""
    beta1: float = 0.9
    """AdamW's decay of the gradient average"""
    beta2: float = 0.99
    """AdamW's decay of the squared-gradient average"""
    grad_clip: float = 1.0
    """largest global norm of the gradient; 0 turns clipping off"""

    eval_interval: int = 250
    """steps between evaluations"""
    eval_iters: int = 40
    """validation batches per evaluation, the same ones each time"""
    log_interval: int = 10
    """steps between lines of the log"""
    sample_tokens: int = 200
    """length of the sample shown at each evaluation; 0 shows none"""
    save_interval: int | None = None
    """steps between checkpoints; None is eval_interval"""
    keep_last: int = 2
    """checkpoints that are kept beside the best one"""
    max_skipped: int = 10
    """steps in a row with a loss or gradient that is not finite, each skipped, after which the run stops"""
    spike_threshold: float = 6.0
    """standard deviations above the running mean from which on a loss is logged as a spike; 0 looks for none"""

    freeze: str = ""
    """parameters not to train, by their names or how those begin, separated by commas: wte,wpe,h.0"""
    lora_rank: int = 0
    """above 0, weights stay as they are, and a correction of this rank to some of them is trained"""
    lora_alpha: float | None = None
    """the correction is scaled by lora_alpha / lora_rank; None is 2 lora_rank"""
    lora_targets: str = "attn.c_attn,attn.c_proj"
    """the linear layers that are corrected, of attn.c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj"""

    device: Literal["auto", "cpu", "gpu"] = "auto"
    """auto takes the GPU where MLX has one"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 computes in bfloat16 and keeps float32 master weights"""
    compile: bool = True
    """compile the training step with mx.compile (GPU only)"""
    grad_checkpoint: bool = False
    """keep only the input of each block for the backward pass, and compute the rest again there: less memory,
    about a third more time"""
    seed: int = 1337
    """of the initial weights, the batches, dropout and the samples"""

    tensorboard: bool = False
    """write out_dir/tensorboard too (pip install 'mlxgpt[tensorboard]')"""
    wandb: str = ""
    """a project of Weights & Biases to log to as well (pip install 'mlxgpt[wandb]')"""

    model: GPTConfig = field(default_factory=GPTConfig)

    def __post_init__(self) -> None:
        require_at_least(1, self, "batch_size", "gradient_accumulation_steps", "max_iters")
        require_at_least(1, self, "eval_interval", "eval_iters", "log_interval")
        require_at_least(1, self, "keep_last", "max_skipped")
        require_at_least(0, self, "warmup_iters", "weight_decay", "grad_clip", "sample_tokens")
        require_at_least(0, self, "spike_threshold", "lora_rank")
        if self.save_interval is not None:
            require_at_least(1, self, "save_interval")
        require_seed(self.seed)
        require(0 < self.learning_rate < math.inf, "learning_rate", self.learning_rate, "a finite number above 0")
        if self.min_lr is not None:
            require(
                0 <= self.min_lr <= self.learning_rate,
                "min_lr",
                self.min_lr,
                f"0 to learning_rate = {self.learning_rate}",
            )
        if self.lr_decay_iters is not None:
            require_at_least(1, self, "lr_decay_iters")
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), f"0 <= {name} < 1")


def _gpt2(n_layer: int, n_head: int, n_embd: int, block_size: int = 1024) -> dict[str, Any]:
    """A GPT-2 size with nanoGPT's recipe for reproducing it."""
    return dict(
        n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=block_size, tokenizer="gpt2",
        batch_size=12, gradient_accumulation_steps=40, max_iters=600_000, learning_rate=6e-4, warmup_iters=2000,
        beta2=0.95, eval_interval=2000, eval_iters=200,
    )  # fmt: skip


PRESETS: dict[str, dict[str, Any]] = {
    # nanoGPT's recipe for a laptop without a GPU
    "cpu": dict(
        n_layer=4, n_head=4, n_embd=128, block_size=64, batch_size=12, max_iters=2000, learning_rate=1e-3,
        warmup_iters=100, beta2=0.99, eval_interval=250, eval_iters=40,
    ),
    # nanoGPT's config/train_shakespeare_char.py
    "shakespeare-char": dict(
        n_layer=6, n_head=6, n_embd=384, block_size=256, dropout=0.2, bias=False, batch_size=64, max_iters=5000,
        learning_rate=1e-3, warmup_iters=100, beta2=0.99, eval_interval=250, eval_iters=200,
    ),
    "gpt2": _gpt2(12, 12, 768, block_size=512),
    "gpt2-medium": _gpt2(24, 16, 1024),
    "gpt2-large": _gpt2(36, 20, 1280),
    "gpt2-xl": _gpt2(48, 25, 1600),
}  # fmt: skip


def preset(name: str) -> dict[str, Any]:
    """The settings of a preset, by their flat names. ValueError names the nearest one."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset '{name}'{nearest(name, PRESETS)}; there are {', '.join(PRESETS)}")
    return PRESETS[name]
