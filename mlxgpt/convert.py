"""Converts GPT-2 weights between PyTorch, Hugging Face, nanoGPT, llm.c, GGUF and model directories.

python scripts/convert_weights.py SRC DST [--to mlxgpt|nanogpt|gguf|safetensors]
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskProgressColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)  # fmt: skip
from rich.table import Table

from .common import cli
from .common.settings import require, require_at_least
from .formats import foreign as convert
from .formats import gguf_file, safetensors_file
from .formats import model_directory as checkpoint


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
        require_at_least(0, self, "n_head")
        if self.block_size is not None:
            require_at_least(1, self, "block_size")
        require(not self.quantize or self.to == "mlxgpt", "quantize", self.quantize, "0 unless --to mlxgpt")


def main(args: Sequence[str]) -> None:
    config = cli.parse(ConvertConfig, args, "convert_weights")
    console = Console(stderr=True)
    source, destination = Path(config.source).expanduser(), Path(config.destination).expanduser()
    _refuse_what_is_there(destination, config)
    meta = Path(config.meta).expanduser() if config.meta else None
    model = convert.read(source, meta, config.n_head)
    if config.block_size:
        model = convert.cropped(model, config.block_size)
    if config.dtype != "same":
        model = convert.with_dtype(model, config.dtype)
    model.notes += _warnings(model, config)
    start = time.perf_counter()
    try:
        with _appearing(destination) as temporary, _progress(model, console) as done:
            _write(temporary, model, config, destination.stem, done)
    except OSError as error:  # it would name the temporary file, or none
        raise OSError(f"{destination} can't be written: {error.strerror or error}") from None
    _summary(console, model, config, time.perf_counter() - start)


def _write(
    path: Path, model: convert.Checkpoint, config: ConvertConfig, name: str, done: Callable[[int], None]
) -> None:
    if config.to == "mlxgpt":
        convert.write_directory(path, model, config.quantize, done)
    elif config.to == "nanogpt":
        convert.write_nanogpt(path, model, done)
    elif config.to == "safetensors":
        safetensors_file.write(path, convert.hugging_face_tensors(model), done)
    else:
        convert.write_gguf(path, model, name, done)


def _refuse_what_is_there(destination: Path, config: ConvertConfig) -> None:
    if not destination.exists():
        return
    if not config.force:
        raise ValueError(f"{destination} is there already: say --force to replace it")
    ours = ("config.json", "ckpt.pt")
    is_directory = config.to in ("mlxgpt", "nanogpt")
    if destination.is_dir() != is_directory or (
        is_directory and any(destination.iterdir()) and not any((destination / name).exists() for name in ours)
    ):
        raise ValueError(f"{destination} is not what --to {config.to} writes, and is not replaced")


@contextlib.contextmanager
def _appearing(destination: Path) -> Iterator[Path]:
    """A path to write to, which takes the destination's place when all went well."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    temporary = destination.with_name(f".{destination.name}.{os.getpid()}.tmp")
    old = destination.with_name(f".{destination.name}.{os.getpid()}.old")
    try:
        yield temporary
        if destination.exists():  # what is new is on the disk before what is old goes
            for path in temporary.iterdir() if temporary.is_dir() else (temporary,):
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        if destination.is_dir():  # a directory can't be renamed over one that is not empty
            os.rename(destination, old)
        try:
            os.replace(temporary, destination)
        except OSError:
            if old.exists():
                os.rename(old, destination)
            raise
    finally:
        for path in (temporary, old):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@contextlib.contextmanager
def _progress(model: convert.Checkpoint, console: Console) -> Iterator[Callable[[int], None]]:
    total = sum(t.nbytes for t in (*model.tensors.values(), *model.averages.values()))
    columns = (BarColumn(), TaskProgressColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)
        yield lambda n: progress.advance(task, n)


def _warnings(model: convert.Checkpoint, config: ConvertConfig) -> list[str]:
    notes = []
    if config.to == "gguf":
        notes += gguf_file.warnings(model.config, convert.tokenizer_of(model))
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


def _summary(console: Console, model: convert.Checkpoint, config: ConvertConfig, seconds: float) -> None:
    n = sum(math.prod(t.shape) for t in model.tensors.values())
    size = sum(t.nbytes for t in model.tensors.values())
    if config.quantize:  # of which less was written
        size = (Path(config.destination).expanduser() / checkpoint.WEIGHTS).stat().st_size
    rows = [
        ("source", f"{config.source}: {model.source}"),
        ("model", f"{model.config.n_layer} layers, {model.config.n_head} heads, {model.config.n_embd} wide, "
         f"{model.config.block_size} positions, vocabulary {model.config.vocab_size}, "
         f"{'' if model.config.bias else 'no '}biases, {'tanh' if model.config.activation == 'gelu_new' else 'exact'} "
         f"GELU{'' if model.config.tied_head else ', a head of its own'}"),
        ("tensors", f"{len(model.tensors)}, {n:,} parameters, {model.dtype}"),
        ("optimizer", f"AdamW's averages after {model.training['step']} steps" if model.averages else "none"),
        ("tokenizer", ", ".join(model.tokenizer_files) or "none"),
    ]  # fmt: skip
    reasons: dict[str, list[str]] = {}
    for name, reason in model.dropped.items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        more = f" and {len(names) - 1} more" if names[1:] else ""
        rows.append(("left out", f"{names[0]}{more}: {reason}"))
    rows += [("note", note) for note in model.notes]
    quantized = f", {config.quantize}-bit groups of {convert.GROUP_SIZE}" if config.quantize else ""
    rows.append(
        (
            "written",
            f"{config.destination} ({config.to}{quantized}), {size / 1e6:,.0f} MB of weights in {seconds:.1f} s",
        )
    )
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)


if __name__ == "__main__":
    cli.run("convert_weights", main)
