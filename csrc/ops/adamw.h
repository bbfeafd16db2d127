// AdamW (Loshchilov & Hutter 2019) with clipping by the global norm, over all parameters of a model at once.
#pragma once

#include <cstddef>
#include <vector>

namespace mlxgpt {

/// A parameter, its gradient, and the running averages of the gradient and of its square: n elements each,
/// without gaps.
struct AdamWTensor {
    float* parameter;
    const float* gradient;
    float *m, *v;
    ptrdiff_t n;
    bool decayed;  // whether weight decay applies
};

struct AdamWOptions {
    double learning_rate, beta1, beta2, eps, weight_decay;
    long step;        // 1 for the first
    double max_norm;  // 0 for no clipping
};

/// Takes one step in place and returns the norm of all gradients together. If the norm is not finite, as it
/// is not once a single gradient is not, nothing is changed.
double adamw(const std::vector<AdamWTensor>& tensors, const AdamWOptions& options);

}  // namespace mlxgpt
