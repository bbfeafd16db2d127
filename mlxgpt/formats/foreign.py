"""GPT-2 checkpoints of other programs to model directories, and back.

A source is read into a Checkpoint: our names, our layout (linear weights (n_out, n_in)), nothing read yet; a
destination is written from one, a tensor at a time. Who writes what, with which activation:

    Hugging Face   h.0.attn.c_attn.weight, with or without transformer.     Conv1D, (n_in, n_out)   tanh GELU
    nanoGPT        transformer.h.0..., once compiled _orig_mod.transformer  (n_out, n_in)           exact GELU
    llm.c          no names: an array of each kind with all layers in it    (n_out, n_in)           tanh GELU
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import pickle
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..common import disk
from ..common.settings import from_dict
from ..data import tokenizer
from ..model import lora
from ..model.config import GPTConfig
from ..model.gpt import GPT, Linear
from . import gguf_file, pickles, safetensors_file, torch_file, training_state
from . import model_directory as checkpoint
from .tensors import (
    FLOATS,
    Tensor,
    cast,
    equal,
    first_rows,
    in_file,
    numpy_dtype,
    reporting,
    row_blocks,
    to_float32,
    transposed,
    zeros,
)

TOKENIZER_FILES = (
    "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json",
)  # fmt: skip
NANOGPT = "nanogpt.json"  # in a model directory: what ckpt.pt says that nothing here uses
SETTINGS = (  # of nanoGPT's config, those that TrainConfig has under the same names
    "learning_rate", "min_lr", "warmup_iters", "lr_decay_iters", "decay_lr", "max_iters", "weight_decay", "beta1",
    "beta2", "grad_clip", "batch_size", "gradient_accumulation_steps", "eval_interval", "eval_iters", "log_interval",
)  # fmt: skip
_MOST_BESIDE = 200_000_000  # bytes of a file that is not weights
GROUP_SIZE = 64  # of quantized weights
GPT2_VOCABULARY = (50257, 50304)  # as it is, and as nanoGPT and llm.c pad it to a multiple of 64


@dataclass
class Checkpoint:
    """A model as some program left it."""

    source: str  # what wrote it, for a person
    config: GPTConfig
    tensors: dict[str, Tensor]  # our names and layout
    tokenizer_files: dict[str, bytes] = field(default_factory=dict)
    tokenizer: tokenizer.Tokenizer | None = None  # that they are of, once it was made
    dropped: dict[str, str] = field(default_factory=dict)  # tensors left behind, and why
    notes: list[str] = field(default_factory=list)  # what a person should know
    averages: dict[str, Tensor] = field(default_factory=dict)  # AdamW's: m.<name>, v.<name>
    training: dict[str, Any] = field(default_factory=dict)  # beside them, what training_json takes
    nanogpt: dict[str, Any] = field(default_factory=dict)  # its iter_num, best_val_loss and config, to go back

    @property
    def dtype(self) -> str:
        """That of the widest matrix."""
        return max((t.dtype for t in self.tensors.values()), key=("bfloat16", "float16", "float32").index)


@dataclass(frozen=True)
class Start:
    """What training starts from."""

    config: GPTConfig
    tokenizer: tokenizer.Tokenizer
    load: Callable[[], GPT]  # float32, one copy of the weights, ready for evaluation
    directory: Path | None  # the model directory that it is, or None: what adapters can be made for


def start(path: Path, setting: str = "init_from") -> Start:
    """What lies at a setting's path, to train from: a model directory, a run, or what `read` reads.

    FileNotFoundError; ValueError in one line for what is not a GPT-2, or without a tokenizer.
    """
    if not path.exists():
        raise FileNotFoundError(f"{setting}: there is no file or directory {path}")
    if path.is_dir() and not (path / "ckpt.pt").is_file():
        directory = checkpoint.find_model(path, setting)
        if lora.is_in(directory) or (directory / checkpoint.WEIGHTS).is_file():
            load_directory = functools.partial(checkpoint.load_model, directory)
            return Start(checkpoint.load_config(directory), tokenizer.load(directory), load_directory, directory)
        path = directory
    model = read(path)
    text = tokenizer_of(model)
    if text is None:
        raise ValueError(f"{setting}: {path} comes without a tokenizer: put nanoGPT's meta.pkl beside it")
    return Start(model.config, text, functools.partial(load, model, path), None)


def load(model: Checkpoint, path: Path) -> GPT:
    """The model that `read` found at a path, in memory: in float32, ready for evaluation.

    ValueError names a tensor that holds a value that is not finite.
    """
    return checkpoint.model_of(model.config, model.tensors, path)


# ---- sources ----


def read(path: Path, meta: Path | None = None, n_head: int = 0) -> Checkpoint:
    """What lies at a path: a directory of Hugging Face's, of nanoGPT's or of ours, or one file of theirs.

    meta is nanoGPT's meta.pkl with the characters; n_head is for files that don't say it.
    FileNotFoundError; ValueError in one line for what is not a GPT-2, or is damaged.
    """
    if path.is_dir():
        if (path / "ckpt.pt").is_file() and not (path / "config.json").exists():
            return read(path / "ckpt.pt", meta, n_head)
        if lora.is_in(path):
            return _adapted(path)
        return _hugging_face(path, _files_of(path), n_head)
    if not path.is_file():
        raise FileNotFoundError(f"source: there is no file or directory {path}")
    with open(path, "rb") as file:
        first = file.read(8)
    if int.from_bytes(first[:4], "little") == _LLMC_MAGIC:
        return _llmc(path)
    if path.suffix == ".safetensors":
        return _hugging_face(path.parent, [path], n_head)
    content = torch_file.read(path)
    if isinstance(content, dict) and isinstance(content.get("model_args"), dict):
        return _nanogpt(path, content, meta)
    return _hugging_face(path.parent, [path], n_head, content, meta)


def _files_of(directory: Path) -> list[Path]:
    """The files of a Hugging Face directory that hold its tensors."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (directory / name).is_file():
            return [directory / name]
        index = directory / f"{name}.index.json"
        if index.is_file():
            try:
                shards = sorted(set(json.loads(_small(index))["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise ValueError(f"{index}: not an index of shards: it has no weight_map") from None
            for shard in shards:
                if not isinstance(shard, str) or shard in ("", ".", "..") or "/" in shard or "\\" in shard:
                    raise ValueError(f"{index}: a shard is {shard!r}, expected the name of a file beside the index")
                if not (directory / shard).is_file():
                    raise FileNotFoundError(f"{index}: its shard {shard} is not there")
            return [directory / shard for shard in shards]
    raise FileNotFoundError(
        f"source: {directory} holds none of model.safetensors, pytorch_model.bin, their sharded forms, and ckpt.pt"
    )


def _hugging_face(
    directory: Path, files: list[Path], n_head: int, content: Any = None, meta: Path | None = None
) -> Checkpoint:
    """Files with GPT-2's names, in either layout, with config.json beside them or without."""
    found: dict[str, Tensor] = {}
    for path in files:
        if path.suffix == ".safetensors":
            part: Any = safetensors_file.read(path)
        else:
            part = content if content is not None else torch_file.read(path)
            for key in ("state_dict", "model", "model_state_dict"):
                if isinstance(part, dict) and isinstance(part.get(key), dict):
                    part = part[key]
        tensors = {k: t for k, t in part.items() if isinstance(t, Tensor)} if isinstance(part, dict) else {}
        if not tensors:
            raise ValueError(f"{path}: it holds no tensors by name")
        if twice := sorted(found.keys() & tensors.keys()):
            raise ValueError(f"{path}: {twice[0]} is in another shard too")
        found |= tensors
    tensors, dropped = _our_names(found, files[0])
    conv1d = _in_conv1d(tensors, files[0])
    configured, ours = (directory / "config.json").is_file(), False
    notes = []
    if configured:
        text = _small(directory / "config.json")
        config, names = checkpoint.load_config(directory), json.loads(text).keys()
        if "quantization" in names:
            raise ValueError(f"{directory}: it is quantized: convert what it was made from")
        ours = "mlxgpt" in names
    else:
        config, note = _config_of(tensors, n_head, files[0], "gelu_new" if conv1d else "gelu")
        notes.append(f"there is no config.json: {note}")
    if conv1d:
        tensors = {name: transposed(t) if checkpoint.is_conv1d(name) else t for name, t in tensors.items()}
    if not config.bias:  # the zeros that other programs want to see
        for name in [n for n in tensors if n.endswith(".bias") and not np.any(tensors[n].read())]:
            dropped[name] = "zeros that stand for no bias"
            del tensors[name]
    source = "Hugging Face GPT-2" if conv1d else "state dict in nanoGPT's layout"
    if ours:
        source = "model directory of mlxgpt"
    model = _checked(Checkpoint(source, config, tensors, dropped=dropped, notes=notes), files[0])
    model.tokenizer_files = _tokenizer_files(directory)
    if not model.tokenizer_files:
        _add_tokenizer(model, directory, meta)
    if configured and (directory / training_state.TRAINING).is_file():
        _add_training_state(model, directory)
    return model


def _adapted(directory: Path) -> Checkpoint:
    """Adapters of ours merged with their base, in the base's types: each weight when it is read."""
    adapters = lora.read(directory)
    base = read(lora.require_base(adapters, directory))
    config = checkpoint.adapted_config(directory, base.config)
    base = cropped(base, config.block_size)
    model = GPT(config)  # lazy: only its adapters take memory
    lora.add(model, adapters)
    checkpoint.load_adapters(directory, model)
    merged = {
        f"{name}.weight": _merged(f"{name}.weight", base.tensors[f"{name}.weight"], layer)
        for name, layer in lora.layers(model, adapters).items()
    }
    return dataclasses.replace(
        base, source=f"LoRA adapters of {adapters.base}", config=config, tensors=base.tensors | merged,
        tokenizer_files=_tokenizer_files(directory) or base.tokenizer_files, averages={}, training={}, nanogpt={},
    )  # fmt: skip


def _merged(name: str, tensor: Tensor, layer: Linear) -> Tensor:
    def read() -> np.ndarray:
        return to_float32(tensor.read(), tensor.dtype) + np.array(lora.correction(layer), copy=False)

    return cast(name, Tensor("float32", tensor.shape, read), tensor.dtype)


def _add_training_state(model: Checkpoint, directory: Path) -> None:
    """That of a model directory of ours."""
    record = training_state.load_training_record(directory)
    names = ("step", "learning_rate", "beta1", "beta2", "eps", "weight_decay", "best_val_loss", "settings")
    model.training = {name: record[name] for name in names}
    averages, path = safetensors_file.read(directory / training_state.OPTIMIZER), directory / training_state.OPTIMIZER
    trained = [name for name in model.tensors if f"m.{name}" in averages]  # the others were frozen
    expected = {f"{average}.{name}": model.tensors[name].shape for average in "mv" for name in trained}
    if {name: t.shape for name, t in averages.items()} != expected:
        raise ValueError(f"{path}: its averages are not those of the model's {len(model.tensors)} parameters")
    model.averages = averages
    if (directory / NANOGPT).is_file():
        model.nanogpt = json.loads(_small(directory / NANOGPT))


def _nanogpt(path: Path, content: dict[str, Any], meta: Path | None) -> Checkpoint:
    """ckpt.pt of nanoGPT's train.py: model, optimizer, model_args, iter_num, best_val_loss, config."""
    model = content.get("model")
    if not isinstance(model, dict):
        raise ValueError(f"{path}: model is a {type(model).__name__}, expected a state dict")
    tensors, dropped = _our_names({k: t for k, t in model.items() if isinstance(t, Tensor)}, path)
    arguments = content["model_args"]
    names = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias")
    values = {name: arguments[name] for name in names if arguments.get(name) is not None}
    values.setdefault("vocab_size", tensors["wte.weight"].shape[0] if "wte.weight" in tensors else 50304)
    config = from_dict(GPTConfig, {**values, "activation": "gelu"}, source=f"{path}: model_args")
    result = _checked(Checkpoint("nanoGPT checkpoint", config, tensors, dropped=dropped), path)
    _add_tokenizer(result, path.parent, meta)
    best = content.get("best_val_loss")
    best = float(np.asarray(best.read())) if isinstance(best, Tensor) else best
    best = best if isinstance(best, (int, float)) and math.isfinite(best) else None
    result.nanogpt = {"iter_num": content.get("iter_num"), "best_val_loss": best, "config": content.get("config")}
    result.nanogpt = _plain(result.nanogpt)
    optimizer = content.get("optimizer")
    if isinstance(optimizer, dict) and optimizer.get("state"):
        in_order = _matrices_first(tensors, _shapes(result.config))  # a state dict is in the model's order
        result.averages, steps = _averages(optimizer, in_order, result, path)
        group, given = optimizer["param_groups"][0], content.get("config")
        given = given if isinstance(given, dict) else {}
        result.training = {
            "step": steps, "learning_rate": group["lr"], "beta1": group["betas"][0], "beta2": group["betas"][1],
            "eps": group["eps"], "weight_decay": group["weight_decay"], "best_val_loss": best,
            "settings": {name: given[name] for name in SETTINGS if isinstance(given.get(name), (int, float))},
        }  # fmt: skip
    return result


def _averages(
    optimizer: dict[str, Any], names: list[str], model: Checkpoint, path: Path
) -> tuple[dict[str, Tensor], int]:
    """AdamW's averages by name, and how many steps they are of. PyTorch numbers the parameters."""
    averages, steps = {}, set()
    try:
        for number, state in optimizer["state"].items():
            name, step = names[number], state["step"]
            steps.add(int(np.asarray(step.read())) if isinstance(step, Tensor) else int(step))
            for ours, theirs in (("m", "exp_avg"), ("v", "exp_avg_sq")):
                if state[theirs].shape != model.tensors[name].shape:
                    raise ValueError(f"{theirs} of {name} is {state[theirs].shape}")
                averages[f"{ours}.{name}"] = state[theirs]
        if len(averages) != 2 * len(names) or len(steps) != 1:
            raise ValueError(f"{len(averages)} averages at steps {sorted(steps)} for {len(names)} parameters")
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: the optimizer's state is not that of nanoGPT's AdamW: {error}") from None
    return averages, steps.pop()


def _matrices_first(names: Iterable[str], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Parameters as nanoGPT's configure_optimizers numbers them: two groups, each in the model's order."""
    there = [name for name in names if name in shapes]
    return [n for n in there if len(shapes[n]) >= 2] + [n for n in there if len(shapes[n]) < 2]


def _nanogpt_order(config: GPTConfig) -> list[str]:
    """Parameters in the order of nanoGPT's modules, with biases whether the model has them or not."""
    names = ["wte.weight", "wpe.weight"]
    for layer in range(config.n_layer):
        for module in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
            names += [f"h.{layer}.{module}.weight", f"h.{layer}.{module}.bias"]
    return [*names, "ln_f.weight", "ln_f.bias", "lm_head.weight"]


_LLMC_MAGIC = 20240326


def _llmc(path: Path) -> Checkpoint:
    """llm.c's model file (train_gpt2.py, write_model): 256 int32, then each kind of parameter for all layers."""
    with open(path, "rb") as file:
        header = np.frombuffer(file.read(1024), "<i4")
    if header.size < 256:
        raise ValueError(f"{path}: cut short inside llm.c's header")
    version, T, V, L, n_head, C, padded = (int(n) for n in header[1:8])
    if version not in (3, 5):
        raise ValueError(f"{path}: llm.c's format {version}, expected 3 (float32) or 5 (bfloat16)")
    sizes = {"block_size": T, "vocab_size": V, "n_layer": L, "n_head": n_head, "n_embd": C}
    config = from_dict(GPTConfig, sizes, source=str(path))
    if padded < V:
        raise ValueError(f"{path}: the padded vocabulary is {padded}, expected at least vocab_size = {V}")
    dtype = "float32" if version == 3 else "bfloat16"
    item = numpy_dtype(dtype)
    at, size, tensors = 1024, path.stat().st_size, {}
    # before anything is made that a lying header could make large
    expected = at + item.itemsize * ((padded + T) * C + L * (12 * C + 13) * C + 2 * C)
    if size != expected:
        raise ValueError(f"{path}: {size} bytes, expected {expected} for its header's sizes")
    kinds: list[tuple[str, tuple[int, ...]]] = [("ln_1.weight", (C,)), ("ln_1.bias", (C,))]
    for module, matrix in (("attn.c_attn", (3 * C, C)), ("attn.c_proj", (C, C))):
        kinds += [(f"{module}.weight", matrix), (f"{module}.bias", matrix[:1])]
    kinds += [("ln_2.weight", (C,)), ("ln_2.bias", (C,))]
    for module, matrix in (("mlp.c_fc", (4 * C, C)), ("mlp.c_proj", (C, 4 * C))):
        kinds += [(f"{module}.weight", matrix), (f"{module}.bias", matrix[:1])]
    order: list[tuple[str, tuple[int, ...]]] = [("wte.weight", (padded, C)), ("wpe.weight", (T, C))]
    order += [(f"h.{layer}.{kind}", shape) for kind, shape in kinds for layer in range(L)]
    order += [("ln_f.weight", (C,)), ("ln_f.bias", (C,))]
    for name, shape in order:
        tensors[name] = in_file(path, at, dtype, shape)
        at += item.itemsize * math.prod(shape)
    tensors["wte.weight"] = first_rows(tensors["wte.weight"], V)
    dropped = {f"wte.weight, rows {V} to {padded}": "padding of the vocabulary"} if padded > V else {}
    model = _checked(Checkpoint("llm.c", config, tensors, dropped=dropped), path)
    _add_tokenizer(model, path.parent, None)
    return model


def _our_names(found: Mapping[str, Tensor], path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors without the prefixes of wrappers, without masks, and without a head that is the embedding."""
    tensors: dict[str, Tensor] = {}
    dropped = {}
    for name, tensor in found.items():
        ours = re.sub(r"^(_orig_mod\.|module\.|model\.|transformer\.)*", "", name)
        if re.fullmatch(r"h\.\d+\.attn\.(bias|masked_bias)", ours):
            dropped[name] = "the causal mask, not a parameter"
        elif ours in tensors:
            raise ValueError(f"{path}: {ours} is there twice, under different prefixes")
        elif tensor.dtype not in FLOATS:
            raise ValueError(f"{path}: {name} is {tensor.dtype}, expected {', '.join(FLOATS)}")
        else:
            tensors[ours] = tensor
    head, embedding = tensors.get("lm_head.weight"), tensors.get("wte.weight")
    if head and embedding and head.shape == embedding.shape and equal(head, embedding):
        del tensors["lm_head.weight"]
        dropped["lm_head.weight"] = "the head is tied to wte.weight"
    return tensors, dropped


def _in_conv1d(tensors: Mapping[str, Tensor], path: Path) -> bool:
    """Whether linear weights are (n_in, n_out). c_attn tells: it is not square, as attention's c_proj is."""
    first = tensors.get("h.0.attn.c_attn.weight")
    if first is None or len(first.shape) != 2:
        raise ValueError(f"{path}: not a GPT-2: it has no matrix h.0.attn.c_attn.weight")
    rows, columns = first.shape
    if max(rows, columns) != 3 * min(rows, columns):
        raise ValueError(f"{path}: h.0.attn.c_attn.weight is {first.shape}, expected (3C, C) or (C, 3C)")
    return columns > rows


def _config_of(tensors: Mapping[str, Tensor], n_head: int, path: Path, activation: str) -> tuple[GPTConfig, str]:
    """The shape that a file without a config has, and what was supposed."""
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


def _checked(model: Checkpoint, path: Path) -> Checkpoint:
    """The same, if its tensors are those of its config. A head of its own is one of them."""
    layers = {name.split(".")[1] for name in model.tensors if name.startswith("h.")}
    if len(layers) != model.config.n_layer:  # before a model of so many is made
        raise ValueError(f"{path}: {len(layers)} layers, its config says {model.config.n_layer}")
    for name, shape in (
        ("wte.weight", (model.config.vocab_size, model.config.n_embd)),
        ("wpe.weight", (model.config.block_size, model.config.n_embd)),
    ):
        if name in model.tensors and model.tensors[name].shape != shape:
            raise ValueError(f"{path}: {name} is {model.tensors[name].shape}, expected {shape} for its config")
    if "lm_head.weight" in model.tensors and model.config.tied_head:
        model.config = dataclasses.replace(model.config, tied_head=False)
    shapes = _shapes(model.config)
    faults = [f"missing {name}" for name in shapes if name not in model.tensors]
    faults += [f"unknown {name}" for name in model.tensors if name not in shapes]
    faults += [
        f"{name} is {model.tensors[name].shape}, expected {shape}"
        for name, shape in shapes.items()
        if name in model.tensors and model.tensors[name].shape != shape
    ]
    if faults:
        raise ValueError(f"{path}: {'; '.join(faults[:6])}{f'; and {len(faults) - 6} more' if faults[6:] else ''}")
    model.tensors = {name: model.tensors[name] for name in shapes}
    return model


def _shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter's name and shape. Nothing is allocated: MLX makes arrays when they are used."""
    return {name: tuple(p.shape) for name, p in GPT(config).named_weights().items()}


def _small(path: Path) -> bytes:
    """The content of a file beside the weights. ValueError for one that is too large to be it."""
    if (size := path.stat().st_size) > _MOST_BESIDE:
        raise ValueError(f"{path}: {size} bytes, expected at most {_MOST_BESIDE}")
    return path.read_bytes()


def _tokenizer_files(directory: Path) -> dict[str, bytes]:
    return {name: _small(directory / name) for name in TOKENIZER_FILES if (directory / name).is_file()}


def _add_tokenizer(model: Checkpoint, directory: Path, meta: Path | None) -> None:
    """nanoGPT's: the characters in meta.pkl, or GPT-2's byte pairs for a vocabulary of their size."""
    if meta is None and (directory / "meta.pkl").is_file():
        meta = directory / "meta.pkl"
    if meta is not None:
        model.tokenizer = _characters(meta, model.config.vocab_size)
    elif model.config.vocab_size in GPT2_VOCABULARY:
        model.tokenizer = tokenizer.BPETokenizer.gpt2()
    if model.tokenizer is not None:
        model.tokenizer_files = model.tokenizer.files()


def _characters(meta: Path, vocab_size: int) -> tokenizer.CharTokenizer:
    """What nanoGPT's prepare.py writes: {"itos": {0: "\\n", ...}, ...}, read as data."""
    content = pickles.read(_small(meta), str(meta))
    itos = content.get("itos") if isinstance(content, dict) else None
    if not isinstance(itos, dict) or sorted(itos) != list(range(len(itos))) or not itos:
        raise ValueError(f"{meta}: not nanoGPT's meta.pkl: itos must number the characters from 0 on")
    characters = [itos[i] for i in range(len(itos))]
    if any(not isinstance(c, str) or len(c) != 1 for c in characters) or len(set(characters)) < len(characters):
        raise ValueError(f"{meta}: itos must hold characters, each once")
    if len(characters) > vocab_size:
        raise ValueError(f"{meta}: {len(characters)} characters, the model's vocab_size is {vocab_size}")
    return tokenizer.CharTokenizer(characters)


# ---- tensors ----


def _plain(value: Any) -> Any:
    """What JSON can hold of a setting."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


# ---- changes ----


def with_dtype(model: Checkpoint, dtype: str) -> Checkpoint:
    """The model in another floating-point type; the optimizer's averages stay float32."""
    tensors = {name: cast(name, t, dtype) for name, t in model.tensors.items()}
    return dataclasses.replace(model, tensors=tensors)


def cropped(model: Checkpoint, block_size: int) -> Checkpoint:
    """The model with the first block_size positions."""
    if not 1 <= block_size <= model.config.block_size:
        raise ValueError(f"block_size is {block_size}, expected 1 to the source's {model.config.block_size}")

    def crop(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n: first_rows(t, block_size) if n.endswith("wpe.weight") else t for n, t in tensors.items()}

    dropped = dict(model.dropped)
    if block_size < model.config.block_size:
        dropped[f"wpe.weight, rows {block_size} to {model.config.block_size}"] = "positions cropped by --block_size"
    return dataclasses.replace(
        model, config=dataclasses.replace(model.config, block_size=block_size), dropped=dropped,
        tensors=crop(model.tensors), averages=crop(model.averages),
    )  # fmt: skip


# ---- destinations ----


def hugging_face_tensors(model: Checkpoint) -> dict[str, Tensor]:
    """The tensors under Hugging Face's names, in Conv1D's layout, with zeros for biases that aren't there."""
    return {
        checkpoint.file_name(name, model.config): transposed(t) if checkpoint.is_conv1d(name) else t
        for name, t in _with_biases(model).items()
    }


def _with_biases(model: Checkpoint) -> dict[str, Tensor]:
    biases = checkpoint.missing_biases(model.tensors, model.config)
    like = {bias: model.tensors[of] for bias, of in biases.items()}
    return model.tensors | {bias: zeros(of.dtype, of.shape[:1]) for bias, of in like.items()}


def nanogpt_content(model: Checkpoint) -> dict[str, Any]:
    """What nanoGPT's train.py saves, for torch_file.write: its --init_from=resume and sample.py load it."""
    config, training = model.config, model.training
    in_order = [name for name in _nanogpt_order(config) if name in model.tensors]
    tensors = {f"transformer.{n}": model.tensors[n] for n in in_order if n != "lm_head.weight"}
    tensors["lm_head.weight"] = model.tensors.get("lm_head.weight", model.tensors["wte.weight"])
    names = _matrices_first(in_order, _shapes(config))
    n_matrices = sum(len(model.tensors[name].shape) >= 2 for name in names)
    options = {
        "lr": training.get("learning_rate", 6e-4),
        "betas": (training.get("beta1", 0.9), training.get("beta2", 0.95)),
        "eps": training.get("eps", 1e-8), "amsgrad": False, "maximize": False, "foreach": None, "capturable": False,
        "differentiable": False, "fused": None, "decoupled_weight_decay": True,
    }  # fmt: skip
    groups = [
        {**options, "weight_decay": training.get("weight_decay", 0.1), "params": list(range(n_matrices))},
        {**options, "weight_decay": 0.0, "params": list(range(n_matrices, len(names)))},
    ]
    state = {}
    for number, name in enumerate(names):
        if f"m.{name}" not in model.averages:  # there are none, or it was frozen
            continue
        steps = np.array(training["step"], np.float32)
        state[number] = {
            "step": steps, "exp_avg": model.averages[f"m.{name}"], "exp_avg_sq": model.averages[f"v.{name}"],
        }  # fmt: skip
    sizes = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
    best = model.nanogpt.get("best_val_loss", training.get("best_val_loss"))
    iterations = model.nanogpt.get("iter_num")
    return {
        "model": tensors,
        "optimizer": {"state": state, "param_groups": groups},
        "model_args": {name: getattr(config, name) for name in sizes},
        "iter_num": training.get("step", 0) if iterations is None else iterations,
        "best_val_loss": 1e9 if best is None else best,
        "config": model.nanogpt.get("config") or {},
    }


def tokenizer_of(model: Checkpoint) -> tokenizer.Tokenizer | None:
    """From the files that came along; None without any. ValueError for a kind that this package doesn't read."""
    if model.tokenizer is None and model.tokenizer_files:
        model.tokenizer = tokenizer.from_files(model.tokenizer_files, model.source)
    return model.tokenizer


def _tokenizer_if_read(model: Checkpoint) -> tokenizer.Tokenizer | None:
    """The same, but None with a note for a kind that isn't read: the weights can do without."""
    try:
        return tokenizer_of(model)
    except ValueError as error:
        model.notes.append(str(error))
        return None


def quantized_tensors(model: Checkpoint, bits: int) -> dict[str, Tensor]:
    """What checkpoint.quantize makes of all weights, a tensor at a time."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in _with_biases(model).items():
        tensors |= _quantized(name, tensor, bits)
    return tensors


def _quantized(name: str, tensor: Tensor, bits: int) -> dict[str, Tensor]:
    made: dict[str, np.ndarray] = {}  # when the first part is read, and let go as each is

    def make() -> None:
        parts: dict[str, list[np.ndarray]] = {}
        for rows in row_blocks(tensor):  # each row has groups of its own
            # from its values' float32, since NumPy has no bfloat16
            block = mx.array(to_float32(tensor.read()[rows], tensor.dtype)).astype(getattr(mx, tensor.dtype))
            for part, array in checkpoint.quantize({name: block}, bits, GROUP_SIZE).items():
                parts.setdefault(part, []).append(_of_mlx(array))
        made.update({part: np.concatenate(arrays) for part, arrays in parts.items()})

    def part(of: str) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            if of not in made:
                make()
            return made.pop(of)

        return read

    # MLX is lazy: shapes and types without arithmetic
    like = checkpoint.quantize({name: mx.zeros(tensor.shape, getattr(mx, tensor.dtype))}, bits, GROUP_SIZE)
    return {n: Tensor(_dtype_of(a), tuple(a.shape), part(n)) for n, a in like.items()}


def _dtype_of(array: mx.array) -> str:
    return str(array.dtype).removeprefix("mlx.core.")


def _of_mlx(array: mx.array) -> np.ndarray:
    """As Tensor.read gives it."""
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


def write_directory(directory: Path, model: Checkpoint, bits: int, done: Callable[[int], None]) -> None:
    """A model directory: Hugging Face's form, or with bits = 8 or 4 that of mlx_lm's quantized models."""
    directory.mkdir()
    groups = {"group_size": GROUP_SIZE, "bits": bits} if bits else None
    config = checkpoint.config_json(model.config, _tokenizer_if_read(model), model.dtype, groups)
    files = {"config.json": config, **model.tokenizer_files}
    if model.nanogpt:
        files[NANOGPT] = (json.dumps(model.nanogpt, indent=2) + "\n").encode()
    if model.training:
        files[training_state.TRAINING] = training_state.training_json(**model.training)
    for name, content in files.items():
        disk.write_file(directory / name, content)
    tensors = quantized_tensors(model, bits) if bits else hugging_face_tensors(model)
    safetensors_file.write(directory / checkpoint.WEIGHTS, tensors, done)
    if model.averages:
        averages = {name: cast(name, t, "float32") for name, t in model.averages.items()}
        safetensors_file.write(directory / training_state.OPTIMIZER, averages, done)


def write_nanogpt(directory: Path, model: Checkpoint, done: Callable[[int], None]) -> None:
    """nanoGPT's out_dir: ckpt.pt, and meta.pkl with the characters, which its sample.py looks for in data/."""
    directory.mkdir()
    torch_file.write(directory / "ckpt.pt", reporting(nanogpt_content(model), done))
    text = _tokenizer_if_read(model)
    if isinstance(text, tokenizer.CharTokenizer):
        numbered = dict(enumerate(text.characters))
        meta = {"vocab_size": text.vocab_size, "itos": numbered, "stoi": {c: i for i, c in numbered.items()}}
        disk.write_file(directory / "meta.pkl", pickle.dumps(meta, protocol=2))


def write_gguf(path: Path, model: Checkpoint, name: str, done: Callable[[int], None]) -> None:
    text = tokenizer_of(model)
    if text is None:
        raise ValueError("gguf: the source has no tokenizer, and llama.cpp needs one: say --meta for nanoGPT's")
    gguf_file.write(path, model.config, reporting(model.tensors, done), text, name)
