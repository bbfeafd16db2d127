"""GPT-2 in MLX, defined once.

    tokens -> token + position embeddings -> n_layer blocks -> layer norm -> logits

Shapes are written beside every step: B sequences of T tokens, C = n_embd channels,
n_head heads of head_dim = C / n_head channels, V = vocab_size.
Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..common.settings import nearest
from . import ops
from .cache import KVCache, LayerCache
from .config import GPTConfig
from .recompute import recomputed


class MatrixModule(nn.Module):
    """A module with one matrix, stored as an array or quantized."""

    @property
    def matrix(self) -> ops.Matrix:
        if "scales" in self:
            return ops.Quantized(self.weight, self.scales, self.biases, self.group_size)
        return self.weight

    @property
    def is_frozen(self) -> bool:
        return "weight" not in self.trainable_parameters()


class Linear(MatrixModule):
    """x W^T + b. (..., n_in) -> (..., n_out)."""

    def __init__(self, n_in: int, n_out: int, bias: bool, std: float = 0.02) -> None:
        super().__init__()
        self.weight = mx.random.normal((n_out, n_in), scale=std)
        if bias:
            self.bias = mx.zeros((n_out,))

    def __call__(self, x: mx.array) -> mx.array:
        y = ops.linear(x, self.matrix, self.get("bias"))  # (..., n_out)
        if "lora_A" in self:  # an adapter corrects the weight to W + lora_scale B A (lora.py)
            y = y + ops.low_rank(x, self.lora_A, self.lora_B, self.lora_scale)  # (..., n_out)
        return y


class Embedding(MatrixModule):
    """A learned row of n_embd numbers for each of n_ids ids."""

    def __init__(self, n_ids: int, n_embd: int) -> None:
        super().__init__()
        self.weight = mx.random.normal((n_ids, n_embd), scale=0.02)


class LayerNorm(nn.Module):
    """Normalises each position to mean 0 and variance 1, then scales and shifts. (..., C) -> (..., C)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.eps = config.layer_norm_epsilon
        self.weight = mx.ones((config.n_embd,))
        if config.bias:
            self.bias = mx.zeros((config.n_embd,))

    def __call__(self, x: mx.array) -> mx.array:
        return ops.layer_norm(x, self.weight, self.get("bias"), self.eps)


class DropoutModule(nn.Module):
    """A module that drops activations with probability dropout_p while it is trained."""

    def __init__(self, dropout_p: float) -> None:
        super().__init__()
        self.dropout_p = dropout_p

    def dropout(self, x: mx.array) -> mx.array:
        return ops.dropout(x, self.dropout_p) if self.training else x


class CausalSelfAttention(DropoutModule):
    """Each position takes a weighted average of itself and earlier positions, separately in each head.
    (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig, residual_std: float) -> None:
        super().__init__(config.dropout)
        C = config.n_embd
        self.n_head = config.n_head
        self.c_attn = Linear(C, 3 * C, config.bias)  # queries, keys and values of all heads at once
        self.c_proj = Linear(C, C, config.bias, residual_std)

    def __call__(self, x: mx.array, cache: LayerCache | None = None) -> mx.array:
        q, k, v = ops.split_heads(self.c_attn(x), self.n_head)  # (B, T, 3C) -> 3 x (B, n_head, T, head_dim)
        if cache is None:  # softmax(q k^T / sqrt(head_dim)) v, with scores (B, n_head, T, T)
            y = ops.attention(q, k, v, dropout_p=self.dropout_p if self.training else 0.0)
        else:  # the same for positions that follow those in the cache
            y = ops.cached_attention(q, k, v, cache)
        y = ops.merge_heads(y)  # (B, n_head, T, head_dim) -> (B, T, C)
        return self.dropout(self.c_proj(y))


class MLP(DropoutModule):
    """Two linear layers with a GELU between them, at each position by itself. (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig, residual_std: float) -> None:
        super().__init__(config.dropout)
        C = config.n_embd
        self.c_fc = Linear(C, 4 * C, config.bias)
        self.gelu = ops.GELU[config.activation]
        self.c_proj = Linear(4 * C, C, config.bias, residual_std)

    def __call__(self, x: mx.array) -> mx.array:
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))  # (B, T, C) -> (B, T, 4C) -> (B, T, C)


class Block(nn.Module):
    """One layer: attention and the MLP each add to the residual stream x. (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig, residual_std: float) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config)
        self.attn = CausalSelfAttention(config, residual_std)
        self.ln_2 = LayerNorm(config)
        self.mlp = MLP(config, residual_std)

    def __call__(self, x: mx.array, cache: LayerCache | None = None) -> mx.array:
        x = x + self.attn(self.ln_1(x), cache)
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(DropoutModule):
    """The language model.

    Its weights are drawn from mx.random as GPT-2's were: normal with a standard deviation of 0.02, or
    0.02 / sqrt(2 n_layer) for the 2 n_layer projections that add to the residual stream, so that its variance does
    not grow with depth; biases are 0.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config.dropout)
        self.config = config
        self.grad_checkpoint = False  # in training, keep each block's input alone and recompute the rest
        self.lora: Any = None  # the LoRA of its adapters, if lora.add gave it some
        residual_std = 0.02 / math.sqrt(2 * config.n_layer)
        self.wte = Embedding(config.vocab_size, config.n_embd)
        self.wpe = Embedding(config.block_size, config.n_embd)
        self.h = [Block(config, residual_std) for _ in range(config.n_layer)]
        self.ln_f = LayerNorm(config)
        if not config.tied_head:
            self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)

    @property
    def head(self) -> ops.Matrix:
        """The matrix that makes the logits, (V, C): the token embedding, or a weight of its own."""
        return self._head.matrix

    @property
    def _head(self) -> MatrixModule:
        return self.wte if self.config.tied_head else self.lm_head

    @ops.entry
    def __call__(self, ids: mx.array, cache: KVCache | None = None) -> mx.array:
        """Logits of the token after each position. ids (B, T) int32 -> (B, T, V).

        With a cache the T positions follow those that it holds, and are added to it.
        ValueError for positions past block_size.
        """
        x = self.hidden(ids, cache)  # (B, T, C)
        return ops.linear(x, self.head)  # (B, T, V)

    @ops.entry
    def next_logits(self, ids: mx.array, cache: KVCache) -> mx.array:
        """Logits of the token after the last position alone. ids (B, T) int32 -> (B, V)."""
        x = self.hidden(ids, cache)[:, -1]  # (B, C)
        return ops.linear(x, self.head)  # (B, V)

    @ops.entry
    def loss(self, ids: mx.array, targets: mx.array) -> mx.array:
        """Mean cross entropy in nats. ids, targets (B, T) int32; a target of -1 is not counted -> scalar."""
        return ops.linear_cross_entropy(self.hidden(ids), self.head, targets, self.training, self._head.is_frozen)

    def hidden(self, ids: mx.array, cache: KVCache | None = None) -> mx.array:
        """What the head reads: the residual stream after the last layer norm. ids (B, T) -> (B, T, C)."""
        B, T = ids.shape
        if cache is not None:
            cache.reserve(B, T)
        elif T > self.config.block_size:
            raise ValueError(f"GPT: {T} positions, at most block_size = {self.config.block_size}")
        x = ops.embeddings(ids, self.wte.matrix, self.wpe.matrix, None if cache is None else cache.offsets)
        x = self.dropout(x)  # token and position embeddings summed, (B, T, C)
        for n, block in enumerate(self.h):
            if cache is not None:
                x = block(x, cache.layers[n])
            elif self.training:
                x = recomputed(block, x, keeps_products=not self.grad_checkpoint)
            else:
                x = block(x)
        if cache is not None:
            cache.advance(T)
        return self.ln_f(x)

    def named_weights(self) -> dict[str, mx.array]:
        """Every parameter by its name, as "h.0.attn.c_attn.weight". A tied head is wte and not there again."""
        return dict(tree_flatten(self.parameters()))  # type: ignore[arg-type]

    def trainable_weights(self) -> dict[str, mx.array]:
        """The parameters of named_weights() that are not frozen, in the same order."""
        return dict(tree_flatten(self.trainable_parameters()))  # type: ignore[arg-type]

    def freeze_named(self, beginnings: Iterable[str]) -> None:
        """Freezes the parameters that have these names, or whose names go on from these after a dot: h.1 is the
        second block, and not h.10. ValueError for one that fits none, and where none is left to train."""
        modules, names = dict(self.named_modules()), list(self.named_weights())
        parts = {".".join(name.split(".")[:n]): None for name in names for n in range(1, name.count(".") + 2)}
        for beginning in beginnings:
            if beginning not in parts:
                raise ValueError(f"freeze: no parameter's name begins with '{beginning}'{nearest(beginning, parts)}")
            for name in names:
                if f"{name}.".startswith(f"{beginning}."):
                    module, _, key = name.rpartition(".")
                    modules[module].freeze(recurse=False, keys=key)
        if not self.trainable_weights():
            raise ValueError("freeze: it leaves no parameter to train")

    def n_params(self) -> int:
        """Number of parameters, a tied head's counted once."""
        return sum(p.size for p in self.named_weights().values())
