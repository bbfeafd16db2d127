"""GPT-2 in files: the names and shapes of its tensors, the check that a file has them, and config.json.

Hugging Face's files keep the weights of linear layers as its module Conv1D does, (n_in, n_out); here and in nanoGPT's
and llm.c's files they are (n_out, n_in).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common import disk
from ..common.settings import from_dict
from ..data.tokenizer import Tokenizer
from ..model.config import GPTConfig
from .tensors import Tensor, equal, is_zero, transposed

WEIGHTS, CONFIG = "model.safetensors", "config.json"  # in a model directory
FORMAT = 1  # of the object `mlxgpt` in config.json
_MOST_FAULTS = 8  # that an error lists

Shape = tuple[int, ...]

# ---- names and shapes ----


def shapes(config: GPTConfig) -> dict[str, Shape]:
    """The name and shape of every parameter, in the model's own order.

    They don't come from a GPT of this config, because a file may claim sizes that no array can have.
    """
    T, C, V = config.block_size, config.n_embd, config.vocab_size
    block: dict[str, Shape] = {
        "ln_1": (C,), "attn.c_attn": (3 * C, C), "attn.c_proj": (C, C),
        "ln_2": (C,), "mlp.c_fc": (4 * C, C), "mlp.c_proj": (C, 4 * C),
    }  # fmt: skip
    modules = {f"h.{n}.{module}": shape for n in range(config.n_layer) for module, shape in block.items()}
    result: dict[str, Shape] = {"wte.weight": (V, C), "wpe.weight": (T, C)}
    for module, shape in {**modules, "ln_f": (C,)}.items():
        result[f"{module}.weight"] = shape
        if config.bias:
            result[f"{module}.bias"] = shape[:1]
    return result if config.tied_head else {**result, "lm_head.weight": (V, C)}


def is_conv1d(name: str) -> bool:
    """Whether a parameter is the weight of a linear layer of GPT-2's blocks, which Hugging Face stores transposed."""
    return name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


def linear_transposed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters with linear weights transposed: from Hugging Face's layout to this package's, or back."""
    return {name: transposed(tensor) if is_conv1d(name) else tensor for name, tensor in tensors.items()}


def to_hugging_face(tensors: Mapping[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """Parameters by the names and in the layout of a model directory."""
    # transformers 4 takes a head of its own only beside names with the prefix
    names = {name: name if config.tied_head or name == "lm_head.weight" else f"transformer.{name}" for name in tensors}
    return {names[name]: tensor for name, tensor in linear_transposed(tensors).items()}


def missing_biases(names: Iterable[str], config: GPTConfig) -> dict[str, str]:
    """The biases that a model without them leaves out, each with the name of the weight beside it."""
    if config.bias:
        return {}
    embeddings = ("wte.weight", "wpe.weight", "lm_head.weight")
    return {name.removesuffix("weight") + "bias": name for name in names if name not in embeddings}


def parameters_by_name(found: Mapping[str, Tensor], path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The parameters among a file's tensors by GPT-2's names, without the prefixes of wrappers; and the tensors that
    are left out, each with the reason. ValueError for a parameter that is there twice."""
    tensors: dict[str, Tensor] = {}
    left_out = {}
    for file_name, tensor in found.items():
        name = re.sub(r"^(_orig_mod\.|module\.|model\.|transformer\.)*", "", file_name)
        if re.fullmatch(r"h\.\d+\.attn\.(bias|masked_bias)", name):
            left_out[file_name] = "the causal mask, not a parameter"
        elif name in tensors:
            raise ValueError(f"{path}: {name} is there twice, under different prefixes")
        else:
            tensors[name] = tensor
    return tensors, left_out


def is_head_tied(tensors: Mapping[str, Tensor]) -> bool:
    """Whether lm_head.weight is there, and is wte.weight to the bit."""
    head, embedding = tensors.get("lm_head.weight"), tensors.get("wte.weight")
    return head is not None and embedding is not None and equal(head, embedding)


def zero_biases(tensors: Mapping[str, Tensor], config: GPTConfig) -> list[str]:
    """The biases that are no parameters: of a model without biases those that are zeros, for other programs to see."""
    return [] if config.bias else [n for n, t in tensors.items() if n.endswith(".bias") and is_zero(t)]


# ---- the check of a file's tensors ----


def check_model(
    tensors: Mapping[str, Tensor],
    config: GPTConfig,
    source: object,
    dtypes: Sequence[str] | None = None,
) -> None:
    """Checks that tensors are the parameters of a model, in this package's layout. ValueError as from check_tensors."""
    layers = {name.split(".")[1] for name in tensors if name.startswith("h.")}
    if len(layers) < config.n_layer:  # a config may claim more than can be listed
        raise ValueError(f"{source}: {len(layers)} layers, its config says {config.n_layer}")
    check_tensors(tensors, shapes(config), source, dtypes)


def check_tensors(
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, Shape],
    source: object,
    dtypes: Sequence[str] | None = None,
) -> None:
    """Checks the names and shapes of tensors against `expected`, and that they are of one of `dtypes`, or of any
    floating-point type. ValueError, which begins with the source, lists the differences."""
    faults = [f"missing {name}" for name in expected if name not in tensors]
    faults += [f"unknown {name}" for name in tensors if name not in expected]
    faults += [
        f"{name} is {tensors[name].shape}, expected {shape}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    kinds = " or ".join(dtypes) if dtypes else "a floating-point type"
    for name, tensor in tensors.items():
        if tensor.dtype not in dtypes if dtypes else "float" not in tensor.dtype:
            faults.append(f"{name} is {tensor.dtype}, expected {kinds}")
    if faults:
        more = f"; and {len(faults) - _MOST_FAULTS} more" if faults[_MOST_FAULTS:] else ""
        raise ValueError(f"{source}: {'; '.join(faults[:_MOST_FAULTS])}{more}")


# ---- config.json ----

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


@dataclass(frozen=True)
class ConfigJson:
    """What config.json says."""

    model: GPTConfig
    quantization: Mapping[str, Any]  # {"group_size": 64, "bits": 4} or the like; empty if the weights aren't quantized
    is_mlxgpts: bool  # whether this package wrote it


def read_config(directory: Path) -> ConfigJson:
    """Reads a model directory's config.json. FileNotFoundError; ValueError for what this package's model can't be."""
    path = directory / CONFIG
    config = disk.read_json(path)
    mlxgpt, quantization = (config.get(key) or {} for key in ("mlxgpt", "quantization"))
    if not isinstance(mlxgpt, dict) or not isinstance(quantization, dict):
        raise ValueError(f"{path}: not the configuration of a model")
    disk.require_format(path, "mlxgpt.format", mlxgpt.get("format", FORMAT), FORMAT)
    rules: dict[str, tuple[Any, list[Any]]] = {
        "model_type": (config.get("model_type"), ["gpt2"]),
        "activation_function": (config.get("activation_function", "gelu_new"), ["gelu_new", "gelu"]),
        "scale_attn_weights": (config.get("scale_attn_weights", True), [True]),
        "scale_attn_by_inverse_layer_idx": (config.get("scale_attn_by_inverse_layer_idx", False), [False]),
    }
    if quantization:  # what mx.quantize can make
        rules |= {
            "quantization.mode": (quantization.get("mode", "affine"), ["affine"]),
            "quantization.bits": (quantization.get("bits"), [2, 3, 4, 5, 6, 8]),
            "quantization.group_size": (quantization.get("group_size"), [32, 64, 128]),
        }
    for name, (value, allowed) in rules.items():
        if value not in allowed:
            raise ValueError(f"{path}: {name} is {value!r}, expected {' or '.join(map(repr, allowed))}")
    if missing := [key for key in _CONFIG_KEYS.values() if key not in config]:
        raise ValueError(f"{path}: {', '.join(missing)} is missing")
    values = {field: config[key] for field, key in _CONFIG_KEYS.items()}
    values |= {"bias": mlxgpt.get("bias", True), "tied_head": config.get("tie_word_embeddings", True)}
    model = from_dict(GPTConfig, values, source=str(path))
    if (n_inner := config.get("n_inner")) not in (None, 4 * model.n_embd):
        raise ValueError(f"{path}: n_inner is {n_inner!r}, expected 4 n_embd = {4 * model.n_embd}")
    return ConfigJson(model, quantization, "mlxgpt" in config)


def config_json(
    config: GPTConfig,
    tokenizer: Tokenizer | None = None,
    dtype: str = "float32",
    quantization: Mapping[str, Any] | None = None,
) -> bytes:
    """The content of a model directory's config.json. quantization is {"group_size": 64, "bits": 4} or the like."""
    end = tokenizer.end_of_text if tokenizer else None
    values: dict[str, Any] = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **{key: getattr(config, field) for field, key in _CONFIG_KEYS.items()},
        "n_ctx": config.block_size,
        "n_inner": None,
        "attn_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "initializer_range": 0.02,
        "tie_word_embeddings": config.tied_head,
        "bos_token_id": end,
        "eos_token_id": end,
        "dtype": dtype,
        # what GPT2Config can't say: without biases, the zeros in the file are not parameters
        "mlxgpt": {"format": FORMAT, "bias": config.bias},
    }
    if quantization:  # the second name makes transformers, which can't read it, say so
        values |= {"quantization": quantization, "quantization_config": quantization}
    return disk.json_bytes(values)
