"""The settings of a training run, and the presets: named sets of them."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from ..common.settings import nearest, require, require_at_least, require_seed, settings
from ..model.config import GPTConfig


@dataclass(frozen=True)
class TrainConfig:
    """Train a GPT on text. With no arguments: a small model on Python's own standard library."""

    preset: str = ""
    """the defaults of the other settings: cpu, shakespeare-char, gpt2, gpt2-medium, gpt2-large or gpt2-xl;
    unset, cpu on the CPU and shakespeare-char on the GPU"""
    config: str = ""
    """a TOML file with any of these settings; the command line wins over it"""

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
    """begin with the weights, shape and tokenizer of this model: a model directory, a run, nanoGPT's ckpt.pt, or
    anything else that the converter reads"""
    resume: str = ""
    """continue this run, or this model directory with training state; its settings hold unless others are given"""

    batch_size: int = 12
    """sequences per micro-batch"""
    gradient_accumulation_steps: int = 1
    """micro-batches per optimizer step, each of different text"""
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
    """newest checkpoints to keep, beside the best one"""
    max_skipped: int = 10
    """a step whose loss or gradient is not finite is skipped; after this many in a row the run stops"""
    spike_threshold: float = 6.0
    """a loss more than this many standard deviations above the running mean is logged as a spike; 0 logs none"""

    freeze: str = ""
    """parameters not to train: names, or beginnings of names, separated by commas, as in wte,wpe,h.0"""
    lora_rank: int = 0
    """above 0, train LoRA adapters of this rank and leave the weights as they are"""
    lora_alpha: float | None = None
    """the adapters' output is scaled by lora_alpha / lora_rank; None is 2 lora_rank"""
    lora_targets: str = "attn.c_attn,attn.c_proj"
    """the linear layers that get adapters: any of attn.c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj"""

    device: Literal["auto", "cpu", "gpu"] = "auto"
    """auto takes the GPU where MLX has one"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """bfloat16 and float16 compute in half precision and keep float32 master weights; float16 scales the loss"""
    compile: bool = True
    """compile the training step with mx.compile (GPU only)"""
    grad_checkpoint: bool = False
    """keep only each block's input for the backward pass, and recompute the rest there: less memory, about a third
    more time"""
    fit: bool = False
    """where the device has too little memory, take smaller micro-batches (more of them to a step), grad_checkpoint or
    bfloat16, whatever does least harm and fits"""
    seed: int = 1337
    """seeds initial weights, data order, dropout and samples"""

    tensorboard: bool = False
    """write out_dir/tensorboard too (pip install 'mlxgpt[tensorboard]')"""
    wandb: str = ""
    """log to this project of Weights & Biases too (pip install 'mlxgpt[wandb]')"""

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
        if (low := self.min_lr) is not None:
            require(0 <= low <= self.learning_rate, "min_lr", low, f"0 to learning_rate = {self.learning_rate}")
        if self.lr_decay_iters is not None:
            require_at_least(1, self, "lr_decay_iters")
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), f"0 <= {name} < 1")

    def flat(self) -> dict[str, Any]:
        """All settings by their flat names, the model's among them."""
        values = {**vars(self), **vars(self.model)}
        return {name: values[name] for name in settings(TrainConfig)}

    def recorded(self) -> dict[str, Any]:
        """The settings that a run records, by their flat names: all that are needed to repeat it."""
        return {name: value for name, value in self.flat().items() if name not in ("config", "resume", "fit")}

    def toml(self) -> bytes:
        """The content of a run's settings.toml: `--config` with this file repeats the run."""
        values = {name: value for name, value in self.recorded().items() if value is not None}
        return "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items()).encode()


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
    """The settings of a preset, by their flat names. ValueError for an unknown preset names the nearest one."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset '{name}'{nearest(name, PRESETS)}; there are {', '.join(PRESETS)}")
    return PRESETS[name]
