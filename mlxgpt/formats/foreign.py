"""A model as another program left it, before any of its tensors is read, and changes to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..common import disk
from ..data import tokenizer
from ..data.tokenizer import Tokenizer
from ..model.config import GPTConfig
from . import gpt2
from .tensors import FLOATS, Tensor, cast, first_rows, zeros

TOKENIZER_FILES = (
    "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json",
)  # fmt: skip


@dataclass
class ForeignModel:
    """A model as some program left it."""

    source: str  # what wrote it, for a person
    config: GPTConfig
    tensors: dict[str, Tensor]  # by GPT-2's names, linear weights (n_out, n_in), in the order of gpt2.shapes
    tokenizer_files: dict[str, bytes] = field(default_factory=dict)
    tokenizer: Tokenizer | None = None  # as the reader made it; else read_tokenizer makes it from the files
    left_out: dict[str, str] = field(default_factory=dict)  # tensors that are not taken along, and why
    notes: list[str] = field(default_factory=list)  # what a person should know
    averages: dict[str, Tensor] = field(default_factory=dict)  # AdamW's: m.<name>, v.<name>
    training: dict[str, Any] = field(default_factory=dict)  # beside the averages: the arguments of training_json
    nanogpt: dict[str, Any] = field(default_factory=dict)  # nanoGPT's iter_num, best_val_loss and config, to go back

    @property
    def dtype(self) -> str:
        """The widest type of its tensors."""
        return max((t.dtype for t in self.tensors.values()), key=("bfloat16", "float16", "float32").index)

    def with_dtype(self, dtype: str) -> ForeignModel:
        """The model in another floating-point type. The optimizer's averages stay float32."""
        return replace(self, tensors={name: cast(name, t, dtype) for name, t in self.tensors.items()})

    def cropped(self, block_size: int) -> ForeignModel:
        """The model with the first block_size positions. ValueError for more than it has."""
        if not 1 <= block_size <= self.config.block_size:
            raise ValueError(f"block_size is {block_size}, expected 1 to the source's {self.config.block_size}")

        def crop(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {n: first_rows(t, block_size) if n.endswith("wpe.weight") else t for n, t in tensors.items()}

        left_out = dict(self.left_out)
        if block_size < self.config.block_size:
            rows = f"wpe.weight, rows {block_size} to {self.config.block_size}"
            left_out[rows] = "positions cropped by --block_size"
        return replace(
            self, config=replace(self.config, block_size=block_size), left_out=left_out,
            tensors=crop(self.tensors), averages=crop(self.averages),
        )  # fmt: skip

    def with_zero_biases(self) -> dict[str, Tensor]:
        """The tensors; in a model without biases with zeros for them, for programs that expect some."""
        biases = gpt2.missing_biases(self.tensors, self.config)
        beside = {bias: self.tensors[weight] for bias, weight in biases.items()}
        return self.tensors | {bias: zeros(weight.dtype, weight.shape[:1]) for bias, weight in beside.items()}

    def read_tokenizer(self) -> Tokenizer | None:
        """The tokenizer; None if no files of one came along. ValueError for a kind that this package doesn't read."""
        if self.tokenizer is None and self.tokenizer_files:
            self.tokenizer = tokenizer.from_files(self.tokenizer_files, self.source)
        return self.tokenizer

    def read_tokenizer_or_note(self) -> Tokenizer | None:
        """The tokenizer; None, with a note, for a kind that this package doesn't read: weights can do without."""
        try:
            return self.read_tokenizer()
        except ValueError as error:
            self.notes.append(str(error))
            return None


def parameters(found: Mapping[str, Tensor], path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The parameters among a file's tensors by GPT-2's names, without a head that is the embedding; and the tensors
    that are left out, each with the reason. ValueError for a parameter that is there twice."""
    tensors, left_out = gpt2.parameters_by_name(found, path)
    if gpt2.is_head_tied(tensors):
        del tensors["lm_head.weight"]
        left_out["lm_head.weight"] = "the head is tied to wte.weight"
    return tensors, left_out


def checked(model: ForeignModel, path: Path) -> ForeignModel:
    """The model, with its tensors in GPT-2's order, and with a head of its own if there is one.

    ValueError, naming the path, lists tensors that are not those of its config.
    """
    if "lm_head.weight" in model.tensors:
        model.config = replace(model.config, tied_head=False)
    gpt2.check_model(model.tensors, model.config, path, FLOATS)
    model.tensors = {name: model.tensors[name] for name in gpt2.shapes(model.config)}
    return model


def read_tokenizer_files(directory: Path) -> dict[str, bytes]:
    """The files of a tokenizer in a directory, of whatever kind it is. ValueError for one that is too large."""
    return {name: disk.read_small(directory / name) for name in TOKENIZER_FILES if (directory / name).is_file()}
