// Dropout of activations, and the residual sum that follows it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mlxgpt {

/// out = x * mask + residual, mask being 0 with chance p, else 1 / (1 - p): a function of seed and element.
/// residual may be null. The gradient of x is dropout(dout) with the same seed.
void dropout(ptrdiff_t n, const float* x, const float* residual, float p, uint64_t seed, float* out);

/// y += x, and y *= factor.
void add(ptrdiff_t n, const float* x, float* y);
void scale(ptrdiff_t n, float factor, float* y);

}  // namespace mlxgpt
