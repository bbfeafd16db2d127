// Token and position embeddings.
#pragma once

#include <cstdint>

namespace mlxgpt {

/// out[b][t] = tokens[ids[b][t]] + positions[offsets[b] + t], rows of C elements without gaps. positions may
/// be null, and offsets, which are then 0.
void embedding_forward(int B, int T, int C, const int32_t* ids, const float* tokens, const float* positions,
                       const int32_t* offsets, float* out);

/// dtokens[ids[b][t]] += dout[b][t] and dpositions[t] += dout[b][t], in order of b and t. Each may be null.
void embedding_backward(int B, int T, int C, const int32_t* ids, const float* dout, float* dtokens,
                        float* dpositions);

}  // namespace mlxgpt
