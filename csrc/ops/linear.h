// Linear layers: y = x W^T + b, forward and backward, over a BLAS.
#pragma once

#include "kernels/table.h"

namespace mlxgpt {

/// Up to so many rows the weights are read as they lie, and no BLAS is called. On two Zen 3 cores that is the
/// faster up to 24 rows of float32 and 32 or more of the others; a BLAS with matrix units overtakes earlier.
constexpr int kFewRows = 16;

/// A linear layer's call: x is (rows, n_in), weight (n_out, n_in), out and dout (rows, n_out).
struct LinearForward {
    int rows = 0, n_in = 0, n_out = 0;
    Rows x;
    Weights weight;
    float scale = 1.0F;           // of the product, before what is added to it
    const float* bias = nullptr;  // (n_out,)
    Rows out;
    Rows residual;   // (rows, n_out), added to out
    Rows activated;  // (rows, n_out): gelu(out)
    Gelu gelu = Gelu::kTanh;
};

/// Null outputs are not computed, and x may be null without dweight. The layer's x may itself be gelu(pre):
/// then dx becomes the gradient of pre, and `activated` gets gelu(pre) again, so that the forward pass need
/// not keep it.
struct LinearBackward {
    int rows = 0, n_in = 0, n_out = 0;
    Rows dout, x, weight;
    Rows dx, dweight;
    float* dbias = nullptr;
    bool accumulate = false;  // add to dweight and dbias
    Rows pre, activated;      // (rows, n_in)
    Gelu gelu = Gelu::kTanh;
};

/// Writes out = scale x W^T + bias + residual, and activated = gelu(out) where it is asked for (without
/// residual). Up to kFewRows rows each come out as they would alone, to the bit.
void linear_forward(const LinearForward& call);

/// Writes dx = dout W, dweight = dout^T x and dbias, the sum of dout's rows.
void linear_backward(const LinearBackward& call);

/// dx *= gelu'(pre) in place; activated = gelu(pre) where it is not null.
void gelu_backward(int rows, int n, Rows pre, Gelu gelu, Rows dx, Rows activated);

/// activated = gelu(pre).
void gelu_forward(int rows, int n, Rows pre, Gelu gelu, Rows activated);

}  // namespace mlxgpt
