// Causal attention over a batch: the heads are divided into tasks for the thread pool.
#pragma once

#include <cstdint>

#include "kernels/table.h"

namespace mlxgpt {

/// (B, n_head, T, D) with strides in elements; the last axis is contiguous.
struct Tensor4 {
    void* data = nullptr;
    Storage storage = Storage::kFloat32;
    ptrdiff_t batch_stride = 0, head_stride = 0, row_stride = 0;
};

/// An attention call. q, out, dout and dq are (B, n_head, T_q, D), k, v, dk and dv (B, n_head, T_k, D), lse
/// (B, n_head, T_q) float32 without gaps. Sizes are at least 1, T_q <= T_k.
struct AttentionCall {
    int B = 0, n_head = 0, T_q = 0, T_k = 0, D = 0;
    Tensor4 q, k, v, out;
    float* lse = nullptr;
    Tensor4 dout, dq, dk, dv;  // backward only
    float scale = 1.0F;
    bool causal = true;
    float dropout = 0.0F;
    uint64_t seed = 0;
};

/// Writes out = softmax(scale * q k^T, causal) v and lse, the log of each query's sum of exponentials.
void attention_forward(const AttentionCall& call);

/// Writes dq, dk and dv from dout and the forward pass's inputs and outputs. Extra memory: O(T_k * D) a
/// thread.
void attention_backward(const AttentionCall& call);

/// Attention over a cache. q, k, v and out are (B, n_head, T, D), T new positions of each sequence. The cache
/// is keys and values, (B, n_head, capacity, D) in any storage; sequence b has offsets[b] positions in it.
struct CachedAttention {
    int B = 0, n_head = 0, T = 0, D = 0, capacity = 0;
    Tensor4 q, k, v, out, keys, values;
    const int32_t* offsets = nullptr;  // (B,)
    float scale = 1.0F;
};

/// Appends k and v to the cache, and writes out: each new position sees all earlier ones and itself. If T is
/// at most 16, each position gets the bits that it would get alone. Throws std::invalid_argument if an offset
/// is negative or the cache has no room for T more positions.
void attention_cached(const CachedAttention& call);

/// Writes the dropout factors of a call, 0 or 1 / (1 - dropout): (B, n_head, T_q, T_k) without gaps.
void dropout_mask(const AttentionCall& call, float* mask);

}  // namespace mlxgpt
