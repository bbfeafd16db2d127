// Mean cross entropy, of logits or of the linear layer that makes them.
#pragma once

#include <cstdint>

#include "kernels/table.h"

namespace mlxgpt {

/// logits = x W^T with x (N, C) and weight (V, C); the targets (N,) are in [0, V), or -1 to be ignored.
struct LinearCrossEntropy {
    int N = 0, C = 0, V = 0;
    Rows x;
    Weights weight;  // float32, if there are gradients
    const int32_t* targets = nullptr;
    Rows dx, dweight;         // null where they are not wanted
    bool accumulate = false;  // add to dweight
    float scale = 1.0F;       // of the gradients
};

/// The mean over counted targets of -log softmax(logits)[target], 0 if none is counted; writes the mean's
/// gradients. The logits exist for some rows at a time only.
double linear_cross_entropy(const LinearCrossEntropy& call);

/// The same for logits (N, V); writes dlogits, which may be the logits themselves, or be null.
double cross_entropy(int N, int V, Rows logits, const int32_t* targets, Rows dlogits);

}  // namespace mlxgpt
