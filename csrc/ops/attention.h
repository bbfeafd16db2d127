// Causal attention over a batch: splits heads into tasks for the thread pool.
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

/// An attention call. q, out, dout and dq are (B, n_head, T_q, D), k, v, dk and dv (B, n_head, T_k, D),
/// lse (B, n_head, T_q) float32 without gaps. Sizes are at least 1, T_q <= T_k.
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

/// Writes dq, dk and dv from dout and what the forward pass left. Extra memory: O(T_k * D) a thread.
void attention_backward(const AttentionCall& call);

/// Attention over a cache: q, k, v and out are (B, n_head, T, D), T new positions of each sequence. keys and
/// values are (B, n_head, capacity, D), in any storage; of sequence b's the first offsets[b] are held.
struct CachedAttention {
    int B = 0, n_head = 0, T = 0, D = 0, capacity = 0;
    Tensor4 q, k, v, out, keys, values;
    const int32_t* offsets = nullptr;  // (B,)
    float scale = 1.0F;
};

/// Writes k and v behind the positions that are held, and out, what each new position sees: all that are held
/// and the new ones up to itself. Of few new positions (16 at most) each gets bit for bit what it would get
/// alone. Throws std::invalid_argument if an offset is negative or there is no room behind it.
void attention_cached(const CachedAttention& call);

/// Writes the call's dropout factors, (B, n_head, T_q, T_k) without gaps.
void dropout_mask(const AttentionCall& call, float* mask);

}  // namespace mlxgpt
