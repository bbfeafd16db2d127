"""The memory that training takes, predicted from the model's shape and the settings: nothing is computed or allocated.

The numbers of arrays were found by reading the kernels' code and by measuring MLX; tests compare them with both.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from ..cpu import extension
from ..model.attention import QUERIES
from ..model.cross_entropy import chunk_rows
from ..model.gpt import GPT


def weights_and_averages(model: GPT) -> int:
    """Bytes of the float32 weights and, for those that are trained, of AdamW's two averages."""
    return 4 * (model.n_params() + 2 * _n_trained(model))


def parameter_memory(model: GPT) -> int:
    """The same with the gradients: the least that training can do with."""
    return weights_and_averages(model) + 4 * _n_trained(model)


def copied_for_checkpoint(model: GPT) -> int:
    """Bytes that a checkpoint adds at most while it is written: the weights and averages as they were when it began,
    where training changes all of them before the disk has them."""
    return 4 * 3 * _n_trained(model)


def _n_trained(model: GPT) -> int:
    return sum(w.size for w in model.trainable_weights().values())


def _n_blocks_passed(model: GPT) -> int:
    """How many blocks the gradient passes on its way back: those from the first trained parameter on. The others keep
    nothing for it."""
    names = model.trainable_weights()
    if any(name.startswith(("wte", "wpe")) for name in names):
        return model.config.n_layer
    return model.config.n_layer - min((int(n.split(".")[1]) for n in names if n.startswith("h.")), default=len(model.h))


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes that a step of training holds at most, beside weights, gradients and AdamW's averages."""

    activations: int  # kept for the backward pass, and its working memory
    logits: int  # of some rows at a time
    scores: int  # of attention, of some queries at a time
    total: int  # with all else that exists at the same time


def memory_on_kernels(model: GPT, batch_size: int, grad_checkpoint: bool) -> TrainingMemory:
    """Memory on the CPU's kernels, in float32, with the extension there: the arrays that cpu/operations.py makes.

    They are kept by size from step to step, so that for each size the largest number at one time counts.
    """
    config = model.config
    B, T, V, L, dropout = batch_size, config.block_size, config.vocab_size, _n_blocks_passed(model), config.dropout > 0
    if grad_checkpoint:
        wide, qkv, narrow = 3, 2, L + 8 + 4 * dropout  # arrays (B, T, 4C), (B, T, 3C) and (B, T, C)
    else:
        wide, qkv, narrow = L + 2, L + 1, 3 * L + 5 + (2 * L + 1) * dropout
    activations = (4 * wide + 3 * qkv + narrow) * 4 * B * T * config.n_embd
    logits = 4 * V * extension.core.cross_entropy_rows(B * T, V)  # of some rows at a time
    return TrainingMemory(activations, logits, 0, parameter_memory(model) + activations + logits)


def memory_on_mlx(
    model: GPT, batch_size: int, grad_checkpoint: bool, dtype: mx.Dtype, accumulates: bool = False
) -> TrainingMemory:
    """Memory by MLX's operations, not compiled. The numbers of arrays were found by measuring the peak of MLX 0.32.

    accumulates: whether a step has several micro-batches, and holds the sum of their gradients beside the next one's.

    MLX frees arrays that nothing needs any more, so the peak comes in the backward pass of the last layer or of the
    loss, or in the optimizer's step.
    """
    config = model.config
    B, T, V, C, L = batch_size, config.block_size, config.vocab_size, config.n_embd, _n_blocks_passed(model)
    half = dtype != mx.float32
    trained = {name: 4 * w.size for name, w in model.trainable_weights().items()}
    stream = B * T * C * dtype.size  # (B, T, C)
    scores = B * config.n_head * min(T, QUERIES) * T * dtype.size  # of a block of queries, (B, n_head, 128, T)
    logits = 4 * V * chunk_rows(B * T, C, V)  # of a chunk of rows, in float32
    head = trained.get("wte.weight" if config.tied_head else "lm_head.weight", 0)  # its gradient
    weights = weights_and_averages(model) + (model.n_params() * dtype.size if half else 0)
    weights += sum(trained.values()) if accumulates else 0
    # In each pass, what is kept of all blocks and what the one at work takes; MLX on a CPU plans about ten operations
    # ahead, and each one's result has its memory from then on.
    kept = (L + 6 if grad_checkpoint else 10 * L + 5) * stream
    block = _of_block(model, grad_checkpoint) * stream + 2.3 * scores
    loss = (4 if half else 3) * head + (9 if half else 7) * logits
    total = weights + kept + max(loss, head + block)
    # When the gradient comes to the first block, those of the others are there.
    gradients = sum(size for name, size in trained.items() if name.startswith("h.") and not name.startswith("h.0."))
    total = max(total, weights + gradients + head + 4 * stream + block)
    update = parameter_memory(model) + 3 * max(trained.values())
    return TrainingMemory(
        activations=round(kept + block - 2.3 * scores),
        logits=round(loss - (4 if half else 3) * head),
        scores=round(2.3 * scores),
        total=round(max(total, update)),
    )


def _of_block(model: GPT, grad_checkpoint: bool) -> float:
    """Arrays (B, T, C) that one block at work takes by MLX's operations, beside the scores."""
    if _n_blocks_passed(model) == 0:  # it goes forward alone
        return 21
    arrays = 57 if grad_checkpoint else 41
    matrices = [n for n, w in model.trainable_weights().items() if n.startswith("h.") and n.endswith(".weight")]
    return arrays if any(".ln_" not in name for name in matrices) else 0.75 * arrays  # without a gradient of matrices


def step_memory(
    model: GPT, batch_size: int, grad_checkpoint: bool, dtype: mx.Dtype, accumulates: bool = False
) -> TrainingMemory:
    """Memory of a step on the default device: by the CPU's kernels where they train this type, else by MLX."""
    if extension.available(dtype):
        return memory_on_kernels(model, batch_size, grad_checkpoint)
    return memory_on_mlx(model, batch_size, grad_checkpoint, dtype, accumulates)


def evaluation_memory(model: GPT, batch_size: int, dtype: mx.Dtype) -> int:
    """Bytes that an evaluation in the course of training holds at most, on the default device.

    It is less than what a step on as many windows holds, but with several ranks a step takes fewer at a time.
    """
    config = model.config
    B, T, V, C = batch_size, config.block_size, config.vocab_size, config.n_embd
    stream = B * T * C * dtype.size  # (B, T, C)
    if extension.available(dtype):
        return parameter_memory(model) + 16 * stream + 4 * V * extension.core.cross_entropy_rows(B * T, V)
    cast = 0 if dtype == mx.float32 else model.n_params() * dtype.size
    scores = B * config.n_head * min(T, QUERIES) * T * dtype.size
    return weights_and_averages(model) + cast + 28 * stream + scores + 3 * 4 * V * chunk_rows(B * T, C, V)
