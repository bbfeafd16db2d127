// What a set of kernels offers: plain functions over pointers, sizes and strides, one table for each
// instruction set. Nothing here knows Python, threads or MLX.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace mlxgpt {

/// Rows of contiguous elements: row i begins at data + i * stride.
struct Rows {
    float* data = nullptr;
    ptrdiff_t stride = 0;
};

/// One head of one attention call. q, out, dout, dq have T_q rows and k, v, dk, dv have T_k, all of
/// D elements; lse and delta have T_q. Query i sees keys 0 .. i + T_k - T_q if causal, else all.
struct AttentionHead {
    Rows q, k, v, out;
    float* lse = nullptr;
    Rows dout, dq, dk, dv;  // backward only
    int T_q = 0, T_k = 0, D = 0;
    float scale = 1.0F;
    bool causal = true;
    float dropout = 0.0F;  // chance that a probability is dropped, 0 for none
    uint64_t seed = 0;     // the mask is a function of (seed, batch, head, query, key)
    uint32_t batch = 0, head = 0;
};

/// The kernels of one instruction set.
struct Kernels {
    const char* name;

    /// Queries per block: a head has ceil(T_q / query_block) of them.
    int query_block;

    /// Floats of scratch, on a 64-byte boundary, that the two calls below need.
    size_t (*forward_scratch)(int T_k, int D);
    size_t (*backward_scratch)(int T_k, int D);

    /// Floats that the dk and dv sums of one head take.
    size_t (*kv_sums)(int T_k, int D);

    /// Writes out and lse for query blocks first, first + step, first + 2 * step, ...
    void (*attention_forward)(const AttentionHead& head, int first, int step, float* scratch);

    /// Writes dq for those query blocks, and what they add to dk and dv into `sums`.
    void (*attention_backward)(const AttentionHead& head, int first, int step, float* scratch, float* sums);

    /// Adds n_parts arrays of sums that lie behind one another, in order, into dk and dv.
    void (*attention_write_kv)(const AttentionHead& head, const float* sums, int n_parts);

    /// Writes one head's dropout factors, 0 or 1 / (1 - dropout), as T_q rows of T_k.
    void (*dropout_mask)(const AttentionHead& head, float* mask);
};

extern const Kernels kernels_scalar;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_neon;

}  // namespace mlxgpt
