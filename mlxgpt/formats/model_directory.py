"""Model directories: a GPT, its tokenizer and its shape in the files of a Hugging Face GPT-2.

`config.json`, `model.safetensors` and the tokenizer's files, as transformers and mlx_lm open them (gpt2.py). A tied
head is left out. Directories that mlx_lm itself has written are read too, quantized or not (quantized.py). A model with
adapters has these in the place of `model.safetensors`, and is read together with the model that they correct, its base
(adapters.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx

from ..common import disk
from ..cpu import extension
from ..data.tokenizer import Tokenizer
from ..model import lora
from ..model.config import GPTConfig
from ..model.gpt import GPT
from . import adapters, gpt2, safetensors_file
from .mlx_arrays import as_tensors, copy_weights, fill, load_arrays, mlx_dtype
from .quantized import dequantized, fill_quantized
from .tensors import Tensor

# ---- writing ----


def save_model(directory: Path, model: GPT, tokenizer: Tokenizer | None = None) -> None:
    """Writes a model directory, in place of one that is there, which stays as it was until the new one is complete.
    Of a model with adapters, only the adapters are written.

    OSError when the disk is full or can't be written.
    """
    name, tensors = weights_file(model)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with disk.appearing(directory) as temporary:
            temporary.mkdir()
            for file, content in small_files(model, tokenizer).items():
                (temporary / file).write_bytes(content)
            safetensors_file.write(temporary / name, tensors)
    except OSError as error:
        raise OSError(f"{directory}: the model can't be written: {error.strerror}") from None


def small_files(model: GPT, tokenizer: Tokenizer | None) -> dict[str, bytes]:
    """What a model directory holds beside the weights."""
    config = gpt2.config_json(model.config, tokenizer)
    return {gpt2.CONFIG: config, **(tokenizer.files() if tokenizer else {}), **adapters.small_files(model)}


def weights_file(model: GPT) -> tuple[str, dict[str, Tensor]]:
    """The file of a model directory that holds the weights, and its tensors in the model's own memory: of a model with
    adapters those of the adapters."""
    if model.lora is not None:
        return adapters.WEIGHTS, as_tensors(adapters.tensors(model))
    weights = with_zero_biases(model.named_weights(), model.config)
    return gpt2.WEIGHTS, gpt2.to_hugging_face(as_tensors(weights), model.config)


def with_zero_biases(weights: Mapping[str, mx.array], config: GPTConfig) -> dict[str, mx.array]:
    """Some of a model's weights; in a model without biases with zeros for them, for programs that expect some."""
    biases = gpt2.missing_biases(weights, config)
    beside = {bias: weights[weight] for bias, weight in biases.items()}
    return {**weights, **{bias: mx.zeros(w.shape[:1], w.dtype) for bias, w in beside.items()}}


# ---- reading ----


def find_model(path: Path, setting: str = "model") -> Path:
    """The model directory that a setting's path names: the path itself, or in a training run's directory the best
    model, or the newest if none has been evaluated yet.

    FileNotFoundError for a path that is neither.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"{setting}: there is no directory {path}")
    for directory in map(disk.follow, (path, path / "best", path / "last")):
        if (directory / gpt2.CONFIG).exists():
            return directory
    raise FileNotFoundError(f"{setting}: {path} is not a model directory: it has no config.json")


def load_config(directory: Path) -> GPTConfig:
    """The shape of the model in a directory.

    FileNotFoundError; ValueError for what this package's model can't be.
    """
    return gpt2.read_config(directory).model


def load_model(directory: Path, dtype: mx.Dtype | None = mx.float32) -> GPT:
    """The model in a directory, ready for evaluation; adapters are merged with their base, in float32.

    Its weights are converted to `dtype`. If that is None, they stay as the file has them, in half precision or
    quantized; but on the CPU's kernels vectors and positions are float32, and so are matrices of a quantization that
    there is no kernel for. FileNotFoundError; ValueError that lists missing,
    unknown and misshapen tensors, or names one that holds a value that is not finite.
    """
    if adapters.is_in(directory):
        return _load_merged(directory, dtype)
    config, path = gpt2.read_config(directory), directory / gpt2.WEIGHTS
    tensors, quantized = _read_parameters(path, config)
    gpt2.check_model(tensors, config.model, path)
    model = GPT(config.model)
    if dtype is None and extension.computes_quantized(config.quantization.get("bits", 0)):
        for name in [name for name in quantized if name in tensors and name != "wpe.weight"]:
            fill_quantized(model, name, quantized[name], config.quantization["group_size"], path)
            del tensors[name]
    weights = load_arrays(tensors, path, dtype)
    if dtype is None and "wpe.weight" in quantized and not extension.is_used():  # float32 would make all of it float32
        weights["wpe.weight"] = weights["wpe.weight"].astype(mlx_dtype(quantized["wpe.weight"][1].dtype))
    return fill(model, weights)


def _read_parameters(path: Path, config: gpt2.ConfigJson) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, ...]]]:
    """The parameters in a model.safetensors by GPT-2's names and in this package's layout, quantized matrices in
    float32; and the parts of each quantized matrix.

    FileNotFoundError; ValueError for parts that don't fit, and for a head that is not tied.
    """
    found = safetensors_file.read(path)
    tensors, _ = gpt2.parameters_by_name(found, path)
    quantized: dict[str, tuple[Tensor, ...]] = {}
    if config.quantization:
        bits, group_size = config.quantization["bits"], config.quantization["group_size"]
        tensors, quantized = dequantized(tensors, bits, group_size, path)
    if config.model.tied_head and "lm_head.weight" in tensors:
        if not gpt2.is_head_tied(tensors):
            raise ValueError(f"{path}: lm_head.weight is not wte.weight, but tie_word_embeddings says that it is")
        del tensors["lm_head.weight"]
    for name in gpt2.zero_biases(tensors, config.model):
        del tensors[name]
    if not any(name.startswith("model.") for name in found):  # mlx_lm's names come with this package's layout
        tensors, quantized = gpt2.linear_transposed(tensors), {}
    return tensors, quantized


def _load_merged(directory: Path, dtype: mx.Dtype | None) -> GPT:
    """The model of a base and the adapters in a directory, merged in float32."""
    model = load_adapted(directory)
    lora.merge(model)
    if dtype is not None:
        model.set_dtype(dtype)
        mx.eval(model.parameters())
    return model


def load_adapted(directory: Path) -> GPT:
    """The float32 model of a base and the adapters in a directory, which are not merged. FileNotFoundError,
    ValueError."""
    model = load_base(directory)
    lora.add(model, adapters.read(directory))
    adapters.load(directory, model)
    return model


def load_base(directory: Path) -> GPT:
    """The model that the adapters in a directory correct, in float32 and without them, with the directory's number of
    positions. FileNotFoundError and ValueError, one line that names the base, if it is gone or not what it was."""
    base = load_model(adapters.require_base(directory))
    model = GPT(adapters.config_on_base(directory, base.config))
    copy_weights(base, model)
    mx.eval(model.parameters())
    model.eval()
    return model
