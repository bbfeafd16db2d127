"""What a path names, and which reader it needs: whatever the converter and --init_from open.

A reader of another format is a file beside this one and a line in read_model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..data import tokenizer
from ..data.tokenizer import Tokenizer
from ..model.config import GPTConfig
from ..model.gpt import GPT
from . import adapters, gpt2, hugging_face, llmc, model_directory, nanogpt, torch_file
from .foreign import ForeignModel
from .mlx_arrays import model_of


def read_model(path: Path, meta: Path | None = None, n_head: int = 0) -> ForeignModel:
    """The model at a path, of any kind, with none of its weights read yet.

    `meta` is nanoGPT's meta.pkl with the characters; n_head is for files that don't say it.
    FileNotFoundError; ValueError in one line for what is not a GPT-2, or is damaged.
    """
    if (path / nanogpt.CHECKPOINT).is_file() and not (path / gpt2.CONFIG).exists():
        path = path / nanogpt.CHECKPOINT
    if adapters.is_in(path):
        return adapters.merged(path, read_model(adapters.require_base(path)))
    if path.is_dir():
        return hugging_face.read(path, meta, n_head)
    if not path.is_file():
        raise FileNotFoundError(f"source: there is no file or directory {path}")
    if llmc.is_model(path):
        return llmc.read(path)
    if path.suffix == ".safetensors":
        return hugging_face.read(path, meta, n_head)
    content = torch_file.read(path)
    if nanogpt.is_checkpoint(content):
        return nanogpt.read(path, content, meta)
    return hugging_face.read_state_dict(path, content, meta, n_head)


@dataclass(frozen=True)
class ModelSource:
    """A model to train from: its shape and its tokenizer, and its weights when they are asked for."""

    config: GPTConfig
    tokenizer: Tokenizer
    load: Callable[[], GPT]  # float32, one copy of the weights, ready for evaluation
    directory: Path | None  # where it lies, if it is a model directory: adapters need one to refer to


def open_model(path: Path, setting: str = "init_from") -> ModelSource:
    """What a setting's path names to train from: a model directory, a run, or whatever `read_model` reads.

    FileNotFoundError; ValueError in one line for what is not a GPT-2, or comes without a tokenizer.
    """
    if not path.exists():
        raise FileNotFoundError(f"{setting}: there is no file or directory {path}")
    if path.is_dir() and not (path / nanogpt.CHECKPOINT).is_file():
        path = model_directory.find_model(path, setting)
        if adapters.is_in(path) or (path / gpt2.WEIGHTS).is_file():
            config = model_directory.load_config(path)
            return ModelSource(config, tokenizer.load(path), partial(model_directory.load_model, path), path)
    model = read_model(path)
    text = model.read_tokenizer()
    if text is None:
        raise ValueError(f"{setting}: {path} comes without a tokenizer: put nanoGPT's meta.pkl beside it")
    return ModelSource(model.config, text, partial(model_of, model.config, model.tensors, path), None)
