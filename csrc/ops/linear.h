// Linear layers: out = x W^T + b, forward and backward.
#pragma once

#include "kernels/table.h"

namespace mlxgpt {

/// Up to this many rows, linear_forward reads the weights as they are stored and calls no BLAS. On two Zen 3
/// cores that is faster up to 24 rows with float32 weights, up to 32 or more with others; a BLAS that uses
/// matrix units is faster from fewer rows on.
constexpr int kFewRows = 16;

struct LinearForward {
    int rows = 0, n_in = 0, n_out = 0;
    Rows x;                       // (rows, n_in)
    Weights weight;               // (n_out, n_in)
    float scale = 1.0F;           // of the product alone
    const float* bias = nullptr;  // (n_out,); may be null
    Rows residual;                // (rows, n_out), added to out; may be null
    Rows out;                     // (rows, n_out)
    Rows activated;  // (rows, n_out), activation(out); may be null, and is if there is a residual
    const Activation* activation = nullptr;  // given with `activated`
};

/// Writes out = scale x W^T + bias + residual, and activated = activation(out) if wanted. If there are at
/// most kFewRows rows, each gets the bits that it would get alone.
void linear_forward(const LinearForward& call);

/// Gradients that are null are not computed.
///
/// With `pre`, x is activation(pre): dx becomes the gradient of pre. `activated` then gets activation(pre)
/// once more, so that nobody has to keep it from the forward pass.
struct LinearBackward {
    int rows = 0, n_in = 0, n_out = 0;
    Rows dout;                               // (rows, n_out)
    Rows x;                                  // (rows, n_in); may be null without dweight
    Rows weight;                             // (n_out, n_in)
    Rows dx;                                 // (rows, n_in)
    Rows dweight;                            // (n_out, n_in)
    float* dbias = nullptr;                  // (n_out,)
    bool accumulate = false;                 // add to dweight and dbias
    Rows pre, activated;                     // (rows, n_in); may be null
    const Activation* activation = nullptr;  // given with `pre`
};

/// Writes dx = dout W, dweight = dout^T x, and dbias = the sum of dout's rows.
void linear_backward(const LinearBackward& call);

}  // namespace mlxgpt
