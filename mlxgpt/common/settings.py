"""Settings: the dataclasses and their presets.

Every setting is a field below: its name is its flag and its TOML key, its docstring its --help text.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import tyro

Config = TypeVar("Config")


def _require(rule: bool, name: str, value: object, text: str) -> None:
    if not rule:
        raise ValueError(f"{name} is {value}, expected {text}")


def _require_at_least(least: int, config: object, *names: str) -> None:
    for name in names:
        _require(getattr(config, name) >= least, name, getattr(config, name), f"at least {least}")


def _require_seed(seed: int) -> None:
    _require(0 <= seed < 2**63, "seed", seed, "0 to 2**63 - 1")


@dataclass(frozen=True)
class GPTConfig:
    """The model's shape. With no arguments: 512 positions, 12 layers, 12 heads of 64, 768 wide."""

    block_size: int = 512
    """longest sequence the model sees, in tokens"""
    vocab_size: int = 50257
    """number of token ids; in training at least the tokenizer's number, which it is when unset"""
    n_layer: int = 12
    """number of transformer blocks"""
    n_head: int = 12
    """attention heads per block; head_dim = n_embd / n_head"""
    n_embd: int = 768
    """width of the residual stream"""
    dropout: float = 0.0
    """probability of dropping an activation in training"""
    bias: bool = True
    """biases in the linear layers and layer norms, as GPT-2 has them"""
    activation: Literal["gelu_new", "gelu"] = "gelu_new"
    """gelu_new: GPT-2's tanh form; gelu: the exact form that nanoGPT trains with"""
    layer_norm_epsilon: float = 1e-5
    """added to the variance inside layer norm"""
    tied_head: bool = True
    """the head is the token embedding; False gives it a weight of its own"""

    def __post_init__(self) -> None:
        _require_at_least(1, self, "block_size", "vocab_size", "n_layer", "n_head", "n_embd")
        _require(self.n_embd % self.n_head == 0, "n_embd", self.n_embd, f"a multiple of n_head = {self.n_head}")
        _require(0 <= self.dropout < 1, "dropout", self.dropout, "0 <= dropout < 1")
        _require(self.activation in ("gelu_new", "gelu"), "activation", repr(self.activation), "'gelu_new' or 'gelu'")
        _require(self.layer_norm_epsilon > 0, "layer_norm_epsilon", self.layer_norm_epsilon, "more than 0")

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head


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
        _require_at_least(1, self, "batch_size", "gradient_accumulation_steps", "max_iters")
        _require_at_least(1, self, "eval_interval", "eval_iters", "log_interval")
        _require_at_least(1, self, "keep_last", "max_skipped")
        _require_at_least(0, self, "warmup_iters", "weight_decay", "grad_clip", "sample_tokens")
        _require_at_least(0, self, "spike_threshold", "lora_rank")
        if self.save_interval is not None:
            _require_at_least(1, self, "save_interval")
        _require_seed(self.seed)
        _require(0 < self.learning_rate < math.inf, "learning_rate", self.learning_rate, "a finite number above 0")
        if self.min_lr is not None:
            _require(
                0 <= self.min_lr <= self.learning_rate,
                "min_lr",
                self.min_lr,
                f"0 to learning_rate = {self.learning_rate}",
            )
        if self.lr_decay_iters is not None:
            _require_at_least(1, self, "lr_decay_iters")
        for name in ("beta1", "beta2"):
            _require(0 <= getattr(self, name) < 1, name, getattr(self, name), f"0 <= {name} < 1")


@dataclass(frozen=True)
class SampleConfig:
    """Sample text from a model directory."""

    model: str
    """the model directory that training or the converter wrote"""
    prompt: str = ""
    """the text to go on from, or - to read it from standard input; empty starts from the end-of-text token, or a
    line break for characters"""
    prompts: str = ""
    """a file of prompts, one a line, or - for standard input"""
    num_samples: int = 1
    """how many samples to draw of each prompt"""
    batch_size: int = 8
    """prompts of a file that are computed together"""
    max_new_tokens: int = 500
    """tokens to generate per sample"""
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """a text that ends a sample and is left out of it, with escapes as in \\n and \\t; may be given several times"""

    temperature: float = 0.8
    """divides the logits; 0 takes the most likely token"""
    top_k: int = 0
    """sample among the k most likely tokens; 0 among all"""
    top_p: float = 1.0
    """sample among the fewest tokens whose probabilities sum to this"""
    min_p: float = 0.0
    """sample among tokens of at least this times the most likely one's probability"""
    repetition_penalty: float = 1.0
    """above 1, tokens of the text so far become less likely"""
    logit_bias: str = ""
    """ID:BIAS,ID:BIAS: numbers added to the logits of some ids; -inf forbids one"""
    seed: int = 1337
    """same seed, same text"""

    on_full: Literal["slide", "stop"] = "slide"
    """when all of the model's positions are taken: slide drops the oldest half of what it sees and reads the rest
    again, stop ends the sample"""
    draft: str = ""
    """a smaller model directory of the same vocabulary, which proposes tokens that the model checks together"""
    draft_tokens: int = 4
    """tokens that the draft proposes at a time"""

    json: bool = False
    """print one JSON object per sample and line"""
    logprobs: bool = False
    """give each token's log-probability by the model, before temperature and the like"""
    verbose: bool = False
    """end with times, speed and memory on standard error"""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """auto takes the GPU where MLX has one"""

    def __post_init__(self) -> None:
        _require_at_least(1, self, "num_samples", "batch_size", "max_new_tokens", "draft_tokens")
        _require(not (self.prompt and self.prompts), "prompts", repr(self.prompts), "none beside a prompt")
        _require_seed(self.seed)


@dataclass(frozen=True)
class EvaluateConfig:
    """Measure a model's loss, perplexity and bits per byte on a whole text."""

    model: str
    """the model directory that training or the converter wrote"""
    data: str
    """a text file, a directory, a glob, or a named corpus, as in training: stdlib or shakespeare"""
    split: Literal["train", "val", "all"] = "all"
    """the part that training trains on, the one that it validates with, or all of the text"""
    stride: int | None = None
    """tokens from one window to the next: the fewer, the more context each token has, and the longer it takes;
    at most block_size; None is half of it"""
    batch_size: int = 8
    """windows computed together"""
    json: bool = False
    """print one JSON object"""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """auto takes the GPU where MLX has one"""

    def __post_init__(self) -> None:
        _require_at_least(1, self, "batch_size")
        if self.stride is not None:
            _require_at_least(1, self, "stride")


@dataclass(frozen=True)
class ConvertConfig:
    """Convert a PyTorch GPT-2 to a model directory, or a model to what other programs read. Runs no pickle code."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """nanoGPT's ckpt.pt or out_dir; a Hugging Face GPT-2 directory, .bin, .pt or .safetensors file; llm.c's .bin; or
    a model directory"""
    destination: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """a directory for mlxgpt and nanogpt, else a file; it appears whole or not at all"""
    to: Literal["mlxgpt", "nanogpt", "gguf", "safetensors"] = "mlxgpt"
    """mlxgpt: a model directory, which is a Hugging Face GPT-2; nanogpt: its ckpt.pt; gguf: for llama.cpp;
    safetensors: one file"""
    dtype: Literal["same", "float32", "float16", "bfloat16"] = "same"
    """of the weights; same as in the source"""
    block_size: int | None = None
    """crop to so many positions"""
    quantize: Literal[0, 4, 8] = 0
    """bits of the matrices in groups of 64, as mlx_lm reads them; 0 does not quantize"""
    meta: str = ""
    """nanoGPT's meta.pkl with the characters; unset, the one beside ckpt.pt"""
    n_head: int = 0
    """heads, for a file that doesn't say; 0 supposes head_dim = 64"""
    force: bool = False
    """replace a destination that is there"""

    def __post_init__(self) -> None:
        _require_at_least(0, self, "n_head")
        if self.block_size is not None:
            _require_at_least(1, self, "block_size")
        _require(not self.quantize or self.to == "mlxgpt", "quantize", self.quantize, "0 unless --to mlxgpt")


@dataclass(frozen=True)
class PrepareConfig:
    """Tokenize text into shards to train on. Killed at any moment, the same command goes on where it was."""

    inputs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="INPUT")] = ()
    """text files, .jsonl, .jsonl.gz and .parquet files, directories or globs of them"""
    out: str = ""
    """the directory to write: shards, manifest and tokenizer"""
    tokenizer: str = "gpt2"
    """gpt2; char, for the characters that occur; or a model directory, for its tokenizer"""
    val_fraction: float = 0.005
    """of the documents, chosen by their places in the input, that validate; of a single text it is the end"""
    field: str = "text"
    """the field of a JSONL line, or the column of a parquet file, that is the document"""
    shard_tokens: int = 100_000_000
    """tokens in a shard"""
    workers: int | None = None
    """processes that tokenize; None is one for each processor"""
    verify: str = ""
    """a prepared directory to check, shards' checksums and all, in place of preparing one"""

    def __post_init__(self) -> None:
        _require_at_least(1, self, "shard_tokens")
        _require(0 < self.val_fraction < 1, "val_fraction", self.val_fraction, "0 < val_fraction < 1")
        if self.workers is not None:
            _require_at_least(1, self, "workers")
        _require(not (self.verify and self.inputs), "verify", repr(self.verify), "no inputs beside it")
        if not self.verify:
            _require(bool(self.inputs), "inputs", "empty", "at least one file, directory or glob")
            _require(bool(self.out), "out", "empty", "the directory to write")


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


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint at the valid name that a misspelt one is nearest to, or nothing."""
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""


def settings(cls: Any) -> dict[str, Any]:
    """The flat names of a config's settings and their types, a nested config's among them."""
    flat: dict[str, Any] = {}
    for name, kind in get_type_hints(cls).items():
        flat |= settings(kind) if dataclasses.is_dataclass(kind) else {name: kind}
    return flat


def from_dict(cls: type[Config], values: Mapping[str, Any], source: str) -> Config:
    """Builds a config from flat names.

    ValueError, naming `source`, for a name that is not a setting (and the nearest that is), a value of
    the wrong type, or one that breaks a rule.
    """
    valid = settings(cls)
    for name, value in values.items():
        if name not in valid:
            raise ValueError(f"{source}: unknown setting '{name}'{nearest(name, valid)}")
        if not _fits(value, valid[name]):
            raise ValueError(f"{source}: {name} is {value!r}, expected {_type_name(valid[name])}")
    try:
        return _build(cls, values)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def _build(cls: Any, values: Mapping[str, Any]) -> Any:
    arguments = {}
    for name, kind in get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            arguments[name] = _build(kind, values)
        elif name in values:
            arguments[name] = values[name]
    return cls(**arguments)


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    members = get_args(kind)
    return any(_fits(value, member) for member in members) if members else isinstance(value, kind)


def _type_name(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(get_args(kind))
    members = [m for m in get_args(kind) if m is not type(None)]
    return " or ".join(_type_name(m) for m in members) if members else kind.__name__
