"""Hugging Face's GPT-2 directories and weights files, read and written. This package's model directories are such
directories, with a few files more.

Names are h.0.attn.c_attn.weight, with transformer. before them or without; linear weights are (n_in, n_out), as its
module Conv1D keeps them; the activation is the tanh GELU. A file alone may also be a state dict in nanoGPT's layout.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..common import disk
from ..common.settings import from_dict
from ..model.config import GPTConfig
from . import gpt2, nanogpt, safetensors_file, torch_file, training_state
from .foreign import ForeignModel, checked, parameters, read_tokenizer_files
from .quantized import GROUP_SIZE, quantized_tensors
from .tensors import Tensor, cast

NANOGPT = "nanogpt.json"  # in a model directory: what a ckpt.pt said that nothing else there says

# ---- reading ----


def read(path: Path, meta: Path | None = None, n_head: int = 0) -> ForeignModel:
    """The model in a directory, or in one file of it, with or without a config.json beside it.

    FileNotFoundError; ValueError, naming the file, for what is not a GPT-2, or is damaged.
    """
    files = weights_files(path) if path.is_dir() else [path]
    return _read([(file, _content(file)) for file in files], meta, n_head)


def read_state_dict(path: Path, content: Any, meta: Path | None = None, n_head: int = 0) -> ForeignModel:
    """The model in a PyTorch file with this content. ValueError as from read."""
    return _read([(path, content)], meta, n_head)


def weights_files(directory: Path) -> list[Path]:
    """The files of a directory that hold its tensors: one, or several shards. FileNotFoundError, ValueError."""
    for name in (gpt2.WEIGHTS, "pytorch_model.bin"):
        if (directory / name).is_file():
            return [directory / name]
        index = directory / f"{name}.index.json"
        if index.is_file():
            shard_of = disk.read_json(index).get("weight_map")
            if not isinstance(shard_of, dict) or not shard_of:
                raise ValueError(f"{index}: not an index of shards: it has no weight_map")
            for shard in shard_of.values():
                if not isinstance(shard, str) or shard in ("", ".", "..") or "/" in shard or "\\" in shard:
                    raise ValueError(f"{index}: a shard is {shard!r}, expected the name of a file beside the index")
                if not (directory / shard).is_file():
                    raise FileNotFoundError(f"{index}: its shard {shard} is not there")
            return [directory / shard for shard in sorted(set(shard_of.values()))]
    raise FileNotFoundError(
        f"source: {directory} holds none of model.safetensors, pytorch_model.bin, their sharded forms, and ckpt.pt"
    )


def _content(path: Path) -> Any:
    return safetensors_file.read(path) if path.suffix == ".safetensors" else torch_file.read(path)


def _read(files: list[tuple[Path, Any]], meta: Path | None, n_head: int) -> ForeignModel:
    path = files[0][0]
    directory = path.parent
    said = gpt2.read_config(directory) if (directory / gpt2.CONFIG).is_file() else None
    if said and said.quantization:
        raise ValueError(f"{directory}: it is quantized: convert what it was made from")
    tensors, left_out = parameters(_named_tensors(files), path)
    conv1d, notes = _is_in_conv1d(tensors, path), []
    if said:
        config = said.model
    else:
        config, note = _config_of(tensors, n_head, path, "gelu_new" if conv1d else "gelu")
        notes.append(f"there is no config.json: {note}")
    if conv1d:
        tensors = gpt2.linear_transposed(tensors)
    for name in gpt2.zero_biases(tensors, config):
        left_out[name] = "zeros that stand for no bias"
        del tensors[name]
    source = "Hugging Face GPT-2" if conv1d else "state dict in nanoGPT's layout"
    if said and said.is_mlxgpts:
        source = "model directory of mlxgpt"
    model = checked(ForeignModel(source, config, tensors, left_out=left_out, notes=notes), path)
    model.tokenizer_files = read_tokenizer_files(directory)
    if not model.tokenizer_files:
        nanogpt.add_tokenizer(model, directory, meta)
    if said and (directory / training_state.TRAINING).is_file():
        _add_training_state(model, directory)
    return model


def _named_tensors(files: list[tuple[Path, Any]]) -> dict[str, Tensor]:
    """The tensors in some files' contents: state dicts, or what a training program has put around one. ValueError."""
    found: dict[str, Tensor] = {}
    for path, content in files:
        for key in ("state_dict", "model", "model_state_dict"):
            if isinstance(content, dict) and isinstance(content.get(key), dict):
                content = content[key]
        tensors = {k: t for k, t in content.items() if isinstance(t, Tensor)} if isinstance(content, dict) else {}
        if not tensors:
            raise ValueError(f"{path}: it holds no tensors by name")
        if twice := sorted(found.keys() & tensors.keys()):
            raise ValueError(f"{path}: {twice[0]} is in another shard too")
        found |= tensors
    return found


def _is_in_conv1d(tensors: Mapping[str, Tensor], path: Path) -> bool:
    """Whether linear weights are (n_in, n_out): c_attn tells, which is never square, as c_proj of attention is."""
    first = tensors.get("h.0.attn.c_attn.weight")
    if first is None or len(first.shape) != 2:
        raise ValueError(f"{path}: not a GPT-2: it has no matrix h.0.attn.c_attn.weight")
    rows, columns = first.shape
    if max(rows, columns) != 3 * min(rows, columns):
        raise ValueError(f"{path}: h.0.attn.c_attn.weight is {first.shape}, expected (3C, C) or (C, 3C)")
    return columns > rows


def _config_of(tensors: Mapping[str, Tensor], n_head: int, path: Path, activation: str) -> tuple[GPTConfig, str]:
    """The shape of a model that comes without a config.json, and a note that says what was supposed."""
    for name in ("wte.weight", "wpe.weight"):
        if name not in tensors or len(tensors[name].shape) != 2:
            raise ValueError(f"{path}: not a GPT-2: it has no matrix {name}")
    (V, C), T = tensors["wte.weight"].shape, tensors["wpe.weight"].shape[0]
    note = f"n_head = {n_head} as given"
    if not n_head:
        if C % 64:
            raise ValueError(f"{path}: the number of heads can't be told from n_embd = {C}: say --n_head")
        n_head, note = C // 64, f"n_head = {C // 64} supposed, as in GPT-2's sizes (--n_head)"
    layers = {int(m[1]) for name in tensors if (m := re.match(r"h\.(\d+)\.", name))}
    values = {
        "block_size": T, "vocab_size": V, "n_layer": len(layers), "n_head": n_head, "n_embd": C,
        "bias": "h.0.attn.c_attn.bias" in tensors, "activation": activation,
        "tied_head": "lm_head.weight" not in tensors,
    }  # fmt: skip
    form = "GPT-2's tanh" if activation == "gelu_new" else "nanoGPT's exact"
    return from_dict(GPTConfig, values, source=str(path)), f"{note}, {form} GELU by the layout"


def _add_training_state(model: ForeignModel, directory: Path) -> None:
    """Adds the training state of a model directory of this package. ValueError for one that doesn't fit the model."""
    record = training_state.load_training_record(directory)
    names = ("step", "learning_rate", "beta1", "beta2", "eps", "weight_decay", "best_val_loss", "settings")
    model.training = {name: record[name] for name in names}
    path = directory / training_state.OPTIMIZER
    averages = safetensors_file.read(path)
    trained = [name for name in model.tensors if f"m.{name}" in averages]  # the others were frozen
    expected = {f"{average}.{name}": model.tensors[name].shape for average in "mv" for name in trained}
    gpt2.check_tensors(averages, expected, path)
    model.averages = averages
    if (directory / NANOGPT).is_file():
        model.nanogpt = disk.read_json(directory / NANOGPT)


# ---- writing ----


def tensors_of(model: ForeignModel) -> dict[str, Tensor]:
    """A model's tensors by Hugging Face's names, in Conv1D's layout, with zeros for biases that aren't there."""
    return gpt2.to_hugging_face(model.with_zero_biases(), model.config)


def write(directory: Path, model: ForeignModel, bits: int = 0, done: Callable[[int], None] = lambda n: None) -> None:
    """Writes a model directory: Hugging Face's form, or with bits = 8 or 4 that of mlx_lm's quantized models.

    `done` is called with the number of bytes of each tensor that is written.
    """
    directory.mkdir()
    groups = {"group_size": GROUP_SIZE, "bits": bits} if bits else None
    config = gpt2.config_json(model.config, model.read_tokenizer_or_note(), model.dtype, groups)
    files = {gpt2.CONFIG: config, **model.tokenizer_files}
    if model.nanogpt:
        files[NANOGPT] = disk.json_bytes(model.nanogpt)
    if model.training:
        files[training_state.TRAINING] = training_state.training_json(**model.training)
    for name, content in files.items():
        (directory / name).write_bytes(content)
    tensors = quantized_tensors(model.with_zero_biases(), bits) if bits else tensors_of(model)
    safetensors_file.write(directory / gpt2.WEIGHTS, tensors, done)
    if model.averages:
        averages = {name: cast(name, t, "float32") for name, t in model.averages.items()}
        safetensors_file.write(directory / training_state.OPTIMIZER, averages, done)
