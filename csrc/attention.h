// Causal attention over a batch: splits heads into tasks for the thread pool.
#pragma once

#include <cstdint>

#include "kernels/table.h"

namespace mlxgpt {

/// (B, n_head, T, D) float32 with strides in elements; the last axis is contiguous.
struct Tensor4 {
    float* data = nullptr;
    ptrdiff_t batch_stride = 0, head_stride = 0, row_stride = 0;
};

/// An attention call. q, out, dout and dq are (B, n_head, T_q, D), k, v, dk and dv (B, n_head, T_k, D),
/// lse (B, n_head, T_q) without gaps. Sizes are at least 1, T_q <= T_k.
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

/// Writes the call's dropout factors, (B, n_head, T_q, T_k) without gaps.
void dropout_mask(const AttentionCall& call, float* mask);

}  // namespace mlxgpt
