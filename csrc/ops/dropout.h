// Dropout of activations, and the residual sum that follows it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mlxgpt {

/// out = x * mask + residual over n elements; residual may be null. An element of the mask is 0 with chance
/// p, else 1 / (1 - p), and depends on the seed and its position alone. The gradient of x is dropout(dout)
/// with the same seed and no residual.
void dropout(ptrdiff_t n, const float* x, const float* residual, float p, uint64_t seed, float* out);

}  // namespace mlxgpt
