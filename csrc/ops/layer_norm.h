// Layer normalisation of rows.
#pragma once

namespace mlxgpt {

/// out = (x - mean) * rstd * weight + bias, row by row. out, x: (rows, n) without gaps; weight, bias: (n,),
/// bias may be null. Also writes mean and rstd = 1 / sqrt(variance + eps), (rows,), for the backward pass.
void layer_norm_forward(int rows, int n, const float* x, const float* weight, const float* bias, float eps,
                        float* out, float* mean, float* rstd);

struct LayerNormBackward {
    int rows, n;
    const float *dout, *x, *weight, *mean, *rstd;
    float *dx, *dweight, *dbias;  // dweight and dbias may be null
    bool add_to_dx;               // dx already holds the gradient that came along the residual stream
    bool accumulate;              // add to dweight and dbias
};

/// Writes dx, dweight and dbias, or adds to them.
void layer_norm_backward(const LayerNormBackward& call);

}  // namespace mlxgpt
