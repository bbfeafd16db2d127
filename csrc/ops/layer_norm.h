// Layer normalisation of rows on the thread pool.
#pragma once

namespace mlxgpt {

/// out, x: (rows, n) without gaps; bias may be null; mean and rstd (rows,) are kept for the backward pass.
void layer_norm_forward(int rows, int n, const float* x, const float* weight, const float* bias, float eps,
                        float* out, float* mean, float* rstd);

struct LayerNormBackward {
    int rows, n;
    const float *dout, *x, *weight, *mean, *rstd;
    float *dx, *dweight, *dbias;  // dweight and dbias may be null
    bool add_to_dx;               // the gradient that came along the residual stream is in dx already
    bool accumulate;              // add to dweight and dbias
};

void layer_norm_backward(const LayerNormBackward& call);

}  // namespace mlxgpt
