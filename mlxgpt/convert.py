"""Converts GPT-2 weights between PyTorch, Hugging Face, nanoGPT, llm.c, GGUF and model directories.

python scripts/convert_weights.py SRC DST [--to mlxgpt|nanogpt|gguf|safetensors]
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .common import cli, disk
from .common.console import progress
from .common.settings import require, require_at_least
from .formats import gguf_file, gpt2, hugging_face, nanogpt, safetensors_file, sources
from .formats.foreign import ForeignModel
from .formats.quantized import GROUP_SIZE
from .formats.tensors import reporting


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
    """type of the weights; `same` keeps the source's"""
    block_size: int | None = None
    """number of positions to keep, from the first on; unset, all of them"""
    quantize: Literal[0, 4, 8] = 0
    """bits of a weight in quantized matrices, in groups of 64, as mlx_lm reads them; 0 does not quantize"""
    meta: str = ""
    """nanoGPT's meta.pkl with the characters; unset, the one beside ckpt.pt"""
    n_head: int = 0
    """number of heads, for a file that doesn't say it; 0 supposes head_dim = 64"""
    force: bool = False
    """replace a destination that is there already"""

    def __post_init__(self) -> None:
        require_at_least(0, self, "n_head")
        if self.block_size is not None:
            require_at_least(1, self, "block_size")
        require(not self.quantize or self.to == "mlxgpt", "quantize", self.quantize, "0 unless --to mlxgpt")


def main(args: Sequence[str]) -> None:
    """Runs the converter. cli.UsageError, ValueError and OSError in one line."""
    config = cli.parse(ConvertConfig, args, "mlxgpt.convert")
    source, destination = Path(config.source).expanduser(), Path(config.destination).expanduser()
    _require_replaceable(destination, config)
    meta = Path(config.meta).expanduser() if config.meta else None
    model = sources.read_model(source, meta, config.n_head)
    if config.block_size:
        model = model.cropped(config.block_size)
    if config.dtype != "same":
        model = model.with_dtype(config.dtype)
    model.notes += _warnings(model, config)
    start = time.perf_counter()
    n_bytes = sum(t.nbytes for t in (*model.tensors.values(), *model.averages.values()))
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with disk.appearing(destination) as temporary, progress("", n_bytes, in_bytes=True) as advance:
            _write(temporary, model, config, destination.stem, advance)
    except OSError as error:  # it would name the temporary file, or none
        raise OSError(f"{destination} can't be written: {error.strerror or error}") from None
    _summary(model, config, time.perf_counter() - start)


def _write(path: Path, model: ForeignModel, config: ConvertConfig, name: str, done: Callable[[int], None]) -> None:
    """Writes a model in the form that --to names; `done` is told of each tensor's bytes."""
    if config.to == "mlxgpt":
        hugging_face.write(path, model, config.quantize, done)
    elif config.to == "nanogpt":
        nanogpt.write(path, model, done)
    elif config.to == "safetensors":
        safetensors_file.write(path, hugging_face.tensors_of(model), done)
    else:
        gguf_file.write(path, model.config, reporting(model.tensors, done), model.read_tokenizer(), name)


def _require_replaceable(destination: Path, config: ConvertConfig) -> None:
    """ValueError for a destination that is there, unless --force is given and it is what the converter writes."""
    if not destination.exists():
        return
    if not config.force:
        raise ValueError(f"{destination} is there already: say --force to replace it")
    products = (gpt2.CONFIG, nanogpt.CHECKPOINT)  # one of them lies in each directory that is written
    is_directory = config.to in ("mlxgpt", "nanogpt")
    if destination.is_dir() != is_directory or (
        is_directory and any(destination.iterdir()) and not any((destination / name).exists() for name in products)
    ):
        raise ValueError(f"{destination} is not what --to {config.to} writes, and is not replaced")


def _warnings(model: ForeignModel, config: ConvertConfig) -> list[str]:
    """What a person should know of the destination: a line each."""
    notes = []
    if config.to == "gguf":
        notes += gguf_file.warnings(model.config, model.read_tokenizer())
    if config.quantize and model.config.activation == "gelu":
        notes.append("mlx_lm computes GPT-2's tanh GELU, and this model has the exact one: logits differ a little")
    if config.quantize and not model.config.tied_head:
        notes.append("mlx_lm takes wte for the head: it doesn't open a model with a head of its own")
    if model.config.activation == "gelu_new" and config.to == "nanogpt":
        notes.append("nanoGPT computes the exact GELU, and this model has GPT-2's tanh form: logits differ a little")
    if not model.tokenizer_files:
        notes.append("no tokenizer came along: to sample, put one into the directory")
    if model.averages and config.to not in ("mlxgpt", "nanogpt"):
        notes.append(f"the optimizer's state does not go into {config.to}")
    return notes


def _summary(model: ForeignModel, config: ConvertConfig, seconds: float) -> None:
    """Prints what was converted, as a table on standard error."""
    shape, n = model.config, sum(math.prod(t.shape) for t in model.tensors.values())
    activation, head = "tanh" if shape.activation == "gelu_new" else "exact", ", a head of its own"
    size = sum(t.nbytes for t in model.tensors.values())
    quantized = ""
    if config.quantize:  # fewer bytes were written than the model has
        size = (Path(config.destination).expanduser() / gpt2.WEIGHTS).stat().st_size
        quantized = f", {config.quantize}-bit groups of {GROUP_SIZE}"
    rows = [
        ("source", f"{config.source}: {model.source}"),
        ("model", f"{shape.n_layer} layers, {shape.n_head} heads, {shape.n_embd} wide, {shape.block_size} positions, "
         f"vocabulary {shape.vocab_size}, {'' if shape.bias else 'no '}biases, {activation} GELU"
         f"{'' if shape.tied_head else head}"),
        ("tensors", f"{len(model.tensors)}, {n:,} parameters, {model.dtype}"),
        ("optimizer", f"AdamW's averages after {model.training['step']} steps" if model.averages else "none"),
        ("tokenizer", ", ".join(model.tokenizer_files) or "none"),
    ]  # fmt: skip
    names_of: dict[str, list[str]] = {}
    for name, reason in model.left_out.items():
        names_of.setdefault(reason, []).append(name)
    for reason, names in names_of.items():
        more = f" and {len(names) - 1} more" if names[1:] else ""
        rows.append(("left out", f"{names[0]}{more}: {reason}"))
    rows += [("note", note) for note in model.notes]
    written = f"{config.destination} ({config.to}{quantized}), {size / 1e6:,.0f} MB of weights in {seconds:.1f} s"
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for row in [*rows, ("written", written)]:
        table.add_row(*map(escape, row))
    Console(stderr=True).print(table)


if __name__ == "__main__":
    cli.run("mlxgpt.convert", main)
