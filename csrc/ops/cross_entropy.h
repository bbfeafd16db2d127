// The mean cross entropy of a linear layer's logits, with the layer inside: the logits of all rows never
// exist at the same time.
#pragma once

#include <cstdint>

#include "kernels/table.h"

namespace mlxgpt {

/// The loss of logits = x W^T. Gradients that are null are not computed.
struct LinearCrossEntropy {
    int N = 0, C = 0, V = 0;
    Rows x;                            // (N, C)
    Weights weight;                    // (V, C); float32 if there are gradients
    const int32_t* targets = nullptr;  // (N,), each in [0, V), or -1 for a row that does not count
    Rows dx;                           // (N, C)
    Rows dweight;                      // (V, C)
    bool accumulate = false;           // add to dweight
    float scale = 1.0F;                // of the gradients
};

/// Returns the mean of -log softmax(logits)[target] over the rows that count, 0 if none does. Writes scale
/// times the gradients of this mean.
double linear_cross_entropy(const LinearCrossEntropy& call);

/// The number of rows, of n_rows, whose logits exist at the same time.
int cross_entropy_rows(int n_rows, int vocab_size);

}  // namespace mlxgpt
