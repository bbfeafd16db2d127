"""Model directories: a GPT, its tokenizer and its shape in the files of a Hugging Face GPT-2.

`config.json`, `model.safetensors` and the tokenizer's files, as transformers and mlx_lm open them. Their
linear weights are (n_in, n_out), Conv1D's layout, ours (n_out, n_in); a tied head is left out.
A directory appears whole or not at all.

Directories that mlx_lm itself has written are read too. Their names begin with `model.`, and their linear weights
are (n_out, n_in). In one that is quantized `config.json` holds `"quantization": {"group_size": 64, "bits": 4}`, and
`model.safetensors` three tensors for each matrix (n_out, n_in) whose rows can be cut into groups, wte and wpe among
them: NAME.weight, uint32 (n_out, n_in bits / 32), and NAME.scales and NAME.biases, (n_out, n_in / group_size).
A weight is scale * number + bias. `quantize` and `config_json` make such a directory's content.

A model with adapters has these in the place of `model.safetensors`, and is read together with the model that they
correct: see lora.py.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_unflatten

from ..common import disk
from ..common.settings import from_dict
from ..cpu import operations as kernels
from ..data.tokenizer import Tokenizer
from ..model import lora
from ..model.config import GPTConfig
from ..model.gpt import GPT
from . import safetensors_file
from .tensors import Tensor

WEIGHTS = "model.safetensors"
FORMAT = 1  # of what the object `mlxgpt` in config.json says


def save_model(directory: Path, model: GPT, tokenizer: Tokenizer | None = None) -> None:
    """Writes a model directory, over one that is there. Until it is complete the old one stays as it was.
    Of a model with adapters the adapters alone.

    OSError when the disk is full or can't be written.
    """
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        for name, content in small_files(model, tokenizer).items():
            disk.write_file(temporary / name, content)
        name, tensors = weights_file(model)
        safetensors_file.write(temporary / name, tensors)
        disk.sync(temporary / name)
        disk.replace(temporary, directory)
    except OSError as error:
        raise OSError(f"{directory}: the model can't be written: {error.strerror}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def small_files(model: GPT, tokenizer: Tokenizer | None) -> dict[str, bytes]:
    """What a model directory holds beside the weights."""
    config = config_json(model.config, tokenizer)
    return {"config.json": config, **(tokenizer.files() if tokenizer else {}), **lora.files(model)}


def find_model(path: Path, setting: str = "model") -> Path:
    """The model directory that a setting's path names: itself, or of a training run's directory the best model,
    or the newest if none has been evaluated yet.

    FileNotFoundError if it is neither.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"{setting}: there is no directory {path}")
    for directory in map(disk.follow, (path, path / "best", path / "last")):
        if (directory / "config.json").exists():
            return directory
    raise FileNotFoundError(f"{setting}: {path} is not a model directory: it has no config.json")


def load_config(directory: Path) -> GPTConfig:
    """The shape of the model in a directory.

    FileNotFoundError; ValueError for what this package's model can't be.
    """
    return _read_config(directory)[0]


def _read_config(directory: Path) -> tuple[GPTConfig, dict[str, Any]]:
    """The shape of the model in a directory, and how its weights are quantized, if they are."""
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    keys = ("mlxgpt", "quantization")
    ours, quantization = (config.get(key) or {} for key in keys) if isinstance(config, dict) else (None, None)
    if not isinstance(ours, dict) or not isinstance(quantization, dict):
        raise ValueError(f"{path}: not the configuration of a model")
    require_format(path, "mlxgpt.format", ours.get("format", FORMAT), FORMAT)
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
    values = {ours_: config[theirs] for ours_, theirs in _CONFIG_KEYS.items() if theirs in config}
    if missing := [theirs for ours_, theirs in _CONFIG_KEYS.items() if ours_ not in values]:
        raise ValueError(f"{path}: {', '.join(missing)} is missing")
    values |= {"bias": ours.get("bias", True), "tied_head": config.get("tie_word_embeddings", True)}
    model = from_dict(GPTConfig, values, source=str(path))
    if (n_inner := config.get("n_inner")) not in (None, 4 * model.n_embd):
        raise ValueError(f"{path}: n_inner is {n_inner!r}, expected 4 n_embd = {4 * model.n_embd}")
    return model, quantization


def load_model(directory: Path, dtype: mx.Dtype | None = mx.float32) -> GPT:
    """The model in a directory, ready for evaluation; adapters are merged with their base, in float32.

    Its weights are of a floating-point type whatever the file holds, or if that is None as they lie in the file:
    in half precision, or quantized. On the CPU's kernels vectors and positions are float32 all the same, and so are
    matrices of a quantization that there is no kernel for. FileNotFoundError; ValueError that lists missing,
    unknown and misshapen tensors, or names one that holds a value that is not finite.
    """
    if lora.is_in(directory):
        model = load_base(directory)
        lora.add(model, lora.read(directory))
        load_adapters(directory, model)
        lora.merge(model)
        if dtype is not None:
            model.set_dtype(dtype)
            mx.eval(model.parameters())
        return model
    (config, quantization), path = _read_config(directory), directory / WEIGHTS
    tensors = read_tensors(path)
    conv1d = not any(name.startswith("model.") for name in tensors)  # mlx_lm's names come with our layout
    tensors = {name.removeprefix("transformer.").removeprefix("model."): t for name, t in tensors.items()}
    packed: dict[str, tuple[Tensor, ...]] = {}
    if quantization:
        tensors, packed = _dequantized(tensors, quantization["bits"], quantization["group_size"], path)
    tensors = {name: t for name, t in tensors.items() if not name.endswith((".attn.bias", ".attn.masked_bias"))}
    if config.tied_head and (head := tensors.pop("lm_head.weight", None)) is not None:
        if "wte.weight" not in tensors or not np.array_equal(head.read(), tensors["wte.weight"].read()):
            raise ValueError(f"{path}: lm_head.weight is not wte.weight, but tie_word_embeddings says that it is")
    layers = {name.split(".")[1] for name in tensors if name.startswith("h.")}
    if len(layers) < config.n_layer:  # before a model of so many is made
        raise ValueError(f"{path}: {len(layers)} layers, config.json says {config.n_layer}")
    model = GPT(config)
    expected = {name: tuple(p.shape) for name, p in model.named_weights().items()}
    if not config.bias:  # the zeros that other programs want to see
        tensors = {name: t for name, t in tensors.items() if name in expected or not _is_zero_bias(name, t)}
    turned = is_conv1d if conv1d else None
    check_tensors(tensors, expected, path, turned)
    if dtype is None and not conv1d and kernels.reads(quantization.get("bits", 0)):
        for name in [name for name in packed if name in expected and name != "wpe.weight"]:
            del tensors[name]
            _quantize(model, name.removesuffix(".weight"), packed[name], quantization["group_size"], path)
    weights = load_arrays(tensors, path, dtype, turned)
    if dtype is None and "wpe.weight" in packed and not kernels.available():  # float32 would make all of it float32
        weights["wpe.weight"] = weights["wpe.weight"].astype(_mlx_dtype(packed["wpe.weight"][1].dtype))
    model.update(tree_unflatten(list(weights.items())))
    mx.eval(model.parameters())
    model.eval()
    return model


def load_base(directory: Path) -> GPT:
    """The model that the adapters in a directory correct, in float32 and without them, with the directory's number of
    positions. FileNotFoundError and ValueError, one line that names the base, if it is gone or not what it was."""
    base = load_model(lora.require_base(lora.read(directory), directory))
    config = adapted_config(directory, base.config)
    model = GPT(config)
    weights = base.named_weights()
    weights["wpe.weight"] = weights["wpe.weight"][: config.block_size]
    model.update(tree_unflatten(list(weights.items())))
    mx.eval(model.parameters())
    model.eval()
    return model


def adapted_config(directory: Path, base: GPTConfig) -> GPTConfig:
    """The shape of the model whose adapters are in a directory: the base's, of which it may have fewer positions and
    another dropout. ValueError for what else differs."""
    config = load_config(directory)
    allowed = replace(base, block_size=min(config.block_size, base.block_size), dropout=config.dropout)
    for name, value in vars(allowed).items():
        if getattr(config, name) != value:
            raise ValueError(f"{directory}: {name} is {getattr(config, name)}, but {value} in its base")
    return config


def load_adapters(directory: Path, model: GPT) -> None:
    """Puts the adapters in a directory into a model with such, bit for bit.

    FileNotFoundError; ValueError that lists missing, unknown and misshapen tensors, or names one that holds a value
    that is not finite.
    """
    path = directory / lora.WEIGHTS
    names = {lora.file_name(name): name for name in lora.names(model)}
    expected = {name: tuple(array.shape) for name, array in lora.tensors(model).items()}
    tensors = read_tensors(path)
    check_tensors(tensors, expected, path)
    model.update(tree_unflatten([(names[name], array) for name, array in load_arrays(tensors, path).items()]))


def model_of(config: GPTConfig, tensors: Mapping[str, Tensor], source: Path) -> GPT:
    """A model of tensors by our names and in our layout, in float32, ready for evaluation. ValueError, naming the
    source, as for load_model."""
    model = GPT(config)
    check_tensors(tensors, {name: tuple(p.shape) for name, p in model.named_weights().items()}, source)
    model.update(tree_unflatten(list(load_arrays(tensors, source).items())))
    mx.eval(model.parameters())
    model.eval()
    return model


def _quantize(model: GPT, path: str, parts: tuple[Tensor, ...], group_size: int, source: Path) -> None:
    """Puts the parts of a quantized matrix into the module that has it. ValueError for a value that is not finite."""
    (module,) = (module for name, module in model.named_modules() if name == path)
    for name, tensor in zip(("scales", "biases"), parts[1:], strict=True):
        x = tensor.read()
        if not kernels.copy(x, np.empty(x.shape, x.dtype.newbyteorder("="))):
            raise ValueError(f"{source}: {path}.{name} holds a value that is not finite (NaN or infinity)")
    module.weight, module.scales, module.biases = map(_array, parts)
    module.group_size = group_size


def require_format(path: Path, name: str, value: Any, newest: int) -> None:
    """ValueError for a file of a format that this version doesn't know."""
    if type(value) is int and value > newest:
        raise ValueError(f"{path}: {name} is {value}, this version reads up to {newest}; nothing was changed")
    if type(value) is not int or value < 1:
        raise ValueError(f"{path}: {name} is {value!r}, expected 1{f' to {newest}' if newest > 1 else ''}")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file in a model directory, none of them read yet. FileNotFoundError, ValueError."""
    if not path.exists():
        raise FileNotFoundError(f"{path.parent} has no {path.name}")
    return safetensors_file.read(path)


def check_tensors(
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, tuple[int, ...]],
    path: Path,
    turned: Callable[[str], bool] | None = None,
) -> None:
    """That a file's tensors, those `turned` in the layout of Conv1D, are the expected. ValueError lists those not."""
    shapes = {name: shape[::-1] if turned and turned(name) else shape for name, shape in expected.items()}
    faults = [f"missing {name}" for name in shapes if name not in tensors]
    faults += [f"unknown {name}" for name in tensors if name not in shapes]
    faults += [
        f"{name} is {tensors[name].shape}, expected {shape}"
        for name, shape in shapes.items()
        if name in tensors and tensors[name].shape != shape
    ]
    faults += [
        f"{name} is {t.dtype}, expected a floating-point type" for name, t in tensors.items() if "float" not in t.dtype
    ]
    if faults:
        raise ValueError(f"{path}: {'; '.join(faults[:8])}{f'; and {len(faults) - 8} more' if faults[8:] else ''}")


def load_arrays(
    tensors: Mapping[str, Tensor],
    path: Path,
    dtype: mx.Dtype | None = mx.float32,
    turned: Callable[[str], bool] | None = None,
) -> dict[str, mx.array]:
    """A file's tensors in our layout. ValueError names one with a value that is not finite."""
    halves = [t for t in ("float16", "bfloat16") if dtype is None or dtype == _mlx_dtype(t)]

    def stays(name: str, tensor: Tensor) -> bool:
        is_matrix = len(tensor.shape) == 2 and name != "wpe.weight"
        return tensor.dtype in halves and (is_matrix or dtype is not None or not kernels.available())

    types = {name: t.dtype if stays(name, t) else "float32" for name, t in tensors.items()}
    shapes = {name: t.shape[::-1] if turned and turned(name) else t.shape for name, t in tensors.items()}
    on_cpu = mx.default_device().type == mx.cpu  # where an array's memory is its own alone, and may be written to
    arrays = _empty_arrays({name: (types[name], shape) for name, shape in shapes.items()}) if on_cpu else {}
    # The largest first: while it is read, its file's pages take memory too, and the others' copies none yet.
    for name in sorted(tensors, key=lambda name: tensors[name].nbytes, reverse=True):
        x, is_bfloat16 = tensors[name].read(), types[name] == "bfloat16"
        if on_cpu:
            out = np.array(arrays[name].view(mx.uint16) if is_bfloat16 else arrays[name], copy=False)
        else:
            out = np.empty(shapes[name], "uint16" if is_bfloat16 else types[name])
        if not kernels.copy(x.T if turned and turned(name) else x, out):
            raise ValueError(f"{path}: {name} holds a value that is not finite (NaN or infinity)")
        if not on_cpu:
            arrays[name] = mx.array(out).view(mx.bfloat16) if is_bfloat16 else mx.array(out)
        if dtype is not None:
            arrays[name] = arrays[name].astype(dtype)
    return arrays


class _NothingToRead:
    """A safetensors file of a header alone, for mx.load: what reads on finds its memory as it was."""

    closed = False

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._header, self._at = safetensors_file.header(tensors), 0
        self._size = len(self._header) + sum(t.nbytes for t in tensors.values())

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, memory: Any) -> int:
        part = self._header[self._at : self._at + len(memory)]
        memory[: len(part)] = part
        self._at += len(memory)
        return len(memory)


def _empty_arrays(like: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, mx.array]:
    """MLX arrays of some types and shapes, to be written to by whoever holds them.

    Of its own MLX makes no array that isn't written to at once, which for a model's weights takes as long as
    copying them; but it reads files into such.
    """
    tensors = {name: Tensor(dtype, shape, lambda: np.empty(0)) for name, (dtype, shape) in like.items()}
    file = _NothingToRead(tensors)
    held = weakref.ref(file)
    arrays = mx.load(file, format="safetensors")  # type: ignore[arg-type]
    del file
    # A thread of MLX's lets go of the file a moment later; an interpreter that had ended by then would abort.
    for _ in range(1000):
        if held() is None:
            break
        time.sleep(1e-4)
    return arrays  # type: ignore[return-value]


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


def quantize(weights: dict[str, mx.array], bits: int, group_size: int = 64) -> dict[str, mx.array]:
    """What a quantized directory's model.safetensors holds for some of a model's weights, of any floating type.

    Names and layouts are ours on the way in, mlx_lm's on the way out. Matrices whose rows are no multiple of
    group_size, and vectors, stay as they are. ValueError for bits or a group_size that MLX doesn't have.
    """
    tensors: dict[str, mx.array] = {}
    for name, p in weights.items():
        their_name = name if name.startswith("lm_head.") else f"model.{name}"
        if p.ndim == 2 and p.shape[1] % group_size == 0:
            module = their_name.removesuffix(".weight")
            parts = mx.quantize(p, group_size, bits)
            tensors |= {f"{module}.{part}": t for part, t in zip(("weight", "scales", "biases"), parts, strict=True)}
        else:
            tensors[their_name] = p
    return tensors


def _dequantized(
    tensors: dict[str, Tensor], bits: int, group_size: int, path: Path
) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, ...]]]:
    """The tensors with those that are quantized in float32 again, each when it is read; and the latter's parts."""
    tensors = dict(tensors)
    packed_parts: dict[str, tuple[Tensor, ...]] = {}
    for module in [name.removesuffix(".scales") for name in tensors if name.endswith(".scales")]:
        packed, scales, biases = (tensors.pop(f"{module}.{part}", None) for part in ("weight", "scales", "biases"))
        if packed is None or scales is None or biases is None:
            raise ValueError(f"{path}: of {module}'s weight, scales and biases one is missing")
        parts = (packed, scales, biases)

        def weight(parts: tuple[Tensor, ...], array: Callable[[Tensor], mx.array]) -> mx.array:
            packed, scales, biases = map(array, parts)
            return mx.dequantize(packed, scales.astype(mx.float32), biases.astype(mx.float32), group_size, bits)

        def read(parts: tuple[Tensor, ...] = parts) -> np.ndarray:
            return np.array(weight(parts, _array), copy=False)

        try:
            if scales.shape != biases.shape:  # MLX would read past the end
                raise ValueError(f"scales are {scales.shape}, but biases {biases.shape}")
            shape = weight(parts, lambda t: mx.zeros(t.shape, _mlx_dtype(t.dtype))).shape  # never evaluated
        except ValueError as error:
            raise ValueError(f"{path}: {module} can't be dequantized: {error}") from None
        tensors[f"{module}.weight"] = Tensor("float32", tuple(shape), read)
        packed_parts[f"{module}.weight"] = parts
    return tensors, packed_parts


def _mlx_dtype(name: str) -> mx.Dtype:
    return getattr(mx, "bool_" if name == "bool" else name)  # type: ignore[no-any-return]


def _array(tensor: Tensor) -> mx.array:
    """A tensor as it is, in memory of its own."""
    array = mx.array(tensor.read())
    return array.view(mx.bfloat16) if tensor.dtype == "bfloat16" else array


def config_json(
    config: GPTConfig,
    tokenizer: Tokenizer | None = None,
    dtype: str = "float32",
    quantization: dict[str, Any] | None = None,
) -> bytes:
    """A model directory's config.json. quantization is {"group_size": 64, "bits": 4} or the like."""
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
        "dtype": dtype,
        # what GPT2Config can't say: without biases, the zeros in the file are not parameters
        "mlxgpt": {"format": FORMAT, "bias": config.bias},
    }
    if quantization:  # the second name makes transformers, which can't read it, say so
        values |= {"quantization": quantization, "quantization_config": quantization}
    return (json.dumps(values, indent=2) + "\n").encode()


def weights_file(model: GPT) -> tuple[str, dict[str, Tensor]]:
    """The file of a model directory that holds the weights, and its tensors in the model's own memory; of a model with
    adapters theirs."""
    if model.lora is not None:
        return lora.WEIGHTS, array_tensors(lora.tensors(model))
    weights = with_zero_biases(model.named_weights(), model.config)
    return WEIGHTS, {file_name(name, model.config): t for name, t in array_tensors(weights, is_conv1d).items()}


def array_tensors(
    arrays: Mapping[str, mx.array], turned: Callable[[str], bool] = lambda name: False
) -> dict[str, Tensor]:
    """MLX arrays in their own memory, evaluated, so that any thread may read them; matrices that are `turned` so."""
    of_numpy = {name: a.view(mx.uint16) if a.dtype == mx.bfloat16 else a for name, a in arrays.items()}
    mx.eval(of_numpy)
    tensors = {}
    for name, a in of_numpy.items():
        x = np.array(a, copy=False).T if turned(name) else np.array(a, copy=False)
        tensors[name] = Tensor(str(arrays[name].dtype).removeprefix("mlx.core."), x.shape, x.view)
    return tensors


def with_zero_biases(weights: dict[str, mx.array], config: GPTConfig) -> dict[str, mx.array]:
    """Some of a model's weights, by our names; of one without biases with the zeros that other programs want to see."""
    biases = missing_biases(weights, config)
    return weights | {bias: mx.zeros(weights[of].shape[:1], weights[of].dtype) for bias, of in biases.items()}


def missing_biases(names: Iterable[str], config: GPTConfig) -> dict[str, str]:
    """The biases that a model without them leaves out, each with the name of the weight that it would go with."""
    if config.bias:
        return {}
    embeddings = ("wte.weight", "wpe.weight", "lm_head.weight")
    return {name.removesuffix("weight") + "bias": name for name in names if name not in embeddings}


def file_name(name: str, config: GPTConfig) -> str:
    """A parameter's name in the file. transformers 4 takes a head of its own only beside names with the prefix."""
    return name if config.tied_head or name == "lm_head.weight" else f"transformer.{name}"


def is_conv1d(name: str) -> bool:
    """Whether a parameter is a linear layer's weight, which Conv1D turns."""
    return name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


def _is_zero_bias(name: str, tensor: Tensor) -> bool:
    return name.endswith(".bias") and not mx.any(_array(tensor)).item()
