"""Model directories: a GPT, its tokenizer and its shape in the files of a Hugging Face GPT-2.

`config.json`, `model.safetensors` and the tokenizer's files, as transformers and mlx_lm open them. Their
linear weights are (n_in, n_out), Conv1D's layout, ours (n_out, n_in); a tied head is left out.
A directory, and each file replaced in it, appears whole or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_unflatten

from .config import GPTConfig, from_dict
from .model import GPT
from .tokenizer import Tokenizer

WEIGHTS = "model.safetensors"
FORMAT = 1  # of what the object `mlxgpt` in config.json says


def save_model(directory: Path, model: GPT, tokenizer: Tokenizer | None = None) -> None:
    """Writes a model directory, over one that is there. Until it is complete the old one stays as it was.

    OSError when the disk is full or can't be written.
    """
    content = {"config.json": _config_json(model.config, tokenizer), **(tokenizer.files() if tokenizer else {})}
    try:
        _save(directory, content, model)
    except (OSError, RuntimeError) as error:  # MLX raises RuntimeError
        reason = error.strerror if isinstance(error, OSError) else error
        raise OSError(f"{directory}: the model can't be written: {reason}") from None


def _save(directory: Path, content: dict[str, bytes], model: GPT) -> None:
    if directory.is_dir() and all(_content(directory / name) == data for name, data in content.items()):
        # Only the weights are new: one atomic rename.
        temporary = directory / f".{os.getpid()}.{WEIGHTS}"
        try:
            _write_weights(temporary, model)
            os.replace(temporary, directory / WEIGHTS)
        finally:
            temporary.unlink(missing_ok=True)
        return
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        for name, data in content.items():
            write_file(temporary / name, data)
        _write_weights(temporary / WEIGHTS, model)
        if directory.exists():
            old = directory.with_name(f".{directory.name}.{os.getpid()}.old")
            os.rename(directory, old)
            os.rename(temporary, directory)
            shutil.rmtree(old)
        else:
            os.rename(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_file(path: Path, content: bytes) -> None:
    """A small file, whole and on the disk, in place of one that is there. OSError leaves that as it was."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def find_model(path: Path) -> Path:
    """The model directory that a path names: itself, or the best model of a training run's directory.

    FileNotFoundError if it is neither.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"model: there is no directory {path}")
    for directory in (path, path / "best"):
        if (directory / "config.json").exists():
            return directory
    raise FileNotFoundError(f"model: {path} is not a model directory: it has no config.json")


def load_config(directory: Path) -> GPTConfig:
    """The shape of the model in a directory.

    FileNotFoundError; ValueError for what this package's model can't be.
    """
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    ours = config.get("mlxgpt", {}) if isinstance(config, dict) else None
    if not isinstance(ours, dict):
        raise ValueError(f"{path}: not the configuration of a model")
    rules: dict[str, tuple[Any, list[Any]]] = {
        "model_type": (config.get("model_type"), ["gpt2"]),
        "mlxgpt.format": (ours.get("format", FORMAT), list(range(1, FORMAT + 1))),
        "activation_function": (config.get("activation_function", "gelu_new"), ["gelu_new", "gelu"]),
        "scale_attn_weights": (config.get("scale_attn_weights", True), [True]),
        "scale_attn_by_inverse_layer_idx": (config.get("scale_attn_by_inverse_layer_idx", False), [False]),
    }
    for name, (value, allowed) in rules.items():
        if value not in allowed:
            raise ValueError(f"{path}: {name} is {value!r}, expected {' or '.join(map(repr, allowed))}")
    values = {ours_: config[theirs] for ours_, theirs in _CONFIG_KEYS.items() if theirs in config}
    if missing := [theirs for ours_, theirs in _CONFIG_KEYS.items() if ours_ not in values]:
        raise ValueError(f"{path}: {', '.join(missing)} is missing")
    values |= {"bias": ours.get("bias", True), "tied_head": config.get("tie_word_embeddings", True)}
    model = from_dict(GPTConfig, values, source=str(path))
    if (n_inner := config.get("n_inner")) not in (None, 4 * model.n_embd):
        raise ValueError(f"{path}: n_inner is {n_inner!r}, expected 4 n_embd = {4 * model.n_embd}")
    return model


def load_model(directory: Path) -> GPT:
    """The model in a directory, in float32, ready for evaluation.

    FileNotFoundError; ValueError that lists missing, unknown and misshapen tensors, or names one that
    holds a value that is not finite.
    """
    config, path = load_config(directory), directory / WEIGHTS
    if not path.exists():
        raise FileNotFoundError(f"model: {directory} has no {WEIGHTS}")
    try:
        weights: dict[str, mx.array] = mx.load(str(path), format="safetensors")  # type: ignore[assignment]
        mx.eval(weights)
    except RuntimeError as error:
        raise ValueError(f"{path}: not a safetensors file, or cut short: {error}") from None
    weights = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    weights = {name: t for name, t in weights.items() if not name.endswith((".attn.bias", ".attn.masked_bias"))}
    if config.tied_head and (head := weights.pop("lm_head.weight", None)) is not None:
        if "wte.weight" not in weights or not mx.array_equal(head, weights["wte.weight"]).item():
            raise ValueError(f"{path}: lm_head.weight is not wte.weight, but tie_word_embeddings says that it is")
    model = GPT(config)
    expected = {name: _file_shape(name, p.shape) for name, p in model.named_weights().items()}
    if not config.bias:  # the zeros that other programs want to see
        weights = {name: t for name, t in weights.items() if name in expected or not _is_zero_bias(name, t)}
    faults = [f"missing {name}" for name in expected if name not in weights]
    faults += [f"unknown {name}" for name in weights if name not in expected]
    faults += [
        f"{name} is {tuple(weights[name].shape)}, expected {shape}"
        for name, shape in expected.items()
        if name in weights and tuple(weights[name].shape) != shape
    ]
    if faults:
        raise ValueError(f"{path}: {'; '.join(faults[:8])}{f'; and {len(faults) - 8} more' if faults[8:] else ''}")
    for name, tensor in weights.items():
        tensor = tensor.astype(mx.float32)
        if not _finite(tensor):
            raise ValueError(f"{path}: {name} holds a value that is not finite (NaN or infinity)")
        weights[name] = mx.contiguous(tensor.T) if _is_conv1d(name) else tensor
    model.update(tree_unflatten(list(weights.items())))
    mx.eval(model.parameters())
    model.eval()
    return model


_CONFIG_KEYS = {  # GPTConfig's fields and GPT2Config's keys
    "block_size": "n_positions",
    "vocab_size": "vocab_size",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
    "dropout": "resid_pdrop",
    "activation": "activation_function",
    "layer_norm_epsilon": "layer_norm_epsilon",
}


def _config_json(config: GPTConfig, tokenizer: Tokenizer | None) -> bytes:
    end = tokenizer.end_of_text if tokenizer else None
    values: dict[str, Any] = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **{theirs: getattr(config, ours) for ours, theirs in _CONFIG_KEYS.items()},
        "n_ctx": config.block_size,
        "n_inner": None,
        "attn_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "initializer_range": 0.02,
        "tie_word_embeddings": config.tied_head,
        "bos_token_id": end,
        "eos_token_id": end,
        "dtype": "float32",
        # what GPT2Config can't say: without biases, the zeros in the file are not parameters
        "mlxgpt": {"format": FORMAT, "bias": config.bias},
    }
    return (json.dumps(values, indent=2) + "\n").encode()


def _write_weights(path: Path, model: GPT) -> None:
    """model.safetensors, on the disk when this returns."""
    # transformers 4 takes a head of its own only beside names with the prefix
    prefix = "" if model.config.tied_head else "transformer."
    weights = {}
    for name, p in model.named_weights().items():
        weights[name if name == "lm_head.weight" else prefix + name] = mx.contiguous(p.T) if _is_conv1d(name) else p
        bias = name.removesuffix("weight") + "bias"
        if not model.config.bias and name not in ("wte.weight", "wpe.weight", "lm_head.weight"):
            weights[prefix + bias] = mx.zeros(p.shape[:1])
    mx.save_safetensors(str(path), weights, metadata={"format": "pt"})
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _is_conv1d(name: str) -> bool:
    return name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


def _file_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(reversed(shape)) if _is_conv1d(name) else tuple(shape)


def _is_zero_bias(name: str, tensor: mx.array) -> bool:
    return name.endswith(".bias") and not mx.any(tensor).item()


def _finite(tensor: mx.array) -> bool:
    """One pass in the usual case: a sum is finite only if every term is."""
    values = np.array(tensor, copy=False)
    with np.errstate(all="ignore"):
        return bool(np.isfinite(values.sum())) or bool(np.isfinite(values).all())


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None
