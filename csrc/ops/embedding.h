// Token and position embeddings.
#pragma once

#include <cstdint>

#include "kernels/table.h"

namespace mlxgpt {

/// The rows of B sequences of T tokens. Arrays have no gaps.
struct EmbeddingForward {
    int B = 0, T = 0, C = 0;
    const int32_t* ids = nullptr;      // (B, T)
    Weights tokens;                    // (V, C)
    const float* positions = nullptr;  // (n_positions, C); may be null
    const int32_t* offsets = nullptr;  // (B,), each sequence's first position; null for zeros
    float* out = nullptr;              // (B, T, C)
};

/// out[b][t] = tokens[ids[b][t]] + positions[offsets[b] + t].
void embedding_forward(const EmbeddingForward& call);

/// dtokens[ids[b][t]] += dout[b][t] and dpositions[t] += dout[b][t], in order of b and t. dtokens (V, C) and
/// dpositions (T, C) may be null.
void embedding_backward(int B, int T, int C, const int32_t* ids, const float* dout, float* dtokens,
                        float* dpositions);

}  // namespace mlxgpt
