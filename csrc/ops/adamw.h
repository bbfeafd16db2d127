// AdamW with clipping by the global norm, over all parameters of a model at once.
#pragma once

#include <cstddef>
#include <vector>

namespace mlxgpt {

/// A parameter, its gradient and its two averages, of n elements without gaps.
struct AdamWTensor {
    float* parameter;
    const float* gradient;
    float *m, *v;
    ptrdiff_t n;
    bool decayed;
};

struct AdamWOptions {
    double learning_rate, beta1, beta2, eps, weight_decay;
    long step;        // 1 for the first
    double max_norm;  // 0 for no clipping
};

/// One step in place; the norm of all gradients together. A norm that is not finite, as with a single element
/// that is not, leaves everything as it was.
double adamw(const std::vector<AdamWTensor>& tensors, const AdamWOptions& options);

}  // namespace mlxgpt
