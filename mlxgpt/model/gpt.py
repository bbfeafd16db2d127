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
from .cache import KVCache
from .config import GPTConfig


class Weight(nn.Module):
    """A module with a matrix: an array, or what is left of one by quantization (weight, scales, biases, group_size)."""

    @property
    def matrix(self) -> ops.Matrix:
        if "scales" in self:
            return ops.Quantized(self.weight, self.scales, self.biases, self.group_size)
        return self.weight


class Linear(Weight):
    """x W^T + b. (..., n_in) -> (..., n_out)."""

    def __init__(self, n_in: int, n_out: int, bias: bool, std: float = 0.02) -> None:
        super().__init__()
        self.weight = mx.random.normal((n_out, n_in), scale=std)
        if bias:
            self.bias = mx.zeros((n_out,))

    def __call__(self, x: mx.array, residual: mx.array | None = None, dropout_p: float = 0.0) -> mx.array:
        """With dropout of what it returns, and the residual stream added to that."""
        matrix, bias = self.matrix, self.get("bias")
        if not self.adapted:
            return ops.linear(x, matrix, bias, residual, dropout_p)
        low = ops.scaled_linear(x, self.lora_A, self.lora_scale)  # (..., rank)
        added = residual if dropout_p == 0 else None
        y = ops.linear(low, self.lora_B, None, ops.linear(x, matrix, bias, added))  # (..., n_out)
        return y if dropout_p == 0 else ops.dropout(y, dropout_p, residual)

    @property
    def adapted(self) -> bool:
        """Whether a correction of low rank is added to the matrix (lora.py): W + scale B A."""
        return "lora_A" in self


class Embedding(Weight):
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


class CausalSelfAttention(nn.Module):
    """Each position gathers from itself and the positions before it, by n_head independent rules.

    x, residual (B, T, C) -> residual + what was gathered from x, (B, T, C).
    """

    def __init__(self, config: GPTConfig, residual_std: float) -> None:
        super().__init__()
        C = config.n_embd
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = Linear(C, 3 * C, config.bias)  # queries, keys and values of all heads at once
        self.c_proj = Linear(C, C, config.bias, residual_std)

    def __call__(self, x: mx.array, residual: mx.array, layer: int, cache: KVCache | None = None) -> mx.array:
        q, k, v = ops.split_heads(self.c_attn(x), self.n_head)  # (B, T, 3C) -> 3 x (B, n_head, T, head_dim)
        p = self.dropout if self.training else 0.0
        if cache is None:
            y = ops.attention(q, k, v, p)  # (B, n_head, T, head_dim), by way of (B, n_head, T, T) scores
        else:
            y = ops.cached_attention(q, k, v, cache, layer)  # the same, of positions that follow others
        return self.c_proj(ops.merge_heads(y), residual, p)  # heads side by side: (B, T, C)


class MLP(nn.Module):
    """Each position by itself, through a layer four times as wide: x, residual (B, T, C) ->
    residual + c_proj(gelu(c_fc(x))), (B, T, C) by way of (B, T, 4C)."""

    def __init__(self, config: GPTConfig, residual_std: float) -> None:
        super().__init__()
        C = config.n_embd
        self.exact_gelu, self.dropout = config.activation == "gelu", config.dropout
        self.c_fc = Linear(C, 4 * C, config.bias)
        self.c_proj = Linear(4 * C, C, config.bias, residual_std)

    def __call__(self, x: mx.array, residual: mx.array) -> mx.array:
        p = self.dropout if self.training else 0.0
        return ops.mlp(x, self.c_fc, self.c_proj, self.exact_gelu, residual, p)


class Block(nn.Module):
    """One layer: what attention and the MLP find is added to the residual stream x. (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig, residual_std: float) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config)
        self.attn = CausalSelfAttention(config, residual_std)
        self.ln_2 = LayerNorm(config)
        self.mlp = MLP(config, residual_std)

    def __call__(self, x: mx.array, layer: int, cache: KVCache | None = None) -> mx.array:
        x = self.attn(self.ln_1(x), x, layer, cache)  # x + attn(ln_1(x))
        return self.mlp(self.ln_2(x), x)  # x + mlp(ln_2(x))


class GPT(nn.Module):
    """The language model. Its weights are drawn from mx.random as GPT-2's were: normal with a standard
    deviation of 0.02, or 0.02 / sqrt(2 n_layer) for the 2 n_layer projections that add to the residual
    stream, so that its variance does not grow with depth; biases 0."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.grad_checkpoint = False  # in training, keep only each block's input and compute the rest again
        self.lora: Any = None  # what its adapters are, if lora.add gave it some
        residual_std = 0.02 / math.sqrt(2 * config.n_layer)
        self.wte = Embedding(config.vocab_size, config.n_embd)
        self.wpe = Embedding(config.block_size, config.n_embd)
        self.h = [Block(config, residual_std) for _ in range(config.n_layer)]
        self.ln_f = LayerNorm(config)
        if not config.tied_head:
            self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)

    @property
    def head(self) -> ops.Matrix:
        """What makes the logits, (V, C): the token embedding's weight, or one of its own."""
        return (self.wte if self.config.tied_head else self.lm_head).matrix

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

    def hidden(self, ids: mx.array, cache: KVCache | None = None) -> mx.array:
        """What the head reads: the residual stream after the last layer norm. ids (B, T) -> (B, T, C)."""
        T, offsets = ids.shape[1], None
        if cache is not None:
            cache.reserve(*ids.shape)
            offsets = cache.offsets
        elif T > self.config.block_size:
            raise ValueError(f"GPT: {T} positions, at most block_size = {self.config.block_size}")
        x = ops.embeddings(ids, self.wte.matrix, self.wpe.matrix, offsets)  # (B, T, C)
        x = ops.dropout(x, self.config.dropout if self.training else 0.0)
        for layer, block in enumerate(self.h):
            again = self.grad_checkpoint and self.training and cache is None
            x = ops.checkpointed(block, x, layer) if again else block(x, layer, cache)
        if cache is not None:
            cache.advance(T)
        return self.ln_f(x)

    @ops.entry
    def loss(self, ids: mx.array, targets: mx.array) -> mx.array:
        """Mean cross entropy in nats. ids, targets (B, T) int32; a target of -1 is not counted -> scalar."""
        return ops.linear_cross_entropy(self.hidden(ids), self.head, targets)

    def named_weights(self) -> dict[str, mx.array]:
        """Every parameter by its name, as "h.0.attn.c_attn.weight". A tied head is wte and not there again."""
        return dict(tree_flatten(self.parameters()))  # type: ignore[arg-type]

    def trainable_weights(self) -> dict[str, mx.array]:
        """Those of named_weights() that are not frozen, in the same order."""
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
