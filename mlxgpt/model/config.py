"""The shape of a GPT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..common.settings import require, require_at_least


@dataclass(frozen=True)
class GPTConfig:
    """The model's shape. With no arguments: 512 positions, 12 layers, 12 heads of 64, 768 wide."""

    block_size: int = 512
    """longest sequence the model sees, in tokens"""
    vocab_size: int = 50257
    """number of token ids; in training at least the tokenizer's number, which it is when unset"""
    n_layer: int = 12
    """number of transformer blocks"""
    n_head: int = 12
    """attention heads per block; head_dim = n_embd / n_head"""
    n_embd: int = 768
    """width of the residual stream"""
    dropout: float = 0.0
    """probability of dropping an activation in training"""
    bias: bool = True
    """biases in the linear layers and layer norms, as GPT-2 has them"""
    activation: Literal["gelu_new", "gelu"] = "gelu_new"
    """gelu_new: GPT-2's tanh form; gelu: the exact form that nanoGPT trains with"""
    layer_norm_epsilon: float = 1e-5
    """added to the variance inside layer norm"""
    tied_head: bool = True
    """the head is the token embedding; False gives it a weight of its own"""

    def __post_init__(self) -> None:
        require_at_least(1, self, "block_size", "vocab_size", "n_layer", "n_head", "n_embd")
        require(self.n_embd % self.n_head == 0, "n_embd", self.n_embd, f"a multiple of n_head = {self.n_head}")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "0 <= dropout < 1")
        require(self.activation in ("gelu_new", "gelu"), "activation", repr(self.activation), "'gelu_new' or 'gelu'")
        require(self.layer_norm_epsilon > 0, "layer_norm_epsilon", self.layer_norm_epsilon, "more than 0")

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head
