"""nanoGPT's files, read and written: ckpt.pt, what its train.py saves, and meta.pkl, its list of characters.

Names are transformer.h.0..., or _orig_mod.transformer... where torch.compile had wrapped the model; linear weights are
(n_out, n_in); the activation is the exact GELU.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..common import disk
from ..common.settings import from_dict
from ..data.tokenizer import BPETokenizer, CharTokenizer
from ..model.config import GPTConfig
from . import gpt2, pickles, torch_file
from .foreign import ForeignModel, checked, parameters
from .tensors import Tensor, reporting

CHECKPOINT, META = "ckpt.pt", "meta.pkl"
_GPT2_VOCABULARY = (50257, 50304)  # its size, and what nanoGPT and llm.c pad it to, a multiple of 64
_SETTINGS = (  # of nanoGPT's config, those that TrainConfig has under the same names
    "learning_rate", "min_lr", "warmup_iters", "lr_decay_iters", "decay_lr", "max_iters", "weight_decay", "beta1",
    "beta2", "grad_clip", "batch_size", "gradient_accumulation_steps", "eval_interval", "eval_iters", "log_interval",
)  # fmt: skip

# ---- reading ----


def is_checkpoint(content: Any) -> bool:
    """Whether the content of a PyTorch file is what nanoGPT's train.py saves."""
    return isinstance(content, dict) and isinstance(content.get("model_args"), dict)


def read(path: Path, content: dict[str, Any], meta: Path | None = None) -> ForeignModel:
    """The model in a ckpt.pt with this content: model, optimizer, model_args, iter_num, best_val_loss, config.

    `meta` is a meta.pkl; if it is None, the one beside the checkpoint is read. ValueError, naming the file, for what
    is not a GPT-2's, or is damaged.
    """
    state = content.get("model")
    if not isinstance(state, dict):
        raise ValueError(f"{path}: model is a {type(state).__name__}, expected a state dict")
    tensors, left_out = parameters({name: t for name, t in state.items() if isinstance(t, Tensor)}, path)
    arguments = content["model_args"]
    names = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias")
    values = {name: arguments[name] for name in names if arguments.get(name) is not None}
    values.setdefault("vocab_size", tensors["wte.weight"].shape[0] if "wte.weight" in tensors else 50304)
    config = from_dict(GPTConfig, {**values, "activation": "gelu"}, source=f"{path}: model_args")
    model = checked(ForeignModel("nanoGPT checkpoint", config, tensors, left_out=left_out), path)
    add_tokenizer(model, path.parent, meta)
    best = content.get("best_val_loss")
    best = float(np.asarray(best.read())) if isinstance(best, Tensor) else best
    best = best if isinstance(best, (int, float)) and math.isfinite(best) else None
    run = {"iter_num": content.get("iter_num"), "best_val_loss": best, "config": content.get("config")}
    model.nanogpt = _json_value(run)
    optimizer = content.get("optimizer")
    if isinstance(optimizer, dict) and optimizer.get("state"):
        # `tensors` are in the order of the state dict, which is that of the module whose parameters were optimized
        _add_optimizer(model, optimizer, _numbered(tensors, gpt2.shapes(model.config)), path)
        settings = run["config"] if isinstance(run["config"], dict) else {}
        model.training["settings"] = {n: settings[n] for n in _SETTINGS if isinstance(settings.get(n), (int, float))}
        model.training["best_val_loss"] = best
    return model


def _add_optimizer(model: ForeignModel, optimizer: dict[str, Any], names: list[str], path: Path) -> None:
    """Adds AdamW's averages to a model, by the names of the parameters that PyTorch numbers, and its settings."""
    steps = set()
    try:
        for number, state in optimizer["state"].items():
            name, step = names[number], state["step"]
            steps.add(int(np.asarray(step.read())) if isinstance(step, Tensor) else int(step))
            for average, key in (("m", "exp_avg"), ("v", "exp_avg_sq")):
                if state[key].shape != model.tensors[name].shape:
                    raise ValueError(f"{key} of {name} is {state[key].shape}")
                model.averages[f"{average}.{name}"] = state[key]
        if len(model.averages) != 2 * len(names) or len(steps) != 1:
            raise ValueError(f"{len(model.averages)} averages at steps {sorted(steps)} for {len(names)} parameters")
        group = optimizer["param_groups"][0]
        model.training = {
            "step": steps.pop(), "learning_rate": group["lr"], "beta1": group["betas"][0], "beta2": group["betas"][1],
            "eps": group["eps"], "weight_decay": group["weight_decay"],
        }  # fmt: skip
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: the optimizer's state is not that of nanoGPT's AdamW: {error}") from None


def _numbered(names: Iterable[str], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Parameters in the order in which nanoGPT's configure_optimizers numbers them: those with two dimensions, which
    are decayed, before the others, and both in the model's order."""
    known = [name for name in names if name in shapes]
    return sorted(known, key=lambda name: len(shapes[name]) < 2)


def _json_value(value: Any) -> Any:
    """A value as JSON can hold it: what it can't hold becomes a string."""
    if isinstance(value, dict):
        return {str(k): _json_value(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(v) for v in value]
    is_plain = isinstance(value, (str, int, float, type(None)))
    return value if is_plain and not (isinstance(value, float) and not math.isfinite(value)) else str(value)


def add_tokenizer(model: ForeignModel, directory: Path, meta: Path | None = None) -> None:
    """Gives a model the tokenizer that nanoGPT would take, if there is one: the characters in meta.pkl, which may lie
    in the model's directory, or GPT-2's byte pairs for a vocabulary of their size."""
    if meta is None and (directory / META).is_file():
        meta = directory / META
    if meta is not None:
        model.tokenizer = read_meta(meta, model.config.vocab_size)
    elif model.config.vocab_size in _GPT2_VOCABULARY:
        model.tokenizer = BPETokenizer.gpt2()
    if model.tokenizer is not None:
        model.tokenizer_files = model.tokenizer.files()


def read_meta(meta: Path, vocab_size: int) -> CharTokenizer:
    """The characters that nanoGPT's prepare.py numbers: {"itos": {0: "\\n", ...}, ...}, read as data. ValueError."""
    content = pickles.read(disk.read_small(meta), str(meta))
    itos = content.get("itos") if isinstance(content, dict) else None
    if not isinstance(itos, dict) or sorted(itos) != list(range(len(itos))) or not itos:
        raise ValueError(f"{meta}: not nanoGPT's meta.pkl: itos must number the characters from 0 on")
    characters = [itos[i] for i in range(len(itos))]
    if any(not isinstance(c, str) or len(c) != 1 for c in characters) or len(set(characters)) < len(characters):
        raise ValueError(f"{meta}: itos must hold characters, each once")
    if len(characters) > vocab_size:
        raise ValueError(f"{meta}: {len(characters)} characters, the model's vocab_size is {vocab_size}")
    return CharTokenizer(characters)


# ---- writing ----


def write(directory: Path, model: ForeignModel, done: Callable[[int], None] = lambda n: None) -> None:
    """Writes nanoGPT's out_dir: ckpt.pt, and meta.pkl with the characters, which its sample.py looks for in data/.

    `done` is called with the number of bytes of each tensor that is read.
    """
    directory.mkdir()
    torch_file.write(directory / CHECKPOINT, reporting(checkpoint_of(model), done))
    tokenizer = model.read_tokenizer_or_note()
    if isinstance(tokenizer, CharTokenizer):
        numbered = dict(enumerate(tokenizer.characters))
        meta = {"vocab_size": tokenizer.vocab_size, "itos": numbered, "stoi": {c: i for i, c in numbered.items()}}
        (directory / META).write_bytes(pickle.dumps(meta, protocol=2))


def checkpoint_of(model: ForeignModel) -> dict[str, Any]:
    """What nanoGPT's train.py would save, for torch_file.write: its --init_from=resume and sample.py load it."""
    config, training, shapes = model.config, model.training, gpt2.shapes(model.config)
    tensors = {f"transformer.{name}": model.tensors[name] for name in shapes if name != "lm_head.weight"}
    tensors["lm_head.weight"] = model.tensors.get("lm_head.weight", model.tensors["wte.weight"])
    names = _numbered(shapes, shapes)
    n_matrices = sum(len(shapes[name]) >= 2 for name in names)
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
